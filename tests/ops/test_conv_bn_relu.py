"""conv_bn_relu: every backend that this machine can run, against the framework's composition in float64."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.ops import batch_norm_act as op
from tests.repeats import assert_same_bits_for_threads, built_isas, repeat_capped

BACKENDS = ("auto", "cpu", "torch", "reference")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "none": lambda y: y}

# Of the root mean square of the result. fp32: sums of at most a few thousand rounded terms. bf16: the convolution's output is
# rounded to 8 bits, which moves some values across the activation's edge: their gradients change as a whole, and with one
# channel there is little else to sum.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.25}

PROBLEMS: dict[str, dict[str, Any]] = {
    "rate 2": dict(x=(3, 5, 9, 7), o=37, k=3, padding=2, dilation=2),
    "1x1": dict(x=(2, 40, 6, 5), o=70, k=1),
    "strided groups": dict(x=(2, 6, 11, 12), o=4, k=3, stride=2, padding=1, groups=2),
    "one channel": dict(x=(2, 3, 13, 17), o=1, k=3, padding=1),
    "one pixel": dict(x=(5, 8, 1, 1), o=35, k=1),
    "several pieces": dict(x=(2, 4, 131, 140), o=9, k=1),
    "planes of several pieces": dict(x=(1, 3, 190, 200), o=2, k=1),
}


def _skip_unless_runnable(backend: str) -> None:
    if backend == "cpu" and native.cpu_missing():
        pytest.skip(str(native.cpu_missing()))


def _tensors(problem: dict[str, Any], dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Input, weight, bn_weight, bn_bias; running mean and variance."""
    c, o, k, groups = problem["x"][1], problem["o"], problem["k"], problem.get("groups", 1)
    generator = torch.Generator().manual_seed(0)

    def make(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x, w = make(*problem["x"]), make(o, c // groups, k, k) * (c * k * k // groups) ** -0.5 + 0.1
    norm = [make(o).abs() + 0.5, make(o), make(o), make(o).abs() + 0.5]
    return [x.contiguous(memory_format=LAYOUTS[layout]), w, *norm]


def _geometry(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: problem.get(name, 0 if name == "padding" else 1) for name in ("stride", "padding", "dilation", "groups")}


def _theirs(
    x: Tensor, w: Tensor, g: Any, b: Any, m: Any, v: Any, *, training: bool, activation: str, geometry: dict[str, Any]
) -> Tensor:
    return ACTIVATIONS[activation](F.batch_norm(F.conv2d(x, w, None, **geometry), m, v, g, b, training))


def _run(call: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Output, four gradients and the running statistics after the call."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors[:4]]
    running = [t.clone() for t in tensors[4:]]
    out = call(*leaves, *running)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.contiguous()), *running]


def _error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).square().mean() / truth.square().mean().clamp(min=1e-30)).sqrt().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_against_float64(
    name: str, dtype: torch.dtype, activation: str, training: bool, backend: str, poison: None
) -> None:
    _skip_unless_runnable(backend)
    problem = PROBLEMS[name]
    options = dict(training=training, activation=activation)
    for layout in LAYOUTS:
        tensors = _tensors(problem, dtype, layout)
        ours = _run(lambda *a: ak.conv_bn_relu(*a, **options, **_geometry(problem), backend=backend), tensors)
        truth = _run(lambda *a: _theirs(*a, **options, geometry=_geometry(problem)), [t.double() for t in tensors])
        for what, a, b in zip(("out", "x", "w", "bn w", "bn b", "mean", "var"), ours, truth, strict=True):
            assert a.dtype == dtype
            # In training the sums over a batch cancel in the gradient of input and weight: a few terms more of error.
            assert _error(a, b) < TOLERANCE[dtype] * (10 if what in ("x", "w") and dtype != torch.bfloat16 else 1), what
        if not training:
            with torch.no_grad():
                plain = ak.conv_bn_relu(*tensors, **options, **_geometry(problem), backend=backend)
            assert _error(plain, truth[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_without_affine_part_and_statistics(training: bool, backend: str) -> None:
    _skip_unless_runnable(backend)
    problem = PROBLEMS["rate 2"]
    x, w, _, _, m, v = _tensors(problem, torch.float32, "nhwc")
    arguments = (None, None, None, None) if training else (None, None, m, v)
    x, w = x.requires_grad_(), w.requires_grad_()
    ours = ak.conv_bn_relu(x, w, *arguments, training=training, **_geometry(problem), backend=backend)
    theirs = _theirs(x, w, *arguments, training=training, activation="relu", geometry=_geometry(problem))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, (x, w), upstream), torch.autograd.grad(theirs, (x, w), upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_parameters_beside_bfloat16(backend: str) -> None:
    """What autocast makes: the convolution in 16 bits, the normalisation's parameters not."""
    _skip_unless_runnable(backend)
    x, w, *norm = _tensors(PROBLEMS["rate 2"], torch.float32, "nhwc")
    truth = _theirs(x, w, *(t.clone() for t in norm), training=True, activation="relu", geometry=_geometry(PROBLEMS["rate 2"]))
    for t in norm[:2]:
        t.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ak.conv_bn_relu(x, w, *norm, training=True, **_geometry(PROBLEMS["rate 2"]), backend=backend)
    assert out.dtype is torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), norm[:2])
    assert all(g.dtype is torch.float32 for g in grads)
    assert _error(out.detach(), truth.double()) < 0.02


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_a_mean_far_from_zero(backend: str) -> None:
    """Variance 1 around 1000: squares summed without their mean would lose it in float32."""
    _skip_unless_runnable(backend)
    x = torch.randn(4, 8, 40, 40, dtype=torch.float64) + 1000
    w = torch.eye(8, dtype=torch.float64)[:, :, None, None]
    truth = _theirs(x.float().double(), w, None, None, None, None, training=True, activation="none", geometry={})
    for layout in LAYOUTS.values():
        arguments = (x.float().contiguous(memory_format=layout), w.float(), None, None, None, None)
        ours = ak.conv_bn_relu(*arguments, training=True, activation="none", backend=backend)
        # One unit in the last place of 1000 is 6e-5; the mean itself may be off by one.
        assert (ours.double() - truth).abs().max() < 2e-4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_both_orders(training: bool, activation: str, backend: str) -> None:
    _skip_unless_runnable(backend)
    problem = dict(x=(2, 2, 4, 3), o=3, k=3, padding=2, dilation=2)
    *leaves, mean, var = _tensors(problem, torch.float64, "nchw")
    leaves = [t.requires_grad_() for t in leaves]

    def call(*leaves: Tensor) -> Tensor:
        options = dict(training=training, activation=activation, backend=backend, **_geometry(problem))
        return ak.conv_bn_relu(*leaves, mean.clone(), var.clone(), **options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    _skip_unless_runnable(backend)
    for layout in LAYOUTS.values():
        x = torch.randn(2, 5, 4, 3).contiguous(memory_format=layout).requires_grad_()
        w, b = torch.rand(5).requires_grad_(), torch.rand(5).requires_grad_()
        torch.library.opcheck(op.batch_norm_act_train, (x, w, b, 1e-5, "relu6", backend))
        torch.library.opcheck(op.batch_norm_act_train, (x, None, None, 1e-5, "none", backend))
        _, mean, moment = op.batch_norm_act_train(x.detach(), w, b, 1e-5, "relu", backend)
        plain = [t.detach() for t in (x, x, w, b, mean, moment)]
        torch.library.opcheck(torch.ops.atrous.batch_norm_act_train_backward.default, (*plain, 1e-5, "relu", backend))
        torch.library.opcheck(op.batch_norm_act_, (x.detach(), mean, *plain[2:4], "relu", backend))


def test_an_empty_batch_leaves_the_statistics() -> None:
    x, w = torch.zeros(0, 3, 8, 8, requires_grad=True), torch.ones(4, 3, 3, 3, requires_grad=True)
    for backend in ("auto", "reference"):
        mean, var = torch.zeros(4), torch.ones(4)
        out = ak.conv_bn_relu(x, w, None, None, mean, var, training=True, backend=backend)
        assert out.shape == (0, 4, 6, 6)
        gx, gw = torch.autograd.grad(out.sum(), (x, w))
        assert gx.shape == x.shape
        assert gw.abs().sum() == 0
        assert (mean.abs().sum(), var.sum()) == (0, 4)
        assert ak.conv_bn_relu(x, w, None, None, mean, var, backend=backend).shape == (0, 4, 6, 6)


def test_input_of_any_strides() -> None:
    x = torch.randn(2, 6, 10, 9)[:, ::2, :, ::2]
    w, mean, var = torch.randn(4, 3, 3, 3), torch.zeros(4), torch.ones(4)
    for training in (True, False):
        args = (w, torch.rand(8)[::2], None, mean.clone(), var.clone())
        a = ak.conv_bn_relu(x, *args, training=training)
        b = ak.conv_bn_relu(x.contiguous(), *args[:3], mean.clone(), var.clone(), training=training)
        torch.testing.assert_close(a, b)


def test_not_a_number_stays_one() -> None:
    x, w = torch.zeros(2, 1, 3, 3), torch.ones(1, 1, 1, 1)
    x[0, 0, 0, 0] = torch.nan
    out = ak.conv_bn_relu(x, w, None, None, torch.zeros(1), torch.ones(1))
    assert out.isnan().sum() == 1
    assert ak.conv_bn_relu(x, w, None, None, None, None, training=True).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_thread_counts_give_the_same_bits(layout: str) -> None:
    if native.cpu_missing():
        pytest.skip(str(native.cpu_missing()))
    tensors = _tensors(dict(x=(3, 16, 45, 47), o=65, k=3, padding=2, dilation=2), torch.float32, layout)
    call = partial(ak.conv_bn_relu, training=True, padding=2, dilation=2, backend="cpu")
    assert_same_bits_for_threads(lambda: _run(call, tensors))


def test_neither_activation_nor_mask_is_kept() -> None:
    """Beside the input and the weights the graph holds the convolution's output alone."""
    x, w = torch.randn(2, 8, 16, 16, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = ak.conv_bn_relu(x, w, None, None, None, None, training=True, padding=1, backend="reference")
    large = [p for p, numel in saved.items() if numel == out.numel()]
    assert len(large) == 2  # x and the convolution's output have the same size here
    assert out.untyped_storage().data_ptr() not in large


class _Small(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            ak.nn.ConvBNReLU(3, 8, 3, padding=2, dilation=2),
            ak.nn.ConvBNReLU(8, 4, 1, activation="none"),
            ak.nn.ConvBNReLU(4, 4, 3, stride=2, activation="relu6", eps=1e-3, momentum=0.2),
        )


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training: bool) -> None:
    torch._dynamo.reset()
    model = _Small().train(training)
    twin = _Small().train(training)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for grad in (True, False):
        x = torch.randn(2, 3, 9, 9)
        with torch.set_grad_enabled(grad):
            a, b = compiled(x), twin(x)
        torch.testing.assert_close(a, b)
        if grad:
            a.sum().backward()
            b.sum().backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q)


def test_exports() -> None:
    model, x = _Small().eval(), torch.randn(2, 3, 9, 9)
    program = torch.export.export(model, (x,))
    assert "atrous.conv2d" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_module_is_a_drop_in_for_the_sequence(activation: str, momentum: float | None) -> None:
    torch.manual_seed(1)
    ours = ak.nn.ConvBNReLU(4, 6, 3, padding="same", dilation=2, activation=activation, momentum=momentum, eps=1e-3)
    torch.manual_seed(1)
    layers = [torch.nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False)]
    layers += [torch.nn.BatchNorm2d(6, eps=1e-3, momentum=momentum), torch.nn.ReLU()]
    theirs = torch.nn.Sequential(*layers)
    if activation != "relu":
        theirs[2] = torch.nn.ReLU6() if activation == "relu6" else torch.nn.Identity()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for _ in range(3):
        x = torch.randn(2, 4, 9, 8)
        torch.testing.assert_close(ours(x), theirs(x))
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_explain() -> None:
    x, w = torch.empty(2, 16, 33, 33), torch.empty(8, 16, 3, 3)
    explanation = ak.explain("conv_bn_relu", x, w, training=True, padding=1)
    assert [c.name for c in explanation.choices] == ["cpu", "triton", "torch", "reference"]
    assert "batch norm (training), relu" in str(explanation)
    assert "4 passes over 0.0697 MB" in str(explanation)
    assert ak.explain("conv_bn_relu", x, w, backend="reference").chosen == "reference"
    half = ak.explain("conv_bn_relu", x.half(), w.half())
    assert half.chosen == "torch"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(bn_weight=torch.ones(5)), ValueError, r"bn_weight: expected 6 values, one per output channel, but got \[5\]"),
        (dict(running_var=torch.ones(6, 1)), ValueError, r"running_var: expected 6 values"),
        (dict(running_mean=None, running_var=None), ValueError, "expected tensors when training=False, but got None"),
        (dict(running_mean=None, training=True), ValueError, "expected both or neither"),
        (dict(activation="gelu"), ValueError, "activation='gelu': expected one of relu, relu6, none"),
        (dict(input=torch.zeros(4, 8, 8)), RuntimeError, r"expected input \[N, C, H, W\].*\[4, 8, 8\]"),
        (dict(input=torch.zeros(1, 5, 8, 8)), RuntimeError, "to have 4 channels, but got 5 channels"),
        (dict(input=torch.zeros(1, 4, 3, 3), training=True), ValueError, "expected more than 1 value per channel"),
        (dict(backend="nope"), ValueError, "unknown backend 'nope': expected one of auto, cpu, triton, torch, reference"),
        (dict(backend="cuda"), ValueError, "unknown backend 'cuda'"),
    ],
)
def test_mistakes_name_the_value(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(
        input=torch.zeros(1, 4, 8, 8), weight=torch.zeros(6, 4, 3, 3), bn_weight=torch.ones(6), bn_bias=torch.zeros(6),
        running_mean=torch.zeros(6), running_var=torch.ones(6),
    )  # fmt: skip
    with pytest.raises(error, match=message):
        ak.conv_bn_relu(**(arguments | changes))
    with ak.backend("torch"):
        assert ak.conv_bn_relu(**arguments).shape == (1, 6, 6, 6)


def test_native_passes_check_their_arguments() -> None:
    if native.cpu_missing():
        pytest.skip(str(native.cpu_missing()))
    x, one = torch.zeros(2, 4, 3, 3), torch.ones(4)
    apply = torch.ops.atrous_native.batch_norm_act
    with pytest.raises(RuntimeError, match="mean: expected 4 contiguous values"):
        apply(x, torch.ones(3), one, one, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="scale: expected 4 contiguous values"):
        apply(x, one, one.double(), one, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="input: expected dense NCHW or NHWC memory"):
        apply(x[:, :, ::2], one, one, one, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="grad: expected the memory layout of input"):
        torch.ops.atrous_native.batch_norm_act_sums(x.contiguous(memory_format=torch.channels_last), x, one, one, one, 0.0, 1.0)


_WORKER = """
import sys
import torch
import torch.distributed as dist
import atrous_kernels as ak
from atrous_kernels.sync_batch_norm import SyncBatchNorm2d
rank, where, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{where}/store", rank=rank, world_size=2)
torch.manual_seed(0)
layer = ak.nn.ConvBNReLU(3, 5, 3, padding=1, sync=True, backend=backend)
x, g = torch.randn(5, 3, 7, 6), torch.randn(5, 5, 7, 6)
part = slice(0, 3) if rank == 0 else slice(3, 5)  # unequal shares
x, g = x[part].requires_grad_(), g[part]
out = layer(x)
grads = torch.autograd.grad(out, (x, *layer.parameters()), g, retain_graph=True)
torch.save([out.detach(), *grads, layer[1].running_mean, layer[1].running_var], f"{where}/{rank}.pt")
norm = torch.nn.BatchNorm2d(3)
norm.__class__ = SyncBatchNorm2d
torch.save([norm(x).detach(), norm.running_mean, norm.running_var, norm.num_batches_tracked], f"{where}/norm{rank}.pt")
try:
    torch.autograd.grad(layer(x).sum(), x, create_graph=True)
except NotImplementedError as error:
    assert "differentiable once" in str(error), error
else:
    raise AssertionError("differentiated twice")
dist.destroy_process_group()
try:
    torch.autograd.grad(out, x, g)
except RuntimeError as error:
    assert "was destroyed" in str(error), error
else:
    raise AssertionError("reached a group that is gone")
# The graph of `out` outlives the group: leaving now must not abort.
"""


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_two_processes_are_one_batch(backend: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path), backend], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.manual_seed(0)
    layer = ak.nn.ConvBNReLU(3, 5, 3, padding=1, backend=backend)
    x, g = torch.randn(5, 3, 7, 6).requires_grad_(), torch.randn(5, 5, 7, 6)
    out = layer(x)
    truth = [out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), g)]
    for index, expected in enumerate(truth):
        # Outputs and input gradients are shared out; parameter gradients are summed, as data parallel training does.
        got = torch.cat([first[index], second[index]]) if index < 2 else first[index] + second[index]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for index, name in enumerate(("running_mean", "running_var"), start=len(truth)):
        assert torch.equal(first[index], second[index])
        torch.testing.assert_close(first[index], getattr(layer[1], name))
    norm, (first, second) = torch.nn.BatchNorm2d(3), (torch.load(tmp_path / f"norm{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(torch.cat([first[0], second[0]]), norm(x.detach()))
    torch.testing.assert_close(first[1:], [norm.running_mean, norm.running_var, norm.num_batches_tracked])


@pytest.mark.parametrize("isa", built_isas())
def test_every_instruction_set(isa: str) -> None:
    """Part of this module again, capped and with poisoned memory."""
    done = repeat_capped(isa, "(against_float64 and cpu) or far_from_zero or thread_counts", __file__)
    assert done.returncode == 0, done.stdout


# With a residual --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_residual_has_gradients(training: bool) -> None:
    x, w = torch.randn(2, 3, 6, 5).double().requires_grad_(), torch.randn(4, 3, 3, 3).double().requires_grad_()
    residual = torch.randn(2, 4, 6, 5).double().requires_grad_()
    norm = [torch.rand(4).double() + 0.5 for _ in range(4)]

    def call(x, w, residual):
        mean, var = norm[2].clone(), norm[3].clone()
        return ak.conv_bn_relu(x, w, norm[0], norm[1], mean, var, padding=1, training=training, residual=residual)

    expected = F.batch_norm(F.conv2d(x, w, padding=1), norm[2].clone(), norm[3].clone(), norm[0], norm[1], training) + residual
    torch.testing.assert_close(call(x, w, residual), expected.relu())
    assert torch.autograd.gradcheck(call, (x, w, residual))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_training_adds_the_residual_in_its_pass(dtype, layout: str, activation: str, poison) -> None:
    x, w, *norm = _tensors(PROBLEMS["several pieces"], dtype, layout)
    residual = torch.randn(x.shape[0], w.shape[0], *x.shape[2:], dtype=dtype)  # of the other layout in half of the cases
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, *norm[:2], residual)]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def call(x, w, g, b, residual):
        running = (t.clone() for t in norm[2:])
        return ak.conv_bn_relu(x, w, g, b, *running, training=True, activation=activation, residual=residual)

    out, truth = call(*leaves), ACTIVATIONS[activation](F.batch_norm(F.conv2d(*wide[:2]), None, None, *wide[2:4], True) + wide[4])
    upstream = torch.randn(out.shape, dtype=dtype)
    pairs = zip(torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(truth, wide, upstream.double()), strict=True)
    for ours, theirs in [(out.detach(), truth.detach()), *pairs]:
        assert ours.dtype is dtype
        assert _error(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_twice(activation: str) -> None:
    x, residual = (torch.randn(2, 3, 3, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    w, g = torch.rand(3, dtype=torch.float64).requires_grad_(), torch.rand(3, dtype=torch.float64).requires_grad_()

    backend = "reference" if native.cpu_missing() else "cpu"

    def train(x, w, g, residual):
        return op.batch_norm_act_train(x, w, g, 1e-5, activation, backend, None, None, residual)[0]

    assert torch.autograd.gradgradcheck(train, (x, w, g, residual))
    torch.library.opcheck(op.batch_norm_act_train, (x, w, g, 1e-5, activation, "reference", None, None, residual))
