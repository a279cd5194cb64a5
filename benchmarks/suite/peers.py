"""Other packages for inference on a CPU, as contenders if they are installed: `cnnkern bench --peers`."""

import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .groups import Unavailable

Call = Callable[[Tensor], Tensor]
MODELS = ("resnet50", "mobilenet_v2", "convnext_tiny")
# With --networks all these too.
MORE = ("resnet18", "resnext50_32x4d", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "densenet121")
BATCHES = (1, 16)
PAUSE = 0.2  # seconds before each sample: threads of OpenMP, TBB and onnxruntime's pool wait by spinning


@dataclass(frozen=True)
class Peer:
    packages: tuple[str, ...]  # what `pip install` needs for it
    load: Callable[[nn.Module, Tensor], Call]  # the model, made for inputs like this one


def _onnxruntime(model: nn.Module, x: Tensor) -> Call:
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():  # the exporter's own
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(model: nn.Module, x: Tensor) -> Call:
    import openvino

    with warnings.catch_warnings():  # the tracer's own
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(model, example_input=x, input=list(x.shape))
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def _zentorch(model: nn.Module, x: Tensor) -> Call:
    import zentorch  # noqa: F401 - it registers the backend

    torch._dynamo.reset()
    return torch.compile(model, backend="zentorch", dynamic=False)


PEERS = {
    "onnxruntime": Peer(("onnx", "onnxscript", "onnxruntime"), _onnxruntime),
    "OpenVINO": Peer(("openvino",), _openvino),
    "zentorch": Peer(("zentorch",), _zentorch),
}


def load(name: str, model: nn.Module, x: Tensor) -> Call:
    """The call of a peer. Raises Unavailable if its packages are not installed or cannot be loaded."""
    peer = PEERS[name]
    if missing := [package for package in peer.packages if importlib.util.find_spec(package) is None]:
        raise Unavailable(f"needs `pip install {' '.join(missing)}`")
    try:
        return peer.load(model.eval(), x)
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported: {error}") from error
