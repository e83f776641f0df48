#include <optional>

#include "tests/test.hpp"
#include "wire/share.hpp"

namespace kvwire {

TEST(shares_of_a_pool_are_bounded_each_and_together) {
    const auto pool = std::make_shared<Pool>();
    pool->bytes_max = 100;
    Share a(pool);
    std::optional<Share> b(pool);
    a += 60;
    CHECK(a.has_room(10, 70) && !a.has_room(11, 70));
    CHECK(b->has_room(40, 70) && !b->has_room(41, 70));
    *b += 40;
    CHECK(!a.has_room(1, 1000));
    a -= 20;
    CHECK(a.has_room(20, 1000));
    b.reset();  // a link that ends gives back what it held
    CHECK_EQ(pool->bytes, 40u);
    CHECK(a.has_room(60, 1000) && Share(nullptr).has_room(1000, 1000));
}

}  // namespace kvwire
