"""Misuse of the functionals: the type of error that torch raises, our operator's name and what is at fault in it.

Nothing has been written then: running statistics are as they were. tests/test_batchnorm.py has the modules' misuse.
"""

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from cnnkern import functional, reference

X, R = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
FOUR, DOUBLE, META = torch.ones(4), torch.ones(5, dtype=torch.float64), torch.ones(5, device="meta")
HALF_AN_IMAGE = torch.randn(2, 5, 3, 2)

# What is passed instead, and what both messages name if they do.
BATCH_NORM = {
    "one per channel, 2-D": ({"input": torch.randn(1, 5)}, "Expected more than 1 value per channel when training"),
    "one per channel, 4-D": ({"input": X[:1, :, :1, :1]}, "Expected more than 1 value per channel when training"),
    "channels": ({"input": torch.randn(2, 4, 3, 3)}, "should contain 4 elements"),
    "no channels": ({"input": torch.randn(5)}, None),
    "elements of weight": ({"weight": FOUR}, "weight should contain 5 elements"),
    "elements of bias": ({"bias": FOUR}, "bias should contain 5 elements"),
    "elements of running_mean": ({"running_mean": FOUR}, "running_mean should contain 5 elements"),
    "elements of running_var": ({"running_var": FOUR}, "running_var should contain 5 elements"),
    "integers": ({"input": X.long()}, "Long"),
    "booleans": ({"input": X.bool(), "weight": None, "bias": None}, "Bool"),
    "complex": ({"input": X + 1j, "weight": None, "bias": None}, "ComplexFloat"),
    "dtype of input": ({"input": X.double()}, None),
    "dtype of weight": ({"weight": DOUBLE}, "Float"),
    "dtype of bias": ({"bias": DOUBLE}, "Float"),
    "dtype of running_mean": ({"running_mean": DOUBLE}, "Float"),
    "16-bit weight": ({"weight": torch.ones(5, dtype=torch.bfloat16)}, "Float"),
    "device of input": ({"input": X.to("meta")}, "meta"),
    "device of weight": ({"weight": META}, "meta"),
    "device of bias": ({"bias": META}, "meta"),
    "device of running_mean": ({"running_mean": META}, "meta"),
    "eps": ({"eps": 0.0}, "eps must be positive during training, but got 0"),
    "no statistics in eval": (
        {"running_mean": None, "running_var": None, "training": False},
        "must be defined in evaluation mode",
    ),
}
ADDITION = {
    "shape": (HALF_AN_IMAGE, None),
    "dimensions": (torch.randn(5), None),
    "device": (R.to("meta"), "device"),
}
# What eager broadcasts or promotes.
REFUSED_HERE = {
    "shape": (R[:1], r"residual must have the input's shape \[2, 5, 3, 3\]; got \[1, 5, 3, 3\]"),
    "dimensions": (R[None], r"residual must have the input's shape \[2, 5, 3, 3\]; got \[1, 2, 5, 3, 3\]"),
    "a wider dtype": (R.double(), "residual must have the input's dtype Float; got Double"),
    "a narrower dtype": (R.half(), "residual must have the input's dtype Float; got Half"),
    "integers": (R.long(), "residual must have the input's dtype Float; got Long"),
}
LAYER_NORM = {
    "no dimensions": ({"normalized_shape": ()}, "normalized_shape"),
    "shape": ({"normalized_shape": (5,), "weight": None, "bias": None}, r"iven normalized_shape=\[5\]"),
    "more dimensions": (
        {"normalized_shape": (1, 2, 5, 3, 3), "weight": None, "bias": None},
        r"iven normalized_shape=\[1, 2, 5, 3, 3\]",
    ),
    "a scalar": ({"input": torch.tensor(1.0)}, r"iven normalized_shape=\[3\]"),
    "shape of weight": ({"weight": FOUR}, r"xpected weight to be of (the )?same shape as normalized_shape"),
    "dimensions of weight": ({"weight": torch.ones(1, 3)}, r"xpected weight to be of (the )?same shape"),
    "shape of bias": ({"bias": FOUR}, r"xpected bias to be of (the )?same shape as normalized_shape"),
    "dtype of input": ({"input": X.double()}, None),
    "dtype of weight": ({"weight": DOUBLE[:3]}, "Float"),
    "dtype of bias": ({"bias": DOUBLE[:3]}, "Float"),
    "dtype of bias alone": ({"weight": None, "bias": DOUBLE[:3]}, "Float"),
    "16-bit weight": ({"weight": torch.ones(3, dtype=torch.bfloat16)}, "Float"),
    "integers": ({"input": X.int(), "weight": None, "bias": None}, "Int"),
    "booleans": ({"input": X.bool(), "weight": None, "bias": None}, "Bool"),
    "complex": ({"input": X + 1j, "weight": None, "bias": None}, "ComplexFloat"),
    "device of input": ({"input": X.to("meta")}, None),
    "device of weight": ({"weight": META[:3]}, None),
    "device of bias": ({"bias": META[:3]}, None),
}
LAYER_NORM2D = {
    "dimensions": ({"input": X[0]}, "dim"),
    "more dimensions": ({"input": X[None]}, "dim"),
    "elements of weight": ({"weight": FOUR}, "weight"),
    "elements of bias": ({"bias": FOUR}, "bias"),
    "dtype of weight": ({"weight": DOUBLE}, "Float"),
    "dtype of bias": ({"bias": DOUBLE}, "Float"),
    "integers": ({"input": X.int(), "weight": None, "bias": None}, "Int"),
    "device of input": ({"input": X.to("meta")}, "meta"),
    "device of weight": ({"weight": META}, "meta"),
    "device of bias": ({"bias": META}, "meta"),
}
# What torch names, and what ours do.
POOLING = {
    "padding": ({"kernel_size": 3, "padding": 2}, r"padding \[2, 2\] and kernel_size \[3, 3\]"),
    "no room": ({"kernel_size": 5}, r"output size is too small: an input of \[2, 5, 3, 3\]"),
    "no stride": ({"kernel_size": 2, "stride": 0}, r"stride must be from 1 to 2\^30; got stride \[0, 0\]"),
    "no kernel": ({"kernel_size": 0}, "kernel_size must be greater than zero"),
    "two dimensions": ({"input": X[0, 0], "kernel_size": 2}, r"expected an input of 4 dimensions .* got \[3, 3\]"),
    "five dimensions": ({"input": X[None], "kernel_size": 2}, r"an input of 4 dimensions .* got \[1, 2, 5, 3, 3\]"),
    "no channels": ({"input": X[:, :0], "kernel_size": 2}, r"of which only the first may be 0; got \[2, 0, 3, 3\]"),
    "three numbers": ({"kernel_size": (2, 2, 2)}, r"kernel_size to be one number or two; got \(2, 2, 2\)"),
    "booleans": ({"input": X.bool(), "kernel_size": 2}, "got Bool"),
    "complex": ({"input": X + 1j, "kernel_size": 2}, "got ComplexFloat"),
}


def batch_norm(**others):
    vectors = {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
    return {"input": X, **vectors, "weight": torch.ones(5), "bias": torch.zeros(5), "training": True} | others


def assert_the_same_error(name, ours, theirs, arguments, shared):
    before = {n: v.clone() for n, v in arguments.items() if isinstance(v, Tensor)}
    copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    with pytest.raises(Exception, match=shared) as expected:
        theirs(**copies)  # which has updated running statistics before it sees what is wrong with a bias
    with pytest.raises(Exception, match=shared) as raised:
        ours(**arguments)
    assert raised.type is expected.type
    assert f"cnnkern::{name}" in str(raised.value)
    for n, value in before.items():
        assert value.is_meta or torch.equal(arguments[n], value), f"{n} has changed"


@pytest.mark.parametrize("misuse", BATCH_NORM)
def test_batch_norms_raise_what_torch_raises(misuse):
    others, shared = BATCH_NORM[misuse]
    arguments = batch_norm(**others)
    for act in reference.ACTIVATIONS:

        def ours(act=act, **arguments):
            return functional.batch_norm_act(**arguments, act=act)

        assert_the_same_error("bn_act", ours, F.batch_norm, arguments, shared)
    residual = torch.ones_like(arguments["input"])
    for act in ("none", "relu"):

        def ours(act=act, **arguments):
            return functional.batch_norm_add_act(**arguments, residual=residual, act=act)

        assert_the_same_error("bn_add_act", ours, F.batch_norm, arguments, shared)


@pytest.mark.parametrize("misuse", ADDITION)
def test_additions_raise_what_torch_raises(misuse):
    other, shared = ADDITION[misuse]
    both = {"input": X, "other": other}
    assert_the_same_error("add_relu", functional.add_relu, reference.add_relu, both, shared)
    for training in (True, False):
        vectors = torch.zeros(5), torch.ones(5)
        with pytest.raises(Exception, match=shared) as expected:
            F.batch_norm(X, None, None, training=True) + other
        with pytest.raises(expected.type, match="cnnkern::bn_add_act: residual") as raised:
            functional.batch_norm_add_relu(X, other, *vectors, training=training)
        assert raised.type is expected.type
        assert torch.equal(torch.stack(vectors), torch.tensor([[0.0], [1.0]]).expand(2, 5))


@pytest.mark.parametrize("misuse", REFUSED_HERE)
def test_residuals_that_would_be_broadcast_or_promoted_are_refused(misuse):
    other, message = REFUSED_HERE[misuse]
    vectors = torch.zeros(5), torch.ones(5)
    reference.add_relu(X, other)
    with pytest.raises(RuntimeError, match=f"cnnkern::add_relu: {message}"):
        functional.add_relu(X, other)
    for training in (True, False):
        with pytest.raises(RuntimeError, match=f"cnnkern::bn_add_act: {message}"):
            functional.batch_norm_add_relu(X, other, *vectors, training=training)
    assert torch.equal(torch.stack(vectors), torch.tensor([[0.0], [1.0]]).expand(2, 5))


@pytest.mark.parametrize("misuse", LAYER_NORM)
def test_layer_norms_raise_what_torch_raises(misuse):
    others, shared = LAYER_NORM[misuse]
    arguments = {"input": X, "normalized_shape": (3,), "weight": torch.ones(3), "bias": torch.zeros(3)} | others
    assert_the_same_error("layer_norm", functional.layer_norm, F.layer_norm, arguments, shared)


@pytest.mark.parametrize("misuse", POOLING)
def test_poolings_raise_what_torch_raises(misuse):
    others, said = POOLING[misuse]
    arguments = {"input": X} | others
    assert_the_same_error("max_pool2d", functional.max_pool2d, F.max_pool2d, arguments, None)
    with pytest.raises((RuntimeError, NotImplementedError), match=said):
        functional.max_pool2d(**arguments)


@pytest.mark.parametrize("misuse", LAYER_NORM2D)
def test_layer_norms_of_images_raise_what_torch_raises(misuse):
    others, shared = LAYER_NORM2D[misuse]
    arguments = {"input": X, "weight": torch.ones(5), "bias": torch.zeros(5)} | others
    assert_the_same_error("layer_norm2d", functional.layer_norm2d, reference.layer_norm2d, arguments, shared)


def in_forward_mode(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PyTorch's own operators answer then: nothing less is checked."""

    def call(**arguments):
        x = arguments["input"]
        with forward_ad.dual_level():
            return function(**arguments | {"input": forward_ad.make_dual(x, torch.ones_like(x))})

    return call


def under_torch_func(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(**arguments):
        return torch.func.grad(lambda x: function(**arguments | {"input": x}).sum())(arguments["input"])

    return call


WAYS = {"forward mode": in_forward_mode, "torch.func": under_torch_func}
OF_FLOATS = [
    n for n, (others, _) in BATCH_NORM.items() if others.get("input", X).is_floating_point() and "device" not in n
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("misuse", OF_FLOATS)
def test_batch_norms_raise_the_same_however_they_are_differentiated(misuse, way):
    others, shared = BATCH_NORM[misuse]
    arguments = batch_norm(**others)
    residual = torch.ones_like(arguments["input"])

    def add(**arguments):
        return functional.batch_norm_add_act(**arguments, residual=residual)

    assert_the_same_error("bn_act", WAYS[way](functional.batch_norm_act), F.batch_norm, arguments, shared)
    assert_the_same_error("bn_add_act", WAYS[way](add), F.batch_norm, arguments, shared)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("misuse", REFUSED_HERE)
def test_residuals_are_refused_however_they_are_differentiated(misuse, way):
    other, message = REFUSED_HERE[misuse]
    vectors = torch.zeros(5), torch.ones(5)
    with pytest.raises(RuntimeError, match=f"cnnkern::add_relu: {message}"):
        WAYS[way](lambda input: functional.add_relu(input, other))(input=X)
    with pytest.raises(RuntimeError, match=f"cnnkern::bn_add_act: {message}"):
        WAYS[way](lambda input: functional.batch_norm_add_relu(input, other, *vectors, training=True))(input=X)
    assert torch.equal(torch.stack(vectors), torch.tensor([[0.0], [1.0]]).expand(2, 5))


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_activation_is_refused_however_it_is_differentiated(way):
    arguments = batch_norm(act="tanh")
    with pytest.raises(ValueError, match="act must be one of"):
        WAYS[way](functional.batch_norm_act)(**arguments)
    assert torch.equal(arguments["running_mean"], torch.zeros(5))


ON_META = {
    "bn_act": (BATCH_NORM, functional.batch_norm_act, F.batch_norm, batch_norm()),
    "layer_norm": (
        LAYER_NORM,
        functional.layer_norm,
        F.layer_norm,
        {"input": X, "normalized_shape": (3,), "weight": torch.ones(3), "bias": torch.zeros(3)},
    ),
    "layer_norm2d": (
        LAYER_NORM2D,
        functional.layer_norm2d,
        reference.layer_norm2d,
        {"input": X, "weight": torch.ones(5), "bias": torch.zeros(5)},
    ),
}


@pytest.mark.parametrize(
    ("name", "misuse"), [(n, m) for n, row in ON_META.items() for m in row[0] if "device" not in m]
)
def test_meta_tensors_are_refused_as_real_ones_are(name, misuse):
    table, ours, theirs, arguments = ON_META[name]
    others, shared = table[misuse]
    real = {n: v.clone() if isinstance(v, Tensor) else v for n, v in (arguments | others).items()}
    with pytest.raises(Exception, match=shared) as expected:
        theirs(**real)
    with pytest.raises(expected.type, match=f"cnnkern::{name}"):
        ours(**{n: v.to("meta") if isinstance(v, Tensor) else v for n, v in real.items()})


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_running_statistics_that_want_a_gradient_are_refused(which):
    arguments = batch_norm(**{which: torch.ones(5, requires_grad=True)})
    with pytest.raises(RuntimeError, match="not differentiable"):
        F.batch_norm(**arguments)
    for way in (lambda function: function, *WAYS.values()):
        with pytest.raises(RuntimeError, match=f"not differentiable.*{which}"):
            way(functional.batch_norm_act)(**arguments)
    with pytest.raises(RuntimeError, match=f"cnnkern::bn_add_act: .* not differentiable; got a {which}"):
        functional.batch_norm_add_act(**arguments, residual=X)
    with torch.no_grad():
        functional.batch_norm_act(**arguments)
