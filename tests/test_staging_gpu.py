"""Caches in a GPU's memory, as torch tensors, through Sender and Receiver."""

import gc

import pytest

import kvwire
from kvwire.errors import UsageError
from kvwire.layout import CacheSpec, attention, recurrent

pytestmark = pytest.mark.gpu
SPEC = CacheSpec("m", (attention([0, 2], kv_heads=4, head_dim=128, block_tokens=16),
                       recurrent([1], heads=16, key_dim=128, value_dim=128)))
TOKENS, BLOCKS = 5000, 400


def cache(torch, seed, writable=False):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = BLOCKS, 16, 4, 128
    arrays = {(layer, name): torch.randn(shape, generator=generator, device="cuda"
                                         ).to(torch.bfloat16) for layer in (0, 2) for name in "kv"}
    arrays[1, "state"] = torch.randn((16, 128, 128), generator=generator, device="cuda")
    ids = torch.randperm(BLOCKS, generator=generator, device="cuda")[:-(-TOKENS // 16)].tolist()
    return arrays, ids, kvwire.CacheMemory(SPEC, arrays, tokens=TOKENS, block_ids=ids,
                                           writable=writable)


def tokens_of(array, ids):
    return array[ids].reshape(-1, *array.shape[2:])[:TOKENS]


@pytest.mark.parametrize("codec", ["raw", "tiered"])
@pytest.mark.parametrize("share", [0.01, 0.125, 1.0])
def test_gpu_to_gpu(codec, share):
    torch = pytest.importorskip("torch")
    (mine, ids, source), (theirs, places, target) = cache(torch, 1), cache(torch, 2, True)
    staging = kvwire.Staging(sm_share=share)
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    with kvwire.Receiver(staging=staging) as receiver, \
            kvwire.Sender(receiver.address, codec=codec, staging=staging) as sender:
        for _ in range(3):
            ticket = receiver.expect(target)
            with torch.cuda.stream(torch.cuda.Stream()):  # prefill's: pushes must wait for it
                for _ in range(50):
                    mine[1, "state"].mul_(1.0001)
                sender.send(ticket.id, source)
            ticket.result(60)
            assert torch.equal(mine[1, "state"], theirs[1, "state"])
            for layer in (0, 2):
                for name in "kv":
                    assert torch.equal(tokens_of(mine[layer, name], ids),
                                       tokens_of(theirs[layer, name], places))
    del receiver, sender, ticket
    gc.collect()
    torch.cuda.empty_cache()  # with Triton's kernels it is torch's
    assert before - torch.cuda.mem_get_info()[0] < 8 << 20  # what staging took came back


def test_cpu_and_gpu_understand_each_other():
    torch = pytest.importorskip("torch")
    mine, ids, source = cache(torch, 1)
    middle = {key: array.cpu().zero_() for key, array in mine.items()}
    theirs, _, target = cache(torch, 2, True)
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address, codec="tiered") as sender:
        through = {"tokens": TOKENS, "block_ids": ids}
        for memory, held in ((source, kvwire.CacheMemory(SPEC, middle, writable=True, **through)),
                             (kvwire.CacheMemory(SPEC, middle, **through), target)):
            ticket = receiver.expect(held)
            sender.send(ticket.id, memory)
            ticket.result(60)
    assert torch.equal(mine[1, "state"], theirs[1, "state"])


def test_arrays_of_two_places_are_refused():
    torch = pytest.importorskip("torch")
    arrays, ids, _ = cache(torch, 1)
    arrays[0, "k"] = arrays[0, "k"].cpu()
    with pytest.raises(UsageError, match="one place"):
        kvwire.CacheMemory(SPEC, arrays, tokens=TOKENS, block_ids=ids).device
