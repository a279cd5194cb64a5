"""The zoo against its facts: parameters, shapes, names and torchvision's state-dict keys, on tensors without memory."""

import re
from contextlib import contextmanager

import pytest
import torch
import torchvision
from torch import nn

from cnnkern import models
from cnnkern.models import create_model, get_builder, list_models
from tests.zoo import IMAGENET_PARAMETERS, PARAMETERS, TORCHVISION


@contextmanager
def meta():
    with torch.device("meta"):
        yield


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shapes(model: nn.Module, *size: int, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Path of each module -> the shape that it gives for images of this size, without the batch."""
    found = {}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, args, y, path=path: found.__setitem__(path, tuple(y.shape[1:])))
    model.eval()(torch.empty(batch, *size, device=next(model.parameters()).device))
    return found


# ---- parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "in_channels"), PARAMETERS)
def test_parameters_at_ten_classes(name, in_channels):
    with meta():
        model = create_model(name, num_classes=10, in_channels=in_channels)
    assert parameters(model) == PARAMETERS[name, in_channels]


@pytest.mark.parametrize("name", IMAGENET_PARAMETERS)
def test_parameters_for_imagenet(name):
    with meta():
        assert parameters(create_model(name)) == IMAGENET_PARAMETERS[name]


def test_a_quarter_of_vgg11():
    with meta():
        assert parameters(models.vgg11(num_classes=10, in_channels=1, width_mult=0.25)) == 43_093_322


@pytest.mark.parametrize("name", list_models())
def test_one_architecture_and_a_docstring_that_tells_the_truth(name):
    builder = get_builder(name)
    with meta():
        fused, unfused = create_model(name), create_model(name, fused=False)
        described = {n: (v.shape, v.dtype) for n, v in fused.state_dict().items()}
        assert described == {n: (v.shape, v.dtype) for n, v in unfused.state_dict().items()}
        assert list(fused.state_dict()) == list(unfused.state_dict())
        assert not any(type(m).__module__.startswith("cnnkern.nn") for m in unfused.modules())
        outputs = list(shapes(unfused, *builder.input_size).values())  # in the order of the calls
        smaller = create_model(name, num_classes=7, in_channels=2)
        assert smaller.eval()(torch.empty(1, 2, *builder.input_size[1:])).shape == (1, 7)
    said = re.search(r"Input (\d+)x(\d+)x(\d+),\s+([\d,]+)\s+parameters", builder.__doc__)
    assert tuple(map(int, said.groups()[:3])) == builder.input_size
    assert int(said[4].replace(",", "")) == parameters(fused)
    paper = r"[A-Z]\w+(?: et al\.|(?:, [A-Z]\w+)* and [A-Z]\w+), [^.]+?, (?:19|20)\d\d\b"
    assert re.search(paper, " ".join(builder.__doc__.split())), "the docstring names no paper: authors, title, year"
    stages = re.search(r"Shapes:\s([^.]+)\.", builder.__doc__)[1]
    stages = [tuple(map(int, shape.split("x"))) for shape in re.findall(r"\d+(?:x\d+)*", stages)]
    assert len(stages) >= 2
    computed = iter(outputs)
    missing = [stage for stage in stages if stage not in computed]  # `in` goes on behind the one it found
    assert not missing, f"shapes that no layer gives, or not in this order: {missing}"
    assert name in models.__all__
    assert getattr(models, name) is builder


# ---- shapes -----------------------------------------------------------------------------------------------------


def test_shapes_of_alexnet():
    with meta():
        found = shapes(models.alexnet(), 1, 224, 224)
    convs_and_pools = [found[str(i)] for i in (0, 2, 3, 5, 6, 8, 10, 12)]
    assert [s[-1] for s in convs_and_pools] == [54, 26, 26, 12, 12, 12, 12, 5]
    assert found["13"] == (6400,)


def test_shapes_of_vgg11():
    with meta():
        found = shapes(models.vgg11(in_channels=1), 1, 224, 224)
    pools = [s for p, s in found.items() if re.fullmatch(r"features\.(2|5|10|15|20)", p)]
    assert pools == [(64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (512, 7, 7)]
    assert torch.tensor(found["avgpool"]).prod() == 25_088


def test_shapes_of_nin():
    with meta():
        found = shapes(models.nin(), 1, 224, 224)
    assert [found[p] for p in "0247"] == [(96, 54, 54), (256, 26, 26), (384, 12, 12), (10, 5, 5)]


@pytest.mark.parametrize("bn", [False, True])
def test_shapes_of_googlenet(bn):
    with meta():
        found = shapes(models.googlenet(bn=bn), 1, 96, 96)
    assert [found[p] for p in "01234"] == [(64, 24, 24), (192, 12, 12), (480, 6, 6), (832, 3, 3), (1024,)]
    inceptions = [found[f"2.{i}"][0] for i in range(2)] + [found[f"3.{i}"][0] for i in range(5)]
    inceptions += [found[f"4.{i}"][0] for i in range(2)]
    assert inceptions == [256, 480, 512, 512, 512, 528, 832, 832, 1024]


def test_shapes_of_resnet18():
    with meta():
        found = shapes(models.resnet18(in_channels=1), 1, 96, 96)
    stages = [found[p] for p in ("maxpool", "layer1", "layer2", "layer3", "layer4")]
    assert stages == [(64, 24, 24), (64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3)]


def test_shapes_of_small_networks():
    with meta():
        assert shapes(models.densenet_small(), 1, 96, 96)["10"] == (248, 3, 3)
        assert shapes(models.regnet_x_tiny(), 1, 96, 96)["trunk_output"] == (80, 12, 12)


def test_regnet_widths_are_the_papers():
    """RegNetX-400MF and RegNetY-400MF in tables of the paper: depths 1-2-7-12 and 1-3-6-6."""
    assert models.regnet.quantized_widths(24, 24.48, 2.54, 22, 16) == ([1, 2, 7, 12], [32, 64, 160, 400], [16] * 4)
    assert models.regnet.quantized_widths(48, 27.89, 2.09, 16, 8) == ([1, 3, 6, 6], [48, 104, 208, 440], [8] * 4)


# ---- names and keys ---------------------------------------------------------------------------------------------


@pytest.fixture
def regnets_on_meta(monkeypatch):
    """torchvision works out a RegNet's widths with tensors, which need memory."""
    from torchvision.models.regnet import BlockParams

    original = BlockParams.from_init_params

    def on_the_cpu(**arguments):
        with torch.device("cpu"):
            return original(**arguments)

    monkeypatch.setattr(BlockParams, "from_init_params", on_the_cpu)


@pytest.mark.parametrize("name", TORCHVISION)
def test_state_dict_is_torchvisions(name, regnets_on_meta):
    with meta():
        ours, theirs = create_model(name).state_dict(), getattr(torchvision.models, name)().state_dict()
    assert [(n, v.shape, v.dtype) for n, v in ours.items()] == [(n, v.shape, v.dtype) for n, v in theirs.items()]


def test_create_model_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"no model is called 'resnet81': did you mean resnet18"):
        create_model("resnet81")
    with pytest.raises(ValueError, match=r"list_models\(\) has the names"):
        create_model("transformer")
    with pytest.raises(TypeError, match="depth"):
        create_model("resnet18", depth=3)


def test_every_name_that_the_zoo_promises():
    names = set(list_models())
    assert len(list_models()) == len(names)
    promised = {name for name, _ in PARAMETERS} | set(IMAGENET_PARAMETERS)
    promised |= {f"preact_resnet{n}" for n in (18, 34, 50)} | {f"vgg{n}_bn" for n in (11, 13, 16, 19)}
    promised |= {n for n in torchvision.models.list_models(torchvision.models) if n.startswith("regnet")}
    assert promised | {"resnext101_64x4d"} == names
    public = {"ResidualBlock", "BottleneckBlock", "ResNeXtBlock", "DenseBlock", "TransitionBlock", "AnyNet", "RegNet"}
    for name in public:
        assert name in models.__all__
        assert issubclass(getattr(models, name), nn.Module)
