// Every frame in every state of both machines: what FORMAT.md's table of late and repeated frames
// says happens; then frames that are valid but wrong, of which nothing may come but a typed error.

#include <functional>
#include <set>

#include "tests/link_world.hpp"
#include "wire/reader.hpp"

namespace kvwire {
namespace {

using namespace test;
using Type = FrameType;

constexpr Type SKIPPABLE = Type(0x80);
const std::vector<Type> TYPES = {
    Type::MANIFEST, Type::GRANT, Type::SEGMENT, Type::CHUNK, Type::SEGMENT_END,
    Type::END, Type::RECEIPT, Type::REPAIR, Type::ABORT, Type::PULL,
    Type::DONE, Type::INDEX, Type::COMMIT, Type::CLOSE, SKIPPABLE,
    Type::TABLE_NAMES, Type::TABLE_ANSWER, Type::TABLE,
};
const Error CANCELLED(ErrorCode::CANCELLED, "cancelled");

// One segment of two chunks.
Manifest small() {
    Manifest manifest = hybrid(0, 100);
    manifest.groups.resize(1);
    manifest.groups[0].layers = {0};
    manifest.groups[0].tensors.resize(1);
    return manifest;
}

struct Truth {
    Random random{7};
    Memory memory{small(), random};
};

const CodeTable& table() {
    static const auto made = CodeTable::make(uint8_t(DType::BF16), {2}, {0, 1, 2}, {}, {120});
    return *made;
}

ByteSpan span(const Bytes& bytes) { return {bytes.data(), bytes.size()}; }

// One honest frame of each type; of CHUNK the first, and the second under `last_chunk`.
struct Frames {
    std::map<Type, Frame> by_type;
    Frame last_chunk;
};

Frames capture() {
    Frames frames;
    Truth truth;
    Source source(TRANSFER, small(), *truth.memory.map, truth.random);
    ReceiverEnd receiver;
    SenderEnd sender;
    sender.open_lane(0);
    receiver.open_lane(0);
    receiver.bind(small(), truth.random);
    sender.link.open(source.transfer);
    source.push(sender.link, all_items(small()));
    SendLink::finish(*source.transfer, {}, 0);
    const auto keep = [&](const Bytes& stream) {
        for (const Frame& each : frames_of(stream)) {
            if (each.type() == Type::CHUNK) frames.last_chunk = each;
            frames.by_type.emplace(each.type(), each);
        }
        return stream;
    };
    while (!source.ended) {
        receiver.feed(0, keep(sender.take(0)));
        sender.feed(0, keep(receiver.take(0)));
    }
    CHECK(receiver.complete());
    const RepairEntry repair{0, 0, 0, ErrorCode::PAYLOAD_CORRUPT, 1, 2};
    const auto add = [&](Type type, Bytes payload, const Id& id = TRANSFER) {
        frames.by_type[type] = frame(type, std::move(payload), id);
    };
    add(Type::RECEIPT, encode(std::vector<ReceiptEntry>{{0, 0, 1, 0}}));
    add(Type::REPAIR, encode(std::vector<RepairEntry>{repair}));
    add(Type::ABORT, encode(CANCELLED));
    add(Type::PULL, encode(Pull{OFFER, 0, 100, 0, 0, 1}), TICKET);
    add(Type::INDEX, Bytes(32));
    add(Type::COMMIT, Bytes(COMMIT_BYTES));
    add(Type::CLOSE, {}, Id{});
    add(SKIPPABLE, Bytes(5));
    add(Type::TABLE_NAMES, encode(std::vector<TableName>{{1, table_name(span(table().bytes()))}}),
        Id{});
    add(Type::TABLE_ANSWER, encode(std::vector<TableAnswer>{{1, TableState::WANTED}}), Id{});
    add(Type::TABLE, FieldWriter().number(uint32_t(1)).zeros(4)
                         .data(table().bytes().data(), table().bytes().size()).take(), Id{});
    return frames;
}

const Frames& honest() {
    static const Frames frames = capture();
    return frames;
}

Bytes honest_bytes(Type type) { return honest().by_type.at(type).bytes(); }

std::string states_of_tables(const Bytes& payload) {
    static const char* const names[] = {"KNOWN", "WANTED", "REFUSED"};
    std::string text;
    for (const TableAnswer& answer : decode_table_answer(span(payload)))
        text += (text.empty() ? "" : " ") + std::string(names[uint32_t(answer.state) - 1]);
    return text;
}

// What a side says on lane 0, and the error for which it closed it: "ABORT 208", "lane 111".
// Of an answer about tables, what they are.
template <class Side>
std::string reaction(Side& side) {
    std::string text;
    for (const Frame& each : frames_of(side.take(0))) {
        std::string name = frame_type_name(each.type());
        if (each.type() == Type::ABORT) {
            const Error error = decode_abort({each.payload.data(), each.payload.size()});
            name = (each.header.transfer_id.is_zero() ? "lane " : "ABORT ") + show(error.code);
        }
        if (each.type() == Type::TABLE_ANSWER) name = states_of_tables(each.payload);
        text += (text.empty() ? "" : " ") + name;
    }
    CHECK_EQ(side.is_open(0), text.find("lane") == std::string::npos);
    return text;
}

// ---- receiver

struct ReceiverState {
    std::string name;
    std::vector<std::string> after;  // those of TOLD
    std::function<void(ReceiverEnd&)> reach;
};
const std::vector<Type> TOLD = {Type::MANIFEST, Type::SEGMENT, Type::CHUNK, Type::SEGMENT_END,
                                Type::END, Type::TABLE_NAMES, Type::TABLE};

Bytes wrong_table() {
    Frame made = honest().by_type.at(Type::TABLE);
    made.payload.back() ^= 1;
    return made.bytes();
}

// b bind, c cancel; honest frames on lane 0: m s 1 2 e E a, of tables n t, T other bytes; on lane
// 1 a part of chunk 0: h.
void hear(ReceiverEnd& receiver, const std::string& script) {
    Random random(3);
    for (const char step : script) {
        const Bytes chunk = honest_bytes(Type::CHUNK);
        switch (step) {
            case 'b': receiver.bind(small(), random); break;
            case 'm': receiver.feed(0, honest_bytes(Type::MANIFEST)); break;
            case 's': receiver.feed(0, honest_bytes(Type::SEGMENT)); break;
            case '1': receiver.feed(0, chunk); break;
            case '2': receiver.feed(0, honest().last_chunk.bytes()); break;
            case 'e': receiver.feed(0, honest_bytes(Type::SEGMENT_END)); break;
            case 'E': receiver.feed(0, honest_bytes(Type::END)); break;
            case 'a': receiver.feed(0, honest_bytes(Type::ABORT)); break;
            case 'c': receiver.cancel(); break;
            case 'n': receiver.feed(0, honest_bytes(Type::TABLE_NAMES)); break;
            case 't': receiver.feed(0, honest_bytes(Type::TABLE)); break;
            case 'T': receiver.feed(0, wrong_table()); break;
            default: receiver.feed(1, Bytes(chunk.begin(), chunk.begin() + HEADER_BYTES + 100));
        }
    }
    receiver.take(0);
}

ReceiverState receiver_state(const std::string& name, const std::string& script,
                             std::vector<std::string> after,
                             const std::string& named = "WANTED",
                             const std::string& sent = "lane 106") {
    after.insert(after.end(), {named, sent});
    return {name, std::move(after), [script](ReceiverEnd& receiver) { hear(receiver, script); }};
}

std::vector<ReceiverState> receiver_states() {
    const std::string unknown = "ABORT 208", gone = "ABORT 218", early = "ABORT 111",
                      unannounced = "ABORT 210";
    return {
        receiver_state("never seen", "b", {"GRANT", unknown, unknown, unknown, unknown}),
        receiver_state("ticket gone", "bc", {"ABORT 201", unknown, unknown, unknown, unknown}),
        receiver_state("waiting", "m", {"", early, early, early, early}),
        receiver_state("granted", "bm", {"GRANT", "", unannounced, unannounced, ""}),
        receiver_state("granted late", "mb", {"GRANT", "", unannounced, unannounced, ""}),
        receiver_state("announced", "bms", {"GRANT", "", "RECEIPT", "", ""}),
        receiver_state("leased", "bmsh", {"GRANT", "", "", "", ""}),
        receiver_state("in part", "bms1", {"GRANT", "", "RECEIPT", "", ""}),
        receiver_state("verified", "bms12", {"GRANT", "", "RECEIPT", "RECEIPT", ""}),
        receiver_state("segment complete", "bms12e", {"GRANT", "", "RECEIPT", "RECEIPT", "DONE"}),
        receiver_state("end heard", "bmsE", {"GRANT", "", "RECEIPT", "", ""}),
        receiver_state("done", "bms12eE", {"DONE", "", "", "", "DONE"}),
        receiver_state("aborted", "bmsa", {gone, gone, gone, gone, gone}),
        receiver_state("cancelled", "bms1c", {gone, gone, gone, gone, gone}),
        receiver_state("table named", "bmsn", {"GRANT", "", "RECEIPT", "", ""}, "WANTED", "KNOWN"),
        receiver_state("table known", "nbmst", {"GRANT", "", "RECEIPT", "", ""}, "KNOWN", "KNOWN"),
        receiver_state("table refused", "nTbms", {"GRANT", "", "RECEIPT", "", ""}, "REFUSED",
                       "REFUSED"),
    };
}

std::string expected_reaction(const ReceiverState& state, Type type) {
    static const std::set<Type> unanswered = {Type::ABORT, Type::CLOSE, Type::TABLE_ANSWER,
                                              SKIPPABLE};
    for (size_t i = 0; i < TOLD.size(); ++i)
        if (TOLD[i] == type) return state.after[i];
    if (unanswered.count(type)) return "";
    return "lane 111";
}

// ---- sender

struct SenderWorld {
    Truth truth;
    std::unique_ptr<Source> source =
        std::make_unique<Source>(TRANSFER, small(), *truth.memory.map, truth.random,
                                 uint8_t(Codec::TIERED));
    SenderEnd sender;
};

struct SenderState {
    std::string name;
    std::map<Type, std::string> after;
    std::function<void(SenderWorld&)> reach;
};

// o open, O offer, p push and finish, g grant, w grant of one chunk, t of a coded one, r receipts,
// R of the segment, d done, c cancel; of its table W wanted, K known.
void act(SenderWorld& world, const std::string& script) {
    SendLink& link = world.sender.link;
    SendTransfer& transfer = *world.source->transfer;
    const auto hear = [&](const Frame& each) { world.sender.feed(0, each.bytes()); };
    for (const char step : script) {
        switch (step) {
            case 'o': link.open(world.source->transfer); break;
            case 'O':
                transfer.offered = true;
                world.sender.offers.offers[{OFFER, 0, 0}] = world.source->transfer;
                break;
            case 'p':
                world.source->push(link, all_items(small()));
                SendLink::finish(transfer, {}, 0);
                break;
            case 'w': hear(frame(Type::GRANT, encode(Grant{4096, 1, 4096}))); break;
            case 'g': hear(frame(Type::GRANT, encode(Grant{1 << 20, 1, 4096}))); break;
            case 't': hear(frame(Type::GRANT, encode(Grant{4096, 5, 4096}))); break;
            case 'W': hear(honest().by_type.at(Type::TABLE_ANSWER)); break;
            case 'K':
                hear(frame(Type::TABLE_ANSWER,
                           encode(std::vector<TableAnswer>{{1, TableState::KNOWN}}), Id{}));
                break;
            case 'r': hear(frame(Type::RECEIPT, encode(std::vector<ReceiptEntry>{{0, 0, 2, 0}})));
                break;
            case 'R':
                hear(frame(Type::RECEIPT, encode(std::vector<ReceiptEntry>{
                                              {0, 0, 0, transfer.segments[0]->digest}})));
                break;
            case 'd': hear(honest().by_type.at(Type::DONE)); break;
            default: link.fail(transfer, CANCELLED);
        }
        world.sender.take(0);
    }
}

SenderState sender_state(const std::string& name, const std::string& script,
                         std::map<Type, std::string> after) {
    return {name, std::move(after), [script](SenderWorld& world) { act(world, script); }};
}

std::vector<SenderState> sender_states() {
    const std::string early = "lane 111", invalid = "lane 106";
    const std::map<Type, std::string> gone = {{Type::PULL, "ABORT 220"}};
    std::map<Type, std::string> coded = {{Type::RECEIPT, "CHUNK SEGMENT_END END"},
                                         {Type::REPAIR, "CHUNK"}, {Type::DONE, invalid},
                                         {Type::TABLE_ANSWER, ""}};
    std::map<Type, std::string> named = coded;
    named[Type::TABLE_ANSWER] = "TABLE";
    return {
        sender_state("never seen", "", gone),
        sender_state("opened", "op",
                     {{Type::GRANT, "SEGMENT CHUNK CHUNK SEGMENT_END END TABLE_NAMES"},
                      {Type::RECEIPT, early}, {Type::REPAIR, early}, {Type::DONE, early}}),
        sender_state("granted", "og", {{Type::RECEIPT, invalid}, {Type::REPAIR, invalid},
                                       {Type::DONE, invalid}}),
        sender_state("in flight", "opw", {{Type::RECEIPT, "CHUNK SEGMENT_END END"},
                                          {Type::REPAIR, "CHUNK"}, {Type::DONE, invalid}}),
        sender_state("end said", "opg", {{Type::REPAIR, "CHUNK"}}),
        sender_state("receipted", "opgr", {}),
        sender_state("segment complete", "opgrR", {}),
        sender_state("done", "opgrRd", gone),
        sender_state("cancelled", "opgc", gone),
        sender_state("offered", "O", {{Type::PULL, "MANIFEST"}}),
        sender_state("table named", "opt", named),
        sender_state("table sent", "optW", coded),
        sender_state("table known", "optK", coded),
    };
}

std::string expected_reaction(const SenderState& state, Type type) {
    static const std::set<Type> own = {Type::MANIFEST, Type::SEGMENT, Type::CHUNK,
                                       Type::SEGMENT_END, Type::END, Type::INDEX, Type::COMMIT};
    if (own.count(type)) return "lane 111";
    const auto found = state.after.find(type);
    if (found != state.after.end()) return found->second;
    return type == Type::TABLE_ANSWER ? "lane 106" : "";  // it was never named
}

// ---- valid but wrong

uint64_t odd_number(Random& random) {
    static const uint64_t numbers[] = {0, 1, 2, 3, 100, 4095, 4096, 8192, 65535, 1 << 20,
                                       0xFFFFFFFF, uint64_t(1) << 40, ~uint64_t(0)};
    return pick(random, 0, 4) ? numbers[pick(random, 0, 12)] : random();
}

Frame wrong(Random& random, Type type) {
    Frame made = honest().by_type.at(type);
    FrameHeader& header = made.header;
    if (pick(random, 0, 3) == 0) {
        const Id ids[] = {TRANSFER, TICKET, OFFER, id_of(uint8_t(random())), Id{}};
        header.transfer_id = ids[pick(random, 0, 4)];
    }
    if (pick(random, 0, 1) && !made.payload.empty()) {
        const size_t at = pick(random, 0, made.payload.size() - 1);
        const uint64_t number = odd_number(random);
        const size_t width = std::min<size_t>(size_t(1) << pick(random, 0, 3),
                                              made.payload.size() - at);
        std::memcpy(&made.payload[at], &number, width);
    }
    if (pick(random, 0, 7) == 0) made.payload.resize(pick(random, 0, made.payload.size() + 40));
    if (type == Type::CHUNK || type == Type::SEGMENT || type == Type::SEGMENT_END)
        if (pick(random, 0, 3) == 0) header.segment_index = uint32_t(pick(random, 0, 3));
    if (type != Type::CHUNK) return made;
    if (pick(random, 0, 2) == 0) header.attempt = uint32_t(odd_number(random));
    if (pick(random, 0, 2) == 0) header.raw_offset = odd_number(random);
    if (pick(random, 0, 3) == 0) made.payload.resize(pick(random, 1, 5000));
    header.raw_bytes = uint32_t(made.payload.size());
    if (pick(random, 0, 5) == 0) {
        header.codec = uint8_t(pick(random, 0, 3));
        header.raw_bytes = uint32_t(odd_number(random));
    }
    if (pick(random, 0, 7) == 0) header.table_index = 1;
    return made;
}

// A storm on both lanes, cut as it comes; a lane that was closed opens again.
template <class Side>
void storm(Side& side, Random& random, Type first) {
    for (int i = 0; i < 8; ++i) {
        const uint32_t lane = i ? uint32_t(pick(random, 0, 1)) : 0;
        const Type type = i ? TYPES[pick(random, 0, TYPES.size() - 1)] : first;
        const Frame next = pick(random, 0, 4) ? wrong(random, type) : honest().by_type.at(type);
        const Bytes bytes = next.bytes();
        const size_t cut = pick(random, 0, bytes.size());
        side.feed(lane, bytes.data(), cut);
        if (pick(random, 0, 9) == 0) side.lane_lost(lane);
        if (side.is_open(lane)) side.feed(lane, bytes.data() + cut, bytes.size() - cut);
        if (pick(random, 0, 1)) side.take(lane);
        if (!side.is_open(lane)) side.open_lane(lane);
    }
}

}  // namespace

TEST(hostile_every_frame_in_every_receiver_state) {
    std::set<std::pair<std::string, Type>> reached;
    for (const ReceiverState& state : receiver_states())
        for (const Type type : TYPES) {
            ReceiverEnd receiver;
            receiver.open_lane(0);
            receiver.open_lane(1);
            state.reach(receiver);
            receiver.feed(0, honest_bytes(type));
            const std::string got = reaction(receiver), expected = expected_reaction(state, type);
            if (got != expected)
                fail(__FILE__, __LINE__, "receiver, " + state.name + ", " + frame_type_name(type) +
                                             ": '" + got + "' is not '" + expected + "'");
            reached.insert({state.name, type});
        }
    CHECK_EQ(reached.size(), receiver_states().size() * TYPES.size());
}

TEST(hostile_every_frame_in_every_sender_state) {
    std::set<std::pair<std::string, Type>> reached;
    for (const SenderState& state : sender_states())
        for (const Type type : TYPES) {
            SenderWorld world;
            world.sender.open_lane(0);
            state.reach(world);
            world.sender.feed(0, honest_bytes(type));
            const std::string got = reaction(world.sender);
            const std::string expected = expected_reaction(state, type);
            if (got != expected)
                fail(__FILE__, __LINE__, "sender, " + state.name + ", " + frame_type_name(type) +
                                             ": '" + got + "' is not '" + expected + "'");
            reached.insert({state.name, type});
        }
    CHECK_EQ(reached.size(), sender_states().size() * TYPES.size());
}

TEST(hostile_sender_breaks_no_receiver) {
    std::set<std::pair<std::string, Type>> reached;
    uint64_t seed = 0;
    const int failures_before = failures;
    for (int round = 0; round < 25; ++round)
        for (const ReceiverState& state : receiver_states())
            for (const Type type : TYPES) {
                Random random(++seed);
                ReceiverEnd receiver;
                receiver.open_lane(0);
                receiver.open_lane(1);
                state.reach(receiver);
                storm(receiver, random, type);
                if (receiver.ticket && !receiver.ended) receiver.cancel();
                reached.insert({state.name, type});
                if (failures != failures_before)
                    return fail(__FILE__, __LINE__, "seed " + std::to_string(seed));
            }
    CHECK_EQ(reached.size(), receiver_states().size() * TYPES.size());
}

TEST(hostile_receiver_breaks_no_sender) {
    std::set<std::pair<std::string, Type>> reached;
    uint64_t seed = 0;
    const int failures_before = failures;
    for (int round = 0; round < 25; ++round)
        for (const SenderState& state : sender_states())
            for (const Type type : TYPES) {
                Random random(++seed);
                SenderWorld world;
                world.sender.open_lane(0);
                world.sender.open_lane(1);
                state.reach(world);
                storm(world.sender, random, type);
                if (!world.source->ended && world.source->transfer->home)
                    world.sender.link.fail(*world.source->transfer, CANCELLED);
                reached.insert({state.name, type});
                if (failures != failures_before)
                    return fail(__FILE__, __LINE__, "seed " + std::to_string(seed));
            }
    CHECK_EQ(reached.size(), sender_states().size() * TYPES.size());
}

}  // namespace kvwire
