"""Whether somebody has to see an op: an op in Python costs the dispatcher more than a small convolution takes, so where nobody
watches, kernels are called as functions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def unobserved(*tensors: Tensor | None) -> bool:
    """Whether the kernel of an op may be called as a function: but for autograd (see :func:`recorded`), no trace, transform,
    mode or autocast has to see the op."""
    return not torch.is_autocast_enabled("cpu") and unobserved_but_for_autocast(*tensors)


def unobserved_but_for_autocast(*tensors: Tensor | None) -> bool:
    """The same for tensors that have the dtypes which a region of autocast wants."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not any(t is not None and (type(t) not in _PLAIN or not t.is_cpu or wrapped(t)) for t in tensors)


def recorded(*tensors: Tensor | None) -> bool:
    """Whether a graph is being recorded that one of the tensors is a part of."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
