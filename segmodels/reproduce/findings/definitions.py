"""What the papers found by changing one thing: arms, published scores, and which is to be above which."""

from __future__ import annotations

from dataclasses import dataclass

from segmodels.reproduce.findings.arms import ARMS

V1, V2 = "DeepLab v1 (Chen et al. 2015)", "DeepLab v2 (Chen et al. 2017)"
V3 = "DeepLabv3 (Chen et al. 2017)"
PSP = "PSPNet (Zhao et al. 2017)"
FCN = "FCN (Long et al. 2015)"
DILATED = "Dilated convolutions (Yu and Koltun 2016)"
SCALE = "Attention to scale (Chen et al. 2016)"


@dataclass(frozen=True)
class Finding:
    """One controlled comparison of a paper.

    Attributes:
        claim: what the paper concludes.
        arms: ours -> the published score of its counterpart in % (None: not published).
        order: pairs (above, below) of arms that the claim is about.
        differs: what is not as in the paper beside the data and the size of the network.
        metric: ``"miou"``, or classes whose IoUs are averaged.
        why: where it does not hold here, the reason that was found, without numbers.
    """

    title: str
    paper: str
    table: str
    claim: str
    arms: dict[str, float | None]
    order: tuple[tuple[str, str], ...]
    differs: str = ""
    metric: str | tuple[str, ...] = "miou"
    why: str = ""


FINDINGS: dict[str, Finding] = {
    "output_stride": Finding(
        "Output stride", V3, "table 1", "the denser the features, the better",
        {"block4_os8": 75.18, "block4_os16": 73.88, "block4_os32": 70.06},
        (("block4_os8", "block4_os16"), ("block4_os16", "block4_os32")),
        differs="block4 in place of block7",
    ),
    "multi_grid": Finding(
        "Multi-grid", V3, "tables 2 and 3, block4", "growing rates within a block help; doubling all of them helps less",
        {"block4_os16": 68.39, "block4_grid22": 71.45, "block4_grid12": 73.45},
        (("block4_grid12", "block4_os16"), ("block4_grid12", "block4_grid22")),
        differs="two units per block in place of three: (1, 2) for (1, 2, 4)",
    ),
    "aspp": Finding(
        "Multi-grid, a fourth rate and image pooling under ASPP", V3, "table 5",
        "multi-grid and image pooling help, a fourth rate does not",
        {"v3_plain": 75.36, "v3_grid": 76.58, "v3_rate4": 76.46, "v3": 77.21},
        (("v3_grid", "v3_plain"), ("v3_grid", "v3_rate4"), ("v3", "v3_grid")),
    ),
    "inference": Finding(
        "Inference strategy", V3, "table 6 (table 4 alike)", "each of a smaller output stride, several scales and mirroring helps",
        {"v3": 77.21, "v3_eval8": 78.51, "v3_eval8_scales": 79.45, "v3_eval8_scales_flip": 79.77},
        (("v3_eval8", "v3"), ("v3_eval8_scales", "v3_eval8"), ("v3_eval8_scales_flip", "v3_eval8_scales")),
        differs="scales 0.75 to 1.25 in place of 0.5 to 1.75",
    ),
    "crop": Finding(
        "Crop size", V3, "table 8", "crops must be large",
        {"v3": 77.21, "v3_small_crop": 67.22}, (("v3", "v3_small_crop"),),
    ),
    "labels": Finding(
        "Where the loss compares", V3, "table 8", "upsampling the scores beats subsampling the labels",
        {"v3": 77.21, "v3_small_labels": 76.01}, (("v3", "v3_small_labels"),),
    ),
    "batch": Finding(
        "Batch size", V3, "table 9", "batch statistics need large batches",
        {"v3": 77.21, "v3_batch4": 75.76, "v3_batch2": 64.43}, (("v3", "v3_batch4"), ("v3_batch4", "v3_batch2")),
        differs="batches of 8, 4, 2 in place of 16, 8, 4",
    ),
    "train_eval_stride": Finding(
        "Output stride in training and evaluation", V3, "table 10",
        "training at 16 and evaluating at 8 is best; training at 8 and evaluating at 16 loses",
        {"v3_os8_eval16": 74.45, "v3": 77.21, "v3_os32_eval16": 75.90, "v3_os8": 75.62, "v3_eval8": 78.51, "v3_os32_eval8": 75.75},
        (("v3_eval8", "v3"), ("v3", "v3_os32_eval16"), ("v3_os8", "v3_os8_eval16"), ("v3_eval8", "v3_os8"),
         ("v3_eval8", "v3_os32_eval8")),
    ),
    "pyramid": Finding(
        "Pyramid pooling", PSP, "table 1", "pooling helps; several bins beat one; averages beat maxima; reduction helps",
        {"fcn": 37.23, "psp_one_max": 39.94, "psp_one_average": 40.07, "psp_max": 40.18, "psp_average": 41.07,
         "psp_max_reduced": 40.87, "psp_average_reduced": 41.68},
        (("psp_average_reduced", "fcn"), ("psp_average", "psp_one_average"), ("psp_average", "psp_max"),
         ("psp_average_reduced", "psp_average"), ("psp_average_reduced", "psp_max_reduced")),
        differs="without the auxiliary loss",
    ),
    "auxiliary_loss": Finding(
        "Weight of the auxiliary loss", PSP, "table 2", "a weight of 0.4 is best",
        {"fcn": 35.82, "fcn_aux04": 37.23, "fcn_aux09": 36.99}, (("fcn_aux04", "fcn"), ("fcn_aux04", "fcn_aux09")),
    ),
    "augmentation": Finding(
        "Augmentation", PSP, "table 4", "random scales and mirroring help",
        {"few_plain": 34.28, "few_augmented": 35.82}, (("few_augmented", "few_plain"),),
        differs="a training set small enough to be learned by heart; no rotation or blur",
    ),
}  # fmt: skip


def check(findings: dict[str, Finding] = FINDINGS) -> None:
    """Raises ValueError for an arm that does not exist, or an order that the published scores contradict."""
    for name, finding in findings.items():
        for arm in [*finding.arms, *(arm for pair in finding.order for arm in pair)]:
            if arm not in ARMS or arm not in finding.arms:
                raise ValueError(f"finding {name}: unknown arm {arm!r}; expected one of its own, {', '.join(finding.arms)}")
        for above, below in finding.order:
            high, low = finding.arms[above], finding.arms[below]
            if high is not None and low is not None and high <= low:
                raise ValueError(f"finding {name}: {above} ({high}) is not above {below} ({low}) in the paper")
