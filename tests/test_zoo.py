"""`cnnkern zoo`: the table of all models, and the layers of one."""

import pytest

from cnnkern import cli, zoo, zoo_compare
from cnnkern.models import create_model, get_builder, list_models
from tests.zoo import IMAGENET_PARAMETERS, PARAMETERS


def test_zoo_lists_every_model_with_the_parameters_that_it_should_have(monkeypatch, capsys):
    monkeypatch.setattr("cnnkern.zoo.flops", lambda name, size: 5e8)  # counting takes long; the next test counts
    assert cli.main(["zoo"]) == 0
    heading, *lines, note = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heading == ["model", "input", "parameters", "GFLOP", "fused", "layers", "what", "it", "is"]
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
    assert "lenet 1x28x28 61,706 0.001 none LeNet with sigmoids and average pooling" in map(" ".join, lines)
    resnet = next(line for line in lines if line[0] == "resnet18")
    assert resnet[1:4] == ["3x224x224", "11,689,512", "3.628"]
    layers, said = "9 BatchNormReLU2d, 8 BatchNormAddReLU2d, 3 BatchNorm2d, 1 MaxPool2d", "residual blocks of two 3x3"
    assert " ".join(resnet[4:]).startswith(f"{layers} ResNet-18: {said}")


@pytest.mark.parametrize("name", list_models())
def test_every_model_says_what_it_is(name):
    assert 12 <= len(zoo.about(name)) <= 90
    assert "parameters" not in zoo.about(name)


def test_zoo_show_prints_the_layers(capsys):
    assert cli.main(["zoo", "show", "resnet18", "--input", "1,96,96"]) == 0
    said = capsys.readouterr().out
    assert "BatchNormAddReLU2d (bn2)" in said
    for shape in ("[1, 64, 24, 24]", "[1, 128, 12, 12]", "[1, 256, 6, 6]", "[1, 512, 3, 3]", "[1, 1000]"):
        assert shape in said
    assert cli.main(["zoo", "show", "lenet", "--eager"]) == 0


def test_zoo_says_what_it_cannot_show(capsys):
    assert cli.main(["zoo", "show", "lenet", "--input", "1,8,8"]) == 1
    assert "cnnkern: lenet does not accept an input of 1x8x8 (usual: 1x28x28)" in capsys.readouterr().err
    assert cli.main(["zoo", "show", "letnet"]) == 1
    assert "did you mean" in capsys.readouterr().err
    for wrong in ("8,8", "1,2,x", "0,8,8", "1,8,8,8"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["zoo", "show", "lenet", "--input", wrong])
        assert "such as 1,96,96" in capsys.readouterr().err


def test_compare_trains_models_on_the_same_images_and_draws_them(tmp_path, capsys):
    names, out = ["lenet_relu", "simple_resnet"], tmp_path / "compared"
    assert cli.main(["zoo", "compare", *names, names[0], "--epochs", "2", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("epoch 2/2") == 2, "a model named twice is trained once"
    assert f"{out / 'compare.png'}" in said
    lines = {line.split()[0]: line.split() for line in said.splitlines() if line.endswith(tuple("0123456789"))}
    for name in names:
        curves = zoo_compare.read(out / name / "epochs.csv")
        assert [row["epoch"] for row in curves] == [1, 2]
        parameters = sum(p.numel() for p in create_model(name, num_classes=10, in_channels=1).parameters())
        last = curves[-1]
        assert lines[name][1:4] == [f"{parameters:,}", f"{last['test_loss']:.4f}", f"{last['test_accuracy']:.2%}"]
    with pytest.importorskip("PIL.Image").open(out / "compare.png") as image:
        assert image.width > image.height > 500


def test_compare_says_what_it_cannot_train(tmp_path, capsys):
    assert cli.main(["zoo", "compare", "lenet", "letnet", "--output", str(tmp_path)]) == 1
    assert "no model is called 'letnet': did you mean" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert cli.main(["zoo", "compare", "lenet_relu", "--side", "8", "--output", str(tmp_path)]) == 1
    assert "lenet_relu cannot train on 64x1x8x8" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["zoo", "compare", "lenet_relu", "--epochs", "0"])
    assert "expected a whole number above 0; got '0'" in capsys.readouterr().err
