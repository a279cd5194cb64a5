"""The zoo's blocks, fused and unfused: shapes, lazy channels, gradients by finite differences, worked examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkern
from cnnkern import models


def test_shapes_of_blocks():
    x = torch.randn(4, 3, 8, 8)
    y = models.DenseBlock(2, 10)(x)
    assert y.shape == (4, 23, 8, 8)
    assert models.TransitionBlock(10)(y).shape == (4, 10, 4, 4)
    x = torch.randn(4, 32, 96, 96)
    assert models.ResNeXtBlock(32, 16, 1)(x).shape == (4, 32, 96, 96)
    assert models.ResidualBlock(3, 6, stride=2)(torch.randn(4, 3, 6, 6)).shape == (4, 6, 3, 3)


def test_a_bottleneck_of_256_channels_has_69632_weights():
    def weights(block):
        return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d))

    assert weights(models.BottleneckBlock(256)) == 69_632
    assert weights(models.ResidualBlock(256)) == 1_179_648
    assert [weights(models.ResidualBlock(8, num_convs=n)) for n in (2, 3, 4)] == [n * 9 * 64 for n in (2, 3, 4)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("lazy", "eager"),
    [
        (lambda f: models.ResidualBlock(None, 6, 2, fused=f), lambda f: models.ResidualBlock(3, 6, 2, fused=f)),
        (
            lambda f: models.BottleneckBlock(None, 2, 6, projection=True, fused=f),
            lambda f: models.BottleneckBlock(3, 2, 6, fused=f),
        ),
        (
            lambda f: models.ResNeXtBlock(None, 3, 1, 6, 2, fused=f),
            lambda f: models.ResNeXtBlock(3, 3, 1, 6, 2, fused=f),
        ),
        (lambda f: models.DenseBlock(2, 4, fused=f), lambda f: models.DenseBlock(2, 4, 3, fused=f)),
        (lambda f: models.TransitionBlock(4, fused=f), lambda f: models.TransitionBlock(4, 3, fused=f)),
    ],
)
def test_lazy_blocks_learn_their_channels(lazy, eager, fused):
    x, lazy, eager = torch.randn(2, 3, 6, 6), lazy(fused), eager(fused)
    lazy(x)
    assert {n: v.shape for n, v in lazy.state_dict().items()} == {n: v.shape for n, v in eager.state_dict().items()}
    lazy.load_state_dict(eager.state_dict())
    assert torch.equal(lazy(x), eager(x))


@pytest.mark.parametrize("fused", [True, False])
def test_a_residual_block_with_zero_weights_is_relu(fused):
    x = torch.randn(4, 3, 6, 6)
    for block in (models.ResidualBlock(3, fused=fused), models.ResNeXtBlock(3, 3, fused=fused)):
        for m in block.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.zeros_(m.weight)
                nn.init.zeros_(m.bias)
        assert torch.equal(block(x), F.relu(x))


BLOCKS = {
    "ResidualBlock": (lambda f: models.ResidualBlock(4, fused=f), (3, 4, 3, 3)),
    "ResidualBlock, 3 convolutions, projection": (lambda f: models.ResidualBlock(2, 3, 2, 3, fused=f), (3, 2, 4, 4)),
    "BottleneckBlock": (lambda f: models.BottleneckBlock(4, 2, fused=f), (3, 4, 3, 3)),
    "ResNeXtBlock": (lambda f: models.ResNeXtBlock(4, 2, fused=f), (3, 4, 3, 3)),
    "ResNeXtBlock, projection, SE": (lambda f: models.ResNeXtBlock(4, 2, 1, 6, 2, 0.5, fused=f), (3, 4, 4, 4)),
    "DenseBlock": (lambda f: models.DenseBlock(2, 2, 3, fused=f), (3, 3, 3, 3)),
    "TransitionBlock": (lambda f: models.TransitionBlock(2, 3, fused=f), (3, 3, 4, 4)),
    "DenseLayer": (lambda f: models.densenet.DenseLayer(3, 2, fused=f), (3, 3, 3, 3)),
    "BasicBlock": (lambda f: models.BasicBlock(3, 4, 2, fused=f), (3, 3, 4, 4)),
    "Bottleneck": (lambda f: models.Bottleneck(4, 1, fused=f, groups=2, group_width=64), (3, 4, 3, 3)),
    "PreActBasicBlock": (lambda f: models.PreActBasicBlock(3, 4, 2, fused=f), (3, 3, 4, 4)),
    "PreActBottleneck": (lambda f: models.PreActBottleneck(8, 2, fused=f), (2, 8, 3, 3)),
    "Inception": (lambda f: models.Inception(3, 2, (2, 3), (1, 2), 1, bn=True, fused=f), (2, 3, 4, 4)),
    "NiNBlock": (lambda f: models.NiNBlock(3, 4, 3, padding=1), (2, 3, 3, 3)),
    "InvertedResidual": (lambda f: models.InvertedResidual(3, 3, 1, 2, fused=f), (3, 3, 3, 3)),
    "MBConv": (lambda f: models.MBConv(3, 3, expansion=2, fused=f), (3, 3, 3, 3)),
    "ShuffleBlock": (lambda f: models.ShuffleBlock(4, 4, fused=f), (3, 4, 3, 3)),
    "ShuffleBlock, stride 2": (lambda f: models.ShuffleBlock(3, 4, 2, fused=f), (3, 3, 4, 4)),
    "ConvNeXtBlock": (lambda f: models.ConvNeXtBlock(3, layer_scale=0.5, fused=f), (2, 3, 4, 4)),
    "StochasticDepth": (lambda f: models.StochasticDepth(0.5), (6, 2, 2, 2)),
    "SqueezeExcitation": (lambda f: models.SqueezeExcitation(4, 2), (3, 4, 3, 3)),
}


# Whole networks, of which tests/test_models.py has one of each family.
NETWORKS = {"AnyNet", "ConvNeXt", "DenseNet", "EfficientNet", "GoogLeNet", "MobileNetV2", "PreActResNet", "RegNet"}
NETWORKS |= {"ResNet", "ShuffleNetV2", "VGG"}


def test_every_public_block_is_in_the_table():
    public = {name for name in models.__all__ if isinstance(getattr(models, name), type)}
    assert public - NETWORKS == {name.partition(",")[0] for name in BLOCKS} - {"DenseLayer"}


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_blocks_by_finite_differences(name):
    build, shape = BLOCKS[name]
    torch.manual_seed(len(name))
    block = build(True).double()
    named = dict(block.named_parameters())
    names, values = tuple(named), tuple(named.values())

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), x)

    def run(x, *values):  # the module itself, with these parameters put in
        for parameter, value in zip(block.parameters(), values, strict=True):
            parameter.data = value.detach()
        torch.manual_seed(0)  # of stochastic depth
        return function(x, *values)

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *(v.detach().clone().requires_grad_() for v in values)), fast_mode=True)


def test_anynet_with_a_bottleneck_ratio_for_each_stage():
    """Half the stage's channels in the first stage's 3x3 convolutions, twice as many in the second's."""
    torch.manual_seed(0)
    arguments = {"bottleneck_ratios": (2, 0.5), "stem": 4, "num_classes": 3}
    unfused = models.AnyNet((1, 2), (8, 12), (2, 8), **arguments, fused=False).double()
    fused = models.AnyNet((1, 2), (8, 12), (2, 8), **arguments).double()
    fused.load_state_dict(unfused.state_dict())
    shapes = {}
    for path, module in fused.named_modules():
        module.register_forward_hook(lambda m, args, y, path=path: shapes.__setitem__(path, tuple(y.shape)))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(fused(x), unfused(x))
    stages = {"block1": ["block1-0"], "block2": ["block2-0", "block2-1"]}
    for (stage, blocks), inner, outer, side, groups in zip(
        stages.items(), (4, 24), (8, 12), (4, 2), (2, 3), strict=True
    ):
        for block in blocks:
            path = f"trunk_output.{stage}.{block}"
            assert shapes[path] == (2, outer, side, side)
            assert shapes[f"{path}.f.b"] == (2, inner, side, side)
            assert fused.get_submodule(f"{path}.f.b.0").groups == groups
    assert shapes[""] == (2, 3)


def test_blocks_refuse_what_they_cannot_build():
    with pytest.raises(ValueError, match="num_convs must be 2, 3 or 4; got 5"):
        models.ResidualBlock(4, num_convs=5)
    with pytest.raises(ValueError, match="with lazy input channels"):
        models.ResidualBlock(None)
    with pytest.raises(ValueError, match="6 channels cannot be reduced by 4"):
        models.BottleneckBlock(6)
    with pytest.raises(ValueError, match="12 channels do not divide into groups of 5"):
        models.ResNeXtBlock(12, 5)
    with pytest.raises(ValueError, match="share of the input's channels"):
        models.ResNeXtBlock(None, 4, out_channels=8, se_ratio=0.25)
    with pytest.raises(ValueError, match="must be of one length; got 2, 3, 2, 2"):
        models.AnyNet((1, 2), (8, 16, 32), 8)
    with pytest.raises(ValueError, match="multiplier > 1"):
        models.RegNet(24, 24.48, 1.0, 22, 16)
    with pytest.raises(ValueError, match="stride 1 keeps the channels"):
        models.ShuffleBlock(4, 8)


# ---- worked examples --------------------------------------------------------------------------------------------


def test_batch_norm_and_layer_norm_of_a_table():
    x = torch.tensor([[1.0, 2, 3], [10, 20, 30]])
    for layers in (cnnkern.nn, models.unfused):
        y = layers.BatchNormAct1d(3, eps=1e-12, act="none")(x)
        torch.testing.assert_close(y, torch.tensor([[-1.0] * 3, [1.0] * 3]))
        y = layers.LayerNorm(3, eps=1e-12)(x)
        torch.testing.assert_close(y, torch.tensor([[-1.2247, 0, 1.2247]] * 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layers", [cnnkern.nn, models.unfused], ids=["fused", "unfused"])
def test_batch_norm_of_two_channels(layers):
    x = torch.stack([torch.arange(1.0, 9).view(2, 2, 2), torch.arange(10.0, 18).view(2, 2, 2)], dim=1)
    norm = layers.BatchNorm2d(2)
    y = norm(x)
    expected = torch.tensor([-1.528, -1.091, -0.655, -0.218, 0.218, 0.655, 1.091, 1.528])
    torch.testing.assert_close(y[:, 0].flatten(), expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.45, 1.35]))
    torch.testing.assert_close(norm.running_var, torch.tensor([1.5, 1.5]))


@pytest.mark.parametrize("fused", [True, False])
def test_cross_correlation(fused):
    layers = models.layers.layer_set(fused)
    x, k = torch.arange(9.0).view(1, 1, 3, 3), torch.arange(4.0).view(1, 1, 2, 2)

    def correlate(x, k, groups=1):
        conv = layers.GroupedConv2d(x.shape[1], len(k), 2, bias=False, groups=groups)
        conv.weight.data = k
        return conv(x)

    one = torch.tensor([[19.0, 25], [37, 43]])
    assert torch.equal(correlate(x, k)[0, 0], one)
    two_x, two_k = torch.cat([x, x + 1], 1), torch.cat([k, k + 1], 1)
    assert torch.equal(correlate(two_x, two_k)[0, 0], torch.tensor([[56.0, 72], [104, 120]]))
    assert torch.equal(correlate(two_x, torch.cat([k, k]), groups=2)[0, 0], one)


@pytest.mark.parametrize("fused", [True, False])
def test_in_eval_one_image_or_ten_give_the_same(fused):
    torch.manual_seed(0)
    block = models.ResidualBlock(3, 6, 2, fused=fused).double()
    x = torch.randn(10, 3, 8, 8, dtype=torch.float64)
    block(x)
    ten = block.eval()(x)
    torch.testing.assert_close(torch.cat([block(image[None]) for image in x]), ten)
