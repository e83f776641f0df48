#pragma once
// Sans-I/O writing side of a lane: control frames and chunks in order, as iovecs over the source
// pages. Chunk payloads are borrowed, never copied, unless they had to be coded or gathered.

#include <sys/uio.h>

#include <cstdint>
#include <deque>
#include <vector>

#include "plan/placement.hpp"
#include "wire/control.hpp"
#include "wire/frames.hpp"

namespace kvwire {

class LaneWriter {
public:
    static constexpr size_t IOV_MAX_WRITE = 1024;

    void control(FrameType type, const Id& transfer_id, uint32_t segment_index,
                 const Bytes& payload);

    // Payload straight from the pages that `placement` names; `owner` tells whose it is.
    void chunk(const FrameHeader& header, const Placement* placement, const void* owner);
    // Payload from a buffer of the writer's (see borrow_buffer).
    void chunk(const FrameHeader& header, Bytes payload, const void* owner);

    // A buffer for coded or gathered payloads, reused when its chunk has left.
    Bytes borrow_buffer();

    // Lets go of the source memory of `owner`: what is left of its frames goes out as zeros, whose
    // checksum the receiver will find wrong or has stopped caring about.
    void detach(const void* owner);

    size_t queued_bytes() const { return queued_bytes_; }
    size_t queued_control_bytes() const { return queued_control_bytes_; }
    bool empty() const { return queued_bytes_ == 0; }

    size_t next_iovecs(const iovec** iov);  // 0 when empty; valid until the next call here
    void advance(size_t bytes);             // `bytes` of them were taken by the kernel

private:
    struct Entry {
        Bytes head;  // control frames, or one chunk header
        Bytes body;  // coded payload
        const Placement* placement = nullptr;
        const void* owner = nullptr;
        uint64_t offset = 0;         // of the payload in the placement
        uint64_t payload_bytes = 0;  // beyond head
        uint64_t sent = 0;
        bool is_control = false;
        bool zeros = false;
        uint64_t total() const { return head.size() + payload_bytes; }
    };

    void push_chunk(Entry&& entry, const FrameHeader& header);
    size_t entry_iovecs(const Entry& entry, size_t at);

    std::deque<Entry> entries_;
    std::vector<Bytes> spare_;
    size_t queued_bytes_ = 0;
    size_t queued_control_bytes_ = 0;  // an entry counts until all of it has left
    std::vector<iovec> iov_;
};

}  // namespace kvwire
