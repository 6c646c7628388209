"""What a reader returns, and how it gets into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

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
