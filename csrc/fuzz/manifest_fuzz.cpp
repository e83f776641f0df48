// A manifest against a fixed ticket: refused by its code, or the same when written again; and what
// it announces is planned over the ticket's memory, or refused.

#include "fuzz/fuzz.hpp"
#include "tests/memory_world.hpp"
#include "wire/ticket.hpp"

namespace kvwire {
namespace {

using namespace fuzz;

constexpr size_t ITEMS_MAX = 64;

struct Silence : TicketObserver {
    void on_bytes(uint64_t, uint64_t, bool) override {}
    void on_layer_touched(uint32_t) override {}
    void on_layer_ready(uint32_t) override {}
    void on_metadata(uint16_t, const Bytes&, uint16_t, const Bytes&, uint16_t) override {}
    void on_end(const Error&) override {}
};

const std::vector<Bytes>& known() {
    static const std::vector<Bytes> manifests = {
        encode(hybrid(0, 100)),          encode(hybrid(0, 100, 0, 1, 16)),
        encode(hybrid(0, 100, 1, 2)),    encode(hybrid(0, 100, 0, 2, 4)),
        encode(hybrid(0, 100, 3, 4, 7)), encode(hybrid(20, 100, 0, 1, 32)),
    };
    return manifests;
}

const std::shared_ptr<const MemoryMap>& local_memory(bool paged) {
    static Random random(1);
    static const Memory flat(hybrid(0, 100), random), pages(hybrid(0, 100), random, true);
    static const std::shared_ptr<const MemoryMap> maps[] = {flat.map, pages.map};
    return maps[paged];
}

void place(const Manifest& manifest, bool paged) {
    Silence observer;
    Ticket::Options options;
    options.id = TICKET;
    options.token_start = manifest.token_start;
    options.token_stop = manifest.token_stop;
    options.source_rank_count = manifest.source_rank_count;
    options.source_ranks = {manifest.source_rank};
    options.destination_rank = manifest.destination_rank;
    options.destination_rank_count = manifest.destination_rank_count;
    Ticket ticket(options, local_memory(paged), observer);
    ticket.join(TRANSFER, manifest, [](const Error&) {});
    size_t count = 0;
    for (const Item& item : all_items(manifest)) {
        if (++count > ITEMS_MAX) break;
        Placement placement;
        const uint32_t claimed = ticket.claim(manifest, item, placement);
        const TensorDesc& tensor = manifest.groups[item.group].tensors[item.tensor];
        const uint64_t bytes = item_raw_bytes(tensor, item);
        CHECK_EQ(placement.bytes(), bytes);
        placement.crc32c(0, bytes);
        ticket.verified(manifest, item, claimed);
    }
}

}  // namespace
}  // namespace kvwire

// The first byte: a known manifest that is changed, or the bytes that follow as they are.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace kvwire;
    if (size < 1) return 0;
    Random choices(ByteSpan{data + 1, size - 1});
    Bytes payload(data + 1, data + size);
    const size_t which = (data[0] >> 1) % (known().size() + 1);
    if (which < known().size()) {
        payload = known()[which];
        change(payload, choices);
    }
    return fuzz::run([&] {
        Manifest manifest;
        const ByteSpan span{payload.data(), payload.size()};
        if (refusal([&] { manifest = decode_manifest(span); }) != ErrorCode::OK) return;
        CHECK(encode(manifest) == payload);
        refusal([&] { place(manifest, data[0] & 1); });
    });
}
