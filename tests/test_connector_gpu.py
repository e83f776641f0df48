"""`CachePool` and both sides of a connector with real tensors of torch on a GPU."""

import secrets

import pytest

import kvwire
from faults import eventually
from kvwire.connectors.decode_side import DecodeSide
from kvwire.connectors.handoff import decode_route, prefill_route
from kvwire.connectors.options import Options
from kvwire.connectors.pool import CachePool, Pages
from kvwire.connectors.prefill_side import PrefillSide

pytestmark = pytest.mark.gpu
SPEC = kvwire.CacheSpec("m", (
    kvwire.attention(range(1, 32), kv_heads=4, head_dim=128, block_tokens=16),
    kvwire.recurrent([0], heads=16, key_dim=128, value_dim=128)))
TOKENS, BLOCKS, CHUNK = 4000, 600, 512


def pool_of(torch, seed):
    """An engine's pages on the GPU, and where they all lie."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator, device="cuda")
    pages = {(layer, name): noise(BLOCKS, 16, 4, 128).to(torch.bfloat16)
             for layer in range(1, 32) for name in "kv"}
    states = {(0, "state"): noise(4, 16, 128, 128)}
    return CachePool(SPEC, [Pages(0, pages), Pages(1, states)]), pages, states


@pytest.mark.parametrize("codec", ["raw", "tiered"])
@pytest.mark.parametrize("how", ["push", "pull"])
def test_layers_cross_between_gpus_while_they_are_computed(how, codec):
    """The engine's stream is far behind its thread: what is sent must be what it has computed."""
    torch = pytest.importorskip("torch")
    (here, mine, state), (there, theirs, other) = pool_of(torch, 1), pool_of(torch, 2)
    options = Options.of({"prefill_listen": "127.0.0.1:0", "decode_listen": "127.0.0.1:0",
                          "codec": codec, "staging": {"sm_share": 0.25}})
    for pool in (here, there):
        options.check_pool(pool)
    order = torch.randperm(BLOCKS)
    sent, got = order[:-(-TOKENS // 16)].tolist(), order.flip(0)[:-(-TOKENS // 16)].tolist()
    final = {key: array[sent].clone() for key, array in mine.items()}
    final_state = state[0, "state"][2].clone()
    for array in (*mine.values(), *state.values()):
        array.fill_(float("nan"))
    receiver, offers = options.receiver(0), options.offers(0)
    prefill = PrefillSide(here, connect=options.sender, offers=offers)
    decode = DecodeSide(there, receiver)
    load = torch.randn(4096, 4096, device="cuda")
    if how == "push":
        asked = {"ticket": secrets.token_hex(16), "decode_addresses": [receiver.address]}
        routes = prefill_route(asked, 1), decode_route(asked, 1)
        decode.begin("d", routes[1], (0, TOKENS), [got, [3]], {})
    else:
        route = prefill_route({}, 1)
        routes = route, decode_route({"offer": route.offer,
                                      "prefill_addresses": [offers.address]}, 1)
    prefill.begin("p", routes[0], (0, TOKENS), {})
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        for start in range(0, TOKENS, CHUNK):
            stop = min(start + CHUNK, TOKENS)
            first, last = start // 16, -(-stop // 16)
            prefill.extend("p", [sent[first:last], []])
            for layer in range(1, 32):
                load = (load @ load).tanh()
                for name in "kv":
                    mine[layer, name][sent[first:last]] = final[layer, name][first:last]
                prefill.computed("p", stop, [layer])
            prefill.computed("p", stop)
        state[0, "state"][2] = final_state
        prefill.finish("p", [sent, [2]])
        state[0, "state"][2].fill_(float("nan"))  # the engine gives the block to another
        if how == "pull":
            decode.begin("d", routes[1], (0, TOKENS), [got, [3]], {})
        ended = []
        assert eventually(lambda: ended.extend(
            prefill.poll() + decode.poll()) or len(ended) == 2, timeout_s=60)
    try:
        assert [outcome.error for outcome in ended] == [None, None]
        assert torch.equal(other[0, "state"][3], final_state)
        for key, array in theirs.items():
            held = array[got].reshape(-1, 4, 128)[:TOKENS]
            assert torch.equal(held, final[key].reshape(-1, 4, 128)[:TOKENS])
    finally:
        prefill.close()
        decode.close()
