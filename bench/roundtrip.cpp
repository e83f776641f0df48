// roundtrip kvwire|bare COUNT: 4 KiB there, proof back, between two processes over loopback.
// Prints COUNT times in nanoseconds, one a line. kvwire: from submit on a granted transfer to the
// receiver's verified receipt. bare: the same bytes and a 64-byte answer by epoll, send and recv.

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "transport/endpoint.hpp"

using namespace kvwire;

namespace {

constexpr size_t PAGE_BYTES = 4096;
constexpr size_t ANSWER_BYTES = 64;  // a frame header, the least that an answer of kvwire takes
constexpr double TIMEOUT_S = 20;

struct Meeting {  // what the sender must know of the receiver
    uint16_t port = 0;
    Id ticket;
};

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("roundtrip: " + what); }

std::vector<uint8_t> pattern(size_t pages) {
    std::vector<uint8_t> bytes(pages * PAGE_BYTES);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(i * 131 + i / PAGE_BYTES);
    return bytes;
}

void check(const std::vector<uint8_t>& received) {
    if (received != pattern(received.size() / PAGE_BYTES)) fail("wrong bytes");
}

std::vector<uint64_t> timed(size_t count, const std::function<void(size_t)>& one) {
    std::vector<uint64_t> ns;
    for (size_t i = 0; i < count; ++i) {
        const auto start = std::chrono::steady_clock::now();
        one(i);
        ns.push_back(uint64_t(std::chrono::nanoseconds(std::chrono::steady_clock::now() - start)
                                  .count()));
    }
    return ns;
}

GroupDesc group() {
    const TensorDesc page{"page", DType::BYTES, 0, false,
                          {{Axis::TOKEN, {}}, {Axis::DIM, {{"", PAGE_BYTES, 0, PAGE_BYTES}}}}};
    return {GroupKind::AUXILIARY, 0, {0}, {page}};
}

std::shared_ptr<const MemoryMap> memory_of(std::vector<uint8_t>& pool) {
    LeafMemory leaf;
    leaf.base = pool.data();
    leaf.dtype = DType::BYTES;
    leaf.axes = {{Axis::DIM, PAGE_BYTES, 0, PAGE_BYTES, 1}};
    leaf.has_tokens = true;
    leaf.token_count = pool.size() / PAGE_BYTES;
    leaf.token_stride = PAGE_BYTES;
    return std::make_shared<const MemoryMap>(
        MemoryMap{{{GroupKind::AUXILIARY, 0, "page"}, leaf}});
}

void receive_kvwire(size_t count, const std::function<void(const Meeting&)>& meet) {
    std::vector<uint8_t> pool(count * PAGE_BYTES, 0xA5);
    ReceiverEndpoint endpoint{{}};
    Ticket::Options options;
    options.id = random_id();
    options.token_stop = count;
    const auto ticket = endpoint.bind(options, memory_of(pool), TIMEOUT_S);
    meet({endpoint.listen({"127.0.0.1", 0}), options.id});
    ticket->wait(TIMEOUT_S);
    if (const Error error = ticket->progress().error) throw error;
    check(pool);
    usleep(100'000);  // the sender still reads the receipt
}

std::vector<uint64_t> send_kvwire(size_t count, const Meeting& meeting) {
    std::vector<uint8_t> pool = pattern(count);
    SenderEndpoint endpoint{{}};
    Manifest manifest;
    manifest.ticket_id = meeting.ticket;
    manifest.token_stop = count;
    manifest.groups = {group()};
    const Id link = endpoint.dial({"127.0.0.1", meeting.port}, 2);
    endpoint.wait_connected(link, TIMEOUT_S);
    const auto transfer = endpoint.open(link, manifest, memory_of(pool), 0, TIMEOUT_S);
    while (!transfer->progress().granted && !transfer->progress().ended) usleep(1000);
    const auto ns = timed(count, [&](size_t i) {
        const uint32_t push = transfer->push({{0, 0, 0, i, i + 1}});
        if (!transfer->wait_push(push, TIMEOUT_S)) fail("a push took too long");
    });
    transfer->finish({}, 0);
    transfer->wait(TIMEOUT_S);
    if (const Error error = transfer->progress().error) throw error;
    return ns;
}

class EpollSocket {
public:
    explicit EpollSocket(int fd) : fd_(fd), epoll_(epoll_create1(0)) {
        const int one = 1;
        setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        epoll_event event{};
        event.events = EPOLLIN;
        if (epoll_ < 0 || epoll_ctl(epoll_, EPOLL_CTL_ADD, fd_, &event) != 0) fail("epoll");
    }
    void send(const uint8_t* bytes, size_t count) const {
        if (::send(fd_, bytes, count, MSG_NOSIGNAL) != ssize_t(count)) fail("send");
    }
    void receive(uint8_t* bytes, size_t count) const {
        for (size_t done = 0; done < count;) {
            epoll_event event;
            if (epoll_wait(epoll_, &event, 1, int(TIMEOUT_S * 1000)) != 1) fail("epoll_wait");
            const ssize_t got = ::recv(fd_, bytes + done, count - done, MSG_DONTWAIT);
            if (got <= 0) fail("recv");
            done += size_t(got);
        }
    }

private:
    const int fd_, epoll_;
};

sockaddr_in loopback(uint16_t port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

void receive_bare(size_t count, const std::function<void(const Meeting&)>& meet) {
    const int listener = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = loopback(0);
    socklen_t bytes = sizeof address;
    if (bind(listener, reinterpret_cast<sockaddr*>(&address), bytes) || listen(listener, 1) ||
        getsockname(listener, reinterpret_cast<sockaddr*>(&address), &bytes))
        fail("listen");
    meet({ntohs(address.sin_port), {}});
    const EpollSocket connection(accept(listener, nullptr, nullptr));
    std::vector<uint8_t> pool(count * PAGE_BYTES, 0xA5);
    const uint8_t answer[ANSWER_BYTES] = {};
    for (size_t i = 0; i < count; ++i) {
        connection.receive(pool.data() + i * PAGE_BYTES, PAGE_BYTES);
        connection.send(answer, sizeof answer);
    }
    check(pool);
}

std::vector<uint64_t> send_bare(size_t count, const Meeting& meeting) {
    const std::vector<uint8_t> pool = pattern(count);
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    const sockaddr_in address = loopback(meeting.port);
    if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address)) fail("connect");
    const EpollSocket connection(fd);
    uint8_t answer[ANSWER_BYTES];
    return timed(count, [&](size_t i) {
        connection.send(pool.data() + i * PAGE_BYTES, PAGE_BYTES);
        connection.receive(answer, sizeof answer);
    });
}

int run(const std::string& system, size_t count) {
    if ((system != "kvwire" && system != "bare") || count == 0)
        fail("usage: roundtrip kvwire|bare COUNT");
    int ends[2];
    if (pipe(ends) != 0) fail("pipe");
    const pid_t child = fork();  // before any thread is started
    if (child < 0) fail("fork");
    if (child == 0) {
        const auto meet = [&](const Meeting& meeting) {
            if (write(ends[1], &meeting, sizeof meeting) != sizeof meeting) fail("pipe");
        };
        system == "kvwire" ? receive_kvwire(count, meet) : receive_bare(count, meet);
        return 0;
    }
    close(ends[1]);
    Meeting meeting;
    if (read(ends[0], &meeting, sizeof meeting) != sizeof meeting) fail("no receiver");
    const auto ns = system == "kvwire" ? send_kvwire(count, meeting) : send_bare(count, meeting);
    for (const uint64_t each : ns) std::printf("%llu\n", static_cast<unsigned long long>(each));
    int status = 0;
    waitpid(child, &status, 0);
    return status == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc > 1 ? argv[1] : "", argc > 2 ? size_t(std::atoll(argv[2])) : 0);
    } catch (const Error& error) {
        std::fprintf(stderr, "roundtrip: %s\n", error.message.c_str());
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
    }
    return 1;
}
