#pragma once
// Sans-I/O reading side of a lane: says where the next bytes of the stream go (straight into the
// destination pages for chunk payloads), and turns what arrived into calls on a FrameHandler.
// Any split of the stream gives the same calls.

#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <memory>

#include "base/bytes.hpp"
#include "base/cpu_clock.hpp"
#include "plan/placement.hpp"
#include "wire/chunk_coder.hpp"
#include "wire/frames.hpp"

namespace kvwire {

// Where the payload of one chunk goes. Exactly one of three: into pages (placement), into a staging
// buffer and from there to its place, or nowhere. A revoked target goes nowhere from then on.
struct ChunkTarget {
    const Placement* placement = nullptr;
    uint8_t* staging = nullptr;  // the payload; for LZ4 raw bytes and scratch behind it
    FrameHeader header;
    uint32_t item_bytes = 1;
    const ReceiveTables* tables = nullptr;  // of the link

    // The payload is complete: verifies it, and brings what was staged to its place. Once.
    const Landing& land(uint32_t payload_crc);

    // With several threads: true while the lane that reads works on the target without the lock.
    std::atomic<bool> in_section{false};

    // Afterwards nobody writes there any more. Waits for the section of another thread.
    void revoke();
    bool discards() const { return placement == nullptr && staging == nullptr; }

private:
    Landing stage_out(uint32_t payload_crc);
    std::unique_ptr<ChunkDecoder> decoder_;  // once it was needed
    bool landed_ = false;
    Landing landing_;
};

class FrameHandler {
public:
    virtual ~FrameHandler() = default;
    virtual void on_control(uint32_t lane, const FrameHeader& header, ByteSpan payload) = 0;
    // The returned target stays valid until on_chunk_end or lane_lost; the handler may revoke it.
    virtual ChunkTarget* on_chunk(uint32_t lane, const FrameHeader& header) = 0;
    virtual void on_chunk_end(uint32_t lane, uint32_t payload_crc) = 0;
    // How long a core took to receive and to digest the chunk that ends now.
    virtual void on_chunk_times(uint32_t, uint64_t /*receive_ns*/, uint64_t /*digest_ns*/) {}
};

class LaneReader {
public:
    static constexpr size_t IOV_MAX_READ = 512;

    // `handler` gets every frame; the greeting is not read here.
    LaneReader(FrameHandler& handler, uint32_t lane, FrameLimits limits);

    // Buffers for the next bytes of the stream, in order; never empty. Valid until advance().
    size_t next_iovecs(const iovec** iov);

    // `bytes` bytes have arrived in them. Throws Error when the stream must be closed.
    void advance(size_t bytes);

    // With several threads advance() is called under the owner's lock. The work on payloads can be
    // done before it and without the lock, from begin_section() (with the lock) to end_section().
    void begin_section();
    void digest(size_t bytes);
    void end_section();

    // Whether note_times() wants to hear how long receiving and digest() take just now.
    bool wants_times() const { return is_timed_; }
    void note_times(uint64_t receive_ns, uint64_t digest_ns) {
        receive_ns_ += receive_ns;
        digest_ns_ += digest_ns;
    }

    // Bytes that lie in memory, taken as they would be from a socket.
    void feed(const uint8_t* bytes, size_t count);

    // Bytes that are sure to come before the next frame begins.
    uint64_t chunk_rest() const {
        return state_ == State::CHUNK ? header_.payload_bytes - received_ : 0;
    }

    // The stream has ended; throws TRUNCATED when it ended inside a frame.
    void end_of_stream() const;

private:
    enum class State { HEADER, CONTROL, CHUNK };

    void consume_chunk(size_t bytes);
    void header_complete();
    void payload_complete();
    void targets();
    void consume(size_t bytes);

    FrameHandler& handler_;
    uint32_t lane_;
    FrameLimits limits_;
    State state_ = State::HEADER;
    FrameHeader header_;
    uint8_t header_bytes_[HEADER_BYTES];
    uint32_t received_ = 0;  // of the header or payload, by state
    uint32_t crc_ = 0;
    uint32_t digested_ = 0;  // payload bytes that crc_ covers and received_ does not
    ChunkTarget* section_ = nullptr;
    Sampler sampler_;
    bool is_timed_ = false;  // the present chunk
    uint64_t receive_ns_ = 0, digest_ns_ = 0;  // of it so far
    bool closed_ = false;  // the peer said CLOSE
    ChunkTarget* target_ = nullptr;
    std::unique_ptr<uint8_t[]> control_;
    size_t control_capacity_ = 0;
    iovec iov_[IOV_MAX_READ];
    size_t iov_count_ = 0;
    bool reads_ahead_ = false;  // the last of iov_ is the read-ahead buffer
    uint8_t ahead_[8192];
    uint8_t scratch_[16384];
};

}  // namespace kvwire
