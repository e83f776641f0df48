// Which codec a link gets, from what was measured.

#include "tests/test.hpp"
#include "wire/codec_choice.hpp"

namespace kvwire {
namespace {

constexpr uint64_t MS = 1'000'000, CHUNK = 256 << 10;
constexpr double GB = 1e9;
constexpr TensorKind KEYS{GroupKind::FULL_ATTENTION, DType::BF16};
constexpr TensorKind STATES{GroupKind::RECURRENT, DType::FP32};
constexpr TensorKind INDICES{GroupKind::AUXILIARY, DType::INT32};
constexpr uint32_t ALL = 0b111;

uint64_t ns_for(double bytes, double bytes_per_s) { return uint64_t(bytes * 1e9 / bytes_per_s); }

struct Coder {
    double ratio, encode, decode;  // raw bytes per second and core
};

// Two hosts, a link, and a clock that only they move.
struct World {
    double link = 0.125 * GB;  // bytes per second
    double send = 4 * GB, receive = 4 * GB;
    std::map<Codec, Coder> coders = {{Codec::RAW, {1, 16 * GB, 16 * GB}},
                                     {Codec::TIERED, {1.5, 6 * GB, 8 * GB}},
                                     {Codec::LZ4, {1.2, 0.4 * GB, 2 * GB}}};
    std::map<TensorKind, double> ratios;  // of TIERED, where it is another
    double hidden_cost_s = 0;  // per raw byte of a coded chunk
    std::shared_ptr<CodingRecord> record = std::make_shared<CodingRecord>();
    CodecChoice choice{record};
    std::map<Codec, uint32_t> used;
    uint32_t samples = 0;

    double ratio(TensorKind kind, Codec codec) const {
        const auto other = ratios.find(kind);
        return codec == Codec::TIERED && other != ratios.end() ? other->second
                                                               : coders.at(codec).ratio;
    }

    // What the two cores and the link really bring with a codec.
    double wire_rate(TensorKind kind, Codec codec) const {
        const Coder& coder = coders.at(codec);
        const double shrunk = ratio(kind, codec);
        const double here = 1 / coder.encode + 1 / (shrunk * send) +
                            (codec == Codec::RAW ? 0 : hidden_cost_s);
        const double there = 1 / coder.decode + 1 / (shrunk * receive);
        return std::min({link, 1 / here / shrunk, 1 / there / shrunk});
    }

    void report() {
        Speeds speeds;
        speeds.receive_bytes_per_s = uint64_t(receive);
        for (const auto& [codec, coder] : coders)
            for (const TensorKind& kind : {KEYS, STATES, INDICES})
                speeds.decode_bytes_per_s[{codec, kind.dtype}] = uint64_t(coder.decode);
        choice.set_peer(speeds);
    }

    // 50 ms of sending chunks of one kind.
    void interval(TensorKind kind) {
        double ns = 0;
        uint64_t raw_bytes = 0;
        while (ns < 50.0 * MS) {
            const auto [codec, timed, sampled] = choice.next(kind, ALL);
            if (sampled) {
                choice.predicted(kind, CHUNK, uint64_t(CHUNK / ratio(kind, Codec::TIERED)));
                ++samples;
            }
            const double wire = double(CHUNK) / ratio(kind, codec);
            choice.coded(kind, codec, CHUNK, uint64_t(wire),
                         timed ? ns_for(CHUNK, coders.at(codec).encode) : 0);
            choice.sent(uint64_t(wire), ns_for(wire, send));
            ++used[codec];
            raw_bytes += CHUNK;
            ns += wire * 1e9 / wire_rate(kind, codec);
        }
        report();
        choice.moved({raw_bytes, uint64_t(ns), 8 << 20});
    }

    Codec after(int intervals, TensorKind kind = KEYS) {
        for (int i = 0; i < intervals; ++i) interval(kind);
        for (const ChoiceReport& report : choice.report())
            if (!(report.kind < kind) && !(kind < report.kind)) return report.chosen;
        return Codec::RAW;
    }
};

}  // namespace

TEST(codec_choice_begins_with_raw_chunks) {
    World world;
    for (int i = 0; i < 8; ++i) CHECK_EQ(world.choice.next(KEYS, ALL).codec, Codec::RAW);
}

TEST(codec_choice_codes_for_a_slow_link_and_not_for_a_fast_one) {
    World slow, fast;
    fast.link = 10 * GB;
    CHECK_EQ(slow.after(20), Codec::TIERED);
    CHECK_EQ(fast.after(20), Codec::RAW);
    CHECK_EQ(slow.used[Codec::LZ4], 0u);  // floats are not its business
}

TEST(codec_choice_does_not_code_what_does_not_shrink) {
    World world;
    world.coders[Codec::TIERED].ratio = 1.0;
    CHECK_EQ(world.after(40), Codec::RAW);
    CHECK_EQ(world.used[Codec::TIERED], 0u);  // a histogram now and then
    CHECK(world.samples > 0 && world.samples * 50 < world.used[Codec::RAW]);
    world.coders[Codec::TIERED].ratio = 1.5;
    CHECK_EQ(world.after(400), Codec::TIERED);
}

TEST(codec_choice_keeps_kinds_apart) {
    World world;
    world.ratios[STATES] = 1.0;
    for (int i = 0; i < 20; ++i) {
        world.interval(KEYS);
        world.interval(STATES);
    }
    CHECK_EQ(world.after(0, KEYS), Codec::TIERED);
    CHECK_EQ(world.after(0, STATES), Codec::RAW);
}

TEST(codec_choice_takes_lz4_for_integers_where_it_shrinks_them) {
    World world, random;
    random.coders[Codec::LZ4].ratio = 1.0;
    CHECK_EQ(world.after(20, INDICES), Codec::LZ4);
    CHECK_EQ(random.after(20, INDICES), Codec::RAW);
    CHECK_EQ(world.used[Codec::TIERED], 0u);
}

TEST(codec_choice_takes_only_what_is_permitted) {
    World world;
    for (int i = 0; i < 600; ++i) CHECK_EQ(world.choice.next(KEYS, 0b011).codec, Codec::RAW);
}

TEST(codec_choice_knows_a_slow_receiver_from_a_slow_link) {
    World world;  // the receiver decodes slower than the link carries raw bytes
    world.link = 2 * GB;
    world.coders[Codec::TIERED].decode = 1 * GB;
    CHECK_EQ(world.after(100), Codec::RAW);
    CHECK(world.choice.bandwidth_bytes_per_s() > 1.8 * GB);
}

TEST(codec_choice_gives_up_coding_that_brings_less_than_was_predicted) {
    World world;
    world.link = 1 * GB;
    world.hidden_cost_s = 3 / GB;  // of coding and decoding, that no clock sees
    CHECK_EQ(world.after(200), Codec::RAW);
    world.used.clear();
    world.after(2000);
    CHECK(world.used[Codec::TIERED] * 20 < world.used[Codec::RAW]);
    world.hidden_cost_s = 0;
    CHECK_EQ(world.after(2000), Codec::TIERED);
}

TEST(codec_choice_follows_a_link_that_becomes_slow_and_one_that_becomes_fast) {
    World world;
    world.link = 10 * GB;
    CHECK_EQ(world.after(20), Codec::RAW);
    world.link = 0.1 * GB;
    CHECK_EQ(world.after(40), Codec::TIERED);
    world.link = 10 * GB;
    CHECK_EQ(world.after(2000), Codec::RAW);  // raw chunks have been sent to see
}

TEST(codec_choice_seldom_probes_a_link_that_stays_slow) {
    World world;
    world.after(40);
    world.used.clear();
    world.after(4000);
    CHECK(world.used[Codec::RAW] * 100 < world.used[Codec::TIERED]);
}

TEST(codec_choice_does_not_change_for_a_few_percent) {
    World world;
    CHECK_EQ(world.after(20), Codec::TIERED);
    world.coders[Codec::TIERED].ratio = 1.04;  // raw would be cheaper, and hardly slower
    CHECK_EQ(world.after(100), Codec::TIERED);
    world.coders[Codec::TIERED].ratio = 1.00;
    CHECK_EQ(world.after(100), Codec::RAW);
}

TEST(codec_choice_of_equals_takes_the_cheaper) {
    World world;
    world.coders[Codec::TIERED].ratio = 1.04;
    CHECK_EQ(world.after(100), Codec::RAW);
}

TEST(codec_choice_says_why) {
    World world;
    world.after(20);
    const ChoiceReport report = world.choice.report().at(0);
    CHECK_EQ(report.candidates.size(), size_t(2));
    CHECK(report.why.find("tiered brings 1.") == 0);
    CHECK(report.why.find("Gbit/s of cache, bounded by the link; raw would") != std::string::npos);
    CHECK(report.candidates[1].throughput_bytes_per_s >
          1.45 * report.candidates[0].throughput_bytes_per_s);
    for (const CandidateReport& candidate : report.candidates)
        CHECK(candidate.encode_bytes_per_s > 0 && candidate.decode_bytes_per_s > 0);
}

TEST(codec_choice_of_a_second_link_knows_this_host) {
    World world;
    world.after(20);
    CodecChoice second(world.record);
    for (int i = 0; i < 3; ++i) second.sent(CHUNK, ns_for(CHUNK, world.send));
    second.moved({6 << 20, 50 * MS, 1 << 20});
    uint32_t coded = 0;
    for (int i = 0; i < 32; ++i) coded += second.next(KEYS, ALL).codec == Codec::TIERED;
    CHECK(coded > 20);
}

TEST(speeds_arrive_as_they_were_said) {
    Speeds speeds;
    speeds.receive_bytes_per_s = 123'456'789'012;
    speeds.threads = 4;
    speeds.decode_bytes_per_s[{Codec::TIERED, DType::BF16}] = 9'876'543'210;
    speeds.decode_bytes_per_s[{Codec::RAW, DType::FP32}] = 1;
    Bytes payload = encode(speeds);
    Speeds found;
    CHECK(decode(ByteSpan{payload.data(), payload.size()}, &found));
    CHECK_EQ(found.receive_bytes_per_s, speeds.receive_bytes_per_s);
    CHECK_EQ(found.threads, speeds.threads);
    CHECK(found.decode_bytes_per_s == speeds.decode_bytes_per_s);
    for (size_t bytes = 0; bytes < payload.size(); ++bytes)
        CHECK(!decode(ByteSpan{payload.data(), bytes}, &found));
    payload[8] = payload[9] = 0;  // no threads
    CHECK(!decode(ByteSpan{payload.data(), payload.size()}, &found));
}

TEST(speeds_are_reported_when_they_change_and_not_too_often) {
    SpeedMeter meter(2);
    Speeds said;
    uint64_t now = 1'000 * MS;
    CHECK(!meter.take_report(now, &said));  // nothing was received
    const auto receive = [&](double bytes_per_s) {
        for (int i = 0; i < 200; ++i) {
            meter.received(CHUNK, ns_for(CHUNK, bytes_per_s));
            meter.decoded(Codec::RAW, DType::BF16, CHUNK, ns_for(CHUNK, 16 * GB));
        }
    };
    receive(4 * GB);
    CHECK(meter.take_report(now, &said));
    CHECK_EQ(said.threads, 2);
    CHECK(said.receive_bytes_per_s > 3.9 * GB && said.receive_bytes_per_s < 4.1 * GB);
    receive(2 * GB);
    CHECK(!meter.take_report(now + 100 * MS, &said));
    CHECK(meter.take_report(now + 200 * MS, &said));
    CHECK(!meter.take_report(now + 400 * MS, &said));  // as before
}

}  // namespace kvwire
