// Whose chunks go first: between transfers, and inside one.

#include "tests/link_world.hpp"

namespace kvwire {
namespace {

using namespace test;

constexpr uint64_t CHUNK_BYTES = 4096;

// `layers` layers of `chunks` chunks each.
Manifest striped(uint32_t layers, uint64_t chunks) {
    Manifest manifest;
    manifest.ticket_id = TICKET;
    manifest.groups = {
        {GroupKind::FULL_ATTENTION, 0, {},
         {{"k", DType::BYTES, 0, false, {{Axis::TOKEN, {}}, whole(Axis::DIM, CHUNK_BYTES)}}}}};
    for (uint32_t layer = 0; layer < layers; ++layer) manifest.groups[0].layers.push_back(layer);
    manifest.token_stop = chunks;
    return manifest;
}

// One lane, whose receiver is made of GRANTs; it shows what the sender writes, in order.
class Order {
public:
    Order() { sender.open_lane(0); }

    Source& open(uint8_t name, const Manifest& manifest, int32_t priority) {
        const Memory truth(manifest, random);
        sources.push_back(std::make_unique<Source>(id_of(name), manifest, *truth.map, random));
        Source& source = *sources.back();
        source.transfer->priority = priority;
        sender.link.open(source.transfer);
        sender.take(0);
        sender.feed(0, frame(FrameType::GRANT, encode(Grant{1 << 30, 1, uint32_t(CHUNK_BYTES)}),
                             source.transfer->id).bytes());
        return source;
    }

    void push_all(Source& source) {
        source.push(sender.link, all_items(source.manifest));
    }

    std::vector<FrameHeader> chunks() {
        std::vector<FrameHeader> headers;
        for (Bytes some; !(some = sender.take(0)).empty();)
            for (const Frame& next : frames_of(some))
                if (next.type() == FrameType::CHUNK) headers.push_back(next.header);
        return headers;
    }

    // For each chunk written, the first letter of its transfer's id.
    std::string transfers() {
        std::string names;
        for (const FrameHeader& chunk : chunks()) names += char(chunk.transfer_id.bytes[0]);
        return names;
    }

    // For each chunk written, its segment.
    std::string segments() {
        std::string names;
        for (const FrameHeader& chunk : chunks()) names += std::to_string(chunk.segment_index);
        return names;
    }

    Random random{1};
    std::vector<std::unique_ptr<Source>> sources;
    SenderEnd sender{uint32_t(CHUNK_BYTES)};
};

std::string times(size_t count, char letter) { return std::string(count, letter); }

}  // namespace

TEST(equal_transfers_go_oldest_first) {
    Order order;
    Source& first = order.open('a', striped(1, 20), 0);
    Source& second = order.open('b', striped(1, 20), 0);
    order.push_all(second);
    order.push_all(first);
    CHECK_EQ(order.transfers(), times(20, 'a') + times(20, 'b'));
}

TEST(an_urgent_transfer_goes_first_and_the_oldest_waits_not_for_ever) {
    Order order;
    Source& oldest = order.open('a', striped(1, 4), 0);
    Source& urgent = order.open('u', striped(1, 48), 7);
    order.push_all(oldest);
    order.push_all(urgent);
    const std::string seen = order.transfers();
    CHECK_EQ(seen.size(), 52u);
    // One turn in 16 is the oldest's.
    CHECK_EQ(std::count(seen.begin(), seen.begin() + 48, 'a'), 3);
    for (size_t at = 0; at + 16 <= 48; ++at)
        CHECK_EQ(std::count(&seen[at], &seen[at] + 16, 'a'), 1);
}

TEST(a_transfer_whose_window_is_full_gives_way) {
    Order order;
    Source& urgent = order.open('u', striped(1, 8), 1);
    Source& other = order.open('a', striped(1, 4), 0);
    urgent.transfer->grant->window_bytes = 2 * CHUNK_BYTES;
    order.push_all(urgent);
    order.push_all(other);
    CHECK_EQ(order.transfers(), "uuaaaa");
    order.sender.feed(0, frame(FrameType::RECEIPT, encode(std::vector<ReceiptEntry>{{0, 0, 2, 0}}),
                               urgent.transfer->id).bytes());
    CHECK_EQ(order.transfers(), "uu");
}

TEST(pushes_go_by_priority_then_in_order) {
    Order order;
    Source& source = order.open('a', striped(4, 2), 0);
    const std::vector<Item> items = all_items(source.manifest);
    CHECK_EQ(items.size(), 4u);
    source.push(order.sender.link, {items[0]});
    source.push(order.sender.link, {items[1]}, 1);
    source.push(order.sender.link, {items[2]}, -1);
    source.push(order.sender.link, {items[3]}, 1);
    CHECK_EQ(order.segments(), "11330022");
}

TEST(a_lost_lane_brings_back_the_order) {
    Order order;
    Source& source = order.open('a', striped(2, 2), 0);
    const std::vector<Item> items = all_items(source.manifest);
    source.push(order.sender.link, {items[0]});
    source.push(order.sender.link, {items[1]}, 1);
    CHECK_EQ(order.segments(), "1100");
    order.sender.lane_lost(0);
    order.sender.open_lane(1);
    size_t chunks = 0, ends = 0;
    for (const Frame& next : frames_of(order.sender.take(1))) {
        chunks += next.type() == FrameType::CHUNK;
        ends += next.type() == FrameType::SEGMENT_END;
    }
    CHECK_EQ(chunks, 4u);
    CHECK_EQ(ends, 2u);
}

}  // namespace kvwire
