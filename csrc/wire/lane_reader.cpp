#include "wire/lane_reader.hpp"

#include <sched.h>

#include <algorithm>
#include <cstring>

#include "checksum/crc32c.hpp"
#include "codec/codec.hpp"

namespace kvwire {
namespace {
constexpr uint32_t TIMED_BYTES_MIN = 32 << 10;  // less says more of the calls than of the bytes
constexpr size_t CONTROL_KEPT_BYTES = 65536;  // larger control buffers go back after use
}

void ChunkTarget::revoke() {
    while (in_section.load(std::memory_order_acquire)) ::sched_yield();
    placement = nullptr;
    staging = nullptr;
    landed_ = false;
}

const Landing& ChunkTarget::land(uint32_t payload_crc) {
    if (!landed_) landing_ = stage_out(payload_crc);
    landed_ = true;
    return landing_;
}

Landing ChunkTarget::stage_out(uint32_t payload_crc) {
    if (payload_crc != header.payload_crc) return {ErrorCode::PAYLOAD_CORRUPT, payload_crc};
    if (!staging || !placement) return {ErrorCode::OK, payload_crc};  // computed in place
    if (header.codec >= uint8_t(Codec::TIERED)) {
        if (!decoder_) decoder_ = std::make_unique<ChunkDecoder>();
        return decoder_->decode(header, staging, *placement, tables);
    }
    const uint8_t* raw = staging;
    if (header.codec != 0) {
        uint8_t* decoded = staging + header.raw_bytes;
        if (!decode(Codec(header.codec), staging, header.payload_bytes, item_bytes, decoded,
                    header.raw_bytes, decoded + header.raw_bytes))
            return {ErrorCode::CODED_INVALID, payload_crc};
        raw = decoded;
    }
    if (placement->has_skips()) {  // not all of it has a place: the proof is on the staged bytes
        const uint32_t crc = crc32c(0, raw, header.raw_bytes);
        if (crc != header.raw_crc) return {ErrorCode::RAW_CORRUPT, crc};
        placement->scatter(header.raw_offset, header.raw_bytes, raw);
        return {ErrorCode::OK, crc};
    }
    placement->scatter(header.raw_offset, header.raw_bytes, raw);
    const uint32_t crc = placement->crc32c(header.raw_offset, header.raw_bytes);
    return {crc == header.raw_crc ? ErrorCode::OK : ErrorCode::RAW_CORRUPT, crc};
}

LaneReader::LaneReader(FrameHandler& handler, uint32_t lane, FrameLimits limits)
    : handler_(handler), lane_(lane), limits_(limits) {}

// Where the next bytes belong, and nothing beyond what is known.
void LaneReader::targets() {
    iov_count_ = 1;
    if (state_ == State::HEADER) {
        iov_[0] = {header_bytes_ + received_, HEADER_BYTES - received_};
        return;
    }
    const uint64_t rest = header_.payload_bytes - received_;
    if (state_ == State::CONTROL) {
        iov_[0] = {control_.get() + received_, size_t(rest)};
        return;
    }
    uint64_t covered = rest;
    if (target_->discards())
        iov_[0] = {scratch_, size_t(covered = std::min<uint64_t>(rest, sizeof scratch_))};
    else if (target_->staging)
        iov_[0] = {target_->staging + received_, size_t(rest)};
    else
        iov_count_ = target_->placement->iovecs(header_.raw_offset + received_, rest, iov_,
                                                IOV_MAX_READ - 1, &covered);
    // The next header rides along, so that a stream of chunks costs one read each.
    if (covered == rest) iov_[iov_count_++] = {header_bytes_, HEADER_BYTES};
}

size_t LaneReader::next_iovecs(const iovec** iov) {
    targets();
    // Small frames come many at once: what follows a header or control payload is read ahead and
    // copied to its place. Chunks that come by themselves are never copied.
    reads_ahead_ = state_ != State::CHUNK;
    if (reads_ahead_) iov_[iov_count_++] = {ahead_, sizeof ahead_};
    *iov = iov_;
    return iov_count_;
}

void LaneReader::begin_section() {
    section_ = state_ == State::CHUNK && !target_->discards() ? target_ : nullptr;
    if (section_) section_->in_section.store(true, std::memory_order_relaxed);
}

void LaneReader::end_section() {
    if (section_) section_->in_section.store(false, std::memory_order_release);
    section_ = nullptr;
}

// While the bytes are still in cache.
void LaneReader::digest(size_t bytes) {
    if (!section_) return;
    bytes = std::min<size_t>(bytes, header_.payload_bytes - received_);
    digested_ = uint32_t(bytes);
    for (size_t i = 0; bytes > 0; ++i) {
        const size_t part = std::min(bytes, iov_[i].iov_len);
        crc_ = crc32c(crc_, iov_[i].iov_base, part);
        bytes -= part;
    }
    if (received_ + digested_ == header_.payload_bytes) section_->land(crc_);
}

// What a section has digested is done; a discarded payload is nobody's proof.
void LaneReader::consume_chunk(size_t bytes) {
    received_ += uint32_t(bytes);
    digested_ -= std::min(digested_, uint32_t(bytes));
    if (received_ == header_.payload_bytes) payload_complete();
}

void LaneReader::advance(size_t bytes) {
    const size_t due = reads_ahead_ ? std::min(bytes, iov_[0].iov_len) : bytes;
    consume(due);
    const uint8_t* ahead = ahead_;
    for (size_t left = bytes - due; left > 0;) {
        targets();
        size_t copied = 0;
        for (size_t i = 0; i < iov_count_ && copied < left; ++i) {
            const size_t part = std::min(iov_[i].iov_len, left - copied);
            std::memcpy(iov_[i].iov_base, ahead + copied, part);
            copied += part;
        }
        ahead += copied;
        left -= copied;
        consume(copied);
    }
}

void LaneReader::feed(const uint8_t* bytes, size_t count) {
    for (size_t at = 0; at < count;) {
        const iovec* iov;
        const size_t iov_count = next_iovecs(&iov);
        size_t copied = 0;
        for (size_t i = 0; i < iov_count && at + copied < count; ++i) {
            const size_t part = std::min(iov[i].iov_len, count - at - copied);
            std::memcpy(iov[i].iov_base, bytes + at + copied, part);
            copied += part;
        }
        at += copied;
        advance(copied);
    }
}

// `bytes` bytes have arrived in the targets.
void LaneReader::consume(size_t bytes) {
    if (state_ == State::CHUNK && !digested_ && !target_->discards()) {
        section_ = target_;
        digest(bytes);
        section_ = nullptr;
    }
    for (size_t i = 0; i < iov_count_ && bytes > 0; ++i) {
        const size_t part = std::min(bytes, iov_[i].iov_len);
        bytes -= part;
        if (state_ == State::CHUNK) {
            consume_chunk(part);
            continue;
        }
        received_ += uint32_t(part);
        if (state_ == State::HEADER && received_ == HEADER_BYTES)
            header_complete();
        else if (state_ == State::CONTROL && received_ == header_.payload_bytes)
            payload_complete();
    }
}

void LaneReader::header_complete() {
    header_ = decode_header(header_bytes_, limits_);
    received_ = 0;
    crc_ = 0;
    if (closed_)
        throw Error(ErrorCode::STATE_INVALID,
                    std::string(frame_type_name(header_.type)) + " after CLOSE");
    if (header_.type == FrameType::INDEX || header_.type == FrameType::COMMIT)
        throw Error(ErrorCode::STATE_INVALID,  // an INDEX may be large: no room is made for it
                    std::string(frame_type_name(header_.type)) + " is a file's frame");
    closed_ = header_.type == FrameType::CLOSE;
    if (header_.type == FrameType::CHUNK) {
        state_ = State::CHUNK;
        target_ = handler_.on_chunk(lane_, header_);
        is_timed_ = header_.payload_bytes >= TIMED_BYTES_MIN && sampler_.next();
        receive_ns_ = digest_ns_ = 0;
        return;
    }
    state_ = State::CONTROL;
    if (header_.payload_bytes > control_capacity_) {
        control_.reset(new uint8_t[header_.payload_bytes]);
        control_capacity_ = header_.payload_bytes;
    }
    if (header_.payload_bytes == 0) payload_complete();
}

void LaneReader::payload_complete() {
    const State finished = state_;
    state_ = State::HEADER;
    received_ = 0;
    if (finished == State::CHUNK) {
        if (receive_ns_) handler_.on_chunk_times(lane_, receive_ns_, digest_ns_);
        is_timed_ = false;
        handler_.on_chunk_end(lane_, crc_);
        return;
    }
    check_control_payload(header_, control_.get());
    if (header_.is_known())
        handler_.on_control(lane_, header_, ByteSpan{control_.get(), header_.payload_bytes});
    if (control_capacity_ > CONTROL_KEPT_BYTES) {
        control_.reset();
        control_capacity_ = 0;
    }
}

void LaneReader::end_of_stream() const {
    if (state_ == State::HEADER && received_ == 0) return;
    const uint64_t due = state_ == State::HEADER ? HEADER_BYTES : header_.payload_bytes;
    throw Error(ErrorCode::TRUNCATED,
                std::string("stream ended inside ") +
                    (state_ == State::HEADER ? "a frame header" : frame_type_name(header_.type)),
                due, received_, 0);
}

}  // namespace kvwire
