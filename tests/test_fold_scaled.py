"""Squeeze-excitation in a folded model: the product of an image and a factor per channel is computed in the 1x1
convolution that uses it. As good as eager, and nothing that a model does with the product or its terms changes that."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import cnnkern
from cnnkern import _C
from tests.test_fold import LAYOUTS, judged, randomised
from tests.test_fold_blocks import as_good_as_by_layer, same_gradient, threads
from tests.test_fold_own import new_memory_is_nan

pytestmark = pytest.mark.skipif(_C.cpu_capability() == "DEFAULT", reason="without AVX2 oneDNN computes the layers")

WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scale * image": lambda scale, image: scale * image,
    "image * scale": lambda scale, image: image * scale,
    "torch.mul": lambda scale, image: torch.mul(image, scale),
    "Tensor.multiply": lambda scale, image: image.multiply(scale),
}


class Squeezed(nn.Module):
    """A convolution, squeeze-excitation, and a 1x1 convolution; `between` gets the product and its terms."""

    def __init__(self, inputs: int, channels: int, outputs: int, gate: nn.Module, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False, groups=groups)
        self.bn1, self.act1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.fc1, self.act2, self.fc2 = nn.Conv2d(channels, 4, 1), nn.SiLU(), nn.Conv2d(4, channels, 1)
        self.gate = gate
        self.project, self.bn2 = nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.multiply = WAYS["scale * image"]
        self.between: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda product, scale, image: product

    def forward(self, x: Tensor) -> Tensor:
        image = self.act1(self.bn1(self.conv(x)))
        scale = self.gate(self.fc2(self.act2(self.fc1(F.adaptive_avg_pool2d(image, 1)))))
        y = self.bn2(self.project(self.between(self.multiply(scale, image), scale, image)))
        return y + x if y.shape == x.shape else F.silu(y)


def scaled_run(call: Callable[[], object]) -> int:
    """How many products a call computes in a convolution."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return sum(event.count for event in recorded.key_averages() if event.key == "cnnkern::scaled_convolution")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()], ids=str)
def test_as_good_as_eager(way, gate):
    torch.manual_seed(0)
    for i, (inputs, channels, outputs) in enumerate([(3, 16, 5), (8, 33, 8), (5, 130, 70), (4, 96, 200)]):
        model = randomised(Squeezed(inputs, channels, outputs, gate))
        folded = cnnkern.fold(model)
        model.multiply = folded.multiply = WAYS[way]
        for n, h, w in ((1, 7, 7), (2, 9, 5), (3, 1, 2), (5, 30, 23)):
            x = torch.randn(n, inputs, h, w)
            with threads(1 + i % 3), new_memory_is_nan():
                for _ in range(2):
                    judged(folded, model, x, layouts=LAYOUTS)
                for layout in LAYOUTS:
                    with torch.no_grad():
                        given = x.to(memory_format=layout)
                        assert scaled_run(lambda given=given, folded=folded: folded(given).sum()) == 1
                        assert folded(given).stride() == model(given).stride()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_results_do_not_depend_on_threads(count):
    model = cnnkern.fold(randomised(Squeezed(4, 100, 80, nn.Sigmoid())))
    for shape in ((1, 4, 60, 50), (3, 4, 7, 7)):
        x = torch.randn(shape)
        with torch.no_grad():
            model(x)
            with threads(1):
                expected = model(x).clone()
            with threads(count):
                assert torch.equal(model(x), expected)


def test_nan_and_infinities():
    model = randomised(Squeezed(2, 8, 3, nn.Sigmoid()))
    model.conv = nn.Conv2d(2, 8, 1)  # on a kernel of cnnkern: a ReLU of oneDNN's makes 0 of NaN
    folded = cnnkern.fold(model)
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 2, 5, 5)
        x[0, 0, 2, 2] = value
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_torchvisions_networks():
    from benchmarks.suite.models import build

    for name, count in (("mobilenet_v3_large", 8), ("efficientnet_b0", 16), ("regnet_y_400mf", 16)):
        model = randomised(build(name).eval())
        folded = cnnkern.fold(model)
        x = torch.randn(2, 3, 96, 96)
        with torch.no_grad():
            assert scaled_run(lambda folded=folded, x=x: folded(x).sum()) == count, name
        as_good_as_by_layer(model, folded, x)


KEPT: list[Tensor] = []


def _kept(product: Tensor, scale: Tensor, image: Tensor) -> Tensor:
    KEPT.extend([product, scale, image])
    return product


def _image_written(product: Tensor, scale: Tensor, image: Tensor) -> Tensor:
    image.mul_(3)
    return product


def _scale_written(product: Tensor, scale: Tensor, image: Tensor) -> Tensor:
    scale.zero_()
    return product


def _scale_written_by_numpy(product: Tensor, scale: Tensor, image: Tensor) -> Tensor:
    scale.detach().numpy()[:] = 2
    return product


def _image_written_by_numpy(product: Tensor, scale: Tensor, image: Tensor) -> Tensor:
    image.detach().numpy()[:] = 2
    return product


def _product_written(product: Tensor, scale: Tensor, image: Tensor) -> Tensor:
    product[:, 0].add_(1)
    return product


BETWEEN = [
    _kept,
    _image_written,
    _scale_written,
    _scale_written_by_numpy,
    _image_written_by_numpy,
    _product_written,
    lambda product, scale, image: product.clone(),
    lambda product, scale, image: product * scale,
    lambda product, scale, image: product + image,
    lambda product, scale, image: product.relu_(),
    lambda product, scale, image: image.mul_(scale),
    lambda product, scale, image: F.dropout(product, training=False),
    lambda product, scale, image: scale[:1] * image,
    lambda product, scale, image: scale * scale * image,
    lambda product, scale, image: scale * image.mT.contiguous().mT,
    lambda product, scale, image: scale * image[:, :, :1, :1],
    lambda product, scale, image: scale * 2 * image,
    lambda product, scale, image: (scale.double() * image).float(),
]


@pytest.mark.parametrize("between", range(len(BETWEEN)))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_a_model_does_with_the_product(between, layout):
    torch.manual_seed(0)
    model = randomised(Squeezed(3, 12, 3, nn.Sigmoid()))
    folded = cnnkern.fold(model)
    model.between = folded.between = BETWEEN[between]
    for _ in range(3):
        x = torch.randn(2, 3, 6, 8).to(memory_format=layout)
        seen = []
        for m in (model, folded):
            KEPT.clear()
            with torch.no_grad():
                y = m(x.clone())
            seen.append([y, *(t.clone() for t in KEPT)])
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
        assert [t.stride() for t in seen[1]] == [t.stride() for t in seen[0]]
    KEPT.clear()


def test_a_product_that_no_1x1_convolution_uses():
    """It is PyTorch's multiplication, and after the first call nothing is deferred for it."""
    model = randomised(Squeezed(3, 12, 3, nn.Sigmoid()))
    model.project = nn.Conv2d(12, 3, 3, padding=1)
    folded = cnnkern.fold(model)
    x = torch.randn(2, 3, 6, 8)
    for _ in range(3):
        judged(folded, model, x, layouts=LAYOUTS)
    with torch.no_grad():
        assert scaled_run(lambda: folded(x).sum()) == 0


@pytest.mark.parametrize("image", [torch.randn(2, 12, 6, 8).to_sparse(), torch.randn(2, 12, 6, 8, dtype=torch.cfloat)])
def test_images_of_other_kinds(image):
    model = randomised(Squeezed(3, 12, 3, nn.Sigmoid()))
    folded = cnnkern.fold(model)
    kept: list[Tensor] = []

    def between(product: Tensor, scale: Tensor, _: Tensor) -> Tensor:
        kept.append((scale.expand(2, 12, 6, 8) if image.is_sparse else scale) * image)
        return product

    model.between = folded.between = between
    x = torch.randn(2, 3, 6, 8)
    with torch.no_grad():
        model(x), folded(x)
    expected, mine = (t.to_dense() if t.is_sparse else t for t in kept)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_model():
    same_gradient(randomised(Squeezed(3, 12, 3, nn.Sigmoid())), torch.randn(1, 3, 6, 8))
