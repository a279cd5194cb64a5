"""Trains a converted model on several processes: DistributedDataParallel, autocast, and a gradient scaler for float16.

    torchrun --nproc-per-node 2 examples/train_ddp.py                # CPU, gloo, bfloat16
    torchrun --nproc-per-node 8 examples/train_ddp.py --amp float16  # GPUs where there are any, NCCL

`--sync-bn` computes batch norm's statistics over all processes, as `nn.SyncBatchNorm` does, on a CPU too.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel

import cnnkern


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="torchvision's name of a model (default: %(default)s)")
    parser.add_argument("--amp", default="bfloat16", choices=("bfloat16", "float16"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--sync-bn", action="store_true", help="batch norm over all processes")
    options = parser.parse_args(argv)

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)  # the same weights in every process

    model = getattr(torchvision.models, options.model)(num_classes=10)
    model = cnnkern.convert(model, inplace=True)  # before DDP, which keeps hold of the parameters
    if options.sync_bn:
        model = cnnkern.nn.convert_sync_batchnorm(model)
    model = DistributedDataParallel(model.to(device, memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "float16")

    generator = torch.Generator().manual_seed(dist.get_rank())  # each process has images of its own
    for step in range(options.steps):
        x = torch.randn(8, 3, options.size, options.size, generator=generator)
        x = x.to(device, memory_format=torch.channels_last)
        labels = torch.randint(10, (8,), generator=generator).to(device)
        with torch.autocast(device.type, getattr(torch, options.amp)):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item() / dist.get_world_size():.3f}")

    weight = next(model.parameters()).detach()
    others = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(others, weight)
    assert all(torch.equal(weight, other) for other in others), "the processes have different weights"
    if dist.get_rank() == 0:
        print(str(cnnkern.conversion_report(model.module)).splitlines()[0])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
