"""What users of other libraries do to a model around its conversion: ensembles, scripts, wrappers."""

import copy
import functools
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkern

pytestmark = [pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")]
X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.grouped, self.last = nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return F.relu(self.last(self.grouped(y)) + x)


def lively(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = make().double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def same(model: nn.Module) -> nn.Module:
    return model


# ---- torch.func -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [cnnkern.convert, cnnkern.fold])
def test_an_ensemble_of_models(change):
    """Parameters and statistics are tensors of a transform, without memory."""
    results = []
    for made in (same, change):
        models = [made(lively(Block, seed).eval()) for seed in range(3)]
        parameters, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0]).eval()

        def call(own: dict, state: dict, x: Tensor, base: nn.Module = base) -> Tensor:
            return torch.func.functional_call(base, (own, state), (x,))

        results.append(torch.vmap(call, (0, 0, None))(parameters, buffers, X).detach())
        torch.testing.assert_close(results[-1][1], models[1](X).detach())
    torch.testing.assert_close(results[1], results[0])


def test_gradients_of_each_image():
    results = []
    for made in (same, cnnkern.convert):
        model = made(lively(Block).eval())
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(own: dict, x: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, own, (x[None],)).square().sum()

        results.append(torch.vmap(torch.func.grad(loss), (None, 0))(parameters, X))
    torch.testing.assert_close(results[1], results[0])


# ---- torch.jit ------------------------------------------------------------------------------------------------------


class HasAScript(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.script = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), torch.jit.script(Block())

    def forward(self, x):
        return self.script(self.first(x))


def test_a_scripted_part_is_shared():
    """torch.jit copies its tensors, whatever copy.deepcopy is told to share."""
    model = lively(HasAScript)
    twin = lively(HasAScript)
    for converted in (cnnkern.convert(model), cnnkern.revert(cnnkern.convert(model))):
        for original in (model, twin):
            original.zero_grad()
        converted(X).square().sum().backward()
        twin(X).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_a_scripted_part_of_a_folded_model():
    model = lively(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), HasAScript())).eval()
    folded = cnnkern.fold(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(X), model(X))
    before = [p.data_ptr() for p in model.parameters()]
    assert not {p.data_ptr() for p in folded.parameters()} & set(before)


REFUSED = r"torch.jit.script cannot compile \w+; script cnnkern.revert\(model\)"
LAYERS = [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2), nn.LayerNorm(6), nn.MaxPool2d(2)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_converted_layer_cannot_be_scripted(layer):
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    converted = cnnkern.convert(model)
    with pytest.raises(TypeError, match=REFUSED):
        torch.jit.script(converted)
    x = X.float()
    torch.testing.assert_close(torch.jit.script(cnnkern.revert(converted))(x), converted(x))
    torch.testing.assert_close(torch.jit.trace(converted, x)(x), converted(x))


def test_a_folded_model_cannot_be_scripted():
    folded = cnnkern.fold(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval())
    with pytest.raises(TypeError, match=REFUSED):
        torch.jit.script(folded)


# ---- wrappers -------------------------------------------------------------------------------------------------------


def wrap(model: nn.Module) -> None:
    """As accelerate's hooks do."""
    for module in model.modules():
        module._old_forward = module.forward
        module.forward = functools.partial(lambda m, *args: m._old_forward(*args), module)


def unwrap(model: nn.Module) -> None:
    for module in model.modules():
        module.forward = module._old_forward
        del module._old_forward


@pytest.mark.parametrize("when", ["before", "after"])
def test_wrapped_forwards_run_after_it_is_reverted(when):
    """They call the method that the layer had when it was wrapped."""
    model, twin = lively(Block), lively(Block)
    if when == "before":
        wrap(model)
    model = cnnkern.convert(model, inplace=True)
    if when == "after":
        wrap(model)
    for _ in range(2):
        torch.testing.assert_close(model(X), twin(X))
    cnnkern.revert(model, inplace=True)
    torch.testing.assert_close(model(X), twin(X))
    unwrap(model)
    torch.testing.assert_close(model(X), twin(X))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


# ---- what is fused --------------------------------------------------------------------------------------------------


def test_a_sum_that_is_kept_is_computed_with_its_batch_norm():
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            total = self.a(x) + self.b(x)
            return torch.cat([F.relu(total), total], 1)

    model, twin = cnnkern.convert(lively(Cell)), lively(Cell)
    for calls in (1, 2, 3):
        torch.testing.assert_close(model(X), twin(X))
        assert model.a._cnnkern_site.fusions() == {"add": calls, "add + relu": 0}
    assert cnnkern.conversion_report(model).counts == {"BatchNorm + add": 1, "BatchNorm": 1}


# ---- other layers ---------------------------------------------------------------------------------------------------


def test_pytorchs_synchronised_batch_norms_stay():
    """The report says what to do instead. They run as before, between layers that are converted."""
    results = []
    for made in (same, cnnkern.convert):
        model = made(nn.SyncBatchNorm.convert_sync_batchnorm(lively(Block)))
        assert type(model.bn) is nn.SyncBatchNorm
        for _ in range(2):
            model(X).square().sum().backward()
        results.append({"eval": model.eval()(X).detach(), **model.state_dict()})
        results[-1] |= {name: p.grad for name, p in model.named_parameters(prefix="gradient")}
    torch.testing.assert_close(results[1], results[0])
    report = str(cnnkern.conversion_report(model))
    assert "bn       not converted (convert the model first, then call cnnkern.nn.convert_sync_batchnorm)" in report
    assert cnnkern.conversion_report(model).counts == {"not converted": 2, "GroupedConv2d": 1}


def test_the_report_of_a_model_that_was_changed_since():
    model = cnnkern.convert(lively(Block))
    model.last = nn.GroupNorm(2, 4).double()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    del model.grouped
    report = str(cnnkern.conversion_report(model))
    assert "bn       not converted (has become a SyncBatchNorm since)" in report
    assert "last     not converted (has become a GroupNorm since)" in report
    assert "grouped  not converted (no longer in the model)" in report
    torch.testing.assert_close(cnnkern.revert(model).state_dict(), model.state_dict())


# ---- threads --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_statistics_that_another_thread_trains_before_the_result_is_used():
    norm = cnnkern.convert(lively(lambda: nn.BatchNorm2d(4))).eval()
    trained = copy.copy(norm).train()  # with the same statistics
    y = norm(X)

    def train() -> None:
        with torch.no_grad():
            F.relu(trained(X))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match=r"a running statistic .* was changed .* by another thread"):
        F.relu(y)


def test_a_bias_may_change_before_the_gradient_where_a_hook_sees_the_batch_norms():
    """PyTorch's batch norm does not save its bias, so an optimizer may change it between forward and backward pass."""
    torch.manual_seed(0)
    grads = []
    for convert in (False, True):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(3)
        model = cnnkern.convert(norm) if convert else norm
        for _ in range(2):
            y = model(torch.randn(4, 3, 5, 5).requires_grad_())
            y.register_hook(lambda g: g)
            z = y.relu()
            with torch.no_grad():
                model.bias.add_(0.1)
            model.zero_grad()
            (z * torch.randn(4, 3, 5, 5)).sum().backward()
        grads.append(model.weight.grad)
    torch.testing.assert_close(*grads)
