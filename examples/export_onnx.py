"""Exports a converted model to ONNX and runs it in ONNX Runtime. The file has standard operators: it needs no cnnkern.

python examples/export_onnx.py --model resnet18 --out resnet18.onnx
"""

import argparse

import onnxruntime
import torch
import torchvision

import cnnkern


def main(argv: list[str] | None = None) -> float:
    """The largest difference between ONNX Runtime's outputs and the model's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="torchvision's name of a model (default: %(default)s)")
    parser.add_argument("--out", default="model.onnx", help="the file to write (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(0)

    model = cnnkern.convert(getattr(torchvision.models, options.model)().eval())
    x = torch.randn(2, 3, options.size, options.size)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (x,), options.out, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)

    session = onnxruntime.InferenceSession(options.out, providers=["CPUExecutionProvider"])
    difference = 0.0
    for images in (x, torch.randn(5, 3, options.size, options.size)):
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            difference = max(difference, (torch.from_numpy(found) - model(images)).abs().max().item())
    print(f"{options.out}: differs from the model by at most {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
