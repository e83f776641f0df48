// TLS: records as such, and both endpoints inside it. Nothing runs where OpenSSL is not built in.

#include "tests/hand_off.hpp"
#include "transport/tls.hpp"

#if KVWIRE_TLS
#include "transport/tls_records.hpp"

namespace kvwire {
namespace {

using namespace test;

TlsOptions shared_key(uint8_t first_byte = 1) {
    TlsOptions options;
    options.psk_identity = "test";
    options.psk_key.assign(32, 7);
    options.psk_key[0] = first_byte;
    return options;
}

EndpointOptions inside(const TlsOptions& tls) {
    EndpointOptions options;
    options.tls = make_tls_context(tls);
    return options;
}

}  // namespace

TEST(tls_records_come_back_however_the_buffers_are_cut) {
    Random random(1);
    for (const EVP_CIPHER* cipher : {EVP_aes_128_gcm(), EVP_chacha20_poly1305()}) {
        const Digest secret{1, 2, 3};
        TlsCipher sealer(cipher, true, secret), opener(cipher, false, secret);
        for (const size_t bytes : {1, 15, 16, 17, 4096, 16384}) {
            Bytes plain(bytes), got(bytes, 0), spill(TLS_PLAIN_BYTES_MAX);
            for (uint8_t& byte : plain) byte = uint8_t(random());
            Bytes record(bytes + TLS_RECORD_OVERHEAD_BYTES);
            const size_t cut = bytes / 3, room = bytes - bytes / 4;
            const iovec from[] = {{plain.data(), cut}, {plain.data() + cut, bytes - cut}};
            IovecCursor cursor(from, 2);
            CHECK_EQ(sealer.seal(&cursor, bytes, TlsContent::DATA, record.data()), record.size());
            CHECK_EQ(tls_record_bytes(record.data()), record.size());
            const iovec to[] = {{got.data(), cut / 2}, {got.data() + cut / 2, room - cut / 2}};
            IovecCursor into(to, 2);
            const TlsCipher::Opened opened = opener.open(record.data(), &into, spill.data());
            CHECK(opened.authentic && opened.content == TlsContent::DATA);
            CHECK_EQ(opened.bytes, bytes);
            CHECK_EQ(opened.spilled, bytes - room);
            std::copy_n(spill.begin(), opened.spilled, got.begin() + ptrdiff_t(room));
            CHECK(got == plain);
            sealer.update_keys();
            opener.update_keys();
        }
    }
}

TEST(tls_records_show_every_change) {
    const Digest secret{9};
    Bytes plain(100, 5), got(100), spill(TLS_PLAIN_BYTES_MAX);
    const iovec from{plain.data(), plain.size()}, to{got.data(), got.size()};
    for (size_t at = 0; at < 100 + TLS_RECORD_OVERHEAD_BYTES; ++at) {
        if (at == 3 || at == 4) continue;  // the length: checked before, and another record
        TlsCipher sealer(EVP_aes_128_gcm(), true, secret), opener(EVP_aes_128_gcm(), false, secret);
        Bytes record(plain.size() + TLS_RECORD_OVERHEAD_BYTES);
        IovecCursor cursor(&from, 1), into(&to, 1);
        sealer.seal(&cursor, plain.size(), TlsContent::DATA, record.data());
        record[at] ^= 1;
        CHECK(!opener.open(record.data(), &into, spill.data()).authentic);
    }
    TlsCipher sealer(EVP_aes_128_gcm(), true, secret), opener(EVP_aes_128_gcm(), false, secret);
    Bytes record(plain.size() + TLS_RECORD_OVERHEAD_BYTES);
    for (int i = 0; i < 2; ++i) {  // the second one, as if it were the first
        IovecCursor cursor(&from, 1);
        sealer.seal(&cursor, plain.size(), TlsContent::DATA, record.data());
    }
    IovecCursor into(&to, 1);
    CHECK(!opener.open(record.data(), &into, spill.data()).authentic);
}

TEST(transport_delivers_inside_tls) {
    for (const uint16_t lanes : {1, 3}) {
        Pair pair(lanes, inside(shared_key()));
        HandOff big(flat(4096), lanes), small(hybrid(0, 40), lanes);
        for (HandOff* each : {&big, &small}) {
            each->bind(*pair.receiver);
            each->open(*pair.sender, pair.link);
            each->push_all();
        }
        big.check_delivered();
        small.check_delivered();
    }
}

TEST(transport_updates_tls_keys_on_the_way) {
    TlsOptions often = shared_key();
    often.records_per_key_max = 5;
    Pair pair(2, inside(often));
    HandOff big(flat(1024), 1);
    big.bind(*pair.receiver);
    big.open(*pair.sender, pair.link);
    big.push_all();
    big.check_delivered();
}

TEST(transport_cancel_inside_tls_gives_the_memory_back) {
    for (uint64_t i = 0; i < 8; ++i) {
        Pair pair(2, inside(shared_key()));
        HandOff big(flat(512), i);
        big.bind(*pair.receiver);
        big.open(*pair.sender, pair.link);
        big.push_all();
        wait_for_bytes(*big.ticket, i << 16);
        i % 2 ? big.transfer->cancel() : big.ticket->cancel();
        big.check_ended(true);
    }
}

TEST(transport_refuses_another_tls_key) {
    ReceiverEndpoint receiver(inside(shared_key(1)));
    SenderEndpoint sender(inside(shared_key(2)));
    const Id link = sender.dial({"127.0.0.1", receiver.listen({"127.0.0.1", 0})}, 3);
    try {
        sender.wait_connected(link, PATIENCE_S);
        CHECK(!"admitted");
    } catch (const Error& error) {
        CHECK_EQ(error.code, ErrorCode::ADMISSION_REFUSED);
    }
    CHECK_EQ(receiver.stats().links, 0u);
}

}  // namespace kvwire
#endif
