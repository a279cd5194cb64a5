"""The zoo's results against its unfused twins and torchvision.

`make test` compares the models of TESTED with their twins and with torchvision, `make prove` every one but for GIANTS:
`CNNKERN_ALL_MODELS=1 pytest tests/test_models.py` those too, in 20 GB of memory and 25 on disk.
"""

import itertools
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from cnnkern import models, testing
from cnnkern.models import create_model, get_builder, list_models
from tests.slow import proved
from tests.zoo import TORCHVISION


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    """In float64: all that two orders of rounding may change. A gradient that is zero in exact arithmetic, as of a
    bias before a batch norm, is judged by the largest of the others. Integers, which count the batches, are equal.
    """
    assert ours.keys() == theirs.keys()
    scale = max(t.abs().max().item() for t in theirs.values() if t.is_floating_point())
    for name, expected in theirs.items():
        if not expected.is_floating_point():
            assert torch.equal(ours[name], expected), f"{what}: {name} is {ours[name]}, not {expected}"
            continue
        error = (ours[name] - expected).abs().max().item()
        allowed = 1e-8 * expected.abs().max().item() + 1e-12 * scale
        assert error <= allowed, f"{what}: {name} differs by {error:.2e}, allowed {allowed:.2e}"


def run(model: nn.Module, x: Tensor, target: Tensor, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Logits, gradients and buffers in training, logits in eval; dropout draws from `seed`."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    logits = model.train()(x)
    F.cross_entropy(logits, target).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()} | {"input": x.grad}
    model.zero_grad(set_to_none=True)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        found = {"logits": {"train": logits.detach(), "eval": model.eval()(x)}, "gradients": gradients}
    return found | ({"buffers": buffers} if buffers else {})


def sgd(model: nn.Module, x: Tensor, target: Tensor, lr: float, steps: int = 5) -> dict[str, Tensor]:
    """State after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for i in range(steps):
        torch.manual_seed(i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model.state_dict()


def calm_rate(model: nn.Module, gradients: dict[str, Tensor], share: float) -> float:
    """A learning rate at which a step moves the weights by this share of their norm. With a larger one, or images of
    which the last batch norms see one pixel, rounding grows by orders of magnitude from step to step. A thousandth
    suits the networks of QUICK; with it the difference came, by way of a ReLU's kink, to 1e-4 in regnet_y_1_6gf, and
    with a ten-thousandth to 2e-9 in resnet101.
    """
    weights = [p.detach().norm() for p in model.parameters()]
    steps = [gradients[n].norm() for n, _ in model.named_parameters()]
    return share * (torch.stack(weights).norm() / torch.stack(steps).norm()).item()


# One of each family, and side of the images.
QUICK = {
    "lenet": 28,
    "lenet5_tanh": 28,
    "lenet_relu": 28,
    "lenet_wide": 28,
    "alexnet": 224,
    "vgg11_bn": 32,
    "bn_lenet": 28,
    "bn_lenet_residual": 32,
    "res_lenet": 32,
    "simple_resnet": 12,
    "nin": 67,
    "googlenet": 32,
    "resnet18": 32,
    "resnext50_32x4d": 64,
    "preact_resnet18": 32,
    "densenet121": 64,
    "densenet_small": 32,
    "regnet_x_tiny": 32,
    "regnet_y_400mf": 64,
    "mobilenet_v2": 64,
    "shufflenet_v2_x1_0": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 32,
}
ALL = os.environ.get("CNNKERN_ALL_MODELS") == "1"
# In double precision, with gradients and momentum, one twin of these fills the memory.
GIANTS = {"regnet_x_32gf", "regnet_y_32gf", "regnet_y_128gf"}
# Of these and of more than fifty million weights results wait on disk.
LARGE = GIANTS | {"regnet_x_16gf", "regnet_y_16gf", "resnet152", "resnext101_32x8d", "resnext101_64x4d"}
# resnet152 needs more than 64 pixels for rounding not to grow over its depth; the other sides are small, for the larger
# models have more layers and no other kinds.
SIDES = {"resnet152": 128}
COMPARED = {n: QUICK.get(n, SIDES.get(n, 64)) for n in list_models() if ALL or n not in GIANTS}
# One of each kind that takes no more than three seconds.
TESTED = set(QUICK) - {"resnext50_32x4d", "convnext_tiny", "efficientnet_b0", "mobilenet_v2", "vgg11_bn", "densenet121"}


def narrow(name: str) -> dict[str, float]:
    """Arguments that spare the many weights of the fully connected layers."""
    return {"width_mult": 0.125} if name.startswith(("vgg", "alexnet")) else {}


def batch(name: str, size: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return testing.randn((4, get_builder(name).input_size[0], size, size), g, dtype), torch.tensor([1, 0, 3, 2])


def pair(name: str, dtype=torch.float64, **arguments) -> tuple[nn.Module, nn.Module]:
    """A fused model and its unfused twin with one state dict."""
    torch.manual_seed(0)
    unfused = create_model(name, fused=False, num_classes=10, **arguments)
    fused = create_model(name, num_classes=10, **arguments)
    fused.load_state_dict(unfused.state_dict())
    return fused.to(dtype), unfused.to(dtype)


@contextmanager
def put_aside(large: bool):
    """A function that returns what it is given, from a file if `large`, so that the memory can be used again."""
    with tempfile.TemporaryDirectory() as folder:
        count = itertools.count()

        def keep(found):
            if not large:
                return found
            path = Path(folder) / str(next(count))
            torch.save(found, path)
            return torch.load(path, mmap=True)

        yield keep


@pytest.mark.parametrize("name", proved(COMPARED, TESTED))
def test_fused_is_its_unfused_twin(name):
    x, target = batch(name, COMPARED[name])
    with put_aside(name in LARGE) as keep:
        torch.manual_seed(0)
        state = keep(create_model(name, fused=False, num_classes=10, **narrow(name)).state_dict())
        lr, found = None, []
        for fused in (False, True):
            model = create_model(name, fused=fused, num_classes=10, **narrow(name)).double()
            model.load_state_dict(state)
            results = keep(run(model, x, target))
            lr = lr or calm_rate(model, results["gradients"], share=1e-3 if name in QUICK else 1e-5)
            found.append(results | {"state after five steps": keep(sgd(model, x, target, lr))})
            del model
        theirs, ours = found
        for kind in theirs:
            close(ours[kind], theirs[kind], f"{name}, {kind}")
    # In float32, where activations are not at kinks: as near to float64 as PyTorch's own operators.
    fused, unfused = pair(name, torch.float32, **narrow(name))
    with torch.no_grad():
        ours, theirs = ({"logits": m.eval()(x.float())} for m in (fused, unfused))
        truth = {"logits": unfused.double()(x)}
    testing.assert_as_good_as(ours, theirs, truth)


@pytest.mark.parametrize(
    "name",
    ["bn_lenet_residual", "res_lenet", "resnet18", "preact_resnet18", "densenet121", "convnext_tiny"],
)
def test_training_in_float32_is_as_good_as_eager(name):
    """Logits, gradients and running statistics of one step, each held to its distance from float64. Allowed on top, as
    in :func:`cnnkern.testing.check`, is what a few roundings of the images and the parameters change. No model with a
    bias before a batch norm: the bias's gradient is zero, and rounding is all there is of it. No RegNet: so many ReLUs
    are so near their kinks that eager is as far from float64 as a tenth of the gradient, by chance.
    """
    x, target = batch(name, QUICK[name], torch.float32)
    fused, unfused = pair(name, torch.float32)
    state = {n: v.clone() for n, v in unfused.state_dict().items()}
    ours, eager = run(fused, x, target), run(unfused, x, target)

    def in_float64(rounding: float) -> dict[str, dict[str, Tensor]]:
        g = torch.Generator().manual_seed(0)

        def rounded(t: Tensor) -> Tensor:
            return t * (1 + rounding * (torch.randint(0, 2, t.shape, generator=g) * 2 - 1))

        model = create_model(name, fused=False, num_classes=10).double()
        model.load_state_dict(state)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(rounded(parameter))
        return run(model, rounded(x.double()), target)

    truth, near = in_float64(0), in_float64(8 * torch.finfo(torch.float32).eps)
    for kind in truth:
        counts = {n for n, t in truth[kind].items() if not t.is_floating_point()}
        assert all(torch.equal(ours[kind][n], eager[kind][n]) for n in counts)
        allowance = {n: (near[kind][n] - t).abs().max().item() for n, t in truth[kind].items()}
        results = ({n: t for n, t in found[kind].items() if n not in counts} for found in (ours, eager, truth))
        testing.assert_as_good_as(*results, allowance)


def test_googlenet_with_batch_norm_is_its_unfused_twin():
    x, target = batch("googlenet", 32)
    fused, unfused = pair("googlenet", bn=True)
    ours, theirs = run(fused, x, target), run(unfused, x, target)
    for kind in theirs:
        close(ours[kind], theirs[kind], kind)


# A VGG is narrow above, and torchvision's are not: two of them, in full width, where all models are asked for.
WITH_TORCHVISION = [n for n in TORCHVISION if n in COMPARED and not narrow(n)] + ["vgg11", "vgg11_bn"]


@pytest.mark.parametrize("name", proved(WITH_TORCHVISION, TESTED.intersection(WITH_TORCHVISION)))
def test_torchvisions_state_dict_gives_torchvisions_results(name):
    x, target = batch(name, COMPARED[name])
    with put_aside(name in LARGE) as keep:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(num_classes=10)
        state = keep({n: v.clone() for n, v in model.state_dict().items()})
        theirs = keep(run(model.double(), x, target))
        model = create_model(name, num_classes=10)
        model.load_state_dict(state)
        ours = keep(run(model.double(), x, target))
        for kind in theirs:
            close(ours[kind], theirs[kind], f"{name}, {kind}")


@pytest.mark.slow
def test_convolutions_of_vgg11_bn_are_torchvisions():
    """Without the classifier of 120 million parameters."""
    torch.manual_seed(0)
    theirs = torchvision.models.vgg11_bn().features
    ours = models.vgg11_bn().features
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ours, theirs = ours.double(), theirs.double()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "regnet_y_400mf"])
def test_seeds_give_torchvisions_initial_weights(name):
    torch.manual_seed(3)
    ours = create_model(name).state_dict()
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)().state_dict()
    assert all(torch.equal(ours[n], v) for n, v in theirs.items())


@pytest.mark.parametrize("name", ["bn_lenet_residual", "regnet_x_tiny", "mobilenet_v2"])
def test_models_are_copied_pickled_and_run_channels_last(name):
    import copy
    import pickle

    for fused in (True, False):
        model = create_model(name, fused=fused, num_classes=10).eval()
        x = torch.randn(2, get_builder(name).input_size[0], 32, 32)
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4)


def test_code_of_the_documentation_runs():
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "training.md", "exec"), {})
