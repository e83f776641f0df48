// SHA-256, HMAC and the admission machine, for the tests that hold them against the reference.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "base/sha256.hpp"
#include "bind/convert.hpp"
#include "transport/tls.hpp"
#include "wire/admission.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

Digest digest_from(const std::string& bytes) {
    Digest digest;
    if (bytes.size() != digest.size())
        throw Error(ErrorCode::USAGE, "32 bytes are wanted", digest.size(), bytes.size());
    std::memcpy(digest.data(), bytes.data(), bytes.size());
    return digest;
}

py::bytes to_python(const Digest& digest) {
    return py::bytes(reinterpret_cast<const char*>(digest.data()), digest.size());
}

AdmissionTerms terms_from(const std::string& greeting, const std::string& nonce,
                          const std::string& channel) {
    if (greeting.size() != GREETING_BYTES)
        throw Error(ErrorCode::USAGE, "a greeting has 64 bytes", GREETING_BYTES, greeting.size());
    return {decode_greeting(span_of(greeting).data), digest_from(nonce), digest_from(channel)};
}

// As kvwire.admission.Admission; an error's code shows in `error`.
class AdmissionProbe {
public:
    explicit AdmissionProbe(Admission admission) : admission_(std::move(admission)) {}

    py::bytes feed(const std::string& data) {
        rest_ += data;
        try {
            while (!error_ && !admission_.done() && !rest_.empty()) {
                const iovec into = admission_.next();
                const size_t part = std::min(into.iov_len, rest_.size());
                std::memcpy(into.iov_base, rest_.data(), part);
                rest_.erase(0, part);
                admission_.advance(part);
            }
        } catch (const Error& error) {
            error_ = uint16_t(error.code);
            admission_.last_words(error);
        }
        return kvwire::to_python(admission_.take_output());
    }
    py::object link_key() const {
        return admission_.link_key() ? py::object(to_python(*admission_.link_key())) : py::none();
    }
    bool done() const { return admission_.done(); }
    py::bytes rest() const { return py::bytes(done() ? rest_ : std::string()); }
    uint16_t error() const { return error_; }

private:
    Admission admission_;
    std::string rest_;
    uint16_t error_ = 0;
};

Bytes bytes_of(const std::string& text) { return Bytes(text.begin(), text.end()); }

}  // namespace

void register_security(py::module_& module) {
    module.def("tls_library", [] {
        return tls_library() ? py::object(py::str(tls_library())) : py::none();
    }, "The OpenSSL that kvwire was built with; None: there is no TLS.");
    module.def("sha256", [](const std::string& data) {
        Sha256 hash;
        hash.update(span_of(data));
        return to_python(hash.finish());
    }, py::arg("data"));
    module.def("hmac_sha256", [](const std::string& key, const std::string& a,
                                 const std::string& b) {
        return to_python(hmac_sha256(span_of(key), {span_of(a), span_of(b)}));
    }, py::arg("key"), py::arg("a"), py::arg("b"));
    py::class_<AdmissionProbe>(module, "AdmissionProbe")
        .def_static("dial", [](const std::string& greeting, const std::string& key,
                               const std::string& nonce, const std::string& channel) {
            return AdmissionProbe(Admission::dial(terms_from(greeting, nonce, channel),
                                                  bytes_of(key)));
        }, py::arg("greeting"), py::arg("key"), py::arg("nonce"), py::arg("channel"))
        // `key`: None refuses with LINK_UNKNOWN.
        .def_static("accept", [](const std::string& greeting, std::optional<std::string> key,
                                 const std::string& nonce, const std::string& channel) {
            return AdmissionProbe(Admission::accept(
                terms_from(greeting, nonce, channel), [key](const Greeting&) {
                    if (!key) throw Error(ErrorCode::LINK_UNKNOWN, "no such link");
                    return bytes_of(*key);
                }));
        }, py::arg("greeting"), py::arg("key"), py::arg("nonce"), py::arg("channel"))
        .def("feed", &AdmissionProbe::feed, py::arg("data"))
        .def_property_readonly("done", &AdmissionProbe::done)
        .def_property_readonly("rest", &AdmissionProbe::rest)
        .def_property_readonly("error", &AdmissionProbe::error)
        .def_property_readonly("link_key", &AdmissionProbe::link_key);
}

}  // namespace kvwire
