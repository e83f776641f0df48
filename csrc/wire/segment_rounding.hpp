#pragma once
// Which bytes of a segment are rounded how (FORMAT.md section 9.3), as the sender's caller said.
// Made when the segment is announced; then any lane's thread may ask it.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "codec/quantised.hpp"
#include "plan/stream_pattern.hpp"
#include "wire/segment_coding.hpp"

namespace kvwire {

// For the elements of one tensor of the manifest. `by_channel`: groups follow the tokens, as keys
// want it, else the channels. States have neither; theirs are Rung::BF16, E4M3 and INT8_GRID.
struct Rounding {
    uint16_t group = 0, tensor = 0;
    Rung rung = Rung::EXACT;
    bool by_channel = false;
};

class SegmentRounding {
public:
    // The request's first and last tokens stay exact.
    static constexpr uint64_t FIRST_TOKENS = 4, LAST_TOKENS = 128;

    // `exact` makes what stays exact smaller, and with it tables of `book` what is rounded; null:
    // both travel as they are.
    SegmentRounding(std::vector<Rounding> roundings, std::shared_ptr<const SegmentCoding> exact,
                    std::shared_ptr<CodeBook> book, uint32_t chunk_bytes, uint64_t token_stop)
        : roundings_(std::move(roundings)), exact_(std::move(exact)),
          rounded_(std::move(book), chunk_bytes / 2), chunk_bytes_(chunk_bytes),
          token_stop_(token_stop) {}

    // In the order of the segment's items.
    void append(const std::string& model, const GroupDesc& group, const Item& item);
    bool rounds_anything() const { return rounds_anything_; }

    // The parts of a chunk, and the entries of all that is nested in them, in order; samples and
    // `tables` as in SegmentCoding.
    void parts(const Placement& placement, uint64_t offset, uint64_t bytes, SendTables* tables,
               std::vector<QuantisedPart>* parts, std::vector<CodeEntry*>* entries) const;

private:
    // Where the same pattern repeats. Its elements are [unit, outer, token, inner]: pages of a
    // tensor whose tokens are not outermost are units, anything else is one.
    struct Run {
        uint64_t offset = 0, bytes = 0;  // in the segment
        Rung rung = Rung::EXACT;
        bool by_channel = false, has_tokens = false;
        uint8_t dtype = 0;
        uint64_t width = 1;  // of an element
        uint64_t rounded_offset = 0, rounded_width = 0;  // in rounded_'s stream; width 0: not there
        uint64_t outer = 1, tokens = 1, inner = 1;
        uint64_t first_token = 0;
        std::array<uint32_t, StreamPattern::AXES> extents = {1, 1, 1, 1};
    };
    // Of one chunk.
    struct Cut {
        const Placement* placement;  // null: only parts are wanted, without what is nested in them
        SendTables* tables;
        std::vector<QuantisedPart>* parts;
        std::vector<CodeEntry*>* entries;
    };

    void cut(const Cut& out, const Run& run, uint64_t from, uint64_t to) const;
    void cut_state(const Cut& out, const Run& run, uint64_t first, uint64_t last) const;
    void cut_tokens(const Cut& out, const Run& run, uint64_t first, uint64_t last) const;
    void cut_rows(const Cut& out, const Run& run, uint64_t first, uint64_t last,
                  uint64_t token) const;
    void exact(const Cut& out, const Run& run, uint64_t first, uint64_t last) const;
    void exact_bytes(const Cut& out, uint64_t from, uint64_t to) const;
    void rounded(const Cut& out, const Run& run, uint64_t first, uint64_t units, uint64_t outer,
                 uint64_t tokens) const;
    static void nest(const Cut& out, const SegmentCoding& coding,
                     const SegmentCoding::Samples& samples, uint64_t offset, uint64_t bytes,
                     QuantisedPart* part);
    void append_rounded(const Cut& out, const Run& run, uint64_t first, QuantisedPart part) const;
    void sample(const Placement& placement, const SegmentCoding::Wanted& wanted,
                const SegmentCoding::Add& add) const;
    bool is_edge(uint64_t first_token, uint64_t tokens) const;

    const std::vector<Rounding> roundings_;
    const std::shared_ptr<const SegmentCoding> exact_;
    SegmentCoding rounded_;  // its stream: the rounded elements of all runs that have such
    const uint32_t chunk_bytes_;
    const uint64_t token_stop_;
    std::vector<Run> runs_;
    uint64_t bytes_ = 0, rounded_bytes_ = 0;
    bool rounds_anything_ = false;
};

}  // namespace kvwire
