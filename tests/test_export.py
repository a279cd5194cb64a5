"""Exported and traced programs: only PyTorch's operators, or cnnkern's within keep_operators; ONNX with onnxruntime."""

import copy
import io
import sys
from collections.abc import Callable

import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock

import cnnkern
from cnnkern import testing
from tests.child import run_child

pytestmark = [pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")]


class Small(nn.Module):
    """Every operator that convert and fold put into a model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.block = torchvision.models.resnet.BasicBlock(16, 16)
        self.grouped = nn.Sequential(nn.Conv2d(16, 16, 3, groups=4), nn.BatchNorm2d(16), nn.ReLU6())
        self.next = CNBlock(16, 1.0, 0.0)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.next(self.grouped(self.block(self.stem(x))))
        return self.norm(torch.relu(y + y.flip(-1)).mean((2, 3)))


def converted() -> nn.Module:
    torch.manual_seed(0)
    return cnnkern.convert(Small()).eval()


def folded() -> nn.Module:
    torch.manual_seed(0)
    return cnnkern.fold(Small().eval())


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def ours(program: torch.export.ExportedProgram) -> set[str]:
    return {name.split(".")[1] for name in operators(program) if name.startswith("cnnkern.")}


class Function(nn.Module):
    """A function of cnnkern.functional as a module, its parameters and buffers those of the arguments."""

    def __init__(self, case: testing.Case, arguments: dict) -> None:
        super().__init__()
        self.function, self.others = case.function, {}
        self.inputs = [n for n in arguments if n in ("input", "other", "residual")]
        for name, value in arguments.items():
            if name in case.mutated and value is not None:
                self.register_buffer(name, value)
            elif isinstance(value, Tensor) and name not in self.inputs:
                self.register_parameter(name, nn.Parameter(value))
            elif name not in self.inputs:
                self.others[name] = value
        self.held = [n for n, _ in [*self.named_parameters(), *self.named_buffers()]]

    def forward(self, *inputs: Tensor) -> Tensor:
        held = {n: getattr(self, n) for n in self.held}
        return self.function(**dict(zip(self.inputs, inputs, strict=True)), **held, **self.others)


CASES = [pytest.param(c, v, id=f"{c.name}-{v}") for c in testing.CASES.values() for v in c.variants]


@pytest.mark.parametrize(("case", "variant"), CASES)
def test_every_function_exports_as_pytorch_s_operators(case, variant):
    generator = torch.Generator().manual_seed(0)
    arguments = case.inputs(case.gradcheck_shapes[0], torch.float32, generator=generator, **case.variants[variant])
    model = Function(case, arguments)
    inputs = tuple(arguments[n] for n in model.inputs)
    program = torch.export.export(copy.deepcopy(model), inputs)
    assert not ours(program)
    with cnnkern.keep_operators():
        kept = torch.export.export(copy.deepcopy(model), inputs)
    name = case.name
    if name == "sync_bn":  # a program is of one process
        name = "bn_act" if arguments["residual"] is None else "bn_add_act"
    assert ours(kept) == {name}
    expected = copy.deepcopy(model)(*inputs)
    for found in (program, kept):
        torch.testing.assert_close(found.module()(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_converted_model(training, strict):
    model, x = converted().train(training), images()
    program = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
    assert not ours(program)
    with cnnkern.keep_operators():
        kept = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
    assert ours(kept) == {"bn_act", "grouped_conv2d", "layer_norm"}
    expected = model(x)  # changes the running statistics in training
    for p in (program, kept):
        found = p.module()
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)
        buffers = dict(found.named_buffers())
        assert not training or buffers.keys() == dict(model.named_buffers()).keys()
        for name, buffer in model.named_buffers():
            if name in buffers:  # in eval a strict export leaves out what counts the batches
                torch.testing.assert_close(buffers[name], buffer, rtol=1e-4, atol=1e-5)


def test_the_switch_is_over_with_its_block():
    model, x = cnnkern.nn.AddReLU(), images()
    with pytest.raises(ZeroDivisionError), cnnkern.keep_operators():
        raise ZeroDivisionError
    assert not ours(torch.export.export(model, (x, x)))


def test_inputs_that_are_not_alike_are_refused_in_an_export_too():
    with pytest.raises(Exception, match="cnnkern::add_relu"):
        torch.export.export(cnnkern.nn.AddReLU(), (images(), images()[:1]))
    with pytest.raises(Exception, match="cnnkern::add_relu"):
        torch.jit.trace(cnnkern.nn.AddReLU(), (images(), images()[:1]))


WITHOUT = """
import sys
sys.modules["cnnkern"] = None  # what Python raises ImportError for
import torch
x, expected = torch.load(sys.argv[2])
program = torch.export.load(sys.argv[1]).module() if sys.argv[1].endswith("pt2") else torch.jit.load(sys.argv[1])
with torch.no_grad():
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
print("all right")
"""


@pytest.mark.filterwarnings("ignore:.*legacy TorchScript")
@pytest.mark.parametrize("form", ["pt2", "pt"])
@pytest.mark.parametrize("make", [converted, folded])
def test_a_program_loads_where_there_is_no_cnnkern(tmp_path, make, form):
    model, x = make(), images()
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "example")
        if form == "pt2":
            batch = torch.export.Dim("batch", min=1, max=64)
            torch.export.save(
                torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}), tmp_path / "model.pt2"
            )
        else:
            torch.jit.trace(model, x).save(tmp_path / "model.pt")
    arguments = [sys.executable, "-W", "ignore", "-c", WITHOUT, str(tmp_path / f"model.{form}")]
    done = run_child([*arguments, str(tmp_path / "example")])
    assert done.stdout == "all right\n", done.stderr


def test_a_trace_keeps_our_operators_where_asked():
    model, x = converted(), images()
    with torch.no_grad():
        expected = model(x)
        assert "cnnkern::" not in str(torch.jit.trace(model, x).inlined_graph)
        with cnnkern.keep_operators():
            traced = torch.jit.trace(model, x)
        assert "cnnkern::bn_act" in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), expected)


def test_export_save_and_load_with_our_operators():
    model, x = converted(), images()
    batch = torch.export.Dim("batch", min=1, max=64)
    with cnnkern.keep_operators():
        exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert ours(loaded) == {"bn_act", "grouped_conv2d", "layer_norm"}
    with torch.no_grad():
        for n in (1, 2, 7):
            torch.testing.assert_close(loaded.module()(images(n)), model(images(n)))


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [False, True])
def test_ahead_of_time_inductor(tmp_path, keeps):
    model, x = converted(), images()
    with torch.no_grad():
        if keeps:
            with cnnkern.keep_operators():
                exported = torch.export.export(model, (x,))
        else:
            exported = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "small.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


class Zoo(nn.Module):
    """Our layers as somebody writes them, every activation among them."""

    def __init__(self) -> None:
        super().__init__()
        layers = cnnkern.nn
        self.conv = layers.GroupedConv2d(3, 12, 3, groups=3)
        self.norms = nn.Sequential(*[layers.BatchNormAct2d(12, act=a) for a in cnnkern.reference.ACTIVATIONS])
        self.added, self.add = layers.BatchNormAddReLU2d(12), layers.AddReLU()
        self.channels, self.last = layers.LayerNorm2d(12), layers.LayerNorm(10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norms(y)
        return self.last(self.channels(self.add(self.added(z, y), y)))


def written() -> nn.Module:
    torch.manual_seed(0)
    return Zoo().eval()


@pytest.mark.parametrize("make", [converted, folded, written])
def test_onnx(make: Callable[[], nn.Module]):
    """In onnxruntime, in float32, for another batch than the example's."""
    model, x = make(), images()
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes={"x": {0: "batch"}}, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}  # ONNX's own operators
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for n in (2, 5):
        (found,) = session.run(None, {session.get_inputs()[0].name: images(n).numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(images(n)), rtol=1e-4, atol=1e-5)
