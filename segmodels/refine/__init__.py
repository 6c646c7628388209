"""What follows a network: refinement of its classes by the image."""

from __future__ import annotations

from segmodels.refine.crf_rnn import CRFRNN
from segmodels.refine.crf_search import search
from segmodels.refine.dense_crf import PRESETS, DenseCRF, unary_from_labels, unary_from_probabilities, unary_from_scores

__all__ = ["CRFRNN", "PRESETS", "DenseCRF", "search", "unary_from_labels", "unary_from_probabilities", "unary_from_scores"]
