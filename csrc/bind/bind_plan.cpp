#include "bind/bind_plan.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "base/error.hpp"
#include "bind/buffer_view.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

using SliceTuple = std::tuple<std::string, uint32_t, uint32_t, uint32_t>;
using AxisTuple = std::tuple<uint8_t, std::vector<SliceTuple>>;
using TensorTuple = std::tuple<std::string, uint8_t, uint32_t, bool, std::vector<AxisTuple>>;
using GroupTuple =
    std::tuple<uint8_t, uint32_t, std::vector<uint32_t>, std::vector<TensorTuple>>;
using ItemTuple = std::tuple<uint16_t, uint16_t, uint32_t, uint64_t, uint64_t>;
using StrideTuple = std::tuple<uint8_t, uint32_t, uint32_t, uint32_t, int64_t>;

struct Table {
    std::shared_ptr<std::vector<int64_t>> ids;
};

TensorDesc tensor_from(const TensorTuple& tuple) {
    TensorDesc tensor;
    tensor.name = std::get<0>(tuple);
    tensor.dtype = static_cast<DType>(std::get<1>(tuple));
    tensor.block_tokens = std::get<2>(tuple);
    tensor.replicated = std::get<3>(tuple);
    for (const auto& [axis, slices] : std::get<4>(tuple)) {
        AxisDesc desc{static_cast<Axis>(axis), {}};
        for (const auto& [name, full, start, stop] : slices)
            desc.slices.push_back({name, full, start, stop});
        tensor.axes.push_back(std::move(desc));
    }
    return tensor;
}

Table make_table(const py::array_t<int64_t, py::array::c_style>& ids) {
    return {make_block_table({ids.data(), ids.data() + ids.size()})};
}

// Entries that a planned segment may read must not be written again: I/O threads read them.
void fill_table(Table& table, uint64_t first,
                const py::array_t<int64_t, py::array::c_style>& ids) {
    const uint64_t count = uint64_t(ids.size()), room = table.ids->size();
    if (first > room || count > room - first)
        throw Error(ErrorCode::USAGE,
                    "block ids [" + std::to_string(first) + ", " + std::to_string(first + count) +
                        ") do not lie in a table of " + std::to_string(room),
                    room, first + count);
    const std::vector<int64_t> checked(ids.data(), ids.data() + count);
    check_block_ids(checked);
    std::copy(checked.begin(), checked.end(), table.ids->begin() + int64_t(first));
}

void add_leaf(MemoryMap& memory, uint8_t kind, uint32_t layer, const std::string& leaf,
              uintptr_t address, uint8_t dtype, const std::vector<StrideTuple>& axes) {
    LeafMemory& held = memory[{static_cast<GroupKind>(kind), layer, leaf}];
    held = LeafMemory{};
    held.base = reinterpret_cast<uint8_t*>(address);
    held.dtype = static_cast<DType>(dtype);
    for (const auto& [axis, full, start, stop, stride] : axes)
        held.axes.push_back({static_cast<Axis>(axis), full, start, stop, stride});
}

void set_tokens(MemoryMap& memory, uint8_t kind, uint32_t layer, const std::string& leaf,
                uint64_t origin, uint64_t count, uint64_t start, int64_t stride,
                uint32_t block_tokens, int64_t block_stride, const Table* table, uint32_t ring,
                uint32_t window) {
    LeafMemory& held = memory.at({static_cast<GroupKind>(kind), layer, leaf});
    held.has_tokens = true;
    held.token_origin = origin;
    held.token_count = count;
    held.token_start = start;
    held.token_stride = stride;
    held.block_tokens = block_tokens;
    held.block_stride = block_stride;
    if (table) held.block_ids = table->ids;
    held.ring_tokens = ring;
    held.window_tokens = window;
}

const GroupDesc& group_of(const std::vector<GroupDesc>& groups, const Item& item) {
    if (item.group >= groups.size())
        throw Error(ErrorCode::SEGMENT_INVALID, "the item names a group that the spec lacks",
                    groups.size(), item.group);
    return groups[item.group];
}

std::shared_ptr<Placement> place(const py::handle& groups, const py::handle& items,
                                 const MemoryMap& memory) {
    const std::vector<GroupDesc> descs = groups_from_python(groups);
    auto placement = std::make_shared<Placement>();
    for (const Item& item : items_from_python(items))
        placement->append(group_of(descs, item), item, memory);
    return placement;
}

void zero_columns(const py::handle& groups, const py::handle& items, const MemoryMap& memory) {
    const std::vector<GroupDesc> descs = groups_from_python(groups);
    for (const Item& item : items_from_python(items))
        zero_missing_columns(group_of(descs, item), item, memory);
}

std::vector<std::tuple<uintptr_t, uint64_t>> extents(const Placement& placement, uint64_t offset,
                                                     uint64_t bytes, size_t iov_max) {
    std::vector<std::tuple<uintptr_t, uint64_t>> found;
    std::vector<iovec> iov(iov_max);
    while (bytes > 0) {
        uint64_t covered = 0;
        const size_t count = placement.iovecs(offset, bytes, iov.data(), iov_max, &covered);
        if (covered == 0) throw Error(ErrorCode::USAGE, "iov_max must be at least 1", 1, iov_max);
        for (size_t i = 0; i < count; ++i)
            found.emplace_back(reinterpret_cast<uintptr_t>(iov[i].iov_base), iov[i].iov_len);
        offset += covered;
        bytes -= covered;
    }
    return found;
}

py::bytes gather(const Placement& placement, uint64_t offset, uint64_t bytes) {
    std::string out(bytes, '\0');
    {
        const py::gil_scoped_release release;
        placement.gather(offset, bytes, reinterpret_cast<uint8_t*>(out.data()));
    }
    return py::bytes(out);
}

// (counts, table steps, block ids or None, legs) of each piece; a leg is (address, strides, block
// stride, table start, run bytes).
py::list pieces(const Placement& placement) {
    py::list found;
    std::map<const void*, py::object> tables;
    for (const Piece& piece : placement.pieces()) {
        py::object table = py::none();
        if (piece.block_ids) {
            py::object& kept = tables[piece.block_ids.get()];
            if (!kept)
                kept = py::array_t<int64_t>(py::ssize_t(piece.block_ids->size()),
                                            piece.block_ids->data());
            table = kept;
        }
        py::list legs;
        for (const Piece::Leg& leg : piece.legs) {
            const std::vector<int64_t> strides(leg.stride, leg.stride + piece.level_count);
            legs.append(py::make_tuple(reinterpret_cast<uintptr_t>(leg.base), strides,
                                       leg.block_stride, leg.table_start, leg.run_bytes));
        }
        const std::vector<uint64_t> counts(piece.count, piece.count + piece.level_count);
        const std::vector<uint64_t> steps(piece.table_step, piece.table_step + piece.level_count);
        found.append(py::make_tuple(counts, steps, table, legs));
    }
    return found;
}

uint32_t gather_into(const Placement& placement, uint64_t offset, const py::object& out) {
    const BufferView view(out, BufferView::Access::WRITE);
    const py::gil_scoped_release release;
    return placement.gather_crc32c(offset, view.size(), static_cast<uint8_t*>(view.data()));
}

void scatter(const Placement& placement, uint64_t offset, const py::object& data) {
    const BufferView view(data);
    const py::gil_scoped_release release;
    placement.scatter(offset, view.size(), static_cast<const uint8_t*>(view.data()));
}

}  // namespace

std::vector<GroupDesc> groups_from_python(const py::handle& groups) {
    std::vector<GroupDesc> descs;
    for (auto& [kind, window_tokens, layers, tensors] : py::cast<std::vector<GroupTuple>>(groups)) {
        GroupDesc group{static_cast<GroupKind>(kind), window_tokens, layers, {}};
        for (const TensorTuple& tensor : tensors) group.tensors.push_back(tensor_from(tensor));
        descs.push_back(std::move(group));
    }
    return descs;
}

std::vector<Item> items_from_python(const py::handle& items) {
    std::vector<Item> found;
    for (const auto& [group, tensor, layer, start, stop] : py::cast<std::vector<ItemTuple>>(items))
        found.push_back({group, tensor, layer, start, stop});
    return found;
}

void register_plan(py::module_& module) {
    py::class_<Table>(module, "BlockTable", "Block ids, copied once, shared by many leaves.")
        .def(py::init(&make_table), py::arg("block_ids"))
        .def("fill", &fill_table, py::arg("first"), py::arg("block_ids"));

    py::class_<MemoryMap, std::shared_ptr<MemoryMap>>(
        module, "MemoryMap", "Where each leaf lies. Borrows the memory: keep the arrays alive.")
        .def(py::init<>())
        .def("add_leaf", &add_leaf, py::arg("kind"), py::arg("layer"), py::arg("leaf"),
             py::arg("address"), py::arg("dtype"), py::arg("axes"))
        .def("set_tokens", &set_tokens, py::arg("kind"), py::arg("layer"), py::arg("leaf"),
             py::kw_only(), py::arg("origin"), py::arg("count"), py::arg("start"),
             py::arg("stride"), py::arg("block_tokens") = 0, py::arg("block_stride") = 0,
             py::arg("table") = nullptr, py::arg("ring_tokens") = 0,
             py::arg("window_tokens") = 0)
        .def("__len__", [](const MemoryMap& memory) { return memory.size(); });

    py::class_<Placement, std::shared_ptr<Placement>>(
        module, "Placement", py::dynamic_attr(), "Where every byte of a segment lies.")
        .def_property_readonly("bytes", &Placement::bytes)
        .def_property_readonly("mean_run_bytes", &Placement::mean_run_bytes)
        .def_property_readonly("has_skips", &Placement::has_skips)
        .def_property_readonly("piece_count", &Placement::piece_count)
        .def("extents", &extents, py::arg("offset"), py::arg("bytes"), py::arg("iov_max") = 1024,
             "(address, bytes) of each run; address 0 where bytes have no place.")
        .def("pieces", &pieces,
             "(counts, table steps, block ids or None, legs) of each piece in wire order; a leg is "
             "(address, strides, block stride, table start, run bytes), address 0: skipped.")
        .def("gather", &gather, py::arg("offset"), py::arg("bytes"))
        .def("gather_into", &gather_into, py::arg("offset"), py::arg("out"),
             "Fill a buffer, and return the CRC32C of what it then holds.")
        .def("scatter", &scatter, py::arg("offset"), py::arg("data"))
        .def("crc32c", &Placement::crc32c, py::arg("offset"), py::arg("bytes"),
             py::arg("crc") = 0, py::call_guard<py::gil_scoped_release>());

    module.def("place", &place, py::arg("groups"), py::arg("items"), py::arg("memory"));
    module.def("zero_missing_columns", &zero_columns, py::arg("groups"), py::arg("items"),
               py::arg("memory"));
}

}  // namespace kvwire
