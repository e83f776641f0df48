// Greeting, header and control payloads: round trips, flips, and bytes that nobody wrote; the
// golden vectors through the machine. A failure prints the seed or the file that shows it.

#include <fstream>
#include <functional>
#include <iterator>

#include "codec/codec.hpp"
#include "tests/link_world.hpp"

namespace kvwire {
namespace {

using namespace test;

ByteSpan span(const Bytes& bytes) { return {bytes.data(), bytes.size()}; }

Bytes bytes_of(const Greeting& greeting) {
    Bytes bytes(GREETING_BYTES);
    encode_greeting(greeting, bytes.data());
    return bytes;
}

Bytes bytes_of(const FrameHeader& header) {
    Bytes bytes(HEADER_BYTES);
    encode_header(header, bytes.data());
    return bytes;
}

// The error of a call, OK when it returns.
ErrorCode error_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const Error& error) {
        CHECK(error_name(error.code) != nullptr && !error.message.empty());
        return error.code;
    }
    return ErrorCode::OK;
}

Greeting some_greeting() {
    Greeting greeting;
    greeting.role = Role::RECEIVER;
    greeting.link_id = id_of(9);
    greeting.lane_index = 3;
    greeting.lane_count = 5;
    greeting.codecs = 3;
    greeting.payload_bytes_max = 1 << 20;
    greeting.control_bytes_max = 1 << 17;
    greeting.transfers_max = 7;
    return greeting;
}

FrameHeader some_chunk() {
    FrameHeader header;
    header.type = FrameType::CHUNK;
    header.payload_bytes = 900;
    header.transfer_id = TRANSFER;
    header.segment_index = 4;
    header.attempt = 2;
    header.raw_offset = 40960;
    header.raw_bytes = 4096;
    header.raw_crc = 0x01020304;
    header.payload_crc = 0x05060708;
    header.codec = 1;
    return header;
}

// Each control payload: an example, and decode-and-encode.
struct Control {
    const char* name;
    std::vector<Bytes> examples;
    std::function<Bytes(ByteSpan)> again;
};

Bytes metadata_entry() {  // key "n", INT 5
    return {1, 'n', 1, 5, 0, 0, 0, 0, 0, 0, 0};
}

std::vector<Control> controls() {
    Manifest with_metadata = hybrid(16, 100, 1, 2, 16);
    with_metadata.metadata = metadata_entry();
    with_metadata.metadata_count = 1;
    Manifest empty;
    empty.groups.clear();
    const Error abort(ErrorCode::RAW_CORRUPT, "déjà vu", 1, 2, 3);
    return {
        {"MANIFEST", {encode(hybrid(0, 7)), encode(with_metadata), encode(empty)},
         [](ByteSpan in) { return encode(decode_manifest(in)); }},
        {"GRANT", {encode(Grant{1 << 20, 3, 8192})},
         [](ByteSpan in) { return encode(decode_grant(in)); }},
        {"SEGMENT", {encode(SegmentAnnouncement{30, 4096, {{0, 1, 2, 3, 4}, {1, 0, 9, 0, 0}}})},
         [](ByteSpan in) { return encode(decode_segment(in)); }},
        {"SEGMENT_END", {encode(SegmentEnd{3, 77})},
         [](ByteSpan in) { return encode(decode_segment_end(in)); }},
        {"END", {encode(End{1, 2, 3, 0, {}}), encode(End{1, 2, 3, 1, metadata_entry()})},
         [](ByteSpan in) { return encode(decode_end(in)); }},
        {"RECEIPT", {encode(std::vector<ReceiptEntry>{{1, 2, 3, 0}, {1, 0, 0, 99}})},
         [](ByteSpan in) { return encode(decode_receipt(in)); }},
        {"REPAIR", {encode(std::vector<RepairEntry>{{1, 2, 3, ErrorCode::RAW_CORRUPT, 4, 5}})},
         [](ByteSpan in) { return encode(decode_repair(in)); }},
        {"ABORT", {encode(abort), encode(Error(ErrorCode::CANCELLED, ""))},
         [](ByteSpan in) { return encode(decode_abort(in)); }},
        {"PULL", {encode(Pull{OFFER, 3, 9, 1, 2, 4})},
         [](ByteSpan in) { return encode(decode_pull(in)); }},
        {"DONE", {encode(Done{1 << 20, 5})}, [](ByteSpan in) { return encode(decode_done(in)); }},
    };
}

// ---- vectors

struct Vector {
    std::string file, reads, link, error;
    uint32_t lane = 0;
    std::vector<std::string> tickets;
};

// The part of JSON that vectors.json uses: objects of strings, numbers and lists of strings.
class VectorList {
public:
    explicit VectorList(const std::string& text) : text_(text) {
        at_ = text_.find('[');
        while (next() != ']') read_vector();
    }
    std::vector<Vector> vectors;

private:
    char next() {
        at_ = text_.find_first_not_of(" \n\t,:[", at_);
        return at_ == std::string::npos ? ']' : text_[at_];
    }
    std::string word() {
        next();
        const bool quoted = text_[at_] == '"';
        const size_t start = at_ + quoted;
        at_ = start;
        while (quoted ? text_[at_] != '"' : std::isdigit(uint8_t(text_[at_])) != 0)
            at_ += text_[at_] == '\\' ? 2 : 1;
        return text_.substr(start, at_++ - start);
    }
    void read_vector() {
        ++at_;  // {
        Vector vector;
        while (next() != '}') {
            const std::string key = word();
            if (key == "tickets") {
                while (next() != ']') vector.tickets.push_back(word());
                ++at_;
                continue;
            }
            const std::string value = word();
            if (key == "file") vector.file = value;
            if (key == "reads") vector.reads = value;
            if (key == "link") vector.link = value;
            if (key == "error") vector.error = value;
            if (key == "lane") vector.lane = uint32_t(std::stoul(value));
        }
        ++at_;
        vectors.push_back(std::move(vector));
    }

    const std::string text_;
    size_t at_ = 0;
};

Bytes read_file(const std::string& name) {
    std::ifstream in("tests/vectors/" + name, std::ios::binary);
    if (!in) throw std::runtime_error("no " + name + ": run in the root of the repository");
    return Bytes(std::istreambuf_iterator<char>(in), {});
}

std::vector<Vector> stored_vectors(const std::string& reads) {
    const Bytes text = read_file("vectors.json");
    std::vector<Vector> found;
    for (const Vector& vector : VectorList(std::string(text.begin(), text.end())).vectors)
        if (vector.reads == reads) found.push_back(vector);
    CHECK(found.size() > 10);
    return found;
}

Bytes from_hex(const std::string& text) {
    Bytes bytes;
    for (size_t i = 0; i + 1 < text.size(); i += 2)
        bytes.push_back(uint8_t(std::stoul(text.substr(i, 2), nullptr, 16)));
    return bytes;
}

// What an endpoint does before the machine: the greeting, and that two peers differ in role.
void check_greeting(const Bytes& stream, Role own) {
    if (stream.size() < GREETING_BYTES)
        throw Error(ErrorCode::TRUNCATED, "stream ended inside the greeting");
    const Greeting peer = decode_greeting(stream.data());
    if (peer.role == own) throw Error(ErrorCode::ROLE_CONFLICT, "both ends have the same role");
    if (peer.role == Role::FILE) throw Error(ErrorCode::FIELD_INVALID, "a file speaks no TCP");
}

// The first ABORT in what a receiver wrote, or else the first REPAIR; OK: neither.
ErrorCode refusal_in(const Bytes& answers) {
    ErrorCode repair = ErrorCode::OK;
    for (const Frame& each : frames_of(answers)) {
        if (each.type() == FrameType::ABORT) return decode_abort(span(each.payload)).code;
        if (each.type() == FrameType::REPAIR && repair == ErrorCode::OK)
            repair = decode_repair(span(each.payload))[0].reason;
    }
    return repair;
}

ErrorCode refusal_of(const Vector& vector) {
    const Bytes stream = read_file(vector.file);
    Random random(1);
    ReceiverEnd receiver;
    if (const ErrorCode error = error_of([&] { check_greeting(stream, Role::RECEIVER); });
        error != ErrorCode::OK)
        return error;
    receiver.open_lane(0);
    for (const std::string& ticket : vector.tickets)
        receiver.bind(decode_manifest(span(from_hex(ticket))), random);
    receiver.feed(0, stream.data() + GREETING_BYTES, stream.size() - GREETING_BYTES);
    receiver.link.expire(UINT64_MAX);
    const ErrorCode said = refusal_in(receiver.take(0));
    if (said != ErrorCode::OK) return said;
    receiver.stream_ended(0);
    return receiver.lane_error(0);
}

// A sender's ears: everything a receiver may write is decoded.
struct Ears : FrameHandler {
    size_t frames = 0;
    void on_control(uint32_t, const FrameHeader& header, ByteSpan payload) override {
        ++frames;
        switch (header.type) {
            case FrameType::GRANT: decode_grant(payload); break;
            case FrameType::RECEIPT: decode_receipt(payload); break;
            case FrameType::REPAIR: decode_repair(payload); break;
            case FrameType::ABORT: decode_abort(payload); break;
            case FrameType::PULL: decode_pull(payload); break;
            case FrameType::DONE: decode_done(payload); break;
            case FrameType::CLOSE:
            case FrameType::PING:
            case FrameType::PONG:
            case FrameType::SPEEDS:
            case FrameType::TABLE_ANSWER: break;
            default: throw Error(ErrorCode::STATE_INVALID, "not a receiver's frame");
        }
    }
    ChunkTarget* on_chunk(uint32_t, const FrameHeader&) override {
        throw Error(ErrorCode::STATE_INVALID, "CHUNK is not a receiver's frame");
    }
    void on_chunk_end(uint32_t, uint32_t) override {}
};

// A link's streams fed in pieces of at most `most` bytes from lanes at random, the manifest first.
struct Played {
    ReceiverEnd receiver;
    Played(const std::vector<Vector>& link, Random& random, size_t most) {
        std::vector<Bytes> streams;
        for (const Vector& vector : link) {
            const Bytes stream = read_file(vector.file);
            check_greeting(stream, Role::RECEIVER);
            streams.emplace_back(stream.begin() + GREETING_BYTES, stream.end());
            receiver.open_lane(vector.lane);
            for (const std::string& ticket : vector.tickets)
                if (!receiver.ticket) {
                    Random poison(5);
                    receiver.bind(decode_manifest(span(from_hex(ticket))), poison);
                }
        }
        std::vector<size_t> at(streams.size());
        for (size_t i = 0; i < streams.size(); ++i) {
            if (FrameType(streams[i][header_at::TYPE]) != FrameType::MANIFEST) continue;
            at[i] = HEADER_BYTES + load_le<uint32_t>(&streams[i][header_at::PAYLOAD_BYTES]);
            receiver.feed(link[i].lane, streams[i].data(), at[i]);
        }
        for (;;) {
            std::vector<size_t> open;
            for (size_t i = 0; i < streams.size(); ++i)
                if (at[i] < streams[i].size()) open.push_back(i);
            if (open.empty()) break;
            const size_t i = open[pick(random, 0, open.size() - 1)];
            const size_t part = std::min(streams[i].size() - at[i], size_t(pick(random, 1, most)));
            const Bytes piece(streams[i].begin() + at[i], streams[i].begin() + at[i] + part);
            receiver.feed(link[i].lane, piece);  // a copy: nothing may be read past its end
            at[i] += part;
        }
    }
};

}  // namespace

TEST(wire_round_trips) {
    const Greeting greeting = some_greeting();
    CHECK(bytes_of(decode_greeting(bytes_of(greeting).data())) == bytes_of(greeting));
    const FrameHeader chunk = some_chunk();
    CHECK(bytes_of(decode_header(bytes_of(chunk).data(), {})) == bytes_of(chunk));
    for (const Control& control : controls())
        for (const Bytes& example : control.examples)
            if (control.again(span(example)) != example) fail(__FILE__, __LINE__, control.name);
}

TEST(wire_every_flipped_bit_of_greeting_and_header_is_refused) {
    for (size_t bit = 0; bit < 8 * GREETING_BYTES; ++bit) {
        Bytes greeting = bytes_of(some_greeting()), chunk = bytes_of(some_chunk());
        greeting[bit / 8] ^= uint8_t(1 << bit % 8);
        chunk[bit / 8] ^= uint8_t(1 << bit % 8);
        const bool in_magic = bit < 8 * sizeof GREETING_MAGIC;
        CHECK_EQ(error_of([&] { decode_greeting(greeting.data()); }),
                 in_magic ? ErrorCode::BAD_MAGIC : ErrorCode::GREETING_CORRUPT);
        const bool in_frame_magic = bit < 8 * sizeof FRAME_MAGIC;
        CHECK_EQ(error_of([&] { decode_header(chunk.data(), {}); }),
                 in_frame_magic ? ErrorCode::BAD_MAGIC : ErrorCode::HEADER_CORRUPT);
    }
}

TEST(wire_every_truncation_of_a_payload_is_refused) {
    for (const Control& control : controls())
        for (const Bytes& example : control.examples)
            for (size_t size = 0; size < example.size(); ++size) {
                const Bytes cut(example.begin(), example.begin() + size);  // ends where it ends
                const ErrorCode error = error_of([&] { control.again(span(cut)); });
                // Of receipts and repairs any number of entries is a payload.
                const std::string name = control.name;
                const bool whole = name == "RECEIPT" && size % RECEIPT_BYTES == 0;
                const bool none = name == "REPAIR" && size == 0;
                if ((error == ErrorCode::OK) != (whole || none))
                    fail(__FILE__, __LINE__, control.name + (" cut to " + std::to_string(size)));
            }
}

// Whatever is decoded is encoded to the same bytes (a value has one encoding), or is refused. Two
// exceptions lose nothing that counts: ABORT's unknown codes, and the ends that headers check.
TEST(wire_any_bytes_decode_to_a_value_or_an_error) {
    uint64_t accepted = 0, refused = 0;
    for (const Control& control : controls())
        for (uint64_t seed = 0; seed < 3000; ++seed) {
            Random random(seed);
            Bytes bytes = control.examples[seed % control.examples.size()];
            if (pick(random, 0, 9) == 0) {
                bytes.resize(pick(random, 0, 300));
                for (uint8_t& byte : bytes) byte = uint8_t(random());
            }
            for (uint64_t i = pick(random, 0, 3); i > 0 && !bytes.empty(); --i) {
                static const uint8_t odd[] = {0, 1, 2, 0x7F, 0x80, 0xFF};
                uint8_t& byte = bytes[pick(random, 0, bytes.size() - 1)];
                byte = pick(random, 0, 1) ? odd[pick(random, 0, 5)] : uint8_t(random());
            }
            if (pick(random, 0, 4) == 0) bytes.resize(pick(random, 0, bytes.size() + 30));
            Bytes again;
            const ErrorCode error = error_of([&] { again = control.again(span(bytes)); });
            const bool same = again == bytes || std::string(control.name) == "ABORT" ||
                              again.size() < bytes.size();
            if (error == ErrorCode::OK && !same)
                fail(__FILE__, __LINE__, control.name + (", seed " + std::to_string(seed)));
            ++(error == ErrorCode::OK ? accepted : refused);
        }
    CHECK(accepted > 1000 && refused > 5000);
}

TEST(wire_any_header_with_a_right_checksum_is_read_or_refused) {
    uint64_t accepted = 0;
    for (uint64_t seed = 0; seed < 20000; ++seed) {
        Random random(seed);
        Bytes bytes = bytes_of(some_chunk());
        if (pick(random, 0, 1)) bytes[header_at::TYPE] = uint8_t(pick(random, 0, 0x90));
        for (uint64_t i = pick(random, 1, 4); i > 0; --i)
            bytes[pick(random, 2, HEADER_BYTES - 5)] = uint8_t(pick(random, 0, 3) * random());
        store_le<uint32_t>(&bytes[header_at::HEADER_CRC],
                           crc32c(0, bytes.data(), header_at::HEADER_CRC));
        const ErrorCode error = error_of([&] {
            const FrameHeader header = decode_header(bytes.data(), {});
            CHECK(header.payload_bytes <= limits::index_bytes_max);
            ++accepted;
        });
        CHECK(error == ErrorCode::OK || uint16_t(error) < 200);
    }
    CHECK(accepted > 100);
}

TEST(wire_invalid_vectors_raise_their_error) {
    for (const Vector& vector : stored_vectors("receiver")) {
        if (vector.error.empty()) continue;
        const char* name = error_name(refusal_of(vector));
        if (!name || vector.error != name)
            fail(__FILE__, __LINE__, vector.file + ": " + (name ? name : "accepted"));
    }
    for (const Vector& vector : stored_vectors("sender")) {
        const Bytes stream = read_file(vector.file);
        Ears ears;
        const ErrorCode error = error_of([&] {
            check_greeting(stream, Role::SENDER);
            LaneReader reader(ears, 0, {});
            feed_reader(reader, stream.data() + GREETING_BYTES, stream.size() - GREETING_BYTES);
            reader.end_of_stream();
        });
        const char* name = error == ErrorCode::OK ? "" : error_name(error);
        if (vector.error != name) fail(__FILE__, __LINE__, vector.file + ": '" + name + "'");
        CHECK(!vector.error.empty() || ears.frames > 0);
    }
}

TEST(wire_valid_vectors_are_delivered_however_they_are_cut) {
    std::map<std::string, std::vector<Vector>> links;
    for (const Vector& vector : stored_vectors("receiver"))
        if (vector.error.empty()) links[vector.link].push_back(vector);
    CHECK(links.size() > 5);
    for (const auto& [name, link] : links) {
        if (name == "lz4" && !(codecs_available() & 2)) continue;  // no liblz4 here
        Random random(1);
        const Played whole(link, random, size_t(1) << 20);
        if (!whole.receiver.complete()) fail(__FILE__, __LINE__, name + " is not delivered");
        for (const size_t most : {1, 2, 100, 5000}) {
            const Played cut(link, random, most);
            if (!cut.receiver.complete() || cut.receiver.delivered != whole.receiver.delivered)
                fail(__FILE__, __LINE__, name + " in pieces of up to " + std::to_string(most));
        }
    }
}

}  // namespace kvwire
