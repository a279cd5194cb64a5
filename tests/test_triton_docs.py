"""The code of docs/triton.md runs, and is right."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from cnnkern import testing

pytest.importorskip("triton", reason="Triton has no build for this platform")
import guarded_triton

PAGE = (Path(__file__).parent.parent / "docs" / "triton.md").read_text()


def test_the_page_s_operator_is_add_relu(tmp_path, monkeypatch, generator):
    (code,) = re.findall(r"```python[^\n]*\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    spec = importlib.util.spec_from_file_location("example", tmp_path / "example.py")
    example = importlib.util.module_from_spec(spec)
    with guarded_triton.guarded():
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # when kernels are defined
        spec.loader.exec_module(example)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for shape in ((3,), (2, 3, 5, 7), (4, 8, 16, 9)):
                inputs = testing.CASES["add_relu"].inputs(shape, dtype, generator=generator)
                y, mask = example.add_relu(inputs["input"], inputs["other"])
                theirs = torch.ops.cnnkern.add_relu(inputs["input"], inputs["other"])
                assert torch.equal(y, theirs[0])
                assert torch.equal(mask, theirs[1])
    with pytest.raises(RuntimeError, match="residual must be laid out like x"):
        example.add_relu(inputs["input"], inputs["other"].mT)
