#include "wire/lane_reader.hpp"

#include <algorithm>
#include <cstring>

#include "checksum/crc32c.hpp"

namespace kvwire {
namespace {
constexpr size_t CONTROL_KEPT_BYTES = 65536;  // larger control buffers go back after use
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
        iov_count_ = target_->placement->iovecs(target_->offset + received_, rest, iov_,
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

void LaneReader::consume_chunk(const iovec& piece, size_t bytes) {
    // While the bytes are still in cache; a discarded payload is nobody's proof.
    if (!target_->discards()) crc_ = crc32c(crc_, piece.iov_base, bytes);
    received_ += uint32_t(bytes);
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
    for (size_t i = 0; i < iov_count_ && bytes > 0; ++i) {
        const size_t part = std::min(bytes, iov_[i].iov_len);
        bytes -= part;
        if (state_ == State::CHUNK) {
            consume_chunk(iov_[i], part);
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
    closed_ = header_.type == FrameType::CLOSE;
    if (header_.type == FrameType::CHUNK) {
        state_ = State::CHUNK;
        target_ = handler_.on_chunk(lane_, header_);
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
        handler_.on_chunk_end(lane_, crc_);
        return;
    }
    check_control_payload(header_, control_.get());
    if (!header_.skippable())
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
