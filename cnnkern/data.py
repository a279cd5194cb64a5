"""Images to train on: scikit-learn's digits, the standard files of MNIST, Fashion-MNIST and CIFAR-10, image folders."""

from __future__ import annotations

import math
import mimetypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "folder")
# What has to lie in the data directory, as torchvision's datasets leave it there.
FILES = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte and the three other files of MNIST, unpacked",
    "fashion-mnist": "FashionMNIST/raw/train-images-idx3-ubyte and the three other files of Fashion-MNIST, unpacked",
    "cifar10": "cifar-10-batches-py/data_batch_1 and the other files of CIFAR-10's python version, unpacked",
    "folder": "train/CLASS/IMAGE and test/CLASS/IMAGE (or val/), or CLASS/IMAGE alone, of which a fifth is the test",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(Exception):
    """The data cannot be read; the message says what is missing or damaged, and where."""


class Images(Dataset):
    """Images in memory as bytes, (N, C, H, W), that come out as normalised floats of side ``size``, batch by batch."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], size: int) -> None:
        self.images, self.labels = images, labels
        resize = [v2.Resize((size, size), antialias=True)] if tuple(images.shape[2:]) != (size, size) else []
        self.transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), *resize, v2.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[indices]), self.labels[indices]


class Files(Dataset):
    """Image files, read as RGB when they are asked for: the shorter side made ``size`` long, the middle cut out."""

    def __init__(self, paths: list[Path], labels: list[int], size: int) -> None:
        self.paths, self.labels = paths, torch.tensor(labels)
        self.cut = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        try:
            images = torch.stack([self.cut(read_image(self.paths[i])) for i in indices])
        except OSError as error:
            raise DataError(f"folder: an image that was readable before training is not any more: {error}") from error
        return self.normalise(images), self.labels[indices]


@dataclass
class Data:
    """A training and a test set of images of (channels, size, size) with the names of their classes."""

    train: Dataset
    test: Dataset
    classes: list[str]
    channels: int
    size: int
    warnings: list[str] = field(default_factory=list)


def load(name: str, folder: str | Path | None = None, size: int | None = None) -> Data:
    """The dataset ``name`` of DATASETS, images resized to ``size`` by ``size`` pixels, by default left at their own.

    ``folder`` is where the files lie (see FILES); digits needs none. Nothing is downloaded. Raises DataError where
    files are missing or damaged. Image files that cannot be read, or lie where no class is, are left out, and listed in
    ``warnings``.
    """
    if name not in DATASETS:
        raise DataError(f"no dataset is called {name!r}; there are {', '.join(DATASETS)}")
    if name == "digits":
        return _in_memory(*_digits(), size)
    if folder is None:
        raise DataError(f"{name}: say with --data-dir where the files are: DIR/{FILES[name]}")
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{name}: there is no directory {folder}; expected in it: {FILES[name]}")
    if name == "folder":
        return _folder(folder, size)
    try:
        train, test, classes = _torchvision(name, folder)
    except Exception as error:  # torchvision lets whatever its parsers meet in a damaged file come through
        what = " ".join(str(error).replace("You can use download=True to download it", "").split())
        raise DataError(
            f"{name}: the files in {folder} are missing or damaged ({type(error).__name__}: {what}); expected: "
            f"{folder}/{FILES[name]}"
        ) from error
    return _in_memory(train, test, classes, size)


def augment(images: Tensor) -> Tensor:
    """Each image of (N, C, H, W) turned by up to 10 degrees, shifted by up to a tenth and scaled by up to a tenth.

    What comes in from outside repeats the border.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=images.device) * 2 - 1

    n = len(images)
    angle, scale = uniform(n) * math.radians(10), 1 + 0.1 * uniform(n)
    cos, sin, shift = torch.cos(angle) * scale, torch.sin(angle) * scale, 0.2 * uniform(n, 2)  # of a side of 2
    matrices = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1), shift], dim=2)  # (N, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _digits() -> tuple:
    """scikit-learn's 1,797 digits of 8x8 pixels, a fifth of each class set aside as the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (1797, 1, 8, 8) of 0..255
    split = train_test_split(images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, split)
    return (train_images, train_labels), (test_images, test_labels), [str(d) for d in range(10)]


def _torchvision(name: str, folder: Path) -> tuple:
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    sets = [kind(folder, train=part) for part in (True, False)]
    classes = list(sets[0].classes)
    train, test = (_bytes(s, len(classes)) for s in sets)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f"training images of {list(train[0].shape[1:])}, test images of {list(test[0].shape[1:])}")
    return train, test, classes


def _bytes(dataset, classes: int) -> tuple[Tensor, Tensor]:
    """(images (N, C, H, W), labels) of torchvision's dataset."""
    images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())} for {classes} classes")
    return images, labels


def _in_memory(train, test, classes: list[str], size: int | None) -> Data:
    """Normalised by the mean and the deviation of each channel of the training images."""
    (images, _), size_of = train, size or train[0].shape[-1]
    pixels = images.double() / 255
    mean = pixels.mean((0, 2, 3)).tolist()
    std = pixels.std((0, 2, 3)).clamp_min(1e-3).tolist()
    sets = [Images(*split, mean, std, size_of) for split in (train, test)]
    return Data(*sets, classes, images.shape[1], size_of)


def read_image(path: Path):
    """The image as RGB with 8 bits per channel; OSError where it cannot be read, with the path."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _to_8_bits(image).convert("RGB")
    except Exception as error:  # a damaged file raises whatever the decoder met: OSError, SyntaxError, ValueError, ...
        raise OSError(f"{path}: {error}") from error


def _to_8_bits(image):
    """A grey image of 16 bits scaled to 8: Pillow's own conversion makes everything above 255 white."""
    from PIL import Image

    # What Pillow calls I is 16 bits wide in the formats that have no wider pixels.
    if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in ("PNG", "PPM", "JPEG2000")):
        if image.mode in ("I", "F"):
            raise ValueError(f"the range of its pixels, of mode {image.mode}, is not known")
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _files(folder: Path) -> list[Path]:
    """All that is no directory in `folder` and below, in order; links to directories are followed, but not in circles.

    A link that leads nowhere is among them, so that it is reported.
    """
    found: list[Path] = []

    def walk(directory: Path, above: frozenset[str]) -> None:
        real = os.path.realpath(directory)
        if real in above:
            return
        for path in sorted(directory.iterdir()):
            if path.is_dir():
                walk(path, above | {real})
            elif path.is_file() or not path.exists():  # no pipe, which would never end
                found.append(path)

    walk(folder, frozenset())
    return sorted(found)


def _folder(root: Path, size: int | None) -> Data:
    size = size or 224
    train_root = root / "train"
    test_root = next((root / n for n in ("test", "val") if (root / n).is_dir()), None)
    if train_root.is_dir() != (test_root is not None):
        raise DataError(
            f"folder: {root} has one of train/ and test/ (or val/) only; expected: {root}/{FILES['folder']}"
        )
    warnings: list[str] = []
    if test_root is not None:
        warnings += _left_out(root, [p for p in sorted(root.iterdir()) if p not in (train_root, test_root)])
    if test_root is None:
        classes, paths, labels = _scan(root, warnings)
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
        cut = max(1, len(paths) // 5)
        split = [sorted(order[cut:]), sorted(order[:cut])]
        parts = [([paths[i] for i in part], [labels[i] for i in part]) for part in split]
    else:
        classes, *train = _scan(train_root, warnings)
        test_classes, *test = _scan(test_root, warnings)
        if classes != test_classes:
            raise DataError(
                f"folder: {train_root} and {test_root} have other classes: {sorted(set(classes) ^ set(test_classes))}"
            )
        parts = [train, test]
    return Data(*(Files(*part, size) for part in parts), classes, 3, size, warnings)


def _left_out(root: Path, paths: list[Path]) -> list[str]:
    """Warnings of the images among these files and directories of ``root``, which are of no class."""
    found = {p: [f for f in (_files(p) if p.is_dir() else [p]) if _is_image(f)] for p in paths}
    found = {p: images for p, images in found.items() if images}
    if not found:
        return []
    count = sum(map(len, found.values()))
    lines = [f"{p}: {len(images)} images" if p.is_dir() else str(p) for p, images in found.items()]
    return [f"{root}: {count} images that are outside the class directories are skipped:", *lines]


def _is_image(path: Path) -> bool:
    """Whether the file calls itself an image, or is one."""
    from PIL import Image

    kind, _ = mimetypes.guess_type(path.name)
    if not path.is_file() or (kind or "").startswith("image/"):
        return path.is_file()
    try:
        with Image.open(path):
            return True
    except Exception:  # as in read_image, but here most files are none
        return False


def _scan(root: Path, warnings: list[str]) -> tuple[list[str], list[Path], list[int]]:
    """(classes, paths, labels) of the files in root/CLASS that are images; each one that is none is a warning."""
    classes = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise DataError(f"folder: no class directories in {root}; expected: {FILES['folder']}")
    files = [(p, label) for label, c in enumerate(classes) for p in _files(root / c)]

    def problem(path: Path) -> str | None:
        try:
            read_image(path)
        except OSError as error:
            return str(error)
        return None

    warnings += _left_out(root, [p for p in sorted(root.iterdir()) if p.is_file()])
    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, [p for p, _ in files]))
    unreadable = [p for p in problems if p]
    if unreadable:
        warnings += [f"{root}: {len(unreadable)} of {len(files)} files cannot be read as images and are skipped:"]
        warnings += unreadable
    good = [f for f, p in zip(files, problems, strict=True) if p is None]
    counts = {c: sum(label == i for _, label in good) for i, c in enumerate(classes)}
    if empty := [c for c, n in counts.items() if n == 0]:
        raise DataError(f"folder: no readable image of class {', '.join(empty)} in {root}")
    return classes, [p for p, _ in good], [label for _, label in good]
