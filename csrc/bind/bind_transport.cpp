#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bind/bind_plan.hpp"
#include "bind/bind_staging.hpp"
#include "bind/convert.hpp"
#include "codec/code_book.hpp"
#include "codec/codec.hpp"
#include "transport/endpoint.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

// Lets other Python threads run while this one waits. Before Python 3.13 a daemon thread that
// wants the GIL back at interpreter exit is unwound from here, which pybind11's own guard, being
// noexcept, turns into std::terminate.
class WithoutGil {
public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    WithoutGil(const WithoutGil&) = delete;
    ~WithoutGil() noexcept(false) { PyEval_RestoreThread(state_); }

private:
    PyThreadState* state_;
};
using NoGil = py::call_guard<WithoutGil>;
using VerdictTuple = std::tuple<const LandingZone::Landed*, uint16_t, uint32_t>;

Bytes bytes_from(const std::string& text) { return Bytes(text.begin(), text.end()); }

// (code, message, expected, actual, offset, remote), or None.
py::object error_to_python(const Error& error) {
    if (!error) return py::none();
    return py::make_tuple(uint16_t(error.code), error.message, error.expected, error.actual,
                          error.offset, error.remote);
}

// {"admission_key"} or {"ca", "certificate", "key", "peer_name"} or {"psk_identity", "psk"}
void secure(EndpointOptions* options, const py::dict& given) {
    const auto text = [&](const char* name) {
        return given.contains(name) ? given[name].cast<std::string>() : std::string();
    };
    if (given.contains("admission_key")) options->admission_key = bytes_from(text("admission_key"));
    if (given.contains("ca") || given.contains("psk"))
        options->tls = make_tls_context({text("ca"), text("certificate"), text("key"),
                                         text("peer_name"), text("psk_identity"),
                                         bytes_from(text("psk"))});
}

EndpointOptions options_from(const py::dict& given) {
    EndpointOptions options;
    const auto take = [&](const char* name, auto& target) {
        if (given.contains(name))
            target = given[name].cast<std::remove_reference_t<decltype(target)>>();
    };
    options.send.code_book = std::make_shared<CodeBook>();
    options.codecs = options.send.codecs = options.receive.codecs = codecs_available();
    if (!given.contains("allow_lossy") || !given["allow_lossy"].cast<bool>())
        options.receive.codecs &= ~(1u << uint8_t(Codec::QUANTISED));
    take("io_threads", options.io_threads);
    take("connections_max", options.door.connections_max);
    take("connections_per_address_max", options.door.connections_per_address_max);
    take("links_max", options.links_max);
    if (given.contains("security")) secure(&options, given["security"]);
    take("connect_timeout_ns", options.connect_timeout_ns);
    take("congestion_control", options.socket.congestion_control);
    take("dscp", options.socket.dscp);
    bool zero_copy = false;
    take("zero_copy", zero_copy);
    if (zero_copy) options.zero_copy = ZeroCopy::ON;
    take("bandwidth_max_bytes_per_s", options.bandwidth_max_bytes_per_s);
    take("chunk_bytes", options.send.chunk_bytes);
    take("code_book", options.send.code_book);
    take("send_transfers_max", options.send.transfers_max);
    take("window_bytes", options.receive.window_bytes);
    take("chunk_bytes_max", options.receive.chunk_bytes_max);
    take("transfers_max", options.receive.transfers_max);
    take("patience_ns", options.receive.patience_ns);
    take("lease_ns", options.send.liveness.lease_ns);
    options.receive.liveness = options.send.liveness;
    return options;
}

py::dict stats_of(Endpoint& endpoint) {
    EndpointStats stats;
    {
        const WithoutGil release;
        stats = endpoint.stats();
    }
    py::dict result;
    result["connections"] = stats.connections;
    result["links"] = stats.links;
    result["open_transfers"] = stats.open_transfers;
    result["bytes_sent"] = stats.bytes_sent;
    result["bytes_received"] = stats.bytes_received;
    result["send_calls"] = stats.send_calls;
    result["receive_calls"] = stats.receive_calls;
    result["lanes_lost"] = stats.lanes_lost;
    result["lanes_redialled"] = stats.lanes_redialled;
    result["zero_copy_sends"] = stats.zero_copy_sends;
    result["zero_copies_copied"] = stats.zero_copies_copied;
    result["zero_copies_refused"] = stats.zero_copies_refused;
    result["internal_errors"] = stats.internal_errors;
    result["io"] = stats.io;
    result["io_note"] = stats.io_note;
    result["zero_copy"] = stats.zero_copy;
    result["zero_copy_note"] = stats.zero_copy_note;
    return result;
}

// (bandwidth, send, receive, kinds): bytes per second; of each kind (group, dtype, codec, why,
// candidates), of each candidate (codec, ratio, encode, decode, throughput).
py::tuple choices_of(const LinkReading& reading) {
    py::list kinds;
    for (const ChoiceReport& choice : reading.choices) {
        py::list candidates;
        for (const CandidateReport& c : choice.candidates)
            candidates.append(py::make_tuple(uint8_t(c.codec), c.ratio, c.encode_bytes_per_s,
                                             c.decode_bytes_per_s, c.throughput_bytes_per_s));
        kinds.append(py::make_tuple(uint8_t(choice.kind.group), uint8_t(choice.kind.dtype),
                                    uint8_t(choice.chosen), choice.why, candidates));
    }
    return py::make_tuple(reading.bandwidth_bytes_per_s, reading.send_bytes_per_s,
                          reading.receive_bytes_per_s, kinds);
}

// (born_ns, now_ns, verified_bytes, backlog_bytes, lanes, choices_of()); of each lane (serial,
// index, congestion state, bytes acknowledged or received, sent, sent again, delivery and pacing in
// bytes per second, RTT and least RTT in us, bytes in flight, queued, of the window, us busy, held
// back by the receiver, by the buffer).
py::tuple link_reading_of(Endpoint& endpoint, const std::string& link) {
    LinkReading reading;
    {
        const WithoutGil release;
        reading = endpoint.read_link(id_from(link));
    }
    const bool sends = endpoint.role() == Role::SENDER;
    py::list lanes;
    for (const LaneReading& lane : reading.lanes) {
        const TcpInfo& tcp = lane.tcp;
        lanes.append(py::make_tuple(
            lane.serial, lane.index, uint8_t(tcp.congestion_state),
            sends ? tcp.acked_bytes : tcp.received_bytes, tcp.sent_bytes, tcp.retransmitted_bytes,
            tcp.delivery_bytes_per_s, tcp.pacing_bytes_per_s, tcp.rtt_us, tcp.rtt_min_us,
            uint64_t(tcp.in_flight_segments) * tcp.mss_bytes, lane.queued_bytes + tcp.unsent_bytes,
            uint64_t(tcp.cwnd_segments) * tcp.mss_bytes, tcp.busy_us, tcp.window_limited_us,
            tcp.buffer_limited_us));
    }
    return py::make_tuple(reading.born_ns, reading.now_ns, reading.verified_bytes,
                          reading.backlog_bytes, lanes, choices_of(reading));
}

// (verified_bytes, wire_bytes, repaired_chunks, granted, ended, error)
py::tuple progress_of(const Handle& handle) {
    const Progress p = handle.progress();
    return py::make_tuple(p.verified_bytes, p.wire_bytes, p.repaired_chunks, p.granted, p.ended,
                          error_to_python(p.error));
}

template <class Class>
void bind_endpoint(Class& bound) {
    using T = typename Class::type;
    bound
        .def("listen", [](T& self, const std::string& host, uint16_t port) {
            return self.listen({host, port});
        }, py::arg("host"), py::arg("port"), NoGil())
        .def("dial", [](T& self, const std::string& host, uint16_t port, uint16_t lanes) {
            Id id;
            {
                const WithoutGil release;
                id = self.dial({host, port}, lanes);
            }
            return to_python(id);
        }, py::arg("host"), py::arg("port"), py::arg("lanes"))
        .def("wait_connected", [](T& self, const std::string& link, double timeout_s) {
            self.wait_connected(id_from(link), timeout_s);
        }, py::arg("link"), py::arg("timeout_s"), NoGil())
        .def("link_ids", [](T& self) {
            std::vector<Id> ids;
            {
                const WithoutGil release;
                ids = self.link_ids();
            }
            py::list result;
            for (const Id& id : ids) result.append(to_python(id));
            return result;
        })
        .def("close", &T::close, NoGil())
        .def("stats", [](T& self) { return stats_of(self); })
        .def("link_stats", [](T& self, const std::string& link) {
            return link_reading_of(self, link);
        }, py::arg("link"))
        .def("event_fd", [](T& self) { return self.notifier().fd(); })
        .def("drain_events", [](T& self) { return self.notifier().drain(); });
}

void bind_handles(py::module_& module) {
    py::class_<Handle, std::shared_ptr<Handle>>(module, "Handle")
        .def_property_readonly("number", [](const Handle& self) { return self.number; })
        .def("progress", &progress_of)
        .def("wait", &Handle::wait, py::arg("timeout_s"), NoGil());
    py::class_<TransferHandle, Handle, std::shared_ptr<TransferHandle>>(module, "TransferHandle")
        .def_property_readonly("id", [](const TransferHandle& h) { return to_python(h.id()); })
        .def("push", [](TransferHandle& self, const py::object& items, int32_t priority,
                        const std::optional<StagedTuple>& staged) {
            std::vector<Item> taken = items_from_python(items);
            auto chunks = staged ? staged_from(*staged) : nullptr;
            const WithoutGil release;
            return self.push(std::move(taken), priority, std::move(chunks));
        }, py::arg("items"), py::arg("priority") = 0, py::arg("staged") = py::none())
        .def("terms", [](const TransferHandle& self) {
            const TransferHandle::Terms t = self.terms();
            return py::make_tuple(t.chunk_bytes, t.codecs, t.token_start, t.token_stop);
        })
        .def("finish", [](TransferHandle& self, const std::string& metadata, uint16_t count) {
            self.finish(bytes_from(metadata), count);
        }, py::arg("metadata"), py::arg("metadata_count"), NoGil())
        .def("cancel", &TransferHandle::cancel, NoGil())
        .def("timing", [](const TransferHandle& self) {
            const TransferHandle::Timing t = self.timing();
            return py::make_tuple(t.first_push_ns, t.last_push_ns, t.ended_ns, t.overlapped_bytes);
        })
        .def("link", [](const TransferHandle& self) {
            Id id;
            {
                const WithoutGil release;
                id = self.link();
            }
            return to_python(id);
        })
        .def("wait_push", &TransferHandle::wait_push, py::arg("push"), py::arg("timeout_s"),
             NoGil())
        .def("pushes_returned", [](const TransferHandle& self) {
            std::vector<bool> returned;
            for (const auto state : self.push_states())
                returned.push_back(state == TransferHandle::PushState::RETURNED);
            return returned;
        });
    py::class_<TicketHandle, Handle, std::shared_ptr<TicketHandle>>(module, "TicketHandle")
        .def_property_readonly("id", [](const TicketHandle& self) { return to_python(self.id()); })
        .def("cancel", &TicketHandle::cancel, NoGil())
        .def("wait_layer", &TicketHandle::wait_layer, py::arg("layer"), py::arg("timeout_s"),
             NoGil())
        .def("layers_ready", &TicketHandle::layers_ready)
        .def("layers_touched", &TicketHandle::layers_touched)
        .def("metadata", [](const TicketHandle& self) {
            py::list result;  // (source_rank, manifest entries, count, end entries, count)
            for (const auto& m : self.metadata())
                result.append(py::make_tuple(m.source_rank, to_python(m.manifest), m.manifest_count,
                                             to_python(m.end), m.end_count));
            return result;
        });
}

std::shared_ptr<TicketHandle> bind_ticket(ReceiverEndpoint& self, const std::string& ticket_id,
                                          const std::string& model, uint64_t token_start,
                                          uint64_t token_stop,
                                          const std::vector<uint16_t>& source_ranks,
                                          uint16_t source_rank_count, uint16_t destination_rank,
                                          uint16_t destination_rank_count,
                                          const std::shared_ptr<MemoryMap>& memory,
                                          double deadline_s,
                                          const std::shared_ptr<LandingZone>& zone) {
    Ticket::Options options;
    options.id = id_from(ticket_id);
    options.model = model;
    options.token_start = token_start;
    options.token_stop = token_stop;
    options.source_ranks = {source_ranks.begin(), source_ranks.end()};
    options.source_rank_count = source_rank_count;
    options.destination_rank = destination_rank;
    options.destination_rank_count = destination_rank_count;
    options.zone = zone;
    if (zone) options.codecs = 1u << uint8_t(Codec::RAW) | 1u << uint8_t(Codec::TIERED);
    return self.bind(std::move(options), memory, deadline_s);
}

void bind_receiver(py::module_& module) {
    py::class_<ReceiverEndpoint> receiver(module, "ReceiverEndpoint");
    receiver.def(py::init([](const py::dict& options) {
        return std::make_unique<ReceiverEndpoint>(options_from(options));
    }), py::arg("options"));
    bind_endpoint(receiver);
    receiver
        .def("bind", &bind_ticket, py::arg("ticket_id"), py::arg("model"), py::arg("token_start"),
             py::arg("token_stop"), py::arg("source_ranks"), py::arg("source_rank_count"),
             py::arg("destination_rank"), py::arg("destination_rank_count"), py::arg("memory"),
             py::arg("deadline_s"), py::arg("zone") = nullptr, NoGil())
        .def("landed", [](ReceiverEndpoint& self, const std::vector<VerdictTuple>& verdicts) {
            std::vector<ReceiverEndpoint::Verdict> found;
            for (const auto& [landed, code, crc] : verdicts)
                found.push_back({landed, ErrorCode(code), crc});
            self.landed(found);
        }, py::arg("verdicts"), NoGil())
        .def("pull", [](ReceiverEndpoint& self, const std::string& link, const std::string& ticket,
                        const std::string& offer, uint64_t token_start, uint64_t token_stop,
                        uint16_t source_rank, uint16_t destination_rank,
                        uint16_t destination_rank_count) {
            self.pull(id_from(link), id_from(ticket),
                      {id_from(offer), token_start, token_stop, source_rank, destination_rank,
                       destination_rank_count});
        }, NoGil());
}

// group, tensor, rung, by_channel.
using RoundingTuple = std::tuple<uint16_t, uint16_t, uint8_t, bool>;

std::vector<Rounding> roundings_from(const std::vector<RoundingTuple>& tuples) {
    std::vector<Rounding> roundings;
    for (const auto& [group, tensor, rung, by_channel] : tuples)
        roundings.push_back({group, tensor, Rung(rung), by_channel});
    return roundings;
}

void bind_sender(py::module_& module) {
    py::class_<SenderEndpoint> sender(module, "SenderEndpoint");
    sender.def(py::init([](const py::dict& options) {
        return std::make_unique<SenderEndpoint>(options_from(options));
    }), py::arg("options"));
    bind_endpoint(sender);
    const auto manifest_from = [](const std::string& payload) {
        return decode_manifest(span_of(payload));
    };
    sender
        .def("open", [=](SenderEndpoint& self, const std::string& link, const std::string& manifest,
                         const std::shared_ptr<MemoryMap>& memory, uint8_t codec,
                         double deadline_s, int32_t priority,
                         const std::vector<RoundingTuple>& roundings) {
            return self.open(id_from(link), manifest_from(manifest), memory, codec, deadline_s,
                             priority, roundings_from(roundings));
        }, py::arg("link"), py::arg("manifest"), py::arg("memory"), py::arg("codec"),
             py::arg("deadline_s"), py::arg("priority") = 0,
             py::arg("roundings") = std::vector<RoundingTuple>(), NoGil())
        .def("offer", [=](SenderEndpoint& self, const std::string& offer,
                          const std::string& manifest, const std::shared_ptr<MemoryMap>& memory,
                          uint8_t codec, double deadline_s, int32_t priority,
                          const std::vector<RoundingTuple>& roundings) {
            return self.offer(id_from(offer), manifest_from(manifest), memory, codec, deadline_s,
                              priority, roundings_from(roundings));
        }, py::arg("offer"), py::arg("manifest"), py::arg("memory"), py::arg("codec"),
             py::arg("deadline_s"), py::arg("priority") = 0,
             py::arg("roundings") = std::vector<RoundingTuple>(), NoGil())
        .def("link_alive", [](SenderEndpoint& self, const std::string& link) {
            return self.link_alive(id_from(link));
        }, NoGil());
}

}  // namespace

void register_errors(py::module_&) {
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const Error& e) {
            const py::object make = py::module_::import("kvwire.errors").attr("error_from_code");
            const py::object error =
                make(uint16_t(e.code), e.message, py::arg("expected") = e.expected,
                     py::arg("actual") = e.actual, py::arg("offset") = e.offset,
                     py::arg("remote") = e.remote);
            PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
        }
    });
}

void register_transport(py::module_& module) {
    bind_handles(module);
    bind_receiver(module);
    bind_sender(module);
    module.def("random_id", [] { return to_python(random_id()); });
}

}  // namespace kvwire
