"""Dense convolution and its two gradients on the tensor cores, in CUDA C++ (``csrc/cuda/conv2d_tensor_core.cu``).

For GPUs without Triton. The kernels copy whole vectors of 16 bytes, so they take channels-last tensors and one group; where the
channels that they read do not fill their vectors, tensors are copied first with zeros behind the channels. float32 is multiplied
in TF32 where PyTorch's flag for matrix products allows it, and not at all elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atrous_kernels import dispatch, native
from atrous_kernels.problem import ConvProblem
from atrous_kernels.triton.runtime import dot_precision

Ints = Sequence[int]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_run(problem: ConvProblem) -> str | None:
    """None, or why the kernels cannot run the convolution and its gradients."""
    if problem.device_type != "cuda":
        return f"runs on CUDA devices, not on {problem.device_type}"
    if problem.dtype not in _DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, _DTYPES))}"
    if problem.dtype is torch.float32 and dispatch.precision_mode() == "ieee":
        return "multiplies float32 in TF32, which precision 'ieee' leaves out"
    if problem.dtype is torch.float32 and dot_precision(problem.dtype) != "tf32":
        return "multiplies float32 in TF32, which torch.backends.cuda.matmul.fp32_precision does not allow"
    if problem.groups != 1:
        return f"takes one group, not {problem.groups}"
    if not problem.channels_last:
        return "takes channels-last tensors"
    return native.cuda_missing()


def _whole(channels: int, tensor: Tensor) -> int:
    """So many channels in whole vectors of 16 bytes."""
    return -(-channels * tensor.element_size() // 16) * 16 // tensor.element_size()


def _vectors(tensor: Tensor, dims: Ints = (1,)) -> Tensor:
    """Channels-last: what the problem says of one operand need not hold for the other. 16-byte aligned: a view may not be.

    Zeros behind the channels of ``dims`` fill their vectors.
    """
    missing = [_whole(size, tensor) - size if dim in dims else 0 for dim, size in enumerate(tensor.shape[:2])]
    if any(missing):
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, missing[1], 0, missing[0]))
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.channels_last)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Input [N, C, H, W] and weight [O, C, kh, kw] -> [N, O, H', W'], channels-last."""
    operands = _vectors(input), _vectors(weight), bias
    return torch.ops.atrous_native.conv2d_tensor_core(*operands, stride, padding, dilation, groups)


def conv2d_input(
    input_size: Ints, weight: Tensor, grad_output: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Gradient with respect to the input: ``grad_output`` [N, O, H', W'] -> ``input_size``, channels-last."""
    batch, channels, *size = input_size
    sizes, operands = [batch, _whole(channels, weight), *size], (_vectors(weight, (0, 1)), _vectors(grad_output))
    grad_input = torch.ops.atrous_native.conv2d_input_tensor_core(sizes, *operands, stride, padding, dilation, groups)
    return grad_input[:, :channels].contiguous(memory_format=torch.channels_last)


def conv2d_weight(
    input: Tensor, weight_size: Ints, grad_output: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Gradient with respect to the weight: input and ``grad_output`` [N, O, H', W'] -> ``weight_size``, channels-last."""
    out_channels, in_channels, *kernel = weight_size
    sizes = [_whole(out_channels, input), _whole(in_channels, input), *kernel]
    operands = _vectors(input), sizes, _vectors(grad_output)
    grad_weight = torch.ops.atrous_native.conv2d_weight_tensor_core(*operands, stride, padding, dilation, groups)
    return grad_weight[:out_channels, :in_channels].contiguous(memory_format=torch.channels_last)
