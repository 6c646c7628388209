"""Weakly and semi-supervised training (Papandreou, Chen, Murphy and Yuille 2015, "Weakly- and Semi-Supervised Learning of a DCNN
for Semantic Image Segmentation", arXiv:1502.02734): image tags or boxes in place of label maps."""

from segmodels.weak.annotations import Annotation, WeakLabels, derive
from segmodels.weak.boxes import rectangles, segments
from segmodels.weak.dataset import WeakDataset
from segmodels.weak.em import bbox_em_fixed, em_adapt, em_fixed

__all__ = [
    "Annotation",
    "WeakDataset",
    "WeakLabels",
    "bbox_em_fixed",
    "derive",
    "em_adapt",
    "em_fixed",
    "rectangles",
    "segments",
]
