"""What the scenarios of test_reference.py are played with: a receiver, a sender, and an ear."""

from dataclasses import dataclass, field

from vectors.generate import LINK, TICKET, TRANSFER, all_items, filled

from kvwire.codec import Codec
from kvwire.control import Abort, Done, Grant, Receipt, Repair
from kvwire.manifest import Manifest
from kvwire.reference import ReferenceReceiver
from kvwire.reference_memory import ReferenceMemory, ReferenceTicket
from kvwire.reference_sender import ReferenceSender
from kvwire.wire import FrameReader, FrameType, Role


class ReferenceProbe:
    """The receiver under test. Another implementation offers the same methods.

    A ticket is made of a manifest that says what it expects; its memory is poisoned.
    """

    def __init__(self, tickets=(), **options):
        self._receiver = ReferenceReceiver({
            manifest.ticket_id: self._ticket(manifest) for manifest in tickets},
            codecs=sum(1 << codec for codec in Codec), **options)
        self.feed = self._receiver.feed
        self.lane_lost = self._receiver.lane_lost
        self.lane_opened = self._receiver.lane_opened
        self.lease_over = self._receiver.lease_over
        self.cancel = self._receiver.cancel
        self.lose_patience = self._receiver.lose_patience
        self.layer_ready = self._receiver.layer_ready

    @staticmethod
    def _ticket(manifest):
        memory = ReferenceMemory(manifest.spec, manifest.token_start, manifest.token_stop)
        return ReferenceTicket(memory, manifest.source_rank_count, manifest.destination_rank,
                               manifest.destination_rank_count)

    def bind(self, manifest):
        return self._receiver.bind(manifest.ticket_id, self._ticket(manifest))

    def complete(self, ticket_id):
        return self._receiver.tickets[ticket_id].complete

    def failure(self, ticket_id):
        """The code with which a ticket has failed, or None."""
        error = self._receiver.tickets[ticket_id].error
        return error and error.code

    def lane_error(self, lane):
        """The code for which a lane was closed, or None while it is open."""
        error = self._receiver.lane_errors.get(lane)
        return error and error.code

    def leaves(self, ticket_id):
        """{(kind, layer, leaf): bytes} of a ticket's memory, in the order of its spec."""
        arrays = self._receiver.tickets[ticket_id].memory.arrays
        return {key: array.tobytes() for key, array in arrays.items()}


@dataclass
class Heard:
    """What a receiver answered, without the order and bundling that it is free to choose."""

    grants: int = 0
    chunks: set = field(default_factory=set)
    segments: set = field(default_factory=set)
    repairs: list = field(default_factory=list)
    done: list = field(default_factory=list)
    aborts: list = field(default_factory=list)
    pongs: list = field(default_factory=list)

    @property
    def refusals(self):
        return self.aborts + [entry.reason for entry in self.repairs]


class Listener:
    """Reads a receiver's answers on all lanes."""

    def __init__(self):
        self._readers = {}

    def hear(self, answers):
        heard = Heard()
        for lane, data in answers:
            reader = self._readers.setdefault(lane, FrameReader(Role.SENDER))
            for header, payload in reader.feed(data):
                self._note(heard, header, payload)
        return heard

    def _note(self, heard, header, payload):
        if header.type == FrameType.GRANT:
            heard.grants += 1
            assert Grant.decode(payload).codecs & 1
        elif header.type == FrameType.RECEIPT:
            for run_ in Receipt.decode(payload).runs:
                if run_.chunk_count == 0:
                    heard.segments.add(run_.segment_index)
                heard.chunks |= {(run_.segment_index, run_.chunk_first + chunk)
                                 for chunk in range(run_.chunk_count)}
        elif header.type == FrameType.REPAIR:
            heard.repairs += Repair.decode(payload).entries
        elif header.type == FrameType.DONE:
            heard.done.append(Done.decode(payload))
        elif header.type == FrameType.ABORT:
            heard.aborts.append(Abort.decode(payload).code)
        elif header.type == FrameType.PONG:
            heard.pongs.append(payload)


def expected_leaves(spec, tokens, into=None, fill=filled):
    """What arrives in a ticket of `into`, by way of the reference alone."""
    source = fill(spec, *tokens)
    target = ReferenceMemory(into or spec, *tokens)
    for item in all_items(spec, *tokens):
        target.zero_missing_columns(spec, [item])
        target.scatter(spec, [item], frozenset(), 0, source.gather(spec, [item]))
    return {key: array.tobytes() for key, array in target.arrays.items()}


def sender_of(spec, tokens, *, transfer_id=TRANSFER, rank=0, ranks=1, items=None, per_segment=1,
              fill=filled, **options):
    source = fill(spec, *tokens)
    items = all_items(spec, *tokens) if items is None else items
    groups = [items[at:at + per_segment] for at in range(0, len(items), per_segment)]
    codec = options.get("codec", Codec.RAW)
    manifest = Manifest(TICKET, spec, *tokens, rank, ranks, codecs=1 << codec | 1)
    return ReferenceSender(manifest, [(part, source.gather(spec, part)) for part in groups],
                           transfer_id=transfer_id, link_id=LINK, **options)
