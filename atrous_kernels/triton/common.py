"""Device functions and kernels that the ops share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from atrous_kernels.triton.runtime import Launch, kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel()
def tile_pixels(table, tile, rectangles, batch, RECTANGLES: tl.constexpr, BLOCK: tl.constexpr):
    """The pixels of a tile: its entry in the rectangle table, then image, row and column within the rectangle.

    Pixels past the end are moved to the last image: their loads stay inside, and ``inside`` keeps them from being stored.
    """
    index = tl.arange(0, RECTANGLES)
    first_tiles = tl.load(table + index, mask=index < rectangles, other=2147483647)
    entry = table + tl.sum((first_tiles <= tile).to(tl.int32), axis=0) - 1
    rows = tl.load(entry + rectangles)
    cols = tl.load(entry + 2 * rectangles)
    pixel = (tile - tl.load(entry)) * BLOCK + tl.arange(0, BLOCK)
    image = pixel // (rows * cols)
    inside = image < batch
    pixel = pixel % (rows * cols)
    return entry, tl.minimum(image, batch - 1).to(tl.int64), pixel // cols, pixel % cols, inside


@kernel(do_not_specialize=["elements", "splits"])
def _sum_splits(parts, target, elements, splits, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(parts + index, mask=inside, other=0.0)
        parts += elements
    tl.store(target + index, total.to(target.dtype.element_ty), mask=inside)


def sum_splits(parts: Tensor, target: Tensor) -> Launch:
    """Adds float32 ``parts`` [splits, *target.shape], laid out as the dense ``target`` is, in the order of the splits."""
    block = 1024
    arguments = {"parts": parts, "target": target, "elements": target.numel(), "splits": parts.shape[0]}
    return Launch(_sum_splits, (-(-target.numel() // block),), arguments, {"BLOCK": block})
