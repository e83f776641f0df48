"""Code books: made from caches, kept in files, used by whoever codes."""

from dataclasses import replace

import numpy as np
import pytest

import kvwire
from kvwire import _native, code_book, plan
from kvwire.code_book import CodeBook
from kvwire.layout import (
    Axis, AxisSpec, CacheSpec, DType, GroupKind, LayerGroup, TensorSpec, attention, recurrent,
)
from kvwire.memory import CacheMemory
from kvwire.tiered import CodeTable, decode_tiered

HEADS, DIM, TOKENS = 2, 64, 400


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def channels(shape, dim, seed=0):
    """Return normal values in bf16; each head and channel has a scale of its own."""
    random = np.random.default_rng(seed)
    scale = np.exp2(2 * random.standard_normal((HEADS, dim)))
    return bf16(random.standard_normal((*shape, HEADS, dim)) * scale)


def hybrid(order="NHD", block_tokens=16, model="a model/with|signs"):
    """Return the memory of a layer of attention in pages, one of states, and one of integers."""
    indices = TensorSpec("indices", DType.INT32, (AxisSpec(Axis.TOKEN), AxisSpec.of(Axis.DIM, 64)))
    spec = CacheSpec(model, (
        attention([0, 1], kv_heads=HEADS, head_dim=DIM, block_tokens=block_tokens, order=order),
        recurrent([2], heads=HEADS, key_dim=64, value_dim=32),
        LayerGroup(GroupKind.AUXILIARY, (1,), (indices,))))
    blocks = -(-TOKENS // block_tokens) if block_tokens else 1
    arrays = {}
    for layer in (0, 1):
        for name in "kv":
            values = channels((blocks, block_tokens or TOKENS), DIM, layer)
            values = values if order == "NHD" else values.swapaxes(1, 2)
            arrays[layer, name] = values if block_tokens else values[0]
    random = np.random.default_rng(9)
    arrays[2, "state"] = random.standard_normal((HEADS, 32, 64)).astype(np.float32)
    arrays[1, "indices"] = np.arange(TOKENS * 64, dtype=np.int32).reshape(TOKENS, 64)
    return CacheMemory(spec, arrays, tokens=TOKENS,
                       block_ids={0: list(range(blocks))} if block_tokens else None)


def encoded(book, memory, layer, chunk_bytes=64 << 10):
    """Return raw and coded bytes of a layer's first tensor as a sender would code them."""
    item = memory.items(layer)[0]
    placement = plan.place(memory.spec, [item], memory)
    coder = _native.SegmentCoder(book.native, memory.spec.model, plan.to_native(memory.spec),
                                 plan.native_items([item]), placement, chunk_bytes)
    count = min(chunk_bytes, placement.bytes)
    payload, _ = coder.encode(0, count)
    return placement.gather(0, count), payload


def tables(book):
    """Return the bytes of each table by (tensor, layer)."""
    return {key[2:4]: table for key, table in book.native.tables()}


@pytest.mark.parametrize("order, block_tokens", [("NHD", 16), ("HND", 16), ("NHD", 0), ("HND", 0)])
def test_a_book_is_made_of_a_cache(order, block_tokens):
    memory, book = hybrid(order, block_tokens), CodeBook()
    made = book.calibrate(memory)
    assert [(one.kind, one.layer, one.tensor) for one in made] == [
        (GroupKind.FULL_ATTENTION, 0, "k"), (GroupKind.FULL_ATTENTION, 0, "v"),
        (GroupKind.FULL_ATTENTION, 1, "k"), (GroupKind.FULL_ATTENTION, 1, "v"),
        (GroupKind.RECURRENT, 2, "state")]  # integers have no exponent
    assert len(book) == len(book.names) == len(made)
    assert made[0].shape == (HEADS, DIM) and made[4].shape == (HEADS, 32, 64)
    assert all(one.ratio > 1.49 for one in made[:4]) and made[4].ratio > 1.18
    raw, payload = encoded(book, memory, 0)
    assert decode_tiered(payload, len(raw)) == raw
    assert made[0].ratio == pytest.approx(len(raw) / len(payload), rel=0.03)


def test_tables_are_used_and_not_made_again():
    book = CodeBook()
    book.calibrate(hybrid())
    before = tables(book)
    raw, payload = encoded(book, hybrid(), 1)
    assert tables(book) == before
    assert before["k", 1] in payload
    assert decode_tiered(payload, len(raw)) == raw


@pytest.mark.parametrize("block_tokens", [16, 0])
def test_pages_of_either_order_have_the_same_tables(block_tokens):
    by_token, by_head = hybrid("NHD", block_tokens), hybrid("HND", block_tokens)
    books = [CodeBook(), CodeBook()]
    for book, memory in zip(books, (by_token, by_head)):
        book.calibrate(memory)
    assert books[0].names == books[1].names
    for book in books:
        before = tables(book)
        for memory in (by_token, by_head):
            raw, payload = encoded(book, memory, 0)
            assert decode_tiered(payload, len(raw)) == raw
            assert len(raw) > 1.45 * len(payload)
        assert tables(book) == before


def keys_and_values(keys, values):
    spec = CacheSpec("m", (attention([0], kv_heads=HEADS, head_dim=DIM),))
    return CacheMemory(spec, {(0, "k"): keys, (0, "v"): values}, tokens=len(keys))


def test_calibrating_again_replaces():
    book, keys, values = CodeBook(), channels((TOKENS,), DIM), channels((TOKENS,), DIM)
    book.calibrate(keys_and_values(keys, values))
    before = tables(book)
    book.calibrate(keys_and_values(channels((TOKENS,), DIM, seed=77), values))
    after = tables(book)
    assert after.keys() == before.keys()
    assert after["k", 0] != before["k", 0] and after["v", 0] == before["v", 0]


def test_first_tokens_are_skipped():
    keys = channels((TOKENS,), DIM)
    sinks = keys.copy()
    sinks[:64] = 0x7F00

    def made(array, skip_tokens):
        book = CodeBook()
        book.calibrate(keys_and_values(array, keys), skip_tokens=skip_tokens)
        return tables(book)["k", 0]

    assert made(keys, 64) == made(sinks, 64)
    assert made(keys, 0) != made(sinks, 0)
    assert made(keys, 200) == made(keys, 0)  # too many for so short a request


def test_a_sender_uses_and_fills_the_book_that_it_is_given():
    keys, values = channels((TOKENS,), DIM, seed=1), channels((TOKENS,), DIM, seed=2)
    source, book = keys_and_values(keys, values), CodeBook()
    arrays = {(0, name): np.zeros_like(keys) for name in "kv"}

    def sent_bytes():
        target = CacheMemory(source.spec, arrays, tokens=TOKENS, writable=True)
        with kvwire.Receiver("127.0.0.1:0") as receiver, kvwire.Sender(
                receiver.address, codec="tiered", code_book=book) as sender:
            ticket = receiver.expect(target, deadline_s=30)
            transfer = sender.send(ticket.id, source)
            ticket.result()
            transfer.result()
            return transfer.progress().wire_bytes

    first = sent_bytes()
    made = tables(book)
    assert made.keys() == {("k", 0), ("v", 0)} and first < keys.nbytes * 2 / 1.4
    assert (arrays[0, "k"] == keys).all() and (arrays[0, "v"] == values).all()
    assert sent_bytes() == first and tables(book) == made


def test_nonsense_is_refused():
    with pytest.raises(kvwire.UsageError, match="skip_tokens"):
        CodeBook().calibrate(hybrid(), skip_tokens=-1)


def test_little_data_makes_no_table():
    spec = CacheSpec("m", (recurrent([0], heads=1, key_dim=8, value_dim=8),))
    book = CodeBook()
    assert book.calibrate(CacheMemory(spec, {(0, "state"): np.ones((1, 8, 8), np.float32)})) == []
    assert len(book) == 0 and book.names == ()


# ---- files

def test_a_file_gives_the_same_book(tmp_path):
    book = CodeBook()
    book.calibrate(hybrid())
    book.save(tmp_path / "book.npz")
    book.save(tmp_path / "book.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["book.npz"]
    again = CodeBook.load(tmp_path / "book.npz")
    assert again.names == book.names and again.native.tables() == book.native.tables()
    assert again.names[0].startswith("a%20model%2Fwith%7Csigns|1|k|0|3|")


def test_an_empty_book_is_a_book(tmp_path):
    CodeBook().save(tmp_path / "empty.npz")
    assert len(CodeBook.load(tmp_path / "empty.npz")) == 0


NAME = "m|1|k|0|3|1x1x2x64"


def table_bytes() -> np.ndarray:
    table, _ = _native.calibrate(DType.BF16, (2, 64), [(3, 0)], [(0, channels((9,), 64))])
    return np.frombuffer(table, np.uint8)


def changed(table, at, value):
    table = table.copy()
    table[at] = value
    return table


BAD_BOOKS = {
    "no table": lambda table: {NAME: table[:20]},
    "bytes left over": lambda table: {NAME: np.append(table, np.uint8(0))},
    "a rule broken": lambda table: {NAME: changed(table, 1, 9)},
    "another dtype": lambda table: {"m|1|k|0|1|1x1x2x64": table},
    "other extents": lambda table: {"m|1|k|0|3|1x1x4x32": table},
    "a base by token": lambda table: {"m|1|k|0|3|1x1x0x64": table},
    "words": lambda table: {"m|1|k|first|3|1x1x2x64": table},
    "too few fields": lambda table: {"m|1|k|0|3": table},
    "too few extents": lambda table: {"m|1|k|0|3|2x64": table},
    "a negative layer": lambda table: {"m|1|k|-1|3|1x1x2x64": table},
    "a number out of range": lambda table: {"m|256|k|0|3|1x1x2x64": table},
    "an array of numbers": lambda table: {NAME: table.astype(np.int32)},
    "an array of rows": lambda table: {NAME: table.reshape(2, -1)},
    "objects": lambda table: {NAME: np.array([None])},
    "a long array": lambda table: {NAME: np.zeros(1 << 17, np.uint8)},
}


def test_the_good_form_of_the_bad_books_loads(tmp_path):
    np.savez(tmp_path / "book.npz", **{NAME: table_bytes()})
    assert CodeBook.load(tmp_path / "book.npz").names == (NAME,)


def test_a_book_of_pages_by_head_loads_under_its_old_name(tmp_path):
    by_channel = CodeTable.decode(table_bytes().tobytes())[0]
    by_head = replace(by_channel, extents=(1, 2, 16, 64), row_axes=0b1010)
    np.savez(tmp_path / "book.npz",
             **{"m|1|k|0|3|1x2x0x64": np.frombuffer(by_head.encode(), np.uint8)})
    book = CodeBook.load(tmp_path / "book.npz")
    assert book.names == (NAME,) and book.native.tables()[0][1] == table_bytes().tobytes()


@pytest.mark.parametrize("bad", BAD_BOOKS)
def test_a_bad_book_is_refused(tmp_path, bad):
    np.savez(tmp_path / "book.npz", **BAD_BOOKS[bad](table_bytes()))
    with pytest.raises(kvwire.FormatError, match="no code book"):
        CodeBook.load(tmp_path / "book.npz")


def test_what_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "book.npz"
    np.savez(path, **{NAME: table_bytes()})
    whole = path.read_bytes()
    for data in (b"", b"no book", whole[:-30], whole[100:]):
        path.write_bytes(data)
        with pytest.raises(kvwire.FormatError, match="no code book"):
            CodeBook.load(path)
    np.savez_compressed(path, **{NAME: table_bytes()})
    with pytest.raises(kvwire.FormatError, match="compressed"):
        CodeBook.load(path)


def test_a_flipped_bit_in_a_table_is_found(tmp_path):
    path = tmp_path / "book.npz"
    np.savez(path, **{NAME: table_bytes()})
    data = bytearray(path.read_bytes())
    data[data.index(table_bytes().tobytes()) + 60] ^= 1
    path.write_bytes(data)
    with pytest.raises(kvwire.FormatError, match="CRC"):
        CodeBook.load(path)


def test_a_book_of_too_many_entries_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(code_book, "ENTRIES_MAX", 2)
    layers = {NAME.replace("|0|", f"|{layer}|"): table_bytes() for layer in range(3)}
    np.savez(tmp_path / "book.npz", **layers)
    with pytest.raises(kvwire.FormatError, match="3 entries"):
        CodeBook.load(tmp_path / "book.npz")


def test_whatever_is_damaged_is_refused_or_harmless(tmp_path):
    path, random = tmp_path / "book.npz", np.random.default_rng(3)
    np.savez(path, **{NAME: table_bytes()})
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[random.integers(len(whole), size=random.integers(1, 4))] ^= random.integers(
            1, 256, dtype=np.uint8)
        path.write_bytes(damaged[:random.integers(1, 2 * len(whole))].tobytes())
        try:
            CodeBook.load(path)
        except kvwire.FormatError:
            refused += 1
    assert refused > 200


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        CodeBook.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError):
        CodeBook().save(tmp_path / "none" / "book.npz")
