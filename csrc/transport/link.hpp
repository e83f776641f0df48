#pragma once
// A lane is one socket with its reader and writer; a link is the lanes to one peer with the
// protocol machine they feed. All is done with the endpoint's lock held, but for the lanes'
// sections: system calls, checksums and copies, one receiving and one sending at a time per lane.
// Who holds the lock may wait for a section to end; no section ever waits for the lock.

#include <map>
#include <memory>
#include <optional>

#include "base/cpu_clock.hpp"
#include "transport/doorkeeper.hpp"
#include "transport/lane_plan.hpp"
#include "transport/link_reading.hpp"
#include "transport/loop.hpp"
#include "transport/stream.hpp"
#include "wire/admission.hpp"
#include "wire/receive_link.hpp"
#include "wire/send_link.hpp"

namespace kvwire {

class Endpoint;
class Link;

class Lane : public Loop::Handler, public std::enable_shared_from_this<Lane> {
public:
    Lane(Endpoint& endpoint, std::unique_ptr<Stream> stream, bool dialled);

    void start(std::shared_ptr<Link> link, const Greeting& greeting);  // dialled: greets first
    void start(Doorkeeper::Entry entry);                               // accepted: listens first
    bool waits() const { return state_ == State::WAITING; }
    void greet();  // dialled: its turn has come (Link::may_greet)
    void on_events(uint32_t epoll_events) override;
    void write_now();  // without the lock, from any thread

    // True when somebody should write: neither is it waiting for the socket, nor being done.
    bool is_idle() const { return state_ == State::OPEN && !blocked_ && !being_written_; }
    bool has_output() const { return writer_ && !writer_->empty(); }
    LaneReading reading() const;
    uint32_t rtt_min_us() const;
    void pace(uint64_t bytes_per_s) { set_pacing_rate(stream_->fd().get(), bytes_per_s); }
    void arm();  // its own thread will write
    // With zero-copy sends under way the connection is reset, at `reset_ns`.
    void close(const Error& why, bool tell_peer, uint64_t reset_ns = 0);
    void flush_and_close(const Error& why);
    uint64_t opened_ns() const { return opened_ns_; }
    void report(Liveness& liveness) const;  // what the kernel knows of its progress
    bool read_notices();
    bool is_same_host() const { return is_same_host_; }

private:
    enum class State { CONNECTING, HANDSHAKE, WAITING, ADMISSION, OPEN, CLOSED };

    void watch();
    void start_patience();  // to connect, then to be admitted
    void enter(Lock& lock);
    void shake_hands(Lock& lock);
    IoStatus shake_section(Lock& lock);
    void wait_for_turn();
    AdmissionTerms terms(const Greeting& own) const;
    void read_admission();
    void write_early();
    Error not_admitted(const IoResult& got) const;
    void read(Lock& lock);
    void read_frames(Lock& lock);
    void open();
    void mark();
    void follow(size_t bytes);
    void write(Lock& lock);
    bool write_batch(Lock& lock, size_t* bytes);
    IoResult receive_section(Lock& lock, const iovec* iov, size_t count);
    void send_section(Lock& lock, const iovec* iov, size_t count);
    void prepare_section(Lock& lock);
    void guarded(Lock& lock, void (Lane::*step)(Lock& lock));
    void check_sent();
    void say(const Error& why);
    void wait_for_sections();
    void settle();
    void start_zero_copy();
    void refuse_zero_copy(int refusal);
    bool read_notices(SendLink& machine);
    void pay_debt(std::shared_ptr<Link> link, uint64_t reset_ns);
    void update_interest(bool more);
    bool is_choked() const;

    Endpoint& endpoint_;  // gone once CLOSED
    const std::shared_ptr<Loops> loops_;
    Loop& loop_;
    const std::unique_ptr<Stream> stream_;
    const bool dialled_;
    static inline std::atomic<uint64_t> lanes_made_{0};
    const uint64_t serial_ = ++lanes_made_;
    Doorkeeper::Entry entry_;
    State state_ = State::CONNECTING;
    std::shared_ptr<Link> link_;
    Greeting own_;
    std::unique_ptr<Admission> admission_;
    Bytes early_;  // what is written before the frames
    size_t early_sent_ = 0;
    std::unique_ptr<LaneReader> reader_;
    LaneWriter* writer_ = nullptr;
    bool blocked_ = false;
    bool is_same_host_ = false;
    Sampler sent_sampler_;
    uint64_t send_ns_ = 0;  // of a core, by the section; 0: not measured
    uint64_t opened_ns_ = 0;
    uint32_t interest_ = 0;
    bool follows_ = false;       // its thread goes where its bytes come in
    size_t unlooked_bytes_ = 0;  // since it looked where; its own thread's
    int mark_ = 1;  // bytes that make the socket readable; its own thread's
    bool being_written_ = false;
    std::optional<Error> failed_;  // of sending: closed once what came in is read
    std::atomic<bool> reading_{false};  // in a section; of writing the writer keeps account
    IoResult sent_;  // by a section, not yet settled
    bool lent_ = false;              // ... by zero copy
    int refusal_ = 0;                // ... or why not: an errno
    bool asks_zero_copy_ = false;
    std::shared_ptr<Loans> loans_;   // set when it ever did
    std::optional<Loops::TimerKey> greeting_timer_;
};

class Link : public std::enable_shared_from_this<Link> {
public:
    static constexpr uint16_t LANES_AUTO = 0;  // as many as suit the link
    static constexpr uint64_t BRISK_NS = 50'000'000;  // between two looks at a busy link

    Link(Endpoint& endpoint, const Id& id);
    ~Link();

    const Id id;
    std::unique_ptr<ReceiveLink> receive;  // exactly one of the two
    std::unique_ptr<SendLink> send;

    LinkMachine& machine() const;
    // Takes the place of a lane of the same number, which its peer has lost.
    LaneWriter& lane_opened(uint32_t lane, std::shared_ptr<Lane> socket, const Greeting& peer);
    void lane_closed(uint32_t lane, const Lane* socket, const Error& why);
    void dial(const std::vector<std::vector<uint8_t>>& addresses, uint16_t lane_count);
    void dial_failed(uint32_t lane, const Lane* socket, const Error& why);

    // The first lane to be ready establishes the link; others are told to greet() when it has.
    bool may_greet(const std::shared_ptr<Lane>& socket);
    void establish(const Digest& key);
    const std::optional<Digest>& key() const { return key_; }
    bool had_lanes() const { return had_lanes_; }
    uint32_t entering = 0;  // accepted lanes that have named this link, and are not admitted yet

    // Sees to it that what the machine has to say is written, by lanes that are idle; `self` will
    // write by itself.
    void pump(const Lane* self = nullptr);
    bool load(uint32_t lane);
    // From its first dial, or its first lane, to the end of its lease.
    bool alive() const { return !ended_; }
    uint64_t connect_patience_ns() const;
    size_t lane_count() const { return lanes_.size(); }
    void close(const Error& why);
    LinkReading reading() const;  // all but what the kernel knows

private:
    Endpoint& endpoint_;
    const uint64_t born_ns_ = Loops::now_ns();
    std::map<uint32_t, std::shared_ptr<Lane>> lanes_;
    bool had_lanes_ = false;
    bool ended_ = false;
    bool replacing_ = false;
    std::vector<std::vector<uint8_t>> addresses_;  // to dial; none: the peer dials
    uint16_t lanes_wanted_ = 0;
    std::optional<LanePlan> plan_;  // for as many lanes as suit the link
    uint32_t dialling_ = 0;
    std::optional<Digest> key_;  // what further lanes prove
    int refused_ = 0;
    const Lane* establishing_ = nullptr;
    std::vector<std::weak_ptr<Lane>> waiting_;
    std::optional<Loops::TimerKey> recall_;
    void schedule_recall();
    void deal_bandwidth();
    // A lane that is not there, and its next dial.
    struct Redial {
        uint32_t failures = 0;
        std::optional<Loops::TimerKey> timer;
    };
    std::map<uint32_t, Redial> redials_;
    uint64_t dials_failed_ = 0;
    Error last_trouble_;
    uint64_t verified_seen_ = 0;
    uint64_t trouble_since_ns_ = 0;  // lanes have been lost since then, and nothing was verified
    std::optional<Loops::TimerKey> upkeep_;
    bool brisk_ = false;  // the next upkeep comes soon

    void dial_lane(uint32_t lane);
    void redial_later(uint32_t lane);
    bool is_futile(const Lane& lane, uint64_t now_ns);
    void schedule_upkeep(uint64_t due_ns, bool brisk);
    void keep_up();
    uint64_t lease_ns() const;
    bool is_forsaken() const;
    Error last_lane_lost() const;
    void grow(uint64_t now_ns);
    Error lease_over(uint64_t now_ns);
    void lost(const Error& why);
    void stop_timers();
    void greet_next();
    bool may_establish_again();
    void no_lane(const Error& why);
};

}  // namespace kvwire
