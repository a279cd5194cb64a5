"""Switching the backend for CUDA tensors, which needs no GPU: the backends are tested on the CPU's dispatch key."""

import importlib.util
import itertools
import sys
import threading

import pytest
import torch
from torch import Tensor

import cnnkern
from cnnkern import backends, eager, functional, testing
from tests.child import run_child

CASE = testing.CASES["bn_act"]
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16, float32": (torch.bfloat16, torch.float32),
}
LAYOUTS = ("contiguous", "channels_last", "sliced")
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton has no build for this platform")
BUILT_WITH_CUDA = bool(cnnkern._C.build_info()["cuda"])


def cuda_status() -> set[str]:
    """Who answers, without the reason."""
    return {kernels["cuda"].partition(":")[0] for kernels in backends.status().values()}


@pytest.fixture(autouse=True)
def restored():
    yield
    backends._switch(None)


@pytest.fixture
def eager_on_cpu():
    """The eager backend in the place of the C++ kernels, where there are tensors to call it with."""
    library = torch.library.Library("cnnkern", "IMPL")
    for name, launcher in eager.LAUNCHERS.items():
        library.impl(name, launcher, "CPU", allow_override=True)
    yield
    library._destroy()


def make(shape, dtype=torch.float32, parameters=None, layout="contiguous", case=CASE, **variant):
    generator = torch.Generator().manual_seed(0)
    if parameters not in (None, dtype):
        variant["parameter_dtype"] = parameters
    inputs = case.inputs(shape, dtype, generator=generator, **variant)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == inputs["input"].shape:
            inputs[name] = testing.with_layout(value, layout)
    y = case.reference(**{n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()})
    return inputs, testing.randn(y.shape, generator, dtype)


def test_status_names_every_operator_and_its_kernels():
    status = backends.status()
    assert status.keys() == {operator for case in testing.CASES.values() for operator in case.operators}
    by_default = "Triton" if HAS_TRITON else "eager PyTorch"
    for kernels in status.values():
        assert kernels["cpu"] == f"C++ {torch.backends.cpu.get_cpu_capability()}"
        if BUILT_WITH_CUDA:
            assert kernels["cuda"] == "CUDA C++"
        else:
            assert kernels["cuda"].startswith(f"{by_default}: the extension was built without CUDA")
            assert "CNNKERN_CUDA=1" in kernels["cuda"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_kernels_of_a_device_are_those_of_every_operator(device):
    assert {kernels[device].partition(":")[0].removeprefix("C++ ") for kernels in backends.status().values()} == {
        backends.kernels_on(device)
    }


def test_every_operator_has_an_answer_for_cuda_tensors():
    for operator in backends.status():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{operator}", "CUDA")
    assert set(backends._TRITON_KERNELS) == set(testing.CASES)
    assert eager.LAUNCHERS.keys() == backends.status().keys()


def test_without_triton_eager_answers_where_the_extension_does_not(monkeypatch):
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert backends._default_launchers() == ("eager", eager.LAUNCHERS)


@needs_triton
def test_default_launchers_are_those_of_the_kernels():
    code = (
        "from cnnkern import backends as b; import importlib\n"
        "modules = [importlib.import_module(f'cnnkern.triton_kernels.{n}') for n in b._TRITON_KERNELS]\n"
        "for m in modules:\n"
        "    for n in vars(m): setattr(m, n, lambda *a, n=n: (n, a)) if n in b._defaults else None\n"
        "for n, launch in b._defaults.items(): assert launch(1, 2) == (n, (1, 2)), n"
    )
    run_child([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "label"), [pytest.param("triton", "Triton", marks=needs_triton), ("eager", "eager PyTorch")]
)
def test_switching_there_and_back(name, label):
    def registered() -> set[str]:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return {operator for operator in before if has_kernel(f"cnnkern::{operator}", "CUDA")}

    before = backends.status()
    registered_before = registered()
    with backends.backend(name) as chosen:
        assert chosen.name == name
        inside = backends.status()
        for operator in before:
            assert inside[operator] == {"cpu": before[operator]["cpu"], "cuda": label}
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{operator}", "CUDA")
    assert backends.status() == before
    assert registered() == registered_before


@needs_triton
def test_a_call_switches_for_good_and_blocks_nest():
    backends.backend("triton")
    assert "Triton" in cuda_status()
    with backends.backend("eager"):
        assert "eager PyTorch" in cuda_status()
        with backends.backend("triton"):
            assert "Triton" in cuda_status()
        assert "eager PyTorch" in cuda_status()
        backends.backend("eager")
    assert "Triton" in cuda_status()


def on_the_cuda_key(operator: str, *arguments):
    """What answers for CUDA tensors, called with those of the CPU."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.cnnkern, operator).default.redispatch(cuda, *arguments)


@pytest.mark.parametrize("case", testing.CASES.values(), ids=testing.CASES.keys())
def test_the_chosen_launcher_is_called_with_the_operator_s_arguments(case, monkeypatch):
    called: list[tuple] = []

    def recording(name: str):
        def launch(*given):
            called.append((name, *given))
            return eager.LAUNCHERS[name](*given)

        return launch

    monkeypatch.setattr(backends, "_launchers", lambda _: {name: recording(name) for name in eager.LAUNCHERS})
    backends.backend("eager")
    inputs, dy = make((3, 6, 5, 7), case=case)
    for operator, arguments in (case.forward_call(inputs), case.backward_call(inputs, dy)):
        name = operator._schema.name.removeprefix("cnnkern::")
        given, own = ([v.clone() if isinstance(v, Tensor) else v for v in arguments] for _ in range(2))
        found = on_the_cuda_key(name, *given)
        torch.testing.assert_close(found, eager.LAUNCHERS[name](*own), equal_nan=True)
        said = len(arguments)  # the dispatcher leaves out what is the default at the end
        while operator._schema.arguments[said - 1].has_default_value() and arguments[said - 1] is None:
            said -= 1
        assert [called[-1][0], len(called[-1])] == [name, 1 + said]
        for before, there, written in zip(given[:said], called[-1][1:], own[:said], strict=True):
            if isinstance(before, Tensor):
                assert there.data_ptr() == before.data_ptr()
                assert torch.equal(before, written)  # as running statistics are
            else:
                assert there == (list(before) if isinstance(before, tuple | torch.Size) else before)


def test_switching_registers_nothing_and_takes_nothing_away():
    """The dispatcher allows neither while a thread is inside of a kernel."""

    def registered() -> dict[str, str]:
        names = (f"{space}::{n}" for n in backends.status() for space in ("cnnkern", "cnnkern_launchers"))
        return {name: torch._C._dispatch_dump(name) for name in names if torch._C._dispatch_has_kernel(name)}

    before = registered()
    assert len(before) == len(backends.status()) * (1 + BUILT_WITH_CUDA)
    with backends.backend("eager"):
        assert registered() == before
    assert registered() == before


def test_threads_that_call_while_others_switch(monkeypatch):
    """A call is computed at any time, by one backend or the other."""
    arguments = (torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0]))
    wrong, stop = [], threading.Event()
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.setattr(backends, "_launchers", lambda name: dict(eager.LAUNCHERS))  # of either: here is no GPU

    def call():
        while not stop.is_set():
            try:
                if on_the_cuda_key("add_relu", *arguments)[0].tolist() != [2.0, 0.0]:
                    wrong.append("another result")
            except Exception as error:
                wrong.append(error)

    backends.backend("eager")
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for name in ("triton", "eager") * 50:
        backends.backend(name)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_triton
def test_threads_that_switch():
    before, wrong = backends.status(), []

    def switch(name):
        for _ in range(20):
            with backends.backend(name):
                if not cuda_status() <= {"Triton", "eager PyTorch", "CUDA C++"}:
                    wrong.append(cuda_status())

    threads = [threading.Thread(target=switch, args=(name,)) for name in ("triton", "eager")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    backends._switch(None)
    assert backends.status() == before
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{n}", "CUDA") for n in before)


def test_a_block_that_raises_switches_back():
    before = backends.status()
    with pytest.raises(KeyError), backends.backend("eager"):
        raise KeyError
    assert backends.status() == before


def test_unknown_backend():
    before = backends.status()
    with pytest.raises(ValueError, match=r"backend must be one of cuda, triton, eager; got 'cudnn'"):
        backends.backend("cudnn")
    assert backends.status() == before


@pytest.mark.skipif(BUILT_WITH_CUDA, reason="the extension was built with CUDA")
def test_cuda_backend_that_was_not_built():
    backends.backend("eager")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: the extension was built without CUDA"):
        backends.backend("cuda")
    assert "eager PyTorch" in cuda_status()


@pytest.mark.skipif(not BUILT_WITH_CUDA, reason="the extension was built without CUDA")
def test_back_to_the_cuda_kernels():
    before = backends.status()
    backends.backend("eager")
    backends.backend("cuda")
    assert backends.status() == before


def test_triton_that_is_not_installed(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    backends.backend("eager")
    with pytest.raises(RuntimeError, match="backend 'triton' needs the package triton"):
        backends.backend("triton")
    assert "eager PyTorch" in cuda_status()


def test_importing_the_package_imports_no_triton():
    code = (
        "import sys, cnnkern, cnnkern.backends as b; b.status(); b.backend('eager'); "
        "assert not any(m.partition('.')[0] == 'triton' for m in sys.modules)"
    )
    run_child([sys.executable, "-c", code], check=True)


@needs_triton
def test_launchers_are_importable_from_the_package():
    code = "import cnnkern.triton_kernels.bn_act as m; assert callable(m.bn_act) and callable(m.bn_act_backward)"
    run_child([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.usefixtures("eager_on_cpu")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(
    ("case", "variant"),
    [(c, v) for c in testing.CASES.values() for v in c.variants],
    ids=lambda v: getattr(v, "name", v),
)
def test_eager_backend_is_eager(case, variant, dtypes):
    dtype, parameters = DTYPES[dtypes]
    if dtype != parameters and not case.float32_parameters:
        return
    for layout in LAYOUTS:
        inputs, dy = make((3, 6, 5, 7), dtype, parameters, layout, case, **case.variants[variant])
        testing.check(case, inputs, dy)


@pytest.mark.usefixtures("eager_on_cpu")
@pytest.mark.parametrize("case", testing.CASES.values(), ids=testing.CASES.keys())
def test_eager_backend_gives_what_the_schema_says(case):
    checks = ("test_schema", "test_faketensor")
    for layout in LAYOUTS:
        inputs, dy = make((3, 6, 5, 7), layout=layout, case=case)
        torch.library.opcheck(*case.forward_call(inputs), test_utils=checks)
        operator, arguments = case.backward_call(inputs, dy)
        torch.library.opcheck(operator, arguments, test_utils=checks)
        names = [a.name for a in operator._schema.arguments]
        if "output_mask" in names:
            at = names.index("output_mask")
            none = operator(*arguments[:at], [False] * len(arguments[at]), *arguments[at + 1 :])
            assert [g.shape for g in none] == [(0,)] * len(none)
    for shape in case.empty_shapes:
        inputs, dy = make(shape, case=case)
        ours, theirs = (testing.run(function, case, inputs, dy) for function in (case.function, case.reference))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.usefixtures("eager_on_cpu")
@pytest.mark.parametrize("name", ["add_relu", "bn_add_act"])
def test_eager_masks_are_those_of_the_kernels(name):
    case = testing.CASES[name]
    for shape, layout in itertools.product(((3, 5, 3, 7), (1, 3), (1, 2, 1, 1)), LAYOUTS[:2]):
        inputs, _ = make(shape, layout=layout, case=case, **({"training": False} if name == "bn_add_act" else {}))
        operator, arguments = case.forward_call(inputs)
        y, mask = operator(*arguments)[:: 3 if name == "bn_add_act" else 1]
        flat = y.reshape(-1) if y.is_contiguous() else y.movedim(1, -1).reshape(-1)
        bits = [int(v > 0) for v in flat] + [0] * 32
        wanted = [sum(bits[8 * i + k] << k for k in range(8)) for i in range(max(-(-y.numel() // 8), 4))]
        assert mask.tolist() == wanted


@pytest.mark.usefixtures("eager_on_cpu")
def test_eager_backend_keeps_the_contract():
    inputs, dy = make((3, 6, 5, 7))
    frozen = inputs | {"weight": inputs["weight"], "bias": None}
    testing.check(CASE, frozen, dy, function=functional.batch_norm_act)
    x = inputs["input"]
    _, mean, rstd = torch.ops.cnnkern.bn_act(x, None, None, None, None, True, 0.1, 1e-5, "relu")
    assert mean.dtype == rstd.dtype == torch.float64
    grads = torch.ops.cnnkern.bn_act_backward(dy, x, None, None, mean, rstd, True, "relu", [True, False, False])
    assert [g.shape for g in grads] == [x.shape, (0,), (0,)]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.batch_norm_act(x[:1, :, :1, :1], None, None, training=True)
    state = [inputs[n].clone() for n in CASE.mutated]
    empty = functional.batch_norm_act(x[:0], *state, training=True)
    assert empty.shape == (0, 6, 5, 7)
    assert all(torch.equal(v, inputs[n]) for v, n in zip(state, CASE.mutated, strict=True))
