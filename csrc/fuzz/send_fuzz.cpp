// A sender and a peer that answers anything: transfers opened, offered, pushed, finished and
// cancelled at any time, and answers, right or wrong, on lanes that come and go. Memory that was
// given back is poisoned: whoever still reads it is found.

#include <sanitizer/asan_interface.h>

#include "fuzz/fuzz.hpp"
#include "tests/link_world.hpp"

namespace kvwire {
namespace {

using namespace fuzz;

constexpr uint32_t LANES = 3;
constexpr uint64_t TICK_NS = 100'000'000;
constexpr uint8_t SOURCES = 3;
constexpr uint8_t OFFERED = 1;  // the one that is offered, not opened
constexpr uint8_t LOSSY = 3;     // tiered, and rounded first

const Memory& truth(bool is_lossy) {
    static Random random{ByteSpan{}};
    static const Memory exact(small_hybrid(0, 1, 0, false), random);
    static const Memory lossy(small_hybrid(0, 1, 0, true), random);
    return is_lossy ? lossy : exact;
}

class Lent : public Source {
public:
    using Source::Source;

    void on_push_complete(uint32_t push, const Error& error) override {
        Source::on_push_complete(push, error);
        const Placement placement = placed(manifest, pushes[push].items, *memory.map);
        iovec iov[256];
        for (uint64_t at = 0, covered = 0; at < placement.bytes(); at += covered) {
            const size_t count =
                placement.iovecs(at, placement.bytes() - at, iov, 256, &covered);
            for (size_t i = 0; i < count; ++i)
                __asan_poison_memory_region(iov[i].iov_base, iov[i].iov_len);
        }
    }

    // As an owner must not while it is lent.
    void spoil() {
        uint8_t* const at = memory.map->begin()->second.base;
        if (!ended && !__asan_address_is_poisoned(at)) ++*at;
    }

    // What the machine says of itself.
    void check() const {
        if (ended || !transfer->grant) return;
        uint64_t in_flight_bytes = 0;
        for (const auto& segment : transfer->segments) {
            uint32_t receipted = 0;
            for (uint32_t i = 0; i < segment->chunks.size(); ++i) {
                const auto state = segment->chunks[i].state;
                receipted += state == SendTransfer::Chunk::RECEIPTED;
                if (state == SendTransfer::Chunk::IN_FLIGHT)
                    in_flight_bytes += segment->announcement.chunk_raw_bytes(i);
            }
            if (!segment->complete) CHECK_EQ(segment->receipted, receipted);
        }
        CHECK_EQ(transfer->in_flight_bytes, in_flight_bytes);
        CHECK(in_flight_bytes <= transfer->grant->window_bytes);
    }
};

class Stepped : public SenderEnd {
public:
    using SenderEnd::SenderEnd;

    // One step of a lane that writes: others may act between any two. At most `most` bytes leave.
    void step(uint32_t lane, size_t most) {
        if (!is_open(lane)) return;
        LaneWriter& writer = *writers_.at(lane);
        Step& step = steps_[lane];
        switch (step) {
            case LOAD:
                if (!link.load(lane)) return;
                step = writer.begin_preparing() ? COMMIT : WRITE;
                if (step == COMMIT) writer.prepare();
                return;
            case COMMIT:
                link.commit(lane);
                step = WRITE;
                return;
            case WRITE: {
                const iovec* iov;
                const size_t count = writer.next_iovecs(&iov);
                sent_[lane] = copy_out(iov, count, most);
                step = sent_[lane] ? SETTLE : LOAD;
                return;
            }
            case SETTLE:
                writer.advance(sent_[lane]);
                step = LOAD;
        }
    }

    void open(uint32_t lane) {
        steps_[lane] = LOAD;
        open_lane(lane);
    }

private:
    enum Step { LOAD, COMMIT, WRITE, SETTLE };

    static size_t copy_out(const iovec* iov, size_t count, size_t most) {
        Bytes bytes;
        for (size_t i = 0; i < count && bytes.size() < most; ++i) {
            const auto* from = static_cast<const uint8_t*>(iov[i].iov_base);
            bytes.insert(bytes.end(), from,
                         from + std::min(iov[i].iov_len, most - bytes.size()));
        }
        return bytes.size();
    }

    Step steps_[LANES] = {};
    size_t sent_[LANES] = {};
};

class Conversation {
public:
    explicit Conversation(Random& choices)
        : choices_(choices), codec_(uint8_t(pick(choices, 0, 3))),
          manifest_(small_hybrid(0, 1, pick(choices, 0, 1) ? 16 : 0, codec_ == LOSSY)),
          sender_(pick(choices, 0, 1) ? 8192 : 4096) {}

    void run() {
        while (choices_.has_choices()) {
            step();
            for (const auto& source : sources_)
                if (source) source->check();
        }
        const Error why(ErrorCode::CLOSED, "the end");
        sender_.link.fail_all(why);
        CHECK_EQ(sender_.link.open_transfers(), 0u);
        for (const auto& source : sources_)
            if (source && !source->ended) SendLink::end_unopened(*source->transfer, why);
    }

private:
    Lent& pick_source() {
        const uint64_t which = pick(choices_, 0, SOURCES - 1);
        Random contents{ByteSpan{}};
        std::unique_ptr<Lent>& source = sources_[which];
        if (source) return *source;
        const bool is_lossy = codec_ == LOSSY;
        source = std::make_unique<Lent>(id_of(uint8_t(which + 1)), manifest_, *truth(is_lossy).map,
                                        contents, is_lossy ? uint8_t(Codec::TIERED) : codec_);
        Random rungs(which);
        if (is_lossy) source->transfer->roundings = roundings_of(manifest_, rungs);
        return *source;
    }

    void step() {
        const uint32_t lane = uint32_t(pick(choices_, 0, LANES - 1));
        Lent& source = pick_source();
        switch (pick(choices_, 0, 15)) {
            case 0: return sender_.is_open(lane) ? (void)0 : open_lane(lane);
            case 1: return lose_lane(lane);
            case 2: return start(source);
            case 3: case 4: return push(source);
            case 5: SendLink::finish(*source.transfer, {}, 0); return;
            case 6: return cancel(source);
            case 7: case 8: return write(lane);
            case 9: return tick(lane);
            case 10: return source.spoil();
            default: return hear(lane, answer(source).bytes());
        }
    }

    void open_lane(uint32_t lane) {
        heard_[lane].clear();
        sender_.open(lane);
    }

    void lose_lane(uint32_t lane) {
        pick(choices_, 0, 1) ? sender_.lane_lost(lane) : sender_.stream_ended(lane);
    }

    void start(Lent& source) {
        SendTransfer& transfer = *source.transfer;
        if (transfer.home || transfer.offered || source.ended) return;
        if (&source != sources_[OFFERED].get()) return sender_.link.open(source.transfer);
        transfer.offered = true;
        sender_.offers.offers[{OFFER, 0, 0}] = source.transfer;
    }

    // Lanes stall, are given up, and at last the link with them.
    void tick(uint32_t lane) {
        now_ns_ += pick(choices_, 0, 7) * TICK_NS;
        const uint64_t unacked_bytes = pick(choices_, 0, 1) * 1000;
        if (sender_.is_open(lane))
            sender_.link.liveness().sent(lane, unacked_bytes + pick(choices_, 0, 1) * 1000,
                                         unacked_bytes, now_ns_);
        const Upkeep upkeep = sender_.link.upkeep(now_ns_);
        for (const uint32_t dead : upkeep.dead) sender_.lane_lost(dead);
        if (upkeep.expired) sender_.link.fail_all(sender_.link.liveness().lease_over(now_ns_));
    }

    // Each item once, in order. An offer is pushed before it is pulled, as an endpoint does.
    void push(Lent& source) {
        const std::vector<Item> items = all_items(source.manifest);
        size_t at = 0;
        for (const Source::Push& push : source.pushes) at += push.items.size();
        const size_t stop = std::min(items.size(), at + pick(choices_, 0, 3));
        const std::vector<Item> some(items.begin() + at, items.begin() + stop);
        if (source.ended || source.transfer->finished) return;
        const int32_t priority = int32_t(pick(choices_, 0, 2));
        if (source.transfer->home) return source.push(sender_.link, some, priority);
        source.pushes.push_back({some, false});
        source.transfer->pushes.emplace_back();
        source.transfer->pushes.back().items = some;
        source.transfer->pushes.back().priority = priority;
    }

    void cancel(Lent& source) {
        if (source.ended) return;
        const Error why(ErrorCode::CANCELLED, "the sender cancelled");
        if (source.transfer->home) return sender_.link.fail(*source.transfer, why);
        SendLink::end_unopened(*source.transfer, why);
        sender_.offers.offers.erase({OFFER, 0, 0});
        CHECK(source.ended);
    }

    void write(uint32_t lane) {
        static const size_t sizes[] = {1, 64, 100, 1000, 4096, 10000, SIZE_MAX, SIZE_MAX};
        sender_.step(lane, sizes[pick(choices_, 0, 7)]);
    }

    // The right answer as far as there is one, and sometimes changed.
    Frame answer(const Lent& source) {
        Frame made = right_answer(source);
        if (pick(choices_, 0, 3) == 0) {
            change(made.payload, choices_);
            if (pick(choices_, 0, 3) == 0) made.header.type = type_of(pick(choices_, 0, 20));
        }
        return made;
    }

    Frame right_answer(const Lent& source) {
        const SendTransfer& transfer = *source.transfer;
        const uint32_t index = uint32_t(pick(choices_, 0, 3));
        const SendTransfer::Segment* segment =
            index < transfer.segments.size() ? transfer.segments[index].get() : nullptr;
        const uint32_t chunk = uint32_t(pick(choices_, 0, 1));
        switch (pick(choices_, 0, 7)) {
            case 0: return frame(FrameType::GRANT, encode(grant()), transfer.id);
            case 1:
                return frame(FrameType::RECEIPT,
                             encode(std::vector<ReceiptEntry>{
                                 {index, 0, 0, segment ? segment->digest : 0}}),
                             transfer.id);
            case 2: case 3:
                return frame(FrameType::RECEIPT,
                             encode(std::vector<ReceiptEntry>{{index, chunk, 1, 0}}), transfer.id);
            case 4: return frame(FrameType::REPAIR, encode(repair(segment, index, chunk)),
                                 transfer.id);
            case 5: return frame(FrameType::DONE, encode(done(transfer)), transfer.id);
            case 6:
                return frame(FrameType::PULL, encode(Pull{OFFER, pick(choices_, 0, 1) * 10,
                                                          100 - pick(choices_, 0, 1) * 7, 0, 0, 1}),
                             TICKET);
            default:
                return frame(FrameType::ABORT, encode(Error(ErrorCode::CANCELLED, "cancelled")),
                             pick(choices_, 0, 3) ? transfer.id : Id{});
        }
    }

    Grant grant() {
        static const uint64_t windows[] = {4096, 8192, 12000, 1 << 20};
        static const uint32_t codecs[] = {1, 3, 7, 15};
        const uint64_t window = windows[pick(choices_, 0, 3)];
        return {window, codecs[pick(choices_, 0, 3)], 8192};
    }

    std::vector<RepairEntry> repair(const SendTransfer::Segment* segment, uint32_t index,
                                    uint32_t chunk) {
        const bool known = segment && chunk < segment->chunks.size();
        const uint32_t attempt = known ? segment->chunks[chunk].attempt : 0;
        return {{index, chunk, attempt, ErrorCode::PAYLOAD_CORRUPT, 1, 2}};
    }

    static Done done(const SendTransfer& transfer) {
        Done done;
        for (const auto& segment : transfer.segments) {
            const uint64_t raw_bytes = segment->announcement.raw_bytes;
            done.raw_bytes += raw_bytes;
            done.digest =
                digest_segment(done.digest, segment->index, segment->digest, raw_bytes);
        }
        return done;
    }

    void hear(uint32_t lane, const Bytes& bytes) {
        Bytes& heard = heard_[lane];
        heard.insert(heard.end(), bytes.begin(), bytes.end());
        const size_t count = pick(choices_, 0, 7) ? heard.size() : pick(choices_, 0, heard.size());
        sender_.link.heard(lane, now_ns_);
        sender_.feed(lane, heard.data(), count);
        heard.erase(heard.begin(), heard.begin() + count);
    }

    Random& choices_;
    const uint8_t codec_;
    const Manifest manifest_;
    std::unique_ptr<Lent> sources_[SOURCES];
    Stepped sender_;
    Bytes heard_[LANES];
    uint64_t now_ns_ = 1;
};

}  // namespace
}  // namespace kvwire

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return kvwire::fuzz::play<kvwire::Conversation>(data, size);
}
