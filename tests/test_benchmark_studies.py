"""The single measurements of benchmarks/studies: what they print, and that they measure what they say."""

import itertools

import pytest
import torch

import cnnkern
from benchmarks.studies import accuracy, batch_norm_passes, cores, onednn, passes, sequences, sync
from benchmarks.suite.bandwidth import Bandwidth
from cnnkern import testing
from cnnkern.testing import Layer


@pytest.mark.parametrize(
    ("arguments", "row"),
    [
        (["--cpu-time"], "| depthwise, one: 1x192x200 width 1 kernel 3 stride 1 | "),
        (["--dtype", "bfloat16"], "| depthwise, one: 1x192x200 width 1 kernel 3 stride 1 | "),
    ],
)
def test_sequences_have_a_row_each(arguments, row, capsys):
    threads = torch.get_num_threads()
    try:
        assert sequences.main(["--threads", "1", "--seconds", "0", "--only", "one: 1x192", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(row)]
    assert len(lines) == 1
    assert lines[0].count("x ± ") == 3
    assert lines[0].endswith("| cnnkern |")


def test_volumes_have_a_row_per_layout(capsys):
    threads, only = torch.get_num_threads(), "X3D, one: 1x432"
    try:
        assert sequences.main(["--threads", "1", "--seconds", "0", "--volumes", "--only", only]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {only}")]
    assert [line.split(" | ")[1] for line in lines] == ["contiguous", "channels_last"]
    assert all(line.count("x ± ") == 2 for line in lines)


def test_sequences_take_the_processors_time_of_one_thread_alone(capsys):
    with pytest.raises(SystemExit):
        sequences.main(["--threads", "2", "--cpu-time"])
    assert "--threads 1" in capsys.readouterr().err


def test_accuracy_is_ours_against_float64(monkeypatch):
    monkeypatch.setattr(accuracy, "SHAPE", (4, 3, 8, 8))
    monkeypatch.setattr(torch, "compile", lambda function: function)  # what is compiled is another test's matter
    found = accuracy.errors(testing.CASES["bn_act"], "mean of 1e4 deviations")
    assert list(found) == ["cnnkern", "eager", "torch.compile"]
    assert found["torch.compile"] == found["eager"]
    assert max(found["cnnkern"]) < 1e-6 < max(found["eager"])


def test_accuracy_prints_two_rows_for_every_case_and_number(monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "SHAPE", (2, 4, 5, 6))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert accuracy.main([]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:3] for row in cells] == [
        [case, numbers, what]
        for case in testing.CASES
        for numbers in accuracy.NUMBERS
        for what in ("output", "gradients")
    ]
    assert all(row[4] == row[5] for row in cells), "what stands for torch.compile is eager here"
    assert all(float(row[3]) < 1e-5 for row in cells if row[1] == "normal")


def test_batch_norm_over_processes_is_timed_beside_the_formula(capfd, monkeypatch):
    """The real thing: two processes, of which the first prints a row for every shape and layout."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    assert sync.main(["--seconds", "0.01"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capfd.readouterr().out.splitlines() if "|---" not in line]
    names, *table = [line for line in lines if len(line) == 8]
    assert names[2:6] == ["cnnkern", "written out", "alone", "sent"]
    assert [row[:2] for row in table] == [
        ["x".join(map(str, shape)), layout] for shape in sync.SHAPES for layout in sync.LAYOUTS
    ]
    for row in table:
        ours, theirs, alone, sent, speedup, over_alone = map(float, row[2:])
        assert min(ours, theirs, alone, sent) > 0
        assert speedup == pytest.approx(theirs / ours, rel=0.1)
        assert over_alone == pytest.approx(ours / alone, rel=0.1)


def test_batch_norm_passes_count_every_tensor_once(monkeypatch, capsys):
    monkeypatch.setattr(batch_norm_passes, "SHAPES", ((2, 8, 16, 16),))
    monkeypatch.setattr(batch_norm_passes, "MINIMUM_BYTES", 2**16)
    monkeypatch.setattr(cnnkern, "tune_malloc", lambda: "malloc left alone")
    clock = {name: [2e-6] for name in batch_norm_passes.steps((2, 8, 16, 16), "contiguous", torch.float32, False)}

    def interleave(steps, **limits):
        return {name: clock[name] for name in steps}

    monkeypatch.setattr(batch_norm_passes.timing, "interleave", interleave)
    assert batch_norm_passes.main(["--threads", str(torch.get_num_threads())]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "2x8x16x16" in line]
    assert [line[3] for line in lines[:4]] == ["0.002"] * 4
    # 16 KiB a tensor in two microseconds
    assert [float(line[4].rstrip(" |")) for line in lines[:4]] == [16.4, 16.4, 16.4, 24.6]

    threads = ["--threads", str(torch.get_num_threads())]
    assert batch_norm_passes.main([*threads, "--dtype", "bfloat16", "--cached"]) == 0  # one image, of half the bytes
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "1x8x16x16" in line]
    assert [float(line[4].rstrip(" |")) for line in lines[:4]] == [4.1, 4.1, 4.1, 6.1]


def test_cores_compare_one_thread_with_several(monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(cores, "SHAPES", ((2, 3, 16, 16),))
    monkeypatch.setattr(cores, "COPIED", 1024)
    monkeypatch.setattr(cnnkern, "tune_malloc", lambda: "malloc left alone")

    def clock(steps, **limits):
        found = {}
        for count, call in steps.items():
            call()
            assert torch.get_num_threads() == count
            found[count] = [2e-3 / count]
        return found

    monkeypatch.setattr(cores.timing, "interleave", clock)
    try:
        assert cores.main(["--threads", "2"]) == 0
        with pytest.raises(SystemExit):
            cores.main(["--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr()
    assert "| 2x3x16x16 | channels_last | 2.000 | 1.000 | 2.00x |" in printed.out
    assert "| a plain copy of 256 MiB | - | 2.000 | 1.000 | 2.00x |" in printed.out
    assert "--threads needs at least 2, got 1" in printed.err


def test_passes_print_a_row_a_layer_and_the_lost_ones(monkeypatch, capsys):
    layer = testing.CASES["grouped_conv2d"].bench_layers["mobilenet_v2"][0]
    monkeypatch.setattr(passes, "layers", lambda batch: [Layer((1, 8, 6, 6), layer.arguments)])
    assert {passes.kind(each) for each in passes.other_widths(2)} == {f"width {n}" for n in (2, 12, 20, 24, 40, 48)}
    monkeypatch.setattr(passes, "peak_gflops", lambda: 100.0)
    monkeypatch.setattr(passes.bandwidth, "measure", lambda *_, **limits: [Bandwidth("copy", 2**20, 0.01)])
    clock = {
        key: [2e-3 if key[0] == "eager" else 1e-3] for key in itertools.product(("eager", "cnnkern"), passes.PASSES)
    }
    clock["cnnkern", "dx"] = [4e-3]
    monkeypatch.setattr(passes.timing, "interleave", lambda steps, **limits: {key: clock[key] for key in steps})
    assert passes.main(["--threads", str(torch.get_num_threads())]) == 0
    out = capsys.readouterr().out
    assert "| depthwise 3x3 | contiguous | 1 | 2.00x | 2.00x |" in out
    assert "dx: 0.50x" in out
    assert "2.00, 1.00, 2.00x" in out
    # 8x6x6 numbers in and out, 4 bytes each: 2304 bytes in 1 and 4 milliseconds, beside 0.01 GB/s
    assert "| 0.0 (23%), 0.0 (6%), 0.0 (23%) |" in out
    assert "the fastest of a matrix product and a dense convolution: 100 GFLOP/s" in out


def test_the_peak_is_the_faster_of_two(monkeypatch):
    for seconds in ({"product": [1.0], "convolution": [0.1]}, {"product": [1e-3], "convolution": [1.0]}):
        monkeypatch.setattr(passes.timing, "interleave", lambda steps, seconds=seconds, **limits: seconds)
        # 2 * 16*256*28*28 pixels * 256*9 products, or twice 1024 cubed
        expected = 2 * 16 * 256 * 28 * 28 * 256 * 9 / 0.1 if seconds["product"] == [1.0] else 2 * 1024**3 / 1e-3
        assert passes.peak_gflops() == pytest.approx(expected / 1e9)


def test_onednn_tells_what_it_chose(monkeypatch, capfd):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    layer = testing.CASES["grouped_conv2d"].bench_layers["mobilenet_v2"][0]
    monkeypatch.setattr(onednn, "layers", lambda batch: [Layer((batch, 8, 20, 20), layer.arguments)])
    assert onednn.main(["--batch", "2", "--threads", str(torch.get_num_threads())]) == 0
    _, _, *lines = capfd.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert [row[1:3] for row in rows] == [[a, b] for a in ("channels_last", "contiguous") for b in onednn.PASSES]
    assert all(row[0] == "depthwise 3x3" and row[3].endswith(" (1)") for row in rows)


def test_an_account_of_onednn_adds_up():
    line = "onednn_verbose,v1,primitive,exec,cpu,{},{},forward,a:b,attr-x:y,,16x8x4x4,{}"
    account = onednn.Account()
    account.add("\n".join([line.format("reorder", "jit:uni", 1.5), line.format("convolution", "jit:avx512_core", 2.0)]))
    account.add(line.format("convolution", "jit:avx512_core", 0.5))
    account.add("onednn_verbose,v1,info,cpu,runtime:OpenMP,nthr:2")
    assert account == onednn.Account({"jit:avx512_core": 2, "not oneDNN": 1}, 2.5, 1.5)
