// Chunks, write leases, receipts and the ends of transfers: the other half of ReceiveLink.

#include <algorithm>

#include "checksum/crc32c.hpp"
#include "wire/receive_link.hpp"

namespace kvwire {
namespace {

// Honest senders may land more than one window: what went with lost lanes goes again.
constexpr uint64_t LANDED_WINDOWS_MAX = 4;
constexpr size_t PART_HEADER_BYTES = 16, PART_CODED_BYTES_AT = 4, PART_TABLE_AT = 8;

// The link's tables that the parts of a payload name, as far as their headers can be followed.
std::map<uint32_t, std::shared_ptr<const CodeTable>> tables_named(const ReceiveTables& known,
                                                                  const FrameHeader& header,
                                                                  const uint8_t* payload) {
    std::map<uint32_t, std::shared_ptr<const CodeTable>> found;
    if (Codec(header.codec) != Codec::TIERED) return found;
    for (size_t at = 0; at + PART_HEADER_BYTES <= header.payload_bytes;) {
        const uint32_t index = load_le<uint32_t>(payload + at + PART_TABLE_AT);
        if (auto table = index ? known.find(index) : nullptr) found[index] = std::move(table);
        const uint32_t coded_bytes = load_le<uint32_t>(payload + at + PART_CODED_BYTES_AT);
        if (coded_bytes < PART_HEADER_BYTES || coded_bytes > header.payload_bytes - at) break;
        at += coded_bytes;
    }
    return found;
}

}  // namespace

ChunkTarget* ReceiveLink::on_chunk(uint32_t lane_index, const FrameHeader& header) {
    lane_heard_ = lane_index;
    Lane& lane = lanes_.at(lane_index);
    lane.target.revoke();
    lane.target.header = header;
    lane.room.reset();
    lane.transfer = nullptr;
    lane.segment = nullptr;
    Transfer* transfer = find(header.transfer_id);
    if (!transfer) {
        on_stray(header);
        return &lane.target;
    }
    try {
        if (header.table_index != 0)
            throw Error(ErrorCode::TABLE_UNKNOWN,
                        "CHUNK: code table " + std::to_string(header.table_index) +
                            " is not known here",
                        0, header.table_index);
        if (header.codec > 31 || !(transfer->grant.codecs >> header.codec & 1))
            throw Error(ErrorCode::CODEC_UNSUPPORTED,
                        "CHUNK: codec " + std::to_string(header.codec) + " was not agreed on",
                        transfer->grant.codecs, header.codec);
        const auto segment = transfer->segments.find(header.segment_index);
        if (segment == transfer->segments.end())
            throw Error(ErrorCode::SEGMENT_INVALID, "CHUNK: its segment was not announced", 0,
                        header.segment_index);
        place_chunk(lane_index, *transfer, segment->second);
    } catch (const Error& error) {
        if (uint16_t(error.code) < 200) throw;
        fail(header.transfer_id, error);
    }
    return &lane.target;
}

// The lease table, section 10.
void ReceiveLink::place_chunk(uint32_t lane_index, Transfer& transfer, Segment& segment) {
    const FrameHeader& header = lanes_.at(lane_index).target.header;
    if (!segment.work)
        return owe(lane_index, transfer.id, {header.segment_index, 0, 0, segment.digest});
    const SegmentAnnouncement& announced = segment.work->announcement;
    if (header.raw_offset % announced.chunk_bytes || header.raw_offset >= announced.raw_bytes)
        throw Error(ErrorCode::FIELD_INVALID, "CHUNK: raw_offset is not on the segment's grid",
                    announced.chunk_bytes, header.raw_offset, header_at::RAW_OFFSET);
    const uint32_t index = uint32_t(header.raw_offset / announced.chunk_bytes);
    if (header.raw_bytes != announced.chunk_raw_bytes(index))
        throw Error(ErrorCode::FIELD_INVALID, "CHUNK: raw_bytes differs from the segment's grid",
                    announced.chunk_raw_bytes(index), header.raw_bytes, header_at::RAW_BYTES);
    Chunk& chunk = segment.work->chunks[index];
    if (chunk.state == Chunk::VERIFIED)
        return owe(lane_index, transfer.id, {header.segment_index, index, 1, 0});
    if (chunk.state == Chunk::LANDED) {  // the verdict will be on what is there
        if (header.attempt <= chunk.attempt) return;
        chunk.attempt = uint16_t(header.attempt);
        chunk.lane = uint8_t(lane_index);
        return;
    }
    if (chunk.state == Chunk::LEASED) {
        if (header.attempt <= chunk.attempt) return;
        revoke_lease(lanes_.at(chunk.lane));
    } else if (header.attempt < chunk.attempt) {
        return;
    }
    grant_lease(lane_index, transfer, *segment.work, chunk);
}

void ReceiveLink::grant_lease(uint32_t lane_index, Transfer& transfer, Work& segment,
                              Chunk& chunk) {
    Lane& lane = lanes_.at(lane_index);
    chunk.state = Chunk::LEASED;
    chunk.attempt = uint16_t(lane.target.header.attempt);
    chunk.lane = uint8_t(lane_index);
    lane.transfer = &transfer;
    lane.segment = &segment;
    if (!segment.touched)
        for (const Item& item : segment.announcement.items)
            transfer.ticket->observer().on_layer_touched(item.layer);
    segment.touched = true;
    const size_t raw_bytes = lane.target.header.raw_bytes;
    const Codec codec = Codec(lane.target.header.codec);
    if (const auto& zone = transfer.ticket->options().zone) {  // it is decoded elsewhere
        lane.room = LandingZone::take(zone, lane.target.header.payload_bytes);
        lane.target.staging = lane.room.get();
        return;
    }
    lane.target.placement = &segment.placement;
    lane.target.item_bytes = segment.item_bytes;
    lane.target.tables = &tables_;
    if (codec == Codec::RAW && segment.placement.suits_iovecs()) return;
    reserve_staging(lane, codec == Codec::LZ4 ? 3 * raw_bytes : raw_bytes);
    lane.target.staging = lane.staging.get();
}

void ReceiveLink::reserve_staging(Lane& lane, size_t bytes) {
    if (lane.staging_bytes >= bytes) return;
    lane.staging.reset(new uint8_t[bytes]);
    lane.staging_bytes = bytes;
}

void ReceiveLink::revoke_lease(Lane& lane) {
    if (lane.segment) {
        const uint32_t index =
            uint32_t(lane.target.header.raw_offset / lane.segment->announcement.chunk_bytes);
        lane.segment->chunks[index].state = Chunk::MISSING;
    }
    lane.target.revoke();
    lane.room.reset();
    lane.transfer = nullptr;
    lane.segment = nullptr;
}

void ReceiveLink::on_chunk_end(uint32_t lane_index, uint32_t payload_crc) {
    lane_heard_ = lane_index;
    Lane& lane = lanes_.at(lane_index);
    if (!lane.segment) return;  // read away: stray, stale or revoked
    Transfer& transfer = *lane.transfer;
    Work& work = *lane.segment;
    const FrameHeader header = lane.target.header;
    const Landing landing = lane.target.land(payload_crc);
    LandingZone::Room room = std::move(lane.room);
    lane.target.revoke();
    lane.transfer = nullptr;
    lane.segment = nullptr;
    if (!room || landing.verdict != ErrorCode::OK)
        return settle(lane_index, transfer, work, header, landing);
    transfer.landed_bytes += header.raw_bytes;
    if (transfer.landed_bytes > LANDED_WINDOWS_MAX * transfer.grant.window_bytes)
        return fail(header.transfer_id,
                    Error(ErrorCode::LIMIT_EXCEEDED, "chunks came without regard to the window",
                          transfer.grant.window_bytes, transfer.landed_bytes));
    const uint32_t chunk_bytes = work.announcement.chunk_bytes;
    work.chunks[size_t(header.raw_offset / chunk_bytes)].state = Chunk::LANDED;
    if (!work.landing) work.landing = std::make_shared<const Placement>(work.placement);
    const Ticket::Options& ticket = transfer.ticket->options();
    auto tables = tables_named(tables_, header, room.get());
    ticket.zone->push({ticket.id, header, chunk_bytes, work.landing, std::move(room),
                       std::move(tables)});
}

bool ReceiveLink::landed(const LandingZone::Landed& landed, ErrorCode verdict, uint32_t crc) {
    const FrameHeader& header = landed.header;
    Transfer* const transfer = find(header.transfer_id);
    if (!transfer) return false;
    const auto segment = transfer->segments.find(header.segment_index);
    if (segment == transfer->segments.end() || !segment->second.work) return false;
    Work& work = *segment->second.work;
    // Ids are the peer's choice, and two of its links may have the same; the placement is ours.
    if (work.landing != landed.placement) return false;
    Chunk& chunk = work.chunks[size_t(header.raw_offset / work.announcement.chunk_bytes)];
    if (chunk.state != Chunk::LANDED) return true;
    transfer->landed_bytes -= header.raw_bytes;
    if (verdict == ErrorCode::OK && crc != header.raw_crc) verdict = ErrorCode::RAW_CORRUPT;
    // On the chunk's own lane: with another one, that may die, the sender would not send it again.
    if (lanes_.count(chunk.lane))
        settle(chunk.lane, *transfer, work, header, {verdict, crc});
    else if (!lanes_.empty())
        settle(lane_to_answer(), *transfer, work, header, {verdict, crc});
    else
        chunk.state = Chunk::MISSING;  // it will come again, on the lanes that are to come
    return true;
}

// A chunk is in place, or must come again.
void ReceiveLink::settle(uint32_t lane_index, Transfer& transfer, Work& work,
                         const FrameHeader& header, const Landing& landing) {
    const uint32_t index = uint32_t(header.raw_offset / work.announcement.chunk_bytes);
    Chunk& chunk = work.chunks[index];
    if (landing.verdict != ErrorCode::OK)
        return chunk_failed(lanes_.at(lane_index).writer, header, chunk, landing.verdict,
                            landing.crc);
    chunk.state = Chunk::VERIFIED;
    chunk.raw_crc = header.raw_crc;
    ++work.verified;
    verified_bytes_ += header.raw_bytes;
    transfer.ticket->observer().on_bytes(header.raw_bytes, header.payload_bytes,
                                         chunk.failures != 0);
    owe(lane_index, transfer.id, {header.segment_index, index, 1, 0});
    try {
        maybe_complete(lane_index, transfer, header.segment_index,
                       transfer.segments.at(header.segment_index));
    } catch (const Error& error) {
        fail(header.transfer_id, error);
    }
}

void ReceiveLink::on_chunk_times(uint32_t lane_index, uint64_t receive_ns, uint64_t digest_ns) {
    const Lane& lane = lanes_.at(lane_index);
    if (!lane.segment) return;
    const FrameHeader& header = lane.target.header;
    meter_.received(header.payload_bytes, receive_ns);
    meter_.decoded(Codec(header.codec), lane.segment->dtype, header.raw_bytes, digest_ns);
    Speeds speeds;
    if (meter_.take_report(now_ns_, &speeds)) send(FrameType::SPEEDS, Id{}, encode(speeds));
}

void ReceiveLink::chunk_failed(LaneWriter& writer, const FrameHeader& header, Chunk& chunk,
                               ErrorCode reason, uint32_t actual) {
    chunk.state = Chunk::MISSING;
    Transfer& transfer = *find(header.transfer_id);
    const uint32_t chunk_bytes =
        transfer.segments.at(header.segment_index).work->announcement.chunk_bytes;
    const RepairEntry entry{header.segment_index, uint32_t(header.raw_offset / chunk_bytes),
                            chunk.attempt, reason,
                            reason == ErrorCode::PAYLOAD_CORRUPT ? header.payload_crc
                                                                 : header.raw_crc,
                            actual};
    if (++chunk.failures >= limits::attempts_max)
        return fail(transfer.id,
                    Error(ErrorCode::RETRIES_EXHAUSTED,
                          "segment " + std::to_string(entry.segment_index) + ", chunk " +
                              std::to_string(entry.chunk_index) + ": " + error_name(reason) +
                              " in " + std::to_string(chunk.failures) + " attempts; checksum " +
                              hex32(entry.expected) + " stated, " + hex32(actual) + " computed",
                          entry.expected, actual, header.raw_offset));
    writer.control(FrameType::REPAIR, transfer.id, 0,
                        encode(std::vector<RepairEntry>{entry}));
}

void ReceiveLink::owe(uint32_t lane_index, const Id& transfer_id, ReceiptEntry entry) {
    auto& receipts = lanes_.at(lane_index).receipts;
    if (!receipts.empty() && receipts.back().transfer_id == transfer_id) {
        ReceiptEntry& last = receipts.back().entry;
        const bool same_segment = last.segment_index == entry.segment_index;
        if (same_segment && entry.chunk_count && last.chunk_count &&
            last.chunk_first + last.chunk_count == entry.chunk_first) {
            last.chunk_count += entry.chunk_count;
            return;
        }
        if (same_segment && entry.chunk_count == 0) {  // the whole covers its chunks
            last = entry;
            return;
        }
    }
    receipts.push_back({transfer_id, entry});
}

void ReceiveLink::flush() {
    for (auto& [index, lane] : lanes_) {
        for (size_t i = 0; i < lane.receipts.size();) {
            std::vector<ReceiptEntry> entries;
            const Id id = lane.receipts[i].transfer_id;
            for (; i < lane.receipts.size() && lane.receipts[i].transfer_id == id &&
                   entries.size() < limits::receipt_count_max;
                 ++i)
                entries.push_back(lane.receipts[i].entry);
            lane.writer.control(FrameType::RECEIPT, id, 0, encode(entries));
        }
        lane.receipts.clear();
    }
}

void ReceiveLink::maybe_complete(uint32_t lane, Transfer& transfer, uint32_t segment_index,
                                 Segment& segment) {
    if (!segment.work || !segment.work->end) return;
    const Work& work = *segment.work;
    if (work.verified != work.chunks.size()) return;
    const uint32_t digest = segment_digest(work.announcement, work.chunks);
    if (digest != work.end->digest)
        throw Error(ErrorCode::DIGEST_MISMATCH,
                    "segment " + std::to_string(segment_index) + ": digest " +
                        hex32(work.end->digest) + " stated, " + hex32(digest) + " computed",
                    work.end->digest, digest);
    segment.digest = digest;
    ++transfer.complete_segments;
    for (size_t i = 0; i < work.announcement.items.size(); ++i)
        transfer.ticket->verified(*transfer.manifest, work.announcement.items[i], work.claimed[i]);
    segment.work.reset();
    state_bytes_ -= segment.state_bytes - SEGMENT_STATE_BYTES;
    segment.state_bytes = SEGMENT_STATE_BYTES;
    owe(lane, transfer.id, {segment_index, 0, 0, digest});
    maybe_done(lane, transfer);
}

void ReceiveLink::maybe_done(uint32_t lane_index, Transfer& transfer) {
    if (!transfer.end || transfer.complete_segments != transfer.end->segment_count) return;
    const End& end = *transfer.end;
    Done done;
    for (const auto& [index, segment] : transfer.segments) {
        done.digest = digest_segment(done.digest, index, segment.digest, segment.raw_bytes);
        done.raw_bytes += segment.raw_bytes;
    }
    if (done.raw_bytes != end.raw_bytes)
        throw Error(ErrorCode::INCOMPLETE, "END: raw_bytes is not the segments' sum",
                    done.raw_bytes, end.raw_bytes);
    if (done.digest != end.digest)
        throw Error(ErrorCode::DIGEST_MISMATCH,
                    "transfer digest " + hex32(end.digest) + " stated, " + hex32(done.digest) +
                        " computed",
                    end.digest, done.digest);
    const Id id = transfer.id;
    const Manifest& manifest = *transfer.manifest;
    const auto ticket = transfer.ticket;
    ticket->observer().on_metadata(manifest.source_rank, manifest.metadata,
                                   manifest.metadata_count, end.metadata, end.metadata_count);
    ticket->transfer_done(id, manifest);
    remember(id, {done, {}});
    forget(id);
    auto& receipts = lanes_.at(lane_index).receipts;  // DONE says it all
    receipts.erase(std::remove_if(receipts.begin(), receipts.end(),
                                  [&](const Lane::Receipt& r) { return r.transfer_id == id; }),
                   receipts.end());
    lanes_.at(lane_index).writer.control(FrameType::DONE, id, 0, encode(done));
}

void ReceiveLink::fail(Id transfer_id, const Error& error) {
    Transfer* transfer = find(transfer_id);
    if (!transfer) return;
    const auto ticket = transfer->ticket;
    drop(transfer_id, error);
    ticket->fail(error);
}

void ReceiveLink::drop(Id transfer_id, const Error& error) {
    if (!find(transfer_id)) return;
    remember(transfer_id, {std::nullopt, error});
    forget(transfer_id);
    send(FrameType::ABORT, transfer_id, encode(error));
}

void ReceiveLink::refuse(Id transfer_id, const Error& error) {
    remember(transfer_id, {std::nullopt, error});
    send(FrameType::ABORT, transfer_id, encode(error));
}

void ReceiveLink::forget(Id transfer_id) {
    const auto found = transfers_.find(transfer_id);
    if (found == transfers_.end()) return;
    Transfer* transfer = found->second.get();
    for (auto& [index, lane] : lanes_)
        if (lane.transfer == transfer) revoke_lease(lane);
    state_bytes_ -= transfer->state_bytes;
    for (const auto& [index, segment] : transfer->segments) state_bytes_ -= segment.state_bytes;
    transfers_.erase(found);
}

void ReceiveLink::remember(Id transfer_id, Ended ended) {
    if (!ended_.emplace(transfer_id, std::move(ended)).second) return;
    ended_order_.push_back(transfer_id);
    if (ended_order_.size() > limits::ended_transfers_min) {
        ended_.erase(ended_order_.front());
        overtaken_.erase(ended_order_.front());
        ended_order_.pop_front();
    }
}

void ReceiveLink::send_grant(const Transfer& transfer) {
    send(FrameType::GRANT, transfer.id, encode(transfer.grant));
}

void ReceiveLink::send(FrameType type, const Id& transfer_id, const Bytes& payload) {
    if (lanes_.empty()) return;
    lanes_.at(lane_to_answer()).writer.control(type, transfer_id, 0, payload);
}

// There is a lane.
uint32_t ReceiveLink::lane_to_answer() {
    auto able = lanes_.find(lane_heard_);
    if (able == lanes_.end() || !liveness_.serves(lane_heard_))
        able = std::find_if(lanes_.begin(), lanes_.end(), [&](const auto& entry) {
            return liveness_.serves(entry.first);
        });
    return (able == lanes_.end() ? lanes_.begin() : able)->first;
}

void ReceiveLink::say_end(const Id& transfer_id) {
    const Ended& ended = ended_.at(transfer_id);
    if (ended.done) return send(FrameType::DONE, transfer_id, encode(*ended.done));
    send(FrameType::ABORT, transfer_id, encode(ended.error));
}

ReceiveLink::Transfer* ReceiveLink::find(const Id& transfer_id) {
    const auto found = transfers_.find(transfer_id);
    return found == transfers_.end() ? nullptr : found->second.get();
}

}  // namespace kvwire
