"""The engine-neutral halves of a connector: hand-offs between pools, streamed, resumed, dropped."""

import secrets

import numpy as np
import pytest

import kvwire
from faults import eventually
from kvwire.connectors.decode_side import DecodeSide
from kvwire.connectors.handoff import decode_route, prefill_route, prompt_digest
from kvwire.connectors.options import Options
from kvwire.connectors.pool import CachePool, Pages, carrier, source_ranks
from kvwire.connectors.prefill_side import PrefillSide
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec

BLOCKS, TOKENS = 40, 30
WHOLE = CacheSpec("core", (
    kvwire.attention((1, 3), kv_heads=4, head_dim=8, block_tokens=4, fused=True),
    kvwire.sliding_window((2,), 9, kv_heads=2, head_dim=8, block_tokens=4, order="HND"),
    kvwire.latent((4,), latent_dim=8, rope_dim=4, block_tokens=4),
    kvwire.recurrent((0,), heads=4, key_dim=4, value_dim=4),
    kvwire.convolution((0,), {"q": 16, "k": 16, "v": 16}, columns=3),
))
STATE_TABLE = 3
SAID = {"prompt": prompt_digest(range(TOKENS))}


class Memory:
    """An engine's memory on one rank: whose tables alias nothing, blocks of 4 or 8 tokens."""

    def __init__(self, seed, rank=0, count=1, split=1, place=lambda array: array):
        rng = np.random.default_rng(seed)
        spec = WHOLE.shard(rank, count) if count > 1 else WHOLE
        self.arrays, pages = {}, []
        for index, group in enumerate(spec.groups):
            table = min(index, STATE_TABLE)
            held = {}
            for layer in group.layers:
                for tensor in group.tensors:
                    shape = tuple(4 if not axis.slices else axis.held for axis in tensor.axes)
                    raw = rng.integers(0, 256, (BLOCKS, *shape, tensor.dtype.item_bytes), np.uint8)
                    array = place(raw.view(carrier(tensor.dtype))[..., 0])
                    held[layer, tensor.name] = self.arrays[index, layer, tensor.name] = array
            pages.append(Pages(table, held, split if group.block_tokens else 1))
        self.pool = CachePool(WHOLE, pages, rank=rank, count=count)
        self.split = split

    def blocks(self, seed):
        """Random distinct blocks for all tokens, by table; of the states one."""
        rng = np.random.default_rng(seed)
        count, room = -(-TOKENS // (4 * self.split)), BLOCKS // self.split
        tables = [rng.permutation(room)[:count].tolist() for _ in range(3)]
        return [*tables, [int(rng.integers(BLOCKS))]]

    def content(self, block_ids, start=0):
        """Bytes of every leaf of a request from `start` on, over this rank's slices."""
        memory = self.pool.memory((start, TOKENS), block_ids)
        return {layer: kvwire.plan.gather(memory.spec, memory.items(layer), memory.leaves)
                for layer in self.pool.layers}


def paged(block_ids, first=0, last=None):
    return [ids[first:last] for ids in block_ids[:STATE_TABLE]] + [[]]


@pytest.fixture
def sides():
    made = []

    def make(memory, decode, **options):
        if decode:
            side = DecodeSide(memory.pool, kvwire.Receiver(patience_s=5), **options)
        else:
            side = PrefillSide(memory.pool, connect=lambda at: kvwire.Sender(at, lanes=1),
                               offers=kvwire.Sender(listen="127.0.0.1:0"), **options)
        made.append(side)
        return side

    yield make
    for side in made:
        side.close()


def outcomes(*sides):
    """Poll until each side has had one outcome; return the errors."""
    found = {}

    def all_ended():
        for side in sides:
            for outcome in side.poll():
                found[id(side)] = outcome.error
        return len(found) == len(sides)

    assert eventually(all_ended)
    return [found[id(side)] for side in sides]


def push_routes(decode, ranks=(1, 1)):
    ticket = secrets.token_hex(16)
    sides = decode if isinstance(decode, list) else [decode]
    return (prefill_route({"ticket": ticket, "decode_addresses": [
        side._receiver.address for side in sides]}, ranks[0]),
        decode_route({"ticket": ticket, "prefill_ranks": ranks[0]}, ranks[1]))


def pull_routes(prefill, ranks=(1, 1)):
    sides = prefill if isinstance(prefill, list) else [prefill]
    route = prefill_route({"decode_ranks": ranks[1]}, ranks[0])
    return route, decode_route({"offer": route.offer, "prefill_addresses": [
        side._offers.address for side in sides]}, ranks[1])


@pytest.mark.parametrize("how", ["push", "pull"])
@pytest.mark.parametrize("start", [0, 8, 28])
@pytest.mark.parametrize("splits", [(1, 1), (2, 1), (1, 2)])
def test_what_is_missing_arrives(sides, how, start, splits):
    here, there = Memory(1, split=splits[0]), Memory(2, split=splits[1])
    prefill, decode = sides(here, False), sides(there, True)
    sent, got = here.blocks(3), there.blocks(4)
    routes = push_routes(decode) if how == "push" else pull_routes(prefill)
    prefill.begin("p", routes[0], (0, TOKENS), SAID)
    done = 0
    for stop in (8, 16, TOKENS):  # chunked prefill: blocks come as they are needed
        blocks = -(-stop // (4 * here.split))
        prefill.extend("p", paged(sent, done, blocks))
        done = blocks
        for layer in (1, 2):
            prefill.computed("p", stop, [layer])
        prefill.computed("p", stop)
    prefill.finish("p", sent)
    decode.begin("d", routes[1], (start, TOKENS), got, SAID)
    assert outcomes(prefill, decode) == [None, None]
    assert here.content(sent, start) == there.content(got, start)
    assert prefill.totals.handoffs == decode.totals.handoffs == 1
    assert decode.totals.cache_bytes == there.pool.memory((start, TOKENS), got).bytes


@pytest.mark.parametrize("how", ["push", "pull"])
@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_tensor_parallelism_may_differ(sides, how, ranks):
    whole, sent = Memory(1), Memory(1).blocks(3)
    sources = [Memory(9, rank, ranks[0]) for rank in range(ranks[0])]
    targets = [Memory(8, rank, ranks[1]) for rank in range(ranks[1])]
    for part in sources:  # one request, the same on every rank
        write_part(whole, part, sent)
    prefills = [sides(part, False) for part in sources]
    decodes = [sides(part, True) for part in targets]
    routes = push_routes(decodes, ranks) if how == "push" else pull_routes(prefills, ranks)
    hand_off(prefills, decodes, routes, sent)
    for rank, target in enumerate(targets):
        wanted = Memory(7, rank, ranks[1])
        write_part(whole, wanted, sent)
        assert wanted.content(sent) == target.content(sent)


def hand_off(prefills, decodes, routes, block_ids):
    """Bring one request from all ranks to all ranks, whole; it lies in the same blocks on each."""
    for prefill in prefills:
        prefill.begin("p", routes[0], (0, TOKENS), SAID)
        prefill.extend("p", paged(block_ids))
        prefill.finish("p", block_ids)
    for decode in decodes:
        decode.begin("d", routes[1], (0, TOKENS), block_ids, SAID)
    assert outcomes(*prefills, *decodes) == [None] * (len(prefills) + len(decodes))


def write_part(whole, part, block_ids):
    """Write a rank's slices of what `whole` holds."""
    source = whole.pool.memory((0, TOKENS), block_ids)
    target = part.pool.memory((0, TOKENS), block_ids)
    carry = part.pool.spec
    for layer in whole.pool.layers:
        items = [item for item in source.items(layer)]
        data = kvwire.plan.gather(carry, items, source.leaves)
        kvwire.plan.scatter(carry, items, target.leaves, data)


def test_small_layers_go_together(sides):
    """A push wakes threads; 8 layers of 200 KB are 3 of them in a step, not 8."""
    tokens, step = 512, 256
    spec = CacheSpec("small", (kvwire.attention(range(8), kv_heads=8, head_dim=25, dtype="fp16",
                                                block_tokens=16),))
    assert all(tensor.row_bytes == 400 for tensor in spec.groups[0].tensors)

    def memory(seed):
        rng = np.random.default_rng(seed)
        return {(layer, tensor.name): rng.random((tokens // 16, 16, 8, 25)).astype(np.float16)
                for layer in range(8) for tensor in spec.groups[0].tensors}

    class Side:
        def __init__(self, arrays):
            self.arrays, self.pool = arrays, CachePool(spec, [Pages(0, arrays)])

    source, target = Side(memory(1)), Side(memory(2))
    prefill, decode = sides(source, decode=False), sides(target, decode=True)
    route, there = push_routes(decode)
    blocks = [list(range(tokens // 16))]
    prefill.begin("a", route, (0, tokens), SAID)
    decode.begin("a", there, (0, tokens), blocks, SAID)
    pushes = []
    for stop in (step, tokens):
        prefill.extend("a", [blocks[0][(stop - step) // 16:stop // 16]])
        for layer in range(8):
            prefill.computed("a", stop, [layer])
            stream, = prefill._open["a"].streams
            pushes.append(len(stream.pushes))
        if stop < tokens:
            prefill.computed("a", stop)
            pushes.append(len(stream.pushes))
    assert pushes == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    prefill.finish("a", [[]])
    assert outcomes(prefill, decode) == [None, None]
    for key, array in source.arrays.items():
        assert np.array_equal(array, target.arrays[key])


def test_a_preempted_request_goes_on_in_other_blocks(sides):
    here, there = Memory(1), Memory(2)
    prefill, decode = sides(here, False), sides(there, True)
    first, got = here.blocks(3), there.blocks(4)
    second = [[block for block in range(BLOCKS) if block not in ids][:len(ids)] for ids in first]
    for key, array in here.arrays.items():  # computed again, a token is the same
        if WHOLE.groups[key[0]].block_tokens:
            table = min(key[0], STATE_TABLE)
            array[second[table]] = array[first[table]].copy()
    for granted in (True, False):
        routes = push_routes(decode)
        prefill.begin("p", routes[0], (0, TOKENS), SAID)
        prefill.extend("p", paged(first, 0, 4))
        prefill.computed("p", 13)
        if granted:
            decode.begin("d", routes[1], (0, TOKENS), got, SAID)
            transfer = prefill._open["p"].streams[0].transfer
            assert eventually(lambda: transfer.progress().granted)
        prefill.suspend("p")
        prefill.extend("p", paged(second, 0, 3))
        prefill.computed("p", 12)
        if not granted:
            decode.begin("d", routes[1], (0, TOKENS), got, SAID)
        prefill.extend("p", paged(second, 3))
        prefill.finish("p", second)
        errors = outcomes(prefill, decode)
        if granted or errors == [None, None]:
            assert errors == [None, None] and here.content(second) == there.content(got)
        else:  # decode took up the first transfer before it heard that it was off
            assert [error.code for error in errors] == [ErrorCode.TICKET_EXPIRED,
                                                        ErrorCode.CANCELLED]
        got = there.blocks(6)


@pytest.mark.parametrize("who", ["prefill", "decode", "nobody comes", "nobody sends", "prompt"])
def test_what_fails_is_told_and_memory_is_given_back(sides, who):
    clock = [0.0]
    here, there = Memory(1), Memory(2)
    lease = {"lease_s": 50.0, "now": lambda: clock[0]}
    prefill, decode = sides(here, False, **lease), sides(there, True, **lease)
    routes, sent, got = push_routes(decode), here.blocks(3), there.blocks(4)
    if who != "nobody sends":
        prefill.begin("p", routes[0], (0, TOKENS), SAID)
        prefill.extend("p", paged(sent, 0, 2))
        prefill.computed("p", 8)
    if who != "nobody comes":
        said = {"prompt": prompt_digest([1])} if who == "prompt" else SAID
        decode.begin("d", routes[1], (0, TOKENS), got, said)
    if who in ("prefill", "decode"):
        stream = prefill._open["p"].streams[0]
        assert eventually(lambda: stream.transfer.progress().verified_bytes > 0)
        prefill.drop("p") if who == "prefill" else decode.drop("d")
        [error] = outcomes(decode if who == "prefill" else prefill)
        assert error.code == ErrorCode.CANCELLED and error.remote
        return
    if who in ("nobody comes", "prompt"):
        prefill.extend("p", paged(sent, 2))
        prefill.finish("p", sent)
    if who == "prompt":
        errors = outcomes(prefill, decode)
        assert errors[0] is None and errors[1].code == ErrorCode.TOKENS_MISMATCH
        assert "the cache is another request's" in str(errors[1])
        return
    side = prefill if who == "nobody comes" else decode
    assert side.poll() == []
    clock[0] = 51.0
    [error] = outcomes(side)
    assert error.code == ErrorCode.DEADLINE_EXCEEDED and "lease_s" in str(error)


def test_a_hand_off_that_fails_while_it_is_looked_at_has_failed(sides):
    here, there = Memory(1), Memory(2)
    prefill, decode = sides(here, False), sides(there, True)
    routes, sent = push_routes(decode), here.blocks(3)
    prefill.begin("p", routes[0], (0, TOKENS), SAID)
    prefill.extend("p", paged(sent, 0, 2))
    prefill.computed("p", 8)
    decode.begin("d", routes[1], (0, TOKENS), there.blocks(4), SAID)
    ticket = decode._open["d"].ticket
    assert eventually(lambda: ticket.progress().verified_bytes)
    look = ticket.progress

    def and_then_it_fails():
        found = look()
        if "p" in prefill:
            prefill.drop("p")
            assert eventually(ticket.done)
        return found

    ticket.progress = and_then_it_fails
    ended = decode.poll() + decode.poll()
    assert [outcome.request_id for outcome in ended] == ["d"]
    assert isinstance(ended[0].error, kvwire.KvwireError)


@pytest.mark.parametrize("how", ["push", "pull"])
@pytest.mark.parametrize("state_blocks", [[], [999]])
def test_states_that_cannot_be_read_are_not_delivered(sides, how, state_blocks):
    here, there = Memory(1), Memory(2)
    prefill, decode = sides(here, False), sides(there, True)
    routes = push_routes(decode) if how == "push" else pull_routes(prefill)
    sent = here.blocks(3)
    prefill.begin("p", routes[0], (0, TOKENS), SAID)
    prefill.extend("p", paged(sent))
    prefill.computed("p", 8)
    decode.begin("d", routes[1], (0, TOKENS), there.blocks(4), SAID)
    transfer = prefill._open["p"].streams[0].transfer
    assert eventually(lambda: transfer.progress().granted)
    prefill.finish("p", [*sent[:STATE_TABLE], state_blocks])
    errors = outcomes(prefill, decode)
    assert isinstance(errors[0], kvwire.UsageError) and errors[1] is not None


def test_a_peer_with_another_model_is_refused_by_field(sides):
    here, there = Memory(1), Memory(2)
    there.pool.spec = CacheSpec("core", (
        kvwire.attention((1, 3), kv_heads=4, head_dim=8, dtype="fp16", block_tokens=4,
                         fused=True), *WHOLE.groups[1:]))
    prefill, decode = sides(here, False), sides(there, True)
    routes, sent = push_routes(decode), here.blocks(3)
    prefill.begin("p", routes[0], (0, TOKENS), SAID)
    prefill.extend("p", paged(sent))
    decode.begin("d", routes[1], (0, TOKENS), there.blocks(4), SAID)
    for error in outcomes(prefill, decode):
        assert isinstance(error, kvwire.SpecMismatchError)
        assert "dtype bf16 at the sender, fp16 here" in str(error)


@pytest.mark.parametrize("parameters, words", [
    ({"ticket": "x"}, r"\['ticket'\] is 'x'"),
    ({"ticket": "0" * 32}, "decode_addresses"),
    ({"ticket": "0" * 32, "decode_addresses": ["nowhere"]}, "'host:port'"),
    ({"decode_ranks": 0}, "number of ranks"),
])
def test_bad_parameters_are_named(parameters, words):
    with pytest.raises(kvwire.UsageError, match=words):
        prefill_route(parameters, 1)


def test_decode_needs_a_ticket_or_an_offer():
    with pytest.raises(kvwire.UsageError, match="neither a ticket"):
        decode_route({"do_remote_prefill": True}, 1)


@pytest.mark.parametrize("config, words", [
    ({"lane": 4}, "has lane; it may have decode_listen"),
    ({"decode_listen": "here"}, "decode_listen is 'here'"),
    ({"lease_s": 0}, "lease_s is 0"),
    ({"security": {"kind": "none"}}, "must have a kind: tls, psk, hmac"),
    ({"security": {"kind": "hmac", "key": "short"}}, "security of kind hmac"),
    ({"security": {"kind": "tls", "certificates": "x"}}, "security of kind tls"),
])
def test_bad_settings_are_named(config, words):
    with pytest.raises(kvwire.UsageError, match=words):
        Options.of(config)


def test_settings_become_addresses():
    options = Options.of({"prefill_listen": "0.0.0.0:7200", "prefill_address": "10.0.0.1:7200"})
    assert options.prefill_addresses(2) == ["10.0.0.1:7200", "10.0.0.1:7201"]
    assert Options.of({}).prefill_addresses(2) == []


def test_ranks_must_divide():
    assert [list(source_ranks(rank, 2, 4)) for rank in range(2)] == [[0, 1], [2, 3]]
    assert [list(source_ranks(rank, 4, 2)) for rank in range(4)] == [[0], [0], [1], [1]]
    with pytest.raises(kvwire.UsageError, match="3 here and 2 there"):
        source_ranks(0, 3, 2)
