"""GPU models as numbers, for the model of launch plans (:mod:`atrous_kernels.simulate`). Nothing here is measured at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Assumed until a committed result says otherwise: of the 989 TFLOP/s and 4.8 TB/s in the data sheet of an H200, large bf16 matrix
# products reach 788 and copies 4.3, and the other models the same shares of theirs.
_REACHED_FLOPS, _REACHED_BYTES = 788 / 989, 4.3 / 4.8


@dataclass(frozen=True)
class GPU:
    """What one model can do at most. FLOP count multiplications and additions; bytes count reads and writes."""

    name: str  # as the framework gives it
    capability: tuple[int, int]
    multiprocessors: int
    clock: float  # Hz
    matrix_flops: float  # per second, bf16 and fp16 with float32 sums; TF32 has half
    scalar_flops: float  # per second, float32
    bytes_per_second: float  # of its memory
    l2_bytes_per_clock: int  # 5120 by the A100's white paper; taken to be the same for its successors
    shared_bytes: int  # that one block may have: CUDA programming guide, compute capabilities

    def flops(self, dtype: torch.dtype, precision: str = "ieee") -> float:
        """FLOP/s of matrix products; exact float32 ones run on the scalar units."""
        if dtype is not torch.float32:
            return self.matrix_flops
        return self.matrix_flops / 2 if precision == "tf32" else self.scalar_flops

    @property
    def l2_bytes_per_second(self) -> float:
        return self.l2_bytes_per_clock * self.clock


GPUS = {
    "h200": GPU("NVIDIA H200", (9, 0), 132, 1.755e9, 788e12, 67e12, 4.3e12, 5120, 227 * 1024),
    "h100": GPU(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.755e9, 989e12 * _REACHED_FLOPS, 67e12, 3.35e12 * _REACHED_BYTES, 5120, 227 * 1024
    ),
    "a100": GPU(
        "NVIDIA A100-SXM4-80GB",
        (8, 0), 108, 1.41e9, 312e12 * _REACHED_FLOPS, 19.5e12, 2.039e12 * _REACHED_BYTES, 5120, 163 * 1024,
    ),
}  # fmt: skip


def nearest_gpu(name: str, capability: tuple[int, int], multiprocessors: int) -> GPU:
    """The model of that name; else one of the same processor generation, or the first, with so many multiprocessors."""
    alike = [gpu for gpu in GPUS.values() if gpu.name == name or gpu.capability[0] == capability[0]]
    base = min(alike or GPUS.values(), key=lambda gpu: (gpu.name != name, abs(gpu.multiprocessors - multiprocessors)))
    share = multiprocessors / base.multiprocessors
    return replace(
        base,
        name=name,
        capability=capability,
        multiprocessors=multiprocessors,
        matrix_flops=base.matrix_flops * share,
        scalar_flops=base.scalar_flops * share,
    )
