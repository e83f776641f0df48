"""How a push of items is cut into what one launch takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from kvwire.control import Item
from kvwire.kernels.staging import check_fits
from kvwire.layout import CacheSpec
from kvwire.limits import ITEM_COUNT_MAX

__all__ = ["cut", "slices_of"]


def slices_of(spec: CacheSpec, items: Sequence[Item], slice_bytes: int) -> Iterator[list[Item]]:
    """Yield the items of a push in portions of at most `slice_bytes`: states, then the layers of a
    group as many together as fit; blocks stay whole where they do.

    Raises LimitError: a token's row, or a state, is larger.
    """
    def tensor(item):
        return spec.groups[item.group_index].tensors[item.tensor_index]

    portion, left = [], slice_bytes
    for item in (item for item in items if not tensor(item).has_tokens):
        count = tensor(item).row_bytes
        check_fits(f"layer {item.layer}, tensor {tensor(item).name}", count, slice_bytes)
        if count > left or len(portion) == ITEM_COUNT_MAX:
            yield portion
            portion, left = [], slice_bytes
        portion.append(item)
        left -= count
    tokened = [item for item in items if tensor(item).has_tokens]
    for (group, _, start, stop), same in itertools.groupby(
            tokened, lambda item: (item.group_index, item.layer, item.token_start,
                                   item.token_stop)):
        same = list(same)
        row_bytes = sum(tensor(item).row_bytes for item in same)
        check_fits(f"a token of group {group}", row_bytes, slice_bytes)
        block = spec.groups[group].block_tokens or 1
        if portion and (portion[0].group_index != group or (stop - start) * row_bytes > left
                        or len(portion) + len(same) > ITEM_COUNT_MAX):
            yield portion
            portion, left = [], slice_bytes
        while start < stop:
            end = min(start + left // row_bytes, stop)
            if end < stop and end - end % block > start:
                end -= end % block
            portion += [cut(item, start, end) for item in same]
            left -= (end - start) * row_bytes
            if end < stop:
                yield portion
                portion, left = [], slice_bytes
            start = end
    if portion:
        yield portion


def cut(item: Item, start: int, stop: int) -> Item:
    """Return the tokens [start, stop) of an item."""
    if (item.token_start, item.token_stop) == (start, stop):
        return item
    return Item(item.group_index, item.tensor_index, item.layer, start, stop)
