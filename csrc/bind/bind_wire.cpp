// The constants of FORMAT.md as C++ has them, and the protocol machines driven with bytes, for the
// tests that hold them against the document and the Python reference.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "bind/bind_plan.hpp"
#include "bind/convert.hpp"
#include "wire/format.hpp"
#include "wire/receive_link.hpp"
#include "wire/speeds.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

template <class Enum, class Namer>
py::dict enum_names(int count, Namer namer) {
    py::dict names;
    for (int i = 1; i <= count; ++i)
        if (const char* name = namer(Enum(i))) names[py::str(name)] = i;
    return names;
}

py::dict frame_types() {
    py::dict names = enum_names<FrameType>(int(FrameType::CLOSE), frame_type_name);
    for (const FrameType type : {FrameType::PING, FrameType::PONG, FrameType::TABLE_NAMES,
                                 FrameType::TABLE_ANSWER, FrameType::TABLE, FrameType::SPEEDS})
        names[py::str(frame_type_name(type))] = int(type);
    return names;
}

py::dict error_numbers() {
    py::dict names;
    for (int i = 1; i < 1000; ++i)
        if (const char* name = error_name(ErrorCode(i))) names[py::str(name)] = i;
    return names;
}

py::dict limit_values() {
    py::dict values;
#define KVWIRE_LIMIT(name) values[#name] = limits::name
    KVWIRE_LIMIT(chunk_bytes_min);
    KVWIRE_LIMIT(chunk_bytes_max);
    KVWIRE_LIMIT(payload_bytes_min);
    KVWIRE_LIMIT(control_bytes_min);
    KVWIRE_LIMIT(control_bytes_max);
    KVWIRE_LIMIT(index_bytes_max);
    KVWIRE_LIMIT(lane_count_max);
    KVWIRE_LIMIT(rank_count_max);
    KVWIRE_LIMIT(group_count_max);
    KVWIRE_LIMIT(tensor_count_max);
    KVWIRE_LIMIT(layer_count_max);
    KVWIRE_LIMIT(axis_count_max);
    KVWIRE_LIMIT(slice_count_max);
    KVWIRE_LIMIT(extent_max);
    KVWIRE_LIMIT(name_bytes_max);
    KVWIRE_LIMIT(metadata_count_max);
    KVWIRE_LIMIT(metadata_bytes_max);
    KVWIRE_LIMIT(message_bytes_max);
    KVWIRE_LIMIT(item_count_max);
    KVWIRE_LIMIT(receipt_count_max);
    KVWIRE_LIMIT(repair_count_max);
    KVWIRE_LIMIT(segment_count_max);
    KVWIRE_LIMIT(segment_bytes_max);
    KVWIRE_LIMIT(token_count_max);
    KVWIRE_LIMIT(attempts_max);
    KVWIRE_LIMIT(attempt_max);
    KVWIRE_LIMIT(leaf_count_max);
    KVWIRE_LIMIT(waiting_manifests_max);
    KVWIRE_LIMIT(ended_transfers_min);
    KVWIRE_LIMIT(greeting_timeout_ms);
    KVWIRE_LIMIT(admission_key_bytes_min);
    KVWIRE_LIMIT(admissions_max);
    KVWIRE_LIMIT(admissions_per_address_max);
    KVWIRE_LIMIT(lease_ms);
    KVWIRE_LIMIT(stall_ms);
    KVWIRE_LIMIT(table_count_max);
    KVWIRE_LIMIT(table_entry_count_max);
    KVWIRE_LIMIT(table_bytes_max);
    KVWIRE_LIMIT(speed_count_max);
#undef KVWIRE_LIMIT
    return values;
}

py::dict fields(const std::vector<std::tuple<const char*, size_t, size_t>>& list) {
    py::dict result;
    for (const auto& [name, offset, bytes] : list) result[name] = py::make_tuple(offset, bytes);
    return result;
}

py::dict greeting_fields() {
    using namespace greeting_at;
    return fields({{"magic", MAGIC, 8}, {"version", VERSION, 2}, {"version_min", VERSION_MIN, 2},
                   {"role", ROLE, 1}, {"reserved_a", RESERVED_A, 1}, {"flags", FLAGS, 2},
                   {"link_id", LINK_ID, 16}, {"lane_index", LANE_INDEX, 2},
                   {"lane_count", LANE_COUNT, 2}, {"codecs", CODECS, 4},
                   {"payload_bytes_max", PAYLOAD_BYTES_MAX, 4},
                   {"control_bytes_max", CONTROL_BYTES_MAX, 4},
                   {"transfers_max", TRANSFERS_MAX, 4}, {"reserved_b", RESERVED_B, 8},
                   {"greeting_crc", GREETING_CRC, 4}});
}

py::dict header_fields() {
    using namespace header_at;
    return fields({{"magic", MAGIC, 2}, {"type", TYPE, 1}, {"flags", FLAGS, 1},
                   {"payload_bytes", PAYLOAD_BYTES, 4}, {"transfer_id", TRANSFER_ID, 16},
                   {"segment_index", SEGMENT_INDEX, 4}, {"attempt", ATTEMPT, 4},
                   {"raw_offset", RAW_OFFSET, 8}, {"raw_bytes", RAW_BYTES, 4},
                   {"raw_crc", RAW_CRC, 4}, {"payload_crc", PAYLOAD_CRC, 4},
                   {"table_index", TABLE_INDEX, 4}, {"codec", CODEC, 1}, {"unused", UNUSED, 1},
                   {"reserved", RESERVED, 2}, {"header_crc", HEADER_CRC, 4}});
}

py::dict upper(const py::dict& names) {
    py::dict result;
    for (const auto& [name, number] : names) result[name.attr("upper")()] = number;
    return result;
}

py::dict format_constants() {
    py::dict constants;
    constants["frame_types"] = frame_types();
    constants["errors"] = error_numbers();
    constants["limits"] = limit_values();
    constants["codecs"] = py::dict(py::arg("RAW") = 0, py::arg("LZ4") = 1, py::arg("TIERED") = 2,
                                      py::arg("QUANTISED") = 3);
    constants["greeting"] = greeting_fields();
    constants["header"] = header_fields();
    constants["group_kinds"] = upper(enum_names<GroupKind>(255, group_kind_name));
    constants["axes"] = upper(enum_names<Axis>(255, axis_name));
    constants["dtypes"] = upper(enum_names<DType>(255, dtype_name));
    return constants;
}

// Decodes every control payload of a stream, and acts on none.
class Checker : public FrameHandler {
public:
    explicit Checker(Role reader) : reader_(reader) {}

    void on_control(uint32_t, const FrameHeader& header, ByteSpan payload) override {
        const bool from_sender = reader_ == Role::RECEIVER;
        switch (header.type) {
            case FrameType::ABORT: (void)decode_abort(payload); return;
            case FrameType::CLOSE:
            case FrameType::PING:
            case FrameType::PONG:
            case FrameType::SPEEDS: return;
            case FrameType::MANIFEST: return expect(from_sender, decode_manifest, header, payload);
            case FrameType::SEGMENT: return expect(from_sender, decode_segment, header, payload);
            case FrameType::SEGMENT_END:
                return expect(from_sender, decode_segment_end, header, payload);
            case FrameType::END: return expect(from_sender, decode_end, header, payload);
            case FrameType::GRANT: return expect(!from_sender, decode_grant, header, payload);
            case FrameType::RECEIPT: return expect(!from_sender, decode_receipt, header, payload);
            case FrameType::REPAIR: return expect(!from_sender, decode_repair, header, payload);
            case FrameType::DONE: return expect(!from_sender, decode_done, header, payload);
            case FrameType::PULL: return expect(!from_sender, decode_pull, header, payload);
            case FrameType::TABLE_NAMES:
                if (from_sender) (void)decode_table_names(payload);
                return;
            case FrameType::TABLE_ANSWER:
                if (!from_sender) (void)decode_table_answer(payload);
                return;
            case FrameType::TABLE:
                if (from_sender) (void)decode_table_index(payload);
                return;
            default: refuse(header);
        }
    }
    ChunkTarget* on_chunk(uint32_t, const FrameHeader& header) override {
        if (reader_ != Role::RECEIVER) refuse(header);
        return &nowhere_;
    }
    void on_chunk_end(uint32_t, uint32_t) override {}

private:
    [[noreturn]] static void refuse(const FrameHeader& header) {
        throw Error(ErrorCode::STATE_INVALID,
                    std::string(frame_type_name(header.type)) + " has another writer");
    }
    template <class Decode>
    void expect(bool right_writer, Decode decode, const FrameHeader& header, ByteSpan payload) {
        if (!right_writer) refuse(header);
        (void)decode(payload);
    }
    const Role reader_;
    ChunkTarget nowhere_;
};

// Number of the first error in a whole stream as `reader` sees it, 0 when there is none.
uint16_t check_stream(uint8_t reader, const std::string& data) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(data.data());
    try {
        if (data.size() < GREETING_BYTES)
            throw Error(ErrorCode::TRUNCATED, "stream ended inside the greeting");
        const Greeting peer = decode_greeting(bytes);
        if (peer.role == Role(reader))
            throw Error(ErrorCode::ROLE_CONFLICT, "both ends have the same role");
        if (peer.role == Role::FILE)
            throw Error(ErrorCode::FIELD_INVALID, "a file does not speak TCP");
        Checker checker{Role(reader)};
        LaneReader lane(checker, 0, FrameLimits{});
        lane.feed(bytes + GREETING_BYTES, data.size() - GREETING_BYTES);
        lane.end_of_stream();
    } catch (const Error& error) {
        return uint16_t(error.code);
    }
    return 0;
}

}  // namespace

void register_wire(py::module_& module) {
    module.def("format_constants", &format_constants);
    module.def("check_stream", &check_stream, py::arg("reader"), py::arg("data"));
    module.def("decode_manifest", [](const std::string& payload) {
        return to_python(encode(decode_manifest(span_of(payload))));
    }, "Decodes and encodes again: the same bytes, or the error.");
    module.def("decode_speeds", [](const std::string& payload) -> py::object {
        Speeds speeds;
        if (!decode(span_of(payload), &speeds)) return py::none();
        return to_python(encode(speeds));
    }, "Decodes and encodes again; None: it says nothing.");
}

}  // namespace kvwire
