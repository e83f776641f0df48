#include "wire/codec_choice.hpp"

#include <algorithm>
#include <cstdio>

#include "codec/code_table.hpp"

namespace kvwire {
namespace {

constexpr uint32_t FIRST_CHUNKS = 8;  // raw: they show what the path does
constexpr uint32_t SAMPLE_EVERY = 64;  // chunks, while TIERED does not show by itself what it does
constexpr uint32_t TRIAL_EVERY = 256;  // chunks, to see whether the other codecs have changed
constexpr uint32_t FIRST_TRIAL_EVERY = 4, FIRST_TRIALS = 64;  // until they have been measured
constexpr uint32_t TIMED_EVERY = 8;  // reading the time that a core took is slow itself
constexpr double GAIN_MIN = 1.05, LOSS_MAX = 1.01;  // apart, so that nothing swings to and fro
constexpr uint32_t PATIENCE_CHUNKS = 8;
constexpr uint32_t PROBE_EVERY_CHUNKS = 256;
constexpr uint32_t PROBE_EVERY = 16, PROBE_EVERY_MAX = 256;  // times the length of a probe
constexpr double IDLE_SHARE = 0.5;  // of the time: a side that codes for less is not what bounds
constexpr uint64_t VETO_MIN_NS = 1'000'000'000, VETO_MAX_NS = 60'000'000'000;
constexpr uint32_t JUDGED_MIN = 3;  // intervals
constexpr double CHANGED_SHARE = 0.7;
constexpr uint64_t PROBE_MIN_NS = 100'000'000;  // what a probe is taken to last at least
constexpr double NEW_WEIGHT = 0.25;
constexpr double RATIO_KEPT = 63.0 / 64;

std::string name_of(Codec codec) {
    std::string name = codec_name(codec);
    for (char& letter : name) letter = char(letter | 0x20);
    return name;
}

std::string gbit(double bytes_per_s) {
    char text[32];
    std::snprintf(text, sizeof text, "%.3g Gbit/s", bytes_per_s * 8e-9);
    return text;
}

constexpr Codec CODECS[] = {Codec::RAW, Codec::LZ4, Codec::TIERED};

uint32_t bit(Codec codec) { return uint32_t(1) << uint8_t(codec); }

}  // namespace

void CodingRecord::Entry::add(double raw, double wire) {
    raw_bytes = RATIO_KEPT * raw_bytes + raw;
    wire_bytes = RATIO_KEPT * wire_bytes + wire;
}

CodecChoice::CodecChoice(std::shared_ptr<CodingRecord> record)
    : record_(std::move(record)), probe_every_(PROBE_EVERY), next_veto_ns_(VETO_MIN_NS) {}

// One codec besides raw: what shrinks floats does not look at other bytes, and LZ4 cannot shrink
// floats.
uint32_t CodecChoice::candidates(TensorKind kind, uint32_t permitted) {
    const Codec other = element_format(uint8_t(kind.dtype)) ? Codec::TIERED : Codec::LZ4;
    return permitted & (bit(Codec::RAW) | bit(other));
}

const CodingRecord::Entry* CodecChoice::entry(TensorKind kind, Codec codec) const {
    const auto found = record_->entries.find({kind, codec});
    return found == record_->entries.end() ? nullptr : &found->second;
}

// With E, D raw bytes per second and core of coding and decoding, S and K wire bytes of sending and
// receiving, R the ratio and B the bandwidth: each side spends 1/E + 1/(R S) or 1/D + 1/(R K)
// core-seconds per raw byte, and the link passes R B.
CodecChoice::Prediction CodecChoice::predict(TensorKind kind, Codec codec,
                                             double bandwidth) const {
    Prediction found;
    const CodingRecord::Entry* known = entry(kind, codec);
    if (!known || !known->coding.is_known() || !send_.is_known()) return found;
    const double ratio = known->ratio();
    const double encode = known->coding.bytes_per_s();
    const double reported = double(peer_.decode(codec, kind.dtype));
    const double decode = reported > 0 ? reported : encode;
    const double send = ratio * send_.bytes_per_s();
    const double receive =
        peer_.receive_bytes_per_s ? ratio * double(peer_.receive_bytes_per_s) : send;
    const double here_s = 1 / encode + 1 / send, there_s = 1 / decode + 1 / receive;
    found.core_s = here_s + there_s;
    const auto bounded_by = [&](double bytes_per_s, Bound bound) {
        if (found.bytes_per_s > 0 && bytes_per_s >= found.bytes_per_s) return;
        found.bytes_per_s = bytes_per_s;
        found.bound = bound;
    };
    if (cores_.is_shared) {
        bounded_by(cores_.here / found.core_s, Bound::CORES);
    } else {
        bounded_by(cores_.here / here_s, Bound::CODING);
        bounded_by(peer_.threads / there_s, Bound::DECODING);
    }
    if (bandwidth > 0) bounded_by(ratio * bandwidth, Bound::LINK);
    return found;
}

// A look at a chunk's exponents costs less than coding it, and keeps the receiver out of it.
bool CodecChoice::wants_sample(Kind& state, TensorKind kind) {
    if (!(state.permitted & bit(Codec::TIERED)) || state.chosen == Codec::TIERED) return false;
    const bool is_first = state.sampled_at == 0 && !entry(kind, Codec::TIERED);
    if (!is_first && state.chunks - state.sampled_at < SAMPLE_EVERY) return false;
    state.sampled_at = state.chunks;
    return true;
}

// For a trial: of a codec not measured yet soon again, of others now and then, less often if slow.
// What is known not to shrink need not be tried.
bool CodecChoice::is_due(const Kind& state, TensorKind kind, Codec codec) const {
    if (!(state.permitted & bit(codec))) return false;
    const CodingRecord::Entry* known = entry(kind, codec);
    if (codec == Codec::TIERED && known && known->ratio() < GAIN_MIN) return false;
    const bool is_known = known && known->coding.is_known();
    const auto found = state.trials.find(codec);
    if (found == state.trials.end()) return true;
    const auto [count, at] = found->second;
    double every = !is_known && count < FIRST_TRIALS ? FIRST_TRIAL_EVERY : TRIAL_EVERY;
    if (is_known)
        every *= std::max(1.0, predict(kind, codec).core_s / predict(kind, state.chosen).core_s);
    return state.chunks - at >= every;
}

CodecChoice::Pick CodecChoice::next(TensorKind kind, uint32_t permitted) {
    Kind& state = kinds_[kind];
    state.permitted = candidates(kind, permitted);
    if (!(state.permitted & bit(state.chosen))) state.chosen = Codec::RAW;
    ++state.chunks;
    ++chunks_since_probe_;
    const bool timed = state.chunks <= FIRST_CHUNKS || state.chunks % TIMED_EVERY == 0;
    const bool sampled = wants_sample(state, kind);
    if (bandwidth_ == 0 && state.chunks <= FIRST_CHUNKS) return {Codec::RAW, timed, sampled};
    for (const Codec codec : CODECS) {
        if (codec == state.chosen || !is_due(state, kind, codec)) continue;
        auto& [count, at] = state.trials[codec];
        ++count;
        at = state.chunks;
        return {codec, true, sampled};
    }
    if (bandwidth_ > 0) decide(state, kind);
    return {is_coding() ? state.chosen : Codec::RAW, timed, sampled};
}

// What is clearly faster; or as fast, and clearly cheaper for the processors.
Codec CodecChoice::best(const Kind& state, TensorKind kind) const {
    Codec best = state.chosen;
    Prediction of_best = predict(kind, best);
    for (const Codec codec : CODECS) {
        if (!(state.permitted & bit(codec)) || codec == best) continue;
        const Prediction other = predict(kind, codec);
        if (other.bytes_per_s == 0 || of_best.bytes_per_s == 0) continue;
        const bool is_faster = other.bytes_per_s > GAIN_MIN * of_best.bytes_per_s;
        const bool is_cheaper = LOSS_MAX * other.bytes_per_s >= of_best.bytes_per_s &&
                                GAIN_MIN * other.core_s < of_best.core_s;
        if (!is_faster && !is_cheaper) continue;
        best = codec;
        of_best = other;
    }
    return best;
}

void CodecChoice::decide(Kind& state, TensorKind kind) {
    const Codec wanted = best(state, kind);
    state.better = wanted == state.chosen ? 0 : state.better + 1;
    if (state.better < PATIENCE_CHUNKS) return;
    state.chosen = wanted;
    state.better = 0;
}

void CodecChoice::coded(TensorKind kind, Codec tried, uint64_t raw_bytes, uint64_t wire_bytes,
                        uint64_t ns) {
    CodingRecord::Entry& entry = record_->entries[{kind, tried}];
    entry.add(double(raw_bytes), double(wire_bytes));
    if (ns > 0) entry.coding.add(raw_bytes, ns);
    raw_bytes_ = RATIO_KEPT * raw_bytes_ + double(raw_bytes);
    wire_bytes_ = RATIO_KEPT * wire_bytes_ + double(wire_bytes);
}

void CodecChoice::predicted(TensorKind kind, uint64_t raw_bytes, uint64_t wire_bytes) {
    record_->entries[{kind, Codec::TIERED}].add(double(raw_bytes), double(wire_bytes));
}

bool CodecChoice::wants_coding() const {
    return std::any_of(kinds_.begin(), kinds_.end(), [](const auto& one) {
        return one.second.chosen != Codec::RAW;
    });
}

void CodecChoice::moved(const BusyInterval& interval) {
    if (interval.ns == 0) return;
    (is_probing_ ? probe_ns_ : since_probe_ns_) += interval.ns;
    veto_ns_ -= std::min(veto_ns_, interval.ns);
    if (is_coding() != was_coding_) {
        was_coding_ = !was_coding_;
        settling_bytes_ = interval.in_flight_bytes;
        (was_coding_ ? brought_coded_ : brought_raw_) = 0;
        judged_intervals_ = 0;
        return;
    }
    if (settling_bytes_ > 0) {
        settling_bytes_ -= std::min(settling_bytes_, interval.raw_bytes);
        return;
    }
    measure(interval);
    judge();
}

// Raw bytes show what the link carries, or all that can be sent anyway. Coded ones may leave room
// that only raw ones would show.
void CodecChoice::measure(const BusyInterval& interval) {
    const double rate = double(interval.raw_bytes) * 1e9 / double(interval.ns);
    double& brought = was_coding_ ? brought_coded_ : brought_raw_;
    brought += (brought > 0 ? NEW_WEIGHT : 1) * (rate - brought);
    const double carried = brought * (raw_bytes_ > 0 ? wire_bytes_ / raw_bytes_ : 1);
    bandwidth_ = was_coding_ ? std::max(bandwidth_, carried) : carried;
}

// Whether what was expected of coding has come true. What is found out again and again is asked
// ever more seldom.
void CodecChoice::judge() {
    if (++judged_intervals_ < JUDGED_MIN && !is_probing_) return;
    if (was_coding_) {
        if (brought_coded_ > GAIN_MIN * brought_raw_) next_veto_ns_ = VETO_MIN_NS;
        if (brought_raw_ > GAIN_MIN * brought_coded_) {
            veto_ns_ = next_veto_ns_;
            next_veto_ns_ = std::min(2 * next_veto_ns_, VETO_MAX_NS);
            vetoed_at_ = brought_raw_;
        } else if (should_probe()) {
            start_probe();
        }
        return;
    }
    if (veto_ns_ > 0 && brought_raw_ < CHANGED_SHARE * vetoed_at_) veto_ns_ = 0;
    if (!is_probing_) return;
    // That raw chunks brought more once may be chance.
    if (brought_raw_ > GAIN_MIN * brought_coded_ && judged_intervals_ < JUDGED_MIN) return;
    is_probing_ = false;
    since_probe_ns_ = chunks_since_probe_ = 0;
    if (brought_raw_ > GAIN_MIN * brought_coded_) {
        veto_ns_ = next_veto_ns_;
        vetoed_at_ = brought_raw_;
        probe_every_ = PROBE_EVERY;
    } else {
        next_veto_ns_ = VETO_MIN_NS;
        probe_every_ = std::min(2 * probe_every_, PROBE_EVERY_MAX);
    }
}

// Raw chunks can bring more than coded ones where a side is busy coding. Where both are idle half
// of the time the link is slow, and one that became faster would show with coded chunks too.
uint32_t CodecChoice::probe_every() const {
    const bool is_idle = std::all_of(kinds_.begin(), kinds_.end(), [&](const auto& one) {
        const double most = predict(one.first, one.second.chosen, 0).bytes_per_s;
        return brought_coded_ < IDLE_SHARE * most;
    });
    return is_idle ? PROBE_EVERY_MAX : probe_every_;
}

bool CodecChoice::should_probe() const {
    if (since_probe_ns_ < probe_every() * std::max(probe_ns_, PROBE_MIN_NS) ||
        chunks_since_probe_ < PROBE_EVERY_CHUNKS)
        return false;
    return std::any_of(kinds_.begin(), kinds_.end(), [&](const auto& one) {
        const auto& [kind, state] = one;
        return state.chosen != Codec::RAW &&
               predict(kind, Codec::RAW, 0).bytes_per_s > GAIN_MIN * brought_coded_;
    });
}

void CodecChoice::start_probe() {
    is_probing_ = true;
    probe_ns_ = 0;
}

std::string CodecChoice::why(const Kind& state, TensorKind kind) const {
    if (state.permitted == bit(Codec::RAW)) return "no other codec is agreed on";
    const Prediction chosen = predict(kind, state.chosen);
    if (bandwidth_ == 0 || chosen.bytes_per_s == 0)
        return "raw until the link has been busy for a moment";
    if (state.chosen != Codec::RAW && veto_ns_ > 0)
        return "raw brings " + gbit(vetoed_at_) + " of cache, " + name_of(state.chosen) +
               " was tried and brought " + gbit(brought_coded_);
    static const char* const names[] = {"the link", "the cores that code and send",
                                        "the receiver's cores", "the cores that both ends share"};
    std::string text = name_of(state.chosen) + " brings " +
                       gbit(chosen.bytes_per_s) + " of cache, bounded by " +
                       names[size_t(chosen.bound)];
    for (const Codec codec : CODECS) {
        if (codec == state.chosen || !(state.permitted & bit(codec))) continue;
        const Prediction other = predict(kind, codec);
        text += "; " + name_of(codec) +
                (other.bytes_per_s > 0 ? " would bring " + gbit(other.bytes_per_s)
                                       : std::string(" has not been measured"));
    }
    return text;
}

std::vector<ChoiceReport> CodecChoice::report() const {
    std::vector<ChoiceReport> reports;
    for (const auto& [kind, state] : kinds_) {
        const Codec in_use = veto_ns_ > 0 ? Codec::RAW : state.chosen;
        ChoiceReport report{kind, in_use, why(state, kind), {}};
        for (const Codec codec : CODECS) {
            if (!(state.permitted & bit(codec))) continue;
            CandidateReport candidate;
            candidate.codec = codec;
            if (const CodingRecord::Entry* known = entry(kind, codec)) {
                candidate.ratio = known->ratio();
                candidate.encode_bytes_per_s = known->coding.bytes_per_s();
            }
            candidate.decode_bytes_per_s = double(peer_.decode(codec, kind.dtype));
            candidate.throughput_bytes_per_s = predict(kind, codec).bytes_per_s;
            report.candidates.push_back(candidate);
        }
        reports.push_back(std::move(report));
    }
    return reports;
}

}  // namespace kvwire
