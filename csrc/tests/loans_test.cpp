// Zero-copy sends: what the kernel reads after it has taken it is kept, and given back, in time.

#include "tests/link_world.hpp"

namespace kvwire {

using namespace test;

TEST(loans_come_back_in_ranges_and_out_of_order) {
    Loans loans;
    int a, b;
    loans.keep(&a, Bytes(64), {}, 2);
    loans.keep(&b, Bytes(64), {}, 5);
    loans.returned(1, 1);
    CHECK(loans.holds(&a) && loans.holds(&b));
    loans.returned(3, 4);
    loans.returned(0, 0);
    CHECK(!loans.holds(&a) && loans.holds(&b));
    loans.returned(2, 2);
    CHECK(loans.empty() && loans.is_returned(5) && !loans.is_returned(6));
    loans.returned(5, 7);  // told before the sender has written down what it sent
    loans.keep(&a, Bytes(64), {}, 8);
    CHECK(loans.empty());
}

TEST(loans_are_counted_modulo_2_to_the_32) {
    Loans loans;
    loans.returned(0, 0xFFFFFFFD);
    int a;
    loans.keep(&a, {}, {}, (uint64_t(1) << 32) + 3);
    loans.returned(0, 2);
    CHECK(loans.holds(&a));
    loans.returned(0xFFFFFFFE, 0xFFFFFFFF);
    CHECK(loans.empty());
}

TEST(loans_keep_frames_where_the_kernel_reads_them) {
    LaneWriter writer;
    writer.control(FrameType::PING, Id{}, 0, Bytes(8, 1));
    const iovec* iov;
    writer.next_iovecs(&iov);
    const iovec lent = iov[0];
    const Bytes before(static_cast<uint8_t*>(lent.iov_base),
                       static_cast<uint8_t*>(lent.iov_base) + lent.iov_len);
    writer.lend();
    writer.advance(10, true);
    for (int i = 0; i < 100; ++i) writer.control(FrameType::PING, Id{}, 0, Bytes(8, 2));
    while (const size_t count = writer.next_iovecs(&iov)) {
        size_t bytes = 0;
        for (size_t i = 0; i < count; ++i) bytes += iov[i].iov_len;
        writer.advance(bytes);
    }
    CHECK(!writer.loans()->empty());
    CHECK(std::memcmp(lent.iov_base, before.data(), before.size()) == 0);
    writer.loans()->returned(0, 0);
    CHECK(writer.loans()->empty());
}

}  // namespace kvwire
