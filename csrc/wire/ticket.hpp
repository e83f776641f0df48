#pragma once
// A ticket: the destination of one hand-off, and the book of which of its bytes are claimed,
// verified and ready. Pure logic; one thread at a time.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "plan/placement.hpp"
#include "wire/landing_zone.hpp"
#include "wire/manifest.hpp"

namespace kvwire {

// Disjoint half-open ranges, merged when they touch.
class RangeSet {
public:
    void insert(uint64_t start, uint64_t stop);
    bool intersects(uint64_t start, uint64_t stop) const;
    bool contains(uint64_t start, uint64_t stop) const;
    uint64_t total() const;

private:
    std::map<uint64_t, uint64_t> stop_by_start_;
};

// What the owner of a ticket hears, on the thread that drives the protocol.
class TicketObserver {
public:
    virtual ~TicketObserver() = default;
    virtual void on_bytes(uint64_t verified_bytes, uint64_t wire_bytes, bool repaired) = 0;
    virtual void on_layer_touched(uint32_t layer) = 0;  // bytes may be written from now on
    virtual void on_layer_ready(uint32_t layer) = 0;
    virtual void on_metadata(uint16_t source_rank, const Bytes& manifest, uint16_t manifest_count,
                             const Bytes& end, uint16_t end_count) = 0;
    virtual void on_end(const Error& error) = 0;  // exactly once; OK: delivered
};

struct TokenRange {
    uint64_t start = 0, stop = 0;
};

class Ticket {
public:
    struct Options {
        Id id;
        std::string model;
        uint64_t token_start = 0, token_stop = 0;
        std::set<uint16_t> source_ranks{0};
        uint16_t source_rank_count = 1;
        uint16_t destination_rank = 0, destination_rank_count = 1;
        uint32_t codecs = ~0u;
        std::shared_ptr<LandingZone> zone;  // set: the memory is a device's
    };

    // All that `memory` covers must arrive.
    Ticket(Options options, std::shared_ptr<const MemoryMap> memory, TicketObserver& observer);

    const Options& options() const { return options_; }
    const MemoryMap& memory() const { return *memory_; }
    std::set<uint32_t> layers_without_needs() const;  // ready from the start
    TicketObserver& observer() { return observer_; }
    bool ended() const { return ended_; }

    // A transfer wants to fill part of this ticket. Throws Error with the reason to refuse it.
    // `abort` is called should the ticket fail through somebody else.
    void join(const Id& transfer, const Manifest& manifest,
              std::function<void(const Error&)> abort);

    // Claims the destination of an item before any of its bytes may be written, and appends it to
    // `placement`. Replicas of bytes that are claimed already are placed nowhere. Returns a bit for
    // each leaf that nobody had claimed.
    uint32_t claim(const Manifest& manifest, const Item& item, Placement& placement);

    // All bytes of the item are in place and verified; it speaks for the leaves that it claimed
    // first, since only their bytes are sure to be its own.
    void verified(const Manifest& manifest, const Item& item, uint32_t claimed);

    // The transfer of this rank is complete; throws INCOMPLETE when it was the last one and parts
    // are missing.
    void transfer_done(const Id& transfer, const Manifest& manifest);

    // Ends the ticket: all its transfers are aborted, nothing will be written any more.
    void fail(const Error& error);

private:
    // Ranges of one leaf that share the same slice on every other axis.
    struct Claim {
        std::map<Axis, std::pair<uint32_t, uint32_t>> slices;
        uint64_t token_bytes = 0;  // bytes of one token (or of all) in the destination
        bool replicated = true;
        RangeSet claimed, done;
    };
    struct Leaf {
        uint64_t needed_bytes = 0;
        TokenRange needed;
        std::vector<Claim> claims;
        bool ready = false;
        uint64_t done_bytes() const;
    };
    enum class Found { NEW, REPLICA };

    Found claim_leaf(const LeafKey& key, Claim shape, TokenRange tokens);
    Claim shape_of(const TensorDesc& tensor, size_t leaf, const LeafMemory& memory) const;
    TokenRange range_of(const TensorDesc& tensor, const Item& item) const;
    void leaf_progress(const LeafKey& key, Leaf& leaf);
    void end(const Error& error);

    Options options_;
    std::shared_ptr<const MemoryMap> memory_;
    std::map<LeafKey, Leaf> leaves_;
    std::map<uint32_t, uint32_t> leaves_open_by_layer_;
    std::map<uint16_t, Id> transfer_by_rank_;
    std::set<uint16_t> ranks_done_;
    std::map<Id, std::function<void(const Error&)>> aborts_;
    TicketObserver& observer_;
    bool ended_ = false;
};

}  // namespace kvwire
