// Handing chunks to lanes, and saying things again after a lane was lost: the other half of
// SendLink.

#include <algorithm>

#include "checksum/crc32c.hpp"
#include "codec/codec.hpp"
#include "wire/send_link.hpp"

namespace kvwire {
namespace {

// A lane gets work until it holds this much: one chunk of the usual size, which then is still in
// cache when the kernel copies it, or many small ones in one system call.
constexpr size_t BATCH_BYTES = 64 << 10;

bool is_known(const SendTransfer::Segment& segment) {
    return segment.crcs_known == segment.chunks.size();
}

}  // namespace

bool SendLink::load(uint32_t lane_index) {
    LaneWriter& writer = lanes_.at(lane_index).writer;
    const bool serves = liveness_.serves(lane_index);
    while (serves && writer.queued_bytes() < BATCH_BYTES && !turns_.empty()) {
        const std::shared_ptr<SendTransfer> transfer = turns_.next();
        if (!dispatch(lane_index, *transfer)) turns_.remove(*transfer);
    }
    return !writer.empty();
}

bool SendLink::refill(uint32_t lane_index) {
    LaneWriter& writer = lanes_.at(lane_index).writer;
    while (load(lane_index) && writer.begin_preparing()) {
        writer.prepare();
        commit(lane_index);
    }
    return !writer.empty();
}

size_t SendLink::backlog(size_t most, uint64_t* bytes) const {
    size_t batches = 0;
    for (const auto& [serial, waiting] : turns_.by_age()) {
        if (batches >= most) break;
        const SendTransfer& transfer = *waiting;
        batches += !transfer.resend.empty();
        for (auto at = transfer.to_dispatch.begin();
             at != transfer.to_dispatch.end() && batches < most; ++at) {
            const SendTransfer::Segment& segment = *transfer.segments[at->second];
            if (segment.complete) continue;
            const size_t unsent = segment.chunks.size() - segment.next_unsent;
            batches += unsent ? unsent : segment.end_due && is_known(segment);
            if (unsent)
                *bytes += unsent * segment.announcement.chunk_raw_bytes(segment.next_unsent);
        }
        batches += batches == 0 && transfer.end_due && transfer.finished;
    }
    return std::min(batches, most);
}

// Gives the lane one chunk, or the frames that end a segment or the transfer.
bool SendLink::dispatch(uint32_t lane, SendTransfer& transfer) {
    if (!transfer.grant) return false;
    if (dispatch_chunk(lane, transfer)) return true;
    return !transfer.ended && maybe_send_end(lane, transfer);
}

bool SendLink::dispatch_chunk(uint32_t lane, SendTransfer& transfer) {
    const auto fits = [&](const SendTransfer::Segment& segment, uint32_t chunk) {
        const uint64_t bytes = segment.announcement.chunk_raw_bytes(chunk);
        return transfer.in_flight_bytes + bytes <= transfer.grant->window_bytes;
    };
    while (!transfer.resend.empty()) {
        const auto [segment_index, chunk] = transfer.resend.front();
        SendTransfer::Segment& segment = *transfer.segments[segment_index];
        if (!segment.complete && segment.chunks[chunk].state == SendTransfer::Chunk::UNSENT) {
            if (!fits(segment, chunk)) return false;
            transfer.resend.pop_front();
            ++segment.chunks[chunk].attempt;
            send_chunk(lane, transfer, segment, chunk);
            return true;
        }
        transfer.resend.pop_front();  // receipted meanwhile
    }
    for (auto at = transfer.to_dispatch.begin(); at != transfer.to_dispatch.end();) {
        SendTransfer::Segment& segment = *transfer.segments[at->second];
        if (!segment.complete && segment.next_unsent < segment.chunks.size()) {
            if (!fits(segment, segment.next_unsent)) return false;
            send_chunk(lane, transfer, segment, segment.next_unsent++);
            return true;
        }
        if (!segment.complete && segment.end_due && !is_known(segment)) {
            ++at;  // other lanes are still preparing its chunks
            continue;
        }
        at = transfer.to_dispatch.erase(at);
        if (segment.complete || !segment.end_due) continue;
        send_segment_end(lane, transfer, segment);
        return true;
    }
    return false;
}

void SendLink::announce(uint32_t lane, const SendTransfer& transfer,
                        SendTransfer::Segment& segment) {
    const uint64_t bit = uint64_t(1) << lane;
    if (segment.announced_lanes & bit) return;
    segment.announced_lanes |= bit;
    lanes_.at(lane).writer.control(FrameType::SEGMENT, transfer.id, segment.index,
                                   segment.announcement_payload);
}

void SendLink::send_chunk(uint32_t lane_index, SendTransfer& transfer,
                          SendTransfer::Segment& segment, uint32_t chunk_index) {
    announce(lane_index, transfer, segment);
    SendTransfer::Chunk& chunk = segment.chunks[chunk_index];
    FrameHeader header;
    header.type = FrameType::CHUNK;
    header.transfer_id = transfer.id;
    header.segment_index = segment.index;
    header.attempt = chunk.attempt;
    header.raw_offset = uint64_t(chunk_index) * segment.announcement.chunk_bytes;
    header.raw_bytes = segment.announcement.chunk_raw_bytes(chunk_index);
    chunk.state = SendTransfer::Chunk::IN_FLIGHT;
    chunk.lane = uint8_t(lane_index);
    transfer.in_flight_bytes += header.raw_bytes;
    const StagedChunk* const staged =
        segment.staged ? &segment.staged->chunks[chunk_index] : nullptr;
    const uint32_t permitted = staged ? 1 : permitted_codecs(transfer);
    CodecChoice::Pick pick{Codec(permitted == 1 ? 0 : transfer.codec)};
    if (transfer.codec == CODEC_AUTO && !segment.rounding && !staged)
        pick = choice_.next(segment.kind, permitted);
    lanes_.at(lane_index).writer.chunk(
        header, {&segment.placement, &segment, pick.codec, segment.item_bytes,
                 segment.coding.get(), &tables_, segment.rounding.get(), staged,
                 pick.timed, pick.sampled});
}

// What a device made must be the segment that it is announced as.
void SendLink::check_staged(const SendTransfer::Segment& segment) {
    if (!segment.staged) return;
    const SegmentAnnouncement& announced = segment.announcement;
    const std::vector<StagedChunk>& chunks = segment.staged->chunks;
    bool fits = segment.staged->chunk_bytes == announced.chunk_bytes &&
                chunks.size() == announced.chunk_count();
    for (uint32_t i = 0; fits && i < chunks.size(); ++i) {
        const uint32_t raw_bytes = announced.chunk_raw_bytes(i);
        fits = chunks[i].codec == Codec::RAW ? chunks[i].payload_bytes == raw_bytes
                                             : chunks[i].payload_bytes < raw_bytes;
    }
    if (!fits)
        throw Error(ErrorCode::INTERNAL, "staged chunks are not those of their segment",
                    announced.chunk_count(), chunks.size());
}

uint32_t SendLink::agreed_codecs(const SendTransfer& transfer) const {
    return transfer.grant->codecs & transfer.manifest.codecs & options_.codecs & peer_codecs_;
}

uint32_t SendLink::permitted_codecs(const SendTransfer& transfer) const {
    const uint32_t named = transfer.codec == CODEC_AUTO ? ~0u : 1 | 1u << transfer.codec;
    return agreed_codecs(transfer) & named;
}

bool SendLink::commit(uint32_t lane) {
    bool all_live = true;
    lanes_.at(lane).writer.commit([&](const LaneWriter::Prepared& chunk) {
        const bool live = take_checksum(lane, chunk);
        all_live = all_live && live;
        return live;
    });
    const auto names = tables_.names_to_say();  // of tables that have just been used
    if (!names.empty())
        lanes_.at(lane).writer.control(FrameType::TABLE_NAMES, Id{}, 0, encode(names));
    return all_live;
}

// False: the transfer has failed.
bool SendLink::take_checksum(uint32_t lane, const LaneWriter::Prepared& prepared) {
    const FrameHeader& header = prepared.header;
    auto& segment = *static_cast<SendTransfer::Segment*>(prepared.source.owner);
    SendTransfer& transfer = *find(header.transfer_id);
    if (transfer.codec == CODEC_AUTO && prepared.was_usual && !segment.rounding && !segment.staged)
        choice_.coded(segment.kind, prepared.source.codec, header.raw_bytes, header.payload_bytes,
                      prepared.coding_ns);
    if (prepared.tiered_bytes)
        choice_.predicted(segment.kind, header.raw_bytes, prepared.tiered_bytes);
    SendTransfer::Chunk& chunk =
        segment.chunks[size_t(header.raw_offset / segment.announcement.chunk_bytes)];
    if (!staged_is_intact(transfer, segment, header)) return false;
    if (!source_is_unchanged(transfer, segment, chunk, header)) return false;
    transfer.observer.on_sent(header.payload_bytes, header.attempt != 0);
    if (is_known(segment) && segment.end_due && segment.next_unsent == segment.chunks.size())
        send_segment_end(lane, transfer, segment);
    wake(transfer);
    return true;
}

// Of a raw chunk the device's checksum is that of the payload; what a coded one lost on its way to
// the host shows when it is decoded.
bool SendLink::staged_is_intact(SendTransfer& transfer, const SendTransfer::Segment& segment,
                                const FrameHeader& header) {
    if (!segment.staged || header.codec != 0 || header.payload_crc == header.raw_crc) return true;
    fail(transfer, Error(ErrorCode::RAW_CORRUPT,
                         "segment " + std::to_string(header.segment_index) +
                             ": what came from the device is not what it read; checksum " +
                             hex32(header.raw_crc) + " there, " + hex32(header.payload_crc) +
                             " here",
                         header.raw_crc, header.payload_crc, header.raw_offset));
    return false;
}

bool SendLink::source_is_unchanged(SendTransfer& transfer, SendTransfer::Segment& segment,
                                   SendTransfer::Chunk& chunk, const FrameHeader& header) {
    if (chunk.crc_known && chunk.raw_crc != header.raw_crc) {
        fail(transfer, Error(ErrorCode::SOURCE_CHANGED,
                             "segment " + std::to_string(header.segment_index) +
                                 ": the lent source memory was modified during the transfer; "
                                 "checksum " +
                                 hex32(chunk.raw_crc) + " at first, " + hex32(header.raw_crc) +
                                 " now",
                             chunk.raw_crc, header.raw_crc, header.raw_offset));
        return false;
    }
    chunk.raw_crc = header.raw_crc;
    segment.crcs_known += !chunk.crc_known;
    chunk.crc_known = true;
    return true;
}

void SendLink::send_segment_end(uint32_t lane, SendTransfer& transfer,
                                SendTransfer::Segment& segment) {
    announce(lane, transfer, segment);
    segment.digest = segment_digest(segment.announcement, segment.chunks);
    segment.end_due = false;
    transfer.segments_ended += !segment.ended;
    segment.ended = true;
    lanes_.at(lane).writer.control(
        FrameType::SEGMENT_END, transfer.id, segment.index,
        encode(SegmentEnd{segment.announcement.chunk_count(), segment.digest}));
    maybe_send_end(lane, transfer);
}

Done SendLink::summary(const SendTransfer& transfer) const {
    Done done;
    for (const auto& segment : transfer.segments) {
        const uint64_t raw_bytes = segment->announcement.raw_bytes;
        done.raw_bytes += raw_bytes;
        done.digest = digest_segment(done.digest, segment->index, segment->digest, raw_bytes);
    }
    return done;
}

bool SendLink::maybe_send_end(uint32_t lane, SendTransfer& transfer) {
    if (!transfer.end_due || !transfer.finished ||
        transfer.pushes_announced != transfer.pushes.size() ||
        transfer.segments_ended != transfer.segments.size())
        return false;
    const Done total = summary(transfer);
    End end;
    end.segment_count = uint32_t(transfer.segments.size());
    end.digest = total.digest;
    end.raw_bytes = total.raw_bytes;
    end.metadata_count = transfer.end_metadata_count;
    end.metadata = transfer.end_metadata;
    transfer.end_said = true;
    transfer.end_due = false;
    lanes_.at(lane).writer.control(FrameType::END, transfer.id, 0, encode(end));
    return true;
}

// Section 10, lost and stalled lanes.
void SendLink::requeue(SendTransfer& transfer, uint32_t lane) {
    for (const auto& segment : transfer.segments) {
        if (segment->complete) continue;
        for (uint32_t i = 0; i < segment->chunks.size(); ++i) {
            SendTransfer::Chunk& chunk = segment->chunks[i];
            if (chunk.state != SendTransfer::Chunk::IN_FLIGHT || chunk.lane != lane) continue;
            chunk.state = SendTransfer::Chunk::UNSENT;
            transfer.in_flight_bytes -= segment->announcement.chunk_raw_bytes(i);
            transfer.resend.emplace_back(segment->index, i);
        }
        if (!segment->ended) continue;
        segment->end_due = true;
        transfer.to_dispatch.emplace(-int64_t(segment->priority), segment->index);
    }
    transfer.end_due = true;  // load() says it all again, as lanes drain
    wake(transfer);
}

}  // namespace kvwire
