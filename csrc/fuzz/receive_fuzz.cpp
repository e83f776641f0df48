// A receiver and a peer that says anything: two tickets, bound, pulled, filled and cancelled at any
// time, and frames, honest or changed, on lanes that come and go.

#include <utility>

#include "fuzz/fuzz.hpp"
#include "tests/link_world.hpp"

namespace kvwire {
namespace {

using namespace fuzz;

constexpr uint32_t LANES = 3;
constexpr uint64_t TICK_NS = 100'000'000, LONG_TICK_NS_MAX = 60'000'000'000;
const Id OTHER_TICKET = id_of('T');

Manifest small(const Id& ticket, bool is_lossy, uint16_t rank = 0, uint16_t ranks = 1,
               uint32_t blocks = 0) {
    Manifest manifest = small_hybrid(rank, ranks, blocks, is_lossy);
    manifest.ticket_id = ticket;
    return manifest;
}

// Two ranks fill the one ticket, one rank the other.
Manifest wanted(const Id& ticket, bool is_lossy) {
    Manifest manifest = small(ticket, is_lossy);
    if (ticket == TICKET) manifest.source_rank_count = 2;
    return manifest;
}

struct Honest {
    std::vector<Frame> frames;  // all that the senders say, in order
    Bytes content, other_content;
    bool is_lossy;
};

Honest capture(uint8_t codec, uint32_t blocks, bool is_lossy = false) {
    Random random{ByteSpan{}};
    Honest honest;
    honest.is_lossy = is_lossy;
    ReceiverEnd receiver;
    Destination other(receiver.tickets);
    SenderEnd sender;
    sender.open_lane(0);
    receiver.open_lane(0);
    receiver.bind(wanted(TICKET, is_lossy), random);
    other.bind(wanted(OTHER_TICKET, is_lossy), random);
    const Memory truth(small(TICKET, is_lossy), random);
    std::vector<std::unique_ptr<Source>> sources;
    for (uint8_t i = 0; i < 3; ++i) {
        const Manifest part = i < 2 ? small(TICKET, is_lossy, i, 2, blocks)
                                    : small(OTHER_TICKET, is_lossy, 0, 1, blocks);
        sources.push_back(
            std::make_unique<Source>(id_of(uint8_t(i + 1)), part, *truth.map, random, codec));
        if (is_lossy) sources.back()->transfer->roundings = roundings_of(part, random);
        sender.link.open(sources.back()->transfer);
        const std::vector<Item> items = all_items(part);
        sources.back()->push(sender.link, {items.begin(), items.begin() + 2});
        sources.back()->push(sender.link, {items.begin() + 2, items.end()});
        SendLink::finish(*sources.back()->transfer, {}, 0);
    }
    while (!receiver.ended || !other.ended) {
        const Bytes stream = sender.take(0);
        for (const Frame& frame : frames_of(stream)) honest.frames.push_back(frame);
        receiver.feed(0, stream);
        sender.feed(0, receiver.take(0));
    }
    const bool has_rounded = std::any_of(
        honest.frames.begin(), honest.frames.end(), [](const Frame& frame) {
            return frame.type() == FrameType::CHUNK &&
                   Codec(frame.header.codec) == Codec::QUANTISED;
        });
    CHECK_EQ(has_rounded, is_lossy);
    honest.content = receiver.delivered;
    honest.other_content = other.delivered;
    return honest;
}

const Honest& honest(uint64_t which) {
    static const Honest all[] = {capture(0, 0), capture(1, 0), capture(0, 16), capture(2, 0),
                                 capture(2, 0, true), capture(2, 16, true)};
    return all[which];
}

// Stands between the lanes and the machine, and sees who may write where.
class Watch : public FrameHandler {
public:
    explicit Watch(ReceiveLink& link) : link_(link) {}

    void on_control(uint32_t lane, const FrameHeader& header, ByteSpan payload) override {
        link_.on_control(lane, header, payload);
    }
    ChunkTarget* on_chunk(uint32_t lane, const FrameHeader& header) override {
        writing_[lane] = {header, link_.on_chunk(lane, header)};
        return writing_[lane].target;
    }
    void on_chunk_end(uint32_t lane, uint32_t payload_crc) override {
        link_.on_chunk_end(lane, payload_crc);
        CHECK(writing_[lane].target->discards());
        writing_[lane].target = nullptr;
    }

    void lane_opened(uint32_t lane) { writing_[lane].target = nullptr; }

    // A chunk's destination has one writer at most.
    void check(const LinkEnd<ReceiveLink>& end) const {
        const auto writes = [&](uint32_t lane) {
            return end.is_open(lane) && writing_[lane].target && !writing_[lane].target->discards();
        };
        for (uint32_t a = 0; a < LANES; ++a)
            for (uint32_t b = a + 1; b < LANES && writes(a); ++b) {
                if (!writes(b)) continue;
                const FrameHeader &one = writing_[a].header, &two = writing_[b].header;
                CHECK(one.transfer_id != two.transfer_id ||
                      one.segment_index != two.segment_index || one.raw_offset != two.raw_offset);
            }
    }

private:
    struct Writing {
        FrameHeader header;
        ChunkTarget* target = nullptr;
    };
    ReceiveLink& link_;
    Writing writing_[LANES];
};

class Watched : public ReceiverEnd {
public:
    // What one read takes of the bytes, and digests; other lanes may act before it is acted upon.
    size_t read(uint32_t lane, const uint8_t* bytes, size_t count) {
        act(lane);
        if (!is_open(lane)) return count;
        LaneReader& reader = *readers_.at(lane);
        const iovec* iov;
        const size_t iov_count = reader.next_iovecs(&iov);
        reader.begin_section();
        arrived_[lane] = copy_in(iov, iov_count, bytes, count);
        reader.digest(arrived_[lane]);
        reader.end_section();
        return arrived_[lane];
    }

    void act(uint32_t lane) {
        const size_t arrived = std::exchange(arrived_[lane], 0);
        if (arrived > 0)
            guarded(lane, [&](LaneReader& reader) { reader.advance(arrived); });
    }

    void open(uint32_t lane) {
        arrived_[lane] = 0;
        watch_.lane_opened(lane);
        open_lane(lane);
    }

    void check() const { watch_.check(*this); }

private:
    FrameHandler& handler() override { return watch_; }

    Watch watch_{link};
    size_t arrived_[LANES] = {};
};

class Conversation {
public:
    explicit Conversation(Random& choices)
        : choices_(choices), honest_(honest(pick(choices, 0, 5))) {}

    void run() {
        while (choices_.has_choices()) {
            step();
            receiver_.check();
        }
        cancel(receiver_, TICKET);
        cancel(other_, OTHER_TICKET);
        receiver_.link.fail_all(Error(ErrorCode::CLOSED, "the end"));
        CHECK_EQ(receiver_.link.open_transfers(), 0u);
        if (changed_) return;
        if (receiver_.complete()) CHECK(receiver_.delivered == honest_.content);
        if (other_.complete()) CHECK(other_.delivered == honest_.other_content);
    }

private:
    void step() {
        const uint32_t lane = uint32_t(pick(choices_, 0, LANES - 1));
        switch (pick(choices_, 0, 15)) {
            case 0: return open_lane(lane);
            case 1: return lose_lane(lane);
            case 2: return bind(receiver_, TICKET);
            case 3: return bind(other_, OTHER_TICKET);
            case 4: return cancel(receiver_, TICKET);
            case 5: return cancel(other_, OTHER_TICKET);
            case 6: return pull();
            case 7: return tick();
            case 8: frames_of(receiver_.take(lane)); return;
            case 9: return hear(lane, {});
            case 10: case 11: return say_changed(lane);
            case 12: next_ = pick(choices_, 0, honest_.frames.size() - 1); return;
            default: return say_next(lane);
        }
    }

    void open_lane(uint32_t lane) {
        if (receiver_.is_open(lane)) return;
        said_[lane].clear();
        receiver_.open(lane);
    }

    void lose_lane(uint32_t lane) {
        pick(choices_, 0, 1) ? receiver_.lane_lost(lane) : receiver_.stream_ended(lane);
    }

    void bind(Destination& destination, const Id& ticket) {
        if (destination.ticket) return;
        Random contents{ByteSpan{}};
        destination.bind(wanted(ticket, honest_.is_lossy), contents, pick(choices_, 0, 1));
        receiver_.link.ticket_added(ticket);
    }

    void cancel(Destination& destination, const Id& ticket) {
        if (!destination.ticket) return;
        destination.ticket->fail(Error(ErrorCode::CANCELLED, "the receiver cancelled"));
        receiver_.link.pull_withdrawn(ticket);
        CHECK(destination.ended);
    }

    // Lanes stall, are given up, and at last the link with them.
    void tick() {
        now_ns_ += pick(choices_, 0, 3) ? pick(choices_, 0, 2) * TICK_NS
                                        : pick(choices_, 0, LONG_TICK_NS_MAX);
        receiver_.link.expire(now_ns_);
        const Upkeep upkeep = receiver_.link.upkeep(now_ns_);
        for (const uint32_t lane : upkeep.dead) receiver_.lane_lost(lane);
        if (upkeep.expired)
            receiver_.link.fail_all(receiver_.link.liveness().lease_over(now_ns_));
    }

    void pull() {
        if (receiver_.ticket && !receiver_.ended)
            receiver_.link.pull(TICKET, {OFFER, 0, receiver_.manifest.token_stop,
                                         uint16_t(pick(choices_, 0, 1)), 0, 1});
    }

    void say_next(uint32_t lane) {
        hear(lane, honest_.frames[next_].bytes());
        next_ = (next_ + 1) % honest_.frames.size();
    }

    void say_changed(uint32_t lane) {
        changed_ = true;
        Frame frame = honest_.frames[pick(choices_, 0, honest_.frames.size() - 1)];
        FrameHeader& header = frame.header;
        switch (pick(choices_, 0, 7)) {
            case 0: header.transfer_id = id_of(uint8_t(pick(choices_, 0, 4))); break;
            case 1: header.segment_index = uint32_t(pick(choices_, 0, 2)); break;
            case 2: header.type = type_of(pick(choices_, 0, 20)); break;
            default: break;
        }
        if (header.type == FrameType::CHUNK) {
            header.attempt = uint32_t(pick(choices_, 0, 3));
            if (pick(choices_, 0, 3) == 0) header.raw_offset = odd_number(choices_);
            if (pick(choices_, 0, 3) == 0) header.codec = uint8_t(pick(choices_, 0, 3));
        }
        change(frame.payload, choices_);
        Bytes bytes = frame.bytes();
        if (pick(choices_, 0, 7) == 0) bytes[pick(choices_, 0, bytes.size() - 1)] ^= 1;
        hear(lane, bytes);
    }

    // Of what was said on a lane all arrives, or a part, and the rest some time later.
    void hear(uint32_t lane, const Bytes& bytes) {
        Bytes& said = said_[lane];
        said.insert(said.end(), bytes.begin(), bytes.end());
        const size_t count = pick(choices_, 0, 3) ? said.size() : pick(choices_, 0, said.size());
        receiver_.link.heard(lane, now_ns_);
        for (size_t at = 0; at < count;) at += receiver_.read(lane, &said[at], count - at);
        said.erase(said.begin(), said.begin() + count);
        if (pick(choices_, 0, 3)) receiver_.act(lane);
    }

    Random& choices_;
    const Honest& honest_;
    Watched receiver_;
    Destination other_{receiver_.tickets};
    Bytes said_[LANES];
    size_t next_ = 0;
    uint64_t now_ns_ = 1;
    bool changed_ = false;
};

}  // namespace
}  // namespace kvwire

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return kvwire::fuzz::play<kvwire::Conversation>(data, size);
}
