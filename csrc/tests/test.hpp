// Just enough of a test framework: TEST registers, CHECK records and goes on.
#pragma once

#include <iostream>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace kvwire::test {

struct Case {
    const char* name;
    void (*body)();
};

inline std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}

inline int failures = 0;

struct Registration {
    Registration(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

inline void fail(const char* file, int line, const std::string& what) {
    ++failures;
    std::cerr << file << ":" << line << ": " << what << "\n";
}

template <class T>
std::string show(const T& value) {
    std::ostringstream out;
    if constexpr (std::is_enum_v<T>) {
        out << +static_cast<std::underlying_type_t<T>>(value);
    } else if constexpr (std::is_integral_v<T>) {
        out << +value;
    } else {
        out << value;
    }
    return out.str();
}

template <class A, class B>
void check_equal(const A& a, const B& b, const char* file, int line, const char* text) {
    if (a == b) return;
    fail(file, line, std::string(text) + ": " + show(a) + " is not " + show(b));
}

}  // namespace kvwire::test

#define TEST(name)                                                              \
    static void name();                                                         \
    static const kvwire::test::Registration name##_registration(#name, name);   \
    static void name()

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) kvwire::test::fail(__FILE__, __LINE__, #condition);   \
    } while (false)

#define CHECK_EQ(a, b) kvwire::test::check_equal(a, b, __FILE__, __LINE__, #a " == " #b)
