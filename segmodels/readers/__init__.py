"""Published segmentation weights: which model a file belongs to, under which options it computes what its authors' code
computes, and its tensors under our keys.

Equal keys do not mean equal outputs: the rate of the first block of a stage, ``align_corners``, TensorFlow's padding, the
order of ASPP's branches live in the peers' code. A reader knows its peer's code; :func:`segmodels.create_model` with
``weights=FILE`` takes the options from it.

TensorFlow's frozen graphs are not read: the package index has no light, maintained reader of them (TensorFlow itself, tf2onnx,
which needs it, and OpenVINO are not light). :mod:`segmodels.readers.mobilenet_deeplab` reads what was converted from TensorFlow
Lite.
"""

from __future__ import annotations

import os

from segmodels.backbones.weights import read_state_dict
from segmodels.readers import caffe, caffe_pspnet, kazuto_deeplabv2, mobilenet_deeplab, semseg, smp, torchvision
from segmodels.readers.published import Published, load_published

READERS = (torchvision, smp, semseg, mobilenet_deeplab, kazuto_deeplabv2, caffe, caffe_pspnet)

__all__ = ["READERS", "Published", "load_published", "read_published"]


def read_published(path: str | os.PathLike[str]) -> Published:
    """What a ``.safetensors``, ``.pth``, ``.pt`` or ``.caffemodel`` file holds. No code of the file is ever run.

    Raises:
        FileNotFoundError, ValueError: as :func:`segmodels.backbones.weights.read_state_dict`.
        ValueError: no reader knows these keys; the message shows some.
    """
    state = read_state_dict(path)
    for reader in READERS:
        if reader.recognises(state):
            return reader.read(state)
    shown = ", ".join(sorted(state)[:5])
    known = "; ".join((reader.__doc__ or "").split("\n")[0].rstrip(".") for reader in READERS)
    raise ValueError(
        f"{os.fspath(path)!r} holds no segmentation network that is known here: its keys begin {shown}. Known are: {known}. "
        "A classification network goes into weights_backbone"
    )
