"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): a block of the backbone keeps its input and nothing inside, and is
computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from segmodels.engine.parts import norms


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """What a backbone is a chain of: modules of several layers, direct or in a list of them. VGG and AlexNet have none."""
    found = []
    for child in backbone.children():
        inner = list(child.children())
        chain = isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        found += [block for block in (inner if chain else [child]) if any(True for _ in block.children())]
    return found


def recompute_blocks(backbone: nn.Module) -> None:
    """Makes every block compute its inside twice. Gradients, running statistics and state_dict stay what they are.

    Raises:
        ValueError: a backbone that is no chain of blocks.
    """
    blocks = blocks_of(backbone)
    if not blocks:
        raise ValueError(f"train.checkpoint_blocks=True: {type(backbone).__name__} is no chain of blocks, as ResNet, Xception, "
                         "MobileNetV2, EfficientNetLite and GoogLeNet are")  # fmt: skip
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)


def _forward(block: nn.Module, forward: Any, *inputs: Any) -> Any:
    if not block.training:
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _counted_already(block)


@contextmanager
def _counted_already(block: nn.Module) -> Iterator[None]:
    """The first pass has added the batch to the running statistics; the second one must not."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for _, norm in norms(block) if norm.training]
    for norm, _, _ in before:
        norm.momentum, norm.num_batches_tracked = 0.0, None  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
