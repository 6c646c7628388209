"""What the papers found by changing one thing: arms, published scores, and which is to be above which."""

from __future__ import annotations

from dataclasses import dataclass

from segmodels.reproduce.findings.arms import ARMS

#: of every arm, from 0
SEEDS = 3

V1, V2 = "DeepLab v1 (Chen et al. 2015)", "DeepLab v2 (Chen et al. 2017)"
V3 = "DeepLabv3 (Chen et al. 2017)"
PSP = "PSPNet (Zhao et al. 2017)"
FCN = "FCN (Long et al. 2015)"
DILATED = "Dilated convolutions (Yu and Koltun 2016)"
SCALE = "Attention to scale (Chen et al. 2016)"


DEGENERATE = (
    "On maps as small as these most taps of the widest rates lie in the zeros around the map, and a dilated convolution is "
    "little more than a pointwise one (what the paper describes for rates near the size of the map), so that rates matter less."
)


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
        why=DEGENERATE,
    ),
    "aspp": Finding(
        "Multi-grid, a fourth rate and image pooling under ASPP", V3, "table 5",
        "multi-grid and image pooling help, a fourth rate does not",
        {"v3_plain": 75.36, "v3_grid": 76.58, "v3_rate4": 76.46, "v3": 77.21},
        (("v3_grid", "v3_plain"), ("v3_grid", "v3_rate4"), ("v3", "v3_grid")),
        why=DEGENERATE,
    ),
    "inference": Finding(
        "Inference strategy", V3, "table 6 (table 4 alike)",
        "a smaller output stride, several scales and mirroring help, each on top of the others",
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
        {"v3_os8_eval16": 74.45, "v3": 77.21, "v3_os32_eval16": 75.90, "v3_os8": 75.62, "v3_eval8": 78.51,
         "v3_os32_eval8": 75.75},
        (("v3_eval8", "v3"), ("v3", "v3_os32_eval16"), ("v3_os8", "v3_os8_eval16"), ("v3_eval8", "v3_os8"),
         ("v3_eval8", "v3_os32_eval8")),
        why="Most things in these scenes are no larger than a few cells of the coarser maps: what training at a stride of eight "
        "learns of them outweighs the rest.",
    ),
    "alignment": Finding(
        "Aligned corners where the stride changes", V3, "the authors' code",
        "scores of every stride lie where their features do",
        {"v3_eval8": None, "v3_areas_eval8": None, "v3": None, "v3_areas": None}, (("v3_eval8", "v3_areas_eval8"),),
        differs="not a claim of the paper; a check of ours",
    ),
    "pyramid": Finding(
        "Pyramid pooling", PSP, "table 1", "pooling helps; several bins beat one; averages beat maxima; reduction helps",
        {"fcn": 37.23, "psp_one_average": 40.07, "psp_max": 40.18, "psp_average": 41.07, "psp_average_reduced": 41.68},
        (("psp_average_reduced", "fcn"), ("psp_average", "psp_one_average"), ("psp_average", "psp_max"),
         ("psp_average_reduced", "psp_average")),
        differs="without the auxiliary loss",
        why="This backbone sees the whole scene by itself, so there is little context left for pooling to add: compare the "
        "check behind a backbone that ends early. Without reduction the head is wider, and so few steps train it less.",
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
    "norm": Finding(
        "Training batch norm", V3, "table 8", "batch norm should be trained too",
        {"camvid_norm": 77.21, "camvid_frozen_norm": 75.95}, (("camvid_norm", "camvid_frozen_norm"),),
        differs="EfficientNet-Lite0 with ImageNet weights on CamVid at a quarter of its size; frozen in the head as well",
        why="Statistics that lag behind the weights are not the reason: their decay is as short as the training here. Why the "
        "frozen network learns faster in so few steps was not found.",
    ),
    "hard_classes": Finding(
        "Bootstrapping hard classes", V3, "section 4.2", "duplicating images of hard classes helps these classes",
        {"v3": None, "v3_hard_classes": None}, (("v3_hard_classes", "v3"),),
        metric=("tent", "pole"),
    ),
    "skips": Finding(
        "32s, 16s, 8s", FCN, "table 2", "each finer skip helps",
        {"fcn32s": 59.4, "fcn16s": 62.4, "fcn8s": 62.7}, (("fcn16s", "fcn32s"), ("fcn8s", "fcn16s")),
        differs="each trained at once, not from the coarser one",
    ),
    "context": Finding(
        "Basic and Large context", DILATED, "table 3", "a context module behind a finished front end helps, and Large more",
        {"front_end": 69.8, "context_basic": 71.3, "context_large": 72.1},
        (("context_basic", "front_end"), ("context_large", "context_basic")),
        differs="zeros at each layer of the Large context",
    ),
    "identity": Finding(
        "Identity against random initialisation", DILATED, "section 3", "a randomly initialised context module does not train",
        {"context_basic": None, "context_random": None}, (("context_basic", "context_random"),),
    ),
    "field_of_view": Finding(
        "Field of view of fc6", V1, "table 1", "a larger field of view helps, whether its kernel is dense or has holes",
        {"fov_4x4": 59.80, "fov_7x7": 64.38, "fov_large": 62.25}, (("fov_7x7", "fov_4x4"), ("fov_large", "fov_4x4")),
        differs="fields of view in proportion to the map, behind two stages of a ResNet; before the CRF, as there",
        why="Why LargeFOV, which alone averages the features first, learns less here in so few steps was not found.",
    ),
    "short_backbone": Finding(
        "Pyramid pooling behind a backbone that sees less", PSP, "table 1",
        "context helps more where the backbone has little of it",
        {"short_fcn": None, "short_psp": None}, (("short_psp", "short_fcn"),),
        differs="not a claim of the paper; a check of ours: the backbone ends behind its second stage",
    ),
    "schedule": Finding(
        "Poly against step", V2, "table 2", "poly trains better in equally many iterations",
        {"v2_step": 62.25, "v2_large_fov": 63.42}, (("v2_large_fov", "v2_step"),),
        differs="one step, after two thirds; AdamW",
    ),
    "aspp_large_fov": Finding(
        "ASPP against LargeFOV", V2, "table 3", "several rates beat one, large ones more",
        {"v2_large_fov": 65.76, "v2_aspp_small": 66.98, "v2_aspp_large": 68.96},
        (("v2_aspp_small", "v2_large_fov"), ("v2_aspp_large", "v2_aspp_small")),
        differs="a ResNet, with one convolution per rate",
    ),
    "scale_fusion": Finding(
        "Fusing scales", SCALE, "VOC val, scales 1 and 0.5", "two scales beat one; attention beats average and maximum",
        {"fov_large": 62.28, "scales_max": 64.81, "scales_average": 64.86, "scales_attention": 65.27},
        (("scales_max", "fov_large"), ("scales_attention", "scales_average"), ("scales_attention", "scales_max")),
        differs="two stages of a ResNet; the published scores are quoted second-hand",
        why="These heads, without batch norm, are far from trained after so few steps, and a loss more slows them: longer runs "
        "have to decide.",
    ),
    "scale_supervision": Finding(
        "Supervising each scale", SCALE, "VOC val, scales 1 and 0.5", "extra supervision helps every fusion",
        {"scales_max": 64.81, "scales_max_supervised": 67.43, "scales_average": 64.86, "scales_average_supervised": 67.79,
         "scales_attention": 65.27, "scales_attention_supervised": 68.24},
        (("scales_max_supervised", "scales_max"), ("scales_average_supervised", "scales_average"),
         ("scales_attention_supervised", "scales_attention")),
        differs="two stages of a ResNet; the published scores are quoted second-hand",
        why="These heads, without batch norm, are far from trained after so few steps, and a loss more slows them: longer runs "
        "have to decide.",
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
