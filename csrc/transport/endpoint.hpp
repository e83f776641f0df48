#pragma once
// One side of kvwire in one process: I/O threads, a listener, links, and the books of tickets or
// offers, all under one lock. SenderEndpoint and ReceiverEndpoint add what the application calls.

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "transport/handles.hpp"
#include "transport/link.hpp"
#include "transport/tls.hpp"
#include "transport/zero_copy.hpp"

namespace kvwire {

struct EndpointOptions {
    uint32_t io_threads = 0;  // 0: as many as there are cores, up to IO_THREADS_DEFAULT_MAX
    Doorkeeper::Limits door;
    uint64_t connect_timeout_ns = 10'000'000'000;
    uint32_t codecs = 1;
    SocketOptions socket;
    ZeroCopy zero_copy = ZeroCopy::OFF;  // KVWIRE_ZEROCOPY overrides it
    uint64_t bandwidth_max_bytes_per_s = 0;  // of each link; 0: unlimited
    Bytes admission_key;                    // empty: open to all who reach the port
    std::shared_ptr<const TlsContext> tls;  // empty: cleartext
    uint32_t links_max = 1024;              // that were dialled from elsewhere
    SendOptions send;
    ReceiveOptions receive;

    const LivenessOptions& liveness() const { return send.liveness; }  // of both the same
};

struct EndpointStats {
    uint64_t connections = 0;   // open now
    uint64_t links = 0;
    uint64_t open_transfers = 0;
    uint64_t bytes_sent = 0;    // on the wire, headers included
    uint64_t bytes_received = 0;
    uint64_t send_calls = 0;
    uint64_t receive_calls = 0;
    uint64_t lanes_lost = 0;
    uint64_t lanes_redialled = 0;
    uint64_t zero_copy_sends = 0;
    uint64_t zero_copies_copied = 0;   // notices of sends that the kernel copied all the same
    uint64_t zero_copies_refused = 0;  // sends that it would not even begin so
    uint64_t lanes_in_debt = 0;        // lost, but zero-copy sends of theirs may still read memory
    uint64_t internal_errors = 0;  // anything but 0 is a bug: please report it
    std::string io;                // what the I/O threads wait with: epoll or io_uring
    std::string io_note;           // why not with what KVWIRE_IO asked for
    std::string zero_copy;         // off, on or always
    std::string zero_copy_note;    // why a lane sent without it when it should have
};

class Endpoint {
public:
    Endpoint(Role role, EndpointOptions options);
    virtual ~Endpoint();

    uint16_t listen(const Address& address);
    // Opens a link of `lanes` lanes (Link::LANES_AUTO: as many as suit it); returns its id at once.
    // Failure shows on its transfers.
    Id dial(const Address& address, uint16_t lanes);
    // Waits until a link dialled from here has a lane; throws what went wrong.
    void wait_connected(const Id& link_id, double timeout_s);
    // Aborts what is open, closes every connection, ends the thread. Idempotent.
    void close();
    EndpointStats stats();
    // Throws USAGE when there is no such link.
    LinkReading read_link(const Id& link_id);
    Notifier& notifier() { return *notifier_; }

    // With the lock, for lanes and links.
    Loops& loops() { return *loops_; }
    const std::shared_ptr<Loops>& shared_loops() const { return loops_; }
    Role role() const { return role_; }
    const EndpointOptions& options() const { return options_; }
    ZeroCopy zero_copy() const { return zero_copy_; }
    EndpointStats& counters() { return counters_; }
    uint32_t cores() const;  // that its I/O threads can use
    Greeting greeting() const;
    std::unique_ptr<Stream> wrap(Fd fd, bool dialled) const;
    // What an accepted lane must prove; finds or makes its link. Throws what it is refused with.
    Bytes key_for(const Greeting& dialler, const Stream::Secrets* secrets,
                  std::shared_ptr<Link>* link);
    Bytes key_of_mode(const Stream::Secrets* secrets) const;
    bool closing() const { return closing_; }
    void link_up(const Link& link);
    void link_lost(const Link& link, const Error& why);
    std::vector<Id> link_ids();  // of links with a lane; from any thread
    void accept_some();

    std::shared_ptr<Link> find_link(const Id& link_id);

protected:
    Error why_lost(const Id& link_id);
    std::shared_ptr<Link> make_link(const Id& link_id);
    virtual void end_all(const Error& why) = 0;  // what no link will end
    const Role role_;
    const EndpointOptions options_;
    const ZeroCopy zero_copy_ = zero_copy_mode(options_.zero_copy);
    const std::shared_ptr<Loops> loops_;
    const std::shared_ptr<Notifier> notifier_;
    TicketBook tickets_;
    OfferBook offers_;
    std::map<Id, std::shared_ptr<Link>> links_;

private:
    void collect_debts();
    struct Dialled {
        enum State { PENDING, UP, DOWN } state = PENDING;
        Error error;
    };
    void accept(Fd fd);
    Fd listener_;
    Doorkeeper door_;
    const std::shared_ptr<Pool> pool_ = std::make_shared<Pool>();
    const std::shared_ptr<TableStore> table_store_ = std::make_shared<TableStore>();
    bool closed_ = false;   // the application's thread
    bool closing_ = false;  // no lane opens any more
    EndpointStats counters_;
    std::mutex dialled_mutex_;
    std::condition_variable dialled_changed_;
    std::map<Id, Dialled> dialled_;
};

class ReceiverEndpoint : public Endpoint {
public:
    explicit ReceiverEndpoint(EndpointOptions options) : Endpoint(Role::RECEIVER, options) {}
    ~ReceiverEndpoint() override { close(); }

    std::shared_ptr<TicketHandle> bind(Ticket::Options options,
                                       std::shared_ptr<const MemoryMap> memory,
                                       double deadline_s);
    void pull(const Id& link_id, const Id& ticket_id, const Pull& pull);

    // What came of a chunk that landed in a zone; `crc` is that of its raw bytes, as written.
    struct Verdict {
        const LandingZone::Landed* landed;
        ErrorCode code;
        uint32_t crc;
    };
    void landed(const std::vector<Verdict>& verdicts);  // their receipts go together

    void cancel(TicketHandle& handle, const Error& error);  // with the lock
    void ticket_ended(const Id& ticket_id);                 // with the lock

private:
    void end_all(const Error& why) override;
};

class SenderEndpoint : public Endpoint {
public:
    explicit SenderEndpoint(EndpointOptions options) : Endpoint(Role::SENDER, options) {}
    ~SenderEndpoint() override { close(); }

    std::shared_ptr<TransferHandle> open(const Id& link_id, Manifest manifest,
                                         std::shared_ptr<const MemoryMap> memory, uint8_t codec,
                                         double deadline_s, int32_t priority = 0,
                                         std::vector<Rounding> roundings = {});
    std::shared_ptr<TransferHandle> offer(const Id& offer_id, Manifest manifest,
                                          std::shared_ptr<const MemoryMap> memory, uint8_t codec,
                                          double deadline_s, int32_t priority = 0,
                                         std::vector<Rounding> roundings = {});
    bool link_alive(const Id& link_id);

    // With the lock, for the handles.
    void push(TransferHandle& handle, std::vector<Item> items, int32_t priority,
              std::shared_ptr<const StagedSegment> staged);
    void finish(TransferHandle& handle, Bytes metadata, uint16_t metadata_count);
    void fail(TransferHandle& handle, const Error& error);
    Id link_id_of(const TransferHandle& handle);  // zero: none yet, or no more

private:
    std::shared_ptr<TransferHandle> make(Manifest manifest, std::shared_ptr<const MemoryMap> memory,
                                         uint8_t codec, int32_t priority,
                                         std::vector<Rounding> roundings);
    void end_all(const Error& why) override;
    std::shared_ptr<Link> link_of(const TransferHandle& handle);
    void start_deadline(const std::shared_ptr<TransferHandle>& handle, double deadline_s);
};

Id random_id();

}  // namespace kvwire
