#pragma once
// What the application holds: a TransferHandle per transfer it sends, a TicketHandle per hand-off
// it expects. Safe from any thread; waiting never needs the loop's cooperation beyond its events.

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "transport/loop.hpp"
#include "transport/notifier.hpp"
#include "wire/send_link.hpp"
#include "wire/ticket.hpp"

namespace kvwire {

class SenderEndpoint;
class ReceiverEndpoint;

struct Progress {
    uint64_t verified_bytes = 0;  // raw bytes in place at the receiver and proved
    uint64_t wire_bytes = 0;      // chunk payloads sent (sender) or accepted (receiver)
    uint64_t repaired_chunks = 0;
    bool granted = false;
    bool ended = false;
    Error error;                  // OK: delivered
};

class Handle : public Notified, public std::enable_shared_from_this<Handle> {
public:
    const uint64_t number;  // unique in the process

    Progress progress() const;
    bool wait(double timeout_s) const;  // until ended; negative: for ever

protected:
    Handle(std::shared_ptr<Loops> loops, std::shared_ptr<Notifier> notifier);
    bool wait_until(double timeout_s, const std::function<bool()>& condition) const;
    std::shared_ptr<Handle> shared() { return shared_from_this(); }
    void changed() { loops_->notify_later(shared()); }  // with the lock
    void notify() override;
    void hold(std::shared_ptr<Handle> self) { self_ = std::move(self); }
    void let_go();            // once ended: the endpoint's reference goes, off this stack

    const std::shared_ptr<Loops> loops_;
    const std::shared_ptr<Notifier> notifier_;
    mutable std::mutex mutex_;
    mutable std::condition_variable condition_;
    Progress progress_;
    std::optional<Loops::TimerKey> deadline_;  // with the lock
    std::shared_ptr<Handle> self_;            // with the lock; set while the endpoint needs us
    friend class SenderEndpoint;
    friend class ReceiverEndpoint;
};

class TransferHandle : public Handle, public TransferObserver {
public:
    TransferHandle(std::shared_ptr<Loops> loops, std::shared_ptr<Notifier> notifier,
                   SenderEndpoint& endpoint, const Id& id, Manifest manifest,
                   std::shared_ptr<const MemoryMap> memory, uint8_t codec);

    const Id& id() const { return transfer_->id; }

    // Borrows the items' memory, or that of the staged chunks, until the push completes. Returns
    // the push's number.
    uint32_t push(std::vector<Item> items, int32_t priority = 0,
                  std::shared_ptr<const StagedSegment> staged = nullptr);
    // What staged chunks must keep to; zeros: not granted yet, or ended.
    struct Terms {
        uint32_t chunk_bytes = 0, codecs = 0;      // codecs by bit
        uint64_t token_start = 0, token_stop = 0;  // that travel: a PULL may want fewer
    };
    Terms terms() const;
    void finish(Bytes metadata, uint16_t metadata_count);
    // When it returns no byte of the source will be read any more.
    void cancel();

    bool wait_push(uint32_t push, double timeout_s) const;
    enum class PushState : uint8_t { LENT, RETURNED };
    std::vector<PushState> push_states() const;

    struct Timing {
        uint64_t first_push_ns = 0, last_push_ns = 0, ended_ns = 0;  // 0: not yet
        uint64_t overlapped_bytes = 0;  // raw, verified when the last push was made
    };
    Timing timing() const;
    Id link() const;  // zero: none yet, or no more

    void on_granted() override;
    void on_sent(uint64_t wire_bytes, bool again) override;
    void on_verified(uint64_t raw_bytes) override;
    void on_push_complete(uint32_t push, const Error& error) override;
    void on_end(const Error& error) override;

private:
    friend class SenderEndpoint;
    void check(const Item& item) const;
    bool add_push(uint32_t* number);
    SenderEndpoint& endpoint_;  // with the lock, and while the loops run
    const std::shared_ptr<SendTransfer> transfer_;
    // As opened: a PULL may narrow the manifest's tokens later.
    const std::vector<GroupDesc> groups_;
    const uint64_t token_start_, token_stop_;
    std::vector<PushState> pushes_;
    bool finished_ = false;
    Terms terms_;
    Timing timing_;
};

class TicketHandle : public Handle, public TicketObserver {
public:
    TicketHandle(std::shared_ptr<Loops> loops, std::shared_ptr<Notifier> notifier,
                 ReceiverEndpoint& endpoint, Ticket::Options options,
                 std::shared_ptr<const MemoryMap> memory);

    const Id& id() const { return ticket_->options().id; }

    // When it returns no byte will be written to the ticket's memory any more.
    void cancel();
    bool wait_layer(uint32_t layer, double timeout_s) const;  // or until the ticket ended
    std::set<uint32_t> layers_ready() const;
    std::set<uint32_t> layers_touched() const;  // ready ones included

    struct Metadata {
        uint16_t source_rank;
        Bytes manifest, end;
        uint16_t manifest_count, end_count;
    };
    std::vector<Metadata> metadata() const;

    void on_bytes(uint64_t verified_bytes, uint64_t wire_bytes, bool repaired) override;
    void on_layer_touched(uint32_t layer) override;
    void on_layer_ready(uint32_t layer) override;
    void on_metadata(uint16_t source_rank, const Bytes& manifest, uint16_t manifest_count,
                     const Bytes& end, uint16_t end_count) override;
    void on_end(const Error& error) override;

private:
    friend class ReceiverEndpoint;
    ReceiverEndpoint& endpoint_;  // with the lock, and while the loops run
    std::shared_ptr<Ticket> ticket_;
    std::set<uint32_t> layers_ready_, layers_touched_;
    std::map<uint16_t, Metadata> metadata_;
};

}  // namespace kvwire
