#pragma once
// A lane is one socket with its reader and writer; a link is the lanes to one peer with the
// protocol machine they feed. Both live on the endpoint's loop thread.

#include <map>
#include <memory>
#include <optional>

#include "transport/loop.hpp"
#include "wire/receive_link.hpp"
#include "wire/send_link.hpp"

namespace kvwire {

class Endpoint;
class Link;

class Lane : public Loop::Handler, public std::enable_shared_from_this<Lane> {
public:
    Lane(Endpoint& endpoint, Fd fd, bool dialled);

    void start(std::shared_ptr<Link> link, const Greeting& greeting);  // dialled: greets first
    void start();                                                      // accepted: listens first
    void on_events(uint32_t epoll_events) override;
    void write();
    void close(const Error& why, bool tell_peer);

private:
    enum class State { CONNECTING, GREETING, OPEN, CLOSED };

    void watch();
    void start_patience();  // to connect, then to be greeted
    void read();
    void read_frames();
    void mark();
    bool read_greeting();
    void pump();
    void greeted(const Greeting& peer);
    void open(const Greeting& peer);
    void guarded(void (Lane::*step)());
    bool wants_to_write() const;
    void update_interest();

    Endpoint& endpoint_;
    Fd fd_;
    const bool dialled_;
    State state_ = State::CONNECTING;
    std::shared_ptr<Link> link_;
    Greeting own_;
    uint8_t greeting_in_[GREETING_BYTES];
    size_t greeting_received_ = 0;
    Bytes greeting_out_;
    size_t greeting_sent_ = 0;
    std::unique_ptr<LaneReader> reader_;
    LaneWriter* writer_ = nullptr;
    bool blocked_ = false;
    uint32_t interest_ = 0;
    int mark_ = 1;  // bytes that make the socket readable
    std::optional<Loop::TimerKey> greeting_timer_;
};

class Link : public std::enable_shared_from_this<Link> {
public:
    Link(Endpoint& endpoint, const Id& id);
    ~Link();

    const Id id;
    std::unique_ptr<ReceiveLink> receive;  // exactly one of the two
    std::unique_ptr<SendLink> send;

    FrameHandler& machine();
    // Throws FIELD_INVALID when the lane is there already.
    LaneWriter& lane_opened(uint32_t lane, std::shared_ptr<Lane> socket, const Greeting& peer);
    void lane_closed(uint32_t lane, const Lane* socket, const Error& why);
    void dial(const std::vector<std::vector<uint8_t>>& addresses, uint16_t lane_count);
    void dial_failed(uint32_t lane, const Error& why);

    // Writes what the machine has to say, on every lane that is not blocked.
    void pump();
    bool refill(uint32_t lane);
    bool alive() const { return !lanes_.empty() || dialling_ > 0; }
    size_t lane_count() const { return lanes_.size(); }
    void close(const Error& why);

private:
    Endpoint& endpoint_;
    std::map<uint32_t, std::shared_ptr<Lane>> lanes_;
    uint32_t dialling_ = 0;
    bool pumping_ = false, pump_again_ = false;
    std::optional<Loop::TimerKey> expiry_;
    void schedule_expiry();
    void lost(const Error& why);
};

}  // namespace kvwire
