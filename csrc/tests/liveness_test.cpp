// Time as the test says: who is believed, when a lane has stalled, when it is closed, and what
// traffic that costs.

#include "tests/link_world.hpp"

namespace kvwire {
namespace {

using namespace test;

constexpr uint64_t MS = 1'000'000;
using Lanes = std::vector<uint32_t>;

struct Watched {
    explicit Watched(uint64_t lease_ms = 10'000, uint32_t lanes = 2)
        : liveness({lease_ms * MS, 200 * MS}) {
        for (uint32_t lane = 0; lane < lanes; ++lane) liveness.lane_opened(lane, now());
        look();
        ++ms;
        for (uint32_t lane = 0; lane < lanes; ++lane) answer(lane);
    }

    uint64_t now() const { return ms * MS; }
    Upkeep look(bool busy = false) {
        const Upkeep upkeep = liveness.look(now(), busy);
        for (const uint32_t lane : upkeep.ping) pings[lane] = liveness.ping(lane, now());
        return upkeep;
    }
    void answer(uint32_t lane) {
        liveness.heard(lane, now());
        if (pings.count(lane)) liveness.pong(lane, pings.at(lane));
        pings.erase(lane);
    }
    // Lets time pass; the lanes named answer every PING after a millisecond.
    Upkeep run(uint64_t until_ms, const Lanes& answering, bool busy) {
        Upkeep all;
        while (ms < until_ms && !all.expired) {
            const Upkeep now = look(busy);
            all.stalled.insert(all.stalled.end(), now.stalled.begin(), now.stalled.end());
            all.resumed.insert(all.resumed.end(), now.resumed.begin(), now.resumed.end());
            all.dead.insert(all.dead.end(), now.dead.begin(), now.dead.end());
            all.expired = now.expired;
            looks += 1;
            written += uint32_t(now.ping.size());
            for (const uint32_t lane : now.dead) liveness.lane_lost(lane, ms * MS);
            const uint64_t due_ms = std::max(now.due_ns / MS, ms + 1);
            ms += 1;
            for (const uint32_t lane : answering)
                if (pings.count(lane)) answer(lane);
            ms = std::max(ms, std::min(due_ms, until_ms));
        }
        return all;
    }

    Liveness liveness;
    uint64_t ms = 1000;
    uint32_t looks = 0, written = 0;
    std::map<uint32_t, uint64_t> pings;
};

}  // namespace

TEST(liveness_an_idle_link_costs_little_and_lives_on) {
    Watched watched;
    const Upkeep upkeep = watched.run(61'000, {0, 1}, false);
    CHECK(upkeep.stalled.empty() && upkeep.dead.empty() && !upkeep.expired);
    CHECK(watched.written >= 2 * 20 && watched.written <= 2 * 30);
    CHECK(watched.looks < 200);
    CHECK(watched.liveness.rtt_ns(0) >= MS && watched.liveness.rtt_ns(0) < 2 * MS);
}

TEST(liveness_a_stalled_lane_is_set_aside_and_resumes) {
    Watched watched(10'000, 4);
    Upkeep upkeep = watched.run(2'000, {0, 1, 2}, true);
    CHECK(upkeep.stalled == Lanes{3});
    CHECK(!watched.liveness.serves(3) && watched.liveness.serves(0));
    CHECK(upkeep.dead.empty());
    watched.answer(3);
    upkeep = watched.run(2'500, {0, 1, 2, 3}, true);
    CHECK(upkeep.resumed == Lanes{3} && upkeep.stalled.empty());
    CHECK(watched.liveness.serves(3));
}

TEST(liveness_a_stall_is_seen_within_half_a_second) {
    Watched watched;
    watched.run(3'000, {0, 1}, true);
    const uint64_t cut_ms = watched.ms;
    while (watched.run(watched.ms + 1, {0}, true).stalled.empty() && watched.ms < 9'000) {}
    CHECK(watched.ms - cut_ms < 500);
}

TEST(liveness_a_lane_that_stays_still_is_closed) {
    Watched watched;
    const Upkeep upkeep = watched.run(9'000, {0}, true);
    CHECK(upkeep.dead == Lanes{1});
    CHECK(!upkeep.expired);
}

TEST(liveness_a_lane_silent_from_its_first_byte_leaves_half_the_lease) {
    Liveness liveness({4'000 * MS, 200 * MS});
    liveness.lane_opened(0, MS);
    liveness.ping(0, MS);
    liveness.sent(0, 0, true, MS);
    uint64_t ms = 1;
    while (ms < 9'000 && liveness.look(ms * MS, true).dead.empty()) ms += 50;
    CHECK_EQ(liveness.rtt_ns(0), 0u);
    CHECK_EQ(ms, 2'001u);
}

TEST(liveness_a_lane_far_away_leaves_half_the_lease) {
    const auto ms_to_death = [](uint64_t lease_ms) {
        Watched watched(lease_ms, 1);
        while (watched.ms < 20'000) {  // each PONG takes 300 ms
            watched.look(true);
            watched.ms += 300;
            watched.answer(0);
        }
        CHECK(watched.liveness.rtt_ns(0) > 290 * MS && watched.liveness.rtt_ns(0) <= 300 * MS);
        const uint64_t cut_ms = watched.ms;
        while (watched.run(watched.ms + 1, {}, true).dead.empty() && watched.ms < 99'000) {}
        return watched.ms - cut_ms;
    };
    for (const uint64_t lease_ms : {4'000, 10'000, 20'000})
        CHECK(ms_to_death(lease_ms) - lease_ms / 2 < 100);
    CHECK(ms_to_death(60'000) > 11'000 && ms_to_death(60'000) < 12'200);  // ten stalls
}

TEST(liveness_a_lane_is_not_closed_before_it_has_stalled) {
    Watched watched(500, 1);  // half of it is less than four round trips of the first 250 ms
    watched.look(true);
    const Upkeep upkeep = watched.run(watched.ms + 199, {}, true);
    CHECK(upkeep.dead.empty() && upkeep.stalled.empty());
}

TEST(liveness_bytes_that_the_kernel_gets_rid_of_are_progress) {
    Watched watched(10'000, 2);
    uint64_t acked = 0;
    for (; watched.ms < 5'000; watched.ms += 50) {  // lane 1 drains slowly, its PONGs far away
        watched.liveness.sent(1, acked += 4096, true, watched.now());
        CHECK(watched.look(true).stalled.empty());
        watched.answer(0);
    }
    for (; watched.ms < 5'500; watched.ms += 50) {
        watched.liveness.sent(1, acked, true, watched.now());
        watched.look(true);
        watched.answer(0);
    }
    CHECK(!watched.liveness.serves(1));
}

TEST(liveness_a_long_round_trip_is_no_stall) {
    Watched watched(10'000, 2);
    for (; watched.ms < 10'000; watched.ms += 150) {  // each PONG takes 450 ms
        watched.look(true);
        watched.ms += 450;
        watched.answer(0);
        watched.answer(1);
    }
    CHECK(watched.liveness.rtt_ns(0) > 250 * MS);
    watched.look(true);
    watched.ms += 900;
    watched.answer(0);
    CHECK(watched.look(true).stalled.empty());
}

TEST(liveness_without_a_better_lane_one_at_a_time_is_closed) {
    Watched watched(60'000, 3);
    watched.run(1'500, {0, 1, 2}, true);
    const uint64_t start_ms = watched.ms;
    const Upkeep upkeep = watched.run(start_ms + 12'000, {}, true);
    CHECK(upkeep.stalled.empty());
    CHECK(upkeep.dead == (Lanes{0, 1}));
}

TEST(liveness_a_peer_that_pauses_has_no_better_lane) {
    Watched watched(60'000, 3);
    const auto moves = [&](uint32_t lane, uint64_t bytes) {
        watched.liveness.sent(lane, bytes, true, watched.now());
    };
    uint64_t acked = 0;
    for (; watched.ms < 2'000; watched.ms += 10)
        for (uint32_t lane = 0; lane < 3; ++lane) moves(lane, ++acked);
    for (uint32_t lane = 0; lane < 3; ++lane, watched.ms += 30) moves(lane, ++acked);
    for (; watched.ms < 3'000; watched.ms += 10) {
        for (uint32_t lane = 0; lane < 3; ++lane) moves(lane, 1);
        CHECK(watched.look(true).stalled.empty());
    }
    moves(2, ++acked);
    CHECK(watched.look(true).stalled == (Lanes{0, 1}));
}

TEST(liveness_a_silent_peer_is_believed_for_the_lease) {
    Watched watched(3'000, 2);
    watched.run(9'000, {0, 1}, false);
    const Upkeep upkeep = watched.run(20'000, {}, false);
    CHECK(upkeep.expired);
    CHECK(watched.ms >= 11'000 && watched.ms <= 12'500);
    const Error why = watched.liveness.lease_over(watched.now());
    CHECK_EQ(why.code, ErrorCode::LINK_LOST);
    CHECK_EQ(why.expected, 3'000u);
    CHECK(why.actual >= 3'000);
}

TEST(liveness_a_peer_that_knows_no_ping_may_be_silent) {
    Liveness liveness({1'000 * MS, 200 * MS});
    liveness.lane_opened(0, MS);
    for (uint64_t ms = 1; ms < 60'000; ms += 50) {
        const Upkeep upkeep = liveness.look(ms * MS, ms % 2 == 0);
        for (const uint32_t lane : upkeep.ping) liveness.ping(lane, ms * MS);
        CHECK(!upkeep.expired && upkeep.stalled.empty() && upkeep.dead.empty());
    }
    liveness.lane_lost(0, 60'000 * MS);
    CHECK(!liveness.look(60'900 * MS, true).expired);
    CHECK(liveness.look(61'000 * MS, true).expired);
}

TEST(liveness_without_a_lease_a_link_ends_with_its_last_lane) {
    Watched watched(0, 1);
    CHECK(!watched.run(30'000, {0}, false).expired);
    watched.liveness.lane_lost(0, watched.now());
    CHECK(watched.look().expired);
}

TEST(liveness_both_machines_answer_pings_and_agree_who_is_there) {
    SenderEnd sender;
    ReceiverEnd receiver;
    Random random(5);
    const Memory truth(hybrid(0, 40), random);
    Source source(TRANSFER, hybrid(0, 40), *truth.map, random);
    for (uint64_t ms = 1; ms < 30'000; ms += 25) {
        if (ms == 1 || ms == 20'001) {
            sender.link.set_now(ms * MS);
            receiver.link.set_now(ms * MS);
            sender.open_lane(0);
            receiver.open_lane(0);
        }
        if (ms == 1) sender.link.open(source.transfer);
        if (ms == 15'001) {
            sender.lane_lost(0);
            receiver.lane_lost(0);
        }
        CHECK(!sender.link.upkeep(ms * MS).expired);
        CHECK(!receiver.link.upkeep(ms * MS).expired);
        const Bytes there = sender.take(0), back = receiver.take(0);
        if (!there.empty()) receiver.link.heard(0, ms * MS);
        receiver.feed(0, there);
        if (!back.empty()) sender.link.heard(0, ms * MS);
        sender.feed(0, back);
    }
    CHECK(sender.link.liveness().rtt_ns(0) > 0);
    CHECK(!source.ended);
    sender.lane_lost(0);
    const Upkeep upkeep = sender.link.upkeep(60'000 * MS);
    CHECK(upkeep.expired);
    sender.link.fail_all(sender.link.liveness().lease_over(60'000 * MS));
    CHECK_EQ(source.error.code, ErrorCode::LINK_LOST);
}

}  // namespace kvwire
