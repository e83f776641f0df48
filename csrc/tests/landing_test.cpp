// Chunks that a device has made, and chunks that land for one: decoded elsewhere, judged later.

#include "tests/link_world.hpp"

namespace kvwire {
namespace {

using namespace test;

constexpr size_t ROOM_BYTES = 4096;

// A source whose chunks are made before they are pushed; what was lent is overwritten at once.
class StagedSource : public Source {
public:
    using Source::Source;

    void push_staged(SendLink& link, const Item& item) {
        const Placement placement = placed(manifest, {item}, *memory.map);
        auto raw = std::make_shared<Bytes>(placement.bytes());
        placement.gather(0, raw->size(), raw->data());
        auto staged = std::make_shared<StagedSegment>();
        staged->chunk_bytes = transfer->chunk_bytes;
        for (size_t at = 0; at < raw->size(); at += staged->chunk_bytes) {
            const size_t size = std::min<size_t>(staged->chunk_bytes, raw->size() - at);
            staged->chunks.push_back({raw->data() + at, uint32_t(size),
                                      crc32c(0, raw->data() + at, size), Codec::RAW});
        }
        lent.push_back(std::move(raw));
        pushes.push_back({{item}, false});
        if (!ended) link.push(*transfer, {item}, 0, staged);
    }

    void on_push_complete(uint32_t push, const Error& error) override {
        Source::on_push_complete(push, error);
        if (push < lent.size()) std::fill(lent[push]->begin(), lent[push]->end(), uint8_t(0xEE));
    }

    std::vector<std::shared_ptr<Bytes>> lent;
};

// A device that takes its time, and is sometimes wrong.
class Device {
public:
    Device(ReceiverEnd& receiver, Random& random) : receiver_(receiver), random_(random) {}

    void work() {
        LandingZone::Landed landed;
        while (receiver_.zone->pop(&landed, 0)) waiting_.push_back(std::move(landed));
        if (waiting_.empty()) return;
        const size_t which = pick(random_, 0, waiting_.size() - 1);
        landed = std::move(waiting_[which]);
        waiting_.erase(waiting_.begin() + which);
        if (receiver_.ended) return;
        const FrameHeader& header = landed.header;
        if (pick(random_, 0, 9) == 0) {
            receiver_.link.landed(landed, ErrorCode::CODED_INVALID, 0);
            return;
        }
        landed.placement->scatter(header.raw_offset, header.raw_bytes, landed.payload.get());
        const uint32_t crc = crc32c(0, landed.payload.get(), header.raw_bytes);
        receiver_.link.landed(landed, ErrorCode::OK, pick(random_, 0, 9) ? crc : ~crc);
    }

    bool idle() const { return waiting_.empty(); }

private:
    ReceiverEnd& receiver_;
    Random& random_;
    std::vector<LandingZone::Landed> waiting_;
};

void exchange(SenderEnd& sender, ReceiverEnd& receiver, Random& random) {
    for (uint32_t lane = 0; lane < 2; ++lane) {
        receiver.feed(lane, sender.take(lane, pick(random, 1, 9000)));
        sender.feed(lane, receiver.take(lane, pick(random, 1, 9000)));
    }
}

void lose_a_lane(SenderEnd& sender, ReceiverEnd& receiver, Random& random) {
    const uint32_t lane = uint32_t(pick(random, 0, 1));
    sender.lane_lost(lane);
    receiver.lane_lost(lane);
    sender.open_lane(lane);
    receiver.open_lane(lane);
}

}  // namespace

TEST(landed_chunks_count_when_the_device_says_so_whatever_lanes_do) {
    for (uint64_t seed = 0; seed < 60; ++seed) {
        Random random{seed};
        const bool is_staged = seed % 2 == 0;
        const Manifest manifest = small_hybrid(0, 1, 0, false);
        Bytes rooms(2 * ROOM_BYTES);
        const auto zone = std::make_shared<LandingZone>(rooms.data(), 2, ROOM_BYTES);
        ReceiverEnd receiver;
        receiver.zone = zone;
        receiver.bind(manifest, random);
        SenderEnd sender;
        const Memory truth(manifest, random);
        StagedSource source(TRANSFER, manifest, *truth.map, random);
        for (uint32_t lane = 0; lane < 2; ++lane) {
            sender.open_lane(lane);
            receiver.open_lane(lane);
        }
        Device device(receiver, random);
        sender.link.open(source.transfer);
        while (!source.transfer->grant) exchange(sender, receiver, random);
        for (const Item& item : all_items(manifest))
            is_staged ? source.push_staged(sender.link, item) : source.push(sender.link, {item});
        SendLink::finish(*source.transfer, {}, 0);
        for (int step = 0; step < 100'000 && !(source.ended && receiver.ended); ++step) {
            exchange(sender, receiver, random);
            if (pick(random, 0, 3) == 0) device.work();
            if (step < 400 && pick(random, 0, 30) == 0) lose_a_lane(sender, receiver, random);
        }
        CHECK_EQ(source.error.code, ErrorCode::OK);
        CHECK(receiver.complete());
        CHECK(receiver.delivered == content(manifest, all_items(manifest), *truth.map));
        while (!device.idle()) device.work();
        zone->close();
        CHECK_EQ(zone->rooms_free(), size_t(2));
    }
}

TEST(a_payload_takes_neighbouring_rooms_or_memory_of_its_own) {
    Bytes rooms(4 * ROOM_BYTES);
    const auto zone = std::make_shared<LandingZone>(rooms.data(), 4, ROOM_BYTES);
    const auto take = [&](size_t bytes) { return LandingZone::take(zone, bytes); };
    LandingZone::Room small = take(1), large = take(2 * ROOM_BYTES), last = take(ROOM_BYTES);
    CHECK(small.get() == rooms.data() && large.get() == rooms.data() + ROOM_BYTES);
    CHECK(last.get() == rooms.data() + 3 * ROOM_BYTES && zone->rooms_free() == 0);
    small.reset();
    last.reset();
    const LandingZone::Room own = take(ROOM_BYTES + 1);  // two rooms, but no neighbours
    CHECK(own.get() < rooms.data() || own.get() >= rooms.data() + rooms.size());
    CHECK_EQ(zone->rooms_free(), size_t(2));
    large.reset();
    CHECK(take(4 * ROOM_BYTES).get() == rooms.data());
    CHECK_EQ(zone->rooms_free(), size_t(4));
    CHECK(take(4 * ROOM_BYTES + 1).get() != rooms.data());
}

// A transfer over one lane.
struct OneLane {
    explicit OneLane(std::shared_ptr<LandingZone> zone = nullptr) {
        receiver.zone = std::move(zone);
        receiver.bind(manifest, random);
        sender.open_lane(0);
        receiver.open_lane(0);
        sender.link.open(source.transfer);
    }

    void exchange() {
        receiver.feed(0, sender.take(0));
        sender.feed(0, receiver.take(0));
    }

    Random random{1};
    const Manifest manifest = small_hybrid(0, 1, 0, false);
    ReceiverEnd receiver;
    SenderEnd sender;
    const Memory truth{manifest, random};
    StagedSource source{TRANSFER, manifest, *truth.map, random};
};

TEST(a_ticket_that_fails_takes_no_verdict_any_more) {
    OneLane ends(std::make_shared<LandingZone>(nullptr, 0, ROOM_BYTES));
    ReceiveLink& link = ends.receiver.link;
    ends.source.push(ends.sender.link, all_items(ends.manifest));
    LandingZone::Landed landed;
    while (!ends.receiver.zone->pop(&landed, 0)) ends.exchange();
    LandingZone::Landed elsewhere = landed;  // of a link whose peer chose the same ids
    elsewhere.placement = std::make_shared<const Placement>(*landed.placement);
    CHECK(!link.landed(elsewhere, ErrorCode::OK, landed.header.raw_crc));
    ends.receiver.cancel();
    CHECK(!link.landed(landed, ErrorCode::OK, landed.header.raw_crc));
    ends.sender.feed(0, ends.receiver.take(0));
    CHECK(ends.source.ended && ends.source.error.code == ErrorCode::CANCELLED);
}

TEST(staged_chunks_that_are_not_their_segment_fail_the_transfer) {
    OneLane ends;
    StagedSource& source = ends.source;
    ends.exchange();
    auto staged = std::make_shared<StagedSegment>();
    staged->chunk_bytes = source.transfer->chunk_bytes;
    source.pushes.push_back({{all_items(ends.manifest)[0]}, false});
    source.lent.push_back(std::make_shared<Bytes>());
    ends.sender.link.push(*source.transfer, {all_items(ends.manifest)[0]}, 0, staged);
    CHECK(source.ended && source.error.code == ErrorCode::INTERNAL);
}

TEST(a_raw_chunk_that_changed_between_device_and_host_is_found_at_the_sender) {
    OneLane ends;
    ends.exchange();
    ends.source.push_staged(ends.sender.link, all_items(ends.manifest)[0]);
    (*ends.source.lent[0])[7] ^= 1;
    ends.sender.take(0);
    CHECK(ends.source.ended && ends.source.error.code == ErrorCode::RAW_CORRUPT);
    CHECK(ends.sender.is_open(0));
}

}  // namespace kvwire
