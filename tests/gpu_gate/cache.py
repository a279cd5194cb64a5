"""Facts about compiled kernels kept in build/gpu_gate, for as long as what they were made of is the same."""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from gpu_gate.machine_code import Kernel

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "gpu_gate"
READER = Path(__file__).with_name("machine_code.py")


def fingerprint(parts: Iterable[bytes | str]) -> str:
    digest = hashlib.sha256(READER.read_bytes())
    for part in parts:
        digest.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return digest.hexdigest()


def kept(name: str, of: str, make: Callable[[], list[Kernel]]) -> list[Kernel]:
    """What `make` gives, from build/gpu_gate/NAME.json if it was made of the same: `of` is a fingerprint."""
    path, fresh = BUILD / f"{name}.json", BUILD / f"{name}.new"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes may want the same
        content = json.loads(path.read_text()) if path.exists() else {}
        if content.get("of") != of:
            content = {"of": of, "kernels": [kernel.to_json() for kernel in make()]}
            fresh.write_text(json.dumps(content))
            fresh.replace(path)
    return [Kernel.from_json(kernel) for kernel in content["kernels"]]
