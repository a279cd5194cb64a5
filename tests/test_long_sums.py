"""Sums of a million terms: of a channel in batch norm, of a column of rows in layer norm.

Each moves from the arithmetic type to double after so many additions, so its error does not grow with its length. The
terms are one number again and again: rounding then errs to one side for as long as the sum stays between two powers of
two, and n additions err by up to n / 4 roundings, where random terms would err to either side and hide it.
"""

import pytest
import torch

from cnnkern import testing

ADDITIONS = {"cpu": 64, "cuda": 128, "triton": 64}  # in the arithmetic type: the first lines of the kernels' files
ROUNDING = 2.0**-24  # of float32, half a unit in the last place
# Numbers of which 128 additions err by 32 roundings, and 256 by 49, while 64 are as good as exact: the squares of the
# halves of VALUES, and GRADIENTS.
VALUES = (2.807803153991699, 7.940436840057373, 5.531327247619629)
GRADIENTS = (1.9697189331054688, 0.2462320327758789, 7.882476806640625)


@pytest.fixture
def most(device) -> float:
    """The relative error that is allowed: of the additions, and a few roundings of each term and of the result."""
    if device.tensors == "cpu" and device.kernels != "cpu":
        pytest.skip("a million elements take the emulator minutes")
    return (ADDITIONS[device.kernels] / 4 + 8) * ROUNDING


def assert_within(got: torch.Tensor, expected: torch.Tensor, error: float, what: str) -> None:
    relative = ((got.double() - expected).abs() / expected.abs()).max().item()
    assert relative <= error, f"{what}: {relative / ROUNDING:.1f} roundings, of {error / ROUNDING:.0f}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["bn_act", "bn_add_act"])
def test_a_million_elements_a_channel(name, layout, device, most):
    """A number in one image and 0 in the other: both are as far from the mean, about which sums are taken."""
    image = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    x, dy = (
        testing.with_layout((image * torch.tensor(numbers).view(1, 3, 1, 1)).expand(2, 3, 730, 730), layout)
        for numbers in (VALUES, GRADIENTS)
    )
    x, dy = x.to(device.tensors), dy.to(device.tensors)
    more = (torch.zeros_like(x),) if name == "bn_add_act" else ()
    forward, gradient = getattr(torch.ops.cnnkern, name), getattr(torch.ops.cnnkern, f"{name}_backward")
    _, mean, rstd, *mask = forward(x, *more, None, None, None, None, True, 0.1, 1e-5, "none")
    deviation = torch.tensor(VALUES, dtype=torch.float64, device=x.device) / 2
    assert ((mean - deviation).abs() <= most * deviation).all()
    # A shift that is one of the two values, as on a GPU, doubles the squares that the variance is left of.
    doubled = 1 if device.kernels == "cpu" else 2
    assert_within(1 / rstd.square() - 1e-5, deviation.square(), doubled * most, "variance")

    weight, bias = torch.ones(3, device=x.device), torch.zeros(3, device=x.device)
    asked = [False] * (2 if more else 1) + [True, True]
    masked = (*mask, layout == "channels_last") if more else ()
    *_, dweight, dbias = gradient(dy, x, weight, bias, mean, rstd, *masked, True, "none", asked)
    sums = torch.tensor(GRADIENTS, dtype=torch.float64, device=x.device) * 730 * 730
    assert_within(dbias, sums, most, "dbias")
    assert_within(dweight, sums * deviation * rstd, most, "dweight")


@pytest.mark.parametrize("layout", ["rows", "contiguous", "channels_last"])
def test_a_hundred_thousand_rows(layout, device, most):
    """Every row is the same, so that in each column the terms of both sums are."""
    if layout == "rows":
        name, shape, where, size = "layer_norm", ([8],), (1, 8), (131072, 8)
    else:
        name, shape, where, size = "layer_norm2d", (), (1, 8, 1, 1), (2, 8, 256, 256)
    row = torch.tensor([0.3, -1.7, 0.9, 2.3, -0.4, 1.1, -2.9, 0.6])
    numbers = torch.tensor([*GRADIENTS, *(g / 3 for g in GRADIENTS), 0.1, 0.7])
    x, dy = (
        testing.with_layout(t.view(where).expand(size), "contiguous" if layout == "rows" else layout).to(device.tensors)
        for t in (row, numbers)
    )
    weight, bias = torch.ones(8, device=x.device), torch.zeros(8, device=x.device)
    forward, gradient = getattr(torch.ops.cnnkern, name), getattr(torch.ops.cnnkern, f"{name}_backward")
    _, mean, rstd = forward(x, *shape, weight, bias, 1e-5)
    wide, sums = row.double(), 131072 * numbers.double()
    xhat = (wide - wide.mean()) / (wide.var(correction=0) + 1e-5).sqrt()
    for asked in ([True, True, True], [False, True, True]):
        _, dweight, dbias = gradient(dy, x, *shape, weight, bias, mean, rstd, asked)
        assert_within(dbias.cpu(), sums, most, "dbias")
        assert_within(dweight.cpu(), sums * xhat, most, "dweight")
