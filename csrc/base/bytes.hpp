// Byte spans, little-endian access and arithmetic that cannot wrap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace kvwire {

struct ByteSpan {
    const uint8_t* data = nullptr;
    size_t size = 0;
};

namespace detail {

template <class T>
T swap_on_big_endian(T value) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    if constexpr (sizeof(T) == 2) return __builtin_bswap16(value);
    if constexpr (sizeof(T) == 4) return __builtin_bswap32(value);
    if constexpr (sizeof(T) == 8) return __builtin_bswap64(value);
#endif
    return value;
}

}  // namespace detail

// `source` needs no alignment and must hold sizeof(T) bytes.
template <class T>
T load_le(const void* source) {
    static_assert(std::is_unsigned_v<T>);
    T value;
    std::memcpy(&value, source, sizeof value);
    return detail::swap_on_big_endian(value);
}

template <class T>
void store_le(void* target, T value) {
    static_assert(std::is_unsigned_v<T>);
    value = detail::swap_on_big_endian(value);
    std::memcpy(target, &value, sizeof value);
}

// False when the exact result does not fit; `*result` is then meaningless.
template <class T>
[[nodiscard]] bool checked_add(T a, T b, T* result) {
    return !__builtin_add_overflow(a, b, result);
}

template <class T>
[[nodiscard]] bool checked_mul(T a, T b, T* result) {
    return !__builtin_mul_overflow(a, b, result);
}

template <class T>
constexpr T div_ceil(T a, T b) {
    static_assert(std::is_unsigned_v<T>);
    return a / b + (a % b != 0);
}

}  // namespace kvwire
