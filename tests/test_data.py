"""Data to train on: what is read, and what is said of files that are missing, damaged or no images."""

import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cnnkern import data


def test_digits_are_scikit_learns():
    found = data.load("digits")
    assert (len(found.train), len(found.test), found.channels, found.size) == (1437, 360, 1, 8)
    assert found.classes == [str(d) for d in range(10)]
    images, labels = found.train.__getitems__(list(range(1437)))
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-3
    assert labels.bincount().min() > 130
    assert data.load("digits", size=20).test.__getitems__([3, 5])[0].shape == (2, 1, 20, 20)


def test_digits_of_training_and_test_do_not_overlap():
    found = data.load("digits")
    train, test = ({i.numpy().tobytes() for i in part.images} for part in (found.train, found.test))
    assert not train & test


def test_augment_keeps_shapes_and_draws_from_the_seed():
    images = torch.randn(5, 2, 9, 9)
    torch.manual_seed(1)
    first = data.augment(images)
    torch.manual_seed(1)
    assert torch.equal(data.augment(images), first)
    assert first.shape == images.shape
    assert not torch.equal(first, images)
    # Smooth images move a little, and the mean of a constant one stays.
    assert torch.allclose(data.augment(torch.ones(3, 1, 8, 8)), torch.ones(3, 1, 8, 8))
    ramp = torch.linspace(0, 1, 28).expand(4, 1, 28, 28).contiguous()
    assert (data.augment(ramp) - ramp).abs().mean() < 0.2


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_files_are_read(mnist, name):
    folder, written = mnist
    found = data.load(name, folder)
    assert torch.equal(found.train.images[:, 0], written["train"])
    assert torch.equal(found.test.images[:, 0], written["t10k"])
    assert found.test.labels.tolist() == [0, 1, 2, 3]
    assert (len(found.classes), found.channels, found.size) == (10, 1, 28)
    images = found.train.__getitems__([0, 3])[0]
    expected = written["train"][[0, 3]].double() / 255
    deviation = (written["train"].double() / 255).std()
    torch.testing.assert_close(
        images[:, 0].double(), (expected - (written["train"] / 255.0).double().mean()) / deviation, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "header", "labels", "a label too high", "sizes"])
def test_damaged_mnist_files_are_one_clear_error(mnist, name, damage):
    folder, _ = mnist
    raw = folder / ("MNIST" if name == "mnist" else "FashionMNIST") / "raw"
    file = raw / "train-images-idx3-ubyte"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "header":
        file.write_bytes(b"not an idx file" * 400)
    elif damage == "a label too high":
        (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 4) + b"\x00\x01\x02\x0c")
    elif damage == "sizes":
        (raw / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 4, 20, 20) + bytes(1600))
    else:
        (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 2) + b"\x00\x01")
    with pytest.raises(data.DataError, match=rf"^{name}: the files in {re.escape(str(folder))} are missing or damaged"):
        data.load(name, folder)


def test_cifar_files_are_read(cifar):
    folder, images = cifar
    found = data.load("cifar10", folder)
    assert torch.equal(found.train.images, torch.from_numpy(images[:5].reshape(10, 3, 32, 32)))
    assert found.test.labels.tolist() == [5, 4]
    assert (found.classes[3], found.channels, found.size) == ("class 3", 3, 32)


def test_damaged_cifar_files_are_one_clear_error(cifar, monkeypatch):
    folder, _ = cifar
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(data.DataError, match=r"^cifar10: the files in .* are missing or damaged"):
        data.load("cifar10", folder)
    monkeypatch.undo()  # now the checksums count
    with pytest.raises(data.DataError, match=r"cifar10: .*not found or corrupted.*expected: .*data_batch_1"):
        data.load("cifar10", folder)


def test_missing_directories_and_names(tmp_path):
    with pytest.raises(data.DataError, match=r"no dataset is called 'imagenet'; there are digits, mnist"):
        data.load("imagenet")
    with pytest.raises(data.DataError, match=r"mnist: say with --data-dir where the files are: DIR/MNIST/raw"):
        data.load("mnist")
    with pytest.raises(data.DataError, match=r"folder: there is no directory .*absent"):
        data.load("folder", tmp_path / "absent")


# ---- folders ----------------------------------------------------------------------------------------------------


def picture(path, colour, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, red and blue, five training and two test images each."""
    for part, count in (("train", 5), ("test", 2)):
        for i in range(count):
            picture(tmp_path / part / "blue" / f"{i}.png", "blue")
            picture(tmp_path / part / "red" / "more" / f"{i}.jpg", "red")
    return tmp_path


def test_folder_of_train_and_test(folder):
    found = data.load("folder", folder, size=8)
    assert (len(found.train), len(found.test), found.classes) == (10, 4, ["blue", "red"])
    assert found.warnings == []
    images, labels = found.test.__getitems__([0, 3])
    assert images.shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 1]
    colours = images * torch.tensor(data.IMAGENET_STD).view(3, 1, 1) + torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1)
    expected = torch.tensor([[0.0, 0, 1], [1, 0, 0]])[:, :, None, None].expand(2, 3, 8, 8)
    torch.testing.assert_close(colours, expected, atol=0.02, rtol=0)


def test_folder_of_classes_alone_sets_a_fifth_aside(folder):
    found = data.load("folder", folder / "train", size=8)
    assert (len(found.train), len(found.test)) == (8, 2)
    assert not set(found.train.paths) & set(found.test.paths)
    assert data.load("folder", folder / "train", size=8).test.paths == found.test.paths


def test_unreadable_images_are_reported_with_their_path_and_counted(folder):
    good = (folder / "train" / "red" / "more" / "0.jpg").read_bytes()
    bad = {
        folder / "train" / "red" / "text.jpg": b"this is no picture",
        folder / "train" / "red" / "cut.jpg": good[: len(good) // 2],
        folder / "train" / "blue" / "empty.png": b"",
        folder / "train" / "blue" / "notes.txt": b"notes",
    }
    for path, content in bad.items():
        path.write_bytes(content)
    found = data.load("folder", folder, size=8)
    assert len(found.train) == 10
    assert found.warnings[0].endswith("4 of 14 files cannot be read as images and are skipped:")
    assert {line.partition(": ")[0] for line in found.warnings[1:]} == set(map(str, bad))
    # Images that lie beside the directories of the classes belong to none, whether they can be read or not.
    picture(folder / "stray.png", "red")
    picture(folder / "val" / "red" / "1.png", "red")  # the test set is test/
    picture(folder / "val" / "red" / "2.png", "red")
    (folder / "train" / "stray.jpg").write_bytes(b"")
    (folder / "test" / "without a suffix").write_bytes(good)
    for part in ("", "train"):
        (folder / part / "README.md").write_text("no image")
    found = data.load("folder", folder, size=8)
    assert (len(found.train), len(found.test)) == (10, 4)
    left_out = "images that are outside the class directories are skipped:"
    assert [line for line in found.warnings if line.partition(": ")[0] not in set(map(str, bad))] == [
        f"{folder}: 3 {left_out}",
        str(folder / "stray.png"),
        f"{folder / 'val'}: 2 images",
        f"{folder / 'train'}: 1 {left_out}",
        str(folder / "train" / "stray.jpg"),
        f"{folder / 'train'}: 4 of 14 files cannot be read as images and are skipped:",
        f"{folder / 'test'}: 1 {left_out}",
        str(folder / "test" / "without a suffix"),
    ]
    assert f"{folder / 'train'}: 1 {left_out}" in data.load("folder", folder / "train", size=8).warnings


def test_links_to_folders_are_followed_as_image_folder_does(folder, tmp_path):
    from torchvision.datasets import ImageFolder

    elsewhere = tmp_path / "elsewhere"
    for i in range(3):
        picture(elsewhere / "deep" / f"{i}.png", "red")
        picture(tmp_path / "a class" / f"{i}.png", "green")
    root = folder / "train"
    (root / "red" / "link").symlink_to(elsewhere, target_is_directory=True)
    (root / "red" / "file.png").symlink_to(elsewhere / "deep" / "0.png")
    for part in ("train", "test"):  # a class that is a link itself
        (folder / part / "green").symlink_to(tmp_path / "a class", target_is_directory=True)
    found = data.load("folder", root.parent, size=8)
    theirs = ImageFolder(root)
    assert sorted(map(str, found.train.paths)) == sorted(path for path, _ in theirs.samples)
    assert len(found.train) == 10 + 4 + 3
    assert {str(p): found.classes[i] for p, i in zip(found.train.paths, found.train.labels, strict=True)} == {
        path: theirs.classes[i] for path, i in theirs.samples
    }
    (folder / "val").mkdir()
    (folder / "val" / "link").symlink_to(elsewhere, target_is_directory=True)
    assert f"{folder / 'val'}: 3 images" in data.load("folder", folder, size=8).warnings


def test_links_in_circles_end_and_links_to_nothing_are_reported(folder):
    root = folder / "train" / "red"
    (root / "self").symlink_to(root, target_is_directory=True)
    (root / "more" / "up").symlink_to(folder / "train", target_is_directory=True)
    (root / "gone.png").symlink_to(folder / "nothing.png")
    os.mkfifo(root / "pipe.png")
    found = data.load("folder", folder, size=8)
    # Through `up` blue is reached once, and red, which is above, is not again.
    assert len(found.train) == 5 + 10
    assert [line for line in found.warnings if "gone.png" in line]
    assert not [line for line in found.warnings if "pipe.png" in line]


def png(path, depth, kind, rows):
    """A PNG file with `depth` bits per channel; `kind` is 0 for grey, 2 for RGB, 4 for grey and alpha."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, *_ = rows.shape
    lines = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2)], ids=["grey", "RGB", "grey and alpha"])
def test_images_of_16_bits_are_scaled(tmp_path, kind, channels):
    values = np.random.default_rng(0).integers(0, 65536, (7, 5, channels))
    values[0, 0], values[1, 0] = 0, 65535
    if kind == 4:
        values[..., 1] = 65535
    for depth in (8, 16):
        png(tmp_path / f"{depth}.png", depth, kind, values if depth == 16 else np.round(values / 257))
    narrow, wide = (np.asarray(data.read_image(tmp_path / f"{depth}.png"), dtype=int) for depth in (8, 16))
    assert wide.shape == (7, 5, 3)
    assert wide.max() == 255
    assert wide.min() == 0
    assert np.abs(wide - narrow).max() <= (0 if kind == 0 else 1)  # of RGB Pillow itself drops the lower byte
    assert len(np.unique(wide)) > 20, "white where it is clipped"


def test_wide_grey_images_of_other_formats(tmp_path):
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 8 6 65535\n" + values.astype(">u2").tobytes())
    expected = np.round(values / 257)
    for name in ("a.tif", "a.pgm"):
        found = np.asarray(data.read_image(tmp_path / name), dtype=int)
        assert (found == expected[..., None]).all(), name
    for name, dtype in (("i.tif", np.int32), ("f.tif", np.float32)):  # any range is possible: no guess
        Image.fromarray(values.astype(dtype)).save(tmp_path / name)
        with pytest.raises(OSError, match=rf"{name}: the range of its pixels, of mode [IF], is not known"):
            data.read_image(tmp_path / name)


def test_an_image_that_goes_away_later_is_an_error(folder):
    found = data.load("folder", folder, size=8)
    found.train.paths[2].unlink()
    with pytest.raises(data.DataError, match=r"readable before training is not any more: .*2\.png"):
        found.train.__getitems__([1, 2])


def test_folders_that_are_no_data_set(folder, tmp_path):
    for path in (folder / "test" / "red").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(data.DataError, match="no readable image of class red"):
        data.load("folder", folder, size=8)
    (folder / "test" / "red").rename(folder / "test" / "rouge")
    picture(folder / "test" / "rouge" / "1.png", "red")
    with pytest.raises(data.DataError, match=r"have other classes: \['red', 'rouge'\]"):
        data.load("folder", folder, size=8)
    (folder / "test").rename(folder / "elsewhere")
    with pytest.raises(data.DataError, match=r"has one of train/ and test/"):
        data.load("folder", folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(data.DataError, match="no class directories"):
        data.load("folder", tmp_path / "none")
