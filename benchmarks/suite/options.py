"""The options of a run, shared by the driver and its worker processes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Options:
    quick: bool = False
    filter: str = ""
    device: str = "cpu"
    backend: str = "cuda"  # the backend on a GPU: cuda or triton
    threads: int = torch.get_num_threads()
    dtype: str = "float32"  # of the operators' rows; bfloat16 also of the models'
    networks: str = "resnet50"  # whose shapes: this one's, or "all"
    seconds: float = 150.0  # for all groups of one worker; groups that find them spent are reported as not timed
    compile_seconds: float = 60.0  # of those, for torch.compile
    compile_shapes: str = "one"  # of the operators': one of a network, or "all"
    max_autotune: bool = False  # whether torch.compile is timed with that mode as well
    peers: bool = False  # only beside other packages: inference of few models on a CPU, operators on a GPU
    modes: str = "usual"  # of the operators: training and inference, or "all": forward and backward as well
    # Contenders whose results this run has checked already, on the same inputs under the other malloc setting.
    verified: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: str | Path) -> "Options":
        values = json.loads(Path(path).read_text())
        return Options(**values | {"verified": tuple(values["verified"])})
