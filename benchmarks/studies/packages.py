"""Models of other packages, without weights: what `fusions.py` converts. A generator for each package."""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Model:
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None  # of its input; an image where it is None


class Detector(nn.Module):
    """torchvision's detectors in training take images and what is in them."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: torch.Tensor) -> Any:
        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]], device=x.device, dtype=x.dtype)
        return self.detector(list(x), [{"boxes": boxes, "labels": torch.tensor([1])} for _ in x])


def torchvision_models() -> Iterator[Model]:
    models = importlib.import_module("torchvision.models")
    for name in models.list_models(module=models):
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        yield Model(name, lambda name=name, extra=extra: models.get_model(name, weights=None, **extra))
    none = {"weights": None, "weights_backbone": None}
    for name in models.list_models(module=models.segmentation):
        yield Model(name, lambda name=name: models.get_model(name, **none))
    for name in ("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn_v2"):
        yield Model(name, lambda name=name: Detector(models.get_model(name, **none)))
    for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d"):
        yield Model(name, lambda name=name: models.get_model(name, weights=None), (2, 3, 16, 64, 64))


def timm_models() -> Iterator[Model]:
    timm = importlib.import_module("timm")
    seen = set()
    for name in timm.list_models():  # one of each module: its others differ in depth and width
        module = timm.models._registry._model_to_module[name]
        family = (module, name.split("_")[0].rstrip("0123456789"))
        if family not in seen:
            seen.add(family)
            yield Model(name, lambda name=name: timm.create_model(name))


def pytorchcv_models() -> Iterator[Model]:
    provider = importlib.import_module("pytorchcv.model_provider")
    seen = set()
    for name, build in provider._models.items():
        if build.__module__ not in seen:
            seen.add(build.__module__)
            if name.endswith("_cityscapes"):  # made for 1024 x 2048 pixels, which take more than 9 GB in training
                build = functools.partial(build, in_size=(256, 512))
            yield Model(name, build, (2, 1, 320, 240) if name == "pfpcnet" else None)


def smp_models() -> Iterator[Model]:
    smp = importlib.import_module("segmentation_models_pytorch")
    decoders = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN")
    for name in (*decoders, "UPerNet", "Segformer"):
        yield Model(name, lambda name=name: getattr(smp, name)("resnet18", encoder_weights=None))
    seen = set()
    for encoder, spec in smp.encoders.encoders.items():
        family = spec["encoder"].__name__
        if family not in seen:
            seen.add(family)
            yield Model(f"Unet({encoder})", lambda encoder=encoder: smp.Unet(encoder, encoder_weights=None))


def torchreid_models() -> Iterator[Model]:
    models = importlib.import_module("torchreid.reid.models")
    seen = set()
    for name, build in models.__model_factory.items():
        if build.__module__ not in seen:
            seen.add(build.__module__)
            size = {"hacnn": (160, 64), "inceptionv4": (128, 128), "inceptionresnetv2": (128, 128)}.get(
                name, (256, 128)
            )
            yield Model(name, lambda build=build: build(10, loss="softmax", pretrained=False), (2, 3, *size))


def ultralytics_models() -> Iterator[Model]:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    kinds = {"-cls": "Classification", "-seg": "Segmentation", "-pose": "Pose", "-obb": "OBB"}
    names = [
        "yolov3-tiny",
        "yolov5n",
        "yolov6n",
        "yolov8n",
        "yolov8n-ghost",
        "yolov8n-p2",
        "yolov9t",
        "yolov9c",
        "yolov10n",
    ]
    names += [
        "yolov8n-cls",
        "yolov8-cls-resnet50",
        "yolov8n-seg",
        "yolov8n-pose",
        "yolov8n-obb",
        "yolo11n",
        "yolo11n-cls",
    ]
    names += ["yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo12n", "yolo12n-seg", "yolo26n", "yolo26n-cls"]
    for name in names:
        kind = next((kind for end, kind in kinds.items() if end in name), "Detection")
        yield Model(name, lambda name=name, kind=kind: getattr(tasks, f"{kind}Model")(f"{name}.yaml", verbose=False))


def geffnet_models() -> Iterator[Model]:
    geffnet = importlib.import_module("geffnet")
    names = (
        "mnasnet_050 mnasnet_a1 mnasnet_small mobilenetv2_100 fbnetc_100 spnasnet_100 efficientnet_b0 efficientnet_b1 "
    )
    names += (
        "efficientnet_es efficientnet_cc_b0_4e efficientnet_lite0 tf_efficientnet_b0 tf_efficientnet_lite0 mixnet_s "
    )
    names += "mixnet_m tf_mixnet_s mobilenetv3_rw mobilenetv3_small_100 mobilenetv3_large_100 tf_mobilenetv3_small_100 "
    names += "tf_mobilenetv3_small_minimal_100"
    for name in names.split():
        yield Model(name, lambda name=name: geffnet.create_model(name))


def monai_models() -> Iterator[Model]:
    nets = importlib.import_module("monai.networks.nets")
    steps = {"channels": (4, 8, 16), "strides": (2, 2)}
    flat, solid = {"spatial_dims": 2, "in_channels": 3}, {"spatial_dims": 3, "in_channels": 1}
    volume = (2, 1, 32, 32, 32)

    def net(name: str, shape: tuple[int, ...] | None = None, **options: Any) -> Model:
        return Model(name, lambda: getattr(nets, name)(**options), shape)

    for where, shape in ((flat, None), (solid, volume)):
        both = {**where, "out_channels": 2}
        yield net("UNet", shape, **both, **steps, norm="batch", num_res_units=2)
        yield net("UNet", shape, **both, **steps, norm="batch", act="relu", num_res_units=0)
        yield net("AttentionUnet", shape, **both, **steps)
        yield net("BasicUNet", shape, **both, features=(8, 8, 16, 16, 32, 8), norm="batch")
        yield net("BasicUNetPlusPlus", shape, **both, features=(8, 8, 16, 16, 32, 8), norm="batch")
        yield net("DenseNet121", shape, **both)
        yield net("SegResNet", shape, **both, init_filters=8, norm="batch")
        yield net("SegResNetDS", shape, **both, init_filters=8, norm="batch")
        yield net(
            "DynUNet",
            shape,
            **both,
            kernel_size=[3, 3, 3],
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            norm_name="batch",
        )
        yield net("VNet", shape, **both)
        channels = where["in_channels"]
        yield net("SEResNet50", shape, **where, num_classes=2)
        yield net("SEResNext50", shape, **where, num_classes=2)
        yield net("ResNet", shape, block="basic", layers=[1, 1, 1, 1], block_inplanes=[8, 16, 32, 64],
                  spatial_dims=where["spatial_dims"], n_input_channels=channels, num_classes=2)  # fmt: skip
        yield net("ResNet", shape, block="bottleneck", layers=[1, 1, 1, 1], block_inplanes=[8, 16, 32, 64],
                  spatial_dims=where["spatial_dims"], n_input_channels=channels, num_classes=2)  # fmt: skip
        yield net("HighResNet", shape, **both, norm_type="batch")
        yield net("EfficientNetBN", shape, model_name="efficientnet-b0", pretrained=False, **where, num_classes=2)
        yield net("RegUNet", shape, **where, num_channel_initial=8, depth=2)
    yield net("AHNet", volume, layers=(3, 4, 6, 3), spatial_dims=3, in_channels=1, out_channels=2)
    yield net("FlexibleUNet", in_channels=3, out_channels=2, backbone="efficientnet-b0")
    yield net("FlexibleUNet", in_channels=3, out_channels=2, backbone="resnet18")
    yield net("HoVerNet", (2, 3, 256, 256), mode="fast", in_channels=3, out_classes=3)
    yield net("DAF3D", volume, in_channels=1, out_channels=2)
    yield net("AutoEncoder", **flat, out_channels=2, **steps, norm="batch")


def transformers_models() -> Iterator[Model]:
    hf = importlib.import_module("transformers")
    backbones = (
        "ResNet",
        "RegNet",
        "MobileNetV1",
        "MobileNetV2",
        "EfficientNet",
        "Levit",
        "Cvt",
        "MobileViT",
        "MobileViTV2",
    )
    for name in (*backbones, "SwiftFormer", "TextNet", "HGNetV2", "PPLCNet", "PPLCNetV3", "PPLCNetV4", "UVDoc"):
        for kind in ("ForImageClassification", "Model", "Backbone"):
            if hasattr(hf, f"{name}{kind}") and hasattr(hf, f"{name}Config"):
                size = {"size": 224} if name == "Levit" else {}

                def build(name: str = name, kind: str = kind) -> nn.Module:
                    return getattr(hf, f"{name}{kind}")(getattr(hf, f"{name}Config")())

                yield Model(f"{name}{kind}", build, (2, 3, size["size"], size["size"]) if size else None)
                break
    small = {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 10}

    def detector(name: str, **options: Any) -> Model:
        return Model(
            name, lambda: getattr(hf, name)(getattr(hf, name.replace("Model", "Config"))(**options)), (2, 3, 128, 128)
        )

    for name in ("RTDetrModel", "RTDetrV2Model", "DFineModel"):
        yield detector(name, **small)
    yield Model("SegformerForSemanticSegmentation", lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig()))
    resnet = {"backbone_config": lambda: hf.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])}
    yield Model(
        "UperNetForSemanticSegmentation",
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(backbone_config=resnet["backbone_config"](), auxiliary_in_channels=1024)
        ),
    )


def mmpretrain_models() -> Iterator[Model]:
    importlib.import_module("mmpretrain.models")
    registry = importlib.import_module("mmpretrain.registry").MODELS
    options: dict[str, list[dict[str, Any]]] = {
        "ResNet": [{"depth": 18}, {"depth": 50}],
        "ResNetV1c": [{"depth": 50}],
        "ResNetV1d": [{"depth": 50}],
        "ResNet_CIFAR": [{"depth": 18}],
        "ResNeXt": [{"depth": 50}],
        "SEResNet": [{"depth": 50}],
        "SEResNeXt": [{"depth": 50}],
        "ResNeSt": [{"depth": 50}],
        "Res2Net": [{"depth": 50}],
        "VGG": [{"depth": 11, "norm_cfg": {"type": "BN"}}],
        "RepVGG": [{"arch": "A0"}],
        "HRNet": [{"arch": "w18"}],
        "RegNet": [{"arch": "regnetx_400mf"}],
        "EfficientNet": [{"arch": "b0"}],
        "EfficientNetV2": [{"arch": "s"}],
        "DenseNet": [{"arch": "121"}],
        "MobileOne": [{"arch": "s0"}],
        "MobileViT": [{"arch": "small"}],
        "EfficientFormer": [{"arch": "l1"}],
        "VAN": [{"arch": "tiny"}],
        "ConvMixer": [{"arch": "768/32"}],
        "CSPDarkNet": [{"depth": 53}],
        "CSPResNet": [{"depth": 50}],
        "CSPResNeXt": [{"depth": 50}],
        "LeViT": [{"arch": "128s", "img_size": 224}],
        "RepLKNet": [{"arch": "31B"}],
        "RepMLPNet": [{"arch": "B", "img_size": 224}],
        "Conformer": [{"arch": "tiny"}],
        "Vig": [{"arch": "tiny"}],
        "PyramidVig": [{"arch": "tiny"}],
    }
    for name in ("MobileNetV2", "MobileNetV3", "ShuffleNetV1", "ShuffleNetV2", "InceptionV3"):
        options[name] = [{}]
    for name, choices in options.items():
        for choice in choices:
            size = (2, 3, 224, 224) if name in ("LeViT", "RepMLPNet", "PyramidVig", "Vig", "Conformer") else None
            title = f"{name}({', '.join(str(v) for v in choice.values())})"
            yield Model(title, lambda name=name, choice=choice: registry.build({"type": name, **choice}), size)


PACKAGES: dict[str, Callable[[], Iterator[Model]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "pytorchcv": pytorchcv_models,
    "ultralytics": ultralytics_models,
    "segmentation_models_pytorch": smp_models,
    "monai": monai_models,
    "transformers": transformers_models,
    "mmpretrain": mmpretrain_models,
    "geffnet": geffnet_models,
    "torchreid": torchreid_models,
}
