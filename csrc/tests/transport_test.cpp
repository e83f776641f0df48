// Both endpoints in one process over loopback: their threads, handles and ends. Also run under
// ThreadSanitizer by `make tsan-test`.

#include <atomic>
#include <thread>

#include "tests/hand_off.hpp"

namespace kvwire {

using namespace test;

TEST(transport_many_small_transfers_from_many_threads) {
    Pair pair(2, with_codecs());
    std::vector<std::thread> threads;
    std::atomic<int> delivered{0};
    for (uint64_t thread = 0; thread < 4; ++thread)
        threads.emplace_back([&pair, &delivered, thread] {
            for (uint64_t i = 0; i < 25; ++i) {
                HandOff each(hybrid(0, i), 100 * thread + i);
                const bool early = i % 2;
                if (early) each.bind(*pair.receiver);
                each.open(*pair.sender, pair.link, PATIENCE_S, uint8_t(i % 3 == 0));
                each.push_all();
                if (!early) each.bind(*pair.receiver);
                each.ticket->wait_layer(0, PATIENCE_S);
                if (!each.transfer->wait(PATIENCE_S) || !each.ticket->wait(PATIENCE_S)) continue;
                const std::vector<Item> items = all_items(each.manifest);
                delivered += content(each.manifest, items, *each.source.map) ==
                             content(each.manifest, items, *each.destination.map);
            }
        });
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(delivered.load(), 100);
}

TEST(transport_large_transfer_on_several_lanes) {
    for (const uint16_t lanes : {1, 2, 4}) {
        Pair pair(lanes);
        HandOff big(flat(4096), lanes);  // 16 MiB
        big.bind(*pair.receiver);
        big.open(*pair.sender, pair.link);
        big.push_all();
        big.check_delivered();
    }
}

TEST(transport_links_are_read_while_lanes_come_and_go) {
    Pair pair(4);
    std::atomic<bool> gone{false};
    std::atomic<uint64_t> looks{0};
    std::thread reader([&] {
        try {
            for (uint64_t verified = 0;; ++looks) {
                const LinkReading reading = pair.sender->read_link(pair.link);
                CHECK(reading.lanes.size() <= 4 && reading.verified_bytes >= verified);
                verified = reading.verified_bytes;
            }
        } catch (const Error& error) {
            CHECK_EQ(error.code, ErrorCode::USAGE);
            gone = true;
        }
    });
    for (uint64_t i = 0; i < 8; ++i) {
        HandOff each(flat(256), i);
        each.bind(*pair.receiver);
        each.open(*pair.sender, pair.link);
        each.push_all();
        each.check_delivered();
    }
    pair.sender->close();
    reader.join();
    CHECK(gone && looks > 0);
}

TEST(transport_receiver_dials_and_pulls) {
    ReceiverEndpoint receiver{EndpointOptions{}};
    SenderEndpoint sender{EndpointOptions{}};
    const uint16_t port = sender.listen({"127.0.0.1", 0});
    const Id link = receiver.dial({"127.0.0.1", port}, 2);
    receiver.wait_connected(link, PATIENCE_S);
    HandOff each(hybrid(0, 200), 1);
    const Id offer = random_id();
    each.transfer = sender.offer(offer, each.manifest, each.source.map, 0, -1);
    each.push_all();
    each.bind(receiver);
    receiver.pull(link, each.manifest.ticket_id, {offer, 0, 200, 0, 0, 1});
    each.check_delivered();

    HandOff nobody(hybrid(0, 10), 2);
    nobody.bind(receiver);
    receiver.pull(link, nobody.manifest.ticket_id, {offer, 0, 10, 0, 0, 1});
    CHECK(nobody.ticket->wait(PATIENCE_S));
    CHECK_EQ(nobody.ticket->progress().error.code, ErrorCode::OFFER_UNKNOWN);
}

// When the call has returned, the memory is the caller's: it is scribbled over at once.
TEST(transport_cancel_midway_gives_the_memory_back) {
    for (uint64_t i = 0; i < 20; ++i) {
        Pair pair(2);
        HandOff big(flat(512), i);
        big.bind(*pair.receiver);
        big.open(*pair.sender, pair.link);
        big.push_all();
        wait_for_bytes(*big.ticket, i << 16);
        const std::vector<Item> items = all_items(big.manifest);
        const bool by_sender = i % 2;
        const MemoryMap& mine = by_sender ? *big.source.map : *big.destination.map;
        by_sender ? big.transfer->cancel() : big.ticket->cancel();
        const Bytes scribble(placed(big.manifest, items, mine).bytes(), 0xEE);
        placed(big.manifest, items, mine).scatter(0, scribble.size(), scribble.data());
        big.check_ended(true);
        CHECK(content(big.manifest, items, mine) == scribble);
        const Error error = big.ticket->progress().error;
        CHECK(!error || error.code == ErrorCode::CANCELLED);
    }
}

TEST(transport_close_midway_ends_everything) {
    for (uint64_t i = 0; i < 12; ++i) {
        Pair pair(2);
        HandOff big(flat(1024), i), never(hybrid(0, 10), i), unbound(hybrid(0, 10), i);
        big.bind(*pair.receiver);
        never.bind(*pair.receiver);
        big.open(*pair.sender, pair.link);
        unbound.open(*pair.sender, pair.link);
        big.push_all();
        wait_for_bytes(*big.ticket, i << 17);
        switch (i % 3) {
            case 0: pair.sender->close(); break;
            case 1: pair.receiver->close(); break;
            default: i % 2 ? pair.sender.reset() : pair.receiver.reset();
        }
        big.check_ended(true);
        big.transfer->cancel();  // handles outlive their endpoint
        big.ticket->cancel();
        CHECK(unbound.transfer->wait(PATIENCE_S) && unbound.transfer->progress().error);
        if (pair.receiver) pair.receiver->close();
        CHECK(never.ticket->wait(PATIENCE_S));
        CHECK_EQ(never.ticket->progress().error.code, ErrorCode::CLOSED);
    }
}

TEST(transport_close_meets_cancel_and_push_from_other_threads) {
    for (uint64_t i = 0; i < 20; ++i) {
        Pair pair(2);
        HandOff big(flat(256), i);
        big.bind(*pair.receiver);
        big.open(*pair.sender, pair.link);
        std::thread pusher([&] {
            try {
                big.push_all();
                big.transfer->cancel();
            } catch (const Error& error) {
                CHECK(error.code == ErrorCode::USAGE || error.code == ErrorCode::CLOSED);
            }
        });
        std::thread canceller([&] { big.ticket->cancel(); });
        pair.sender->close();
        pair.receiver->close();
        pusher.join();
        canceller.join();
        big.check_ended(true);
    }
}

TEST(transport_deadlines_end_both_sides) {
    Pair pair(1);
    HandOff late(hybrid(0, 10), 1), slow(hybrid(0, 10), 2);
    late.bind(*pair.receiver, 0.05);
    CHECK(late.ticket->wait(PATIENCE_S));
    CHECK_EQ(late.ticket->progress().error.code, ErrorCode::DEADLINE_EXCEEDED);
    slow.bind(*pair.receiver);
    slow.open(*pair.sender, pair.link, 0.05);  // and never pushed
    slow.check_ended();
    CHECK_EQ(slow.transfer->progress().error.code, ErrorCode::DEADLINE_EXCEEDED);
    CHECK_EQ(slow.ticket->progress().error.code, ErrorCode::DEADLINE_EXCEEDED);
    CHECK(slow.ticket->progress().error.remote);
}

TEST(transport_nobody_listens) {
    SenderEndpoint sender{EndpointOptions{}};
    uint16_t port = 0;
    { ReceiverEndpoint gone{EndpointOptions{}}; port = gone.listen({"127.0.0.1", 0}); }
    const Id link = sender.dial({"127.0.0.1", port}, 2);
    try {
        sender.wait_connected(link, PATIENCE_S);
        CHECK(!"connected to nobody");
    } catch (const Error& error) {
        CHECK_EQ(error.code, ErrorCode::CONNECT_FAILED);
    }
}

}  // namespace kvwire
