#include "wire/manifest.hpp"

#include <algorithm>
#include <set>

#include "wire/reader.hpp"

namespace kvwire {
namespace {

std::string read_name(FieldReader& in, bool may_be_empty) {
    const std::string name = in.text(in.number<uint8_t>());
    if (!is_text(name) || (name.empty() && !may_be_empty))
        in.fail(ErrorCode::FIELD_INVALID, "a name is empty or not UTF-8", 1, name.size());
    return name;
}

void write_name(FieldWriter& out, const std::string& name) {
    if (name.size() > limits::name_bytes_max || !is_text(name))
        throw Error(ErrorCode::USAGE, "name '" + name.substr(0, 64) + "' is too long or not text",
                    limits::name_bytes_max, name.size());
    out.number(uint8_t(name.size()))
        .data(reinterpret_cast<const uint8_t*>(name.data()), name.size());
}

void check_count(FieldReader& in, const char* what, uint64_t count, uint64_t limit) {
    if (count > limit)
        in.fail(ErrorCode::LIMIT_EXCEEDED, std::string(what) + " over the limit", limit, count);
}

Slice read_slice(FieldReader& in, bool named) {
    Slice slice;
    slice.name = read_name(in, !named);
    slice.full = in.number<uint32_t>();
    slice.start = in.number<uint32_t>();
    slice.stop = in.number<uint32_t>();
    check_count(in, "full", slice.full, limits::extent_max);
    if (slice.start >= slice.stop || slice.stop > slice.full)
        in.fail(ErrorCode::FIELD_INVALID, "slice is empty or outside its axis", slice.full,
                slice.stop);
    return slice;
}

AxisDesc read_axis(FieldReader& in) {
    AxisDesc axis;
    const uint8_t number = in.number<uint8_t>();
    axis.axis = Axis(number);
    if (axis_name(axis.axis) == nullptr)
        in.fail(ErrorCode::FIELD_INVALID, "unknown axis", uint64_t(Axis::ITEM), number);
    const uint8_t count = in.number<uint8_t>();
    check_count(in, "slice_count", count, limits::slice_count_max);
    if ((axis.axis == Axis::TOKEN) != (count == 0))
        in.fail(ErrorCode::FIELD_INVALID, "the token axis alone has no slices", 0, count);
    std::set<std::string> names;
    for (int i = 0; i < count; ++i) {
        axis.slices.push_back(read_slice(in, count > 1));
        if (!names.insert(axis.slices.back().name).second)
            in.fail(ErrorCode::FIELD_INVALID, "two slices have one name", 0, i);
    }
    return axis;
}

TensorDesc read_tensor(FieldReader& in) {
    TensorDesc tensor;
    tensor.name = read_name(in, false);
    tensor.dtype = DType(in.number<uint8_t>());
    if (item_bytes(tensor.dtype) == 0)
        in.fail(ErrorCode::FIELD_INVALID, "unknown dtype", 0, uint64_t(tensor.dtype));
    const uint8_t flags = in.number<uint8_t>();
    if (flags & ~TENSOR_FLAG_REPLICATED)
        in.fail(ErrorCode::RESERVED_BIT_SET, "reserved tensor flag set", 0, flags);
    tensor.replicated = flags & TENSOR_FLAG_REPLICATED;
    const uint8_t axis_count = in.number<uint8_t>();
    check_count(in, "axis_count", axis_count, limits::axis_count_max);
    in.zeros(1);
    tensor.block_tokens = in.number<uint32_t>();
    std::set<Axis> seen;
    int fused = 0;
    for (int i = 0; i < axis_count; ++i) {
        tensor.axes.push_back(read_axis(in));
        if (!seen.insert(tensor.axes.back().axis).second)
            in.fail(ErrorCode::FIELD_INVALID, "an axis occurs twice", 1, 2);
        fused += tensor.axes.back().slices.size() > 1;
    }
    if (axis_count == 0 || fused > 1)
        in.fail(ErrorCode::FIELD_INVALID, "a tensor needs axes, at most one of them fused", 1,
                fused);
    return tensor;
}

GroupDesc read_group(FieldReader& in) {
    GroupDesc group;
    group.kind = GroupKind(in.number<uint8_t>());
    if (group_kind_name(group.kind) == nullptr)
        in.fail(ErrorCode::FIELD_INVALID, "unknown group kind", 0, uint64_t(group.kind));
    in.zeros(1);
    const uint16_t tensor_count = in.number<uint16_t>();
    const uint32_t layer_count = in.number<uint32_t>();
    check_count(in, "tensor_count", tensor_count, limits::tensor_count_max);
    check_count(in, "layer_count", layer_count, limits::layer_count_max);
    group.window_tokens = in.number<uint32_t>();
    for (uint32_t i = 0; i < layer_count; ++i) {
        group.layers.push_back(in.number<uint32_t>());
        if (i && group.layers[i] <= group.layers[i - 1])
            in.fail(ErrorCode::FIELD_INVALID, "layer numbers do not rise", group.layers[i - 1],
                    group.layers[i]);
    }
    for (int i = 0; i < tensor_count; ++i) group.tensors.push_back(read_tensor(in));
    return group;
}

void read_fixed(FieldReader& in, Manifest& m) {
    m.ticket_id = in.id();
    m.spec_fingerprint = in.id();
    m.token_start = in.number<uint64_t>();
    m.token_stop = in.number<uint64_t>();
    m.source_rank = in.number<uint16_t>();
    m.source_rank_count = in.number<uint16_t>();
    m.destination_rank = in.number<uint16_t>();
    m.destination_rank_count = in.number<uint16_t>();
    m.codecs = in.number<uint32_t>();
    if (m.token_stop < m.token_start || m.token_stop > limits::token_count_max)
        in.fail(ErrorCode::TOKENS_MISMATCH, "token range runs backwards or too far",
                m.token_start, m.token_stop);
    const auto check_rank = [&](const char* side, uint16_t rank, uint16_t count) {
        if (rank >= count || count > limits::rank_count_max)
            in.fail(ErrorCode::RANK_UNEXPECTED,
                    std::string(side) + " rank " + std::to_string(rank) + " of " +
                        std::to_string(count),
                    count, rank);
    };
    check_rank("source", m.source_rank, m.source_rank_count);
    check_rank("destination", m.destination_rank, m.destination_rank_count);
    if (!(m.codecs & 1)) in.fail(ErrorCode::FIELD_INVALID, "codecs lack raw", 1, m.codecs);
}

void write_tensor(FieldWriter& out, const TensorDesc& tensor) {
    write_name(out, tensor.name);
    out.number(uint8_t(tensor.dtype))
        .number(uint8_t(tensor.replicated ? TENSOR_FLAG_REPLICATED : 0))
        .number(uint8_t(tensor.axes.size())).zeros(1).number(tensor.block_tokens);
    for (const AxisDesc& axis : tensor.axes) {
        out.number(uint8_t(axis.axis)).number(uint8_t(axis.slices.size()));
        for (const Slice& slice : axis.slices) {
            write_name(out, slice.name);
            out.number(slice.full).number(slice.start).number(slice.stop);
        }
    }
}

}  // namespace

void check_metadata(FieldReader& in, uint16_t count) {
    check_count(in, "metadata_count", count, limits::metadata_count_max);
    const size_t start = in.offset();
    std::string previous;
    for (int i = 0; i < count; ++i) {
        const std::string key = read_name(in, false);
        if (i && key <= previous)
            in.fail(ErrorCode::FIELD_INVALID, "metadata keys do not rise", 0, i);
        previous = key;
        const uint8_t type = in.number<uint8_t>();
        if (type == 1 || type == 2) {
            in.take(8);
        } else if (type == 3) {
            const uint8_t value = in.number<uint8_t>();
            if (value > 1) in.fail(ErrorCode::FIELD_INVALID, "bool is neither 0 nor 1", 1, value);
        } else if (type == 4 || type == 5) {
            const uint32_t bytes = in.number<uint32_t>();
            check_count(in, "metadata value", bytes, limits::metadata_bytes_max);
            const std::string value = in.text(bytes);
            if (type == 4 && !is_text(value, true))
                in.fail(ErrorCode::FIELD_INVALID, "metadata text is not UTF-8", 0, i);
        } else {
            in.fail(ErrorCode::FIELD_INVALID, "unknown metadata type", 5, type);
        }
    }
    check_count(in, "metadata bytes", in.offset() - start, limits::metadata_bytes_max);
}

Manifest decode_manifest(ByteSpan payload) {
    FieldReader in(payload, "MANIFEST");
    Manifest manifest;
    read_fixed(in, manifest);
    const uint16_t group_count = in.number<uint16_t>();
    manifest.metadata_count = in.number<uint16_t>();
    check_count(in, "group_count", group_count, limits::group_count_max);
    check_count(in, "metadata_count", manifest.metadata_count, limits::metadata_count_max);
    manifest.model = read_name(in, true);
    for (int i = 0; i < group_count; ++i) manifest.groups.push_back(read_group(in));
    const size_t metadata_start = in.offset();
    check_metadata(in, manifest.metadata_count);
    in.at_end();
    manifest.metadata.assign(payload.data + metadata_start, payload.data + payload.size);
    return manifest;
}

Bytes encode(const Manifest& m) {
    FieldWriter out;
    out.id(m.ticket_id).id(m.spec_fingerprint).number(m.token_start).number(m.token_stop)
        .number(m.source_rank).number(m.source_rank_count).number(m.destination_rank)
        .number(m.destination_rank_count).number(m.codecs).number(uint16_t(m.groups.size()))
        .number(m.metadata_count);
    write_name(out, m.model);
    for (const GroupDesc& group : m.groups) {
        out.number(uint8_t(group.kind)).zeros(1).number(uint16_t(group.tensors.size()))
            .number(uint32_t(group.layers.size())).number(group.window_tokens);
        for (uint32_t layer : group.layers) out.number(layer);
        for (const TensorDesc& tensor : group.tensors) write_tensor(out, tensor);
    }
    out.data(m.metadata.data(), m.metadata.size());
    return out.take();
}

}  // namespace kvwire
