#include "wire/link_tables.hpp"

#include <algorithm>
#include <cstring>

#include "base/sha256.hpp"
#include "codec/tiered.hpp"
#include "wire/reader.hpp"

namespace kvwire {
namespace {

// A larger one would not fit the smallest control payload that a peer may be limited to.
constexpr size_t NAMED_BYTES_MAX = limits::control_bytes_min - TABLE_FIXED_BYTES;

uint32_t read_index(FieldReader& in) {
    const uint32_t index = in.number<uint32_t>();
    if (index < 1 || index > limits::table_count_max)
        in.fail(ErrorCode::FIELD_INVALID, "table_index is no number of a table",
                limits::table_count_max, index);
    return index;
}

}  // namespace

Bytes encode(const std::vector<TableName>& names) {
    FieldWriter out;
    for (const TableName& name : names) out.number(name.index).zeros(4).id(name.name);
    return out.take();
}

Bytes encode(const std::vector<TableAnswer>& answers) {
    FieldWriter out;
    for (const TableAnswer& answer : answers)
        out.number(answer.index).number(uint32_t(answer.state));
    return out.take();
}

std::vector<TableName> decode_table_names(ByteSpan payload) {
    FieldReader in(payload, "TABLE_NAMES");
    std::vector<TableName> names(payload.size / TABLE_NAME_BYTES);
    for (TableName& name : names) {
        name.index = read_index(in);
        in.zeros(4);
        name.name = in.id();
    }
    return names;
}

std::vector<TableAnswer> decode_table_answer(ByteSpan payload) {
    FieldReader in(payload, "TABLE_ANSWER");
    std::vector<TableAnswer> answers(payload.size / TABLE_ANSWER_BYTES);
    for (TableAnswer& answer : answers) {
        answer.index = read_index(in);
        const uint32_t state = in.number<uint32_t>();
        if (state < uint32_t(TableState::KNOWN) || state > uint32_t(TableState::REFUSED))
            in.fail(ErrorCode::FIELD_INVALID, "state is no state of a table", 0, state);
        answer.state = TableState(state);
    }
    return answers;
}

uint32_t decode_table_index(ByteSpan payload) {
    FieldReader in(payload, "TABLE");
    const uint32_t index = read_index(in);
    in.zeros(4);
    return index;
}

Id table_name(ByteSpan table) {
    Sha256 hash;
    hash.update(table);
    const Digest digest = hash.finish();
    Id name;
    std::copy_n(digest.begin(), name.bytes.size(), name.bytes.begin());
    return name;
}

uint32_t SendTables::index_of(const std::shared_ptr<const CodeTable>& table) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = index_.find(table.get());
    if (found != index_.end()) return named_[found->second - 1].is_known ? found->second : 0;
    const Bytes& bytes = table->bytes();
    if (named_.size() >= limits::table_count_max || bytes.size() > NAMED_BYTES_MAX ||
        bytes_ + table->memory_bytes() > limits::table_bytes_max)
        return TABLE_INSIDE;
    bytes_ += table->memory_bytes();
    named_.push_back({table, table_name({bytes.data(), bytes.size()}), false, false, false});
    index_[table.get()] = uint32_t(named_.size());
    unsaid_.push_back(uint32_t(named_.size()));
    return TABLE_INSIDE;
}

std::vector<TableName> SendTables::names_to_say() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<TableName> names;
    while (!unsaid_.empty() && names.size() < limits::table_entry_count_max) {
        names.push_back({unsaid_.front(), named_[unsaid_.front() - 1].name});
        unsaid_.pop_front();
    }
    return names;
}

std::vector<Bytes> SendTables::on_answers(ByteSpan payload) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Bytes> wanted;
    for (const TableAnswer& answer : decode_table_answer(payload)) {
        if (answer.index > named_.size())
            throw Error(ErrorCode::FIELD_INVALID, "TABLE_ANSWER: no such table", named_.size(),
                        answer.index);
        Named& named = named_[answer.index - 1];
        if (named.is_answered) continue;
        named.is_answered = answer.state != TableState::WANTED;
        named.is_known = answer.state == TableState::KNOWN;
        if (named.is_answered || named.was_sent) continue;
        named.was_sent = true;
        const Bytes& bytes = named.table->bytes();
        wanted.push_back(FieldWriter().number(answer.index).zeros(4)
                             .data(bytes.data(), bytes.size()).take());
    }
    return wanted;
}

void SendTables::lane_lost() {
    const std::lock_guard<std::mutex> lock(mutex_);
    unsaid_.clear();
    for (uint32_t index = 1; index <= named_.size(); ++index) {
        Named& named = named_[index - 1];
        if (named.is_answered) continue;
        named.was_sent = false;
        unsaid_.push_back(index);
    }
}

std::shared_ptr<const CodeTable> TableStore::find(const Id& name) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = tables_.find(name);
    return found == tables_.end() ? nullptr : found->second;
}

void TableStore::put(const Id& name, std::shared_ptr<const CodeTable> table) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = table->memory_bytes();
    if (!tables_.emplace(name, std::move(table)).second) return;
    order_.push_back(name);
    bytes_ += bytes;
    while (bytes_ > BYTES_MAX) {
        const auto oldest = tables_.find(order_.front());
        bytes_ -= oldest->second->memory_bytes();
        tables_.erase(oldest);
        order_.pop_front();
    }
}

ReceiveTables::ReceiveTables(std::shared_ptr<TableStore> store, std::shared_ptr<Pool> pool)
    : store_(store ? std::move(store) : std::make_shared<TableStore>()), bytes_(std::move(pool)) {}

std::vector<TableAnswer> ReceiveTables::on_names(ByteSpan payload) {
    std::vector<TableAnswer> answers;
    for (const TableName& said : decode_table_names(payload)) answers.push_back(on_name(said));
    return answers;
}

TableAnswer ReceiveTables::on_name(const TableName& said) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = named_.find(said.index);
    if (found == named_.end()) {
        if (!bytes_.has_room(NAME_STATE_BYTES, limits::table_bytes_max))
            return {said.index, TableState::REFUSED};
        bytes_ += NAME_STATE_BYTES;
        found = named_.emplace(said.index, Named{said.name, nullptr}).first;
    }
    Named& named = found->second;
    if (named.name != said.name)
        throw Error(ErrorCode::FIELD_INVALID, "TABLE_NAMES: the number has another name", 0,
                    said.index);
    if (state_of(named) == TableState::WANTED)
        if (auto table = store_->find(said.name)) keep(named, std::move(table));
    return {said.index, state_of(named)};
}

TableAnswer ReceiveTables::on_table(ByteSpan payload) {
    const uint32_t index = decode_table_index(payload);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = named_.find(index);
    if (found == named_.end())
        throw Error(ErrorCode::FIELD_INVALID, "TABLE: the table was not named", 0, index);
    Named& named = found->second;
    if (state_of(named) == TableState::WANTED)
        take(named, {payload.data + TABLE_FIXED_BYTES, payload.size - TABLE_FIXED_BYTES});
    return {index, state_of(named)};
}

// Once for each number: a peer cannot make us work on the same one again.
void ReceiveTables::take(Named& named, ByteSpan bytes) {
    named.is_refused = true;
    if (bytes.size > CodeTable::BYTES_MAX || table_name(bytes) != named.name) return;
    size_t taken = 0;
    auto table = CodeTable::parse(bytes.data, bytes.size, &taken);
    if (!table || taken != bytes.size) return;
    keep(named, table);
    if (named.table) store_->put(named.name, std::move(table));
}

void ReceiveTables::keep(Named& named, std::shared_ptr<const CodeTable> table) {
    named.is_refused = !bytes_.has_room(table->memory_bytes(), limits::table_bytes_max);
    if (named.is_refused) return;
    bytes_ += table->memory_bytes();
    named.table = std::move(table);
}

TableState ReceiveTables::state_of(const Named& named) {
    if (named.table) return TableState::KNOWN;
    return named.is_refused ? TableState::REFUSED : TableState::WANTED;
}

std::shared_ptr<const CodeTable> ReceiveTables::find(uint32_t index) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = named_.find(index);
    return found == named_.end() ? nullptr : found->second.table;
}

}  // namespace kvwire
