"""kvwire ships the cache of a hybrid language model between machines, verified byte for byte.

    receiver side                                   sender side
    -------------                                   -----------
    tls = kvwire.Tls(ca, certificate, key)          tls = kvwire.Tls(ca, certificate, key)
    receiver = kvwire.Receiver("0.0.0.0:7070",      sender = kvwire.Sender("decode-host:7070",
                               security=tls)                               security=tls)
    ticket = receiver.expect(memory)       -- id →  transfer = sender.open(ticket_id, memory)
    ticket.wait_layer(0) ...                        transfer.push(0) ... transfer.finish()
    ticket.result()                                 transfer.result()

`memory` is a `CacheMemory`: a `CacheSpec` and the arrays that hold it. Nothing is imported before
it is used; torch never is, unless a torch tensor is passed.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "CacheSpec": "layout", "LayerGroup": "layout", "TensorSpec": "layout", "AxisSpec": "layout",
    "Slice": "layout", "Axis": "layout", "DType": "layout", "GroupKind": "layout",
    "attention": "layout", "latent": "layout", "sliding_window": "layout", "recurrent": "layout",
    "convolution": "layout", "auxiliary": "layout", "request_tensor": "layout",
    "CacheMemory": "memory", "CodeBook": "code_book",
    "Lossy": "lossy", "Staging": "kernels.staging",
    "Sender": "sender", "Transfer": "sender", "Offer": "sender", "Push": "sender",
    "Receiver": "receiver", "Ticket": "receiver", "Progress": "handles",
    "Link": "link", "LinkOptions": "link", "LinkStats": "link", "LaneStats": "link",
    "TransferStats": "link", "CongestionThresholds": "link",
    "HmacAdmission": "security", "Tls": "security", "TlsPsk": "security",
    "send": "tensors", "receive": "tensors", "tensor_memory": "tensors",
    "save": "files", "load": "files", "inspect": "files",
    "KvwireError": "errors", "UsageError": "errors", "UnsupportedError": "errors",
    "ForkedError": "errors", "FormatError": "errors", "ChecksumError": "errors",
    "LimitError": "errors", "VersionError": "errors", "RefusedError": "errors",
    "AdmissionError": "errors",
    "SpecMismatchError": "errors", "TicketError": "errors", "OverlapError": "errors",
    "TransferError": "errors", "PeerClosedError": "errors", "TransferTimeout": "errors",
    "TransferCancelled": "errors", "InternalError": "errors", "ErrorCode": "errors",
}

__all__ = ["__version__", "backends", *sorted(_HOME)]


def backends() -> dict[str, object]:
    """Say which variants this process uses: checksum, codecs, kernels of the tiered code and of the
    lossy rungs, back end for device memory; and the OpenSSL that TLS was built with, None if it was
    not. Forced by environment variables (KVWIRE_CRC32C, KVWIRE_LZ4, KVWIRE_TIERED,
    KVWIRE_QUANTISED, KVWIRE_BACKEND)."""
    native = import_module("kvwire._native")
    names = ("raw", "lz4", "tiered", "quantised")
    codecs = [name for bit, name in enumerate(names)
              if native.codecs_available() >> bit & 1]
    return {"crc32c": native.crc32c_active(), "crc32c_variants": native.crc32c_variants(),
            "codecs": codecs, "tiered": native.tiered_active(),
            "tiered_variants": native.tiered_variants(), "quantised": native.quantised_active(),
            "quantised_variants": native.quantised_variants(),
            "backend": import_module("kvwire.kernels.backends").choose(),
            "tls": native.tls_library()}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'kvwire' has no attribute {name!r}")
    return getattr(import_module(f"kvwire.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
