// Both protocol machines without sockets: the two ends of a link as things that take and give
// bytes, and frames made by hand.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "checksum/crc32c.hpp"
#include "tests/memory_world.hpp"
#include "tests/test.hpp"
#include "wire/receive_link.hpp"
#include "wire/send_link.hpp"

namespace kvwire::test {

inline void feed_reader(LaneReader& reader, const uint8_t* data, size_t size) {
    while (size > 0) {
        const iovec* iov;
        const size_t count = reader.next_iovecs(&iov);
        size_t taken = 0;
        for (size_t i = 0; i < count && taken < size; ++i) {
            const size_t part = std::min(iov[i].iov_len, size - taken);
            std::memcpy(iov[i].iov_base, data + taken, part);
            taken += part;
        }
        reader.advance(taken);
        data += taken;
        size -= taken;
    }
}

// One end of a link. What the machine refuses closes the lane, with an ABORT as the last word.
template <class Machine>
class LinkEnd {
public:
    virtual ~LinkEnd() = default;

    void open_lane(uint32_t lane) {
        writers_[lane] = &open_writer(lane);
        readers_[lane] = std::make_unique<LaneReader>(handler(), lane, FrameLimits{});
    }

    bool is_open(uint32_t lane) const { return readers_.count(lane) != 0; }
    bool has_lanes() const { return !readers_.empty(); }
    ErrorCode lane_error(uint32_t lane) const {
        const auto found = errors_.find(lane);
        return found == errors_.end() ? ErrorCode::OK : found->second.code;
    }

    void feed(uint32_t lane, const uint8_t* data, size_t size) {
        guarded(lane, [&](LaneReader& reader) { feed_reader(reader, data, size); });
    }
    void feed(uint32_t lane, const Bytes& bytes) { feed(lane, bytes.data(), bytes.size()); }

    void lane_lost(uint32_t lane) {
        if (is_open(lane)) close(lane, Error(ErrorCode::PEER_CLOSED, "the connection is gone"));
    }

    // The peer has closed the connection, perhaps in the middle of a frame.
    void stream_ended(uint32_t lane) {
        if (!is_open(lane)) return;
        try {
            readers_.at(lane)->end_of_stream();
            lane_lost(lane);
        } catch (const Error& error) {
            close(lane, error);
        }
    }

    // At most `most` of the bytes that the lane has to write, as a socket would take them.
    Bytes take(uint32_t lane, size_t most = SIZE_MAX) {
        Bytes bytes;
        const auto last = last_words_.find(lane);
        if (last != last_words_.end()) {
            bytes.swap(last->second);
            last_words_.erase(last);
        } else if (is_open(lane)) {
            before_writing(lane);
            bytes = written(*writers_.at(lane), most);
        }
        return bytes;
    }

protected:
    virtual Machine& machine() = 0;
    virtual FrameHandler& handler() { return machine(); }
    virtual LaneWriter& open_writer(uint32_t lane) = 0;
    virtual void before_writing(uint32_t lane) = 0;

    // What `step` throws closes the lane, with an ABORT as the last word.
    template <class Step>
    void guarded(uint32_t lane, Step&& step) {
        if (!is_open(lane)) return;
        try {
            step(*readers_.at(lane));
        } catch (const Error& error) {
            before_writing(lane);
            writers_.at(lane)->control(FrameType::ABORT, Id{}, 0, encode(error));
            close(lane, error);
        }
    }

    void close(uint32_t lane, const Error& why) {
        errors_[lane] = why;
        if (why.code != ErrorCode::PEER_CLOSED)
            last_words_[lane] = written(*writers_.at(lane), SIZE_MAX);
        readers_.erase(lane);
        writers_.erase(lane);
        machine().lane_lost(lane);
    }

    Bytes written(LaneWriter& out, size_t most) {
        Bytes bytes;
        const iovec* iov;
        while (const size_t count = bytes.size() < most ? out.next_iovecs(&iov) : 0) {
            const size_t before = bytes.size();
            std::vector<iovec> taken;
            for (size_t i = 0; i < count && bytes.size() < most; ++i) {
                const auto* from = static_cast<const uint8_t*>(iov[i].iov_base);
                taken.push_back({iov[i].iov_base, std::min(iov[i].iov_len, most - bytes.size())});
                bytes.insert(bytes.end(), from, from + taken.back().iov_len);
            }
            sent(out, taken, {bytes.begin() + before, bytes.end()});
        }
        return bytes;
    }
    virtual void sent(LaneWriter& out, const std::vector<iovec>&, const Bytes& bytes) {
        out.advance(bytes.size());
    }

    std::map<uint32_t, std::unique_ptr<LaneReader>> readers_;
    std::map<uint32_t, LaneWriter*> writers_;

private:
    std::map<uint32_t, Error> errors_;
    std::map<uint32_t, Bytes> last_words_;
};

// One bound ticket, whose memory is gone the moment it ends.
class Destination : public TicketObserver {
public:
    explicit Destination(TicketBook& book) : book_(book) {}

    void bind(const Manifest& expected, Random& random, bool paged = false) {
        manifest = expected;
        memory = std::make_unique<Memory>(expected, random, paged);
        Ticket::Options options;
        options.id = expected.ticket_id;
        options.model = expected.model;
        options.token_start = expected.token_start;
        options.token_stop = expected.token_stop;
        options.source_rank_count = expected.source_rank_count;
        options.source_ranks.clear();
        for (uint16_t rank = 0; rank < expected.source_rank_count; ++rank)
            options.source_ranks.insert(rank);
        options.destination_rank = expected.destination_rank;
        options.destination_rank_count = expected.destination_rank_count;
        options.zone = zone;
        ticket = std::make_shared<Ticket>(options, memory->map, *this);
        book_.add(ticket);
    }

    void on_bytes(uint64_t, uint64_t, bool) override { CHECK(!ended); }
    void on_layer_touched(uint32_t) override { CHECK(!ended); }
    void on_layer_ready(uint32_t layer) override {
        CHECK(!ended && !ready.count(layer));
        ready[layer] = layer_content(layer);
    }
    void on_metadata(uint16_t, const Bytes&, uint16_t, const Bytes&, uint16_t) override {}
    void on_end(const Error& why) override {
        CHECK(!ended);
        ended = true;
        error = why;
        CHECK(memory->only_own_bytes_changed());
        for (const auto& [layer, bytes] : ready) CHECK(bytes == layer_content(layer));
        delivered = content(manifest, all_items(manifest), *memory->map);
        memory->free();
        book_.remove(ticket->options().id);
    }

    bool complete() const { return ended && error.code == ErrorCode::OK; }

    Manifest manifest;
    std::unique_ptr<Memory> memory;
    std::shared_ptr<LandingZone> zone;  // to be set before bind()
    std::shared_ptr<Ticket> ticket;
    std::map<uint32_t, Bytes> ready;
    bool ended = false;
    Error error;
    Bytes delivered;

private:
    // Of a window only the newest tokens count: older ones may come after the layer is ready.
    Bytes layer_content(uint32_t layer) const {
        std::vector<Item> items;
        for (Item item : all_items(manifest)) {
            const uint64_t window = manifest.groups[item.group].window_tokens;
            if (window && item.token_stop - item.token_start > window)
                item.token_start = item.token_stop - window;
            if (item.layer == layer) items.push_back(item);
        }
        return content(manifest, items, *memory->map);
    }

    TicketBook& book_;
};

// A receiver with one ticket.
class ReceiverEnd : public LinkEnd<ReceiveLink>, public Destination {
public:
    ReceiverEnd() : Destination(tickets), link(tickets, with_all_codecs(), [] {}) {}

    void bind(const Manifest& expected, Random& random, bool paged = false) {
        Destination::bind(expected, random, paged);
        link.ticket_added(ticket->options().id);
    }

    void cancel() {
        ticket->fail(Error(ErrorCode::CANCELLED, "the receiver cancelled"));
        link.pull_withdrawn(ticket->options().id);
    }

    TicketBook tickets;
    ReceiveLink link;

private:
    static ReceiveOptions with_all_codecs() {
        ReceiveOptions options;
        options.codecs = 15;
        return options;
    }
    ReceiveLink& machine() override { return link; }
    LaneWriter& open_writer(uint32_t lane) override { return link.lane_opened(lane); }
    void before_writing(uint32_t) override { link.flush(); }
};

// The owner of one transfer: overwrites what comes back to it, and frees it all at the end.
class Source : public TransferObserver {
public:
    Source(const Id& id, const Manifest& manifest, const MemoryMap& truth, Random& random,
           uint8_t codec = 0)
        : manifest(manifest), memory(manifest, random),
          transfer(std::make_shared<SendTransfer>(id, manifest, memory.map, codec, *this)) {
        copy_content(manifest, truth, *memory.map);
    }

    void push(SendLink& link, const std::vector<Item>& items, int32_t priority = 0) {
        pushes.push_back({items, false});
        if (!ended) link.push(*transfer, items, priority);
    }

    void on_granted() override { CHECK(!ended); }
    void on_sent(uint64_t, bool) override { CHECK(!ended); }
    void on_verified(uint64_t) override { CHECK(!ended); }
    void on_push_complete(uint32_t push, const Error&) override {
        CHECK(!ended && push < pushes.size() && !pushes[push].returned);
        pushes[push].returned = true;
        const Placement placement = placed(manifest, pushes[push].items, *memory.map);
        placement.scatter(0, placement.bytes(), Bytes(placement.bytes(), 0xEE).data());
    }
    void on_end(const Error& why) override {
        CHECK(!ended);
        for (const Push& push : pushes) CHECK(push.returned);
        ended = true;
        error = why;
        memory.free();
    }

    struct Push {
        std::vector<Item> items;
        bool returned;
    };
    const Manifest manifest;
    Memory memory;
    std::vector<Push> pushes;
    bool ended = false;
    Error error;
    const std::shared_ptr<SendTransfer> transfer;
};

class SenderEnd : public LinkEnd<SendLink> {
public:
    explicit SenderEnd(uint32_t chunk_bytes = 4096) : link(offers, options(chunk_bytes)) {}

    // Some sends are zero-copy from now on: what they read must stay as it is until return_one().
    void lend(Random& random) { random_ = &random; }
    // The kernel is done with one of them: any. False: there is none.
    bool return_one() {
        if (lent_.empty()) return false;
        const size_t which = pick(*random_, 0, lent_.size() - 1);
        const Lent lent = std::move(lent_[which]);
        lent_.erase(lent_.begin() + which);
        Bytes now;
        for (const iovec& piece : lent.pieces) {
            const auto* from = static_cast<const uint8_t*>(piece.iov_base);
            now.insert(now.end(), from, from + piece.iov_len);
        }
        CHECK(now == lent.content);
        lent.loans->returned(lent.number, lent.number);
        link.loans_changed();
        return true;
    }

    OfferBook offers;
    SendLink link;

private:
    struct Lent {
        std::shared_ptr<Loans> loans;
        uint32_t number;
        std::vector<iovec> pieces;
        Bytes content;
    };

    void sent(LaneWriter& out, const std::vector<iovec>& pieces, const Bytes& bytes) override {
        const uint64_t wish = random_ ? pick(*random_, 0, 3) : 0;
        if (wish) out.lend();
        const bool lent = wish > 1;  // the kernel may take them and copy
        if (lent) lent_.push_back({out.loans(), sends_[out.loans().get()]++, pieces, bytes});
        out.advance(bytes.size(), lent);
    }

    Random* random_ = nullptr;
    std::vector<Lent> lent_;
    std::map<const Loans*, uint32_t> sends_;

    static SendOptions options(uint32_t chunk_bytes) {
        SendOptions options;
        options.chunk_bytes = chunk_bytes;
        options.codecs = 15;
        return options;
    }
    SendLink& machine() override { return link; }
    LaneWriter& open_writer(uint32_t lane) override {
        return link.lane_opened(lane, uint32_t(limits::chunk_bytes_max), 15);
    }
    void before_writing(uint32_t lane) override { link.refill(lane); }
};

// A rung for everything that may be lossy.
inline std::vector<Rounding> roundings_of(const Manifest& manifest, Random& random) {
    static const Rung STATE[] = {Rung::BF16, Rung::E4M3, Rung::INT8_GRID};
    static const Rung OTHER[] = {Rung::E4M3, Rung::INT8, Rung::INT6, Rung::INT4};
    std::vector<Rounding> roundings;
    for (size_t group = 0; group < manifest.groups.size(); ++group) {
        const GroupKind kind = manifest.groups[group].kind;
        if (kind == GroupKind::CONVOLUTION) continue;
        for (size_t tensor = 0; tensor < manifest.groups[group].tensors.size(); ++tensor) {
            const Rung rung = kind == GroupKind::RECURRENT ? STATE[pick(random, 0, 2)]
                                                           : OTHER[pick(random, 0, 3)];
            roundings.push_back({uint16_t(group), uint16_t(tensor), rung, tensor == 0});
        }
    }
    return roundings;
}

// A little of everything, for fuzz targets: one tensor of two chunks, a fused and replicated one,
// and a state with columns; 7 KiB. Where `is_lossy`, tokens that may be rounded and a recurrent
// state too: 21 KiB.
inline Manifest small_hybrid(uint16_t rank, uint16_t ranks, uint32_t blocks, bool is_lossy) {
    Manifest manifest = hybrid(0, is_lossy ? 150 : 70, rank, ranks, blocks);
    auto& groups = manifest.groups;
    groups.erase(groups.begin() + 2, groups.begin() + (is_lossy ? 3 : 4));
    groups[0].layers = {0};
    groups[0].tensors.resize(1);
    if (is_lossy) groups[2].layers = {4};
    manifest.codecs = 15;
    return manifest;
}

struct Frame {
    FrameHeader header;
    Bytes payload;

    FrameType type() const { return header.type; }
    Bytes bytes() const {  // checksums of the payload are made here
        FrameHeader sealed = header;
        sealed.payload_bytes = uint32_t(payload.size());
        sealed.payload_crc = crc32c(0, payload.data(), payload.size());
        const bool is_raw = sealed.type == FrameType::CHUNK && sealed.codec == 0;
        if (is_raw) sealed.raw_crc = sealed.payload_crc;
        Bytes out(HEADER_BYTES);
        encode_header(sealed, out.data());
        out.insert(out.end(), payload.begin(), payload.end());
        return out;
    }
};

inline Frame frame(FrameType type, Bytes payload, const Id& transfer_id = TRANSFER,
                   uint32_t segment_index = 0) {
    Frame made;
    made.header.type = type;
    made.header.transfer_id = transfer_id;
    made.header.segment_index = segment_index;
    made.payload = std::move(payload);
    return made;
}

// The frames of a stream without its greeting.
inline std::vector<Frame> frames_of(const Bytes& stream) {
    std::vector<Frame> frames;
    for (size_t at = 0; at + HEADER_BYTES <= stream.size();) {
        Frame next{decode_header(stream.data() + at, FrameLimits{}), {}};
        at += HEADER_BYTES;
        next.payload.assign(stream.begin() + at, stream.begin() + at + next.header.payload_bytes);
        at += next.header.payload_bytes;
        frames.push_back(std::move(next));
    }
    return frames;
}

}  // namespace kvwire::test
