#pragma once
// One hand-off between two endpoints of this process, for the tests of transport/.

#include <thread>

#include "codec/codec.hpp"
#include "tests/memory_world.hpp"
#include "transport/endpoint.hpp"

namespace kvwire::test {

constexpr double PATIENCE_S = 120;  // a busy machine under a sanitizer is slow

// One contiguous tensor of 4 KiB per token.
inline Manifest flat(uint64_t tokens) {
    Manifest manifest;
    manifest.groups = {
        {GroupKind::FULL_ATTENTION, 0, {0},
         {{"k", DType::BYTES, 0, false, {{Axis::TOKEN, {}}, whole(Axis::DIM, 4096)}}}}};
    manifest.token_stop = tokens;
    return manifest;
}

inline Ticket::Options ticket_options(const Manifest& manifest) {
    Ticket::Options options;
    options.id = manifest.ticket_id;
    options.model = manifest.model;
    options.token_start = manifest.token_start;
    options.token_stop = manifest.token_stop;
    return options;
}

// Source, destination and the two handles of one hand-off.
struct HandOff {
    HandOff(Manifest described, uint64_t seed)
        : manifest(with_ticket(std::move(described))), random(seed), source(manifest, random),
          destination(manifest, random) {}

    static Manifest with_ticket(Manifest manifest) {
        manifest.ticket_id = random_id();
        return manifest;
    }

    void bind(ReceiverEndpoint& receiver, double deadline_s = -1) {
        ticket = receiver.bind(ticket_options(manifest), destination.map, deadline_s);
    }
    void open(SenderEndpoint& sender, const Id& link, double deadline_s = -1, uint8_t codec = 0) {
        transfer = sender.open(link, manifest, source.map, codec, deadline_s);
    }
    void push_all() {
        for (const Item& item : all_items(manifest)) transfer->push({item});
        transfer->finish({}, 0);
    }
    void check_delivered() {
        CHECK(transfer->wait(PATIENCE_S) && ticket->wait(PATIENCE_S));
        CHECK_EQ(transfer->progress().error.code, ErrorCode::OK);
        CHECK_EQ(ticket->progress().error.code, ErrorCode::OK);
        const std::vector<Item> items = all_items(manifest);
        CHECK(content(manifest, items, *source.map) == content(manifest, items, *destination.map));
        CHECK(destination.only_own_bytes_changed());
    }
    // Ended, with an error unless `may_succeed`; every push came back.
    void check_ended(bool may_succeed = false) {
        CHECK(transfer->wait(PATIENCE_S) && ticket->wait(PATIENCE_S));
        if (!may_succeed) CHECK(transfer->progress().error && ticket->progress().error);
        for (const auto state : transfer->push_states())
            CHECK(state == TransferHandle::PushState::RETURNED);
        CHECK(destination.only_own_bytes_changed());
    }

    const Manifest manifest;
    Random random;
    Memory source, destination;
    std::shared_ptr<TicketHandle> ticket;
    std::shared_ptr<TransferHandle> transfer;
};

struct Pair {
    explicit Pair(uint16_t lanes, EndpointOptions options = {})
        : receiver(std::make_unique<ReceiverEndpoint>(options)),
          sender(std::make_unique<SenderEndpoint>(options)),
          port(receiver->listen({"127.0.0.1", 0})), link(sender->dial({"127.0.0.1", port}, lanes)) {
        sender->wait_connected(link, PATIENCE_S);
    }
    ~Pair() {
        for (Endpoint* endpoint : {static_cast<Endpoint*>(receiver.get()),
                                   static_cast<Endpoint*>(sender.get())})
            if (endpoint) CHECK_EQ(endpoint->stats().internal_errors, 0u);
    }

    std::unique_ptr<ReceiverEndpoint> receiver;
    std::unique_ptr<SenderEndpoint> sender;
    const uint16_t port;
    const Id link;
};

inline EndpointOptions with_codecs() {
    EndpointOptions options;
    options.codecs = options.send.codecs = options.receive.codecs = codecs_available();
    return options;
}

inline void wait_for_bytes(const Handle& handle, uint64_t bytes) {
    while (handle.progress().verified_bytes < bytes && !handle.progress().ended)
        std::this_thread::yield();
}

}  // namespace kvwire::test
