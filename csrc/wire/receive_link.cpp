#include "wire/receive_link.hpp"

#include <algorithm>
#include <cstring>

#include "checksum/crc32c.hpp"
#include "codec/codec.hpp"

namespace kvwire {
namespace {

constexpr size_t REMOVED_TICKETS_KEPT = 4096;
constexpr size_t RECENT_ENDS_REPEATED = 64;
constexpr uint64_t MANIFEST_STATE_FACTOR = 5;  // memory of a parsed manifest over its payload

bool is_transfer_error(ErrorCode code) {
    return uint16_t(code) >= 200 && uint16_t(code) < 300;
}

// A sender that has the wanted tokens and more may open another transfer, of just these.
bool fails_the_ticket(ErrorCode code, const Manifest& manifest, const Ticket::Options& wanted) {
    const bool has_more = manifest.token_start <= wanted.token_start &&
                          manifest.token_stop >= wanted.token_stop;
    return code == ErrorCode::SPEC_MISMATCH ||
           (code == ErrorCode::TOKENS_MISMATCH && !has_more);
}

}  // namespace

void TicketBook::add(std::shared_ptr<Ticket> ticket) {
    const Id id = ticket->options().id;
    if (!tickets_.emplace(id, std::move(ticket)).second)
        throw Error(ErrorCode::USAGE, "ticket " + hex(id) + " is bound already");
}

void TicketBook::remove(const Id& id) {
    if (!tickets_.erase(id) || !removed_.insert(id).second) return;
    removed_order_.push_back(id);
    if (removed_order_.size() > REMOVED_TICKETS_KEPT) {
        removed_.erase(removed_order_.front());
        removed_order_.pop_front();
    }
}

std::shared_ptr<Ticket> TicketBook::find(const Id& id) const {
    const auto found = tickets_.find(id);
    return found == tickets_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<Ticket>> TicketBook::all() const {
    std::vector<std::shared_ptr<Ticket>> tickets;
    for (const auto& [id, ticket] : tickets_) tickets.push_back(ticket);
    return tickets;
}

ReceiveLink::ReceiveLink(TicketBook& tickets, ReceiveOptions options, std::function<void()> wake)
    : LinkMachine(options.liveness), tickets_(tickets), options_(options), wake_(std::move(wake)),
      waiting_bytes_(options.pool), state_bytes_(options.pool),
      tables_(options.table_store, options.pool), meter_(options.threads) {}

ReceiveLink::~ReceiveLink() {
    fail_all(Error(ErrorCode::CLOSED, "the link was closed on this side"));
}

void ReceiveLink::fail_all(const Error& error) {
    while (!transfers_.empty()) fail(Id(transfers_.begin()->first), error);
    waiting_.clear();
    waiting_bytes_ -= waiting_bytes_.bytes();
    const auto pulls = std::move(pulls_);
    pulls_.clear();
    for (const auto& [key, pull] : pulls)
        if (const auto ticket = tickets_.find(key.first)) ticket->fail(error);
}

LaneWriter& ReceiveLink::lane_opened(uint32_t lane) {
    const bool first = lanes_.empty();
    LaneWriter& writer = lanes_[lane].writer;
    liveness_.lane_opened(lane, now_ns_);
    if (first) repeat_answers();
    return writer;
}

void ReceiveLink::lane_lost(uint32_t lane) {
    const auto found = lanes_.find(lane);
    if (found == lanes_.end()) return;
    revoke_lease(found->second);
    lanes_.erase(found);
    liveness_.lane_lost(lane, now_ns_);
    repeat_answers();
}

// What a lane may have swallowed, and nothing that the peer says would bring back.
void ReceiveLink::repeat_answers() {
    for (const auto& [key, pull] : pulls_) send(FrameType::PULL, key.first, encode(pull));
    // Said by ourselves, perhaps on a lane that the peer had given up before.
    const size_t said = std::min(ended_order_.size(), RECENT_ENDS_REPEATED);
    for (auto id = ended_order_.end() - ptrdiff_t(said); id != ended_order_.end(); ++id)
        say_end(*id);
    for (const auto& [id, transfer] : transfers_)
        if (transfer->segments.empty()) send_grant(*transfer);
}

void ReceiveLink::on_control(uint32_t lane, const FrameHeader& header, ByteSpan payload) {
    if (on_link_frame(lane, header, payload)) return;
    lane_heard_ = lane;
    try {
        switch (header.type) {
            case FrameType::MANIFEST: return on_manifest(header, payload);
            case FrameType::SEGMENT:
            case FrameType::SEGMENT_END:
            case FrameType::END: return on_transfer_frame(lane, header, payload);
            case FrameType::ABORT: return on_abort(header, payload);
            case FrameType::TABLE_NAMES:
            case FrameType::TABLE: return on_tables(header, payload);
            case FrameType::TABLE_ANSWER: return;
            default: break;
        }
    } catch (const Error& error) {
        if (!is_transfer_error(error.code)) throw;
        find(header.transfer_id) ? fail(header.transfer_id, error)
                                 : refuse(header.transfer_id, error);
        return;
    }
    throw Error(ErrorCode::STATE_INVALID,
                std::string(frame_type_name(header.type)) + " is not a sender's frame");
}

void ReceiveLink::on_tables(const FrameHeader& header, ByteSpan payload) {
    if (!(options_.codecs >> int(Codec::TIERED) & 1)) return;
    const auto answers = header.type == FrameType::TABLE_NAMES
                             ? tables_.on_names(payload)
                             : std::vector<TableAnswer>{tables_.on_table(payload)};
    send(FrameType::TABLE_ANSWER, Id{}, encode(answers));
}

void ReceiveLink::on_manifest(const FrameHeader& header, ByteSpan payload) {
    const Id id = header.transfer_id;
    if (Transfer* transfer = find(id)) {
        if (transfer->manifest_crc != header.payload_crc)
            throw Error(ErrorCode::TRANSFER_DUPLICATE,
                        "transfer " + hex(id) + " is open with another manifest");
        return send_grant(*transfer);
    }
    if (ended_.count(id)) {
        say_end(id);
        return overtaken_.erase(id) ? fail_overtaken(id, payload) : void();
    }
    const auto waiting = find_waiting(id);
    if (waiting != waiting_.end()) {
        const Bytes& known = waiting->payload;
        if (known.size() == payload.size && !std::memcmp(known.data(), payload.data, payload.size))
            return;
        stop_waiting(id);
        throw Error(ErrorCode::TRANSFER_DUPLICATE,
                    "transfer " + hex(id) + " waits with another manifest");
    }
    if (transfers_.size() + waiting_.size() >= options_.transfers_max ||
        !state_bytes_.has_room(MANIFEST_STATE_FACTOR * payload.size, options_.state_bytes_max))
        throw Error(ErrorCode::RESOURCES_EXHAUSTED, "too many open transfers on this link",
                    options_.transfers_max, transfers_.size() + waiting_.size());
    auto manifest = std::make_unique<Manifest>(decode_manifest(payload));
    const Id ticket_id = manifest->ticket_id;
    pulls_.erase({ticket_id, manifest->source_rank});
    if (auto ticket = tickets_.find(ticket_id))
        return open(id, payload, std::move(manifest), std::move(ticket));
    if (tickets_.was_removed(ticket_id))
        throw Error(ErrorCode::TICKET_EXPIRED, "ticket " + hex(ticket_id) + " has ended");
    wait_for_ticket(id, ticket_id, payload);
}

// The ABORT that came first speaks for the ticket too, as it would have in its own order.
void ReceiveLink::fail_overtaken(const Id& transfer_id, ByteSpan payload) {
    if (const auto ticket = tickets_.find(decode_manifest(payload).ticket_id))
        ticket->fail(ended_.at(transfer_id).error);
}

void ReceiveLink::wait_for_ticket(const Id& transfer_id, const Id& ticket_id, ByteSpan payload) {
    if (waiting_.size() >= limits::waiting_manifests_max ||
        !waiting_bytes_.has_room(payload.size, options_.waiting_bytes_max))
        throw Error(ErrorCode::RESOURCES_EXHAUSTED, "too many manifests wait for their tickets",
                    limits::waiting_manifests_max, waiting_.size());
    waiting_.push_back({transfer_id, ticket_id, Bytes(payload.data, payload.data + payload.size),
                        now_ns_ + options_.patience_ns});
    waiting_bytes_ += payload.size;
}

std::deque<ReceiveLink::Waiting>::iterator ReceiveLink::find_waiting(const Id& transfer_id) {
    return std::find_if(waiting_.begin(), waiting_.end(),
                        [&](const Waiting& w) { return w.transfer_id == transfer_id; });
}

bool ReceiveLink::stop_waiting(const Id& transfer_id) {
    const auto waiting = find_waiting(transfer_id);
    if (waiting == waiting_.end()) return false;
    waiting_bytes_ -= waiting->payload.size();
    waiting_.erase(waiting);
    return true;
}

void ReceiveLink::ticket_added(const Id& ticket_id) {
    std::deque<Waiting> ready, rest;
    for (Waiting& waiting : waiting_)
        (waiting.ticket_id == ticket_id ? ready : rest).push_back(std::move(waiting));
    waiting_ = std::move(rest);
    for (const Waiting& waiting : ready) {
        waiting_bytes_ -= waiting.payload.size();
        const ByteSpan payload{waiting.payload.data(), waiting.payload.size()};
        try {
            open(waiting.transfer_id, payload, std::make_unique<Manifest>(decode_manifest(payload)),
                 tickets_.find(ticket_id));
        } catch (const Error& error) {
            refuse(waiting.transfer_id, error);
        }
    }
}

uint64_t ReceiveLink::expire(uint64_t now_ns) {
    now_ns_ = now_ns;
    while (!waiting_.empty() && waiting_.front().deadline_ns <= now_ns) {
        const Waiting waiting = std::move(waiting_.front());
        waiting_.pop_front();
        waiting_bytes_ -= waiting.payload.size();
        refuse(waiting.transfer_id, Error(ErrorCode::TICKET_UNKNOWN,
                                          "ticket " + hex(waiting.ticket_id) + " was not bound"));
    }
    return waiting_.empty() ? 0 : waiting_.front().deadline_ns;
}

void ReceiveLink::open(const Id& transfer_id, ByteSpan payload, std::unique_ptr<Manifest> manifest,
                       std::shared_ptr<Ticket> ticket) {
    try {
        ticket->join(transfer_id, *manifest, [this, transfer_id](const Error& error) {
            drop(transfer_id, error);
            wake_();
        });
    } catch (const Error& error) {
        refuse(transfer_id, error);
        if (fails_the_ticket(error.code, *manifest, ticket->options())) ticket->fail(error);
        return;
    }
    auto transfer = std::make_unique<Transfer>();
    transfer->id = transfer_id;
    transfer->manifest_crc = crc32c(0, payload.data, payload.size);
    transfer->state_bytes = MANIFEST_STATE_FACTOR * payload.size;
    state_bytes_ += transfer->state_bytes;
    transfer->grant.window_bytes = options_.window_bytes;
    transfer->grant.codecs = (manifest->codecs & options_.codecs & ticket->options().codecs) | 1;
    transfer->grant.chunk_bytes_max = options_.chunk_bytes_max;
    transfer->manifest = std::move(manifest);
    transfer->ticket = std::move(ticket);
    send_grant(*transfer);
    transfers_.emplace(transfer_id, std::move(transfer));
}

void ReceiveLink::on_transfer_frame(uint32_t lane, const FrameHeader& header, ByteSpan payload) {
    Transfer* transfer = find(header.transfer_id);
    if (!transfer) return on_stray(header);
    if (header.type == FrameType::SEGMENT) return on_segment(*transfer, header, payload);
    if (header.type == FrameType::SEGMENT_END)
        return on_segment_end(lane, *transfer, header, payload);
    on_end(lane, *transfer, payload);
}

// A frame of a transfer that is not open: the table of late frames, section 10.
void ReceiveLink::on_stray(const FrameHeader& header) {
    const Id id = header.transfer_id;
    if (stop_waiting(id))
        return refuse(id, Error(ErrorCode::STATE_INVALID,
                                std::string(frame_type_name(header.type)) + " before the grant"));
    const auto ended = ended_.find(id);
    if (ended != ended_.end()) {
        if (!ended->second.done || header.type == FrameType::END) say_end(id);
        return;
    }
    send(FrameType::ABORT, id,
         encode(Error(ErrorCode::TRANSFER_UNKNOWN, "transfer " + hex(id) + " is not open here")));
}

void ReceiveLink::check_items(const Transfer& transfer,
                              const SegmentAnnouncement& announcement) const {
    const Manifest& manifest = *transfer.manifest;
    uint64_t raw_bytes = 0;
    for (const Item& item : announcement.items) {
        const auto invalid = [&](const char* field, uint64_t value) {
            throw Error(ErrorCode::SEGMENT_INVALID,
                        std::string("SEGMENT: ") + field + " contradicts the manifest", 0, value);
        };
        if (item.group >= manifest.groups.size()) invalid("group_index", item.group);
        const GroupDesc& group = manifest.groups[item.group];
        if (item.tensor >= group.tensors.size()) invalid("tensor_index", item.tensor);
        if (!std::binary_search(group.layers.begin(), group.layers.end(), item.layer))
            invalid("layer", item.layer);
        const TensorDesc& tensor = group.tensors[item.tensor];
        if (tensor.has_tokens()
                ? item.token_start < manifest.token_start ||
                      item.token_stop < item.token_start || item.token_stop > manifest.token_stop
                : item.token_start != 0 || item.token_stop != 0)
            invalid("token range", item.token_stop);
        if (!checked_add(raw_bytes, item_raw_bytes(tensor, item), &raw_bytes))
            invalid("raw_bytes", raw_bytes);
    }
    if (raw_bytes != announcement.raw_bytes)
        throw Error(ErrorCode::SEGMENT_INVALID, "SEGMENT: raw_bytes is not the items' sum",
                    raw_bytes, announcement.raw_bytes);
}

void ReceiveLink::on_segment(Transfer& transfer, const FrameHeader& header, ByteSpan payload) {
    const auto known = transfer.segments.find(header.segment_index);
    if (known != transfer.segments.end()) {
        if (known->second.announcement_crc == header.payload_crc) return;
        throw Error(ErrorCode::SEGMENT_INVALID, "SEGMENT: announced before, otherwise",
                    known->second.announcement_crc, header.payload_crc);
    }
    if (transfer.end && header.segment_index >= transfer.end->segment_count)
        throw Error(ErrorCode::INCOMPLETE, "SEGMENT: index beyond END's segment_count",
                    transfer.end->segment_count, header.segment_index);
    SegmentAnnouncement announcement = decode_segment(payload);
    if (announcement.chunk_bytes > transfer.grant.chunk_bytes_max)
        throw Error(ErrorCode::SEGMENT_INVALID, "SEGMENT: chunk_bytes over the grant's",
                    transfer.grant.chunk_bytes_max, announcement.chunk_bytes);
    check_items(transfer, announcement);
    const uint64_t chunk_count = announcement.chunk_count();
    const uint64_t state_bytes =
        SEGMENT_STATE_BYTES + sizeof(Work) + payload.size + chunk_count * sizeof(Chunk);
    if (!state_bytes_.has_room(state_bytes, options_.state_bytes_max))
        throw Error(ErrorCode::RESOURCES_EXHAUSTED, "SEGMENT: too much is announced and not sent",
                    options_.state_bytes_max, state_bytes_.bytes() + state_bytes);
    Segment& segment = transfer.segments[header.segment_index];
    segment.announcement_crc = header.payload_crc;
    segment.raw_bytes = announcement.raw_bytes;
    segment.work = std::make_unique<Work>();
    Work& work = *segment.work;
    for (const Item& item : announcement.items) {
        work.claimed.push_back(
            transfer.ticket->claim(*transfer.manifest, item, work.placement));
        if (transfer.manifest->groups[item.group].kind == GroupKind::CONVOLUTION)
            transfer.ticket->observer().on_layer_touched(item.layer);  // columns may be zeroed
    }
    const Item& first = announcement.items[0];
    work.dtype = transfer.manifest->groups[first.group].tensors[first.tensor].dtype;
    work.item_bytes = item_bytes(work.dtype);
    work.chunks.resize(chunk_count);
    work.announcement = std::move(announcement);
    segment.state_bytes = state_bytes;
    state_bytes_ += state_bytes;
}

void ReceiveLink::on_segment_end(uint32_t lane, Transfer& transfer, const FrameHeader& header,
                                 ByteSpan payload) {
    const SegmentEnd end = decode_segment_end(payload);
    const auto found = transfer.segments.find(header.segment_index);
    if (found == transfer.segments.end())
        throw Error(ErrorCode::SEGMENT_INVALID, "SEGMENT_END: segment was not announced", 0,
                    header.segment_index);
    Segment& segment = found->second;
    if (!segment.work) {
        if (end.digest != segment.digest)
            throw Error(ErrorCode::DIGEST_MISMATCH, "SEGMENT_END: another digest than before",
                        segment.digest, end.digest);
        return owe(lane, transfer.id, {header.segment_index, 0, 0, segment.digest});
    }
    Work& work = *segment.work;
    if (end.chunk_count != work.chunks.size())
        throw Error(ErrorCode::SEGMENT_INVALID, "SEGMENT_END: chunk_count differs",
                    work.chunks.size(), end.chunk_count);
    if (work.end && work.end->digest != end.digest)
        throw Error(ErrorCode::DIGEST_MISMATCH, "SEGMENT_END: another digest than before",
                    work.end->digest, end.digest);
    work.end = end;
    maybe_complete(lane, transfer, header.segment_index, segment);
}

void ReceiveLink::on_end(uint32_t lane, Transfer& transfer, ByteSpan payload) {
    End end = decode_end(payload);
    if (!transfer.segments.empty() && transfer.segments.rbegin()->first >= end.segment_count)
        throw Error(ErrorCode::INCOMPLETE, "END: fewer segments than were announced",
                    transfer.segments.rbegin()->first + 1, end.segment_count);
    if (transfer.end && (transfer.end->segment_count != end.segment_count ||
                         transfer.end->digest != end.digest))
        throw Error(ErrorCode::INCOMPLETE, "END: contradicts an earlier END",
                    transfer.end->segment_count, end.segment_count);
    transfer.end = std::move(end);
    maybe_done(lane, transfer);
}

void ReceiveLink::on_abort(const FrameHeader& header, ByteSpan payload) {
    const Error error = decode_abort(payload);
    const Id id = header.transfer_id;
    if (id.is_zero())
        throw Error(ErrorCode::PEER_CLOSED, "the sender closed the lane: " + error.message,
                    error.expected, error.actual, error.offset);
    if (Transfer* transfer = find(id)) {
        const auto ticket = transfer->ticket;
        remember(id, {std::nullopt, error});
        forget(id);
        return ticket->fail(error);
    }
    const bool waited = stop_waiting(id);
    const size_t pulled = pulls_.size();
    pull_withdrawn(id);
    if (pulls_.size() == pulled) {
        if (!waited && !ended_.count(id)) overtaken_.insert(id);
        return remember(id, {std::nullopt, error});
    }
    if (const auto ticket = tickets_.find(id)) ticket->fail(error);
}

void ReceiveLink::pull(const Id& ticket_id, const Pull& pull) {
    pulls_[{ticket_id, pull.source_rank}] = pull;
    send(FrameType::PULL, ticket_id, encode(pull));
}

void ReceiveLink::pull_withdrawn(const Id& ticket_id) {
    for (auto it = pulls_.begin(); it != pulls_.end();)
        it = it->first.first == ticket_id ? pulls_.erase(it) : std::next(it);
}

void ReceiveLink::send_close() {
    for (auto& [index, lane] : lanes_) lane.writer.control(FrameType::CLOSE, Id{}, 0, {});
}

}  // namespace kvwire
