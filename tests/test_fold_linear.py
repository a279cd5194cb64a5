"""Linear layers of folded models: that they are as good as eager's, what is fused with them, and what is left alone."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import cnnkern
from cnnkern import _C, testing
from cnnkern.conversion.folding import FoldingLayer
from cnnkern.nn.folded_linear import folded_linear, prefers_own
from cnnkern.nn.onednn import dtypes
from tests.test_fold import counts, judged
from tests.test_fold_own import eager, in_nan, new_memory_is_nan

ACTIVATIONS = ["none", "relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid", "gelu", "mish", "elu"]
SIZES = [(1, 1), (3, 5), (16, 24), (33, 47), (96, 130), (17, 300)]  # inputs, outputs: whole vectors and not
SHAPES = [(), (1,), (7,), (2, 49), (2, 3, 5), (1, 2, 3, 4)]  # of the input, beside its last dimension
MODULES = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU(), "none": nn.Identity()}


def mlp(act: nn.Module | None = None, width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), act or nn.GELU(), nn.Linear(width, 8, bias=False)).eval()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_both_kernels_are_as_good_as_eager_whatever_the_shape(inputs, outputs, own):
    """Memory that nobody wrote, and that around the input, is NaN."""
    if own and _C.cpu_capability() == "DEFAULT":
        pytest.skip("without AVX2 oneDNN computes them all")
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=outputs % 2 == 0)
    bias = None if linear.bias is None else linear.bias.detach()
    folded, exact = folded_linear(linear.weight.detach(), bias, [], own), copy.deepcopy(linear).double()
    with torch.no_grad(), new_memory_is_nan():
        for i, shape in enumerate(SHAPES):
            plain = torch.randn(*shape, inputs)
            strided = torch.randn(*shape, 2 * inputs)[..., ::2].flip(0)
            for x in (in_nan(plain), strided):
                for act in ACTIVATIONS[i::4]:
                    testing.assert_as_good_as(
                        {act: folded.run(x, act)}, {act: eager(linear, x, act)}, {act: eager(exact, x.double(), act)}
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("act", MODULES)
def test_any_rank_strides_and_dtype(act, dtype):
    model = mlp(MODULES[act]).to(dtype)
    folded = cnnkern.fold(model)
    image = torch.randn(2, 8, 5, 3, dtype=dtype)
    inputs = [torch.randn(*shape, 8, dtype=dtype) for shape in SHAPES]
    inputs += [image.permute(0, 2, 3, 1), image.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)]
    inputs += [image.movedim(1, -1)[:, ::2], torch.randn(8, 4, dtype=dtype).t(), torch.randn(1, 8, dtype=dtype)[:0]]
    inputs += [torch.randn(3, 1, 8, dtype=dtype).expand(3, 4, 8), torch.randn(2, 0, 8, dtype=dtype)]
    for x in inputs:
        judged(folded, model, x)
        with torch.no_grad():
            assert folded(x).stride() == model(x).stride()
    expected = {f"Linear + {type(MODULES[act]).__name__}{'(tanh)' * (act == 'gelu_tanh')}": 1, "Linear": 1}
    if act == "none":
        expected = {"Linear": 2}
    assert dtype not in dtypes() or counts(folded) == expected


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "in place": lambda m: m.weight.mul_(2),
    "through .data": lambda m: m.weight.data.mul_(2),
    "through a view": lambda m: m.weight.detach()[0].mul_(2),
    "another tensor's data": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.ones_like(m.weight))),
    "another shape": lambda m: m.__dict__["_parameters"].update(weight=nn.Parameter(torch.ones(1, 8)), bias=None),
    "NumPy": lambda m: m.weight.detach().numpy().__imul__(2),
    "bias": lambda m: m.bias.add_(1),
    "no bias": lambda m: setattr(m, "bias", None),
    "foreach": lambda m: torch._foreach_mul_([m.weight, m.bias], 2),
    "a checkpoint": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "swap": lambda m: torch.utils.swap_tensors(m.weight, nn.Parameter(m.weight.detach() * 2)),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_folding_is_seen(name):
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU()).eval()
    folded, x = cnnkern.fold(model), torch.randn(5, 8)
    with torch.no_grad():
        for _ in range(3):
            before = folded(x)
        deferred = folded[0](x)
        expected = model[0](x)
        CHANGES[name](folded[0])
        CHANGES[name](model[0])
        torch.testing.assert_close(deferred, expected)  # of the weights that it was called with
        x = x.to(model[0].weight.dtype)
        changed = folded(x)
        torch.testing.assert_close(changed, model(x))
        assert changed.shape != before.shape or changed.dtype != before.dtype or not torch.equal(changed, before)


def test_layers_that_share_a_weight():
    model = mlp(width=8)
    model[2].weight = model[0].weight
    folded, x = cnnkern.fold(model), torch.randn(3, 8)
    assert folded[2].weight is folded[0].weight
    judged(folded, model, x)
    with torch.no_grad():
        for m in (model, folded):
            m[0].weight.mul_(2)
    judged(folded, model, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_forward_mode_derivatives(mode):
    """Through linear layers and convolutions, of the input and of the parameters; called one by one and in a run."""
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU())
    for model, x in ((mlp(), torch.randn(3, 8)), (convolutions.eval(), torch.randn(2, 3, 5, 5))):
        model.requires_grad_(False)
        folded = cnnkern.fold(model)
        with mode():
            for _ in range(3):
                deferred = folded[0](x)
                folded(x)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                mine, theirs = (forward_ad.unpack_dual(m(dual)).tangent for m in (folded, model))
                torch.testing.assert_close(mine, theirs)
                torch.testing.assert_close(folded[1](deferred), model[1](model[0](x)))
                for m in (model, folded):
                    bias = forward_ad.make_dual(m[0].bias, torch.ones_like(m[0].bias))
                    del m[0].bias
                    m[0].bias = bias
                mine, theirs = (forward_ad.unpack_dual(m(x)).tangent for m in (folded, model))
                torch.testing.assert_close(mine, theirs)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_other_classes_stay():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 3, 8)
    for layer in (Scaled(8, 4), Attends(), nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), encoder):
        model = nn.Sequential(nn.Linear(8, 8), layer).eval()
        folded = cnnkern.fold(model)
        kinds = {type(m) for m in folded[1].modules() if isinstance(m, nn.Linear) and not isinstance(m, FoldingLayer)}
        assert kinds <= {Scaled, nn.modules.linear.NonDynamicallyQuantizableLinear}
        judged(folded, model, x)
    assert isinstance(folded[1].linear1, FoldingLayer)
    assert [type(m) for m in cnnkern.revert(folded).modules()] == [type(m) for m in model.modules()]


def test_parametrizations_and_hooks_see_what_they_saw():
    model, x, seen = mlp(), torch.randn(3, 8), []
    torch.nn.utils.parametrizations.weight_norm(model[2])
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.sum()))
    folded = cnnkern.fold(model)
    judged(folded, model, x)
    assert counts(folded) == {"Linear": 1}
    replaced = mlp()
    replaced[0].register_forward_hook(lambda module, args, output: output + 1)
    judged(cnnkern.fold(replaced), replaced, x)


def test_errors_are_those_of_the_layer():
    model = mlp()
    folded = cnnkern.fold(model)
    for x in (torch.randn(3, 7), torch.randn(3, 8).double(), torch.ones(3, 8, dtype=torch.int64), torch.tensor(1.0)):
        with torch.no_grad(), pytest.raises(RuntimeError) as theirs:
            model(x)
        with torch.no_grad(), pytest.raises(RuntimeError) as ours:
            folded(x)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x = mlp(width=40), torch.randn(5, 8)
    folded, exact = cnnkern.fold(model), copy.deepcopy(model).double()
    with torch.no_grad():
        for _ in range(3):
            with torch.autocast("cpu", dtype=dtype):
                mine, theirs = folded(x), model(x)
                deferred = folded[0](x)
            assert mine.dtype == theirs.dtype == deferred.dtype == dtype
            testing.assert_as_good_as({"y": mine}, {"y": theirs}, {"y": exact(x.double())})
            testing.assert_as_good_as(
                {"y": F.gelu(deferred)},
                {"y": F.gelu(model[0].to(dtype)(x.to(dtype)))},
                {"y": F.gelu(exact[0](x.double()))},
            )
            model[0].float()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_gradients_and_programs_are_pytorchs():
    model, x = mlp(), torch.randn(3, 8)
    folded = cnnkern.fold(model)
    wanted = x.clone().requires_grad_()
    (mine,) = torch.autograd.grad(folded(wanted).square().sum(), wanted)
    (theirs,) = torch.autograd.grad(model(wanted).square().sum(), wanted)
    torch.testing.assert_close(mine, theirs)
    folded[0].bias.requires_grad_()
    (bias,) = torch.autograd.grad(folded(x).square().sum(), folded[0].bias)
    torch.testing.assert_close(bias, torch.autograd.grad(model(x).square().sum(), model[0].bias)[0])
    folded[0].bias.requires_grad_(False)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(torch.func.vmap(folded)(x), y)
        torch.testing.assert_close(torch.func.jvp(folded, (x,), (x,)), torch.func.jvp(model, (x,), (x,)))
        torch.testing.assert_close(torch.jit.trace(folded, x, check_trace=False)(x), y)
        torch.testing.assert_close(torch.compile(folded, fullgraph=True, backend="aot_eager")(x), y)
        torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), y)
        traced = torch.fx.symbolic_trace(folded)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
        torch.testing.assert_close(traced(x), y)
        other = {k: 2 * v for k, v in model.state_dict().items()}
        theirs = torch.func.functional_call(model, other, x)
        torch.testing.assert_close(torch.func.functional_call(folded, other, x), theirs)


def test_copies_pickles_and_threads():
    folded = cnnkern.fold(mlp(width=70))
    inputs = [torch.randn(n, 8) for n in (1, 2, 300, 4)]
    wrong = []
    with torch.no_grad():
        expected = [copy.deepcopy(folded)(x) for x in inputs]
        for other in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)):
            assert all(torch.equal(other(x), y) for x, y in zip(inputs, expected, strict=True))

    def work() -> None:
        with torch.no_grad():
            for _ in range(5):
                wrong.extend(x for x, y in zip(inputs, expected, strict=True) if not torch.equal(folded(x), y))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_deferred_result_may_be_used_by_another_thread_and_outlive_its_model():
    model, x = mlp(), torch.randn(3, 8)
    folded = cnnkern.fold(model)
    found = []
    with torch.no_grad():
        deferred, expected = folded[0](x), F.gelu(model[0](x))
        seen = weakref.ref(folded[0])
        del folded
        gc.collect()
        assert seen() is None

        def use() -> None:
            with torch.no_grad():
                found.append(F.gelu(deferred))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        torch.testing.assert_close(found[0], expected)


def test_nan_passes_in_our_kernel():
    model = nn.Sequential(nn.Linear(2, 40), nn.ReLU()).eval()
    with torch.no_grad():
        for value in (float("nan"), float("inf"), -float("inf")):
            x = torch.tensor([[value, 1.0]])
            mine, theirs = cnnkern.fold(model)(x), model(x)
            if prefers_own(torch.float32, 1):
                torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_the_rule():
    ours = _C.cpu_capability() != "DEFAULT"
    assert prefers_own(torch.float32, 1) == ours
    assert prefers_own(torch.float32, 2**12) == ours
    assert not prefers_own(torch.float32, 2**12 + 1)
    assert not prefers_own(torch.bfloat16, 1)
