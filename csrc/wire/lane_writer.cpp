#include "wire/lane_writer.hpp"

#include <algorithm>

#include "checksum/crc32c.hpp"

namespace kvwire {
namespace {
constexpr size_t SPARE_BUFFERS_MAX = 2;
constexpr size_t ZEROS_BYTES = 65536;
const uint8_t zeros[ZEROS_BYTES] = {};
}  // namespace

void LaneWriter::control(FrameType type, const Id& transfer_id, uint32_t segment_index,
                         const Bytes& payload) {
    if (entries_.empty() || !entries_.back().is_control) {
        entries_.emplace_back();
        entries_.back().is_control = true;
    }
    FrameHeader header;
    header.type = type;
    header.transfer_id = transfer_id;
    header.segment_index = segment_index;
    header.payload_bytes = uint32_t(payload.size());
    header.payload_crc = crc32c(0, payload.data(), payload.size());
    Bytes& head = entries_.back().head;
    const size_t at = head.size();
    head.resize(at + HEADER_BYTES);
    encode_header(header, head.data() + at);
    head.insert(head.end(), payload.begin(), payload.end());
    queued_bytes_ += HEADER_BYTES + payload.size();
    queued_control_bytes_ += HEADER_BYTES + payload.size();
}

void LaneWriter::push_chunk(Entry&& entry, const FrameHeader& header) {
    entry.head.resize(HEADER_BYTES);
    encode_header(header, entry.head.data());
    entry.payload_bytes = header.payload_bytes;
    queued_bytes_ += entry.total();
    entries_.push_back(std::move(entry));
}

void LaneWriter::chunk(const FrameHeader& header, const Placement* placement, const void* owner) {
    Entry entry;
    entry.placement = placement;
    entry.offset = header.raw_offset;
    entry.owner = owner;
    push_chunk(std::move(entry), header);
}

void LaneWriter::chunk(const FrameHeader& header, Bytes payload, const void* owner) {
    Entry entry;
    entry.body = std::move(payload);
    entry.owner = owner;
    push_chunk(std::move(entry), header);
}

Bytes LaneWriter::borrow_buffer() {
    if (spare_.empty()) return {};
    Bytes buffer = std::move(spare_.back());
    spare_.pop_back();
    return buffer;
}

void LaneWriter::detach(const void* owner) {
    for (Entry& entry : entries_)
        if (entry.owner == owner) {
            entry.owner = nullptr;
            if (!entry.placement) continue;  // a coded payload is the writer's own
            entry.placement = nullptr;
            entry.zeros = true;
        }
}

size_t LaneWriter::entry_iovecs(const Entry& entry, size_t at) {
    uint64_t sent = entry.sent;
    if (sent < entry.head.size()) {
        iov_[at++] = {const_cast<uint8_t*>(entry.head.data()) + sent, entry.head.size() - sent};
        sent = entry.head.size();
    }
    uint64_t done = sent - entry.head.size();
    if (done == entry.payload_bytes) return at;
    if (entry.placement) {
        uint64_t covered;
        return at + entry.placement->iovecs(entry.offset + done, entry.payload_bytes - done,
                                            iov_.data() + at, IOV_MAX_WRITE - at, &covered);
    }
    if (!entry.zeros) {
        iov_[at++] = {const_cast<uint8_t*>(entry.body.data()) + done,
                      size_t(entry.payload_bytes - done)};
        return at;
    }
    while (done < entry.payload_bytes && at < IOV_MAX_WRITE) {
        const size_t part = size_t(std::min<uint64_t>(ZEROS_BYTES, entry.payload_bytes - done));
        iov_[at++] = {const_cast<uint8_t*>(zeros), part};
        done += part;
    }
    return at;
}

size_t LaneWriter::next_iovecs(const iovec** iov) {
    iov_.resize(IOV_MAX_WRITE);
    size_t count = 0;
    for (const Entry& entry : entries_) {
        if (count + 2 > IOV_MAX_WRITE) break;
        const size_t before = count;
        count = entry_iovecs(entry, count);
        uint64_t bytes = 0;
        for (size_t i = before; i < count; ++i) bytes += iov_[i].iov_len;
        if (bytes != entry.total() - entry.sent) break;  // ran out of iovecs inside it
    }
    *iov = iov_.data();
    return count;
}

void LaneWriter::advance(size_t bytes) {
    queued_bytes_ -= bytes;
    while (bytes > 0) {
        Entry& entry = entries_.front();
        const uint64_t rest = entry.total() - entry.sent;
        if (bytes < rest) {
            entry.sent += bytes;
            return;
        }
        bytes -= size_t(rest);
        if (entry.is_control) queued_control_bytes_ -= entry.head.size();
        if (!entry.body.empty() && spare_.size() < SPARE_BUFFERS_MAX)
            spare_.push_back(std::move(entry.body));
        entries_.pop_front();
    }
}

}  // namespace kvwire
