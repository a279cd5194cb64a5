"""Names of the zoo and its facts, for the tests of models and of `cnnkern zoo`."""

import itertools

import torchvision
from torch import nn

from cnnkern.models import list_models


def small_vgg(name: str, classes: int) -> nn.Module:
    """torchvision's, without the 120 million weights of its linear layers, which are a gigabyte in float64."""
    model = torchvision.models.get_model(name, weights=None, init_weights=False, num_classes=1)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    sizes = (512, 64, 64, classes)
    for i, (fan_in, fan_out) in zip((0, 3, 6), itertools.pairwise(sizes), strict=True):
        model.classifier[i] = nn.Linear(fan_in, fan_out)
    return model


OWN = {"alexnet", "googlenet"}  # torchvision's models of these names are others
TORCHVISION = [name for name in list_models() if hasattr(torchvision.models, name) and name not in OWN]

# 10 classes unless a number of classes is given; from the literature, or computed with plain PyTorch.
PARAMETERS = {
    ("lenet", 1): 61_706,
    ("lenet5_tanh", 1): 44_426,
    ("lenet_relu", 1): 61_706,
    ("lenet_wide", 1): 422_026,
    ("alexnet", 1): 46_764_746,
    ("vgg11", 1): 128_806_154,
    ("vgg13", 1): 128_990_666,
    ("vgg16", 1): 134_300_362,
    ("vgg19", 1): 139_610_058,
    ("nin", 1): 1_992_166,
    ("googlenet", 1): 5_977_530,
    ("bn_lenet", 1): 44_878,
    ("bn_lenet_residual", 3): 255_130,
    ("res_lenet", 3): 171_162,
    ("simple_resnet", 1): 56_586,
    ("densenet_small", 1): 758_226,
    ("regnet_x_tiny", 1): 179_290,
}
IMAGENET_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "regnet_x_400mf": 5_495_976,
    "regnet_y_400mf": 4_344_144,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    "shufflenet_v2_x1_0": 2_278_604,
    "convnext_tiny": 28_589_128,
}
