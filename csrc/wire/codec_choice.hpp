#pragma once
// Which lossless codec brings most cache over a link. A cost rule over what was measured (how fast
// this host codes and sends and the peer receives and decodes, what the link carries, how far each
// codec shrinks each kind of tensor) says what should be tried; what it then brings says whether it
// stays. No I/O, no clock. Velox chooses the codec of its exchanges by such a rule
// (https://github.com/facebookincubator/velox/pull/18746).

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "wire/speeds.hpp"

namespace kvwire {

// Tensors that code alike.
struct TensorKind {
    GroupKind group{};
    DType dtype{};
    bool operator<(const TensorKind& other) const {
        return std::make_pair(group, dtype) < std::make_pair(other.group, other.dtype);
    }
};

// What a host has learned about its own coding: outlives links, may be shared by them.
struct CodingRecord {
    struct Entry {
        Speed coding;  // raw bytes
        double raw_bytes = 0, wire_bytes = 0;  // of late, coded or predicted
        double ratio() const { return wire_bytes > 0 ? raw_bytes / wire_bytes : 1; }
        void add(double raw, double wire);
    };
    std::map<std::pair<TensorKind, Codec>, Entry> entries;
};

// How the threads of a link's two ends come by cores.
struct Cores {
    uint32_t here = 1;       // for our I/O threads
    bool is_shared = false;  // the peer's threads have the same ones
};

// What a link brought while there was something to bring.
struct BusyInterval {
    uint64_t raw_bytes = 0;  // verified at the receiver
    uint64_t ns = 0;
    uint64_t in_flight_bytes = 0;  // raw: sent and not verified, in the end
};

struct CandidateReport {
    Codec codec{};
    double ratio = 1;
    double encode_bytes_per_s = 0, decode_bytes_per_s = 0;  // raw, of one core; 0: not known
    double throughput_bytes_per_s = 0;  // raw, predicted; 0: not known
};

struct ChoiceReport {
    TensorKind kind;
    Codec chosen{};
    std::string why;
    std::vector<CandidateReport> candidates;
};

class CodecChoice {
public:
    explicit CodecChoice(std::shared_ptr<CodingRecord> record);

    struct Pick {
        Codec codec{};
        bool timed = false;    // coded() wants to hear how long it took
        bool sampled = false;  // predicted() wants to hear what TIERED would make of it
    };
    // For the next chunk of this kind; `permitted` has bit n set for codec n.
    Pick next(TensorKind kind, uint32_t permitted);

    // What a chunk came to with the codec that was tried, and how long it took a core (0: not
    // measured). A chunk that did not shrink has `wire_bytes` equal to `raw_bytes`. Not to be told
    // of chunks that were unlike others of the kind.
    void coded(TensorKind kind, Codec tried, uint64_t raw_bytes, uint64_t wire_bytes, uint64_t ns);
    // What a sample of a chunk says that TIERED would make of it.
    void predicted(TensorKind kind, uint64_t raw_bytes, uint64_t wire_bytes);
    void sent(uint64_t wire_bytes, uint64_t ns) { send_.add(wire_bytes, ns); }
    void set_cores(Cores cores) { cores_ = cores; }
    void set_peer(const Speeds& peer) { peer_ = peer; }
    void moved(const BusyInterval& interval);

    // Of the link, as far as it was needed; 0: not known.
    double bandwidth_bytes_per_s() const { return bandwidth_; }
    double send_bytes_per_s() const { return send_.bytes_per_s(); }
    const Speeds& peer() const { return peer_; }
    std::vector<ChoiceReport> report() const;

private:
    enum class Bound { LINK, CODING, DECODING, CORES };
    struct Prediction {
        double bytes_per_s = 0;  // raw; 0: not known
        double core_s = 0;       // per raw byte, on both hosts
        Bound bound{};
    };
    struct Kind {
        Codec chosen = Codec::RAW;
        uint32_t permitted = 1;
        uint32_t chunks = 0;
        uint32_t better = 0;  // chunks in a row for which another codec was
        uint32_t sampled_at = 0;  // the latest: which chunk
        struct Trials {
            uint32_t count = 0, at = 0;  // the latest: which chunk
        };
        std::map<Codec, Trials> trials;
    };

    static uint32_t candidates(TensorKind kind, uint32_t permitted);
    const CodingRecord::Entry* entry(TensorKind kind, Codec codec) const;
    Prediction predict(TensorKind kind, Codec codec, double bandwidth) const;
    Prediction predict(TensorKind kind, Codec codec) const {
        return predict(kind, codec, bandwidth_);
    }
    bool wants_sample(Kind& state, TensorKind kind);
    bool is_due(const Kind& state, TensorKind kind, Codec codec) const;
    Codec best(const Kind& state, TensorKind kind) const;
    void decide(Kind& state, TensorKind kind);
    bool wants_coding() const;
    bool is_coding() const { return wants_coding() && !is_probing_ && veto_ns_ == 0; }
    void measure(const BusyInterval& interval);
    void judge();
    bool should_probe() const;
    uint32_t probe_every() const;
    void start_probe();
    std::string why(const Kind& state, TensorKind kind) const;

    const std::shared_ptr<CodingRecord> record_;
    std::map<TensorKind, Kind> kinds_;
    Speed send_;
    Cores cores_;
    Speeds peer_;
    double bandwidth_ = 0;
    double raw_bytes_ = 0, wire_bytes_ = 0;  // coded of late, of all kinds
    // What a busy link brought, in raw bytes per second, with raw chunks and with coded ones, while
    // they were last sent; 0: not measured.
    double brought_raw_ = 0, brought_coded_ = 0;
    bool was_coding_ = false;
    uint32_t judged_intervals_ = 0;  // since that changed
    uint64_t settling_bytes_ = 0;  // on their way when that changed, raw
    // Raw chunks are sent to see what they bring now.
    bool is_probing_ = false;
    uint64_t probe_ns_ = 0;  // the latest one's length
    uint64_t since_probe_ns_ = 0;
    uint32_t chunks_since_probe_ = 0, probe_every_;
    // Coding was tried and brought less than raw chunks.
    uint64_t veto_ns_ = 0, next_veto_ns_;
    double vetoed_at_ = 0;  // brought_raw_ then
};

}  // namespace kvwire
