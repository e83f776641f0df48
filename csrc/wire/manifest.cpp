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

Slice read_slice(FieldReader& in) {
    Slice slice;
    slice.name = read_name(in, true);
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
    for (int i = 0; i < count; ++i) axis.slices.push_back(read_slice(in));
    std::set<std::string> names;
    for (const Slice& slice : axis.slices)
        if (slice.name.empty() != (count == 1) || !names.insert(slice.name).second)
            in.fail(ErrorCode::FIELD_INVALID,
                    "a single slice is unnamed, several have names that differ", count,
                    names.size());
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
    if (tensor.axes.size() <= tensor.has_tokens() || fused > 1)
        in.fail(ErrorCode::FIELD_INVALID,
                "a tensor needs axes besides token, at most one of them fused", 1, fused);
    if (tensor.block_tokens && !tensor.has_tokens())
        in.fail(ErrorCode::FIELD_INVALID, "block_tokens without a token axis", 0,
                tensor.block_tokens);
    return tensor;
}

const AxisDesc* find_axis(const TensorDesc& tensor, Axis axis) {
    for (const AxisDesc& desc : tensor.axes)
        if (desc.axis == axis) return &desc;
    return nullptr;
}

// Which axes a group of this kind must and must not have.
void check_axes(FieldReader& in, GroupKind kind, const TensorDesc& tensor) {
    const bool per_token = kind == GroupKind::FULL_ATTENTION || kind == GroupKind::LATENT ||
                           kind == GroupKind::SLIDING_WINDOW;
    const bool fixed = kind == GroupKind::RECURRENT || kind == GroupKind::CONVOLUTION ||
                       kind == GroupKind::REQUEST;
    if ((per_token && !tensor.has_tokens()) || (fixed && tensor.has_tokens()))
        in.fail(ErrorCode::FIELD_INVALID, "the group's kind and the token axis do not agree",
                per_token, tensor.has_tokens());
    const AxisDesc* column = find_axis(tensor, Axis::COLUMN);
    const bool convolution = kind == GroupKind::CONVOLUTION;
    if (convolution != (column != nullptr) ||
        (convolution && !find_axis(tensor, Axis::CHANNEL)))
        in.fail(ErrorCode::FIELD_INVALID, "convolution alone has columns, and channels with them",
                convolution, column != nullptr);
    if (column && (column->slices.size() > 1 ||
                   column->slices[0].extent() != column->slices[0].full))
        in.fail(ErrorCode::FIELD_INVALID, "columns are never cut", 1, column->slices.size());
}

void check_group(FieldReader& in, const GroupDesc& group) {
    const bool request = group.kind == GroupKind::REQUEST;
    const bool window = group.kind == GroupKind::SLIDING_WINDOW;
    if (group.layers.empty() || group.tensors.empty())
        in.fail(ErrorCode::FIELD_INVALID, "a group has no layer or no tensor", 1, 0);
    if (request ? group.layers != std::vector<uint32_t>{REQUEST_LAYER}
                : group.layers.back() == REQUEST_LAYER)
        in.fail(ErrorCode::FIELD_INVALID, "request tensors alone have layer 0xFFFFFFFF",
                REQUEST_LAYER, group.layers.back());
    if (window != (group.window_tokens != 0))
        in.fail(ErrorCode::FIELD_INVALID, "sliding windows alone have window_tokens", window,
                group.window_tokens);
    const TensorDesc* first = nullptr;  // of those with tokens
    std::set<std::string> names;
    for (const TensorDesc& tensor : group.tensors) {
        check_axes(in, group.kind, tensor);
        if (tensor.has_tokens()) {
            if (!first) first = &tensor;
            if (tensor.block_tokens != first->block_tokens)
                in.fail(ErrorCode::FIELD_INVALID, "block_tokens differ in a group",
                        first->block_tokens, tensor.block_tokens);
        }
        for (size_t leaf = 0; leaf < tensor.leaf_count(); ++leaf)
            if (!names.insert(tensor.leaf_name(leaf)).second)
                in.fail(ErrorCode::FIELD_INVALID, "a leaf occurs twice", 1, 2);
    }
}

bool share_a_layer(const GroupDesc& a, const GroupDesc& b) {
    for (size_t i = 0, k = 0; i < a.layers.size() && k < b.layers.size();) {
        if (a.layers[i] == b.layers[k]) return true;
        a.layers[i] < b.layers[k] ? ++i : ++k;
    }
    return false;
}

std::set<std::string> leaf_names(const GroupDesc& group) {
    std::set<std::string> names;
    for (const TensorDesc& tensor : group.tensors)
        for (size_t leaf = 0; leaf < tensor.leaf_count(); ++leaf)
            names.insert(tensor.leaf_name(leaf));
    return names;
}

void check_leaves(FieldReader& in, const std::vector<GroupDesc>& groups) {
    uint64_t count = 0;
    std::vector<std::set<std::string>> names;  // of each group, made once: a peer may send many
    for (size_t i = 0; i < groups.size(); ++i) {
        names.push_back(leaf_names(groups[i]));
        count += names[i].size() * groups[i].layers.size();
        for (size_t k = 0; k < i; ++k) {
            if (groups[k].kind != groups[i].kind || !share_a_layer(groups[i], groups[k])) continue;
            for (const std::string& name : names[k])
                if (names[i].count(name))
                    in.fail(ErrorCode::FIELD_INVALID, "a leaf occurs in two groups", 1, 2);
        }
    }
    check_count(in, "leaf_count", count, limits::leaf_count_max);
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
    check_group(in, group);
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
    check_leaves(in, manifest.groups);
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
