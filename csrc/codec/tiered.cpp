#include "codec/tiered.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "codec/tiered_layout.hpp"

namespace kvwire {
namespace {

const std::vector<const TieredKernels*>& all_kernels() {
    static const std::vector<const TieredKernels*> all = {
#if defined(__x86_64__)
        &tiered_avx512(), &tiered_avx2(),
#endif
        &tiered_portable(),
    };
    return all;
}

const TieredKernels& pick(const char* variant) {
    std::string supported;
    for (const TieredKernels* kernels : all_kernels()) {
        if (!kernels->supported) continue;
        if (!variant || !*variant || std::string(variant) == kernels->name) return *kernels;
        supported += std::string(supported.empty() ? "" : ", ") + kernels->name;
    }
    throw std::invalid_argument("tiered code: no variant named '" + std::string(variant) +
                                "' on this CPU; supported: " + supported);
}

}  // namespace

const TieredKernels& tiered_kernels(const char* variant) {
    static const TieredKernels& active = pick(std::getenv("KVWIRE_TIERED"));
    return variant ? pick(variant) : active;
}

std::vector<TieredVariantInfo> tiered_variants() {
    std::vector<TieredVariantInfo> variants;
    for (const TieredKernels* kernels : all_kernels())
        variants.push_back({kernels->name, kernels->supported});
    return variants;
}

const char* tiered_active() { return tiered_kernels(nullptr).name; }

size_t tiered_bytes_max(const std::vector<CodedPart>& parts) {
    size_t bytes = 0;
    for (const CodedPart& part : parts) {
        const bool inside = part.table && part.table_index == TABLE_INSIDE;
        bytes += PART_HEADER_BYTES + (inside ? part.table->bytes().size() : 0) +
                 index_bytes(part.raw_bytes, item_bytes_of(part.table.get())) +
                 part_padded(part.raw_bytes);
    }
    return bytes;
}

}  // namespace kvwire
