"""What follows a network: refinement of its classes by the image."""

from __future__ import annotations

from segmodels.refine.crf_rnn import CRFRNN
from segmodels.refine.crf_search import search
from segmodels.refine.dense_crf import PRESETS, DenseCRF, unary_from_labels, unary_from_probabilities, unary_from_scores
from segmodels.refine.domain_transform import DomainTransform, image_edges

__all__ = [
    "CRFRNN", "PRESETS", "DenseCRF", "DomainTransform", "image_edges", "search", "unary_from_labels", "unary_from_probabilities",
    "unary_from_scores",
]  # fmt: skip
