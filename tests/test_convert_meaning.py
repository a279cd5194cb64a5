"""`cnnkern.convert` and `fold` with forward passes that a trace would not capture: results stay the same."""

import collections
import copy
import random
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from meanings import CASES, PATCHED, Layers, TakesATensorOrAList, X
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import cnnkern


def lively(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    model = make().double()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for value in (m.weight, m.bias, m.running_mean):
                if value is not None:
                    nn.init.normal_(value)
    return model


def outcome(model: nn.Module, inputs: tuple, modes=(True, True, False, False)) -> dict[str, torch.Tensor]:
    """Outputs, gradients and buffers of some calls."""
    found: dict[str, torch.Tensor] = {}
    for i, training in enumerate(modes):
        torch.manual_seed(i)
        random.seed(i)
        model.train(training).zero_grad()
        outputs = [t for t in torch.utils._pytree.tree_leaves(model(*inputs)) if isinstance(t, torch.Tensor)]
        found |= {f"{i} output {j}": t.detach() for j, t in enumerate(outputs)}
        if any(t.requires_grad for t in outputs):
            sum(t.square().sum() for t in outputs if t.requires_grad).backward()
        found |= {f"{i} gradient {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found |= {f"{i} buffer {n}": b.clone() for n, b in model.named_buffers()}
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", CASES)
def test_means_the_same(name):
    make, inputs = CASES[name]
    expected = outcome(lively(make), inputs)
    model = lively(make)
    before = {n: b.clone() for n, b in model.named_buffers()}
    cnnkern.conversion_report(model)
    converted = cnnkern.convert(model)
    copied = copy.deepcopy(converted)
    for n, b in model.named_buffers():  # asking, converting and copying run nothing
        assert torch.equal(b, before[n]), n
    assert_same(outcome(copied, inputs), expected)
    assert_same(outcome(converted, inputs), expected)
    assert_same(outcome(cnnkern.convert(lively(make), inplace=True), inputs), expected)
    assert_same(outcome(cnnkern.revert(cnnkern.convert(lively(make))), inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("change", [cnnkern.convert, cnnkern.fold])
def test_what_is_written_to_by_an_out_argument_is_read_before(change):
    class Model(Layers):
        def forward(self, x):
            z = self.conv(x) * 1
            y = self.bn(z)
            torch.mul(z, 3, out=z)
            return F.relu(y + x)

    model = lively(Model).eval()
    torch.testing.assert_close(change(model)(X[0]), model(X[0]))


def test_conversion_draws_no_random_number():
    for name in ("DrawsInAHelper", "ChangesATensorOfItsOwn", "ReadsATensorOfItsOwn"):
        model = CASES[name][0]()
        random.seed(5)
        torch.manual_seed(5)
        expected = random.random(), torch.rand(())
        random.seed(5)
        torch.manual_seed(5)
        cnnkern.conversion_report(model)
        assert (random.random(), torch.rand(())) == expected
        for value in vars(model).values():  # tensors that are no buffers
            assert not isinstance(value, torch.Tensor) or value.item() in (0, 3)


@pytest.mark.parametrize("name", PATCHED)
def test_a_forward_of_the_instance_is_called(name):
    """In place: a copy's is the original's, which it was made with."""
    expected = outcome(lively(PATCHED[name]), X)
    assert_same(outcome(cnnkern.convert(lively(PATCHED[name]), inplace=True), X), expected)


@pytest.mark.parametrize("name", CASES)
def test_folds_to_the_same(name):
    make, inputs = CASES[name]
    with torch.no_grad():
        expected = outcome(lively(make), inputs, modes=(False, False))
        found = outcome(cnnkern.fold(lively(make).eval()), inputs, modes=(False, False))
    for key in expected.keys() & found.keys():
        torch.testing.assert_close(
            found[key], expected[key], rtol=1e-9, atol=1e-9, msg=lambda t, key=key: f"{key}: {t}"
        )
    assert {k for k in found if "output" in k} == {k for k in expected if "output" in k}


def test_a_forward_that_takes_lists_and_tensors_is_converted_for_both():
    model = lively(TakesATensorOrAList)
    converted = cnnkern.convert(model)
    expected = model.eval()(X[0])
    for value in (X[0], list(X)):
        torch.testing.assert_close(converted.eval()(value), expected)
    assert cnnkern.conversion_report(converted).counts == {"BatchNorm + SiLU": 1, "BatchNorm": 1}


class Outputs(dict):
    pass


@pytest.mark.parametrize("container", [collections.OrderedDict, Outputs, dict])
def test_outputs_keep_their_class(container):
    class Model(Layers):
        def forward(self, x):
            return container(out=self.hidden(x))

    assert type(cnnkern.convert(Model())(X[0].float())) is container


@pytest.mark.parametrize("batch_norm", [True, False])
def test_an_addition_in_place_keeps_its_dtype(batch_norm):
    class Model(Layers):
        def forward(self, x):
            y = self.conv(x)
            if batch_norm:
                y = self.bn(y)
            y += x
            return F.relu(y)

    model, x = Model(), X[0].float()
    converted = cnnkern.convert(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert converted(x).dtype == model(x).dtype == torch.bfloat16


def test_checkpoints_save_as_little_as_before():
    def saved(model: nn.Module) -> int:
        sizes: list[int] = []

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(X[0])
        return sum(sizes)

    class Model(Layers):
        def forward(self, x):
            return checkpoint(self.hidden, x.requires_grad_(), use_reentrant=False)

    model = lively(Model)
    assert saved(cnnkern.convert(model)) <= saved(model)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4, momentum=None), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())])
def test_a_checkpointed_segment_that_ends_in_a_norm_counts_as_pytorch_s(layer):
    results = []
    for model in (layer, cnnkern.convert(copy.deepcopy(layer))):
        for i in range(3):
            x = (X[0].float() * (i + 1)).requires_grad_()
            checkpoint(model, x, use_reentrant=False).sum().backward()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def test_wrappers_of_torch_s_are_looked_through():
    model = nn.DataParallel(torchvision.models.resnet18())
    counts = cnnkern.conversion_report(model).counts
    assert counts == {"BatchNorm": 20, "MaxPool2d": 1}


def test_other_threads_run_models_and_convert_others_meanwhile():
    model, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 32, 32)
    stop, errors, counts = threading.Event(), [], []

    def serve() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    model(x)
            except Exception as error:
                errors.append(error)

    def convert() -> None:
        counts.append(cnnkern.conversion_report(torchvision.models.resnet18()).counts)

    server = threading.Thread(target=serve)
    server.start()
    converters = [threading.Thread(target=convert) for _ in range(3)]
    for thread in converters:
        thread.start()
    for thread in converters:
        thread.join()
    stop.set()
    server.join()
    assert not errors
    assert counts == 3 * [{"BatchNorm": 20, "MaxPool2d": 1}]
    assert nn.Sequential(nn.ReLU())(x).shape == x.shape  # torch.nn.Module is as it was


def test_what_happens_to_a_converted_module_is_copied():
    """A hook, and a reference to itself, that came after: a copy is of the same class and needs no new trace."""

    class Model(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.conv.register_forward_hook(self.count)

        def count(self, *_):
            self.calls += 1

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)) + x)

    converted = cnnkern.convert(lively(Model)).eval()
    converted(X[0])
    assert cnnkern.conversion_report(converted).counts["BatchNorm + add + ReLU"] == 1
    converted.features[2].register_forward_hook(lambda *_: None)
    for other in (copy.deepcopy(converted), cnnkern.revert(converted), cnnkern.convert(converted)):
        torch.testing.assert_close(other(X[0]), converted(X[0]))


def test_parametrized_since_is_an_error_of_revert():
    converted = cnnkern.convert(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)))
    torch.nn.utils.parametrizations.weight_norm(converted[0])
    with pytest.raises(TypeError, match=r"cnnkern.revert: '0' has become a Parametrized.*remove_parametrizations"):
        cnnkern.revert(converted)


def test_a_graph_module_stays_what_it_is():
    from torchvision.models.feature_extraction import create_feature_extractor

    model = create_feature_extractor(torchvision.models.resnet18(), ["layer1.0.relu", "layer4"]).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    converted = cnnkern.convert(model).eval()
    model.eval()
    for other in (converted, copy.deepcopy(converted).eval(), cnnkern.revert(converted).eval()):
        other.recompile()
        for name, value in model(x).items():
            torch.testing.assert_close(other(x)[name], value)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnext50_32x4d"])
def test_converted_models_are_traced_as_torchvision_traces_them(name):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = torchvision.models.get_model(name, weights=None).eval()
    converted = cnnkern.convert(model)
    last = get_graph_node_names(converted)[1][-1]
    x = torch.randn(1, 3, 64, 64)
    modules = [(p, m) for p, m in converted.named_modules() if not isinstance(m, nn.Identity)]
    ours = {path for path, m in modules if type(m).__module__.startswith("cnnkern")}
    called = {node.target for node in fx.symbolic_trace(converted).graph.nodes if node.op == "call_module"}
    assert ours <= called
    traced = create_feature_extractor(converted, [last])
    torch.testing.assert_close(traced(x)[last], converted(x))
