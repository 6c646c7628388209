"""Fast, exact dilated (atrous) convolution for PyTorch on CPU and GPU."""

from atrous_kernels import nn
from atrous_kernels.dispatch import Explanation, backend, precision
from atrous_kernels.functional import (
    ConvBN,
    aspp,
    conv2d,
    conv_bn_relu,
    depthwise_conv2d,
    domain_transform,
    explain,
    mean_field,
    permutohedral_filter,
    permutohedral_lattice,
    psp_conv,
    pyramid_pool,
    upsample_argmax,
    upsample_concat,
    upsample_cross_entropy,
)
from atrous_kernels.ops.permutohedral_lattice import PermutohedralLattice
from atrous_kernels.swap import swap, unswap

__version__ = "0.1.0"
__all__ = [
    "ConvBN",
    "Explanation",
    "PermutohedralLattice",
    "aspp",
    "backend",
    "conv2d",
    "conv_bn_relu",
    "depthwise_conv2d",
    "domain_transform",
    "explain",
    "mean_field",
    "nn",
    "permutohedral_filter",
    "permutohedral_lattice",
    "precision",
    "psp_conv",
    "pyramid_pool",
    "swap",
    "unswap",
    "upsample_argmax",
    "upsample_concat",
    "upsample_cross_entropy",
]
