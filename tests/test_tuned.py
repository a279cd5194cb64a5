"""`cnnkern tune`: what it measures, and which calls it dispatches to PyTorch's operators."""

import time

import pytest
import torch
from torch import nn

import cnnkern
from cnnkern import cli, functional, reference
from cnnkern.measure import clock, tune, tune_command
from cnnkern.measure.steps import Setting
from cnnkern.ops import tuned
from tests.tuning import calls_of, lost, own_tables, randn  # noqa: F401


def calls() -> dict[str, tuple]:
    """A function of each operator with arguments that our kernels take."""
    x, channels = randn(3, 8, 5, 6), (torch.zeros(8), torch.ones(8), randn(8), randn(8))
    return {
        "add_relu": (x, randn(3, 8, 5, 6)),
        "batch_norm_act": (x, *channels, True, 0.1, 1e-5, "silu"),
        "batch_norm_add_act": (x, randn(3, 8, 5, 6), *channels, True, 0.1, 1e-5, "relu"),
        "conv2d": (x, randn(8, 1, 3, 3), randn(8), 2, 1, 1, 8),
        "layer_norm": (x, (5, 6), randn(5, 6), randn(5, 6)),
        "layer_norm2d": (x, randn(8), randn(8)),
    }


def copied(arguments: tuple, training: bool) -> tuple:
    def copy(a):
        if not isinstance(a, torch.Tensor):
            return a
        a = a.clone()
        return a.requires_grad_(training) if a.dim() == 4 or a.std() > 0.1 else a  # all but running statistics

    return tuple(map(copy, arguments))


def results(function, arguments: tuple, training: bool) -> list[torch.Tensor]:
    y = function(*arguments)
    if not training:
        return [y]
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y, *(a.grad for a in arguments if isinstance(a, torch.Tensor) and a.grad is not None)]


# ---- a table says who computes ----


@pytest.mark.parametrize("operator", calls())
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_lost_call_is_pytorchs_with_our_strides(operator, training, layout):
    arguments = calls()[operator]
    arguments = tuple(
        a.contiguous(memory_format=layout) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in arguments
    )
    ours = results(getattr(functional, operator), copied(arguments, training), training)
    theirs = results(getattr(reference, operator), copied(arguments, training), training)
    asked = []
    with tuned.using(lambda call: asked.append(call) or True):
        found = results(getattr(functional, operator), copied(arguments, training), training)
    if operator == "layer_norm" and layout == torch.channels_last:  # a layout that is not tuned
        assert not asked
        return
    (call,) = asked
    assert (call.operator, call.training, call.device) == (operator, training, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))
    assert found[0].stride() == ours[0].stride()
    assert "cnnkern" not in type(found[0].grad_fn).__module__
    if training:
        assert type(found[0].grad_fn) is not type(ours[0].grad_fn)


@pytest.mark.parametrize("operator", calls())
def test_a_call_that_is_not_in_the_table_is_ours(operator):
    with tuned.using(tuned.Table({"cpu": frozenset()})):
        y = getattr(functional, operator)(*copied(calls()[operator], True))
    assert type(y.grad_fn).__name__ not in ("ReluBackward0", "NativeLayerNormBackward0", "ConvolutionBackward0")


@pytest.mark.parametrize("operator", calls())
def test_without_a_table_nothing_is_asked(operator, monkeypatch):
    monkeypatch.setattr(tuned, "loses", lambda *_: pytest.fail("asked"))
    getattr(functional, operator)(*calls()[operator])


def test_tensors_without_data_do_not_ask():
    with tuned.using(tuned.Table({"cpu": frozenset([lost().call.key()])})):
        assert functional.layer_norm(randn(4, 6).to("meta"), (6,)).is_meta


def test_what_is_refused_stays_refused():
    with tuned.using(lambda call: True):
        with pytest.raises(RuntimeError, match="must have the input's shape"):
            functional.add_relu(randn(2, 3), randn(1, 3))
        with pytest.raises(RuntimeError, match="must have the input's shape"):
            functional.batch_norm_add_act(randn(2, 3, 4), randn(1, 3, 4), torch.zeros(3), torch.ones(3))
        with pytest.raises((ValueError, RuntimeError), match="act"):
            functional.batch_norm_act(randn(2, 3, 4), torch.zeros(3), torch.ones(3), act="sine")


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compiled_exported_and_traced_programs_do_not_ask():
    model, x = cnnkern.nn.LayerNorm(6), randn(4, 6)
    with tuned.using(lambda call: pytest.fail("asked")):
        graphs = []

        def keep(graph, _):
            graphs.append(graph)
            return graph.forward

        torch.compile(model, backend=keep, fullgraph=True)(x)
        with cnnkern.keep_operators():
            program = torch.export.export(model, (x,))
            traced = torch.jit.trace(model, (x,), check_trace=False)
    assert "cnnkern.layer_norm" in str(graphs[0].graph)
    assert "cnnkern.layer_norm" in str(program.graph)
    assert "cnnkern::layer_norm" in str(traced.graph)


def test_checkpoints_and_transforms_work_by_a_table():
    x, weight = randn(4, 6).requires_grad_(), randn(6)
    with tuned.using(lambda call: True):
        y = torch.utils.checkpoint.checkpoint(functional.layer_norm, x, (6,), weight, use_reentrant=False)
        y.sum().backward()
        rows = torch.func.vmap(lambda row: functional.layer_norm(row[None], (6,), weight))(x.detach())
    assert torch.allclose(rows[:, 0], y.detach(), atol=1e-6)
    assert x.grad is not None


def test_batches_of_one_power_of_two_are_one_class():
    keys = []
    with tuned.using(lambda call: keys.append(call.key())):
        for n in (4, 5, 7, 8):
            functional.add_relu(randn(n, 3), randn(n, 3))
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_the_convolutions_type_is_autocasts():
    asked = []
    x, weight = randn(2, 8, 5, 5), randn(8, 1, 3, 3)
    with tuned.using(lambda call: asked.append(call)), torch.autocast("cpu", torch.bfloat16):
        functional.conv2d(x, weight, groups=8)
    assert asked[0].dtype == asked[0].parameters == "bfloat16"

    # ---- measuring ----


class Block(nn.Module):
    """Every operator that a converted model has."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.last, self.add, self.layer_norm = nn.BatchNorm2d(8), cnnkern.nn.AddReLU(), nn.LayerNorm(6)

    def forward(self, x):
        y = torch.relu(self.norm(self.convolution(x)))
        z = torch.relu(self.last(y) + y)
        return self.layer_norm(self.add(z, y))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("amp", [None, "bf16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_call_of_a_model_can_be_made_again(training, amp, channels_last):
    x = randn(2, 8, 5, 6)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    model = nn.Sequential(cnnkern.convert(Block()), cnnkern.nn.LayerNorm2d(8))
    found = tune.calls_of(model, (x,), Setting(training, "cpu", amp, channels_last))
    tuned_operators = {call.operator for call in found}
    assert tuned_operators >= {"conv2d", "batch_norm_act", "batch_norm_add_act", "add_relu"}
    for call in found:
        again = []
        for name, step in tune.contenders(call, "cpu").items():
            with tuned.using(lambda call: again.append(call)):  # noqa: B023
                step()
            assert set(again) <= {call}, name
        assert len(again) == 1 + (call.operator == "conv2d")  # ours asks, PyTorch's does not


def test_a_converted_batch_norm_goes_where_its_fused_call_is_faster():
    model, x = cnnkern.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), randn(2, 4, 5, 6)
    expected, asked = model(x), []

    def loses(call):
        asked.append((call.operator, *call.settings))
        return True

    with tuned.using(loses):
        found = model(x)
    assert asked == [("batch_norm_act", "relu", True)]
    assert "BatchNormAct" not in str(found.grad_fn)
    torch.testing.assert_close(found, expected)


def test_a_call_has_to_lose_twice(monkeypatch):
    call = calls_of(nn.LayerNorm(6), randn(4, 6), False)[0]
    found = iter([tuned.Measured(call, 0.5, 0.01), tuned.Measured(call, 1.1, 0.01)])
    monkeypatch.setattr(tune, "_measure", lambda *_: next(found))
    (measured,) = tune.measure([call], "cpu", 1.0)
    assert not measured.lost


class SlowOurs:
    """A timer by which our operator, told by its asking for a table, takes twice as long."""

    def sample(self, step, calls):
        asked = []
        with tuned.using(lambda call: asked.append(call)):
            step()
        return clock.Sample(2.0 if asked else 1.0)


@pytest.mark.parametrize("operator", calls())
def test_a_timer_decides(operator):
    asked = []
    with tuned.using(lambda call: asked.append(call)):
        getattr(functional, operator)(*calls()[operator])
    (measured,) = tune.measure(asked, "cpu", 0.0, SlowOurs())
    assert measured == tuned.Measured(asked[0], 0.5, 0.0)
    assert measured.lost


def test_time_that_is_over_leaves_calls_to_the_next_run(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MODEL)
    command = ["tune", f"{tmp_path}/mine.py:make", "--train", "--seconds", "0.000001"]
    for count in (1, 2, 2):  # the first call is timed in any case, and new ones come first
        assert cli.main(command) == 0
        assert "calls not timed: 1, because 0 seconds were over" in capsys.readouterr().out
        machine = tuned.this_machine("cpu")
        assert len(tuned.read(tuned.file_of(machine), machine)) == count


def test_what_is_lost_is_beyond_chance():
    call = calls_of(nn.LayerNorm(6), randn(4, 6), False)[0]
    assert tuned.Measured(call, 0.9, 0.05).lost
    assert not tuned.Measured(call, 0.9, 0.2).lost
    assert not tuned.Measured(call, 0.99, 0.001).lost
    assert tuned.Measured(call, 0.01, 2.0).lost


def slow_layer_norm(monkeypatch, seconds: float) -> list:
    """A wrong rule, planted: our operator answers where PyTorch's is faster by far. The calls of it, as they come."""
    from cnnkern.ops import layer_norm

    monkeypatch.setattr(tune, "SAMPLE_SECONDS", 1e-4)
    made, operator = [], layer_norm._layer_norm

    def slow(*arguments):
        made.append(arguments)
        time.sleep(seconds)
        return operator(*arguments)

    monkeypatch.setattr(layer_norm, "_layer_norm", slow)
    return made


MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16), nn.LayerNorm(16)), torch.randn(20, 32)
"""


def test_a_planted_wrong_rule_is_put_right(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MODEL.replace(", nn.Linear(32, 16), nn.LayerNorm(16)", ""))
    made = slow_layer_norm(monkeypatch, 2e-3)
    assert cli.main(["tune", f"{tmp_path}/mine.py:make", "--seconds", "0.2", "--train"]) == 0
    said = capsys.readouterr().out
    assert "calls timed: 1, of which PyTorch's operators compute 1 faster" in said
    assert "layer_norm 20x32" in said
    made.clear()
    x = randn(20, 32).requires_grad_()
    y = functional.layer_norm(x, (32,), torch.ones(32), torch.zeros(32))
    assert not made
    assert type(y.grad_fn).__name__ == "NativeLayerNormBackward0"
    functional.layer_norm(x.detach(), (32,), torch.ones(32), torch.zeros(32))  # inference was not tuned
    assert len(made) == 1
    assert cli.main(["doctor"]) == 0
    assert "calls: 1, of which PyTorch's operators compute 1 and cnnkern's kernels 0 that" in capsys.readouterr().out


def test_a_second_run_adds_to_the_table_and_forget_does_not(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "SAMPLE_SECONDS", 1e-4)
    (tmp_path / "mine.py").write_text(MODEL)
    command = ["tune", f"{tmp_path}/mine.py:make", "--seconds", "60"]
    machine = tuned.this_machine("cpu")
    for more, count in (["--train"], 2), (["--infer"], 4), (["--infer"], 4), (["--train", "--forget"], 2):
        assert cli.main([*command, *more]) == 0
        assert len(tuned.read(tuned.file_of(machine), machine)) == count


def test_nothing_to_tune_and_wrong_inputs_are_one_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(3, 3)\n")
    assert cli.main(["tune", f"{tmp_path}/mine.py:make", "--input", "2,3"]) == 1
    assert "calls none of cnnkern's operators: nothing to tune" in capsys.readouterr().err
    assert cli.main(["tune", f"{tmp_path}/mine.py:make", "--input", "2,4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not accept an input of 2x4" in line
    assert cli.main(["tune", "zoo:nothing"]) == 1


def test_on_a_gpu_each_backend_that_is_there_is_tuned(monkeypatch):
    assert tune.backends_of("cpu") == ["cpu"]
    found = tune.backends_of("cuda")  # needs no GPU to say
    assert set(found) <= {"cuda", "triton"}
    built = cnnkern.backends._BUILT_WITH_CUDA
    assert ("cuda" in found) is built


def test_two_backends_are_compared_by_their_ratios_to_pytorch():
    call, other = lost().call, lost((9, 8)).call
    one = [tuned.Measured(call, 2.0, 0.0), tuned.Measured(other, 4.0, 0.0)]
    two = [tuned.Measured(call, 1.0, 0.0), tuned.Measured(other, 2.0, 0.0)]
    assert tune.times_as_fast(one, two) == pytest.approx(2.0)
    assert tune_command._compared({"cuda": two, "triton": one}).startswith("triton is 2.00x as fast as cuda")
