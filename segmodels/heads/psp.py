"""The head of PSPNet as a classifier of :class:`segmodels.models.SegmentationModel`."""

from __future__ import annotations

from atrous_kernels import nn


class PSPHead(nn.PSPHead):
    """:class:`atrous_kernels.nn.PSPHead`: its bins are shares of the map, so they hold at every output stride."""

    def set_output_stride(self, output_stride: int) -> None:
        """Nothing depends on it."""
