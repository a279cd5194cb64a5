"""`cnnkern zoo`: the table of all models, and the layers of one."""

import pytest

from cnnkern import cli
from cnnkern.models import get_builder, list_models
from tests.zoo import IMAGENET_PARAMETERS, PARAMETERS


def test_zoo_lists_every_model_with_the_parameters_that_it_should_have(monkeypatch, capsys):
    monkeypatch.setattr("cnnkern.zoo.flops", lambda name, size: 5e8)  # counting takes long; the next test counts
    assert cli.main(["zoo"]) == 0
    heading, *lines, note = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heading == ["model", "input", "parameters", "GFLOP", "fused", "layers"]
    assert note[0] == "GFLOP:"
    assert [line[0] for line in lines] == list_models()
    facts = IMAGENET_PARAMETERS | {name: n for (name, _), n in PARAMETERS.items() if not name.startswith("vgg")}
    for name, size, parameters, gflop, *layers in lines:
        assert size == "x".join(map(str, get_builder(name).input_size))
        assert gflop == "0.500"
        assert layers, f"{name}: neither layers nor `none`"
        if name in facts:
            assert parameters == f"{facts[name]:,}", name


def test_zoo_lists_models_with_parameters_operations_and_fused_layers(monkeypatch, capsys):
    monkeypatch.setattr("cnnkern.zoo.list_models", lambda: ["lenet", "resnet18"])
    assert cli.main(["zoo"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["lenet", "1x28x28", "61,706", "0.001", "none"] in lines
    resnet = next(line for line in lines if line[0] == "resnet18")
    assert resnet[1:4] == ["3x224x224", "11,689,512", "3.628"]
    assert " ".join(resnet[4:]) == "9 BatchNormReLU2d, 8 BatchNormAddReLU2d, 3 BatchNorm2d, 1 MaxPool2d"


def test_zoo_show_prints_the_layers(capsys):
    assert cli.main(["zoo", "show", "resnet18", "--input", "1,96,96"]) == 0
    said = capsys.readouterr().out
    assert "BatchNormAddReLU2d (bn2)" in said
    for shape in ("[1, 64, 24, 24]", "[1, 128, 12, 12]", "[1, 256, 6, 6]", "[1, 512, 3, 3]", "[1, 1000]"):
        assert shape in said
    assert cli.main(["zoo", "show", "lenet", "--eager"]) == 0


def test_zoo_says_what_it_cannot_show(capsys):
    assert cli.main(["zoo", "show", "lenet", "--input", "1,8,8"]) == 1
    assert "cnnkern: lenet does not take an input of 1x8x8 (usual: 1x28x28)" in capsys.readouterr().err
    assert cli.main(["zoo", "show", "letnet"]) == 1
    assert "did you mean" in capsys.readouterr().err
    for wrong in ("8,8", "1,2,x", "0,8,8", "1,8,8,8"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["zoo", "show", "lenet", "--input", wrong])
        assert "such as 1,96,96" in capsys.readouterr().err
