"""Sums of a million terms: of a channel in batch norm, of a column of rows in layer norm.

Each moves from the arithmetic type to double after so many additions, so its error does not grow with its length. It is
judged by what that allows.

Terms are zero or one number: rounded to nearest, random terms would err to either side in turn, and the error of a long
sum in float would hide among them. The same number again and again errs to one side.
"""

import pytest
import torch

from cnnkern import testing

ADDITIONS = {"cpu": 64, "cuda": 128, "triton": 64}  # in the arithmetic type: the first lines of the kernels' files
ROUNDING = 2.0**-24  # of float32, half a unit in the last place
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.fixture
def most(device) -> float:
    """The relative error that sums of terms of one sign may have: a rounding an addition, and a few of each term."""
    if device.tensors == "cpu" and device.kernels != "cpu":
        pytest.skip("a million elements take the emulator minutes")
    return (ADDITIONS[device.kernels] + 8) * ROUNDING


def coins(shape: tuple[int, ...], generator) -> torch.Tensor:
    """0 or 1, as a coin falls."""
    return torch.randint(2, shape, generator=generator).float()


def assert_within(got: torch.Tensor, expected: torch.Tensor, error: float, what: str) -> None:
    relative = ((got.double() - expected).abs() / expected.abs()).max().item()
    assert relative <= error, f"{what}: {relative:.2e}, of {error:.2e}"


@layouts
@pytest.mark.parametrize("name", ["bn_act", "bn_add_act"])
def test_a_million_elements_a_channel(name, layout, generator, device, most):
    fallen = coins((2, 3, 730, 730), generator)
    x, dy = (
        testing.with_layout(fallen * torch.tensor(values).view(1, 3, 1, 1), layout).to(device.tensors)
        for values in ((0.7, 1.3, 3.1), (0.1, 0.3, 0.7))
    )
    more = (torch.zeros_like(x),) if name == "bn_add_act" else ()
    forward, gradient = getattr(torch.ops.cnnkern, name), getattr(torch.ops.cnnkern, f"{name}_backward")
    _, mean, rstd, *mask = forward(x, *more, None, None, None, None, True, 0.1, 1e-5, "none")
    wide = x.double()
    var, expected = torch.var_mean(wide, (0, 2, 3), correction=0)
    # Sums are of x less a shift, which lies between the two values, and so do terms of one sign: up to twice the
    # deviation large, and the variance is what is left of the second.
    deviation = var.sqrt()
    assert ((mean - expected).abs() <= 2 * deviation * most).all()
    assert_within(1 / rstd.square() - 1e-5, var, 8 * most, "variance")

    weight, bias = torch.ones(3, device=x.device), torch.zeros(3, device=x.device)
    asked = [False] * (2 if more else 1) + [True, True]
    *_, dweight, dbias = gradient(dy, x, weight, bias, mean, rstd, *mask, True, "none", asked)
    g = dy.double()
    assert_within(dbias, g.sum((0, 2, 3)), most, "dbias")
    centered = wide - expected.view(1, 3, 1, 1)
    assert_within(dweight, (g * centered).sum((0, 2, 3)) * rstd, most, "dweight")


@pytest.mark.parametrize("layout", ["rows", "contiguous", "channels_last"])
def test_a_hundred_thousand_rows(layout, generator, device, most):
    """Every row is the same, so that in each column the terms of both sums are."""
    row = torch.tensor([0.3, -1.7, 0.9, 2.3, -0.4, 1.1, -2.9, 0.6], dtype=torch.float32)
    if layout == "rows":
        name, shape, where, dims, size = "layer_norm", ([8],), (1, 8), [0], (131072, 8)
    else:
        name, shape, where, dims, size = "layer_norm2d", (), (1, 8, 1, 1), [0, 2, 3], (2, 8, 256, 256)
    x = row.view(where).expand(size)
    dy = coins((size[0], 1, *size[2:]), generator) * torch.linspace(0.1, 0.7, 8).view(where)
    x, dy = (testing.with_layout(t, "contiguous" if layout == "rows" else layout).to(device.tensors) for t in (x, dy))
    weight, bias = torch.ones(8, device=x.device), torch.zeros(8, device=x.device)
    forward, gradient = getattr(torch.ops.cnnkern, name), getattr(torch.ops.cnnkern, f"{name}_backward")
    _, mean, rstd = forward(x, *shape, weight, bias, 1e-5)
    for asked in ([True, True, True], [False, True, True]):
        _, dweight, dbias = gradient(dy, x, *shape, weight, bias, mean, rstd, asked)
        sums = dy.double().sum(dims)
        wide = row.double()
        xhat = (wide - wide.mean()) / (wide.var(correction=0) + 1e-5).sqrt()
        assert_within(dbias, sums, most, "dbias")
        assert_within(dweight, sums * xhat.to(device.tensors), most, "dweight")
