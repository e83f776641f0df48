#pragma once
// Sans-I/O writing side of a lane: control frames and chunks in order, as iovecs over the source
// pages. Chunk payloads are borrowed, never copied, unless they had to be coded or gathered.
//
// Checksums and coding are the expensive part, so a chunk is queued first and prepared later:
// begin_preparing(), prepare(), then the link's commit(). With several threads, all calls but
// prepare() are made under the owner's lock, and `in_section` is true while one of them works on
// the source memory without it.
//
// With zero-copy sends the kernel goes on reading after it has taken the bytes: see loans().

#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "plan/placement.hpp"
#include "wire/chunk_coder.hpp"
#include "wire/chunk_rounder.hpp"
#include "wire/control.hpp"
#include "wire/frames.hpp"
#include "wire/loans.hpp"
#include "wire/staged.hpp"

namespace kvwire {

class LaneWriter {
public:
    static constexpr size_t IOV_MAX_WRITE = 1024;

    void control(FrameType type, const Id& transfer_id, uint32_t segment_index,
                 const Bytes& payload);

    // A chunk to be read from the pages that `placement` names; `owner` tells whose it is.
    struct Source {
        const Placement* placement = nullptr;
        void* owner = nullptr;
        Codec codec = Codec::RAW;  // when it makes the chunk smaller
        uint32_t item_bytes = 1;
        const SegmentCoding* coding = nullptr;      // for Codec::TIERED
        SendTables* tables = nullptr;               // of the link, likewise
        const SegmentRounding* rounding = nullptr;  // where something is lossy: how it is coded
        const StagedChunk* staged = nullptr;        // where a device has done it all
        bool timed = false;                         // find out how long coding takes
        bool sampled = false;                       // ... and what TIERED would make of it
    };
    struct Prepared {
        const FrameHeader& header;
        const Source& source;
        uint32_t coding_ns = 0;  // of a core; 0: not measured
        bool was_usual = true;   // see ChunkEncoder
        uint32_t tiered_bytes = 0;  // what it would make of it; 0: not known
    };
    void chunk(const FrameHeader& header, const Source& source);  // header: all but the checksums

    bool begin_preparing();  // false: nothing waits for it
    void prepare();
    // Calls take(Prepared) for each chunk prepared since. It says false when it has detached
    // that owner.
    template <class Take>
    void commit(Take&& take);

    // Lets go of the source memory of `owner`. Of frames begun, or committed to, the rest goes out
    // as zeros, whose checksum the receiver will find wrong or has stopped caring about.
    void detach(const void* owner);

    std::atomic<bool> in_section{false};

    size_t queued_bytes() const { return queued_bytes_; }
    size_t queued_control_bytes() const { return queued_control_bytes_; }
    bool empty() const { return queued_bytes_ == 0; }

    size_t next_iovecs(const iovec** iov);  // 0 when empty; valid until the next call here
    // `bytes` of them were taken by the kernel; `lent`: by a zero-copy send.
    void advance(size_t bytes, bool lent = false);

    // To be called between the two when the kernel is asked for zero copy.
    void lend() { in_doubt_ = lent_entries_; }
    // Has the kernel, or might it have, a reason to read the memory of `owner`?
    bool lends(const void* owner) const;
    const std::shared_ptr<Loans>& loans() const { return loans_; }
    // Nothing more will be sent: what was sent in part is among the loans from now on.
    void retire();

private:
    struct Entry {
        enum State : uint8_t { CONTROL, QUEUED, PREPARING, COMMITTED };
        State state = CONTROL;
        bool zeros = false;
        Bytes head;  // control frames, or one chunk header
        Bytes body;  // coded or gathered payload; empty: from the pages
        FrameHeader header;
        Source source;
        uint64_t payload_bytes = 0;  // beyond head
        uint64_t sent = 0;
        uint32_t coding_ns = 0;
        bool was_usual = true;
        uint32_t tiered_bytes = 0;
        const void* lender = nullptr;  // as source.owner, even when detached
        uint64_t lent_until = 0;       // zero-copy sends with lesser numbers read it; 0: none
        uint64_t total() const { return head.size() + payload_bytes; }
    };

    void prepare(Entry& entry);
    void code(Entry& entry);
    bool is_waiting(const Entry& entry) const {
        return entry.state == Entry::QUEUED || entry.state == Entry::PREPARING;
    }
    void wait_for_section() const;
    void drop(Entry& entry);
    void recycle(Bytes&& buffer);
    size_t entry_iovecs(const Entry& entry, size_t at);

    std::deque<Entry> entries_;
    std::vector<Entry*> preparing_;
    std::vector<Bytes> spare_;
    ChunkEncoder encoder_;             // prepare()'s own
    std::unique_ptr<ChunkRounder> rounder_;  // ... once it was needed
    size_t queued_bytes_ = 0;
    size_t queued_control_bytes_ = 0;  // an entry counts until all of it has left
    size_t lent_entries_ = 0;          // in the iovecs given out last
    size_t in_doubt_ = 0;              // of these: perhaps in a zero-copy send
    uint64_t zero_copy_sends_ = 0;
    const std::shared_ptr<Loans> loans_ = std::make_shared<Loans>();
    std::vector<iovec> iov_;
};

template <class Take>
void LaneWriter::commit(Take&& take) {
    for (size_t i = 0; i < entries_.size();) {
        if (entries_[i].state == Entry::PREPARING) {
            const Entry& entry = entries_[i];
            const Prepared done{entry.header, entry.source, entry.coding_ns, entry.was_usual,
                                entry.tiered_bytes};
            if (!take(done)) continue;
            queued_bytes_ += entries_[i].payload_bytes - entries_[i].header.raw_bytes;
            entries_[i].state = Entry::COMMITTED;
        }
        ++i;
    }
}

}  // namespace kvwire
