"""`cnnkern.convert` and `fold` on timm's models, including timm's custom norm layers."""

import copy
import pickle
import sys

import pytest
import timm
import torch
from torch import nn

import cnnkern
from tests.child import run_child
from tests.poolings import with_poolings

# What is replaced: every batch norm and layer norm but those named in LEFT.
MODELS = {
    "resnet18": {"BatchNorm + ReLU": 9, "BatchNorm + add + ReLU": 8, "BatchNorm": 3},
    "resnetv2_50": None,  # norms before convolutions
    "efficientnet_b0": {"BatchNorm + SiLU": 33, "BatchNorm + add": 9, "BatchNorm": 7, "GroupedConv2d": 16},
    "mobilenetv3_small_050": {
        "BatchNorm + Hardswish": 18,
        "BatchNorm + ReLU": 5,
        "BatchNorm + add": 7,
        "BatchNorm": 4,
        "GroupedConv2d": 11,
    },
    "regnety_002": {"BatchNorm + ReLU": 27, "BatchNorm + add + ReLU": 13, "BatchNorm": 4, "GroupedConv2d": 13},
    "convnext_atto": {"LayerNorm2d": 17, "GroupedConv2d": 12},
    "densenet121": {"BatchNorm + ReLU": 121},
    "vit_tiny_patch16_224": None,
    "mobilenetv2_050": None,
    "dla34": None,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 64} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=3, **size)


@pytest.mark.parametrize("name", MODELS)
def test_converts_and_reverts(name):
    model = build(name)
    x = torch.randn(2, 3, 64, 64)
    converted = cnnkern.convert(model, verify=x)
    ran = cnnkern.convert(copy.deepcopy(model))
    ran(x)[0].sum().backward()
    counts = cnnkern.conversion_report(ran).counts
    assert MODELS[name] is None or counts == with_poolings(MODELS[name], model)
    assert "not converted" not in counts
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.LayerNorm)]
    assert sum(n for kind, n in counts.items() if "Norm" in kind) == len(norms)
    assert list(converted.state_dict()) == list(model.state_dict())
    reverted = cnnkern.revert(converted)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    for other in (pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted), cnnkern.convert(converted)):
        assert torch.equal(other.eval()(x), copy.deepcopy(converted).eval()(x))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv3_small_050"])
def test_folds(name):
    model = build(name).double()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64, dtype=torch.float64))  # statistics of some images
        model.eval()
        folded = cnnkern.fold(model)
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-7, atol=1e-9)
    counts = cnnkern.conversion_report(folded).counts
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert sum(n for kind, n in counts.items() if kind.startswith("Conv + BatchNorm")) == norms


class Unusual(nn.Module):
    """Batch norms whose drop or activation no operator of ours computes with them."""

    def __init__(self) -> None:
        super().__init__()
        layer = timm.layers.BatchNormAct2d
        self.dropped = layer(4, drop_layer=nn.Dropout2d)
        self.steep = layer(4, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.2})
        self.hooked = layer(4)
        self.hooked.act.register_forward_hook(lambda *_: None)
        self.without = layer(4, apply_act=False)

    def forward(self, x):
        return self.without(self.hooked(self.steep(self.dropped(x))))


def test_what_no_operator_computes_runs_behind_it():
    model = Unusual()
    converted = cnnkern.convert(model, verify=torch.randn(3, 4, 5, 6))
    assert cnnkern.conversion_report(converted).counts == {"BatchNorm": 4}
    assert all(isinstance(m, timm.layers.BatchNormAct2d) for m in converted.children())


def test_synchronised_and_compiled():
    model = build("mobilenetv3_small_050").eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    compiled = torch.compile(cnnkern.convert(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-6)
    synchronised = cnnkern.nn.convert_sync_batchnorm(cnnkern.convert(model))
    assert isinstance(synchronised.bn1, cnnkern.nn.SyncBatchNorm)
    torch.testing.assert_close(synchronised(x), expected, rtol=1e-4, atol=1e-6)
    assert type(cnnkern.revert(synchronised).bn1) is timm.layers.norm_act.SyncBatchNormAct
    torch.testing.assert_close(pickle.loads(pickle.dumps(synchronised))(x), synchronised(x))


def test_a_pickle_brings_timm_along(tmp_path):
    converted = cnnkern.convert(build("efficientnet_b0")).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.save((converted, x, converted(x)), tmp_path / "model.pt")
    code = (
        "import torch; m, x, y = torch.load('model.pt', weights_only=False)\n"
        "torch.testing.assert_close(m(x), y); print(type(m.bn1).__module__)"
    )
    done = run_child([sys.executable, "-c", code], cwd=tmp_path, timeout=120)
    assert done.stdout.strip() == "cnnkern.conversion.timm_layers", done.stderr


def test_without_timm_nothing_imports_it():
    code = "import sys, torch, cnnkern; cnnkern.convert(torch.nn.BatchNorm2d(3)); assert 'timm' not in sys.modules"
    done = run_child([sys.executable, "-c", code], timeout=120)
    assert done.returncode == 0, done.stderr
