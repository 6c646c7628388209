"""Training in several processes, started by torchrun: on one GPU each, or on a share of the cores.

Every process computes an equal share of each batch. The losses are divided by what counts in the whole batch, so the sum of
the gradients, and with ``distributed.sync_bn`` every statistic too, is that of one process with the whole batch.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from atrous_kernels import nn as kernels
from atrous_kernels.sync_batch_norm import SyncBatchNorm2d
from segmodels.config import Config

Logits = Callable[[Tensor], dict[str, Tensor]]

# How gloo and NCCL say that the other side is gone or silent.
_LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out|timeout|Broken pipe")


class ProcessLost(RuntimeError):
    """Another process of the training is gone, or did not answer in time."""


class Processes:
    """The processes of a training, as one of them sees them; by default this one alone.

    Args:
        rank, world: of this process; their number.
        device: where its tensors are.
        mode: ``"ddp"`` or ``"fsdp"``.
        timeout: of the group, in seconds; for the messages.
        sync_bn: batch norm takes its statistics over all processes, or over ``sharing`` neighbours.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
        mode: str = "ddp",
        timeout: float = 0.0,
        sync_bn: bool = False,
        sharing: int = 0,
    ) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.device = device or torch.device("cpu")
        self.sync_bn, self.sharing = sync_bn, sharing
        self.sharded = mode == "fsdp" and world > 1
        self._wrapped: Any = None
        self._twin: nn.Module | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    # Numbers -----------------------------------------------------------------------------------------------------------

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, which all have to ask for."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def sum(self, value: float) -> float:
        """As :meth:`total`."""
        return float(self.total(torch.tensor(value, dtype=torch.float64, device=self.device))) if self.world > 1 else value

    def largest(self, value: int | None) -> int | None:
        """The largest number that any process gives, None where all give None."""
        if self.world == 1:
            return value
        highest = torch.tensor(-1 if value is None else value, device=self.device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return None if highest < 0 else int(highest)

    def seed(self, seed: int, iteration: int) -> None:
        """Random numbers of a step (dropout) are functions of seed, iteration and rank, not of what this process drew before:
        a restarted one, or another number of processes, needs no state of the others."""
        if self.world > 1:
            torch.manual_seed(((seed * 1_000_003 + iteration) * 65_537 + self.rank) % 2**63)

    # The network -------------------------------------------------------------------------------------------------------

    def parallel(self, model: nn.Module) -> Logits:
        """``model.logits``, with the gradients of all processes averaged in its backward pass. Call it before the optimiser is
        built: with fsdp the parameters of ``model`` become shares of themselves."""
        if self.world == 1:
            return model.logits  # type: ignore[return-value]
        root = _Logits(model)
        if self.sharded:
            self._twin = copy.deepcopy(model).cpu()
        if self.sync_bn:
            limit = timedelta(seconds=self.timeout)
            synchronise_batch_norm(model, dist.new_subgroups(self.sharing, timeout=limit)[0] if self.sharing else None)
        if self.sharded:
            from torch.distributed.fsdp import fully_shard  # slow to import

            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # the framework's condition
            mesh = dist.init_device_mesh(self.device.type, (self.world,))
            for unit in (*_units(model, self.device), root):
                sharded = fully_shard(unit, mesh=mesh)
                if self.device.type == "cpu":  # gloo does not average
                    sharded.set_force_sum_reduction_for_comms(True)
            self._wrapped = root
        else:
            # Running statistics are not exchanged: in training nothing reads them, and those of rank 0 are kept.
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            # Gradients of 1x1 kernels have either layout's strides: the same memory.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
                self._wrapped = DistributedDataParallel(
                    root, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        return self._wrapped

    @contextmanager
    def exchange(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of one part of a batch: gradients are exchanged in the ``last`` one only."""
        if self.world == 1 or last:
            if self.sharded:
                self._wrapped.set_requires_gradient_sync(True)
            yield
        elif self.sharded:
            self._wrapped.set_requires_gradient_sync(False)
            yield
        else:
            with self._wrapped.no_sync():
                yield

    def whole(self, model: nn.Module) -> nn.Module:
        """The same network on every process, with rank 0's running statistics, for evaluation. With fsdp, a copy."""
        if self.world == 1:
            return model
        if isinstance(self._twin, nn.Module):
            state = self.full(model.state_dict())
            model = copy.deepcopy(self._twin)
            model.load_state_dict(state)
            model = model.to(self.device)
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        return model

    def full(self, state: Any) -> Any:
        """Tensors in dictionaries and lists, whole where they are shared out; all processes have to ask for them."""
        if not self.sharded:
            return state
        if hasattr(state, "full_tensor"):
            return state.full_tensor()
        if isinstance(state, dict):
            return {key: self.full(value) for key, value in state.items()}
        return [self.full(value) for value in state] if isinstance(state, list) else state

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Puts ``state["model"]`` and ``state["optimizer"]``, as :meth:`full` gives them, into place. Raises as the framework's
        ``load_state_dict``."""
        if self.sharded:
            own = model.state_dict()
            shares = {name: _like(own[name], value) if name in own else value for name, value in state["model"].items()}
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                index: {name: _like(parameters[index], value) for name, value in of_one.items()}
                for index, of_one in state["optimizer"]["state"].items()
            }
            state = {"model": shares, "optimizer": {**state["optimizer"], "state": moments}}
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    # Failures ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self, doing: Callable[[], str]) -> Iterator[None]:
        """Turns the errors of a lost connection into a :class:`ProcessLost` that says what was being done."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _LOST.search(str(error)):
                raise
            reason = str(error).strip().splitlines()[0]
            raise ProcessLost(
                f"{doing()}: process {self.rank} of {self.world} lost another one, which died or did not answer within "
                f"distributed.timeout={self.timeout:g} seconds: {reason}. last.pt holds the newest checkpoint; torchrun "
                "--max-restarts=N starts again from it"
            ) from error

    def check_same(self, what: str, value: int) -> None:
        """Raises ProcessLost where ``value`` is not the same number on every process."""
        if self.sum(value) != value * self.world:
            raise ProcessLost(
                f"process {self.rank} of {self.world} is at {what} {value}, others are not: expected a run.work_dir that all "
                "hosts share"
            )

    def wait(self) -> None:
        """Until all processes are here: at the end of a training, until rank 0 has written everything."""
        if self.world > 1:
            dist.barrier()


def is_first() -> bool:
    """Whether this process, of those that torchrun started or alone, is the one that prints."""
    return int(os.environ.get("RANK", 0)) == 0


def is_restart() -> bool:
    """Whether torchrun started the processes again, after one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def check_training(config: Config) -> None:
    """Raises ValueError for a batch that cannot be shared out equally, and for settings that do not go together."""
    world, settings, train = int(os.environ.get("WORLD_SIZE", 1)), config.distributed, config.train
    if world == 1:
        return
    least = world * train.accumulate
    if train.batch_size % least:
        parts = f" and {train.accumulate} parts (train.accumulate)" if train.accumulate > 1 else ""
        raise ValueError(f"train.batch_size={train.batch_size} in {world} processes{parts}: expected a multiple of {least}")
    if settings.mode == "fsdp" and train.amp == "fp16":
        raise ValueError("train.amp=fp16 with distributed.mode=fsdp: expected bf16, or distributed.mode=ddp")
    sharing = settings.sync_bn_processes
    if sharing and world % sharing:
        raise ValueError(f"distributed.sync_bn_processes={sharing} of {world} processes: expected a divisor of {world}")
    if settings.mode == "fsdp" and train.ema_decay:
        raise ValueError(f"train.ema_decay={train.ema_decay} with distributed.mode=fsdp: expected 0, or distributed.mode=ddp")
    if config.model.aux_loss and not train.aux_weight:
        raise ValueError("train.aux_weight=0 with model.aux_loss=true in several processes: expected a weight, or aux_loss=false")


def join(config: Config) -> Processes:
    """Meets the other processes that torchrun started; alone otherwise. ``run.device=cuda`` becomes this process's GPU.

    Raises:
        ValueError: more processes than GPUs.
        ProcessLost: the others did not come in time.
    """
    world, settings = int(os.environ.get("WORLD_SIZE", 1)), config.distributed
    if world == 1:
        return Processes()
    rank = int(os.environ["RANK"])
    if config.run.device == "cuda":
        config.run.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(config.run.device)
    if device.type == "cuda":
        devices = torch.cuda.device_count()
        if (device.index or 0) >= devices:
            raise ValueError(f"run.device={config.run.device!r} of process {rank}: expected at most {devices} of them on a host "
                             f"with {devices} CUDA devices")  # fmt: skip
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # by the stage before
        with Processes(rank, world, timeout=settings.timeout).watching(lambda: "at the start"):
            dist.init_process_group(backend, timeout=timedelta(seconds=settings.timeout))
    return Processes(rank, world, device, settings.mode, settings.timeout, settings.sync_bn, settings.sync_bn_processes)


def synchronise_batch_norm(model: nn.Module, group: Any = None) -> None:
    """In place: from now on every batch norm takes its statistics over all processes, or over those of ``group``."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
            module.process_group = group
        elif isinstance(module, (kernels.ConvBNReLU, kernels.ASPP)):
            module.sync, module.process_group = True, group


class _Logits(nn.Module):
    """What the framework's wrappers call is ``forward``; what training calls is ``logits``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.model.logits(images)  # type: ignore[operator]


def _like(share: Tensor, value: Any) -> Any:
    """This process's share of a whole tensor, shared out as ``share``; anything else as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

    if not (isinstance(share, DTensor) and isinstance(value, Tensor) and value.shape == share.shape):
        return value
    return distribute_tensor(value.to(share.device, share.dtype), share.device_mesh, share.placements)


@torch.no_grad()
def _units(model: nn.Module, device: torch.device) -> list[nn.Module]:
    """The parts that are gathered together: the largest modules with at most a tenth of the parameters.

    Only modules that are called count, as found out with a small image: some layers of ours are not, their op reads their
    parameters. What is in no unit is gathered for the whole step.
    """
    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.append(module))
    training = model.training
    try:
        image = torch.zeros(1, 3, 33, 33, device=device, dtype=next(model.parameters()).dtype)
        model.eval().logits(image)  # type: ignore[operator]
    finally:
        handle.remove()
        model.train(training)
    most = sum(parameter.numel() for parameter in model.parameters()) / 10
    units: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in dict.fromkeys(called):  # outer modules are called before inner ones
        size = sum(parameter.numel() for parameter in module.parameters())
        if module not in inside and 0 < size <= most and next(module.children(), None) is not None:
            units.append(module)
            inside.update(module.modules())
    return units
