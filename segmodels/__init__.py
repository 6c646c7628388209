"""The classic dilated segmentation systems, built, trained and evaluated on :mod:`atrous_kernels`."""

from __future__ import annotations

from segmodels.registry import create_model, list_models

__all__ = ["create_model", "list_models"]
