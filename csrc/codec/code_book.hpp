// Code tables by what they are for: made from the first data of a tensor, kept for later chunks,
// transfers and links, and made again when the data has drifted away from them.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "codec/code_table.hpp"

namespace kvwire {

struct CodeKey {
    std::string model;
    uint8_t group_kind = 0;
    std::string tensor;
    uint32_t layer = 0;
    uint8_t dtype = 0;
    std::array<uint32_t, BasePattern::AXES> extents = {1, 1, 1, 1};  // 0: of the token axis

    bool operator<(const CodeKey& other) const {
        return std::tie(model, group_kind, tensor, layer, dtype, extents) <
               std::tie(other.model, other.group_kind, other.tensor, other.layer, other.dtype,
                        other.extents);
    }
};

// The table of one key, for every extent of its token axis. Any thread may use it.
class CodeEntry {
public:
    // `book_bytes`: of memory, what all entries of the book hold.
    CodeEntry(const CodeKey& key, std::shared_ptr<std::atomic<uint64_t>> book_bytes);
    CodeEntry(const CodeEntry&) = delete;
    ~CodeEntry() { hold(0); }

    using Table = std::shared_ptr<const CodeTable>;

    // For `tokens` as extent of the token axis (without effect where there is none); null: there
    // is none. Where there is none yet, or it has become worse than it was, `make` is asked for
    // another first, and who comes meanwhile waits; null: it cannot tell.
    Table table(uint32_t tokens, const std::function<Table()>& make);

    // With any extent of the token axis, which must not count in any base.
    void put(Table table);

    // `coded_bits` per element is what a part of a chunk came to with the table.
    void coded(double coded_bits, uint64_t elements);

    // As it was put; null: none.
    Table canonical() const;

private:
    Table with_tokens(uint32_t tokens);
    bool wants_calibration() const;
    void hold(uint64_t bytes);

    const std::shared_ptr<std::atomic<uint64_t>> book_bytes_;
    const int token_axis_;  // -1: none
    std::mutex calibration_;
    mutable std::mutex mutex_;  // of what follows
    Table table_;
    std::map<uint32_t, Table> of_tokens_;
    bool has_drifted_ = false;
    double usual_bits_ = 0;   // of the first data that the table coded; 0: none yet
    double drifted_bits_ = 0; // what made it be made again
    uint64_t elements_ = 0;   // coded since it was made
    uint64_t patience_;       // elements before it may be made again
    uint64_t bytes_ = 0;      // that it holds
};

// The same table where its pattern has another extent on an axis that counts in no base.
std::shared_ptr<const CodeTable> with_extent(const CodeTable& table, int axis, uint32_t extent);

// What the elements from `position` on need of the table, `count` of them before the pattern ends:
// rows and columns of the outermost axis that they touch. `position` becomes that in the new table.
// null: its bases do not all belong to places of that axis.
std::shared_ptr<const CodeTable> outer_range(const CodeTable& table, uint32_t count,
                                             uint32_t* position);

class CodeBook {
public:
    // Those that were not asked for the longest make room for others.
    static constexpr size_t ENTRIES_MAX = 65'536;
    static constexpr uint64_t BYTES_MAX = uint64_t{256} << 20;

    std::shared_ptr<CodeEntry> entry(const CodeKey& key);

    // False: the table does not suit the key.
    [[nodiscard]] bool put(const CodeKey& key, std::shared_ptr<const CodeTable> table);

    using Tables = std::vector<std::pair<CodeKey, std::shared_ptr<const CodeTable>>>;
    Tables tables() const;  // those that there are

private:
    struct Kept {
        std::shared_ptr<CodeEntry> entry;
        std::list<const CodeKey*>::iterator asked;
    };
    bool is_full() const {
        return !asked_.empty() && (entries_.size() >= ENTRIES_MAX || *bytes_ > BYTES_MAX);
    }
    mutable std::mutex mutex_;
    std::map<CodeKey, Kept> entries_;
    std::list<const CodeKey*> asked_;  // keys of entries_, the last one asked for last
    const std::shared_ptr<std::atomic<uint64_t>> bytes_ =
        std::make_shared<std::atomic<uint64_t>>(0);
};

}  // namespace kvwire
