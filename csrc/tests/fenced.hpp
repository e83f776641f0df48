// Bytes that end at an unreadable page: what is not instrumented, only the MMU watches.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace kvwire::test {

class Fenced {
public:
    explicit Fenced(size_t size) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
        usable_ = (size + page_ - 1) / page_ * page_ + page_;
        base_ = mmap(nullptr, usable_ + page_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        uint8_t* end = static_cast<uint8_t*>(base_) + usable_;
        mprotect(end, page_, PROT_NONE);
        std::fill(static_cast<uint8_t*>(base_), end, kPoison);
        data_ = end - size;
    }
    explicit Fenced(const std::vector<uint8_t>& bytes) : Fenced(bytes.size()) {
        std::copy(bytes.begin(), bytes.end(), data_);
    }
    ~Fenced() { munmap(base_, usable_ + page_); }
    Fenced(const Fenced&) = delete;
    Fenced& operator=(const Fenced&) = delete;

    uint8_t* data() const { return data_; }
    bool untouched_before() const {
        return std::all_of(static_cast<uint8_t*>(base_), data_,
                           [](uint8_t byte) { return byte == kPoison; });
    }

private:
    static constexpr uint8_t kPoison = 0xA5;
    size_t page_, usable_;
    void* base_;
    uint8_t* data_;
};

}  // namespace kvwire::test
