// A stream cut anywhere gives the same calls and the same refusal, and writes only where its
// handler said.

#include "fuzz/fuzz.hpp"
#include "wire/lane_reader.hpp"

namespace kvwire {
namespace {

using namespace fuzz;

constexpr uint32_t PAYLOAD_BYTES_MAX = 1 << 16;
constexpr size_t CUTS = 8;
constexpr uint32_t ROWS = 256, PAGES_BYTES = ROWS * 24;

// Rows of 24 bytes, 40 apart: chunks land in runs too short for the bytes between to be missed.
struct Pages {
    Placement placement;
    Bytes bytes;

    Pages() {
        const TensorDesc tensor{"t", DType::BYTES, 0, false,
                                {whole(Axis::ROW, ROWS), whole(Axis::DIM, 24)}};
        bytes.resize(ROWS * 40);
        LeafMemory held;
        held.base = bytes.data();
        held.dtype = DType::BYTES;
        held.axes = {{Axis::ROW, ROWS, 0, ROWS, 40}, {Axis::DIM, 24, 0, 24, 1}};
        placement.append(group_of(tensor, GroupKind::RECURRENT), Item{},
                         {{{GroupKind::RECURRENT, 0, "t"}, held}});
    }

    bool is_clean_between() const {
        for (size_t row = 0; row < bytes.size(); row += 40)
            for (size_t at = row + 24; at < row + 40; ++at)
                if (bytes[at] != 0) return false;
        return true;
    }
};

// Writes every call down in one checksum.
class Recorder : public FrameHandler {
public:
    uint32_t calls = 0;

    void on_control(uint32_t, const FrameHeader& header, ByteSpan payload) override {
        note(header);
        calls = crc32c(calls, payload.data, payload.size);
    }

    ChunkTarget* on_chunk(uint32_t, const FrameHeader& header) override {
        note(header);
        target_.revoke();
        target_.header = header;
        const bool fits = header.raw_offset + header.raw_bytes <= PAGES_BYTES &&
                          header.raw_offset <= PAGES_BYTES;
        if (header.segment_index % 3 > 0 && fits) target_.placement = &pages().placement;
        const bool direct = header.segment_index % 3 == 1 && header.codec == 0;
        if (!target_.placement || direct) return &target_;
        staging_.resize(3 * size_t(header.raw_bytes));
        target_.staging = staging_.data();
        return &target_;
    }

    void on_chunk_end(uint32_t, uint32_t payload_crc) override {
        if (target_.discards()) return;
        const Landing landing = target_.land(payload_crc);
        const FrameHeader& header = target_.header;
        if (landing.verdict == ErrorCode::OK)
            CHECK_EQ(pages().placement.crc32c(header.raw_offset, header.raw_bytes),
                     header.raw_crc);
        calls = crc32c(calls, &landing.verdict, sizeof landing.verdict);
        calls = crc32c(calls, &landing.crc, sizeof landing.crc);
    }

    static Pages& pages() {
        static Pages pages;
        return pages;
    }

private:
    void note(const FrameHeader& header) {
        uint8_t bytes[HEADER_BYTES];
        encode_header(header, bytes);
        calls = crc32c(calls, bytes, sizeof bytes);
    }

    ChunkTarget target_;
    Bytes staging_;
};

struct Outcome {
    ErrorCode code;
    uint32_t calls;
};

template <class Feed>
Outcome outcome(Feed&& feed) {
    Recorder recorder;
    LaneReader reader(recorder, 0, {PAYLOAD_BYTES_MAX, uint32_t(limits::control_bytes_min)});
    const ErrorCode code = refusal([&] {
        feed(reader);
        reader.end_of_stream();
    });
    return {code, recorder.calls};
}

}  // namespace
}  // namespace kvwire

// The first byte: whether checksums are made right, and whether reads are digested by themselves;
// then how long the reads are, by turns.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace kvwire;
    if (size < 1 + CUTS) return 0;
    static Bytes stream;
    stream.assign(data + 1 + CUTS, data + size);
    if (data[0] & 1) seal(stream.data(), stream.size());
    return fuzz::run([&] {
        const Outcome whole = outcome([](LaneReader& reader) {
            reader.feed(stream.data(), stream.size());
        });
        const Outcome cut = outcome([&](LaneReader& reader) {
            size_t turn = 0;
            for (size_t at = 0; at < stream.size(); ++turn) {
                const uint8_t length = data[1 + turn % CUTS];
                const size_t most = length < 200 ? 1 + length : size_t(1) << (length % 16);
                const iovec* iov;
                const size_t count = reader.next_iovecs(&iov);
                const size_t bytes =
                    copy_in(iov, count, &stream[at], std::min(most, stream.size() - at));
                CHECK(bytes > 0);
                at += bytes;
                if (data[0] & 2) {  // as a thread that shares the machine with others
                    reader.begin_section();
                    reader.digest(bytes);
                    reader.end_section();
                }
                reader.advance(bytes);
            }
        });
        CHECK_EQ(whole.code, cut.code);
        CHECK_EQ(whole.calls, cut.calls);
        CHECK(Recorder::pages().is_clean_between());
    });
}
