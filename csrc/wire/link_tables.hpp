#pragma once
// Code tables that a link has by number (FORMAT.md section 9.2), and the frames about them.

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "codec/code_table.hpp"
#include "wire/control.hpp"
#include "wire/share.hpp"

namespace kvwire {

enum class TableState : uint32_t { KNOWN = 1, WANTED = 2, REFUSED = 3 };

struct TableName {
    uint32_t index = 0;
    Id name;
};

struct TableAnswer {
    uint32_t index = 0;
    TableState state{};
};

Bytes encode(const std::vector<TableName>& names);
Bytes encode(const std::vector<TableAnswer>& answers);
std::vector<TableName> decode_table_names(ByteSpan payload);
std::vector<TableAnswer> decode_table_answer(ByteSpan payload);
uint32_t decode_table_index(ByteSpan payload);  // of a TABLE, whose table follows

Id table_name(ByteSpan table);

// The sender's. Coding threads ask for numbers; all else is called under the link's lock.
class SendTables {
public:
    // What a part says of its table: TABLE_INSIDE until the receiver is known to have it. Asks it.
    uint32_t index_of(const std::shared_ptr<const CodeTable>& table);

    // Those that were asked for and not named yet, up to what a frame holds.
    std::vector<TableName> names_to_say();
    // Payloads of the TABLE frames that the answers want. Throws FIELD_INVALID.
    std::vector<Bytes> on_answers(ByteSpan payload);
    // Names are said again, and tables sent again, where the answer may be lost.
    void lane_lost();

private:
    struct Named {
        std::shared_ptr<const CodeTable> table;
        Id name;
        bool is_answered = false, is_known = false, was_sent = false;
    };
    std::mutex mutex_;
    std::vector<Named> named_;  // index - 1
    std::unordered_map<const CodeTable*, uint32_t> index_;
    std::deque<uint32_t> unsaid_;
    uint64_t bytes_ = 0;  // of memory, of those in named_
};

// Tables by name, from all links of an endpoint. Any thread may use it.
class TableStore {
public:
    static constexpr size_t BYTES_MAX = size_t{64} << 20;

    std::shared_ptr<const CodeTable> find(const Id& name) const;
    void put(const Id& name, std::shared_ptr<const CodeTable> table);

private:
    mutable std::mutex mutex_;
    std::map<Id, std::shared_ptr<const CodeTable>> tables_;
    std::deque<Id> order_;  // oldest first
    size_t bytes_ = 0;
};

// The receiver's.
class ReceiveTables {
public:
    ReceiveTables(std::shared_ptr<TableStore> store, std::shared_ptr<Pool> pool);

    // Throw FIELD_INVALID, and RESERVED_BIT_SET.
    std::vector<TableAnswer> on_names(ByteSpan payload);
    TableAnswer on_table(ByteSpan payload);

    // Any thread; null: not known.
    std::shared_ptr<const CodeTable> find(uint32_t index) const;

private:
    struct Named {
        Id name;
        std::shared_ptr<const CodeTable> table;
        bool is_refused = false;
    };
    static constexpr uint64_t NAME_STATE_BYTES = 96;  // a Named and its place in the map
    TableAnswer on_name(const TableName& said);
    void take(Named& named, ByteSpan bytes);
    void keep(Named& named, std::shared_ptr<const CodeTable> table);
    static TableState state_of(const Named& named);

    const std::shared_ptr<TableStore> store_;
    mutable std::mutex mutex_;
    std::map<uint32_t, Named> named_;
    Share bytes_;  // of memory: a small table may be spread out
};

}  // namespace kvwire
