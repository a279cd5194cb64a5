"""Images that need no download: patches of the two photographs that scikit-learn ships."""

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of each colour


def photographs() -> Tensor:
    """(2, 3, H, W): a temple and a flower, normalised as for ImageNet."""
    images = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


def patches(images: Tensor, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, 3, size, size) patches from anywhere in the photographs, and the photograph that each is from."""
    labels = torch.randint(len(images), (count,), generator=generator)
    rows = torch.randint(images.shape[2] - size, (count,), generator=generator)
    columns = torch.randint(images.shape[3] - size, (count,), generator=generator)
    cut = [
        images[label, :, row : row + size, column : column + size]
        for label, row, column in zip(labels.tolist(), rows.tolist(), columns.tolist(), strict=True)
    ]
    return torch.stack(cut), labels
