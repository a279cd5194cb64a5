"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_runs_as_printed(code, capsys):
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "9 BatchNorm + ReLU" in capsys.readouterr().out
    assert not any("cnnkern" in type(m).__module__ for m in names["model"].modules())
