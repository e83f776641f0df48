#pragma once
// Frames as a TAP device with a virtio header gives and takes them: Ethernet, IPv4, TCP; a
// super-frame carries many MTU segments under one set of headers.

#include <arpa/inet.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace netlab {

// As in linux/virtio_net.h, which is no C++.
struct VirtioHeader {
    uint8_t flags = 0, gso_type = 0;
    uint16_t hdr_len = 0, gso_size = 0, csum_start = 0, csum_offset = 0;
};
constexpr uint8_t kNeedsChecksum = 1, kGsoNone = 0, kGsoTcp4 = 1;

constexpr size_t kVirtioBytes = sizeof(VirtioHeader);
static_assert(kVirtioBytes == 10);
constexpr size_t kEthernetBytes = 14;
constexpr size_t kIpAt = kVirtioBytes + kEthernetBytes;
constexpr size_t kFrameBytesMax = kIpAt + 65535;
constexpr size_t kEthernetBytesMin = 60;
constexpr size_t kWireExtraBytes = 24;  // preamble 8, check sequence 4, gap between frames 12

struct Flow;

// A frame and its bytes, in one allocation. Owned by one FramePtr.
struct Frame {
    int64_t due_ns = 0;
    Flow* flow = nullptr;
    uint32_t bytes = 0;
    uint32_t payload_bytes = 0;
    uint32_t segments = 1;
    bool cut = false;

    uint8_t* data() { return reinterpret_cast<uint8_t*>(this + 1); }
};

struct FrameFree {
    void operator()(Frame* frame) const { std::free(frame); }
};
using FramePtr = std::unique_ptr<Frame, FrameFree>;

inline FramePtr new_frame(size_t bytes) {
    void* memory = std::malloc(sizeof(Frame) + bytes);
    if (memory == nullptr) throw std::bad_alloc();
    FramePtr frame(new (memory) Frame);
    frame->bytes = static_cast<uint32_t>(bytes);
    return frame;
}

// Give back what a read did not fill; malloc shrinks in place.
inline FramePtr shrunk(FramePtr frame, size_t bytes) {
    frame->bytes = static_cast<uint32_t>(bytes);
    void* memory = std::realloc(frame.get(), sizeof(Frame) + bytes);
    if (memory == nullptr) throw std::bad_alloc();
    static_cast<void>(frame.release());
    return FramePtr(static_cast<Frame*>(memory));
}

template <class T>
T load(const uint8_t* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <class T>
void store(uint8_t* at, const T& value) {
    std::memcpy(at, &value, sizeof value);
}

// What the link needs to know of a frame's headers, in host order.
struct Headers {
    bool tcp = false;
    uint16_t source_port = 0, destination_port = 0;
    uint32_t seq = 0, ack = 0;
    uint8_t flags = 0;
    size_t tcp_at = 0, payload_at = 0, payload_bytes = 0;  // payload_at: all before it repeats
    size_t segment_payload_bytes = 0;
    size_t segments = 1;

    explicit Headers(Frame& frame) {
        const uint8_t* data = frame.data();
        payload_at = frame.bytes;
        if (frame.bytes < kIpAt + sizeof(iphdr) || load<uint16_t>(data + kIpAt - 2) != htons(0x0800))
            return;
        const auto ip = load<iphdr>(data + kIpAt);
        tcp_at = kIpAt + ip.ihl * 4u;
        const size_t end = kIpAt + ntohs(ip.tot_len);
        if (ip.protocol != IPPROTO_TCP || end > frame.bytes || tcp_at + sizeof(tcphdr) > end) return;
        const auto head = load<tcphdr>(data + tcp_at);
        if (tcp_at + head.doff * 4u > end) return;
        tcp = true;
        source_port = ntohs(head.source);
        destination_port = ntohs(head.dest);
        seq = ntohl(head.seq);
        ack = ntohl(head.ack_seq);
        flags = data[tcp_at + 13];
        payload_at = tcp_at + head.doff * 4u;
        payload_bytes = end - payload_at;
        segment_payload_bytes = payload_bytes;
        const auto virtio = load<VirtioHeader>(data);
        if (virtio.gso_type != kGsoNone && virtio.gso_size > 0) {
            segment_payload_bytes = virtio.gso_size;
            segments = std::max<size_t>(1, (payload_bytes + virtio.gso_size - 1) / virtio.gso_size);
        }
    }

    // Payload of the segments [first, last).
    size_t payload_of(size_t first, size_t last) const {
        return std::min(last * segment_payload_bytes, payload_bytes) - first * segment_payload_bytes;
    }

    // Bytes that one segment takes on an Ethernet wire.
    size_t wire_bytes(size_t segment) const {
        const size_t head = payload_at - kVirtioBytes;
        const size_t bytes = tcp ? head + payload_of(segment, segment + 1) : head;
        return std::max(bytes, kEthernetBytesMin) + kWireExtraBytes;
    }
};

inline uint32_t sum16(const uint8_t* at, size_t bytes) {
    uint32_t sum = 0;
    for (size_t i = 0; i + 1 < bytes; i += 2) sum += load<uint16_t>(at + i);
    return sum;
}

inline uint16_t folded(uint32_t sum) {
    while (sum >> 16) sum = (sum & 0xFFFF) + (sum >> 16);
    return static_cast<uint16_t>(sum);
}

// Make lengths, checksums and the virtio header agree with the frame's size. The TCP checksum is
// left to the receiving stack, which takes the pseudo-header's sum for it.
inline void seal(Frame& frame, size_t tcp_at, size_t segment_payload_bytes) {
    uint8_t* data = frame.data();
    auto ip = load<iphdr>(data + kIpAt);
    ip.tot_len = htons(static_cast<uint16_t>(frame.bytes - kIpAt));
    ip.check = 0;
    store(data + kIpAt, ip);
    ip.check = static_cast<uint16_t>(~folded(sum16(data + kIpAt, tcp_at - kIpAt)));
    store(data + kIpAt, ip);

    const auto tcp_bytes = static_cast<uint16_t>(frame.bytes - tcp_at);
    const uint32_t pseudo = sum16(reinterpret_cast<const uint8_t*>(&ip.saddr), 8) +
                            htons(IPPROTO_TCP) + htons(tcp_bytes);
    auto head = load<tcphdr>(data + tcp_at);
    head.check = folded(pseudo);
    store(data + tcp_at, head);

    const size_t payload_bytes = tcp_bytes - head.doff * 4u;
    VirtioHeader virtio;
    virtio.flags = kNeedsChecksum;
    virtio.csum_start = static_cast<uint16_t>(tcp_at - kVirtioBytes);
    virtio.csum_offset = 16;
    if (payload_bytes > segment_payload_bytes) {
        virtio.gso_type = kGsoTcp4;
        virtio.gso_size = static_cast<uint16_t>(segment_payload_bytes);
        virtio.hdr_len = static_cast<uint16_t>(frame.bytes - payload_bytes - kVirtioBytes);
    }
    store(data, virtio);
}

// Return the segments [first, last) of a super-frame as a frame of its own.
inline FramePtr split(Frame& frame, const Headers& headers, size_t first, size_t last) {
    const size_t skipped = first * headers.segment_payload_bytes;
    const size_t payload_bytes = headers.payload_of(first, last);
    FramePtr part = new_frame(headers.payload_at + payload_bytes);
    uint8_t* data = part->data();
    std::memcpy(data, frame.data(), headers.payload_at);
    std::memcpy(data + headers.payload_at, frame.data() + headers.payload_at + skipped,
                payload_bytes);
    auto ip = load<iphdr>(data + kIpAt);
    ip.id = htons(static_cast<uint16_t>(ntohs(ip.id) + first));
    store(data + kIpAt, ip);
    store(data + headers.tcp_at + 4, htonl(headers.seq + static_cast<uint32_t>(skipped)));
    uint8_t flags = headers.flags;
    if (first > 0) flags &= static_cast<uint8_t>(~0x80);               // CWR: once, at the front
    if (last < headers.segments) flags &= static_cast<uint8_t>(~0x09);  // PSH, FIN: at the end
    data[headers.tcp_at + 13] = flags;
    seal(*part, headers.tcp_at, headers.segment_payload_bytes);
    return part;
}

// Return the reset that answers the segment which these headers opened (54 bytes after the virtio
// header, no options): as from its destination, to its source.
inline FramePtr reset_answering(const uint8_t* opening) {
    constexpr size_t tcp_at = kIpAt + sizeof(iphdr);
    FramePtr frame = new_frame(tcp_at + sizeof(tcphdr));
    uint8_t* data = frame->data();
    std::memcpy(data, opening, frame->bytes);
    for (size_t i = 0; i < 6; ++i) std::swap(data[kVirtioBytes + i], data[kVirtioBytes + 6 + i]);
    auto ip = load<iphdr>(data + kIpAt);
    std::swap(ip.saddr, ip.daddr);
    store(data + kIpAt, ip);
    const auto asked = load<tcphdr>(data + tcp_at);
    tcphdr head{};
    head.source = asked.dest;
    head.dest = asked.source;
    head.doff = sizeof(tcphdr) / 4;
    head.rst = 1;
    head.seq = asked.ack_seq;
    store(data + tcp_at, head);
    seal(*frame, tcp_at, 0);
    return frame;
}

}  // namespace netlab
