"""tools/aarch64.py and tools/clang.py where what they need is not installed: a sentence, before minutes of work."""

import pytest

from tests.programs import from_tools


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "aarch64",
            "cnnkern: not on the path: qemu-user-static, g++-aarch64-linux-gnu, uv, of PyPI, ninja-build, apt\n",
        ),
        ("clang", "cnnkern: there is no clang++ on the path: `pip install ziglang`, see --help\n"),
    ],
)
def test_what_is_missing_is_said(name, said, monkeypatch, tmp_path, capsys):
    tool = from_tools(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tool.main([]) == 1
    assert capsys.readouterr().err.endswith(said)  # torch may have said that it finds no GPU
