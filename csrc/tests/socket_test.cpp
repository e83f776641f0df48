// What is asked of the kernel for a connection, and what it says about one, over loopback.

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "tests/test.hpp"
#include "transport/socket.hpp"
#include "transport/socket_options.hpp"
#include "transport/tcp_info.hpp"

namespace kvwire {
namespace {

struct Connection {
    explicit Connection(const std::string& host, const SocketOptions& options = {}) {
        Address address{host, 0};
        const Fd listener = listen_tcp(address, options, &address.port);
        near = connect_tcp(resolve(address)[0], options);
        pollfd ready{listener.get(), POLLIN, 0};
        ::poll(&ready, 1, 10'000);
        bool would_block = false;
        far = accept_tcp(listener, options, &would_block);
        CHECK(bool(far));
    }

    // Sends from near to far; returns seconds until all of it has been acknowledged.
    double send_bytes(size_t bytes) {
        const auto start = std::chrono::steady_clock::now();
        std::thread reader([&] {
            std::vector<uint8_t> sink(1 << 20);
            const iovec iov{sink.data(), sink.size()};
            for (size_t got = 0; got < bytes;) {
                pollfd readable{far.get(), POLLIN, 0};
                if (::poll(&readable, 1, 10'000) != 1) return;
                got += receive(far, &iov, 1).bytes;
            }
        });
        std::vector<uint8_t> source(64 << 10);
        for (size_t sent = 0; sent < bytes;) {
            pollfd writable{near.get(), POLLOUT, 0};
            if (::poll(&writable, 1, 10'000) != 1) break;
            const iovec iov{source.data(), std::min(source.size(), bytes - sent)};
            sent += send(near, &iov, 1).bytes;
        }
        reader.join();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }

    Fd near, far;
};

template <class T>
T option(const Fd& fd, int level, int name) {
    T value{};
    socklen_t bytes = sizeof value;
    CHECK_EQ(::getsockopt(fd.get(), level, name, &value, &bytes), 0);
    return value;
}

TEST(tcp_info_follows_the_bytes) {
    constexpr size_t BYTES = 8 << 20;
    Connection connection("127.0.0.1");
    connection.send_bytes(BYTES);
    const auto near = tcp_info(connection.near.get());
    const auto far = tcp_info(connection.far.get());
    CHECK(near && far);
    CHECK(near->sent_bytes - near->retransmitted_bytes == BYTES);
    CHECK(near->acked_bytes > 0 && near->acked_bytes <= BYTES + 1);  // the SYN counts
    CHECK_EQ(far->received_bytes, uint64_t(BYTES));
    CHECK(near->rtt_us > 0 && near->rtt_min_us > 0 && near->rtt_min_us < 1'000'000);
    CHECK(near->delivery_bytes_per_s > 1'000'000);
    CHECK(near->mss_bytes > 500 && near->cwnd_segments > 0);
    CHECK_EQ(near->congestion_state, CongestionState::OPEN);
    CHECK(!tcp_info(STDERR_FILENO));
}

TEST(unread_bytes_show_in_the_send_queue) {
    Connection connection("127.0.0.1");
    std::vector<uint8_t> source(1 << 20);
    const iovec iov{source.data(), source.size()};
    size_t sent = 0;
    for (IoResult put; (put = send(connection.near, &iov, 1)).status == IoStatus::OK;)
        sent += put.bytes;
    const auto info = tcp_info(connection.near.get());
    CHECK(info && info->unsent_bytes > 0 && info->unsent_bytes < sent);
}

TEST(chosen_socket_options_arrive) {
    for (const char* host : {"127.0.0.1", "::1"}) {
        const SocketOptions options{"reno", 10};
        check(options);
        Connection connection(host, options);
        const bool v6 = std::string(host) == "::1";
        for (const Fd* end : {&connection.near, &connection.far}) {
            char name[16] = {};
            socklen_t bytes = sizeof name;
            ::getsockopt(end->get(), IPPROTO_TCP, TCP_CONGESTION, name, &bytes);
            CHECK_EQ(std::string(name), "reno");
            CHECK_EQ(option<int>(*end, v6 ? IPPROTO_IPV6 : IPPROTO_IP,
                                 v6 ? IPV6_TCLASS : IP_TOS) >> 2, 10);
        }
        set_unsent_max(connection.near.get(), 98304);
        CHECK_EQ(option<int>(connection.near, IPPROTO_TCP, TCP_NOTSENT_LOWAT), 98304);
    }
}

TEST(bbr_replaces_loss_based_control_where_the_kernel_has_it) {
    const auto control_of = [](const Fd& fd) -> std::string {
        char name[17] = {};
        socklen_t bytes = sizeof name - 1;
        ::getsockopt(fd.get(), IPPROTO_TCP, TCP_CONGESTION, name, &bytes);
        return name;
    };
    const auto usable = [](const std::string& name) {
        try {
            check({name, -1});
            return true;
        } catch (const Error&) {
            return false;
        }
    };
    Connection connection("127.0.0.1", {"reno", -1});
    prefer_bbr(connection.near.get());
    CHECK_EQ(control_of(connection.near), usable("bbr") ? "bbr" : "reno");
    if (!usable("vegas")) return;
    apply(connection.near.get(), {"vegas", -1});
    prefer_bbr(connection.near.get());
    CHECK_EQ(control_of(connection.near), "vegas");
}

TEST(what_this_kernel_lacks_is_refused_by_name) {
    const auto refusal = [](const SocketOptions& options) -> std::string {
        try {
            check(options);
        } catch (const Error& error) {
            CHECK_EQ(error.code, ErrorCode::USAGE);
            return error.message;
        }
        return "";
    };
    CHECK(refusal({"no-such", -1}).find("this kernel has: ") != std::string::npos);
    CHECK(refusal({"no-such", -1}).find("reno") != std::string::npos);
    CHECK(refusal({"", 64}).find("0 to 63") != std::string::npos);
    CHECK_EQ(refusal({"", 63}), "");
}

TEST(a_paced_socket_keeps_to_its_rate) {
    constexpr size_t BYTES = 10 << 20;
    constexpr double RATE_BYTES_PER_S = 40e6;
    Connection connection("127.0.0.1");
    set_pacing_rate(connection.near.get(), uint64_t(RATE_BYTES_PER_S));
    const double rate = BYTES / connection.send_bytes(BYTES);
    CHECK(rate < 1.15 * RATE_BYTES_PER_S);  // the first burst goes unpaced
    CHECK(rate > 0.5 * RATE_BYTES_PER_S);   // a busy machine may be late
    set_pacing_rate(connection.near.get(), 0);
    CHECK_EQ(option<uint64_t>(connection.near, SOL_SOCKET, SO_MAX_PACING_RATE), ~uint64_t(0));
}

}  // namespace
}  // namespace kvwire
