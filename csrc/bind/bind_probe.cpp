// The protocol machines driven with bytes instead of sockets: what the parity and model tests use
// to hold C++ against the Python reference, frame by frame and split by split.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <set>

#include "bind/bind_plan.hpp"
#include "bind/convert.hpp"
#include "codec/codec.hpp"
#include "wire/receive_link.hpp"
#include "wire/send_link.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

using Writes = std::vector<std::pair<uint32_t, py::bytes>>;

// One end of a link: lanes with a greeting to come, and a machine behind them.
template <class Machine>
class Probe {
public:
    Writes feed(uint32_t index, const std::string& data) {
        ProbeLane& lane = lane_at(index);
        if (lane.error == ErrorCode::OK) {
            try {
                take(index, lane, data);
            } catch (const Error& error) {
                close(index, error, true);
            }
        }
        return drain();
    }

    Writes lane_lost(uint32_t index) {
        ProbeLane& lane = lane_at(index);
        if (lane.error == ErrorCode::OK) {
            Error why(ErrorCode::PEER_CLOSED, "the connection is gone");
            try {
                if (lane.reader)
                    lane.reader->end_of_stream();
                else if (!lane.greeting.empty())
                    why = Error(ErrorCode::TRUNCATED, "stream ended inside the greeting");
            } catch (const Error& error) {
                why = error;
            }
            close(index, why, false);
        }
        return drain();
    }

    // A new connection takes the place of the lane's lost one.
    void lane_opened(uint32_t index) { lanes_[index] = {}; }

    Writes lease_over() {
        machine().fail_all(Error(ErrorCode::LINK_LOST, "no lane came back in time"));
        return drain();
    }

    uint16_t lane_error(uint32_t index) { return uint16_t(lane_at(index).error); }

protected:
    struct ProbeLane {
        std::string greeting;
        std::unique_ptr<LaneReader> reader;
        ErrorCode error = ErrorCode::OK;
        Bytes last_words;
    };

    ProbeLane& lane_at(uint32_t index) { return lanes_[index]; }
    virtual Machine& machine() = 0;
    virtual void greeted(uint32_t index, const Greeting& peer) = 0;
    virtual void before_drain() = 0;
    virtual LaneWriter* writer(uint32_t index) = 0;

    void take(uint32_t index, ProbeLane& lane, const std::string& data) {
        size_t at = 0;
        if (!lane.reader) {
            const size_t part = std::min(data.size(), GREETING_BYTES - lane.greeting.size());
            lane.greeting.append(data, 0, part);
            at = part;
            if (lane.greeting.size() < GREETING_BYTES) return;
            const Greeting peer =
                decode_greeting(reinterpret_cast<const uint8_t*>(lane.greeting.data()));
            greeted(index, peer);
            lane.reader = std::make_unique<LaneReader>(machine(), index, limits_);
        }
        lane.reader->feed(reinterpret_cast<const uint8_t*>(data.data()) + at, data.size() - at);
    }

    void close(uint32_t index, const Error& why, bool tell_peer) {
        ProbeLane& lane = lane_at(index);
        lane.error = why.code;
        if (LaneWriter* out = writer(index)) {
            before_drain();
            if (tell_peer) out->control(FrameType::ABORT, Id{}, 0, encode(why));
            const Bytes last = written(*out);
            lane.last_words.insert(lane.last_words.end(), last.begin(), last.end());
        }
        machine().lane_lost(index);
        lane.reader.reset();
        for (const auto& [other, state] : lanes_)
            if (state.error == ErrorCode::OK) return;
        if (machine().peer_left())
            machine().fail_all(Error(ErrorCode::PEER_CLOSED, "the peer has left"));
    }

    static Bytes written(LaneWriter& out) {
        Bytes bytes;
        const iovec* iov;
        while (const size_t count = out.next_iovecs(&iov)) {
            size_t sum = 0;
            for (size_t i = 0; i < count; ++i) {
                const auto* from = static_cast<const uint8_t*>(iov[i].iov_base);
                bytes.insert(bytes.end(), from, from + iov[i].iov_len);
                sum += iov[i].iov_len;
            }
            out.advance(sum);
        }
        return bytes;
    }

    Writes drain() {
        before_drain();
        Writes writes;
        for (auto& [index, lane] : lanes_) {
            Bytes bytes = std::move(lane.last_words);
            lane.last_words = {};
            if (LaneWriter* out = lane.error == ErrorCode::OK ? writer(index) : nullptr) {
                const Bytes more = written(*out);
                bytes.insert(bytes.end(), more.begin(), more.end());
            }
            if (!bytes.empty())
                writes.emplace_back(index, to_python(bytes));
        }
        return writes;
    }

    FrameLimits limits_;
    std::map<uint32_t, ProbeLane> lanes_;
    std::map<uint32_t, LaneWriter*> writers_;
};

// Keeps what a ticket's owner would hear.
struct TicketLog : TicketObserver {
    std::set<uint32_t> ready;
    bool ended = false;
    ErrorCode error = ErrorCode::OK;

    void on_bytes(uint64_t, uint64_t, bool) override {}
    void on_layer_touched(uint32_t) override {}
    void on_layer_ready(uint32_t layer) override { ready.insert(layer); }
    void on_metadata(uint16_t, const Bytes&, uint16_t, const Bytes&, uint16_t) override {}
    void on_end(const Error& why) override {
        if (ended) throw Error(ErrorCode::INTERNAL, "a ticket ended twice");
        ended = true;
        error = why.code;
    }
};

class ReceiverProbe : public Probe<ReceiveLink> {
public:
    explicit ReceiverProbe(uint32_t transfers_max) {
        ReceiveOptions options;
        options.codecs = codecs_available();
        options.transfers_max = transfers_max;
        options.chunk_bytes_max = uint32_t(limits::chunk_bytes_max);
        link_ = std::make_unique<ReceiveLink>(tickets_, options, [] {});
    }

    Writes bind(const std::string& ticket_id, const std::string& manifest_payload,
                const std::shared_ptr<MemoryMap>& memory) {
        const Manifest expected = decode_manifest(span_of(manifest_payload));
        Ticket::Options options;
        options.id = id_from(ticket_id);
        options.model = expected.model;
        options.token_start = expected.token_start;
        options.token_stop = expected.token_stop;
        options.source_rank_count = expected.source_rank_count;
        options.source_ranks.clear();
        for (uint16_t rank = 0; rank < expected.source_rank_count; ++rank)
            options.source_ranks.insert(rank);
        options.destination_rank = expected.destination_rank;
        options.destination_rank_count = expected.destination_rank_count;
        TicketLog& log = logs_[options.id];
        const auto ticket = std::make_shared<Ticket>(options, memory, log);
        log.ready = ticket->layers_without_needs();
        tickets_.add(ticket);
        link_->ticket_added(options.id);
        return drain();
    }

    Writes cancel(const std::string& ticket_id) {
        if (const auto ticket = tickets_.find(id_from(ticket_id)))
            ticket->fail(Error(ErrorCode::CANCELLED, "the receiver cancelled"));
        return drain();
    }

    Writes lose_patience() {
        link_->expire(UINT64_MAX);
        return drain();
    }

    bool layer_ready(const std::string& ticket_id, uint32_t layer) {
        return logs_[id_from(ticket_id)].ready.count(layer) != 0;
    }
    bool complete(const std::string& ticket_id) {
        const TicketLog& log = logs_[id_from(ticket_id)];
        return log.ended && log.error == ErrorCode::OK;
    }
    uint16_t failure(const std::string& ticket_id) {
        return uint16_t(logs_[id_from(ticket_id)].error);
    }

private:
    ReceiveLink& machine() override { return *link_; }
    void before_drain() override { link_->flush(); }
    LaneWriter* writer(uint32_t index) override {
        const auto found = writers_.find(index);
        return found == writers_.end() || !lanes_[index].reader ? nullptr : found->second;
    }
    void greeted(uint32_t index, const Greeting& peer) override {
        if (peer.role == Role::RECEIVER)
            throw Error(ErrorCode::ROLE_CONFLICT, "both ends have the same role");
        if (peer.role == Role::FILE)
            throw Error(ErrorCode::FIELD_INVALID, "a file does not speak TCP");
        Greeting own = peer;
        own.role = Role::RECEIVER;
        own.version = FORMAT_VERSION;
        lanes_[index].last_words.resize(GREETING_BYTES);
        encode_greeting(own, lanes_[index].last_words.data());
        writers_[index] = &link_->lane_opened(index);
    }

    std::map<Id, TicketLog> logs_;
    TicketBook tickets_;
    std::unique_ptr<ReceiveLink> link_;
};

class SenderProbe : public Probe<SendLink>, public TransferObserver {
public:
    SenderProbe(const std::string& transfer_id, const std::string& manifest_payload,
                const std::shared_ptr<MemoryMap>& memory, uint32_t lane_count, uint32_t chunk_bytes,
                uint8_t codec)
        : lane_count_(lane_count), memory_(memory) {
        SendOptions options;
        options.chunk_bytes = chunk_bytes;
        options.codecs = codecs_available() & ~(1u << uint8_t(Codec::QUANTISED));
        link_ = std::make_unique<SendLink>(offers_, options);
        transfer_ = std::make_shared<SendTransfer>(
            id_from(transfer_id), decode_manifest(span_of(manifest_payload)), memory, codec, *this);
        link_->open(transfer_);
    }

    Writes start() {
        Writes writes;
        for (uint32_t lane = 0; lane < lane_count_; ++lane) writes.push_back(reopen(lane)[0]);
        return writes;
    }

    Writes reopen(uint32_t lane) {
        lane_opened(lane);
        Greeting greeting;
        greeting.link_id.bytes.fill(7);
        greeting.lane_index = uint16_t(lane);
        greeting.lane_count = uint16_t(lane_count_);
        greeting.codecs = codecs_available() & ~(1u << uint8_t(Codec::QUANTISED));
        uint8_t bytes[GREETING_BYTES];
        encode_greeting(greeting, bytes);
        return {{lane, py::bytes(reinterpret_cast<char*>(bytes), GREETING_BYTES)}};
    }

    Writes push(const py::object& items) {
        link_->push(*transfer_, items_from_python(items));
        ++pushed_;
        return drain();
    }
    Writes finish() {
        SendLink::finish(*transfer_, {}, 0);
        return drain();
    }
    Writes cancel() {
        link_->fail(*transfer_, Error(ErrorCode::CANCELLED, "the sender cancelled"));
        return drain();
    }

    uint32_t pushes_returned() const { return returned_; }
    uint64_t verified_bytes() const { return verified_; }
    py::object outcome() const {
        return ended_ ? py::object(py::int_(uint16_t(error_))) : py::object(py::none());
    }

private:
    SendLink& machine() override { return *link_; }
    void before_drain() override {
        // Lanes take turns, so that a transfer spreads over them as it does over sockets.
        for (bool any = true; any;) {
            any = false;
            for (auto& [index, lane] : lanes_) {
                if (!lane.reader || lane.error != ErrorCode::OK) continue;
                const size_t before = writers_[index]->queued_bytes();
                if (before < (64 << 10)) {
                    link_->refill(index);
                    if (writers_[index]->queued_bytes() > before) {
                        const Bytes more = written(*writers_[index]);
                        lane.last_words.insert(lane.last_words.end(), more.begin(), more.end());
                        any = true;
                    }
                }
            }
        }
    }
    LaneWriter* writer(uint32_t index) override {
        const auto found = writers_.find(index);
        return found == writers_.end() || !lanes_[index].reader ? nullptr : found->second;
    }
    void greeted(uint32_t index, const Greeting& peer) override {
        if (peer.role != Role::RECEIVER)
            throw Error(ErrorCode::ROLE_CONFLICT, "the peer is no receiver");
        writers_[index] = &link_->lane_opened(index, peer.payload_bytes_max, peer.codecs);
    }

    void on_granted() override {}
    void on_sent(uint64_t, bool) override {}
    void on_verified(uint64_t raw_bytes) override { verified_ += raw_bytes; }
    void on_push_complete(uint32_t, const Error&) override {
        if (ended_ || ++returned_ > pushed_)
            throw Error(ErrorCode::INTERNAL, "a push completed twice");
    }
    void on_end(const Error& error) override {
        if (ended_ || returned_ != pushed_)
            throw Error(ErrorCode::INTERNAL, "a transfer ended twice, or before its pushes");
        ended_ = true;
        error_ = error.code;
    }

    const uint32_t lane_count_;
    const std::shared_ptr<MemoryMap> memory_;
    OfferBook offers_;
    std::unique_ptr<SendLink> link_;
    std::shared_ptr<SendTransfer> transfer_;
    uint32_t pushed_ = 0, returned_ = 0;
    uint64_t verified_ = 0;
    bool ended_ = false;
    ErrorCode error_ = ErrorCode::OK;
};

}  // namespace

void register_probes(py::module_& module) {
    py::class_<ReceiverProbe>(module, "ReceiverProbe", "A receiver's machine without sockets.")
        .def(py::init<uint32_t>(), py::arg("transfers_max") = 1024)
        .def("bind", &ReceiverProbe::bind, py::arg("ticket_id"), py::arg("manifest"),
             py::arg("memory"), py::keep_alive<1, 4>())
        .def("feed", &ReceiverProbe::feed, py::arg("lane"), py::arg("data"))
        .def("lane_lost", &ReceiverProbe::lane_lost, py::arg("lane"))
        .def("lane_opened", &ReceiverProbe::lane_opened, py::arg("lane"))
        .def("lease_over", &ReceiverProbe::lease_over)
        .def("lane_error", &ReceiverProbe::lane_error, py::arg("lane"))
        .def("cancel", &ReceiverProbe::cancel, py::arg("ticket_id"))
        .def("lose_patience", &ReceiverProbe::lose_patience)
        .def("layer_ready", &ReceiverProbe::layer_ready, py::arg("ticket_id"), py::arg("layer"))
        .def("complete", &ReceiverProbe::complete, py::arg("ticket_id"))
        .def("failure", &ReceiverProbe::failure, py::arg("ticket_id"));
    py::class_<SenderProbe>(module, "SenderProbe", "A sender's machine without sockets.")
        .def(py::init<const std::string&, const std::string&, const std::shared_ptr<MemoryMap>&,
                      uint32_t, uint32_t, uint8_t>(),
             py::arg("transfer_id"), py::arg("manifest"), py::arg("memory"), py::arg("lanes") = 1,
             py::arg("chunk_bytes") = 4096, py::arg("codec") = 0)
        .def("start", &SenderProbe::start)
        .def("push", &SenderProbe::push, py::arg("items"))
        .def("finish", &SenderProbe::finish)
        .def("cancel", &SenderProbe::cancel)
        .def("feed", &SenderProbe::feed, py::arg("lane"), py::arg("data"))
        .def("lane_lost", &SenderProbe::lane_lost, py::arg("lane"))
        .def("reopen", &SenderProbe::reopen, py::arg("lane"))
        .def("lease_over", &SenderProbe::lease_over)
        .def("lane_error", &SenderProbe::lane_error, py::arg("lane"))
        .def("pushes_returned", &SenderProbe::pushes_returned)
        .def("verified_bytes", &SenderProbe::verified_bytes)
        .def("outcome", &SenderProbe::outcome);
}

}  // namespace kvwire
