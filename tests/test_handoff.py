"""Hand-offs of several ranks, pulls, and either side dialling."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import kvwire
from faults import ADMISSION_BYTES, DOWN, UP, Fault, Held, Proxy, eventually, fails, same_content
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec

TOKENS = 13
LAYERS = 4
DENSE = CacheSpec("dense", (kvwire.attention(range(LAYERS), kv_heads=4, head_dim=8,
                                             block_tokens=4),))
MLA = CacheSpec("mla", (kvwire.latent(range(LAYERS), latent_dim=12, rope_dim=4),))
HYBRID = CacheSpec("hybrid", (
    kvwire.attention((1, 3), kv_heads=4, head_dim=8),
    kvwire.recurrent((0, 2), heads=4, key_dim=4, value_dim=8),
    kvwire.convolution((0, 2), {"q": 16, "k": 16, "v": 32}, columns=3),
    kvwire.request_tensor("delta", (5,), "int32"),
))


@pytest.fixture
def receiver():
    with kvwire.Receiver() as made:
        yield made


@pytest.fixture
def sender(receiver):
    with kvwire.Sender(receiver.address) as made:
        yield made


def sharded(spec, count, whole):
    """Every rank's part, holding the bytes of `whole`: the parts of one request agree."""
    parts = []
    content = whole.content()
    for rank in range(count):
        part = Held(spec.shard(rank, count), TOKENS, rank)
        for (kind, layer, name), axes, views in part.leaves():
            fill(part, content[kind, layer, name], (kind, layer, name), axes, views)
        parts.append(part)
    return parts


def fill(part, whole, key, axes, views):
    leaf = next(leaf for group, layer, _, leaf in part.spec.leaves()
                if (group.kind, layer, leaf.name) == key)
    order = sorted(range(len(axes)), key=lambda axis: axes[axis])
    held = {axis.axis: axis.slices[0] for axis in leaf.axes if axis.slices}
    index = tuple(slice(held[axes[i]].start, held[axes[i]].stop) if axes[i] in held
                  else slice(None) for i in order)
    cut = whole[index].transpose([order.index(i) for i in range(len(axes))])
    token, start = next((i for i, axis in enumerate(axes) if axis not in held), None), 0
    for view in views:
        if token is None:
            view[...] = cut
            continue
        stop = start + view.shape[token]
        view[...] = cut.take(range(start, stop), token)
        start = stop


@pytest.mark.parametrize("spec", [DENSE, MLA, HYBRID], ids=lambda spec: spec.model)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("one_link", [False, True])
def test_many_source_ranks_fill_one_destination(receiver, spec, count, one_link):
    whole, target = Held(spec, TOKENS, 1), Held(spec, TOKENS, 2, writable=True)
    ticket = receiver.expect(target.memory, source_ranks=count)
    senders = [kvwire.Sender(receiver.address) for _ in range(1 if one_link else count)]
    transfers = [sender.open(ticket.id, part.memory, source_rank=(rank, count),
                             metadata={f"rank{rank}": rank, "last": rank})
                 for rank, (part, sender) in enumerate(zip(
                     sharded(spec, count, whole), itertools.cycle(senders)))]
    for transfer in transfers[1:]:
        transfer.push_all().finish().result(10)
    assert not ticket.done()
    transfers[0].push_all().finish().result(10)
    ticket.result(10)
    assert same_content(whole, target) and target.only_leaves_were_written()
    assert ticket.metadata == {f"rank{rank}": rank for rank in range(count)} | {"last": count - 1}
    assert sorted(ticket.metadata_by_rank()) == list(range(count))
    for sender in senders:
        sender.close()


@pytest.mark.parametrize("spec", [DENSE, HYBRID], ids=lambda spec: spec.model)
def test_a_layer_is_ready_when_all_its_parts_are(receiver, sender, spec):
    whole, target = Held(spec, TOKENS, 1), Held(spec, TOKENS, 2, writable=True)
    ticket = receiver.expect(target.memory, source_ranks=2)
    first, second = (sender.open(ticket.id, part.memory, source_rank=(rank, 2))
                     for rank, part in enumerate(sharded(spec, 2, whole)))
    assert first.push(1).wait(10)
    assert ticket.layers_ready() == set() and ticket.report()[1] == "partly written"
    assert second.push(1).wait(10)
    ticket.wait_layer(1, 10)
    assert ticket.layers_ready() == {1}


@pytest.mark.parametrize("spec", [DENSE, MLA, HYBRID], ids=lambda spec: spec.model)
def test_one_source_feeds_many_destination_ranks(receiver, sender, spec):
    whole = Held(spec, TOKENS, 1)
    wanted = sharded(spec, 2, whole)
    for rank in range(2):
        target = Held(spec.shard(rank, 2), TOKENS, 9, writable=True)
        ticket = receiver.expect(target.memory, destination_rank=(rank, 2))
        sender.send(ticket.id, whole.memory, carry=spec.shard(rank, 2),
                    destination_rank=(rank, 2)).result(10)
        ticket.result(10)
        assert same_content(wanted[rank], target) and target.only_leaves_were_written()


def test_four_sources_to_two_destinations(receiver, sender):
    whole = Held(DENSE, TOKENS, 1)
    parts, wanted = sharded(DENSE, 4, whole), sharded(DENSE, 2, whole)
    for rank in range(2):
        target = Held(DENSE.shard(rank, 2), TOKENS, 9, writable=True)
        ticket = receiver.expect(target.memory, source_ranks=(2 * rank, 2 * rank + 1),
                                 source_rank_count=4, destination_rank=(rank, 2))
        for source in (2 * rank, 2 * rank + 1):
            sender.send(ticket.id, parts[source].memory, source_rank=(source, 4),
                        destination_rank=(rank, 2)).result(10)
        ticket.result(10)
        assert same_content(wanted[rank], target)


def test_pipeline_stages_are_ranks(receiver, sender):
    whole, target = Held(HYBRID, TOKENS, 1), Held(HYBRID, TOKENS, 2, writable=True)
    content = whole.content()
    ticket = receiver.expect(target.memory, source_ranks=2)
    for stage, layers in enumerate(((0, 1), (2, 3, kvwire.layout.REQUEST_LAYER))):
        part = Held(HYBRID.select(layers), TOKENS, stage)
        for key, axes, views in part.leaves():
            fill(part, content[key], key, axes, views)
        sender.send(ticket.id, part.memory, source_rank=(stage, 2)).result(10)
        if stage == 0:
            assert ticket.layers_ready() == {0, 1}
    ticket.result(10)
    assert same_content(whole, target)


def test_more_ranks_than_heads_copy_them(receiver, sender):
    spec = CacheSpec("gqa", (kvwire.attention((0,), kv_heads=2, head_dim=8),))
    whole, target = Held(spec, TOKENS, 1), Held(spec, TOKENS, 2, writable=True)
    ticket = receiver.expect(target.memory, source_ranks=4)
    for rank, part in enumerate(sharded(spec, 4, whole)):
        sender.send(ticket.id, part.memory, source_rank=(rank, 4)).result(10)
    ticket.result(10)
    assert same_content(whole, target)


@pytest.mark.parametrize("ranks, counts", [
    ({"source_rank": (1, 2)}, {}), ({"source_rank": (0, 2)}, {}),
    ({"destination_rank": (1, 2)}, {}), ({"destination_rank": (0, 2)}, {}),
    ({"source_rank": (0, 3)}, {"source_ranks": 2}),
    ({"source_rank": (1, 3)}, {"source_ranks": [0, 2], "source_rank_count": 3}),
])
def test_ranks_that_are_not_expected_are_refused_and_the_ticket_lives(receiver, sender, ranks,
                                                                      counts):
    source, target = Held(DENSE, TOKENS, 1), Held(DENSE, TOKENS, 2, writable=True)
    ticket = receiver.expect(target.memory, **counts)
    error = fails(sender.send(ticket.id, source.memory, **ranks), kvwire.TicketError,
                  ErrorCode.RANK_UNEXPECTED)
    assert error.remote and not ticket.done()


def test_a_rank_comes_once(receiver, sender):
    whole, target = Held(DENSE, TOKENS, 1), Held(DENSE, TOKENS, 2, writable=True)
    parts = sharded(DENSE, 2, whole)
    ticket = receiver.expect(target.memory, source_ranks=2)
    sender.send(ticket.id, parts[0].memory, source_rank=(0, 2)).result(10)
    fails(sender.send(ticket.id, parts[0].memory, source_rank=(0, 2)), kvwire.TicketError,
          ErrorCode.RANK_UNEXPECTED)
    sender.send(ticket.id, parts[1].memory, source_rank=(1, 2)).result(10)
    ticket.result(10)
    assert same_content(whole, target)


@pytest.mark.parametrize("parts", ["whole and part", "same part", "replica against plain"])
def test_parts_that_overlap_are_refused(receiver, sender, parts):
    whole, target = Held(DENSE, TOKENS, 1), Held(DENSE, TOKENS, 2, writable=True)
    shard = DENSE.shard(0, 2)
    copied = shard.map_tensors(lambda group, tensor: replace(tensor, replicated=True))
    first, second = {"whole and part": (DENSE, shard), "same part": (shard, shard),
                     "replica against plain": (copied, shard)}[parts]
    ticket = receiver.expect(target.memory, source_ranks=2)
    one = sender.open(ticket.id, whole.memory, carry=first, source_rank=(0, 2))
    one.push(0).wait(10)
    two = sender.open(ticket.id, whole.memory, carry=second, source_rank=(1, 2))
    two.push(0).wait(10)
    error = fails(ticket, kvwire.OverlapError, ErrorCode.OVERLAP)
    assert "layer 0" in str(error)
    for transfer in (one, two):
        assert fails(transfer, kvwire.OverlapError, ErrorCode.OVERLAP).remote


def test_missing_parts_are_named(receiver, sender):
    whole, target = Held(DENSE, TOKENS, 1), Held(DENSE, TOKENS, 2, writable=True)
    ticket = receiver.expect(target.memory)
    transfer = sender.send(ticket.id, whole.memory, carry=DENSE.shard(0, 2))
    error = fails(ticket, kvwire.RefusedError, ErrorCode.INCOMPLETE)
    assert error.actual * 2 == error.expected and "ready" not in error.layers.values()
    assert fails(transfer, kvwire.RefusedError, ErrorCode.INCOMPLETE).remote


@pytest.mark.parametrize("how", ["cancel", "link"])
def test_one_rank_takes_the_hand_off_with_it(receiver, how):
    whole, target = Held(DENSE, TOKENS, 1), Held(DENSE, TOKENS, 2, writable=True)
    ticket = receiver.expect(target.memory, source_ranks=2)
    senders = [kvwire.Sender(receiver.address) for _ in range(2)]
    transfers = [sender.open(ticket.id, part.memory, source_rank=(rank, 2)) for rank, (sender, part)
                 in enumerate(zip(senders, sharded(DENSE, 2, whole)))]
    for transfer in transfers:
        transfer.push(0).wait(10)
    transfers[1].cancel() if how == "cancel" else senders[1].close()
    with pytest.raises(kvwire.TransferError) as caught:
        ticket.result(10)
    assert caught.value.layers == {0: "ready", 1: "unwritten", 2: "unwritten", 3: "unwritten"}
    with pytest.raises(kvwire.TransferError) as told:
        transfers[0].result(10)
    assert told.value.code == caught.value.code and told.value.remote
    for sender in senders:
        sender.close()


@pytest.fixture
def listening():
    with kvwire.Sender(listen="127.0.0.1:0") as sender, kvwire.Receiver(None) as dialling:
        yield sender, dialling


def test_the_receiver_dials_and_the_sender_pushes(listening):
    sender, receiver = listening
    source, target = Held(DENSE, TOKENS, 1), Held(DENSE, TOKENS, 2, writable=True)
    with pytest.raises(kvwire.UsageError, match="link"):
        sender.open(b"x" * 16, source.memory)
    with pytest.raises(kvwire.UsageError):
        sender.connect()
    link = receiver.dial(sender.address)  # the last word of the admission is its own
    for options in ({"link": link}, {}):
        ticket = receiver.expect(target.memory)
        sender.send(ticket.id, source.memory, **options).result(10)
        ticket.result(10)
    assert same_content(source, target)
    with kvwire.Receiver(None) as other:
        other.dial(sender.address)
        assert eventually(lambda: len(sender._native.link_ids()) == 2)
        with pytest.raises(kvwire.UsageError, match="2 receivers"):
            sender.open(b"x" * 16, source.memory)


def test_pull_before_and_after_the_pushes(listening):
    sender, receiver = listening
    for early in (True, False):
        source, target = Held(HYBRID, TOKENS, 1), Held(HYBRID, TOKENS, 2, writable=True)
        offer = sender.offer(source.memory, metadata={"a": 1})
        push = offer.push(0)
        if early:
            offer.push(1)
        ticket = receiver.pull(sender.address, offer.offer_id, target.memory)
        assert push.wait(10)
        ticket.wait_layer(0, 10)
        for layer in sorted(set(ticket.report()) - ({0, 1} if early else {0})):
            offer.push(layer)
        offer.finish({"b": 2}).result(10)
        ticket.result(10)
        assert same_content(source, target) and ticket.metadata == {"a": 1, "b": 2}


@pytest.mark.parametrize("tokens", [(0, 5), (4, 9), (12, 13), (7, 7), (0, TOKENS)])
def test_some_of_the_tokens_are_pulled(listening, tokens):
    sender, receiver = listening
    source, target = Held(HYBRID, TOKENS, 1), Held(HYBRID, tokens, 2, writable=True)
    offer = sender.offer(source.memory).push_all().finish()
    ticket = receiver.pull(sender.address, offer.offer_id, target.memory)
    ticket.result(10)
    assert offer.result(10).verified_bytes == target.memory.bytes
    wanted = source.content()
    for (kind, layer, name), got in target.content().items():
        part = wanted[kind, layer, name]
        if kind == kvwire.GroupKind.FULL_ATTENTION:
            part = part[tokens[0]:tokens[1]]
        assert got.tobytes() == part.tobytes()
    assert target.only_leaves_were_written()


@pytest.mark.parametrize("one_offer_id", [False, True])
def test_several_ranks_are_pulled_from_one_sender(listening, one_offer_id):
    sender, receiver = listening
    whole, target = Held(DENSE, TOKENS, 1), Held(DENSE, TOKENS, 2, writable=True)
    name = random.randbytes(16) if one_offer_id else None
    offers = [sender.offer(part.memory, source_rank=(rank, 2), offer_id=name).push_all().finish()
              for rank, part in enumerate(sharded(DENSE, 2, whole))]
    ticket = receiver.expect(target.memory, source_ranks=2)
    for rank, offer in enumerate(offers):
        receiver.pull_into(ticket, sender.address, offer.offer_id, source_rank=rank)
    ticket.result(10)
    for offer in offers:
        offer.result(10)
    assert same_content(whole, target)


@pytest.mark.parametrize("wrong, kind, code", [
    ("offer", kvwire.TicketError, ErrorCode.OFFER_UNKNOWN),
    ("used", kvwire.TicketError, ErrorCode.OFFER_UNKNOWN),
    ("cancelled", kvwire.TicketError, ErrorCode.OFFER_UNKNOWN),
    ("tokens", kvwire.RefusedError, ErrorCode.TOKENS_MISMATCH),
    ("ranks", kvwire.TicketError, ErrorCode.RANK_UNEXPECTED),
    ("spec", kvwire.SpecMismatchError, ErrorCode.SPEC_MISMATCH),
])
def test_pulls_that_cannot_be_served(listening, wrong, kind, code):
    sender, receiver = listening
    source = Held(DENSE, TOKENS, 1)
    target = Held(MLA if wrong == "spec" else DENSE, TOKENS + (wrong == "tokens"), 2,
                  writable=True)
    offer = sender.offer(source.memory).push_all().finish()
    name, options = offer.offer_id, {}
    if wrong == "offer":
        name = bytes(15) + b"?"
    elif wrong == "used":
        receiver.pull(sender.address, name, Held(DENSE, TOKENS, writable=True).memory).result(10)
    elif wrong == "cancelled":
        offer.cancel()
    elif wrong == "ranks":
        options = {"destination_rank": (0, 2)}
    ticket = receiver.pull(sender.address, name, target.memory, **options)
    error = fails(ticket, kind, code)
    assert error.remote or wrong == "spec"
    if wrong in ("offer", "tokens", "ranks"):
        assert not offer.done(), "an offer survives those who ask wrongly"
        again = Held(DENSE, TOKENS, 3, writable=True)
        receiver.pull(sender.address, offer.offer_id, again.memory).result(10)
        assert same_content(source, again)


def test_nobody_to_pull_from(listening):
    _, receiver = listening
    target = Held(DENSE, TOKENS, 2, writable=True)
    with pytest.raises(kvwire.TransferError) as caught:
        receiver.pull("127.0.0.1:1", b"o" * 16, target.memory)
    assert caught.value.code == ErrorCode.CONNECT_FAILED
    receiver.expect(target.memory)  # its blocks are free again


def test_offers_end_with_their_deadline_cancel_or_sender():
    source = Held(DENSE, TOKENS, 1)
    with kvwire.Sender(listen="127.0.0.1:0") as sender:
        late = sender.offer(source.memory, deadline_s=0.1)
        dropped = sender.offer(source.memory)
        pushes = [late.push(0), dropped.push(0)]
        fails(late, kvwire.TransferTimeout, ErrorCode.DEADLINE_EXCEEDED)
        dropped.cancel()
        fails(dropped, kvwire.TransferCancelled, ErrorCode.CANCELLED)
        left = sender.offer(source.memory)
        pushes.append(left.push(0))
        with pytest.raises(kvwire.UsageError):
            twice = sender.offer(source.memory, offer_id=left.offer_id)
            twice.result(10)
    fails(left, kvwire.TransferError, ErrorCode.CLOSED)
    assert all(push.done() for push in pushes)


def test_cancelling_a_ticket_withdraws_its_pull(listening):
    sender, receiver = listening
    source, target = Held(DENSE, TOKENS, 1), Held(DENSE, TOKENS, 2, writable=True)
    offer = sender.offer(source.memory)
    ticket = receiver.pull(sender.address, offer.offer_id, target.memory)
    assert eventually(lambda: ticket.progress().granted)
    ticket.cancel()
    fails(offer, kvwire.TransferCancelled, ErrorCode.CANCELLED)
    assert target.is_poison()


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("way", [UP, DOWN])
@pytest.mark.timeout(120)
def test_flips_while_pulling(listening, lanes, way):
    sender, receiver = listening
    spec = CacheSpec("t", (kvwire.latent((0,), latent_dim=4, rope_dim=1, dtype="fp16"),))

    def one(at):
        source, target = Held(spec, 3, 1), Held(spec, 3, 2, writable=True)
        offer = sender.offer(source.memory).push_all().finish()
        with Proxy(sender.address, Fault(0, way, at, "flip", 0x08)) as proxy:
            with kvwire.Receiver(None) as puller:
                try:
                    ticket = puller.pull(proxy.address, offer.offer_id, target.memory, lanes=lanes)
                except (kvwire.TransferError, kvwire.AdmissionError):
                    return at < ADMISSION_BYTES
                assert ticket._native.wait(5), f"the receiver hangs, {at}"
                error = ticket.exception()
                assert error or same_content(source, target)
                assert error is None or not isinstance(error, kvwire.InternalError)
        if not offer._native.wait(0 if error else 5):
            offer.cancel()
        return error is None

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(one, range(0, 620 if way == DOWN else 400, 2)))
    assert sum(outcomes) > (0.9 * len(outcomes) if lanes == 2 else 10)
