#pragma once
// The receiving end of a link: FORMAT.md section 10 as a machine without I/O. Frames come in
// through FrameHandler, answers go out through the lanes' writers, bytes land where the tickets
// say.

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "wire/link_machine.hpp"
#include "wire/link_tables.hpp"
#include "wire/manifest.hpp"
#include "wire/share.hpp"
#include "wire/speeds.hpp"
#include "wire/ticket.hpp"

namespace kvwire {

// All tickets of a receiver, shared by its links. Remembers the latest ended ones, so that a late
// manifest hears at once that its ticket is gone.
class TicketBook {
public:
    void add(std::shared_ptr<Ticket> ticket);
    void remove(const Id& id);
    std::shared_ptr<Ticket> find(const Id& id) const;  // null: not bound
    bool was_removed(const Id& id) const { return removed_.count(id) != 0; }
    std::vector<std::shared_ptr<Ticket>> all() const;

private:
    std::unordered_map<Id, std::shared_ptr<Ticket>, IdHash> tickets_;
    std::unordered_set<Id, IdHash> removed_;
    std::deque<Id> removed_order_;
};

struct ReceiveOptions {
    uint64_t window_bytes = uint64_t(256) << 20;
    uint32_t chunk_bytes_max = 1 << 20;
    uint32_t transfers_max = 1024;
    uint32_t codecs = 1;
    uint64_t waiting_bytes_max = 2 << 20;  // manifests that wait for their ticket
    uint64_t state_bytes_max = 8 << 20;    // manifests and announcements of open transfers
    std::shared_ptr<Pool> pool;            // of both, for all links of an endpoint
    std::shared_ptr<TableStore> table_store;  // likewise; null: one of its own
    uint64_t patience_ns = 30'000'000'000;
    uint16_t threads = 1;  // that receive: what the sender is told
    LivenessOptions liveness;
};

class ReceiveLink : public LinkMachine {
public:
    // `wake` is called when a ticket that failed elsewhere leaves something to say here.
    ReceiveLink(TicketBook& tickets, ReceiveOptions options, std::function<void()> wake);
    ~ReceiveLink() override;

    LaneWriter& lane_opened(uint32_t lane);
    void lane_lost(uint32_t lane) override;

    void on_control(uint32_t lane, const FrameHeader& header, ByteSpan payload) override;
    ChunkTarget* on_chunk(uint32_t lane, const FrameHeader& header) override;
    void on_chunk_end(uint32_t lane, uint32_t payload_crc) override;
    void on_chunk_times(uint32_t lane, uint64_t receive_ns, uint64_t digest_ns) override;

    // What came of a chunk that landed in a zone. False: its transfer is not of this link, or over.
    bool landed(const LandingZone::Landed& landed, ErrorCode verdict, uint32_t crc);

    // Writes the receipts gathered since the last call; once per burst of reads.
    void flush();

    // A ticket was bound: opens the transfers that wait for it.
    void ticket_added(const Id& ticket_id);
    void pull(const Id& ticket_id, const Pull& pull);
    void pull_withdrawn(const Id& ticket_id);

    // Gives up on manifests that have waited too long; returns when to call again (0: never).
    uint64_t expire(uint64_t now_ns);

    void fail_all(const Error& error) override;
    void send_close() override;
    bool has_output(uint32_t lane) const { return !lanes_.at(lane).writer.empty(); }
    size_t open_transfers() const override { return transfers_.size(); }
    uint64_t verified_bytes() const override { return verified_bytes_; }
    bool is_idle() const override {
        return transfers_.empty() && waiting_.empty() && pulls_.empty();
    }

private:
    static constexpr uint64_t SEGMENT_STATE_BYTES = 96;  // a Segment and its place in the map
    struct Chunk {
        enum State : uint8_t { MISSING, LEASED, LANDED, VERIFIED };  // LANDED: in a zone
        uint32_t raw_crc = 0;
        uint16_t attempt = 0;  // highest seen
        uint8_t failures = 0;
        State state = MISSING;
        uint8_t lane = 0;      // that it came on, or comes on
    };
    // What a segment needs until it is complete.
    struct Work {
        SegmentAnnouncement announcement;
        std::vector<uint32_t> claimed;  // what each item was the first to claim
        uint32_t item_bytes = 1;
        DType dtype{};  // of its first item
        Placement placement;
        std::shared_ptr<const Placement> landing;  // the same, for those who decode in a zone
        std::vector<Chunk> chunks;
        uint32_t verified = 0;
        std::optional<SegmentEnd> end;
        bool touched = false;
    };
    struct Segment {
        uint32_t announcement_crc = 0;
        uint32_t digest = 0;         // once complete
        uint64_t raw_bytes = 0;
        uint64_t state_bytes = 0;
        std::unique_ptr<Work> work;  // null: complete
    };
    struct Transfer {
        Id id;
        uint32_t manifest_crc = 0;
        uint64_t state_bytes = 0;
        std::unique_ptr<Manifest> manifest;
        std::shared_ptr<Ticket> ticket;
        Grant grant;
        std::map<uint32_t, Segment> segments;
        uint32_t complete_segments = 0;
        uint64_t landed_bytes = 0;  // raw, of chunks that wait for their verdict in a zone
        std::optional<End> end;
    };
    struct Waiting {
        Id transfer_id, ticket_id;
        Bytes payload;
        uint64_t deadline_ns = 0;
    };
    struct Ended {
        std::optional<Done> done;  // otherwise failed with `error`
        Error error;
    };
    // One lane, with the lease it holds and the receipts it owes.
    struct Lane {
        LaneWriter writer;
        ChunkTarget target;
        Transfer* transfer = nullptr;  // of the lease; null: none
        Work* segment = nullptr;
        LandingZone::Room room;  // of the lease, where its ticket has a zone
        std::unique_ptr<uint8_t[]> staging;
        size_t staging_bytes = 0;
        struct Receipt { Id transfer_id; ReceiptEntry entry; };
        std::vector<Receipt> receipts;
    };

    LaneWriter& writer(uint32_t lane) override { return lanes_.at(lane).writer; }
    void lane_stalled(uint32_t) override { repeat_answers(); }
    bool awaits_peer() const override { return !pulls_.empty(); }
    void on_manifest(const FrameHeader& header, ByteSpan payload);
    void open(const Id& transfer_id, ByteSpan payload, std::unique_ptr<Manifest> manifest,
              std::shared_ptr<Ticket> ticket);
    std::deque<Waiting>::iterator find_waiting(const Id& transfer_id);
    bool stop_waiting(const Id& transfer_id);  // false: it was not
    void fail_overtaken(const Id& transfer_id, ByteSpan payload);
    void wait_for_ticket(const Id& transfer_id, const Id& ticket_id, ByteSpan payload);
    void on_transfer_frame(uint32_t lane, const FrameHeader& header, ByteSpan payload);
    void on_segment(Transfer& transfer, const FrameHeader& header, ByteSpan payload);
    void check_items(const Transfer& transfer, const SegmentAnnouncement& announcement) const;
    void on_segment_end(uint32_t lane, Transfer& transfer, const FrameHeader& header,
                        ByteSpan payload);
    void on_end(uint32_t lane, Transfer& transfer, ByteSpan payload);
    void on_abort(const FrameHeader& header, ByteSpan payload);
    void on_stray(const FrameHeader& header);
    void on_tables(const FrameHeader& header, ByteSpan payload);

    void place_chunk(uint32_t lane, Transfer& transfer, Segment& segment);
    void grant_lease(uint32_t lane, Transfer& transfer, Work& segment, Chunk& chunk);
    void revoke_lease(Lane& lane);
    void settle(uint32_t lane, Transfer& transfer, Work& segment, const FrameHeader& header,
                const Landing& landing);
    static void reserve_staging(Lane& lane, size_t bytes);
    void chunk_failed(LaneWriter& writer, const FrameHeader& header, Chunk& chunk,
                      ErrorCode reason, uint32_t actual);
    uint32_t lane_to_answer();

    void owe(uint32_t lane, const Id& transfer_id, ReceiptEntry entry);
    void maybe_complete(uint32_t lane, Transfer& transfer, uint32_t segment_index,
                        Segment& segment);
    void maybe_done(uint32_t lane, Transfer& transfer);
    // By value: the caller's id often lies in the very transfer that goes.
    void fail(Id transfer_id, const Error& error);   // and the ticket with it
    void drop(Id transfer_id, const Error& error);   // without the ticket
    void refuse(Id transfer_id, const Error& error);  // one that was never opened
    void forget(Id transfer_id);
    void remember(Id transfer_id, Ended ended);
    void send_grant(const Transfer& transfer);
    void send(FrameType type, const Id& transfer_id, const Bytes& payload);
    void repeat_answers();
    void say_end(const Id& transfer_id);
    Transfer* find(const Id& transfer_id);

    TicketBook& tickets_;
    ReceiveOptions options_;
    std::function<void()> wake_;
    std::map<uint32_t, Lane> lanes_;
    std::unordered_map<Id, std::unique_ptr<Transfer>, IdHash> transfers_;
    std::deque<Waiting> waiting_;
    std::map<std::pair<Id, uint16_t>, Pull> pulls_;  // by ticket and source rank
    Share waiting_bytes_, state_bytes_;
    ReceiveTables tables_;
    std::unordered_map<Id, Ended, IdHash> ended_;
    std::deque<Id> ended_order_;
    std::unordered_set<Id, IdHash> overtaken_;  // of the ended: the MANIFEST never came
    SpeedMeter meter_;
    uint64_t verified_bytes_ = 0;
    uint32_t lane_heard_ = 0;  // the latest that spoke: surely the peer still has it
};

}  // namespace kvwire
