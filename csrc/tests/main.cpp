#include <cstring>
#include <exception>

#include "tests/test.hpp"

// With an argument, runs only the tests whose name contains it.
int main(int argc, char** argv) {
    using namespace kvwire::test;
    int failed = 0, run = 0;
    for (const Case& test : cases()) {
        if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
        ++run;
        const int failures_before = failures;
        try {
            test.body();
        } catch (const std::exception& error) {
            fail(test.name, 0, std::string("threw ") + error.what());
        }
        if (failures == failures_before) continue;
        ++failed;
        std::cerr << "FAILED " << test.name << "\n";
    }
    std::cout << run - failed << " passed, " << failed << " failed\n";
    return failed == 0 && run > 0 ? 0 : 1;
}
