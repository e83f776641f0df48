#pragma once
// The sending end of a link as a machine without I/O: opens transfers, cuts pushed items into
// chunks, hands chunks to lanes as they drain, repairs, and tells when source memory is free again.

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "wire/codec_choice.hpp"
#include "wire/link_machine.hpp"
#include "wire/link_tables.hpp"
#include "wire/manifest.hpp"
#include "wire/turns.hpp"
#include "wire/segment_rounding.hpp"
#include "wire/staged.hpp"

namespace kvwire {

class CodeBook;

// What the owner of a transfer hears, on the thread that drives the protocol.
class TransferObserver {
public:
    virtual ~TransferObserver() = default;
    virtual void on_granted() = 0;
    virtual void on_sent(uint64_t wire_bytes, bool again) = 0;
    virtual void on_verified(uint64_t raw_bytes) = 0;
    // Exactly once per push: its source memory is the caller's again. OK: verified at the peer.
    virtual void on_push_complete(uint32_t push, const Error& error) = 0;
    virtual void on_end(const Error& error) = 0;  // exactly once, after all pushes
};

// As the codec of a transfer: whichever is fastest.
constexpr uint8_t CODEC_AUTO = 0xFF;

struct SendOptions {
    uint32_t chunk_bytes = 256 << 10;
    uint32_t transfers_max = 1024;
    uint32_t codecs = 1;
    std::shared_ptr<CodeBook> code_book;  // null: one of its own
    // Of codec "auto": what all links with these options learn.
    std::shared_ptr<CodingRecord> coding_record = std::make_shared<CodingRecord>();
    LivenessOptions liveness;
};

// One transfer, from open() or offer() to its end.
class SendTransfer {
public:
    SendTransfer(const Id& id, Manifest manifest, std::shared_ptr<const MemoryMap> memory,
                 uint8_t codec, TransferObserver& observer)
        : id(id), manifest(std::move(manifest)), memory(std::move(memory)), codec(codec),
          observer(observer) {}

    struct Chunk {
        enum State : uint8_t { UNSENT, IN_FLIGHT, RECEIPTED };
        uint32_t raw_crc = 0;
        uint16_t attempt = 0;
        State state = UNSENT;
        uint8_t lane = 0;
        bool crc_known = false;
    };
    struct Segment {
        uint32_t index = 0;
        uint32_t push = 0;
        int32_t priority = 0;
        SegmentAnnouncement announcement;
        Bytes announcement_payload;
        Placement placement;
        uint32_t item_bytes = 1;
        TensorKind kind;  // of most of its bytes
        std::shared_ptr<const SegmentCoding> coding;      // null: without the tiered code
        std::shared_ptr<const SegmentRounding> rounding;  // null: nothing in it is lossy
        std::shared_ptr<const StagedSegment> staged;      // null: to be read from the pages
        std::vector<Chunk> chunks;
        uint32_t next_unsent = 0;
        uint32_t crcs_known = 0;
        uint32_t receipted = 0;
        uint64_t announced_lanes = 0;  // bit per lane
        bool ended = false;                // SEGMENT_END was said: `digest` is final
        bool end_due = true;               // ... and must be said (again)
        uint32_t digest = 0;
        bool complete = false;
    };
    struct Push {
        std::vector<Item> items;
        int32_t priority = 0;
        std::shared_ptr<const StagedSegment> staged;
        uint32_t open_segments = 0;
        bool complete = false;
    };

    const Id id;
    Manifest manifest;
    const std::shared_ptr<const MemoryMap> memory;
    const uint8_t codec;
    TransferObserver& observer;
    int32_t priority = 0;                  // higher goes first; set before it is opened
    std::vector<Rounding> roundings;       // what may be lossy; likewise
    uint64_t serial = 0;                   // in the order of opening on the link

    std::optional<Grant> grant;
    uint32_t chunk_bytes = 0;              // of its segments; known with the grant
    uint32_t codecs = 1;                   // bit n: codec n may be used; likewise
    std::vector<Push> pushes;
    size_t pushes_announced = 0;           // how many have become segments
    std::vector<std::unique_ptr<Segment>> segments;
    // Segments that may have something left to dispatch: (minus priority, index).
    std::set<std::pair<int64_t, uint32_t>> to_dispatch;
    uint32_t segments_ended = 0, segments_complete = 0;
    std::deque<std::pair<uint32_t, uint32_t>> resend;  // (segment, chunk)
    uint64_t in_flight_bytes = 0;
    uint64_t pushed_bytes = 0, verified_bytes = 0;  // raw
    bool finished = false;
    Bytes end_metadata;
    uint16_t end_metadata_count = 0;
    bool end_said = false, end_due = true;  // of END, as for segments
    bool ended = false;
    bool offered = false;                  // waits for a PULL
    class SendLink* home = nullptr;        // set once it is open
};

class OfferBook {
public:
    using Key = std::tuple<Id, uint16_t, uint16_t>;  // offer, source rank, destination rank
    std::map<Key, std::shared_ptr<SendTransfer>> offers;
};

class SendLink : public LinkMachine {
public:
    SendLink(OfferBook& offers, SendOptions options);
    ~SendLink() override;

    // `payload_bytes_max` and `codecs` as the receiver's greeting states them.
    LaneWriter& lane_opened(uint32_t lane, uint32_t payload_bytes_max, uint32_t codecs);
    void lane_lost(uint32_t lane) override;

    void on_control(uint32_t lane, const FrameHeader& header, ByteSpan payload) override;
    ChunkTarget* on_chunk(uint32_t lane, const FrameHeader& header) override;
    void on_chunk_end(uint32_t, uint32_t) override {}

    void open(std::shared_ptr<SendTransfer> transfer);
    // Pushes are numbered from 0 in the order of the calls. They go by priority, then by number.
    // `staged`: the chunks, as a device made them; then the items are one segment's at most.
    void push(SendTransfer& transfer, std::vector<Item> items, int32_t priority = 0,
              std::shared_ptr<const StagedSegment> staged = nullptr);
    static void finish(SendTransfer& transfer, Bytes metadata, uint16_t metadata_count);
    void fail(SendTransfer& transfer, const Error& error, bool tell_peer = true);
    void fail_all(const Error& error) override;
    // Ends a transfer that no link has seen.
    static void end_unopened(SendTransfer& transfer, const Error& error);

    // Gives the lane work until its writer holds a batch; true when the writer is not empty. The
    // writer then prepares its chunks, and commit() takes note of their checksums.
    bool load(uint32_t lane);
    // False: a transfer has failed, and another lane may have to say so.
    bool commit(uint32_t lane);
    // All three, for one thread; true when there is something to write.
    bool refill(uint32_t lane);
    // How many batches could be loaded now, up to `most`; `*bytes`: how much is in those.
    size_t backlog(size_t most, uint64_t* bytes) const;

    // Source memory that is wanted back while zero-copy sends may still read it comes back, and its
    // transfer ends, when no lane lends it any more: to be called when that may have changed.
    void loans_changed();
    bool wants_back() const { return !recalls_.empty() || !endings_.empty(); }
    uint64_t recalls() const { return recall_serial_; }  // so far
    // The lanes that lend what was wanted back when recalls() was that.
    std::vector<uint32_t> lenders(uint64_t recalls) const;

    void send_close() override;
    size_t open_transfers() const override { return order_.size(); }
    uint64_t verified_bytes() const override { return verified_bytes_; }
    uint64_t backlog_bytes() const;  // pushed, of open transfers, and not verified
    bool is_idle() const override { return order_.empty(); }
    // For codec "auto".
    CodecChoice& choice() { return choice_; }
    const CodecChoice& choice() const { return choice_; }

private:
    struct Lane {
        LaneWriter writer;
        ChunkTarget nowhere;
    };

    LaneWriter& writer(uint32_t lane) override { return lanes_.at(lane).writer; }
    void lane_stalled(uint32_t lane) override;
    void on_speeds(ByteSpan payload) override;
    bool awaits_peer() const override;
    SendTransfer* find(const Id& transfer_id);
    void wake(const SendTransfer& transfer);
    void on_transfer_frame(SendTransfer& transfer, const FrameHeader& header, ByteSpan payload);
    void send_manifest(const SendTransfer& transfer);
    void send(FrameType type, const Id& transfer_id, const Bytes& payload);
    void on_pull(const FrameHeader& header, ByteSpan payload);
    void start_offer(std::shared_ptr<SendTransfer> transfer, const Id& ticket_id, const Pull& pull);
    void on_grant(SendTransfer& transfer, ByteSpan payload);
    void on_receipt(SendTransfer& transfer, ByteSpan payload);
    void on_chunk_receipt(SendTransfer& transfer, SendTransfer::Segment& segment,
                          const ReceiptEntry& entry);
    void on_segment_receipt(SendTransfer& transfer, SendTransfer::Segment& segment,
                            uint32_t digest);
    void on_repair(SendTransfer& transfer, ByteSpan payload);
    void on_done(SendTransfer& transfer, ByteSpan payload);

    void announce_pushes(SendTransfer& transfer);
    static std::vector<Item> clip(const SendTransfer& transfer, const std::vector<Item>& items);
    void add_segment(SendTransfer& transfer, uint32_t push, std::vector<Item> items);
    bool dispatch(uint32_t lane, SendTransfer& transfer);
    bool dispatch_chunk(uint32_t lane, SendTransfer& transfer);
    void announce(uint32_t lane, const SendTransfer& transfer, SendTransfer::Segment& segment);
    static void check_staged(const SendTransfer::Segment& segment);
    void send_chunk(uint32_t lane, SendTransfer& transfer, SendTransfer::Segment& segment,
                    uint32_t chunk_index);
    bool take_checksum(uint32_t lane, const LaneWriter::Prepared& chunk);
    uint32_t agreed_codecs(const SendTransfer& transfer) const;     // bit n: codec n
    uint32_t permitted_codecs(const SendTransfer& transfer) const;  // of those, lossless
    bool staged_is_intact(SendTransfer& transfer, const SendTransfer::Segment& segment,
                          const FrameHeader& header);
    bool source_is_unchanged(SendTransfer& transfer, SendTransfer::Segment& segment,
                             SendTransfer::Chunk& chunk, const FrameHeader& header);
    void send_segment_end(uint32_t lane, SendTransfer& transfer, SendTransfer::Segment& segment);
    bool maybe_send_end(uint32_t lane, SendTransfer& transfer);
    Done summary(const SendTransfer& transfer) const;
    void complete_segment(SendTransfer& transfer, SendTransfer::Segment& segment);
    void give_back(SendTransfer& transfer, SendTransfer::Segment& segment);
    static void release(SendTransfer& transfer, const SendTransfer::Segment& segment);
    void retire(uint32_t lane);
    bool is_lent(const SendTransfer::Segment& segment) const;
    bool is_lent(const SendTransfer& transfer) const;
    static void complete_push(SendTransfer& transfer, uint32_t push, const Error& error);
    void end(SendTransfer& transfer, const Error& error);
    void requeue(SendTransfer& transfer, uint32_t lane);
    void repeat_control();
    void verified(SendTransfer& transfer, uint64_t raw_bytes);
    void note_progress(uint64_t raw_bytes);
    void detach(const SendTransfer::Segment& segment);

    OfferBook& offers_;
    SendOptions options_;
    std::map<uint32_t, Lane> lanes_;
    std::unordered_map<Id, std::shared_ptr<SendTransfer>, IdHash> transfers_;
    std::vector<std::shared_ptr<SendTransfer>> order_;  // oldest first
    Turns<SendTransfer> turns_;  // a transfer without work leaves, and wake() brings it back
    uint64_t opened_ = 0;
    uint64_t verified_bytes_ = 0;
    std::deque<std::pair<Id, Error>> recent_aborts_;
    SendTables tables_;
    struct Recall {
        uint64_t serial;
        std::shared_ptr<SendTransfer> transfer;
        SendTransfer::Segment* segment;
    };
    struct Ending {
        uint64_t serial;
        std::shared_ptr<SendTransfer> transfer;
        Error error;
    };
    std::vector<Recall> recalls_;
    std::vector<Ending> endings_;
    uint64_t recall_serial_ = 0;
    std::vector<std::shared_ptr<Loans>> retired_;  // of lost lanes
    uint32_t payload_bytes_max_ = uint32_t(limits::chunk_bytes_max);
    uint32_t peer_codecs_ = 1;
    CodecChoice choice_;
    // Announced and not verified; and, for codec "auto", what came of it in the present interval.
    uint64_t open_bytes_ = 0, busy_since_ns_ = 0;
    BusyInterval busy_;
};

}  // namespace kvwire
