#include "plan/geometry.hpp"

#include "base/error.hpp"

namespace kvwire {

uint32_t item_bytes(DType dtype) {
    switch (dtype) {
        case DType::FP32: case DType::INT32: return 4;
        case DType::FP16: case DType::BF16: return 2;
        case DType::E4M3: case DType::E5M2: case DType::INT8: case DType::BYTES: return 1;
        case DType::INT64: return 8;
    }
    return 0;
}

const char* axis_name(Axis axis) {
    switch (axis) {
        case Axis::TOKEN: return "token";
        case Axis::HEAD: return "head";
        case Axis::DIM: return "dim";
        case Axis::CHANNEL: return "channel";
        case Axis::COLUMN: return "column";
        case Axis::KEY: return "key";
        case Axis::VALUE: return "value";
        case Axis::ROW: return "row";
        case Axis::PLANE: return "plane";
        case Axis::ITEM: return "item";
    }
    return nullptr;
}

const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::FP32: return "fp32";
        case DType::FP16: return "fp16";
        case DType::BF16: return "bf16";
        case DType::E4M3: return "e4m3";
        case DType::E5M2: return "e5m2";
        case DType::INT8: return "int8";
        case DType::BYTES: return "bytes";
        case DType::INT32: return "int32";
        case DType::INT64: return "int64";
    }
    return nullptr;
}

const char* group_kind_name(GroupKind kind) {
    switch (kind) {
        case GroupKind::FULL_ATTENTION: return "full_attention";
        case GroupKind::LATENT: return "latent";
        case GroupKind::SLIDING_WINDOW: return "sliding_window";
        case GroupKind::RECURRENT: return "recurrent";
        case GroupKind::CONVOLUTION: return "convolution";
        case GroupKind::AUXILIARY: return "auxiliary";
        case GroupKind::REQUEST: return "request";
    }
    return nullptr;
}

bool TensorDesc::has_tokens() const {
    for (const AxisDesc& axis : axes)
        if (axis.axis == Axis::TOKEN) return true;
    return false;
}

const AxisDesc* TensorDesc::fused_axis() const {
    for (const AxisDesc& axis : axes)
        if (axis.slices.size() > 1) return &axis;
    return nullptr;
}

size_t TensorDesc::leaf_count() const {
    const AxisDesc* fused = fused_axis();
    return fused ? fused->slices.size() : 1;
}

std::string TensorDesc::leaf_name(size_t leaf) const {
    const AxisDesc* fused = fused_axis();
    return fused ? fused->slices[leaf].name : name;
}

uint64_t TensorDesc::row_bytes() const {
    uint64_t bytes = item_bytes(dtype);
    for (const AxisDesc& axis : axes) {
        if (axis.axis == Axis::TOKEN) continue;
        uint64_t extent = 0;
        for (const Slice& slice : axis.slices) extent += slice.extent();
        if (__builtin_mul_overflow(bytes, extent, &bytes))
            throw Error(ErrorCode::FIELD_INVALID, "tensor " + name + ": 2^64 bytes or more a row");
    }
    return bytes;
}

const LeafMemory::AxisStride* LeafMemory::find(Axis axis) const {
    for (const AxisStride& stride : axes)
        if (stride.axis == axis) return &stride;
    return nullptr;
}

void check_block_ids(const std::vector<int64_t>& block_ids) {
    for (size_t index = 0; index < block_ids.size(); ++index)
        if (block_ids[index] < 0)
            throw Error(ErrorCode::USAGE,
                        "block_ids[" + std::to_string(index) + "] is " +
                            std::to_string(block_ids[index]) + ": block ids start at 0");
}

std::shared_ptr<std::vector<int64_t>> make_block_table(std::vector<int64_t> block_ids) {
    check_block_ids(block_ids);
    return std::make_shared<std::vector<int64_t>>(std::move(block_ids));
}

}  // namespace kvwire
