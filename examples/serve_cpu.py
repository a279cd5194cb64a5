"""An inference server on a CPU: a folded model behind HTTP. It answers an image with the most likely classes.

    python examples/serve_cpu.py --port 8000 &
    curl --data-binary @cat.jpg http://localhost:8000/

Weights are random here; pass `weights="DEFAULT"` to torchvision for ImageNet's.
"""

import argparse
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import nn
from torchvision.transforms import v2

import cnnkern

PREPARE = v2.Compose(
    [
        v2.PILToTensor(),
        v2.Resize(256, antialias=True),
        v2.CenterCrop(224),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def folded(name: str) -> nn.Module:
    """torchvision's model of this name, its batch norms folded into its convolutions, warmed up."""
    cnnkern.tune_malloc()  # large results keep their memory from call to call
    model = cnnkern.fold(getattr(torchvision.models, name)().eval())
    with torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))  # folds the weights
    return model


def handler(model: nn.Module) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                image = Image.open(io.BytesIO(body)).convert("RGB")
            except UnidentifiedImageError:
                self.send_error(400, "the body is not an image")
                return
            with torch.inference_mode():
                probabilities = model(PREPARE(image)[None]).softmax(1)[0]
            values, classes = probabilities.topk(5)
            answer = json.dumps({"classes": classes.tolist(), "probabilities": values.tolist()}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    return Handler


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2", help="torchvision's name (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    with ThreadingHTTPServer(("localhost", options.port), handler(folded(options.model))) as server:
        print(f"http://localhost:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
