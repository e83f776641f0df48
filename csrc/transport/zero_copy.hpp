#pragma once
// Sends that the kernel makes from the caller's memory, after the call: MSG_ZEROCOPY, and the
// notices by which it lets go of that memory.

#include "transport/socket.hpp"

namespace kvwire {

// ON: for each lane until the kernel says that it copied all the same, as it does on loopback.
// ALWAYS: even then.
enum class ZeroCopy : uint8_t { OFF, ON, ALWAYS };

// What KVWIRE_ZEROCOPY forces, 0 or 1 (ALWAYS); else as wished. Throws USAGE.
ZeroCopy zero_copy_mode(ZeroCopy wished);

// Below this many bytes a copy is cheaper than keeping books (the kernel's own advice: 10 KB).
constexpr size_t ZERO_COPY_BYTES_MIN = 16 << 10;

const char* name(ZeroCopy mode);

int enable_zero_copy(const Fd& fd);  // errno; not 0: the system will not
// Unless `*refusal`, an errno, says why they were copied after all, the kernel reads the bytes it
// has taken until it gives notice. Such sends count from 0, when they took any.
IoResult send_zero_copy(const Fd& fd, const iovec* iov, size_t iov_count, int* refusal);
// The limit on locked or option memory is reached: it passes. Other refusals last.
bool is_passing(int refusal);

struct Notice {
    uint32_t first = 0, last = 0;  // the sends that are over
    bool copied = false;
};
bool read_notice(const Fd& fd, Notice* notice);  // false: there is none now

// The peer sees a reset; what has not been sent is dropped, and what was lent for it comes back.
// The descriptor stays, for the notices.
void reset_connection(const Fd& fd);

}  // namespace kvwire
