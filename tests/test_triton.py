"""The Triton kernels by Triton's interpreter under guard (guarded_triton.py): the battery over testing.CASES.

They are registered as the operators on the dispatch key of the CPU, so that schema and autograd are those of a user. An
interpreted program takes about as long as a kernel of ten thousand: shapes are small, and combinations of dtype, layout
and variant are covered in pairs.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cnnkern import backends, testing
from cnnkern.testing import Case
from tests import wide_layer_norms

pytest.importorskip("triton", reason="Triton has no build for this platform")
import guarded_triton
import triton

KERNELS = Path(__file__).parent.parent / "triton_kernels"
CASES = {name: case for name, case in testing.CASES.items() if (KERNELS / f"{name}.py").exists()}
LAYOUTS = ("contiguous", "channels_last", "sliced")
DTYPES = {  # of input and of parameters
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16, float32": (torch.bfloat16, torch.float32),
    "float16, float32": (torch.float16, torch.float32),
}
MOST = 5000  # elements of an interpreted input

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
variants = pytest.mark.parametrize(
    ("case", "variant"), [pytest.param(c, v, id=f"{c.name}-{v}") for c in CASES.values() for v in c.variants]
)


@pytest.fixture(scope="module")
def kernels():
    with guarded_triton.guarded() as modules:
        yield modules


@pytest.fixture(autouse=True)
def calls(kernels):
    """Registers the kernels; the names of the operators that were called since."""
    library = torch.library.Library("cnnkern", "IMPL")
    called = []

    def counted(name, launcher):
        def call(*arguments):
            called.append(name)
            return launcher(*arguments)

        return call

    for name in CASES:
        for operator in CASES[name].operators:
            launcher = getattr(getattr(kernels, name), operator)
            library.impl(operator, counted(operator, launcher), "CPU", allow_override=True)
    yield called
    library._destroy()


def draw(case: Case, shape, dtypes="float32", layout="contiguous", variant=None, seed=0, **arguments):
    """(inputs, dy) of a variant of a case, by default its first."""
    generator = torch.Generator().manual_seed(seed)
    dtype, parameters = DTYPES[dtypes]
    arguments |= case.variants[variant or next(iter(case.variants))]
    if parameters != dtype:
        arguments["parameter_dtype"] = parameters
    inputs = case.inputs(shape, dtype, generator=generator, **arguments)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == inputs["input"].shape:
            inputs[name] = testing.with_layout(value, layout)
    dy = testing.randn(case.reference(**copied(inputs)).shape, generator, dtype)
    return inputs, testing.with_layout(dy, layout)


def copied(inputs):
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def shape_in(layout, case):
    """A program is a channel in planes and up to 64 of them in rows."""
    return (3, 17, 3, 3) if layout == "channels_last" or not case.keeps_layout else (2, 4, 5, 7)


def test_every_kernel_is_registered_and_called(calls):
    assert set(backends._TRITON_KERNELS) == CASES.keys()
    for case in CASES.values():
        inputs, dy = draw(case, (2, 3, 4, 4))
        testing.run(case.function, case, inputs, dy)
        assert calls == list(case.operators)
        calls.clear()


def dtypes_of(case):
    return list(DTYPES) if case.float32_parameters else list(DTYPES)[:4]


@variants
def test_as_good_as_eager(case, variant):
    """Every variant in float32, float64 and one of the 16-bit dtypes; those take turns, and so do the layouts."""
    turn = list(case.variants).index(variant)
    wide, narrow = dtypes_of(case)[:2], dtypes_of(case)[2:]
    for i, dtypes in enumerate((*wide, narrow[turn % len(narrow)]), start=turn):
        layout = LAYOUTS[i % 3]
        testing.check(case, *draw(case, shape_in(layout, case), dtypes, layout, variant))


@cases
def test_every_dtype_in_every_layout(case):
    for dtypes, layout in itertools.product(dtypes_of(case), LAYOUTS):
        testing.check(case, *draw(case, (2, 3, 4, 5), dtypes, layout, seed=1))


@cases
def test_ragged_shapes(case):
    for shape in case.shapes:
        if math.prod(shape) > MOST or math.prod(shape[1:2]) > 200:
            continue
        for layout in LAYOUTS[:2] if len(shape) > 1 and shape[1] <= 20 else LAYOUTS[1:2]:
            testing.check(case, *draw(case, shape, layout=layout))


@pytest.fixture
def small_tiles(kernels, monkeypatch):
    """Tiles so small that small tensors have many tiles a chunk and many chunks."""
    for name, value in SMALL_TILES.items():
        monkeypatch.setattr(kernels.layout, name, value)
    for name, value in {"K": 4, "CB": 2}.items():
        monkeypatch.setitem(kernels.layout.COMBINE, name, value)


SMALL_TILES = {"TILE": 32, "RUN": 8, "CHANNELS": 8, "PROGRAMS": 2, "MAX_CHUNK": 3}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@cases
def test_many_tiles_and_chunks(case, layout):
    for shape, dtypes in (((5, 3, 4, 9), "float32"), ((2, 8, 11, 2), "bfloat16"), ((13, 6, 2, 4), "float32")):
        testing.check(case, *draw(case, shape, dtypes, layout))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm2d"])
def test_lines_longer_than_a_tile(kernels, name, layout):
    shape = (3, 2, 4, 150) if name == "layer_norm" else (2, 150, 3, 4)
    of = kernels.lines.Lines.of
    rows, planes = of(1, 150, 24, True), of(2, 150, 12, False)
    assert not rows.whole
    assert not planes.whole
    for dtypes in ("float32", "bfloat16, float32"):
        testing.check(CASES[name], *draw(CASES[name], shape, dtypes, layout))


@pytest.mark.parametrize("tiles", [None, "small_tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm2d"])
def test_wide_layer_norms_are_those_of_the_input_in_float32(request, kernels, name, dtype, tiles):
    if tiles is not None:
        request.getfixturevalue(tiles)
    shape = (3, 2, 4, 150) if name == "layer_norm" else (2, 150, 3, 4)
    for layout in LAYOUTS if name == "layer_norm2d" else LAYOUTS[:1]:
        generator = torch.Generator().manual_seed(0)
        inputs, dy = wide_layer_norms.drawn(name, shape, dtype, generator, layout)
        wide_layer_norms.check(name, inputs, dy, getattr(kernels, name))


HARD = {
    "mean >> deviation": lambda x: 1e4 + 1e-2 * x,
    "constant": lambda x: torch.full_like(x, 0.1),
    "zero": torch.zeros_like,
    "tiny": lambda x: 1e-30 * x,
    "outlier": lambda x: torch.cat([x.flatten()[:1] * 1e6, x.flatten()[1:]]).view_as(x),
}


@pytest.mark.parametrize("tiles", [None, "small_tiles"])
@pytest.mark.parametrize("data", HARD)
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm2d"])
def test_layer_norms_of_hard_data(request, name, data, tiles):
    if tiles is not None:
        request.getfixturevalue(tiles)
    inputs, dy = draw(CASES[name], (2, 150, 2, 3) if name == "layer_norm2d" else (5, 150))
    inputs["input"] = HARD[data](inputs["input"])
    testing.check(CASES[name], inputs, dy, slack=False)


@cases
def test_gradcheck(case):
    for shape, layout in itertools.product(case.gradcheck_shapes, LAYOUTS[:2]):
        inputs, _ = draw(case, shape, "float64", layout, seed=3, smooth=True)
        names = [n for n in case.differentiable if inputs[n] is not None]

        def function(*tensors, inputs=inputs, names=names):
            state = {n: inputs[n].clone() for n in case.mutated}
            return case.function(**inputs | state | dict(zip(names, tensors, strict=True)))

        leaves = tuple(inputs[n].clone(memory_format=torch.preserve_format).requires_grad_() for n in names)
        # Entry by entry takes two calls an entry, so for the most part a random direction is checked.
        fast = leaves[0].numel() > 12 or layout == "channels_last"
        assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)


@cases
def test_gradients_arrive_in_any_layout_and_results_lie_as_eagers_do(case):
    for rank, layout in itertools.product([r for r in case.ranks if r > 1], LAYOUTS):
        inputs, dy = draw(case, (3, 6, 4, 5, 2)[:rank], layout=layout)
        inputs["input"].requires_grad_()
        y = case.function(**inputs)
        if case.name == "layer_norm2d":  # keeps the input's memory format, where eager permutes
            strides = testing.with_layout(y.detach(), layout if layout == "channels_last" else "contiguous").stride()
        else:
            strides = case.reference(**inputs).stride()
        gradients = []
        for g in (dy, *(testing.with_layout(dy, other) for other in LAYOUTS)):
            gradients.append(torch.autograd.grad(y, inputs["input"], g, retain_graph=True)[0])
        assert y.stride() == strides
        assert all(torch.equal(g, gradients[0]) for g in gradients)
        if y.shape == inputs["input"].shape:
            assert gradients[0].stride() == y.stride()
    expanded = torch.ones((), dtype=dy.dtype).expand(dy.shape)
    testing.check(case, inputs, expanded)


@cases
def test_saved_tensors_come_back_in_another_layout(case):
    for layout, other in (("channels_last", "contiguous"), ("contiguous", "channels_last")):
        inputs, dy = draw(case, (3, 6, 4, 5), layout=layout)

        def hooked(back_in=other, **arguments):
            place = lambda t: testing.with_layout(t, back_in).clone()  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, place):
                return case.function(**arguments)

        testing.check(case, inputs, dy, hooked)


@cases
def test_empty_batch(case):
    for shape in case.empty_shapes:
        inputs, dy = draw(case, shape)
        ours, eager = (testing.run(function, case, inputs, dy) for function in (case.function, case.reference))
        for name, value in ours.items():
            torch.testing.assert_close(value, eager[name], rtol=0, atol=0, msg=name)


@pytest.mark.usefixtures("small_tiles")
@cases
def test_reruns_are_bit_equal(case):
    for layout in LAYOUTS[:2]:
        inputs, dy = draw(case, (5, 6, 4, 9), layout=layout)
        first, second = (testing.run(case.function, case, inputs, dy) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@cases
def test_output_mask(case):
    """Any subset of the gradients is what it is among all of them."""
    inputs, dy = draw(case, (3, 5, 4, 4))
    operator, arguments = case.backward_call(copied(inputs), dy)
    names = [a.name for a in operator._schema.arguments]
    if "output_mask" not in names:
        return
    at = names.index("output_mask")
    everything = operator(*arguments)
    for mask in itertools.product(*((False, True) if possible else (False,) for possible in arguments[at])):
        some = operator(*arguments[:at], list(mask), *arguments[at + 1 :])
        for wanted, g, full in zip(mask, some, everything, strict=True):
            assert torch.equal(g, full) if wanted else g.numel() == 0


@cases
def test_schema_and_fake_tensors(case):
    inputs, dy = draw(case, (3, 5, 4, 4))
    checks = ("test_schema", "test_faketensor")  # the others are about autograd, not about who computes
    for layout in LAYOUTS[:2]:
        inputs, dy = draw(case, (3, 5, 4, 4), layout=layout)
        torch.library.opcheck(*case.forward_call(inputs), test_utils=checks)
        torch.library.opcheck(*case.backward_call(inputs, dy), test_utils=checks)


@cases
def test_compiles_to_one_graph_equal_to_eager(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    inputs, dy = draw(case, (2, 3, 4, 4), layout="channels_last")  # contiguous norms are left to Inductor on the CPU
    plain, traced = testing.run(case.function, case, inputs, dy), testing.run(compiled, case, inputs, dy)
    assert all(torch.equal(value, traced[name]) for name, value in plain.items())


class Timed:
    """In place of `triton.autotune`'s clock: runs what it is given, and says that so many warps were the fastest."""

    def __init__(self, monkeypatch, kernels, fastest: int) -> None:
        self.fastest, self.launches = fastest, []
        for kernel in (v for module in vars(kernels).values() for v in vars(module).values()):
            if isinstance(kernel, kernels.tuning.Tunable):
                kernel.tuners.clear()
        monkeypatch.setenv("CNNKERN_TRITON_AUTOTUNE", "1")
        monkeypatch.setattr(triton.runtime.Autotuner, "_bench", lambda *a, **k: self.bench(*a, **k))

    def bench(self, tuner, *arguments, config, **constants):
        self.launches.append(config.num_warps)
        tuner.fn.run(*arguments, **constants, **config.all_kwargs())
        return abs(config.num_warps - self.fastest)


@cases
def test_choosing_warps_by_time_changes_no_result(case, kernels, monkeypatch):
    """Every kernel is launched five times on the same arguments then: it must not read what it writes."""
    for layout in LAYOUTS[:2]:
        inputs, dy = draw(case, shape_in(layout, case), layout=layout)
        expected = testing.run(case.function, case, copied(inputs), dy)
        with monkeypatch.context() as patch:
            timed = Timed(patch, kernels, fastest=8)
            got = testing.run(case.function, case, copied(inputs), dy)
        assert set(timed.launches) == set(kernels.tuning.WARPS)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[n], expected[n]) for n in got if isinstance(got[n], Tensor))


def test_what_was_fastest_is_timed_once_for_a_choice_and_kept(kernels, monkeypatch):
    timed, run = Timed(monkeypatch, kernels, fastest=2), kernels.add_relu.add_relu
    kernel, tile = kernels.add_relu.add_relu_kernel, kernels.layout.TILE
    for numel, dtype, choices in (
        (100, torch.float32, 1),
        (tile - 1, torch.float32, 1),  # one program too
        (tile + 1, torch.float32, 2),
        (tile + 1, torch.float64, 3),
        (2 * tile, torch.float64, 3),
    ):
        x = testing.randn((numel,), torch.Generator().manual_seed(0), dtype)
        assert torch.equal(run(x, x)[0], torch.relu(2 * x))
        assert len(kernel.tuners) == choices
        assert len(timed.launches) == choices * len(kernels.tuning.WARPS)
    assert {tuner.best_config.num_warps for tuner in kernel.tuners.values()} == {2}


def test_the_key_of_a_choice_has_all_that_it_depends_on(kernels):
    kernel = kernels.lines.gradient_kernel
    assert {"UNIT", "ROWS", "P", "B"} == set(kernel.constants)
    x = torch.empty(2)
    given = dict.fromkeys(kernel.names, x) | {"UNIT": 16, "ROWS": True, "P": 4, "B": 64, "pixels": 7, "C": 64}
    key = kernel.key(8, given)
    assert key == kernel.key(15, given | {"x": torch.empty(9), "pixels": 8})  # sizes are not in it
    for change in ({"UNIT": 8}, {"ROWS": False}, {"P": 8}, {"B": 32}, {"dx": None}, {"x": x.half()}):
        assert key != kernel.key(8, given | change), change
    assert key != kernel.key(16, given)
    full = kernels.layout.PROGRAMS
    assert kernel.key(full, given) == kernel.key(100 * full, given)


def test_without_the_switch_the_rule_chooses(kernels, monkeypatch):
    monkeypatch.delenv("CNNKERN_TRITON_AUTOTUNE", raising=False)
    kernel = kernels.add_relu.add_relu_backward_kernel
    kernel.tuners.clear()
    kernels.add_relu.add_relu_backward(torch.ones(8), torch.zeros(4, dtype=torch.uint8), [0])
    assert not kernel.tuners
