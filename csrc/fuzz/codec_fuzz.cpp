// The codecs: what is coded comes back; whatever is decoded, nothing lies outside the buffers.
// They end where a page that nobody may touch begins, since liblz4 itself is not instrumented.

#include <sys/mman.h>
#include <unistd.h>

#include "codec/codec.hpp"
#include "codec/planes.hpp"
#include "fuzz/fuzz.hpp"

namespace kvwire {
namespace {

constexpr size_t ROOM_BYTES = 1 << 16;

class Guarded {
public:
    Guarded() {
        const size_t guard_bytes = size_t(sysconf(_SC_PAGESIZE));
        void* const room = mmap(nullptr, ROOM_BYTES + guard_bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (room == MAP_FAILED) std::abort();
        end_ = static_cast<uint8_t*>(room) + ROOM_BYTES;
        if (mprotect(end_, guard_bytes, PROT_NONE) != 0) std::abort();
    }
    uint8_t* last(size_t bytes) const { return end_ - bytes; }

private:
    uint8_t* end_;
};

void round_trip(const uint8_t* raw, size_t raw_bytes, uint32_t item_bytes, size_t out_max) {
    static const Guarded coded, scratch, decoded;
    uint8_t* const out = coded.last(out_max);
    const size_t coded_bytes =
        encode(Codec::LZ4, raw, raw_bytes, item_bytes, out, out_max, scratch.last(raw_bytes));
    CHECK(coded_bytes <= out_max && (coded_bytes == 0 || coded_bytes < raw_bytes));
    if (coded_bytes > 0) {
        CHECK(decode(Codec::LZ4, out, coded_bytes, item_bytes, decoded.last(raw_bytes), raw_bytes,
                     scratch.last(raw_bytes)));
        CHECK(std::memcmp(decoded.last(raw_bytes), raw, raw_bytes) == 0);
    }
    split_planes(raw, raw_bytes, item_bytes, scratch.last(raw_bytes));
    join_planes(scratch.last(raw_bytes), raw_bytes, item_bytes, decoded.last(raw_bytes));
    CHECK(std::memcmp(decoded.last(raw_bytes), raw, raw_bytes) == 0);
}

void decode_any(const uint8_t* bytes, size_t coded_bytes, uint32_t item_bytes, size_t raw_bytes) {
    static const Guarded coded, raw, scratch;
    std::memcpy(coded.last(coded_bytes), bytes, coded_bytes);
    (void)decode(Codec::LZ4, coded.last(coded_bytes), coded_bytes, item_bytes,
                 raw.last(raw_bytes), raw_bytes, scratch.last(raw_bytes));
}

}  // namespace
}  // namespace kvwire

// The first bytes: item size, what to do, and a length; the rest is data.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace kvwire;
    if (size < 4) return 0;
    const uint32_t item_bytes = 1 + data[0] % 8;
    const size_t length = load_le<uint16_t>(data + 2);
    return fuzz::run([&] {
        if (data[1] & 1)
            decode_any(data + 4, std::min(size - 4, ROOM_BYTES), item_bytes, length);
        else
            round_trip(data + 4, std::min(size - 4, ROOM_BYTES), item_bytes,
                       std::min(length, size));
    });
}
