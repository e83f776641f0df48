#include "transport/handles.hpp"

#include <sched.h>

#include <algorithm>

#include "transport/endpoint.hpp"

namespace kvwire {
namespace {
std::atomic<uint64_t> next_number{1};

// What is nearly there is waited for awake: to be woken takes longer than the rest of a round trip.
constexpr uint64_t YIELD_NS = 30'000;
}

Handle::Handle(std::shared_ptr<Loops> loops, std::shared_ptr<Notifier> notifier)
    : number(next_number++), loops_(std::move(loops)), notifier_(std::move(notifier)) {}

Progress Handle::progress() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return progress_;
}

void Handle::notify() {
    condition_.notify_all();
    notifier_->mark(number);
}

void Handle::let_go() {
    if (deadline_) loops_->cancel(*deadline_);
    deadline_.reset();
    if (self_) loops_->post([self = std::move(self_)] {});
}

bool Handle::wait_until(double timeout_s, const std::function<bool()>& condition) const {
    std::unique_lock<std::mutex> lock(mutex_);
    for (const uint64_t start_ns = Loops::now_ns();
         timeout_s != 0 && !condition() && Loops::now_ns() - start_ns < YIELD_NS;) {
        lock.unlock();
        ::sched_yield();
        lock.lock();
    }
    if (timeout_s < 0) {
        condition_.wait(lock, condition);
        return true;
    }
    return condition_.wait_for(lock, std::chrono::duration<double>(timeout_s), condition);
}

bool Handle::wait(double timeout_s) const {
    return wait_until(timeout_s, [this] { return progress_.ended; });
}

TransferHandle::TransferHandle(std::shared_ptr<Loops> loops, std::shared_ptr<Notifier> notifier,
                               SenderEndpoint& endpoint, const Id& id, Manifest manifest,
                               std::shared_ptr<const MemoryMap> memory, uint8_t codec)
    : Handle(std::move(loops), std::move(notifier)), endpoint_(endpoint),
      transfer_(std::make_shared<SendTransfer>(id, std::move(manifest), std::move(memory), codec,
                                               *this)),
      groups_(transfer_->manifest.groups), token_start_(transfer_->manifest.token_start),
      token_stop_(transfer_->manifest.token_stop) {}

void TransferHandle::check(const Item& item) const {
    const auto refuse = [&](const std::string& what) {
        throw Error(ErrorCode::USAGE, "push: item (group " + std::to_string(item.group) +
                                          ", tensor " + std::to_string(item.tensor) + ", layer " +
                                          std::to_string(item.layer) + "): " + what);
    };
    if (item.group >= groups_.size()) refuse("the spec has no such group");
    const GroupDesc& group = groups_[item.group];
    if (item.tensor >= group.tensors.size()) refuse("the group has no such tensor");
    if (!std::binary_search(group.layers.begin(), group.layers.end(), item.layer))
        refuse("the group has no such layer");
    const bool has_tokens = group.tensors[item.tensor].has_tokens();
    if (item.token_stop < item.token_start ||
        (has_tokens ? item.token_start < token_start_ || item.token_stop > token_stop_
                    : item.token_stop != 0))
        refuse("tokens [" + std::to_string(item.token_start) + ", " +
               std::to_string(item.token_stop) + ") are not part of the transfer");
}

uint32_t TransferHandle::push(std::vector<Item> items, int32_t priority,
                              std::shared_ptr<const StagedSegment> staged) {
    for (const Item& item : items) check(item);
    uint32_t number = 0;
    const bool running = loops_->call([&] {
        if (add_push(&number)) endpoint_.push(*this, std::move(items), priority, std::move(staged));
    });
    if (!running) add_push(&number);
    return number;
}

// False: the transfer has ended, and the push is the caller's again at once.
bool TransferHandle::add_push(uint32_t* number) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (finished_)
        throw Error(ErrorCode::USAGE, "push after finish: the transfer's end has been announced");
    *number = uint32_t(pushes_.size());
    pushes_.push_back(progress_.ended ? PushState::RETURNED : PushState::LENT);
    timing_.last_push_ns = Loops::now_ns();
    if (timing_.first_push_ns == 0) timing_.first_push_ns = timing_.last_push_ns;
    timing_.overlapped_bytes = progress_.verified_bytes;
    return !progress_.ended;
}

void TransferHandle::finish(Bytes metadata, uint16_t metadata_count) {
    loops_->call([&] {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (finished_) throw Error(ErrorCode::USAGE, "finish was called before");
            finished_ = true;
        }
        endpoint_.finish(*this, std::move(metadata), metadata_count);
    });
}

void TransferHandle::cancel() {
    const Error why(ErrorCode::CANCELLED, "cancelled by the sender");
    // Zero-copy sends may still read the source: then its end comes when they are over.
    if (loops_->call([&] { endpoint_.fail(*this, why); })) wait(-1);
}

bool TransferHandle::wait_push(uint32_t push, double timeout_s) const {
    return wait_until(timeout_s, [&] {
        return push < pushes_.size() && pushes_[push] == PushState::RETURNED;
    });
}

std::vector<TransferHandle::PushState> TransferHandle::push_states() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return pushes_;
}

TransferHandle::Terms TransferHandle::terms() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return progress_.ended ? Terms{} : terms_;
}

TransferHandle::Timing TransferHandle::timing() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return timing_;
}

Id TransferHandle::link() const {
    Id id;
    loops_->call([&] { id = endpoint_.link_id_of(*this); });
    return id;
}

void TransferHandle::on_granted() {
    std::lock_guard<std::mutex> lock(mutex_);
    progress_.granted = true;
    terms_ = {transfer_->chunk_bytes, transfer_->codecs, transfer_->manifest.token_start,
              transfer_->manifest.token_stop};
    changed();
}

void TransferHandle::on_sent(uint64_t wire_bytes, bool again) {
    std::lock_guard<std::mutex> lock(mutex_);
    progress_.wire_bytes += wire_bytes;
    progress_.repaired_chunks += again;
}

void TransferHandle::on_verified(uint64_t raw_bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    progress_.verified_bytes += raw_bytes;
    changed();
}

void TransferHandle::on_push_complete(uint32_t push, const Error&) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (push < pushes_.size()) pushes_[push] = PushState::RETURNED;
    changed();
}

void TransferHandle::on_end(const Error& error) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        progress_.ended = true;
        progress_.error = error;
        for (PushState& push : pushes_) push = PushState::RETURNED;
        timing_.ended_ns = Loops::now_ns();
        changed();
    }
    let_go();
}

TicketHandle::TicketHandle(std::shared_ptr<Loops> loops, std::shared_ptr<Notifier> notifier,
                           ReceiverEndpoint& endpoint, Ticket::Options options,
                           std::shared_ptr<const MemoryMap> memory)
    : Handle(std::move(loops), std::move(notifier)), endpoint_(endpoint),
      ticket_(std::make_shared<Ticket>(std::move(options), std::move(memory), *this)) {
    layers_ready_ = ticket_->layers_without_needs();
}

void TicketHandle::cancel() {
    const Error why(ErrorCode::CANCELLED, "cancelled by the receiver");
    loops_->call([&] { endpoint_.cancel(*this, why); });
}

bool TicketHandle::wait_layer(uint32_t layer, double timeout_s) const {
    return wait_until(timeout_s,
                      [&] { return progress_.ended || layers_ready_.count(layer) != 0; });
}

std::set<uint32_t> TicketHandle::layers_ready() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return layers_ready_;
}

std::set<uint32_t> TicketHandle::layers_touched() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return layers_touched_;
}

std::vector<TicketHandle::Metadata> TicketHandle::metadata() const {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Metadata> all;
    for (const auto& [rank, metadata] : metadata_) all.push_back(metadata);
    return all;
}

void TicketHandle::on_bytes(uint64_t verified_bytes, uint64_t wire_bytes, bool repaired) {
    std::lock_guard<std::mutex> lock(mutex_);
    progress_.granted = true;
    progress_.verified_bytes += verified_bytes;
    progress_.wire_bytes += wire_bytes;
    progress_.repaired_chunks += repaired;
}

void TicketHandle::on_layer_touched(uint32_t layer) {
    std::lock_guard<std::mutex> lock(mutex_);
    layers_touched_.insert(layer);
}

void TicketHandle::on_layer_ready(uint32_t layer) {
    std::lock_guard<std::mutex> lock(mutex_);
    layers_ready_.insert(layer);
    changed();
}

void TicketHandle::on_metadata(uint16_t source_rank, const Bytes& manifest, uint16_t manifest_count,
                               const Bytes& end, uint16_t end_count) {
    std::lock_guard<std::mutex> lock(mutex_);
    progress_.granted = true;
    metadata_[source_rank] = {source_rank, manifest, end, manifest_count, end_count};
}

void TicketHandle::on_end(const Error& error) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        progress_.ended = true;
        progress_.error = error;
        changed();
    }
    endpoint_.ticket_ended(id());
    let_go();
}

}  // namespace kvwire
