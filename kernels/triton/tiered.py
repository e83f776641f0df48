"""FORMAT.md §9.1 in Triton: strips to scratch, then the layout of each chunk, then the bytes.

`kvwire.tiered` is the definition, and what is coded here is equal to it, byte for byte.
"""

import triton
import triton.language as tl

from kvwire.kernels.code_plan import CHUNK, PART_ROW, STRIP, CodePlan, ReadPlan
from kvwire.kernels.triton.upload import upload
from kvwire.tiered import STRIP_ELEMENTS, StripForm, element_format

__all__ = ["BODY_SLOT", "TAIL_SLOT", "decode_chunks", "encode_chunks"]

BODY_SLOT = 4 * STRIP_ELEMENTS + 64  # scratch for a body; more planes than elements: + 64
TAIL_SLOT = 2 * STRIP_ELEMENTS       # all planes of lower tiers, all literals
TIERS_MAX = 4
LAYOUT_STRIPS = 64

_N = tl.constexpr(STRIP_ELEMENTS)
_TIERS = tl.constexpr(TIERS_MAX)
_BODY_SLOT = tl.constexpr(BODY_SLOT)
_TAIL_SLOT = tl.constexpr(TAIL_SLOT)
_OFFSETS_AT = tl.constexpr(256)  # behind the digits of each distance
_TIERED = tl.constexpr(int(StripForm.TIERED))
_EXACT = tl.constexpr(int(StripForm.EXACT))
_CONSTANT = tl.constexpr(int(StripForm.CONSTANT))
_FORM_SHIFT = tl.constexpr(14)

_STRIP = tl.constexpr(len(STRIP))
_COUNT = tl.constexpr(STRIP.index("COUNT"))
_BASES_AT = tl.constexpr(STRIP.index("BASES_AT"))
_CODE_AT = tl.constexpr(STRIP.index("CODE_AT"))
_STRIP_CHUNK = tl.constexpr(STRIP.index("CHUNK"))
_ITEM_BYTES = tl.constexpr(STRIP.index("ITEM_BYTES"))
_FORM = tl.constexpr(STRIP.index("FORM"))
_BODY_AT = tl.constexpr(STRIP.index("BODY_AT"))
_TAIL_AT = tl.constexpr(STRIP.index("TAIL_AT"))
_TAIL_BYTES = tl.constexpr(STRIP.index("TAIL_BYTES"))

_CHUNK = tl.constexpr(len(CHUNK))
_CHUNK_BYTES = tl.constexpr(CHUNK.index("RAW_BYTES"))
_OUT_OFFSET = tl.constexpr(CHUNK.index("OUT_OFFSET"))
_FIRST_PART = tl.constexpr(CHUNK.index("FIRST_PART"))
_PART_COUNT = tl.constexpr(CHUNK.index("PART_COUNT"))

_PART = tl.constexpr(len(PART_ROW))
_TABLE_INDEX = tl.constexpr(PART_ROW.index("TABLE_INDEX"))
_POSITION = tl.constexpr(PART_ROW.index("POSITION"))
_FIRST_STRIP = tl.constexpr(PART_ROW.index("FIRST_STRIP"))
_STRIP_COUNT = tl.constexpr(PART_ROW.index("STRIP_COUNT"))
_INSIDE_AT = tl.constexpr(PART_ROW.index("INSIDE_AT"))
_INSIDE_BYTES = tl.constexpr(PART_ROW.index("INSIDE_BYTES"))


# ---- elements and planes

@triton.jit
def load_item(raw, index, held, ITEM_BYTES: tl.constexpr):
    """Return elements as uint32. Byte by byte: a part may begin anywhere."""
    item = tl.load(raw + index * ITEM_BYTES, mask=held, other=0).to(tl.uint32)
    for byte in tl.static_range(1, ITEM_BYTES):
        item |= tl.load(raw + index * ITEM_BYTES + byte, mask=held, other=0).to(tl.uint32) \
            << (8 * byte)
    return item


@triton.jit
def store_plane(bits, plane, count):
    """Store bit i of `bits` (uint32 [4096], 0 from `count` on) as bit i % 8 of byte i // 8."""
    eights = tl.reshape(bits, (_N // 8, 8)) << tl.arange(0, 8).to(tl.uint32)[None, :]
    byte = tl.arange(0, _N // 8)
    tl.store(plane + byte, tl.sum(eights, axis=1).to(tl.uint8), mask=byte < (count + 7) // 8)


@triton.jit
def load_plane(plane, index, held):
    return tl.load(plane + index // 8, mask=held, other=0).to(tl.int32) >> (index % 8) & 1


@triton.jit
def unused_bits(plane, count):
    """Return the bits behind the last of `count` values, which must be 0."""
    last = tl.load(plane + tl.maximum(count - 1, 0) // 8, mask=count % 8 != 0, other=0)
    return last.to(tl.int32) >> (count % 8)


# ---- encoding

@triton.jit
def code_tier(planes, kept, code, distance, left, shift, WIDTH: tl.constexpr):
    """Store the planes of a tier that `left` elements came to. Return the distances that go on,
    by way of `kept`, and how many they are."""
    i = tl.arange(0, _N)
    LAST: tl.constexpr = (1 << WIDTH) - 1
    digit = tl.load(code + distance, mask=i < left, other=0).to(tl.uint32) >> shift & LAST
    for bit in tl.static_range(WIDTH):
        store_plane(digit >> bit & 1, planes + bit * ((left + 7) // 8), left)
    goes_on = (digit == LAST).to(tl.int32)
    tl.store(kept + tl.cumsum(goes_on, 0) - 1, distance.to(tl.uint8), mask=goes_on != 0)
    left = tl.sum(goes_on, 0)
    tl.debug_barrier()
    return tl.load(kept + i, mask=i < left, other=0).to(tl.uint32), left


@triton.jit
def encode_kernel(raw, strips, numbers, blob, bodies, tails, waiting, lengths,
                  ITEM_BYTES: tl.constexpr, EXPONENT_BITS: tl.constexpr, TIER_BITS: tl.constexpr):
    """A program codes one strip into its scratch. `lengths`: form, body and tail bytes of each.

    `waiting`: uint8 [strips, TIERS_MAX, 4096], the distances that go on from each tier.
    """
    number = tl.load(numbers + tl.program_id(0))
    strip = strips + number * _STRIP
    count = tl.load(strip + _COUNT).to(tl.int32)
    source = raw + tl.load(strip)
    i = tl.arange(0, _N)
    held = i < count
    item = load_item(source, i, held, ITEM_BYTES)
    first = load_item(source, i * 0, held, ITEM_BYTES)
    is_constant = tl.max((item != first).to(tl.int32)) == 0
    form = tl.where(is_constant, _CONSTANT, _EXACT)
    body_bytes = tl.where(is_constant, 0, count * ITEM_BYTES)
    tail_bytes = tl.where(is_constant, ITEM_BYTES, 0)
    if TIER_BITS != 0:
        BITS: tl.constexpr = 8 * ITEM_BYTES
        VERBATIM: tl.constexpr = BITS - EXPONENT_BITS
        WHOLE: tl.constexpr = VERBATIM // 8
        rotated = (item << 1 | item >> (BITS - 1)) & ((1 << BITS) - 1)
        body = bodies + number * _BODY_SLOT
        for byte in tl.static_range(WHOLE):
            tl.store(body + i * WHOLE + byte, (rotated >> (8 * byte) & 0xFF).to(tl.uint8),
                     mask=held)
        plane_bytes = (count + 7) // 8
        at = count * WHOLE
        for bit in tl.static_range(8 * WHOLE, VERBATIM):
            store_plane(rotated >> bit & 1, body + at, count)
            at += plane_bytes
        base = tl.load(blob + tl.load(strip + _BASES_AT) + i, mask=held, other=0).to(tl.uint32)
        distance = ((rotated >> VERBATIM) - base) & ((1 << EXPONENT_BITS) - 1)
        code = blob + tl.load(strip + _CODE_AT)
        tail = tails + number * _TAIL_SLOT
        left = count
        tiered_tail = count * 0
        kept = waiting + number * _TIERS * _N
        shift = 0
        for tier in tl.static_range(_TIERS):
            if (TIER_BITS >> (4 * tier)) & 15 > 0:
                planes_bytes = ((TIER_BITS >> (4 * tier)) & 15) * ((left + 7) // 8)
                if tier == 0:
                    planes = body + at
                    at += planes_bytes
                else:
                    planes = tail + tiered_tail
                    tiered_tail += planes_bytes
                distance, left = code_tier(planes, kept + tier * _N, code, distance, left, shift,
                                           (TIER_BITS >> (4 * tier)) & 15)
                shift += (TIER_BITS >> (4 * tier)) & 15
        tl.store(tail + tiered_tail + i, distance.to(tl.uint8), mask=i < left)
        tiered_tail += left
        shorter = (is_constant == 0) & (at + tiered_tail < count * ITEM_BYTES)
        form = tl.where(shorter, _TIERED, form)
        body_bytes = tl.where(shorter, at, body_bytes)
        tail_bytes = tl.where(shorter, tiered_tail, tail_bytes)
    tl.store(lengths + number * 3, form)
    tl.store(lengths + number * 3 + 1, body_bytes)
    tl.store(lengths + number * 3 + 2, tail_bytes)


@triton.jit
def part_bytes(part, lengths, BLOCK: tl.constexpr):
    """Return bytes of header, table and index, of the bodies, and of the tails of a part."""
    first = tl.load(part + _FIRST_STRIP)
    count = tl.load(part + _STRIP_COUNT)
    front = 16 + tl.load(part + _INSIDE_BYTES) + (2 * count + 15) // 16 * 16
    bodies = count * 0
    tails = count * 0
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        bodies += tl.sum(tl.load(lengths + (first + i) * 3 + 1, mask=i < count, other=0), 0)
        tails += tl.sum(tl.load(lengths + (first + i) * 3 + 2, mask=i < count, other=0), 0)
    return front, bodies, tails


@triton.jit
def store_le32(out, value):
    for byte in tl.static_range(4):
        tl.store(out + byte, (value >> (8 * byte) & 0xFF).to(tl.uint8))


@triton.jit
def store_zeros(out, start, stop):
    """Fewer than 16."""
    at = start + tl.arange(0, 16)
    tl.store(out + at, tl.zeros((16,), tl.uint8), mask=at < stop)


@triton.jit
def layout_kernel(chunks, parts, blob, lengths, places, out, coded_bytes, BLOCK: tl.constexpr):
    """A program lays out one chunk: headers, tables and indices, and where each strip goes.

    `places`: body and tail of each strip in `out`, -1 in a chunk that goes raw. `coded_bytes` of
    each chunk: its raw bytes where the code does not make it shorter.
    """
    chunk = chunks + tl.program_id(0).to(tl.int64) * _CHUNK
    raw_bytes = tl.load(chunk + _CHUNK_BYTES)
    first_part = tl.load(chunk + _FIRST_PART)
    part_count = tl.load(chunk + _PART_COUNT)
    total = raw_bytes * 0
    for number in range(part_count):
        front, bodies, tails = part_bytes(parts + (first_part + number) * _PART, lengths, BLOCK)
        total += (front + bodies + tails + 15) // 16 * 16
    fits = total < raw_bytes
    tl.store(coded_bytes + tl.program_id(0), tl.where(fits, total, raw_bytes))
    start = tl.load(chunk + _OUT_OFFSET)
    for number in range(part_count):
        part = parts + (first_part + number) * _PART
        front, bodies, tails = part_bytes(part, lengths, BLOCK)
        used = front + bodies + tails
        first = tl.load(part + _FIRST_STRIP)
        count = tl.load(part + _STRIP_COUNT)
        inside = tl.load(part + _INSIDE_BYTES)
        if fits:
            store_le32(out + start, tl.load(part))
            store_le32(out + start + 4, (used + 15) // 16 * 16)
            store_le32(out + start + 8, tl.load(part + _TABLE_INDEX))
            store_le32(out + start + 12, tl.load(part + _POSITION))
            for at in range(0, inside, BLOCK):
                i = at + tl.arange(0, BLOCK)
                table = tl.load(blob + tl.load(part + _INSIDE_AT) + i, mask=i < inside, other=0)
                tl.store(out + start + 16 + i, table, mask=i < inside)
            index = out + start + 16 + inside
            store_zeros(index, 2 * count, front - 16 - inside)
            store_zeros(out + start, used, (used + 15) // 16 * 16)
        body_at = start + front
        tail_at = body_at + bodies
        for at in range(0, count, BLOCK):
            i = at + tl.arange(0, BLOCK)
            row = lengths + (first + i) * 3
            form = tl.load(row, mask=i < count, other=0)
            body = tl.load(row + 1, mask=i < count, other=0)
            tail = tl.load(row + 2, mask=i < count, other=0)
            place = places + (first + i) * 2
            tl.store(place, tl.where(fits, body_at + tl.cumsum(body, 0) - body, -1),
                     mask=i < count)
            tl.store(place + 1, tail_at + tl.cumsum(tail, 0) - tail, mask=i < count)
            if fits:
                entry = form << _FORM_SHIFT | tail
                index = out + start + 16 + inside + 2 * i
                tl.store(index, (entry & 0xFF).to(tl.uint8), mask=i < count)
                tl.store(index + 1, (entry >> 8).to(tl.uint8), mask=i < count)
            body_at += tl.sum(body, 0)
            tail_at += tl.sum(tail, 0)
        start += (used + 15) // 16 * 16


@triton.jit
def move(source, target, count):
    for at in range(0, count, _N):
        i = at + tl.arange(0, _N)
        tl.store(target + i, tl.load(source + i, mask=i < count, other=0), mask=i < count)


@triton.jit
def move_kernel(raw, chunks, strips, bodies, tails, lengths, places, out):
    """A program moves one strip from scratch, or from where it is raw, to its place."""
    number = tl.program_id(0).to(tl.int64)
    strip = strips + number * _STRIP
    raw_offset = tl.load(strip)
    form = tl.load(lengths + number * 3)
    body_bytes = tl.load(lengths + number * 3 + 1).to(tl.int32)
    tail_bytes = tl.load(lengths + number * 3 + 2).to(tl.int32)
    body_at = tl.load(places + number * 2)
    if body_at < 0:
        chunk = chunks + tl.load(strip + _STRIP_CHUNK) * _CHUNK
        target = tl.load(chunk + _OUT_OFFSET) + raw_offset - tl.load(chunk)
        move(raw + raw_offset, out + target,
             (tl.load(strip + _COUNT) * tl.load(strip + _ITEM_BYTES)).to(tl.int32))
    else:
        tail_at = tl.load(places + number * 2 + 1)
        if form == _TIERED:
            move(bodies + number * _BODY_SLOT, out + body_at, body_bytes)
            move(tails + number * _TAIL_SLOT, out + tail_at, tail_bytes)
        else:
            move(raw + raw_offset, out + body_at, body_bytes)
            move(raw + raw_offset, out + tail_at, tail_bytes)


# ---- decoding

@triton.jit
def read_verbatim(body, count, VERBATIM: tl.constexpr):
    """Return the verbatim values of `count` elements, and bits that must be 0."""
    i = tl.arange(0, _N)
    WHOLE: tl.constexpr = VERBATIM // 8
    value = tl.zeros((_N,), tl.uint32)
    for byte in tl.static_range(WHOLE):
        here = tl.load(body + i * WHOLE + byte, mask=i < count, other=0)
        value |= here.to(tl.uint32) << (8 * byte)
    unused = count * 0
    for bit in tl.static_range(8 * WHOLE, VERBATIM):
        plane = body + count * WHOLE + (bit - 8 * WHOLE) * ((count + 7) // 8)
        value |= load_plane(plane, i, i < count).to(tl.uint32) << bit
        unused |= unused_bits(plane, count)
    return value, unused


@triton.jit
def read_tier(planes, kept, offsets, distances, element, left, WIDTH: tl.constexpr):
    """Store the distances of those of the `left` elements that end in this tier. Return the
    elements that go on, by way of `kept`, how many they are, and bits that must be 0."""
    i = tl.arange(0, _N)
    LAST: tl.constexpr = (1 << WIDTH) - 1
    digit = tl.zeros((_N,), tl.int32)
    unused = left * 0
    for bit in tl.static_range(WIDTH):
        plane = planes + bit * ((left + 7) // 8)
        digit |= load_plane(plane, i, i < left) << bit
        unused |= unused_bits(plane, left)
    ends = (i < left) & (digit != LAST)
    tl.store(distances + element, tl.load(offsets + digit, mask=ends, other=0), mask=ends)
    goes_on = (digit == LAST).to(tl.int32)
    tl.store(kept + tl.cumsum(goes_on, 0) - 1, element.to(tl.int16), mask=goes_on != 0)
    left = tl.sum(goes_on, 0)
    tl.debug_barrier()
    return tl.load(kept + i, mask=i < left, other=0).to(tl.int32), left, unused


@triton.jit
def decode_kernel(coded, strips, numbers, blob, waiting, distances, raw, chunk_invalid,
                  ITEM_BYTES: tl.constexpr, EXPONENT_BITS: tl.constexpr, TIER_BITS: tl.constexpr):
    """A program decodes one strip. Planes that break a rule set `chunk_invalid` of its chunk.

    `waiting`: int16 [strips, TIERS_MAX, 4096], which elements go on from each tier; `distances`:
    uint8 [strips, 4096].
    """
    number = tl.load(numbers + tl.program_id(0))
    strip = strips + number * _STRIP
    count = tl.load(strip + _COUNT).to(tl.int32)
    form = tl.load(strip + _FORM)
    body = coded + tl.load(strip + _BODY_AT)
    tail = coded + tl.load(strip + _TAIL_AT)
    target = raw + tl.load(strip)
    i = tl.arange(0, _N)
    held = i < count
    if form == _CONSTANT:
        for byte in tl.static_range(ITEM_BYTES):
            tl.store(target + i * ITEM_BYTES + byte, tl.load(tail + byte + i * 0), mask=held)
    elif form == _EXACT:  # of chunks that stay raw too: they have words in place of elements
        move(body, target, count * tl.load(strip + _ITEM_BYTES).to(tl.int32))
    elif TIER_BITS != 0:
        BITS: tl.constexpr = 8 * ITEM_BYTES
        VERBATIM: tl.constexpr = BITS - EXPONENT_BITS
        rotated, wrong = read_verbatim(body, count, VERBATIM)
        at = count * (VERBATIM // 8) + VERBATIM % 8 * ((count + 7) // 8)
        tail_bytes = tl.load(strip + _TAIL_BYTES).to(tl.int32)
        offsets = blob + tl.load(strip + _CODE_AT) + _OFFSETS_AT
        mine = distances + number * _N
        left = count
        tail_at = count * 0
        element = i
        rank = 0
        kept = waiting + number * _TIERS * _N
        for tier in tl.static_range(_TIERS):
            if (TIER_BITS >> (4 * tier)) & 15 > 0:
                planes_bytes = ((TIER_BITS >> (4 * tier)) & 15) * ((left + 7) // 8)
                if tier == 0:
                    planes = body + at
                    at += planes_bytes
                else:  # never beyond the tail: an element too many is none
                    wrong |= (tail_at + planes_bytes > tail_bytes).to(tl.int32)
                    left = tl.where(wrong != 0, 0, left)
                    planes = tail + tail_at
                    tail_at += planes_bytes
                element, left, unused = read_tier(planes, kept + tier * _N, offsets + rank, mine,
                                                  element, left, (TIER_BITS >> (4 * tier)) & 15)
                wrong |= unused
                rank += (1 << ((TIER_BITS >> (4 * tier)) & 15)) - 1
        wrong |= (tail_at + left != tail_bytes).to(tl.int32)
        here = i < tl.where(wrong == 0, left, 0)
        literal = tl.load(tail + tail_at + i, mask=here, other=0)
        wrong |= tl.max(literal.to(tl.int32), 0) >> EXPONENT_BITS
        tl.store(mine + element, literal, mask=here)
        tl.debug_barrier()
        base = tl.load(blob + tl.load(strip + _BASES_AT) + i, mask=held, other=0).to(tl.uint32)
        exponent = tl.load(mine + i, mask=held, other=0).to(tl.uint32) + base
        rotated |= (exponent & ((1 << EXPONENT_BITS) - 1)) << VERBATIM
        item = rotated >> 1 | (rotated & 1) << (BITS - 1)
        for byte in tl.static_range(ITEM_BYTES):
            tl.store(target + i * ITEM_BYTES + byte, (item >> (8 * byte) & 0xFF).to(tl.uint8),
                     mask=held)
        if wrong != 0:
            tl.store(chunk_invalid + tl.load(strip + _STRIP_CHUNK), 1)


# ---- launches

def cut_of(form: tuple[int, tuple[int, ...]]) -> dict[str, int]:
    """Return what the kernels are compiled for: a dtype and its tier bits; (0, ()): opaque."""
    dtype, tier_bits = form
    if not tier_bits:
        return {"ITEM_BYTES": 1, "EXPONENT_BITS": 1, "TIER_BITS": 0}
    cut = element_format(dtype)
    return {"ITEM_BYTES": cut.item_bytes, "EXPONENT_BITS": cut.exponent_bits,
            "TIER_BITS": sum(bits << 4 * tier for tier, bits in enumerate(tier_bits))}


def encode_chunks(plan: CodePlan, raw, out):
    """Enqueue the coding of all chunks; return int64 [chunks], the bytes each takes in its slot.

    A chunk that the code does not make shorter lies there raw. Scratch takes about five times the
    raw bytes until the kernels have run: give a plan for so much at a time.

    Args:
        raw: uint8 tensor, the packed segment.
        out: uint8 tensor of plan.out_bytes.
    """
    import torch
    device, strip_count = raw.device, len(plan.strips)
    chunks, parts, strips, blob = (upload(rows, device) for rows in (
        plan.chunks, plan.parts, plan.strips, plan.blob))
    bodies, tails, waiting = (torch.empty(strip_count * each, dtype=torch.uint8, device=device)
                              for each in (BODY_SLOT, TAIL_SLOT, TIERS_MAX * STRIP_ELEMENTS))
    lengths = torch.empty((strip_count, 3), dtype=torch.int64, device=device)
    places = torch.empty((strip_count, 2), dtype=torch.int64, device=device)
    coded_bytes = torch.empty(len(chunks), dtype=torch.int64, device=device)
    for form, numbers in plan.strips_of.items():
        encode_kernel[(len(numbers),)](raw, strips, upload(numbers, device), blob, bodies, tails,
                                       waiting, lengths, **cut_of(form))
    layout_kernel[(len(chunks),)](chunks, parts, blob, lengths, places, out, coded_bytes,
                                  BLOCK=LAYOUT_STRIPS)
    move_kernel[(strip_count,)](raw, chunks, strips, bodies, tails, lengths, places, out)
    return coded_bytes


def decode_chunks(plan: ReadPlan, coded, raw, chunk_count: int):
    """Enqueue the decoding; return int32 [chunks], not 0 where a chunk is CODED_INVALID.

    Args:
        coded, raw: uint8 tensors; the plan says where in them.
    """
    import torch
    device, strip_count = coded.device, len(plan.strips)
    strips, blob = upload(plan.strips, device), upload(plan.blob, device)
    waiting = torch.empty(strip_count * TIERS_MAX * STRIP_ELEMENTS, dtype=torch.int16,
                          device=device)
    distances = torch.empty(strip_count * STRIP_ELEMENTS, dtype=torch.uint8, device=device)
    chunk_invalid = torch.zeros(chunk_count, dtype=torch.int32, device=device)
    for form, numbers in plan.strips_of.items():
        decode_kernel[(len(numbers),)](coded, strips, upload(numbers, device), blob, waiting,
                                       distances, raw, chunk_invalid, **cut_of(form))
    return chunk_invalid
