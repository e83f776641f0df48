// Bytes that end at an unreadable page: what is not instrumented, only the MMU watches.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <new>
#include <vector>

namespace kvwire::test {

class Fenced {
public:
    explicit Fenced(size_t size) : usable_((size + page() - 1) / page() * page() + page()) {
        base_ = room(usable_);
        std::memset(base_, kPoison, usable_);
        data_ = base_ + usable_ - size;
    }
    Fenced(const uint8_t* bytes, size_t size) : Fenced(size) {
        std::copy_n(bytes, size, data_);
    }
    explicit Fenced(const std::vector<uint8_t>& bytes) : Fenced(bytes.data(), bytes.size()) {}
    ~Fenced() { spare()[usable_].push_back(base_); }
    Fenced(const Fenced&) = delete;
    Fenced& operator=(const Fenced&) = delete;

    uint8_t* data() const { return data_; }
    bool untouched_before() const {
        const size_t before = size_t(data_ - base_);
        return base_[0] == kPoison && std::memcmp(base_, base_ + 1, before - 1) == 0;
    }

private:
    static constexpr uint8_t kPoison = 0xA5;
    static size_t page() {
        static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
        return bytes;
    }
    // By length; used again, since a system call for each would cost more than what is tested.
    static std::map<size_t, std::vector<uint8_t*>>& spare() {
        static std::map<size_t, std::vector<uint8_t*>> rooms;
        return rooms;
    }
    static uint8_t* room(size_t usable) {
        auto& known = spare()[usable];
        if (!known.empty()) {
            uint8_t* const base = known.back();
            known.pop_back();
            return base;
        }
        void* const made = mmap(nullptr, usable + page(), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (made == MAP_FAILED) throw std::bad_alloc();
        mprotect(static_cast<uint8_t*>(made) + usable, page(), PROT_NONE);
        return static_cast<uint8_t*>(made);
    }

    size_t usable_;
    uint8_t* base_;
    uint8_t* data_;
};

}  // namespace kvwire::test
