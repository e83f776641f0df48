#pragma once
// What the kernel may go on reading after zero-copy sends on one lane: source memory, and the
// buffers that travelled with it. The kernel numbers such sends from 0 and says later, in ranges,
// which of them need their memory no more.

#include <cstdint>
#include <deque>
#include <map>

#include "wire/control.hpp"

namespace kvwire {

class Loans {
public:
    // `owner`'s memory, or null, and two buffers, which sends with numbers below `until` read.
    void keep(const void* owner, Bytes&& head, Bytes&& body, uint64_t until);
    // The kernel's numbers, both included; they count modulo 2^32 and may be ahead of the keeping.
    void returned(uint32_t first, uint32_t last);

    bool holds(const void* owner) const;
    bool empty() const { return kept_.empty(); }
    bool is_returned(uint64_t until) const { return until <= returned_; }

private:
    struct Kept {
        const void* owner;
        Bytes head, body;
        uint64_t until;
    };
    std::deque<Kept> kept_;              // in the order of the sends
    uint64_t returned_ = 0;              // all sends with lesser numbers are
    std::map<uint64_t, uint64_t> early_;  // [first, stop) of others
};

}  // namespace kvwire
