#include "codec/quantised.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "base/bytes.hpp"
#include "base/cpu.hpp"
#include "codec/quantised_layout.hpp"

namespace kvwire {

using namespace quantised;

uint64_t QuantisedPart::raw_bytes() const { return lattice.count() * item_bytes(dtype); }

bool QuantisedPart::valid() const {
    if (rung > Rung::INT4) return false;
    if (lattice.count() == 0 || lattice.count() > Lattice::COUNT_MAX) return false;
    if (lattice.row_axes > 15 || lattice.column_axes > 15) return false;
    if (lattice.row_axes && !is_scaled(rung) && !is_grouped(rung)) return false;
    if (lattice.column_axes && !is_scaled(rung)) return false;
    if (rung == Rung::EXACT) return dtype == BYTES;
    if (rung == Rung::BF16) return dtype == FP32;
    return dtype == FP32 || dtype == FP16 || dtype == quantised::BF16;
}

std::optional<uint8_t> rounded_dtype(Rung rung) {
    if (rung == Rung::BF16) return quantised::BF16;
    if (rung == Rung::E4M3) return quantised::E4M3;
    return std::nullopt;
}

size_t nested_offset(const QuantisedPart& part) {
    return HEADER_BYTES + padded(2 * scale_count(part));
}

std::vector<TieredVariantInfo> quantised_variants() {
    std::vector<TieredVariantInfo> infos;
    for (const Variant& variant : variants()) infos.push_back({variant.name, variant.supported});
    return infos;
}

namespace quantised {

void store_header(const QuantisedPart& part, size_t coded_bytes, uint8_t* out) {
    store_le<uint32_t>(out, uint32_t(part.raw_bytes()));
    store_le<uint32_t>(out + 4, uint32_t(coded_bytes));
    out[8] = uint8_t(part.rung);
    out[9] = part.dtype;
    out[10] = part.lattice.row_axes;
    out[11] = part.lattice.column_axes;
    store_le<uint32_t>(out + 12, 0);
    for (size_t axis = 0; axis < Lattice::AXES; ++axis)
        store_le<uint32_t>(out + 16 + 4 * axis, part.lattice.extents[axis]);
}

const std::vector<Variant>& variants() {
    [[maybe_unused]] const CpuFeatures& cpu = cpu_features();
    static const std::vector<Variant> variants = {
#if defined(__x86_64__)
        {"avx2", cpu.avx2, kernels_avx2},
#endif
        {"portable", true, kernels_portable},
    };
    return variants;
}

namespace {

const Variant& find(const char* name) {
    std::string supported;
    for (const Variant& variant : variants()) {
        if (!variant.supported) continue;
        if (!name || !*name || std::string(name) == variant.name) return variant;
        supported += std::string(supported.empty() ? "" : ", ") + variant.name;
    }
    throw std::invalid_argument("quantised variant " + std::string(name) +
                                ": not on this CPU; supported: " + supported);
}

const Variant& active() {
    static const Variant& active = find(std::getenv("KVWIRE_QUANTISED"));
    return active;
}

}  // namespace

const Kernels& kernels(const char* variant) {
    return (variant ? find(variant) : active()).kernels();
}

}  // namespace quantised

const char* quantised_active() { return quantised::active().name; }

}  // namespace kvwire
