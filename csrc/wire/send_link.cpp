#include "wire/send_link.hpp"

#include <algorithm>

#include "wire/segment_coding.hpp"

namespace kvwire {
namespace {

constexpr size_t RECENT_ABORTS_KEPT = 64;
constexpr uint64_t BUSY_NS = 40'000'000;

TensorKind main_kind(const Manifest& manifest, const std::vector<Item>& items) {
    std::map<TensorKind, uint64_t> bytes;
    for (const Item& item : items) {
        const GroupDesc& group = manifest.groups[item.group];
        const TensorDesc& tensor = group.tensors[item.tensor];
        bytes[{group.kind, tensor.dtype}] += item_raw_bytes(tensor, item);
    }
    return std::max_element(bytes.begin(), bytes.end(), [](const auto& a, const auto& b) {
        return a.second < b.second;
    })->first;
}

}  // namespace

SendLink::SendLink(OfferBook& offers, SendOptions options)
    : LinkMachine(options.liveness), offers_(offers), options_(std::move(options)),
      choice_(options_.coding_record) {
    if (!options_.code_book) options_.code_book = std::make_shared<CodeBook>();
}

SendLink::~SendLink() {
    fail_all(Error(ErrorCode::CLOSED, "the link was closed on this side"));
    for (const Ending& each : endings_) end_unopened(*each.transfer, each.error);
}

LaneWriter& SendLink::lane_opened(uint32_t lane, uint32_t payload_bytes_max, uint32_t codecs) {
    const bool first = lanes_.empty();
    LaneWriter& writer = lanes_[lane].writer;
    payload_bytes_max_ = std::min(payload_bytes_max_, payload_bytes_max);
    peer_codecs_ = codecs;
    liveness_.lane_opened(lane, now_ns_);
    if (first) repeat_control();
    return writer;
}

void SendLink::lane_lost(uint32_t lane) {
    retire(lane);  // even one that never opened here may have swallowed the peer's answers
    liveness_.lane_lost(lane, now_ns_);
    const uint64_t bit = uint64_t(1) << lane;
    for (const auto& transfer : order_)
        for (const auto& segment : transfer->segments) segment->announced_lanes &= ~bit;
    lane_stalled(lane);
}

void SendLink::lane_stalled(uint32_t lane) {
    for (const auto& transfer : order_)
        if (transfer->grant) requeue(*transfer, lane);
    tables_.lane_lost();
    repeat_control();
}

bool SendLink::awaits_peer() const {
    return std::any_of(order_.begin(), order_.end(), [](const auto& transfer) {
        return !transfer->grant || transfer->in_flight_bytes || transfer->end_said ||
               transfer->segments_ended > transfer->segments_complete;
    });
}

// What a lost lane may have swallowed, and no answer would bring back.
void SendLink::repeat_control() {
    for (const auto& [id, error] : recent_aborts_) send(FrameType::ABORT, id, encode(error));
    for (const auto& transfer : order_)
        if (!transfer->grant) send_manifest(*transfer);
}

void SendLink::fail_all(const Error& error) {
    while (!order_.empty()) fail(*std::shared_ptr<SendTransfer>(order_.front()), error);
}

void SendLink::on_speeds(ByteSpan payload) {
    Speeds speeds;
    if (decode(payload, &speeds)) choice_.set_peer(speeds);
}

SendTransfer* SendLink::find(const Id& transfer_id) {
    const auto found = transfers_.find(transfer_id);
    return found == transfers_.end() ? nullptr : found->second.get();
}

void SendLink::wake(const SendTransfer& transfer) {
    const auto found = transfers_.find(transfer.id);
    if (found != transfers_.end() && transfer.grant) turns_.add(found->second);
}

void SendLink::on_control(uint32_t lane, const FrameHeader& header, ByteSpan payload) {
    if (on_link_frame(lane, header, payload)) return;
    const std::shared_ptr<SendTransfer> alive =
        find(header.transfer_id) ? transfers_.at(header.transfer_id) : nullptr;
    try {
        switch (header.type) {
            case FrameType::GRANT:
            case FrameType::RECEIPT:
            case FrameType::REPAIR:
            case FrameType::DONE:
                if (alive) on_transfer_frame(*alive, header, payload);
                return;
            case FrameType::ABORT: {
                const Error error = decode_abort(payload);
                if (header.transfer_id.is_zero())
                    throw Error(ErrorCode::PEER_CLOSED,
                                "the receiver closed the lane: " + error.message, error.expected,
                                error.actual, error.offset);
                if (alive) fail(*alive, error, false);
                return;
            }
            case FrameType::PULL: return on_pull(header, payload);
            case FrameType::TABLE_NAMES:
            case FrameType::TABLE: return;
            case FrameType::TABLE_ANSWER:
                for (const Bytes& table : tables_.on_answers(payload))
                    send(FrameType::TABLE, Id{}, table);
                return;
            default: break;
        }
    } catch (const Error& error) {
        if (uint16_t(error.code) < 200 || uint16_t(error.code) >= 300) throw;
        if (alive) return fail(*alive, error);
        return send(FrameType::ABORT, header.transfer_id, encode(error));
    }
    throw Error(ErrorCode::STATE_INVALID,
                std::string(frame_type_name(header.type)) + " is not a receiver's frame");
}

void SendLink::on_transfer_frame(SendTransfer& transfer, const FrameHeader& header,
                                 ByteSpan payload) {
    if (header.type == FrameType::GRANT) return on_grant(transfer, payload);
    if (!transfer.grant)
        throw Error(ErrorCode::STATE_INVALID,
                    std::string(frame_type_name(header.type)) + " before the grant");
    wake(transfer);
    if (header.type == FrameType::RECEIPT) return on_receipt(transfer, payload);
    if (header.type == FrameType::REPAIR) return on_repair(transfer, payload);
    on_done(transfer, payload);
}

ChunkTarget* SendLink::on_chunk(uint32_t, const FrameHeader&) {
    throw Error(ErrorCode::STATE_INVALID, "CHUNK is not a receiver's frame");
}

void SendLink::open(std::shared_ptr<SendTransfer> transfer) {
    transfer->home = this;
    transfer->serial = ++opened_;
    transfers_.emplace(transfer->id, transfer);
    order_.push_back(transfer);
    send_manifest(*transfer);
}

void SendLink::send_manifest(const SendTransfer& transfer) {
    send(FrameType::MANIFEST, transfer.id, encode(transfer.manifest));
}

void SendLink::send(FrameType type, const Id& transfer_id, const Bytes& payload) {
    const auto delay = [&](const auto& entry) {
        return std::make_pair(!liveness_.serves(entry.first), entry.second.writer.queued_bytes());
    };
    const auto idlest = std::min_element(
        lanes_.begin(), lanes_.end(),
        [&](const auto& a, const auto& b) { return delay(a) < delay(b); });
    if (idlest != lanes_.end()) idlest->second.writer.control(type, transfer_id, 0, payload);
}

void SendLink::send_close() {
    for (auto& [index, lane] : lanes_) lane.writer.control(FrameType::CLOSE, Id{}, 0, {});
}

void SendLink::on_pull(const FrameHeader& header, ByteSpan payload) {
    const Pull pull = decode_pull(payload);
    for (const auto& transfer : order_)  // repeated after a lost lane
        if (transfer->manifest.ticket_id == header.transfer_id &&
            transfer->manifest.source_rank == pull.source_rank)
            return;
    const auto found =
        offers_.offers.find({pull.offer_id, pull.source_rank, pull.destination_rank});
    if (found == offers_.offers.end()) {
        const auto near = offers_.offers.lower_bound({pull.offer_id, 0, 0});
        if (near != offers_.offers.end() && std::get<0>(near->first) == pull.offer_id)
            throw Error(ErrorCode::RANK_UNEXPECTED, "PULL: the offer is for other ranks",
                        std::get<1>(near->first), pull.source_rank);
        throw Error(ErrorCode::OFFER_UNKNOWN, "offer " + hex(pull.offer_id) + " is not known");
    }
    start_offer(found->second, header.transfer_id, pull);
}

void SendLink::start_offer(std::shared_ptr<SendTransfer> transfer, const Id& ticket_id,
                           const Pull& pull) {
    Manifest& manifest = transfer->manifest;
    if (pull.destination_rank_count != manifest.destination_rank_count)
        throw Error(ErrorCode::RANK_UNEXPECTED, "PULL: the offer is for another number of ranks",
                    manifest.destination_rank_count, pull.destination_rank_count);
    if (pull.token_stop < pull.token_start || pull.token_start < manifest.token_start ||
        pull.token_stop > manifest.token_stop)
        throw Error(ErrorCode::TOKENS_MISMATCH, "PULL: tokens lie outside the offer",
                    manifest.token_stop, pull.token_stop);
    offers_.offers.erase({pull.offer_id, pull.source_rank, pull.destination_rank});
    manifest.ticket_id = ticket_id;
    manifest.token_start = pull.token_start;
    manifest.token_stop = pull.token_stop;
    transfer->offered = false;
    open(std::move(transfer));
}

void SendLink::push(SendTransfer& transfer, std::vector<Item> items, int32_t priority,
                    std::shared_ptr<const StagedSegment> staged) {
    transfer.pushes.push_back({std::move(items), priority, std::move(staged)});
    if (transfer.grant && !transfer.ended) announce_pushes(transfer);
}

void SendLink::finish(SendTransfer& transfer, Bytes metadata, uint16_t metadata_count) {
    transfer.finished = true;
    transfer.end_metadata = std::move(metadata);
    transfer.end_metadata_count = metadata_count;
    if (transfer.home) transfer.home->wake(transfer);
}

void SendLink::on_grant(SendTransfer& transfer, ByteSpan payload) {
    const Grant grant = decode_grant(payload);
    if (transfer.grant) return;
    transfer.grant = grant;
    const uint64_t chunk_bytes = std::min<uint64_t>(
        {options_.chunk_bytes, grant.chunk_bytes_max, payload_bytes_max_, grant.window_bytes});
    transfer.chunk_bytes = uint32_t(chunk_bytes - chunk_bytes % limits::chunk_bytes_min);
    transfer.codecs = permitted_codecs(transfer);
    transfer.observer.on_granted();
    announce_pushes(transfer);
}

// A PULL may want fewer tokens than were offered; states always travel whole.
std::vector<Item> SendLink::clip(const SendTransfer& transfer, const std::vector<Item>& items) {
    const Manifest& manifest = transfer.manifest;
    std::vector<Item> kept;
    for (Item item : items) {
        if (manifest.groups[item.group].tensors[item.tensor].has_tokens()) {
            item.token_start = std::max(item.token_start, manifest.token_start);
            item.token_stop = std::min(item.token_stop, manifest.token_stop);
            if (item.token_start >= item.token_stop) continue;
        }
        kept.push_back(item);
    }
    return kept;
}

void SendLink::announce_pushes(SendTransfer& transfer) {
    wake(transfer);
    try {
        for (; transfer.pushes_announced < transfer.pushes.size(); ++transfer.pushes_announced) {
            const uint32_t number = uint32_t(transfer.pushes_announced);
            SendTransfer::Push& push = transfer.pushes[number];
            const std::vector<Item> items = clip(transfer, push.items);
            push.items = {};
            for (size_t at = 0; at < items.size(); at += limits::item_count_max) {
                const size_t stop = std::min(items.size(), at + limits::item_count_max);
                ++push.open_segments;
                add_segment(transfer, number, {items.begin() + at, items.begin() + stop});
            }
            if (items.empty()) complete_push(transfer, number, Error{});
        }
    } catch (const Error& error) {
        fail(transfer, error);
    }
}

void SendLink::add_segment(SendTransfer& transfer, uint32_t push, std::vector<Item> items) {
    if (transfer.segments.size() >= limits::segment_count_max)
        throw Error(ErrorCode::LIMIT_EXCEEDED, "too many segments in one transfer",
                    limits::segment_count_max, transfer.segments.size() + 1);
    auto segment = std::make_unique<SendTransfer::Segment>();
    segment->index = uint32_t(transfer.segments.size());
    segment->push = push;
    segment->priority = transfer.pushes[push].priority;
    for (const Item& item : items)
        segment->placement.append(transfer.manifest.groups[item.group], item, *transfer.memory);
    SegmentAnnouncement& announcement = segment->announcement;
    const Item& first = items[0];
    segment->item_bytes =
        item_bytes(transfer.manifest.groups[first.group].tensors[first.tensor].dtype);
    announcement.raw_bytes = segment->placement.bytes();
    announcement.chunk_bytes = transfer.chunk_bytes;
    announcement.items = std::move(items);
    segment->kind = main_kind(transfer.manifest, announcement.items);
    segment->staged = transfer.pushes[push].staged;
    if (!segment->staged && permitted_codecs(transfer) >> uint8_t(Codec::TIERED) & 1) {
        const Manifest& manifest = transfer.manifest;
        const auto coding =
            std::make_shared<SegmentCoding>(options_.code_book, announcement.chunk_bytes);
        for (const Item& item : announcement.items)
            coding->append(manifest.model, manifest.groups[item.group], item);
        segment->coding = coding;
    }
    if (!transfer.roundings.empty() && agreed_codecs(transfer) >> uint8_t(Codec::QUANTISED) & 1) {
        const Manifest& manifest = transfer.manifest;
        const auto rounding = std::make_shared<SegmentRounding>(
            transfer.roundings, segment->coding, options_.code_book, announcement.chunk_bytes,
            manifest.token_stop);
        for (const Item& item : announcement.items)
            rounding->append(manifest.model, manifest.groups[item.group], item);
        if (rounding->rounds_anything()) segment->rounding = rounding;
    }
    segment->announcement_payload = encode(announcement);
    segment->chunks.resize(announcement.chunk_count());
    check_staged(*segment);
    transfer.to_dispatch.emplace(-int64_t(segment->priority), segment->index);
    transfer.pushed_bytes += announcement.raw_bytes;
    if (open_bytes_ == 0) busy_since_ns_ = now_ns_;
    open_bytes_ += announcement.raw_bytes;
    transfer.segments.push_back(std::move(segment));
}

void SendLink::on_receipt(SendTransfer& transfer, ByteSpan payload) {
    for (const ReceiptEntry& entry : decode_receipt(payload)) {
        if (entry.segment_index >= transfer.segments.size())
            throw Error(ErrorCode::FIELD_INVALID, "RECEIPT: no such segment",
                        transfer.segments.size(), entry.segment_index);
        SendTransfer::Segment& segment = *transfer.segments[entry.segment_index];
        if (segment.complete) continue;
        if (entry.chunk_count == 0)
            on_segment_receipt(transfer, segment, entry.digest);
        else
            on_chunk_receipt(transfer, segment, entry);
    }
}

void SendLink::on_chunk_receipt(SendTransfer& transfer, SendTransfer::Segment& segment,
                                const ReceiptEntry& entry) {
    if (entry.chunk_first >= segment.chunks.size() ||
        entry.chunk_count > segment.chunks.size() - entry.chunk_first)
        throw Error(ErrorCode::FIELD_INVALID, "RECEIPT: no such chunks", segment.chunks.size(),
                    uint64_t(entry.chunk_first) + entry.chunk_count);
    uint64_t verified_bytes = 0;
    for (uint32_t i = entry.chunk_first; i < entry.chunk_first + entry.chunk_count; ++i) {
        SendTransfer::Chunk& chunk = segment.chunks[i];
        if (!chunk.crc_known)
            throw Error(ErrorCode::FIELD_INVALID, "RECEIPT: for a chunk that was never sent", 0, i);
        if (chunk.state == SendTransfer::Chunk::RECEIPTED) continue;
        const uint32_t bytes = segment.announcement.chunk_raw_bytes(i);
        if (chunk.state == SendTransfer::Chunk::IN_FLIGHT) transfer.in_flight_bytes -= bytes;
        chunk.state = SendTransfer::Chunk::RECEIPTED;
        ++segment.receipted;
        verified_bytes += bytes;
    }
    if (verified_bytes) verified(transfer, verified_bytes);
}

void SendLink::on_segment_receipt(SendTransfer& transfer, SendTransfer::Segment& segment,
                                  uint32_t digest) {
    if (!segment.ended)
        throw Error(ErrorCode::FIELD_INVALID, "RECEIPT: for a segment that has not ended", 0,
                    segment.index);
    if (digest != segment.digest)
        throw Error(ErrorCode::DIGEST_MISMATCH,
                    "RECEIPT: segment digest " + hex32(digest) + ", " + hex32(segment.digest) +
                        " here",
                    segment.digest, digest);
    complete_segment(transfer, segment);
}

void SendLink::on_repair(SendTransfer& transfer, ByteSpan payload) {
    for (const RepairEntry& entry : decode_repair(payload)) {
        if (entry.segment_index >= transfer.segments.size())
            throw Error(ErrorCode::FIELD_INVALID, "REPAIR: no such segment",
                        transfer.segments.size(), entry.segment_index);
        SendTransfer::Segment& segment = *transfer.segments[entry.segment_index];
        if (segment.complete) continue;
        if (entry.chunk_index >= segment.chunks.size())
            throw Error(ErrorCode::FIELD_INVALID, "REPAIR: no such chunk", segment.chunks.size(),
                        entry.chunk_index);
        SendTransfer::Chunk& chunk = segment.chunks[entry.chunk_index];
        if (chunk.state != SendTransfer::Chunk::IN_FLIGHT || entry.attempt != chunk.attempt)
            continue;
        chunk.state = SendTransfer::Chunk::UNSENT;
        transfer.in_flight_bytes -= segment.announcement.chunk_raw_bytes(entry.chunk_index);
        transfer.resend.emplace_back(entry.segment_index, entry.chunk_index);
    }
}

void SendLink::on_done(SendTransfer& transfer, ByteSpan payload) {
    const Done done = decode_done(payload);
    if (!transfer.end_said)
        throw Error(ErrorCode::FIELD_INVALID, "DONE: for a transfer that has not ended");
    const Done own = summary(transfer);
    if (done.raw_bytes != own.raw_bytes)
        throw Error(ErrorCode::FIELD_INVALID, "DONE: raw_bytes differs", own.raw_bytes,
                    done.raw_bytes);
    if (done.digest != own.digest)
        throw Error(ErrorCode::DIGEST_MISMATCH,
                    "DONE: transfer digest " + hex32(done.digest) + ", " + hex32(own.digest) +
                        " here",
                    own.digest, done.digest);
    for (const auto& segment : transfer.segments) complete_segment(transfer, *segment);
    end(transfer, Error{});
}

void SendLink::verified(SendTransfer& transfer, uint64_t raw_bytes) {
    transfer.verified_bytes += raw_bytes;
    verified_bytes_ += raw_bytes;
    note_progress(raw_bytes);
    transfer.observer.on_verified(raw_bytes);
}

// What codec "auto" goes by: how fast bytes are verified while there are any to be.
void SendLink::note_progress(uint64_t raw_bytes) {
    open_bytes_ -= raw_bytes;
    busy_.raw_bytes += raw_bytes;
    busy_.ns += now_ns_ - std::min(now_ns_, busy_since_ns_);
    busy_since_ns_ = now_ns_;
    if (busy_.ns < BUSY_NS) return;
    for (const auto& transfer : order_) busy_.in_flight_bytes += transfer->in_flight_bytes;
    choice_.moved(std::exchange(busy_, {}));
}

uint64_t SendLink::backlog_bytes() const {
    uint64_t bytes = 0;
    for (const auto& transfer : order_) bytes += transfer->pushed_bytes - transfer->verified_bytes;
    return bytes;
}

void SendLink::complete_segment(SendTransfer& transfer, SendTransfer::Segment& segment) {
    if (segment.complete) return;
    segment.complete = true;
    ++transfer.segments_complete;
    uint64_t verified_bytes = 0;
    for (uint32_t i = 0; i < segment.chunks.size(); ++i) {
        const uint32_t bytes = segment.announcement.chunk_raw_bytes(i);
        if (segment.chunks[i].state == SendTransfer::Chunk::RECEIPTED) continue;
        if (segment.chunks[i].state == SendTransfer::Chunk::IN_FLIGHT)
            transfer.in_flight_bytes -= bytes;
        verified_bytes += bytes;
    }
    if (verified_bytes) verified(transfer, verified_bytes);
    detach(segment);
    segment.chunks = {};
    segment.placement = {};
    segment.coding.reset();
    segment.rounding.reset();
    segment.announcement.items = {};
    segment.announcement_payload = {};
    give_back(transfer, segment);
}

void SendLink::complete_push(SendTransfer& transfer, uint32_t push, const Error& error) {
    if (transfer.pushes[push].complete) return;
    transfer.pushes[push].complete = true;
    transfer.observer.on_push_complete(push, error);
}

void SendLink::detach(const SendTransfer::Segment& segment) {
    for (auto& [index, lane] : lanes_) lane.writer.detach(&segment);
}

void SendLink::fail(SendTransfer& transfer, const Error& error, bool tell_peer) {
    if (transfer.ended) return;
    for (const auto& segment : transfer.segments) detach(*segment);
    if (tell_peer && !transfer.offered) {
        send(FrameType::ABORT, transfer.id, encode(error));
        recent_aborts_.emplace_back(transfer.id, error);
        if (recent_aborts_.size() > RECENT_ABORTS_KEPT) recent_aborts_.pop_front();
    }
    end(transfer, error);
}

void SendLink::end(SendTransfer& transfer, const Error& error) {
    const auto found = transfers_.find(transfer.id);
    const std::shared_ptr<SendTransfer> alive =
        found == transfers_.end() ? nullptr : found->second;
    if (alive) {
        open_bytes_ -= transfer.pushed_bytes - transfer.verified_bytes;
        turns_.remove(transfer);
        transfers_.erase(found);
        order_.erase(std::find(order_.begin(), order_.end(), alive));
        if (is_lent(transfer)) {
            transfer.ended = true;
            endings_.push_back({++recall_serial_, alive, error});
            return;
        }
    }
    end_unopened(transfer, error);
}

void SendLink::end_unopened(SendTransfer& transfer, const Error& error) {
    transfer.ended = true;
    for (uint32_t push = 0; push < transfer.pushes.size(); ++push)
        complete_push(transfer, push, error);
    transfer.observer.on_end(error);
}

}  // namespace kvwire
