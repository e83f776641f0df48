// How many lanes a link gets, from bandwidth and round trip.

#include "tests/test.hpp"
#include "transport/lane_plan.hpp"

namespace kvwire {
namespace {

constexpr uint64_t S = 1'000'000'000, BUFFER = 4 << 20, GBIT = 125'000'000;

}  // namespace

TEST(a_short_link_has_the_least_lanes_however_fast) {
    LanePlan plan(0, BUFFER);
    for (uint64_t second = 1; second < 10; ++second)
        CHECK_EQ(plan.lanes(second * S, second * 40 * GBIT, 20), LanePlan::LANES_MIN);
}

TEST(a_long_link_has_lanes_for_what_links_carry_and_then_for_what_it_is_seen_to_carry) {
    LanePlan plan(0, BUFFER);
    CHECK_EQ(plan.lanes(1 * S, 0, 40'000), 5);           // 2 Gbit/s x 40 ms = 10 MB, twice
    CHECK_EQ(plan.lanes(2 * S, GBIT, 40'000), 5);
    CHECK_EQ(plan.lanes(3 * S, 6 * GBIT, 40'000), 12);   // 5 Gbit/s
    CHECK_EQ(plan.lanes(4 * S, 6 * GBIT, 40'000), 12);   // idle lanes stay warm
    CHECK_EQ(plan.lanes(5 * S, 206 * GBIT, 40'000), LanePlan::LANES_MAX);
}

TEST(a_moment_is_no_measurement) {
    LanePlan plan(0, BUFFER);
    plan.lanes(1 * S, 0, 40'000);
    CHECK_EQ(plan.lanes(1 * S + S / 100, GBIT, 40'000), 5);
}

TEST(a_limited_link_or_large_buffers_need_fewer_lanes) {
    LanePlan limited(GBIT / 2, BUFFER), buffered(0, 64 << 20);
    CHECK_EQ(limited.lanes(1 * S, 0, 40'000), LanePlan::LANES_MIN);
    CHECK_EQ(buffered.lanes(1 * S, 0, 40'000), LanePlan::LANES_MIN);
}

TEST(the_kernel_says_how_large_a_send_buffer_may_grow) {
    CHECK(send_buffer_bytes_max() >= 64 << 10);
}

}  // namespace kvwire
