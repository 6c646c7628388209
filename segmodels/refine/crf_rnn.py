"""CRF-RNN (Zheng et al., "Conditional Random Fields as Recurrent Neural Networks", 2015, arXiv:1502.03240): mean field inference
as a layer, trained end to end with the network in front of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import atrous_kernels as ak
from segmodels.refine.dense_crf import check_image, positions


class CRFRNN(nn.Module):
    """Refines scores by the image; every iteration is the same, and its weights are learnt.

    Per iteration: Q = softmax(scores); both Gaussian filters, each divided by its response to ones; the two results through
    ``bilateral_weight`` and ``spatial_weight``, their sum through ``compatibility``; the new scores are the first ones less that.

    Args:
        num_classes: C. The layer has 3 C^2 parameters.
        theta_alpha, theta_beta: widths of the bilateral kernel in pixels and colours (0 to 255); theta_gamma: of the spatial one.
        training_iterations, test_iterations: the paper trains with 5 and tests with 10.
        backend: as in :func:`atrous_kernels.permutohedral_filter`.

    Raises:
        ValueError: a width or a number of iterations that is not above 0.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        theta_alpha: float = 160.0,
        theta_beta: float = 3.0,
        theta_gamma: float = 3.0,
        training_iterations: int = 5,
        test_iterations: int = 10,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (
            ("theta_alpha", theta_alpha),
            ("theta_beta", theta_beta),
            ("theta_gamma", theta_gamma),
            ("training_iterations", training_iterations),
            ("test_iterations", test_iterations),
        ):
            if not value > 0:
                raise ValueError(f"{name}={value}: expected above 0")
        self.theta_alpha, self.theta_beta, self.theta_gamma = theta_alpha, theta_beta, theta_gamma
        self.training_iterations, self.test_iterations, self.backend = training_iterations, test_iterations, backend
        one = torch.eye(num_classes)
        self.bilateral_weight = nn.Parameter(5 * one)
        self.spatial_weight = nn.Parameter(3 * one)
        self.compatibility = nn.Parameter(-one)

    def forward(self, scores: Tensor, image: Tensor) -> Tensor:
        """Scores ``[N, C, H, W]``, not normalised (channels last in memory), for a loss on logits.

        Args:
            scores: floating point ``[N, C, H, W]``; float64 is computed in float64, other types in float32.
            image: uint8 or floating-point ``[N, c, H, W]`` with colours from 0 to 255, c from 1 to 4. No gradient flows into it.

        Raises:
            TypeError, ValueError: as :class:`segmodels.refine.DenseCRF`.
        """
        check_image("scores", scores, image)
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        first = scores.to(dtype).movedim(1, -1)  # [N, H, W, C]
        weights = [w.to(dtype) for w in (self.bilateral_weight, self.spatial_weight)]
        with torch.no_grad():
            kernels = self._kernels(image, dtype)
        current = first
        for _ in range(self.training_iterations if self.training else self.test_iterations):
            marginals = current.softmax(-1).movedim(-1, 1)
            message = torch.zeros_like(first)
            for (lattice, response), weight in zip(kernels, weights, strict=True):
                filtered = ak.permutohedral_filter(marginals, lattice, backend=self.backend) / response
                message = message + filtered.movedim(1, -1) @ weight.T
            current = first - message @ self.compatibility.to(dtype).T
        return current.movedim(-1, 1).to(scores.dtype)

    def _kernels(self, image: Tensor, dtype: torch.dtype) -> list[tuple[ak.PermutohedralLattice, Tensor]]:
        """Bilateral and spatial lattice, each with its response to ones [N, 1, H, W]."""
        grid = positions(image).to(dtype).expand(len(image), -1, -1, -1)
        bilateral = torch.cat([grid / self.theta_alpha, image.to(dtype) / self.theta_beta], 1)
        kernels = []
        for features in (bilateral, grid / self.theta_gamma):
            lattice = ak.permutohedral_lattice(features, backend=self.backend)
            response = ak.permutohedral_filter(torch.ones_like(features[:, :1]), lattice, backend=self.backend)
            kernels.append((lattice, response + 1e-20))
        return kernels
