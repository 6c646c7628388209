"""Filters that follow edges: the functions that people call. Shapes, dtypes, errors and sources are documented here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atrous_kernels.arguments import check_transform
from atrous_kernels.lattice_arguments import (
    channels_second,
    check_features,
    check_mean_field,
    check_values,
    computed_in,
    points_first,
)
from atrous_kernels.ops import domain_transform as _domain_transform_op
from atrous_kernels.ops import mean_field as _mean_field_op
from atrous_kernels.ops import permutohedral_filter as _permutohedral_filter_op
from atrous_kernels.ops import permutohedral_lattice as _permutohedral_lattice_op
from atrous_kernels.ops.permutohedral_lattice import PermutohedralLattice


def permutohedral_lattice(features: Tensor, *, backend: str = "auto") -> PermutohedralLattice:
    """Where points lie in the permutohedral lattice: made once, for any number of calls of :func:`permutohedral_filter`.

    Args:
        features: ``[N, d, *spatial]``, d from 1 to 6, floating point: the position of every point in units of the filter's
            standard deviation, for example ``(x / 80, y / 80, r / 13, g / 13, b / 13)``. float64 gives a float64 lattice, other
            types one in float32. Differentiable once.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``.

    Returns:
        :class:`PermutohedralLattice`, plain tensors, the same bits for any number of threads. Images do not share vertices.

    Raises:
        TypeError, ValueError: wrong types or sizes.
        RuntimeError: a feature that is not finite or above 65536; a ``backend`` that cannot run.

    Source: Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010.
    """
    check_features(features)
    rows = features.flatten(2).transpose(1, 2).to(computed_in(features.dtype))
    vertices, weights, *rest, _ = _permutohedral_lattice_op.permutohedral_lattice(rows.contiguous(), backend)
    shape = (features.shape[0], *features.shape[2:], features.shape[1] + 1)
    return PermutohedralLattice(vertices.view(shape), weights.view(shape), *rest)


def permutohedral_filter(values: Tensor, features: Tensor | PermutohedralLattice, *, backend: str = "auto") -> Tensor:
    """Gaussian filtering in the space of the features: about ``out[i] = sum over j of exp(-|f_i - f_j|^2 / 2) values[j]``, not
    normalised, over the points of one image, in time linear in the points.

    The lattice interpolates, blurs with a small kernel and interpolates back, so it approximates the Gaussian (docs/kernels.md
    says how well); it is what dense CRFs are defined with in practice.

    Args:
        values: ``[N, C, *spatial]``, floating point, computed in the type of the lattice; fastest channels-last.
        features: as in :func:`permutohedral_lattice`, or its result.
        backend: as in :func:`permutohedral_lattice`.

    Returns:
        ``[N, C, *spatial]``, dtype of ``values``, channels last in memory.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`permutohedral_lattice`.

    Differentiable twice in values (the adjoint blurs along the axes in reverse order), once in features.
    """
    lattice = features if isinstance(features, PermutohedralLattice) else permutohedral_lattice(features, backend=backend)
    check_values("permutohedral_filter", values, lattice)
    rows = points_first(values).to(lattice.weights.dtype)
    return channels_second(_permutohedral_filter_op.permutohedral_filter(rows, *lattice.arrays(), False, backend), values)


def mean_field(
    unary: Tensor,
    lattices: Sequence[PermutohedralLattice],
    compatibilities: Sequence[Tensor],
    iterations: int = 10,
    *,
    normalization: str = "symmetric",
    backend: str = "auto",
) -> Tensor:
    """Mean field inference in a fully connected CRF: ``Q = softmax(-unary)``, then, ``iterations`` times,
    ``Q = softmax(-unary - sum over m of compatibility_m K_m Q)``.

    Args:
        unary: ``[N, C, *spatial]``, floating point: energies, ``-log P``; fastest channels-last.
        lattices: of the features of each Gaussian kernel ``K_m``; of one dtype, in which all is computed.
        compatibilities: per kernel its weight times the compatibility of labels: ``[C, C]``, or ``[C]`` for a diagonal. Potts
            with weight w is the diagonal of ``-w``: marginals add up to one, so it is the same as w off the diagonal.
        normalization: of every kernel by its own response ``k = K 1``: ``"symmetric"`` (``k^-1/2 K k^-1/2``), ``"before"``
            (``K k^-1``), ``"after"`` (``k^-1 K``) or ``"none"``.
        backend: as in :func:`permutohedral_lattice`.

    Returns:
        The marginals Q, ``[N, C, *spatial]``, dtype of ``unary``, channels last in memory. A point's own message to itself is not
        removed.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`permutohedral_lattice`. NotImplementedError: a gradient is asked for.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011,
    algorithm 1; the normalisations: the same, "Parameter Learning and Convergent Inference for Dense Random Fields", 2013.
    """
    check_mean_field(unary, lattices, compatibilities, iterations, normalization)
    dtype = lattices[0].weights.dtype if lattices else computed_in(unary.dtype)
    before, after = _mean_field_op.normalizers(lattices, normalization, backend)
    arrays = [array for lattice in lattices for array in lattice.arrays()]
    factors = [compatibility.to(dtype).contiguous() for compatibility in compatibilities]
    rows = points_first(unary).to(dtype)
    return channels_second(_mean_field_op.mean_field(rows, arrays, factors, before, after, iterations, backend), unary)


def domain_transform(
    input: Tensor, edge: Tensor, sigma_s: float, sigma_r: float, iterations: int = 3, *, backend: str = "auto"
) -> Tensor:
    """Edge-preserving smoothing by recursive filters along rows and columns: time linear in the pixels, whatever the widths.

    Iteration k of K has the width ``s_k = sigma_s sqrt(3) 2^(K - k) / sqrt(4^K - 1)`` and filters left to right, right to left,
    top to bottom and bottom to top with ``y[i] = (1 - w[i]) x[i] + w[i] y[i - 1]``,
    ``w[i] = exp(-sqrt(2) / s_k (1 + edge[i] sigma_s / sigma_r))``; the first position keeps its value.

    Args:
        input: scores or an image, ``[N, C, H, W]``, floating point, any strides; 16-bit types are computed in float32. ``N`` may
            be 0. Values that are not finite spread along their row and column.
        edge: density of edges, ``[N, 1, H, W]`` as DeepLab's EdgeNet gives it, or ``[N, 2, H, W]`` for rows and columns apart,
            as image gradients are. ``edge[..., i]`` lies between positions i - 1 and i, so that the first column (of the density
            of rows) and the first row (of that of columns) do not count. Finite and at least 0, which is checked on the CPU.
        sigma_s: width of the filter in pixels where there is no edge.
        sigma_r: its width in sums of densities.
        iterations: K; fewer leave streaks.
        backend: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``[N, C, H, W]``, dtype of the input; channels-last where the input is.

    Raises:
        TypeError, ValueError: an argument outside these, or an unknown ``backend``.
        RuntimeError: a ``backend`` asked for by name cannot run this problem; the message says why.

    Differentiable in both; the second derivative is plain PyTorch, slow and hungry for memory. Sources: Gastal, Oliveira, "Domain
    Transform for Edge-Aware Image and Video Processing", 2011; Chen et al., "Semantic Image Segmentation with Task-Specific Edge
    Detection Using CNNs and a Discriminatively Trained Domain Transform", 2016, section 3.
    """
    check_transform(input, edge, sigma_s, sigma_r, iterations)
    wide = edge.to(torch.float64 if input.dtype == torch.float64 else torch.float32).expand(-1, 2, -1, -1)
    return _domain_transform_op.domain_transform(input, wide, sigma_s, sigma_r, iterations, backend)
