"""Grouped convolution as a user calls it: the arguments and errors of F.conv2d, and the modules.

The numbers of its kernels are in test_grouped_conv2d.py.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnkern
from cnnkern import functional, testing
from cnnkern.nn import GroupedConv2d, LazyGroupedConv2d
from tests.twins import assert_as_good_as_twin


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own
def test_arguments_of_every_form(generator):
    x, w = testing.randn((2, 6, 9, 8), generator, torch.float32), testing.randn((6, 1, 3, 3), generator, torch.float32)
    for keywords in (
        {"stride": (2,), "padding": [1, 0]},
        {"stride": (1, 2), "padding": (1, 1)},
        {"stride": np.int64(2), "padding": torch.Size([1, 0])},
        {"padding": "same"},
        {"padding": "valid", "stride": 2},
        {"padding": "same", "dilation": 2},
        {"dilation": (1, 2)},
    ):
        torch.testing.assert_close(functional.conv2d(x, w, groups=6, **keywords), F.conv2d(x, w, groups=6, **keywords))
    even = testing.randn((6, 1, 4, 2), generator, torch.float32)
    torch.testing.assert_close(
        functional.conv2d(x, even, padding="same", groups=6), F.conv2d(x, even, padding="same", groups=6)
    )


@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_complex_numbers(padding, generator):
    for shape in ((2, 6, 9, 8), (6, 9, 8)):
        tensors = [testing.randn((*s, 2), generator, torch.float32) for s in (shape, (6, 1, 3, 3), (6,))]
        results = []
        for conv2d in (functional.conv2d, F.conv2d):
            leaves = [torch.view_as_complex(t).requires_grad_() for t in tensors]
            y = conv2d(*leaves, padding=padding, groups=6)
            results.append((y, *torch.autograd.grad(y.abs().sum(), leaves)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_whole_numbers(generator):
    x, w = (torch.randint(-9, 9, shape, generator=generator) for shape in ((2, 6, 9, 8), (6, 1, 3, 3)))
    assert torch.equal(functional.conv2d(x, w, padding=1, groups=6), F.conv2d(x, w, padding=1, groups=6))


# (shape of the input, of the weight, other arguments, what both messages say)
IMAGES, DEPTHWISE = (2, 6, 5, 5), (6, 1, 3, 3)
ERRORS = [
    (IMAGES, DEPTHWISE, {"groups": 4}, "expected weight to be divisible by 4"),
    (IMAGES, (7, 3, 3, 3), {"groups": 2}, "expected weight to be divisible by 2"),
    (IMAGES, DEPTHWISE, {"groups": 3}, "expected input.* to have 3 channels, but got 6 channels"),
    ((2, 5, 5, 5), DEPTHWISE, {"groups": 6}, "expected input.* to have 6 channels, but got 5 channels"),
    ((5, 5, 5), DEPTHWISE, {"groups": 6}, "expected input.* to have 6 channels, but got 5 channels"),
    ((2, 5, 5, 5), (5, 1, 3, 3), {"groups": 2}, "expected weight to be divisible by 2"),
    (IMAGES, (0, 1, 3, 3), {"groups": 6}, "expected weight to be at least 6"),
    (IMAGES, (6, 0, 3, 3), {"groups": 6}, "expected input.* to have 0 channels, but got 6 channels"),
    (IMAGES, (6, 1, 0, 3), {"groups": 6}, "could not create a primitive descriptor"),
    (IMAGES, (6, 1, 7, 7), {"groups": 6}, r"input size per channel: \(5 x 5\)\. Kernel size: \(7 x 7\)"),
    (IMAGES, (6, 1, 8, 3), {"groups": 6, "padding": 1}, r"input size per channel: \(7 x 7\)\. Kernel size: \(8 x 3\)"),
    (IMAGES, DEPTHWISE, {"groups": 6, "dilation": 3}, r"input size per channel: \(5 x 5\)\. Kernel size: \(7 x 7\)"),
    ((2, 6, 0, 5), DEPTHWISE, {"groups": 6}, r"input size per channel: \(0 x 5\)\. Kernel size: \(3 x 3\)"),
    (IMAGES, (6, 1, 3), {"groups": 6}, r"expected stride to be .* list of 1 values"),
    ((6, 5, 5), (6, 1, 3), {"groups": 6}, r"expected stride to be .* list of 1 values"),
    (IMAGES, (6, 1, 3), {"groups": 6, "padding": "same"}, "3-dimensional weight"),
    ((6, 5), DEPTHWISE, {"groups": 6}, r"Expected 3D \(unbatched\) or 4D \(batched\) input"),
    ((2, 6, 5, 5, 5), DEPTHWISE, {"groups": 6}, r"Expected 3D \(unbatched\) or 4D \(batched\) input"),
    ((2, 6, 5, 5, 5), (6, 1, 3, 3, 3), {"groups": 6}, r"Expected 3D \(unbatched\) or 4D \(batched\) input"),
    (IMAGES, DEPTHWISE, {"groups": 6, "stride": 0}, "non-positive stride"),
    (IMAGES, DEPTHWISE, {"groups": 6, "dilation": 0}, "non-positive dilation"),
    (IMAGES, DEPTHWISE, {"groups": 6, "padding": -1}, "negative padding"),
    (IMAGES, DEPTHWISE, {"groups": 6, "stride": (1, 1, 1)}, "expected stride to be"),
    (IMAGES, DEPTHWISE, {"groups": 6, "padding": (1, 1, 1)}, "expected padding to be"),
    (IMAGES, DEPTHWISE, {"groups": 6, "dilation": ()}, "expected dilation to be"),
    (IMAGES, DEPTHWISE, {"groups": 6, "padding": "same", "stride": 2}, "padding='same'.* stride"),
    (IMAGES, DEPTHWISE, {"groups": 6, "padding": "some"}, "padding.* 'some'"),
    (IMAGES, DEPTHWISE, {"groups": 0}, "non-positive groups"),
    (IMAGES, DEPTHWISE, {"groups": -1}, "non-positive groups"),
]


@pytest.mark.parametrize(("shape", "weight", "keywords", "message"), ERRORS, ids=str)
def test_the_same_errors_as_torch(shape, weight, keywords, message):
    x, w = torch.randn(shape), torch.randn(weight)
    with pytest.raises(RuntimeError, match=message):
        F.conv2d(x, w, **keywords)
    with pytest.raises(RuntimeError, match=message):
        functional.conv2d(x, w, **keywords)


def test_a_bias_or_a_dtype_that_does_not_fit():
    x, w = torch.randn(IMAGES), torch.randn(DEPTHWISE)
    for arguments, message in (
        ((x, w, torch.randn(5)), "expected bias to be 1-dimensional with 6 elements"),
        ((x, w, torch.randn(6, 1)), "expected bias to be 1-dimensional with 6 elements"),
        ((x, w.double()), "should be the same"),
        ((x, torch.complex(w, w)), "should be the same"),
        ((torch.complex(x, x), w), "should be the same"),
        ((x.double(), w), "expected scalar type Double but found Float"),
        ((x, w, torch.randn(6).double()), "should be the same"),
    ):
        for conv2d in (F.conv2d, functional.conv2d):
            with pytest.raises(RuntimeError, match=message):
                conv2d(*arguments, groups=6)
    with pytest.raises(RuntimeError, match="dy must be"):
        torch.ops.cnnkern.grouped_conv2d_backward(x[:1], x, w, [1, 1], [1, 1], [1, 1], 6, [True] * 3)


def test_autocast_runs_in_the_lower_precision(generator):
    inputs = testing.CASES["grouped_conv2d"].inputs((2, 8, 6, 6), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = functional.conv2d(**inputs), F.conv2d(**inputs)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


SETTINGS = [
    {"kernel_size": 3, "padding": 1, "groups": 8},
    {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2, "bias": False},
    {"kernel_size": (3, 5), "padding": "same", "groups": 8},
    {"kernel_size": 3, "padding": "valid", "groups": 8},
    {"kernel_size": 3, "padding": 1, "groups": 8, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (2, 1), "groups": 4, "padding_mode": "circular"},
    {"kernel_size": 5, "padding": 3, "groups": 8, "stride": 2, "padding_mode": "replicate"},
    {"kernel_size": (3, 5), "padding": "same", "groups": 8, "padding_mode": "reflect"},
    {"kernel_size": (4, 3), "padding": "same", "groups": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "valid", "groups": 8, "padding_mode": "replicate"},
    {"kernel_size": 1},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_module_beside_its_twin(settings):
    torch.manual_seed(0)
    theirs, ours = nn.Conv2d(8, 8, **settings), GroupedConv2d(8, 8, **settings)
    assert isinstance(ours, nn.Conv2d)
    assert repr(ours) == repr(theirs).replace("Conv2d", "GroupedConv2d")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 9, 10)
    for images in (x, x.contiguous(memory_format=torch.channels_last), x[0]):
        assert_as_good_as_twin(ours, theirs, images)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    torch.testing.assert_close(copy.deepcopy(ours).double()(x.double()), copy.deepcopy(theirs).double()(x.double()))
    assert GroupedConv2d(8, 8, device="meta", **settings)(x.to("meta")).shape == theirs(x).shape
    trained = GroupedConv2d(8, 8, **settings)
    theirs.load_state_dict(trained.state_dict())
    assert_as_good_as_twin(trained, theirs, x)


def test_complex_module():
    theirs, ours = (m(8, 8, 3, padding=1, groups=8, dtype=torch.complex64) for m in (nn.Conv2d, GroupedConv2d))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 9, 10, dtype=torch.complex64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("shape", [(2, 8, 9, 10), (8, 9, 10)], ids=str)
def test_lazy_module_beside_its_twin(shape):
    torch.manual_seed(0)
    theirs, ours = (m(8, 3, groups=4, padding=1) for m in (nn.LazyConv2d, LazyGroupedConv2d))
    x = torch.randn(shape)
    theirs(x)
    assert ours.has_uninitialized_params()
    ours(x)
    assert type(ours) is GroupedConv2d
    assert repr(ours) == repr(theirs).replace("Conv2d", "GroupedConv2d")
    ours.load_state_dict(theirs.state_dict())
    assert_as_good_as_twin(ours, theirs, x)


def test_lazy_module_takes_a_checkpoint_before_its_first_input():
    torch.manual_seed(0)
    theirs = nn.Conv2d(8, 8, 3, groups=4, padding=1)
    x = torch.randn(2, 8, 9, 10)
    ours, lazy = (m(8, 3, groups=4, padding=1) for m in (LazyGroupedConv2d, nn.LazyConv2d))
    for module in (ours, lazy):
        module.load_state_dict(theirs.state_dict())
        module(x)
    assert type(ours) is GroupedConv2d
    assert repr(ours) == repr(lazy).replace("Conv2d", "GroupedConv2d")
    assert_as_good_as_twin(ours, theirs, x)
    untouched = LazyGroupedConv2d(8, 3, groups=4, padding=1)
    untouched.load_state_dict(LazyGroupedConv2d(8, 3, groups=4, padding=1).state_dict())
    assert untouched.has_uninitialized_params()


def test_converter_exchanges_grouped_convolutions_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
    converted = cnnkern.convert(model, verify=torch.randn(2, 3, 6, 6))
    assert [type(m) for m in converted][:2] == [nn.Conv2d, GroupedConv2d]
    assert cnnkern.conversion_report(converted).counts == {"BatchNorm": 1, "GroupedConv2d": 1}
    assert type(cnnkern.revert(converted)[1]) is nn.Conv2d
