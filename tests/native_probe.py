"""The native protocol machines behind the interface of the reference, for the parity tests."""

from kvwire import _native
from kvwire.errors import ErrorCode
from kvwire.layout import Axis
from kvwire.reference_memory import ReferenceMemory


def native_memory(memory: ReferenceMemory):
    """Describe the reference's arrays to C++; they are the memory of both."""
    native = _native.MemoryMap()
    windows = {(group.kind, layer): group.window_tokens
               for group in memory.spec.groups for layer in group.layers}
    for key, leaf in memory.leaves.items():
        kind, layer, name = key
        tokens = memory.token_stop - memory.token_start
        axes, token_stride, stride = [], None, leaf.dtype.item_bytes
        for spec in reversed(leaf.axes):
            if spec.axis == Axis.TOKEN:
                token_stride, stride = stride, stride * tokens
                continue
            held = spec.slices[0]
            axes.append((int(spec.axis), held.full, held.start, held.stop, stride))
            stride *= held.stop - held.start
        native.add_leaf(int(kind), layer, name, memory.arrays[key].ctypes.data, int(leaf.dtype),
                        axes)
        if token_stride is not None:
            native.set_tokens(int(kind), layer, name, origin=memory.token_start, count=tokens,
                              start=memory.token_start, stride=token_stride,
                              window_tokens=windows[kind, layer])
    return native


class NativeProbe:
    """The C++ receiver with the methods of the test's ReferenceProbe."""

    def __init__(self, tickets=(), **options):
        self._probe = _native.ReceiverProbe(**options)
        self._memories = {}
        self.feed = lambda lane, data: self._probe.feed(lane, bytes(data))
        self.lane_lost = self._probe.lane_lost
        self.lane_opened = self._probe.lane_opened
        self.lease_over = self._probe.lease_over
        self.cancel = self._probe.cancel
        self.lose_patience = self._probe.lose_patience
        self.layer_ready = self._probe.layer_ready
        self.complete = self._probe.complete
        for manifest in tickets:
            self.bind(manifest)

    def bind(self, manifest):
        memory = ReferenceMemory(manifest.spec, manifest.token_start, manifest.token_stop)
        self._memories[manifest.ticket_id] = memory
        return self._probe.bind(manifest.ticket_id, manifest.encode(), native_memory(memory))

    def failure(self, ticket_id):
        code = self._probe.failure(ticket_id)
        return ErrorCode(code) if code else None

    def lane_error(self, lane):
        code = self._probe.lane_error(lane)
        return ErrorCode(code) if code else None

    def leaves(self, ticket_id):
        return {key: array.tobytes() for key, array in self._memories[ticket_id].arrays.items()}
