// Random layouts on both sides, planned and compared with the definition; then the same with the
// sender's side changed as a hostile peer would, where nothing outside the memory may be touched.

#include "fuzz/fuzz.hpp"
#include "plan/match.hpp"

namespace kvwire {
namespace {

using namespace fuzz;

constexpr uint64_t COMPARED_BYTES_MAX = 1 << 16;

void change_tensor(TensorDesc& tensor, Random& choices) {
    AxisDesc& axis = tensor.axes[pick(choices, 0, tensor.axes.size() - 1)];
    switch (pick(choices, 0, 7)) {
        case 0: tensor.block_tokens = uint32_t(odd_number(choices)); break;
        case 1: tensor.axes.push_back(AxisDesc(axis)); break;
        case 2: std::swap(axis, tensor.axes[0]); break;
        case 3: axis.axis = Axis(pick(choices, 1, 10)); break;
        case 4: tensor.dtype = DType(pick(choices, 0, 10)); break;
        case 5: tensor.axes.pop_back(); break;
        default:
            if (axis.slices.empty()) return;
            Slice& slice = axis.slices[pick(choices, 0, axis.slices.size() - 1)];
            uint32_t* const fields[] = {&slice.full, &slice.start, &slice.stop};
            *fields[pick(choices, 0, 2)] = uint32_t(odd_number(choices));
    }
}

void change_world(World& world, Random& choices) {
    for (uint64_t changes = pick(choices, 1, 3); changes > 0; --changes)
        switch (pick(choices, 0, 7)) {
            case 0: world.item.token_start = odd_number(choices); break;
            case 1: world.item.token_stop = odd_number(choices); break;
            case 2: world.item.token_stop += pick(choices, 0, 3); break;
            case 3: world.item.layer = uint32_t(odd_number(choices)); break;
            default:
                if (!world.tensor().axes.empty())
                    change_tensor(world.group.tensors[0], choices);
        }
}

// Whether a manifest could hold it: the planner is asked about nothing else.
bool is_decodable(const TensorDesc& tensor) {
    for (const AxisDesc& axis : tensor.axes)
        for (const Slice& slice : axis.slices)
            if (slice.start >= slice.stop || slice.stop > slice.full) return false;
    return item_bytes(tensor.dtype) > 0;
}

}  // namespace
}  // namespace kvwire

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace kvwire;
    if (size < 1) return 0;
    return fuzz::run([&] {
        Random choices(ByteSpan{data, size});
        World world = random_world(choices);
        check_world(world, choices);
        change_world(world, choices);
        if (!is_decodable(world.tensor())) return;
        const ErrorCode refused = refusal([&] {
            match_leaves(world.group, world.item, world.memory);
            Placement placement;
            placement.append(world.group, world.item, world.memory);
        });
        if (refused != ErrorCode::OK) return;
        const uint64_t bytes = item_raw_bytes(world.tensor(), world.item);
        if (bytes <= COMPARED_BYTES_MAX) check_world(world, choices);
        zero_missing_columns(world.group, world.item, world.memory);
    });
}
