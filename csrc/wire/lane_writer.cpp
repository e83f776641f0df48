#include "wire/lane_writer.hpp"

#include <sched.h>

#include <algorithm>

#include "base/cpu_clock.hpp"
#include "checksum/crc32c.hpp"

namespace kvwire {
namespace {
constexpr size_t SPARE_BUFFERS_MAX = 2;
constexpr size_t ZEROS_BYTES = 65536;
const uint8_t zeros[ZEROS_BYTES] = {};
}  // namespace

void LaneWriter::control(FrameType type, const Id& transfer_id, uint32_t segment_index,
                         const Bytes& payload) {
    // What the kernel may be reading just now must not move.
    if (entries_.size() <= lent_entries_ || entries_.back().state != Entry::CONTROL ||
        entries_.back().lent_until)
        entries_.emplace_back();
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

void LaneWriter::chunk(const FrameHeader& header, const Source& source) {
    entries_.emplace_back();
    Entry& entry = entries_.back();
    entry.state = Entry::QUEUED;
    entry.header = header;
    entry.source = source;
    entry.lender = source.owner;
    entry.head.resize(HEADER_BYTES);
    const bool from_pages = source.staged || (source.codec == Codec::RAW && !source.rounding &&
                                              source.placement->suits_iovecs());
    if (!from_pages && !spare_.empty()) {
        entry.body = std::move(spare_.back());
        spare_.pop_back();
    }
    queued_bytes_ += HEADER_BYTES + header.raw_bytes;
}

bool LaneWriter::begin_preparing() {
    preparing_.clear();
    for (Entry& entry : entries_) {
        if (entry.state != Entry::QUEUED) continue;
        entry.state = Entry::PREPARING;
        preparing_.push_back(&entry);
    }
    return !preparing_.empty();
}

void LaneWriter::prepare() {
    for (Entry* entry : preparing_) prepare(*entry);
}

void LaneWriter::prepare(Entry& entry) {
    const uint64_t began_ns = entry.source.timed ? thread_cpu_ns() : 0;
    code(entry);
    entry.was_usual = encoder_.was_usual();
    if (entry.source.timed) entry.coding_ns = uint32_t(thread_cpu_ns() - began_ns);
    const Source& source = entry.source;
    if (source.sampled && source.coding)
        entry.tiered_bytes = source.coding->predict(SegmentCoding::samples_of(*source.placement),
                                                    entry.header.raw_offset,
                                                    entry.header.raw_bytes);
}

void LaneWriter::code(Entry& entry) {
    FrameHeader& header = entry.header;
    const Placement& placement = *entry.source.placement;
    const Source& source = entry.source;
    if (const StagedChunk* const staged = source.staged) {
        header.codec = uint8_t(staged->codec);
        header.payload_bytes = staged->payload_bytes;
        header.raw_crc = staged->raw_crc;
        header.payload_crc = crc32c(0, staged->payload, staged->payload_bytes);
    } else if (source.rounding) {
        if (!rounder_) rounder_ = std::make_unique<ChunkRounder>();
        rounder_->encode(placement, *source.rounding, source.tables, &header, &entry.body);
    } else if (!encoder_.encode(source.codec, placement, source.item_bytes, source.coding,
                                source.tables, &header, &entry.body)) {
        header.codec = 0;
        header.payload_bytes = header.raw_bytes;
        if (placement.suits_iovecs()) {
            entry.body.clear();
            header.raw_crc = placement.crc32c(header.raw_offset, header.raw_bytes);
        } else {
            entry.body.resize(header.raw_bytes);
            placement.gather(header.raw_offset, header.raw_bytes, entry.body.data());
            header.raw_crc = crc32c(0, entry.body.data(), entry.body.size());
        }
        header.payload_crc = header.raw_crc;
    }
    entry.payload_bytes = header.payload_bytes;
    encode_header(header, entry.head.data());
}

void LaneWriter::wait_for_section() const {
    while (in_section.load(std::memory_order_acquire)) ::sched_yield();
}

void LaneWriter::detach(const void* owner) {
    const auto owned = [owner](const Entry& entry) { return entry.source.owner == owner; };
    if (std::none_of(entries_.begin(), entries_.end(), owned)) return;
    wait_for_section();
    for (auto entry = entries_.begin(); entry != entries_.end();) {
        if (!owned(*entry)) {
            ++entry;
            continue;
        }
        if (is_waiting(*entry)) {
            queued_bytes_ -= HEADER_BYTES + entry->header.raw_bytes;
            recycle(std::move(entry->body));
            entry = entries_.erase(entry);
            continue;
        }
        entry->source.owner = nullptr;
        entry->zeros = entry->body.empty();  // a coded payload is the writer's own
        ++entry;
    }
}

void LaneWriter::recycle(Bytes&& buffer) {
    if (!buffer.empty() && spare_.size() < SPARE_BUFFERS_MAX) spare_.push_back(std::move(buffer));
}

size_t LaneWriter::entry_iovecs(const Entry& entry, size_t at) {
    uint64_t sent = entry.sent;
    if (sent < entry.head.size()) {
        iov_[at++] = {const_cast<uint8_t*>(entry.head.data()) + sent, entry.head.size() - sent};
        sent = entry.head.size();
    }
    uint64_t done = sent - entry.head.size();
    if (done == entry.payload_bytes) return at;
    if (!entry.body.empty()) {
        iov_[at++] = {const_cast<uint8_t*>(entry.body.data()) + done,
                      size_t(entry.payload_bytes - done)};
        return at;
    }
    if (!entry.zeros && entry.source.staged) {
        iov_[at++] = {const_cast<uint8_t*>(entry.source.staged->payload) + done,
                      size_t(entry.payload_bytes - done)};
        return at;
    }
    if (!entry.zeros) {
        uint64_t covered;
        return at + entry.source.placement->iovecs(entry.header.raw_offset + done,
                                                   entry.payload_bytes - done, iov_.data() + at,
                                                   IOV_MAX_WRITE - at, &covered);
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
    lent_entries_ = 0;
    size_t count = 0;
    for (const Entry& entry : entries_) {
        if (count + 2 > IOV_MAX_WRITE || is_waiting(entry)) break;
        const size_t before = count;
        count = entry_iovecs(entry, count);
        ++lent_entries_;
        uint64_t bytes = 0;
        for (size_t i = before; i < count; ++i) bytes += iov_[i].iov_len;
        if (bytes != entry.total() - entry.sent) break;  // ran out of iovecs inside it
    }
    *iov = iov_.data();
    return count;
}

void LaneWriter::advance(size_t bytes, bool lent) {
    lent_entries_ = in_doubt_ = 0;
    queued_bytes_ -= bytes;
    if (lent && bytes > 0) ++zero_copy_sends_;
    while (bytes > 0) {
        Entry& entry = entries_.front();
        if (lent) entry.lent_until = zero_copy_sends_;
        const uint64_t rest = entry.total() - entry.sent;
        if (bytes < rest) {
            entry.sent += bytes;
            return;
        }
        bytes -= size_t(rest);
        if (entry.state == Entry::CONTROL) queued_control_bytes_ -= entry.head.size();
        drop(entry);
        entries_.pop_front();
    }
}

void LaneWriter::drop(Entry& entry) {
    if (entry.lent_until == 0) return recycle(std::move(entry.body));
    const void* owner = entry.body.empty() ? entry.lender : nullptr;
    loans_->keep(owner, std::move(entry.head), std::move(entry.body), entry.lent_until);
}

bool LaneWriter::lends(const void* owner) const {
    if (zero_copy_sends_ == 0 && in_doubt_ == 0) return false;
    for (size_t i = 0; i < entries_.size() && (i == 0 || i < in_doubt_); ++i) {
        const Entry& entry = entries_[i];
        const bool lent = i < in_doubt_ || !loans_->is_returned(entry.lent_until);
        if (entry.lender == owner && entry.body.empty() && lent) return true;
    }
    return loans_->holds(owner);
}

void LaneWriter::retire() {
    if (!entries_.empty()) drop(entries_.front());  // only the first can be under way
    entries_.clear();
}

}  // namespace kvwire
