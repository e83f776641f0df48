#include "transport/endpoint.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <sys/epoll.h>

#include "base/random.hpp"

namespace kvwire {
namespace {

constexpr uint64_t ACCEPT_PAUSE_NS = 50'000'000;
constexpr size_t IO_THREADS_DEFAULT_MAX = 4;
constexpr uint64_t DEBTS_NS = 2'000'000'000;  // a reset connection's come back at once
constexpr size_t DIALLED_KEPT = 256;  // outcomes of dials that nobody may ask for

class Acceptor : public Loop::Handler {
public:
    explicit Acceptor(Endpoint& endpoint) : endpoint_(endpoint) {}
    void on_events(uint32_t) override {
        const Lock lock(endpoint_.loops());
        endpoint_.accept_some();
    }

private:
    Endpoint& endpoint_;
};

size_t thread_count(const EndpointOptions& options) {
    if (options.io_threads) return options.io_threads;
    return std::clamp<size_t>(Affinity::cores(), 1, IO_THREADS_DEFAULT_MAX);
}

uint64_t after(double seconds) { return Loops::now_ns() + uint64_t(seconds * 1e9); }

}  // namespace

Id random_id() {
    Id id;
    random_bytes(id.bytes.data(), id.bytes.size());
    return id;
}

Endpoint::Endpoint(Role role, EndpointOptions options)
    : role_(role), options_((check(options.socket), options)),
      loops_(std::make_shared<Loops>(thread_count(options))),
      notifier_(std::make_shared<Notifier>()), door_(options_.door) {}

Endpoint::~Endpoint() = default;  // the two kinds close themselves

uint32_t Endpoint::cores() const {
    return uint32_t(std::min(thread_count(options_), Affinity::cores()));
}

Greeting Endpoint::greeting() const {
    Greeting greeting;
    greeting.role = role_;
    greeting.codecs = options_.codecs;
    greeting.payload_bytes_max =
        role_ == Role::RECEIVER ? options_.receive.chunk_bytes_max : options_.send.chunk_bytes;
    if (greeting.payload_bytes_max < limits::payload_bytes_min)
        greeting.payload_bytes_max = uint32_t(limits::payload_bytes_min);
    greeting.transfers_max =
        role_ == Role::RECEIVER ? options_.receive.transfers_max : options_.send.transfers_max;
    return greeting;
}

uint16_t Endpoint::listen(const Address& address) {
    uint16_t port = 0;
    Fd listener = listen_tcp(address, options_.socket, &port);
    loops_->call([&] {
        if (listener_) loops_->first().unwatch(listener_);
        listener_ = std::move(listener);
        loops_->first().watch(listener_, EPOLLIN, std::make_shared<Acceptor>(*this));
    });
    return port;
}

void Endpoint::accept_some() {
    if (closing_) return;
    while (door_.has_room()) {
        bool would_block = false;
        Fd fd = accept_tcp(listener_, options_.socket, &would_block);
        if (would_block) return;
        if (!fd) break;
        accept(std::move(fd));
    }
    // Full, or out of descriptors: leave the rest in the backlog for a moment.
    loops_->first().modify(listener_, 0);
    loops_->timer(Loops::now_ns() + ACCEPT_PAUSE_NS, [this] {
        if (listener_) loops_->first().modify(listener_, EPOLLIN);
    });
}

void Endpoint::accept(Fd fd) {
    const std::string network = network_of(fd);
    if (network.empty()) return;  // it has left already
    Doorkeeper::Entry entry = door_.enter(network);
    if (!entry) return;  // and the socket is closed
    ++counters_.connections;
    std::make_shared<Lane>(*this, wrap(std::move(fd), false), false)->start(std::move(entry));
}

std::unique_ptr<Stream> Endpoint::wrap(Fd fd, bool dialled) const {
    if (options_.tls) return options_.tls->wrap(std::move(fd), dialled);
    return std::make_unique<Stream>(std::move(fd));
}

Bytes Endpoint::key_of_mode(const Stream::Secrets* secrets) const {
    return secrets ? Bytes(secrets->key.begin(), secrets->key.end()) : options_.admission_key;
}

Bytes Endpoint::key_for(const Greeting& dialler, const Stream::Secrets* secrets,
                        std::shared_ptr<Link>* link) {
    if (closing_) throw Error(ErrorCode::CLOSED, "this side is closing");
    const auto known = find_link(dialler.link_id);
    if (dialler.flags & GREETING_FLAG_JOIN) {
        if (!known || !known->key())
            throw Error(ErrorCode::LINK_UNKNOWN,
                        "this side does not know the link: it has restarted, or given it up");
        *link = known;
        return Bytes(known->key()->begin(), known->key()->end());
    }
    const auto refuse = [](const char* why) { throw Error(ErrorCode::ADMISSION_REFUSED, why); };
    if (known && known->had_lanes()) refuse("the link exists: its further lanes must join it");
    const Bytes key = key_of_mode(secrets);
    if (!(dialler.flags & GREETING_FLAG_PROOF)) {
        if (!key.empty()) refuse("this side asks for a key: give both sides the same security");
        if (known || dialler.lane_count != 1)
            refuse("a lane without proof must be its link's only one");
    }
    if (!known && links_.size() >= options_.links_max)
        throw Error(ErrorCode::RESOURCES_EXHAUSTED, "this side has as many links as it may",
                    options_.links_max, links_.size());
    *link = known ? known : make_link(dialler.link_id);
    return key;
}

std::shared_ptr<Link> Endpoint::find_link(const Id& link_id) {
    const auto found = links_.find(link_id);
    return found == links_.end() ? nullptr : found->second;
}

std::shared_ptr<Link> Endpoint::make_link(const Id& link_id) {
    auto link = std::make_shared<Link>(*this, link_id);
    ReceiveOptions receive = options_.receive;
    receive.pool = pool_;
    receive.table_store = table_store_;
    receive.threads = uint16_t(cores());
    if (role_ == Role::RECEIVER)
        link->receive = std::make_unique<ReceiveLink>(
            tickets_, receive, [this, weak = std::weak_ptr<Link>(link)] {
                loops_->post([weak] {
                    if (const auto link = weak.lock()) link->pump();
                });
            });
    else
        link->send = std::make_unique<SendLink>(offers_, options_.send);
    links_.emplace(link_id, link);
    return link;
}

Id Endpoint::dial(const Address& address, uint16_t lanes) {
    if (lanes > limits::lane_count_max)
        throw Error(ErrorCode::USAGE, "lanes must be at most 64", limits::lane_count_max, lanes);
    const auto addresses = resolve(address);
    const Id link_id = random_id();
    {
        std::lock_guard<std::mutex> lock(dialled_mutex_);
        for (auto it = dialled_.begin(); dialled_.size() > DIALLED_KEPT && it != dialled_.end();)
            it = it->second.state == Dialled::DOWN ? dialled_.erase(it) : std::next(it);
        dialled_[link_id] = {};
    }
    loops_->call([&] { make_link(link_id)->dial(addresses, lanes); });
    return link_id;
}

void Endpoint::wait_connected(const Id& link_id, double timeout_s) {
    std::unique_lock<std::mutex> lock(dialled_mutex_);
    const auto settled = [&] {
        const auto found = dialled_.find(link_id);
        return found == dialled_.end() || found->second.state != Dialled::PENDING;
    };
    if (!dialled_changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), settled))
        throw Error(ErrorCode::DEADLINE_EXCEEDED, "no lane came up in time");
    const auto found = dialled_.find(link_id);
    if (found != dialled_.end() && found->second.state == Dialled::DOWN) throw found->second.error;
}

Error Endpoint::why_lost(const Id& link_id) {
    std::lock_guard<std::mutex> lock(dialled_mutex_);
    const auto found = dialled_.find(link_id);
    if (found != dialled_.end() && found->second.state == Dialled::DOWN)
        return found->second.error;
    return Error(ErrorCode::LINK_LOST, "the link to the peer is gone");
}

void Endpoint::link_up(const Link& link) {
    std::lock_guard<std::mutex> lock(dialled_mutex_);
    const auto found = dialled_.find(link.id);
    if (found != dialled_.end()) found->second.state = Dialled::UP;
    dialled_changed_.notify_all();
}

void Endpoint::link_lost(const Link& link, const Error& why) {
    {
        std::lock_guard<std::mutex> lock(dialled_mutex_);
        const auto found = dialled_.find(link.id);
        if (found != dialled_.end()) found->second = {Dialled::DOWN, why};
        dialled_changed_.notify_all();
    }
    // The link may be on the stack above: it goes when that has unwound.
    const auto found = links_.find(link.id);
    if (found == links_.end()) return;
    loops_->post([gone = found->second] {});
    links_.erase(found);
}

EndpointStats Endpoint::stats() {
    EndpointStats stats;
    loops_->call([&] {
        stats = counters_;
        stats.internal_errors = loops_->internal_errors();
        stats.io = loops_->first().poller_name();
        stats.io_note = loops_->first().poller_note();
        stats.zero_copy = name(zero_copy_);
        stats.links = links_.size();
        for (const auto& [id, link] : links_)
            stats.open_transfers += link->machine().open_transfers();
    });
    return stats;
}

void Endpoint::close() {
    if (closed_) return;
    closed_ = true;
    if (loops_->forked()) {
        // Locks may be held for ever by a thread that is not here: nothing of it is touched again.
        (void)new auto(std::move(links_));
        (void)new auto(std::move(tickets_));
        (void)new auto(std::move(offers_));
        return loops_->stop();
    }
    const std::string role = role_ == Role::SENDER ? "sender" : "receiver";
    const Error why(ErrorCode::CLOSED, "the " + role + " was closed");
    loops_->call([&] {
        closing_ = true;
        if (listener_) loops_->first().unwatch(listener_);
        listener_.reset();
        end_all(why);
        const auto links = links_;
        for (const auto& [id, link] : links) link->close(why);
    });
    collect_debts();
    loops_->stop();
    links_.clear();
}

// What was lent to the kernel is the caller's when this has returned.
void Endpoint::collect_debts() {
    const uint64_t give_up_ns = Loops::now_ns() + DEBTS_NS;
    bool any = true;
    while (any && Loops::now_ns() < give_up_ns) {
        loops_->call([&] { any = counters_.lanes_in_debt > 0; });
        if (any) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

// ---- receiver

std::shared_ptr<TicketHandle> ReceiverEndpoint::bind(Ticket::Options options,
                                                     std::shared_ptr<const MemoryMap> memory,
                                                     double deadline_s) {
    const Id ticket_id = options.id;
    auto handle = std::make_shared<TicketHandle>(loops_, notifier_, *this, std::move(options),
                                                 std::move(memory));
    const bool running = loops_->call([&] {
        tickets_.add(handle->ticket_);
        handle->hold(handle);
        if (deadline_s >= 0)
            handle->deadline_ = loops_->timer(after(deadline_s), [handle] {
                handle->deadline_.reset();
                handle->endpoint_.cancel(
                    *handle, Error(ErrorCode::DEADLINE_EXCEEDED, "the ticket's deadline passed"));
            });
        const auto links = links_;
        for (const auto& [id, link] : links) {
            link->receive->ticket_added(ticket_id);
            link->pump();
        }
    });
    if (!running) throw Error(ErrorCode::USAGE, "the receiver is closed");
    return handle;
}

void ReceiverEndpoint::pull(const Id& link_id, const Id& ticket_id, const Pull& pull) {
    loops_->call([&] {
        if (const auto link = find_link(link_id)) {
            link->receive->pull(ticket_id, pull);
            return link->pump();
        }
        if (const auto ticket = tickets_.find(ticket_id))
            ticket->fail(why_lost(link_id));
    });
}

void ReceiverEndpoint::landed(const std::vector<Verdict>& verdicts) {
    loops_->call([&] {
        const auto links = links_;  // pumping may end them
        std::set<Id> answering;
        for (const Verdict& verdict : verdicts)
            for (const auto& [id, link] : links)
                if (link->receive->landed(*verdict.landed, verdict.code, verdict.crc)) {
                    answering.insert(id);
                    break;
                }
        for (const Id& id : answering) links.at(id)->pump();
    });
}

void ReceiverEndpoint::cancel(TicketHandle& handle, const Error& error) {
    handle.ticket_->fail(error);
    const auto links = links_;
    for (const auto& [id, link] : links) {
        link->receive->pull_withdrawn(handle.id());
        link->pump();
    }
}

void ReceiverEndpoint::ticket_ended(const Id& ticket_id) { tickets_.remove(ticket_id); }

void ReceiverEndpoint::end_all(const Error& why) {
    for (const auto& ticket : tickets_.all()) ticket->fail(why);
}

// ---- sender

std::shared_ptr<TransferHandle> SenderEndpoint::make(Manifest manifest,
                                                     std::shared_ptr<const MemoryMap> memory,
                                                     uint8_t codec, int32_t priority,
                                                     std::vector<Rounding> roundings) {
    auto handle = std::make_shared<TransferHandle>(loops_, notifier_, *this, random_id(),
                                                   std::move(manifest), std::move(memory), codec);
    handle->transfer_->priority = priority;
    handle->transfer_->roundings = std::move(roundings);
    return handle;
}

void SenderEndpoint::start_deadline(const std::shared_ptr<TransferHandle>& handle,
                                    double deadline_s) {
    if (deadline_s < 0) return;
    handle->deadline_ = loops_->timer(after(deadline_s), [handle] {
        handle->deadline_.reset();
        handle->endpoint_.fail(
            *handle, Error(ErrorCode::DEADLINE_EXCEEDED, "the transfer's deadline passed"));
    });
}

std::shared_ptr<TransferHandle> SenderEndpoint::open(const Id& link_id, Manifest manifest,
                                                     std::shared_ptr<const MemoryMap> memory,
                                                     uint8_t codec, double deadline_s,
                                                     int32_t priority,
                                                     std::vector<Rounding> roundings) {
    auto handle = make(std::move(manifest), std::move(memory), codec, priority,
                       std::move(roundings));
    const bool running = loops_->call([&] {
        handle->hold(handle);
        const auto link = find_link(link_id);
        if (!link) {
            handle->transfer_->ended = true;
            return handle->on_end(why_lost(link_id));
        }
        start_deadline(handle, deadline_s);
        link->send->open(handle->transfer_);
        link->pump();
    });
    if (!running) throw Error(ErrorCode::USAGE, "the sender is closed");
    return handle;
}

std::shared_ptr<TransferHandle> SenderEndpoint::offer(const Id& offer_id, Manifest manifest,
                                                      std::shared_ptr<const MemoryMap> memory,
                                                      uint8_t codec, double deadline_s,
                                                      int32_t priority,
                                                      std::vector<Rounding> roundings) {
    const OfferBook::Key key{offer_id, manifest.source_rank, manifest.destination_rank};
    auto handle = make(std::move(manifest), std::move(memory), codec, priority,
                       std::move(roundings));
    const bool running = loops_->call([&] {
        handle->hold(handle);
        handle->transfer_->offered = true;
        if (!offers_.offers.emplace(key, handle->transfer_).second) {
            handle->transfer_->ended = true;
            return handle->on_end(Error(ErrorCode::USAGE, "the offer id is in use"));
        }
        start_deadline(handle, deadline_s);
    });
    if (!running) throw Error(ErrorCode::USAGE, "the sender is closed");
    return handle;
}

std::shared_ptr<Link> SenderEndpoint::link_of(const TransferHandle& handle) {
    for (const auto& [id, link] : links_)
        if (link->send.get() == handle.transfer_->home) return link;
    return nullptr;
}

Id SenderEndpoint::link_id_of(const TransferHandle& handle) {
    const auto link = link_of(handle);
    return link ? link->id : Id{};
}

void SenderEndpoint::push(TransferHandle& handle, std::vector<Item> items, int32_t priority,
                          std::shared_ptr<const StagedSegment> staged) {
    SendTransfer& transfer = *handle.transfer_;
    if (transfer.ended) return;  // the end gave all pushes back
    const auto link = link_of(handle);
    if (!link) {  // offered, not pulled yet
        transfer.pushes.push_back({std::move(items), priority, std::move(staged)});
        return;
    }
    link->send->set_now(Loops::now_ns());
    link->send->push(transfer, std::move(items), priority, std::move(staged));
    link->pump();
}

void SenderEndpoint::finish(TransferHandle& handle, Bytes metadata, uint16_t metadata_count) {
    SendTransfer& transfer = *handle.transfer_;
    if (transfer.ended) return;
    SendLink::finish(transfer, std::move(metadata), metadata_count);
    if (const auto link = link_of(handle)) link->pump();
}

void SenderEndpoint::fail(TransferHandle& handle, const Error& error) {
    const auto transfer = handle.transfer_;
    if (transfer->ended) return;
    if (const auto link = link_of(handle)) {
        link->send->fail(*transfer, error);
        return link->pump();
    }
    for (auto it = offers_.offers.begin(); it != offers_.offers.end();)
        it = it->second == transfer ? offers_.offers.erase(it) : std::next(it);
    SendLink::end_unopened(*transfer, error);
}

void SenderEndpoint::end_all(const Error& why) {
    const auto offers = std::move(offers_.offers);
    offers_.offers.clear();
    for (const auto& [key, transfer] : offers) SendLink::end_unopened(*transfer, why);
}

bool SenderEndpoint::link_alive(const Id& link_id) {
    bool alive = false;
    loops_->call([&] {
        const auto link = find_link(link_id);
        alive = link && link->alive();
    });
    return alive;
}

std::vector<Id> Endpoint::link_ids() {
    std::vector<Id> ids;
    loops_->call([&] {
        for (const auto& [id, link] : links_)
            if (link->lane_count() > 0) ids.push_back(id);
    });
    return ids;
}

}  // namespace kvwire
