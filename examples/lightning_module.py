"""A LightningModule whose model is converted: nothing else changes.

pip install lightning
python examples/lightning_module.py
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
import torchvision
from photographs import patches, photographs
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import cnnkern


class Classifier(lightning.LightningModule):
    def __init__(self, model: str = "resnet18", classes: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = cnnkern.convert(getattr(torchvision.models, model)(num_classes=classes), inplace=True)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, labels = batch
        loss = F.cross_entropy(self.model(x.contiguous(memory_format=torch.channels_last)), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.005, momentum=0.9)


def main(argv: list[str] | None = None) -> Classifier:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    lightning.seed_everything(0)
    images = TensorDataset(*patches(photographs(), options.images, 64, torch.Generator().manual_seed(0)))
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        precision="bf16-mixed",
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    classifier = Classifier()
    trainer.fit(classifier, DataLoader(images, batch_size=16, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss'].item():.3f}")
    print(str(cnnkern.conversion_report(classifier.model)).splitlines()[0])
    return classifier


if __name__ == "__main__":
    main()
