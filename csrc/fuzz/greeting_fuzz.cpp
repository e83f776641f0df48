// A greeting is refused by its code or means what it says: written again, it is the same.

#include "fuzz/fuzz.hpp"

// The first byte: whether the checksum is made right.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace kvwire;
    if (size < 1 + GREETING_BYTES) return 0;
    uint8_t bytes[GREETING_BYTES], again[GREETING_BYTES];
    std::memcpy(bytes, data + 1, sizeof bytes);
    const auto seal = [&] {
        store_le<uint32_t>(bytes + greeting_at::GREETING_CRC,
                           crc32c(0, bytes, greeting_at::GREETING_CRC));
    };
    if (data[0] & 1) seal();
    return fuzz::run([&] {
        Greeting greeting;
        if (fuzz::refusal([&] { greeting = decode_greeting(bytes); }) != ErrorCode::OK) return;
        encode_greeting(greeting, again);
        store_le<uint16_t>(bytes + greeting_at::FLAGS, greeting.flags);  // the unused are ignored
        seal();
        CHECK(std::memcmp(bytes, again, sizeof bytes) == 0);
    });
}
