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
    // Without the token axis, wherever it lies: pages of either order have the same tables.
    std::array<uint32_t, BasePattern::AXES> extents = {1, 1, 1, 1};

    bool operator<(const CodeKey& other) const {
        return std::tie(model, group_kind, tensor, layer, dtype, extents) <
               std::tie(other.model, other.group_kind, other.tensor, other.layer, other.dtype,
                        other.extents);
    }
};

// The table of one key, for every place and extent of the token axis. Any thread may use it.
class CodeEntry {
public:
    // `book_bytes`: of memory, what all entries of the book hold.
    explicit CodeEntry(std::shared_ptr<std::atomic<uint64_t>> book_bytes);
    CodeEntry(const CodeEntry&) = delete;
    ~CodeEntry() { hold(0); }

    using Table = std::shared_ptr<const CodeTable>;

    // Where tokens lie in a pattern; -1: not in it.
    struct TokenAxis {
        int axis = -1;
        uint32_t extent = 1;
        bool operator<(const TokenAxis& other) const {
            return std::tie(axis, extent) < std::tie(other.axis, other.extent);
        }
    };

    // Null: there is none. Where there is none yet, or it has become worse than it was, `make` is
    // asked for another first, with the token axis as here, and who comes meanwhile waits; null: it
    // cannot tell.
    Table table(TokenAxis tokens, const std::function<Table()>& make);

    // Without a token axis.
    void put(Table table);

    // `coded_bits` per element is what a part of a chunk came to with the table.
    void coded(double coded_bits, uint64_t elements);

    // As it was put; null: none.
    Table canonical() const;

private:
    Table with_tokens(TokenAxis tokens);
    bool wants_calibration() const;
    void hold(uint64_t bytes);

    const std::shared_ptr<std::atomic<uint64_t>> book_bytes_;
    std::mutex calibration_;
    mutable std::mutex mutex_;  // of what follows
    Table table_;
    std::map<TokenAxis, Table> of_tokens_;
    bool has_drifted_ = false;
    double usual_bits_ = 0;   // of the first data that the table coded; 0: none yet
    double drifted_bits_ = 0; // what made it be made again
    uint64_t elements_ = 0;   // coded since it was made
    uint64_t patience_;       // elements before it may be made again
    uint64_t bytes_ = 0;      // that it holds
};

// The same table where its pattern has one more axis, which counts in no base and for which the
// outermost one, of extent 1, makes room; and one less. null: there is no room, or the axis counts.
std::shared_ptr<const CodeTable> with_axis(const CodeTable& table, int axis, uint32_t extent);
std::shared_ptr<const CodeTable> without_axis(const CodeTable& table, int axis);
std::array<uint32_t, BasePattern::AXES> without_axis(
    std::array<uint32_t, BasePattern::AXES> extents, int axis);

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

    // False: the table does not suit the key. An extent of 0 in the key, as books once had it, is a
    // token axis, which has any extent in the table.
    [[nodiscard]] bool put(CodeKey key, std::shared_ptr<const CodeTable> table);

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
