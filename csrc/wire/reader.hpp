#pragma once
// Reads little-endian fields of a control payload in order; running past the end is TRUNCATED.

#include <cstdint>
#include <cstring>
#include <string>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "wire/format.hpp"

namespace kvwire {

class FieldReader {
public:
    FieldReader(ByteSpan payload, const char* name) : payload_(payload), name_(name) {}

    template <class T>
    T number() {
        return load_le<T>(take(sizeof(T)));
    }

    Id id() {
        Id value;
        std::memcpy(value.bytes.data(), take(16), 16);
        return value;
    }

    std::string text(size_t bytes) {
        const uint8_t* at = take(bytes);
        return std::string(reinterpret_cast<const char*>(at), bytes);
    }

    void zeros(size_t bytes) {
        const size_t start = offset_;
        const uint8_t* at = take(bytes);
        for (size_t i = 0; i < bytes; ++i)
            if (at[i] != 0)
                throw Error(ErrorCode::RESERVED_BIT_SET,
                            std::string(name_) + ": reserved byte " + std::to_string(start + i) +
                                " is not 0",
                            0, at[i], start + i);
    }

    const uint8_t* take(size_t bytes) {
        if (payload_.size - offset_ < bytes)
            throw Error(ErrorCode::TRUNCATED,
                        std::string(name_) + ": payload ends inside a structure",
                        offset_ + bytes, payload_.size, offset_);
        const uint8_t* at = payload_.data + offset_;
        offset_ += bytes;
        return at;
    }

    void at_end() const {
        if (offset_ != payload_.size)
            throw Error(ErrorCode::FIELD_INVALID,
                        std::string(name_) + ": bytes follow the structure", offset_,
                        payload_.size, offset_);
    }

    size_t offset() const { return offset_; }
    size_t rest() const { return payload_.size - offset_; }

    [[noreturn]] void fail(ErrorCode code, const std::string& what, uint64_t expected,
                           uint64_t actual) const {
        throw Error(code, std::string(name_) + ": " + what, expected, actual, offset_);
    }

private:
    ByteSpan payload_;
    const char* name_;
    size_t offset_ = 0;
};

// Appends fields to a payload.
class FieldWriter {
public:
    template <class T>
    FieldWriter& number(T value) {
        const size_t at = bytes_.size();
        bytes_.resize(at + sizeof(T));
        store_le<T>(bytes_.data() + at, value);
        return *this;
    }

    FieldWriter& id(const Id& value) { return data(value.bytes.data(), 16); }
    FieldWriter& zeros(size_t count) {
        bytes_.insert(bytes_.end(), count, 0);
        return *this;
    }
    FieldWriter& data(const uint8_t* source, size_t count) {
        bytes_.insert(bytes_.end(), source, source + count);
        return *this;
    }

    std::vector<uint8_t> take() { return std::move(bytes_); }

private:
    std::vector<uint8_t> bytes_;
};

// UTF-8 without surrogates or overlong forms; NUL only where the format says any UTF-8.
bool is_text(const std::string& text, bool may_hold_nul = false);

}  // namespace kvwire
