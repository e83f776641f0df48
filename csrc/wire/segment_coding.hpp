#pragma once
// Which code table codes which bytes of a segment. Made when the segment is announced; then any
// lane's thread may ask it.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "codec/calibrate.hpp"
#include "codec/code_book.hpp"
#include "codec/tiered.hpp"
#include "plan/stream_pattern.hpp"

namespace kvwire {

class SendTables;

// Tells each table what its part of the payload came to.
void note_parts(const uint8_t* payload, const std::vector<CodedPart>& parts,
                CodeEntry* const* entries);

class SegmentCoding {
public:
    static constexpr uint64_t SINK_TOKENS = 64;  // attention's first ones are unlike the others

    // Long requests' `skipped_tokens` first ones are no samples.
    SegmentCoding(std::shared_ptr<CodeBook> book, uint32_t chunk_bytes,
                  uint64_t skipped_tokens = SINK_TOKENS)
        : book_(std::move(book)), chunk_bytes_(chunk_bytes), skipped_tokens_(skipped_tokens) {}

    // In the order of the segment's items.
    void append(const std::string& model, const GroupDesc& group, const Item& item);

    // Elements to make a table of: about `wanted` of the `elements` from `offset` on, `width` bytes
    // each. add(place of the first among them, their bytes, count) takes some.
    struct Wanted {
        uint64_t offset, elements, width, wanted;
    };
    using Add = std::function<void(uint64_t first, const uint8_t* raw, size_t count)>;
    using Samples = std::function<void(const Wanted& wanted, const Add& add)>;
    // Those that `placement` holds.
    static Samples samples_of(const Placement& placement);

    // The parts of a chunk, and of each the entry that its table is from (null: opaque). Takes
    // samples where a table has yet to be made. True: every table was at hand.
    // `tables`: those of the link, in place of tables inside where it can be; null: all go inside.
    bool parts(const Samples& samples, uint64_t offset, uint64_t bytes, SendTables* tables,
               std::vector<CodedPart>* parts, std::vector<CodeEntry*>* entries) const;

    // What a chunk should come to, by a histogram of a few of its exponents and one base for all:
    // bases make it less. 0: nothing to go by.
    uint32_t predict(const Samples& samples, uint64_t offset, uint32_t bytes) const;

    // Makes the table of the only item anew, from where it is longest. Nothing: the dtype has no
    // exponent, or there is too little of it.
    std::optional<Calibration> calibrate(const Placement& placement) const;

private:
    // Where the same pattern repeats.
    struct Run {
        uint64_t offset = 0, bytes = 0;  // in the segment
        size_t tensor = 0;               // in tensors_
        uint32_t tokens = 0;             // extent of the token axis
        uint64_t skipped_bytes = 0;      // the first ones are no good samples
        bool lasts = false;              // its table, beyond this request
        std::shared_ptr<CodeEntry> entry;  // null: opaque
    };
    // What the runs of a tensor have in common, in all its layers.
    struct Tensor {
        uint16_t group = 0, tensor = 0;  // of the manifest
        DType dtype{};
        uint64_t row_bytes = 0;
        StreamPattern pattern;
    };

    size_t tensor_of(const GroupDesc& group, const Item& item);
    void append_part(const Samples& samples, const Run& run, uint64_t from, uint64_t to,
                     SendTables* tables, std::vector<CodedPart>* parts,
                     std::vector<CodeEntry*>* entries, bool* at_hand) const;
    const Run& best_sample(const Run& run) const;
    // Without a table: there is too little of it.
    Calibration calibrated(const Samples& samples, const Run& run) const;

    const std::shared_ptr<CodeBook> book_;
    const uint32_t chunk_bytes_;
    const uint64_t skipped_tokens_;
    std::vector<Tensor> tensors_;
    std::vector<Run> runs_;
    uint64_t bytes_ = 0;
};

}  // namespace kvwire
