"""What a reader returns, and how it gets into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from segmodels.backbones.resnet import DEPTHS
from segmodels.backbones.weights import check_fit


class Published(NamedTuple):
    """Weights of a published segmentation network.

    Attributes:
        model: the name for :func:`segmodels.create_model`.
        options: its further arguments under which the network computes what its authors' code computes; plain values.
        state: the tensors under our keys.
    """

    model: str
    options: dict[str, Any]
    state: dict[str, Tensor]


def load_published(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copies ``state`` into ``model``. Tensors of an auxiliary classifier that the model does not have are left out.

    Raises:
        ValueError: names every missing, unexpected or mis-shaped tensor; nothing is copied.
    """
    expected = model.state_dict()
    without_aux = getattr(model, "aux_classifier", None) is None
    given = {k: v for k, v in state.items() if not (without_aux and k.startswith("aux_classifier."))}
    check_fit(given, expected, f"{source} does not fit {type(model).__name__}")
    model.load_state_dict(given, strict=False)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """``state`` with the longest prefix of ``names`` that a key has replaced; other keys stay, to be named as unexpected."""
    prefixes = sorted(names, key=len, reverse=True)
    ours = {}
    for key, value in state.items():
        prefix = next((p for p in prefixes if key.startswith(p)), "")
        ours[names.get(prefix, "") + key[len(prefix) :]] = value
    return ours


def resnet_name(state: Mapping[str, Tensor], prefix: str = "") -> str:
    """The ResNet whose blocks ``prefix + "layerN.I."`` are in ``state``, as in ``BACKBONES``.

    Raises:
        ValueError: no ResNet has these numbers of blocks.
    """
    blocks = tuple(
        len({key.split(".")[0] for key in (k.removeprefix(f"{prefix}layer{n}.") for k in state
                                           if k.startswith(f"{prefix}layer{n}."))})
        for n in range(1, 5)
    )  # fmt: skip
    bottleneck = f"{prefix}layer1.0.conv3.weight" in state
    for depth, known in DEPTHS.items():
        if known == (bottleneck, blocks):
            return f"resnet{depth}"
    raise ValueError(f"no ResNet that is known here has {blocks} {'bottlenecks' if bottleneck else 'basic blocks'}")
