"""The conformance suite: the tests that every operator of `cnnkern.testing.CASES` has to pass, on --device's
kernels."""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cnnkern
from cnnkern import testing
from cnnkern.testing import CASES, Case
from cnnkern.testing.case import Shape

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced")
# Where images are contiguous and on the CPU, under compile.
LEFT_TO_INDUCTOR = ("bn_act", "bn_add_act", "bn_prelu", "add_relu", "max_pool2d")
ROOT = Path(__file__).parent.parent
# With every layout, or each in one of them: test_instruction_sets.py asks for that.
EACH_SHAPE_ONCE = "CNNKERN_EACH_SHAPE_ONCE" in os.environ
_device = None  # the fixture of that name in conftest.py

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def over_variants(chosen: Iterable[Case]):
    rows = [pytest.param(c, v, id=f"{c.name}-{name}") for c in chosen for name, v in c.variants.items()]
    return pytest.mark.parametrize(("case", "variant"), rows)


variants = over_variants(CASES.values())
variants_with_float32_parameters = over_variants(c for c in CASES.values() if c.float32_parameters)


@pytest.fixture(autouse=True)
def _on_device(device):
    global _device
    _device = device


def shapes_of(case: Case) -> list[Shape]:
    return [shape for shape in case.shapes if math.prod(shape) <= _device.elements]


def in_layouts(shapes: Iterable[Shape]) -> Iterator[tuple[Shape, str]]:
    for i, shape in enumerate(shapes):
        for layout in (LAYOUTS[i % len(LAYOUTS)],) if EACH_SHAPE_ONCE else LAYOUTS:
            yield shape, layout


def drawn(case: Case, shape, dtype, generator, variant, layout="contiguous") -> tuple[dict, Tensor]:
    """(inputs, dy). `case.inputs` may round a shape's channels up to what its variant needs."""
    inputs = case.inputs(shape, dtype, generator=generator, **variant)
    output = testing.run(case.reference, case, inputs)["output"]
    inputs = {n: v.to(_device.tensors) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    for name, value in inputs.items():  # the input, and what is added to it: there, as a copy to a device is dense
        if isinstance(value, Tensor) and value.shape == inputs["input"].shape:
            inputs[name] = testing.with_layout(value, layout)
    return inputs, testing.randn(output.shape, generator, dtype).to(_device.tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@variants
def test_forward_and_backward_as_good_as_eager(case, variant, dtype, generator):
    for shape, layout in in_layouts(shapes_of(case)):
        inputs, dy = drawn(case, shape, dtype, generator, variant, layout)
        testing.check(case, inputs, dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
@variants_with_float32_parameters
def test_float32_parameters_beside_16_bit_input(case, variant, dtype, generator):
    for shape, layout in in_layouts(shapes_of(case)[4:9]):
        inputs, dy = drawn(case, shape, dtype, generator, {**variant, "parameter_dtype": torch.float32}, layout)
        testing.check(case, inputs, dy)


@variants
def test_gradcheck_and_gradgradcheck(case, variant, generator):
    for shape, layout in itertools.product(case.gradcheck_shapes, LAYOUTS):
        inputs, _ = drawn(case, shape, torch.float64, generator, {**variant, "smooth": True}, layout)
        names = [n for n in case.differentiable if inputs[n] is not None]

        def call(*tensors, inputs=inputs, names=names):
            fixed = {n: inputs[n].clone() for n in case.mutated if inputs[n] is not None}
            return case.function(**{**inputs, **fixed, **dict(zip(names, tensors, strict=True))})

        tensors = tuple(inputs[n].requires_grad_() for n in names)
        many = sum(t.numel() for t in tensors) > 400  # then along random directions instead of one by one
        assert torch.autograd.gradcheck(call, tensors, fast_mode=many)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=many)


@variants
def test_gradients_that_arrive_in_any_layout(case, variant, generator):
    for layout in LAYOUTS:
        inputs, dy = drawn(case, (3, 17, 6, 7), torch.float32, generator, variant, layout)
        for other in LAYOUTS:
            testing.check(case, inputs, testing.with_layout(dy, other))
        testing.check(case, inputs, dy[:1, :, :1, :1].expand(dy.shape))
        testing.check(case, inputs, dy.transpose(2, 3).contiguous().transpose(2, 3))


@variants
def test_storage_that_begins_off_a_vector(case, variant, generator):
    def shifted(t: Tensor, n: int) -> Tensor:
        return t.new_full((t.numel() + n,), float("nan")).as_strided(t.shape, t.stride(), n).copy_(t)

    shapes = case.of_its_rank((3, 16, 5, 4), (2, 6, 7, 7))
    for shape, layout, n in itertools.product(shapes, LAYOUTS[:2], (1, 2)):
        inputs, dy = drawn(case, shape, torch.float32, generator, variant, layout)
        names = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.shape == inputs["input"].shape]
        testing.check(case, inputs | {name: shifted(inputs[name], n) for name in names}, dy)  # all by the same
        testing.check(case, inputs | {"input": shifted(inputs["input"], n)}, shifted(dy, 3))
        # The gradients of parameters alone, where nothing is written that begins on a vector.
        parameters = [p for p in case.differentiable if p not in names and inputs[p] is not None]
        if parameters:
            alone = dataclasses.replace(case, differentiable=tuple(parameters))
            testing.check(alone, inputs | {name: shifted(inputs[name], n) for name in names}, dy)


@variants
def test_outputs_and_gradients_have_the_input_s_memory_format(case, variant, generator):
    shapes = case.of_its_rank((2, 5, 3, 4), (2, 5, 3, 4, 2), (2, 5, 3))
    for shape, layout in itertools.product(shapes, LAYOUTS):
        inputs, dy = drawn(case, shape, torch.float32, generator, variant, layout)
        names = [n for n in case.differentiable if inputs[n] is not None and inputs[n].shape == inputs["input"].shape]
        leaves = [inputs[n].requires_grad_() for n in names]
        y = case.function(**inputs)
        results = {"output": y, **dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))}
        if "residual" in results and inputs.get("act") == "none":
            assert results.pop("residual").stride() == dy.stride()  # it is dy, as in eager
        elif (
            "residual" in results and inputs.get("act") != "relu" and case.name in ("bn_add_act", "bn_prelu")
        ):  # eager's has the strides of dy, or of the sum
            eager = testing.run(case.reference, case, inputs, dy)["grad of residual"]
            assert results.pop("residual").stride() == eager.stride()
        for result in results.values():
            # PyTorch's batch norm on a CPU makes three dimensions contiguous.
            norm_of_three = len(shape) == 3 and "running_mean" in case.mutated
            keeps = layout == "channels_last" and case.keeps_layout and not norm_of_three
            dense = testing.with_layout(result, "channels_last" if keeps else "contiguous")
            assert result.stride() == dense.stride()


@variants
def test_empty_batch(case, variant, generator):
    for shape, layout in itertools.product(case.empty_shapes, LAYOUTS[:2]):
        inputs, dy = drawn(case, shape, torch.float32, generator, variant, layout)
        ours = testing.run(case.function, case, inputs, dy)
        eager = testing.run(case.reference, case, inputs, dy)
        assert ours.keys() == eager.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, eager[name], rtol=0, atol=0, msg=name)


@variants
def test_reruns_are_bit_equal_whatever_the_number_of_threads(case, variant, generator):
    threads = torch.get_num_threads()
    try:
        for shape, layout in itertools.product(((4, 3, 97, 101), (8, 40, 29, 31), (5, 600, 7, 7)), LAYOUTS[:2]):
            inputs, dy = drawn(case, shape, torch.float32, generator, variant, layout)
            runs = []
            for n in (threads, threads, 1, 2, 3):
                torch.set_num_threads(n)
                runs.append(testing.run(case.function, case, inputs, dy))
            for other, (name, value) in itertools.product(runs[1:], runs[0].items()):
                assert torch.equal(value, other[name]), f"{shape} {layout}: {name} differs"
    finally:
        torch.set_num_threads(threads)


@variants
def test_many_threads_on_few_and_on_many_channels(case, variant, generator):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        for shape, layout in itertools.product(((2, 1, 151, 149), (3, 7, 83, 91), (9, 129, 7, 7)), LAYOUTS[:2]):
            testing.check(case, *drawn(case, shape, torch.float32, generator, variant, layout))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck reads it of its copies
@variants
def test_opcheck(case, variant, generator):
    for layout in LAYOUTS[:2]:
        inputs, dy = drawn(case, (3, 5, 4, 4), torch.float32, generator, variant, layout)
        torch.library.opcheck(*case.forward_call(inputs))
        leaves = {n: v.requires_grad_() if n in case.differentiable and v is not None else v for n, v in inputs.items()}
        torch.library.opcheck(*case.forward_call(leaves))
        torch.library.opcheck(*case.backward_call(leaves, dy))


@variants
def test_compiles_to_one_graph_equal_to_eager(case, variant, generator):
    torch._dynamo.reset()

    def compiled(**arguments):
        # The output is used once more, so that the operator sits inside a graph and not at its end.
        return case.function(**arguments) * 1.0

    compiled = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for layout in LAYOUTS[:2]:
        inputs, dy = drawn(case, (3, 5, 4, 4), torch.float32, generator, variant, layout)
        # cnnkern.ops.compiled says which are PyTorch's own operators.
        left = case.name in LEFT_TO_INDUCTOR and layout == "contiguous" and _device.tensors == "cpu"
        plain = testing.run(case.reference if left else case.function, case, inputs, dy)
        traced = testing.run(compiled, case, inputs, dy)
        for name, value in plain.items():
            assert torch.equal(value, traced[name]), f"{name} {layout}"


@cases
def test_compiles_with_inductor(case, generator):
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True)
    inputs, dy = drawn(case, (3, 5, 4, 4), torch.float32, generator, {})
    testing.check(case, inputs, dy, function=compiled)


@variants
def test_torch_func_and_forward_mode_as_eager_has_them(case, variant, generator):
    if case.mutated:  # vmap cannot update them in training
        variant = {**variant, "running": variant.get("training", True) is False}
    inputs, dy = drawn(case, (3, 5, 4, 4), torch.float64, generator, variant)
    x = inputs.pop("input")

    def loss(function, x):
        return (function(x, **inputs) * dy).sum()

    def per_image(function, x):
        return (function(x, **inputs) * dy).flatten(1).sum(1)

    got = torch.func.grad(lambda x: loss(case.function, x))(x)
    torch.testing.assert_close(got, torch.func.grad(lambda x: loss(case.reference, x))(x))
    got = torch.func.jacrev(lambda x: per_image(case.function, x))(x)
    torch.testing.assert_close(got, torch.func.jacrev(lambda x: per_image(case.reference, x))(x))
    y, pull = torch.func.vjp(lambda x: case.function(x, **inputs), x)
    eager, eager_pull = torch.func.vjp(lambda x: case.reference(x, **inputs), x)
    torch.testing.assert_close((y, pull(dy)), (eager, eager_pull(dy)))
    stacked = torch.stack([x, 2 * x + 1])
    got = torch.func.vmap(lambda x: loss(case.function, x))(stacked)
    torch.testing.assert_close(got, torch.func.vmap(lambda x: loss(case.reference, x))(stacked))
    tangent = testing.randn(x.shape, generator, torch.float64).to(_device.tensors)
    got = torch.func.jvp(lambda x: loss(case.function, x), (x,), (tangent,))
    torch.testing.assert_close(got, torch.func.jvp(lambda x: loss(case.reference, x), (x,), (tangent,)))


@cases
def test_every_place_of_an_operator_is_filled(case):
    names = re.findall(r'm\.def\("(\w+)\(', (ROOT / "csrc" / "ops.cpp").read_text())
    named = [name for each in CASES.values() for name in each.operators]
    assert sorted(names) == sorted(named), "csrc/ops.cpp and testing.CASES name different operators"
    assert {case.name, f"{case.name}_backward"} <= set(case.operators)
    places = ["csrc/cpu/**/{}.cpp", "csrc/autograd/{}.cpp", "cnnkern/ops/{}.py"]
    places += ["triton_kernels/{}.py", "csrc/cuda/**/{}.cu", "csrc/cuda/**/{}.cuh"]
    for place in places:
        assert list(ROOT.glob(place.format(case.name))), f"{place.format(case.name)} is missing"
    for op, key in itertools.product(case.operators, ("CPU", "Meta", "Autograd")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{op}", key), f"{op} has no {key} kernel"
    assert case.function.__name__ in cnnkern.functional.__all__
    assert case.reference.__module__ == "cnnkern.reference"
