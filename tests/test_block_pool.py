"""The pool of CPU results reuses memory (csrc/block_pool.h)."""

import gc
import os
import sys
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cnnkern
from cnnkern import functional, memory
from cnnkern.extension import extension
from tests.child import run_child

pytestmark = pytest.mark.skipif(extension is None, reason="the pool is the extension's")
LARGE = (4, 64, 64, 64)  # a block of 4 MiB in float32
MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory.empty_cache()
    yield
    memory.use_pool(True)
    memory.empty_cache()


def result(shape=LARGE) -> torch.Tensor:
    x = torch.randn(shape)
    return functional.add_relu(x, x)


def test_the_memory_of_a_result_is_the_next_ones():
    y = result()
    place, used = y.data_ptr(), memory.pool_sizes().used
    assert used >= 4 * MIB
    del y
    assert memory.pool_sizes().kept >= 4 * MIB
    y = result()
    assert y.data_ptr() == place
    assert memory.pool_sizes().used == used


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.3])
def test_a_block_is_at_most_an_eighth_larger_than_its_tensor(share):
    rows = int(1000 * share)
    before = memory.pool_sizes().used
    y = functional.add_relu(torch.randn(rows, 1000), torch.randn(rows, 1000))
    held = memory.pool_sizes().used - before
    bits = 2**18  # the mask of the gradient may be a block as well
    assert y.nbytes <= held <= y.nbytes * 1.125 + bits


def test_it_never_holds_more_than_half_more_than_was_needed_at_once():
    generator = torch.Generator().manual_seed(0)
    alive = []
    for _ in range(200):
        if alive and torch.rand(1, generator=generator) < 0.5:
            del alive[int(torch.randint(len(alive), (1,), generator=generator))]
        side = int(torch.randint(64, 128, (1,), generator=generator))
        alive.append(result((2, 32, side, side)))
        used, kept, most = memory.pool_sizes()
        assert used + kept <= 1.5 * most
        assert used <= 1.5 * most


def test_small_results_are_mallocs():
    before = memory.pool_sizes()
    y = result((2, 3, 8, 8))
    assert memory.pool_sizes() == before
    assert y.sum() > 0


def test_what_is_kept_goes_back_on_request():
    y = result()
    del y
    assert memory.pool_sizes().kept > 0
    cnnkern.empty_cache()
    assert memory.pool_sizes().kept == 0


def test_switched_off_it_keeps_nothing_and_takes_back_what_it_gave():
    y = result()
    memory.use_pool(False)
    used = memory.pool_sizes().used
    z = result()
    assert memory.pool_sizes().used == used
    del y, z
    assert memory.pool_sizes()[:2] == (0, 0)


def test_unwritten_memory_is_filled_where_pytorch_is_asked_to():
    assert torch.utils.deterministic.fill_uninitialized_memory  # tests poison memory
    result().fill_(3.0)
    raw = torch.ops.cnnkern.grouped_conv2d_backward(
        torch.randn(LARGE),
        torch.randn(LARGE),
        torch.randn(64, 1, 1, 1),
        [1, 1],
        [0, 0],
        [1, 1],
        64,
        [True, False, False],
    )
    assert raw[0].isfinite().all()


def test_results_may_be_resized_pickled_shared_and_viewed(tmp_path):
    y = result()
    expected = y.clone()
    torch.save(y, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt"), expected)
    assert torch.equal(y.share_memory_(), expected)
    z = result()
    z.resize_(8, 64, 64, 64).zero_()  # more than the block has
    assert z.untyped_storage().nbytes() == 8 * MIB
    view = result().view(-1)[-3:]
    gc.collect()
    result()
    assert view.isfinite().all()


def test_threads_have_blocks_of_their_own():
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            x = torch.randn(2, 32, 48, 48, generator=generator)
            y = functional.add_relu(x, x)
            if not torch.equal(y, torch.relu(x + x)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    used, kept, most = memory.pool_sizes()
    assert used + kept <= 1.5 * most


def test_the_profiler_sees_it():
    x = torch.randn(LARGE)
    functional.add_relu(x, x)  # a block is kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y = functional.add_relu(x, x)
    taken = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    assert taken >= y.nbytes


FAULTS = """
import resource, torch
from cnnkern import functional, memory
torch.set_num_threads(1)
images = [torch.randn(8, 64, side, side) for side in SIDES]

def step():
    before = None
    for x in images:
        with torch.no_grad():
            after = functional.add_relu(x, x)
        before = after  # two results are in use at once

for _ in range(3):
    step()
counted = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counted))  # a system that is short of memory takes pages away, and adds faults to some steps
used, kept, most = memory.pool_sizes()
assert used + kept <= 1.5 * most
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults as Linux counts them")
@pytest.mark.parametrize("sides", [(112,), (112, 96, 80, 72, 64, 56, 48, 40, 36, 32)], ids=["equal", "shrinking"])
def test_large_results_cost_no_page_faults(sides):
    """With malloc's defaults: each call would fault thousands of times. Where results shrink, a block for each size
    would be twice what is needed at once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GLIBC_TUNABLES", "MALLOC_"))}
    # Fixed, so that they do not adapt: large blocks are new memory, and what is small, such as masks, costs no faults.
    environment["GLIBC_TUNABLES"] = f"glibc.malloc.mmap_threshold={2**18}:glibc.malloc.trim_threshold={2**28}"
    faults = {}
    for pool in ("0", "1"):
        code = FAULTS.replace("SIDES", str(sides))
        done = run_child([sys.executable, "-c", code], env=environment | {"CNNKERN_POOL": pool}, cwd="/", check=True)
        faults[pool] = int(done.stdout)
    assert faults["1"] < 10
    assert faults["0"] > 1000


def test_the_environment_is_checked():
    done = run_child([sys.executable, "-c", "import cnnkern"], env=os.environ | {"CNNKERN_POOL": "no"}, cwd="/")
    assert "CNNKERN_POOL must be 0, 1 or unset; got 'no'" in done.stderr


FORK = """
import os, threading, torch
from cnnkern import functional
torch.set_num_threads(1)
x = torch.randn(4, 64, 64, 64)
stop = threading.Event()

def work():
    while not stop.is_set():
        functional.add_relu(x, x)

threads = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in threads]
for _ in range(20):
    child = os.fork()
    if child == 0:
        ok = torch.equal(functional.add_relu(x, x), torch.relu(x + x))
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
[t.join() for t in threads]
print("forked")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_beside_threads_that_allocate_has_a_pool_that_works():
    done = run_child([sys.executable, "-W", "ignore", "-c", FORK], cwd="/", timeout=120, check=True)
    assert done.stdout.strip() == "forked"


NO_MEMORY = """
import resource, torch
from cnnkern import functional, memory
torch.set_num_threads(1)
rows = [torch.zeros(1000, 1000) for _ in range(2)]
results = [functional.add_relu(*rows) for _ in range(60)]
del results
kept = memory.pool_sizes().kept
assert kept > 200 * 2**20, kept
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 300 * 2**20, resource.RLIM_INFINITY))
x = torch.zeros(60, 1000, 1000)  # 229 MiB, of which there are 300 left
with torch.no_grad():
    y = functional.add_relu(x, x)  # another: only with what the pool keeps
print(memory.pool_sizes().kept)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_it_gives_back_what_it_keeps_before_there_is_no_memory():
    done = run_child([sys.executable, "-c", NO_MEMORY], cwd="/", check=True)
    assert int(done.stdout) < 10 * MIB  # the mask of this call


def test_a_result_that_finds_no_memory_changes_nothing():
    before = memory.pool_sizes()
    x = torch.zeros(1, 1, 1, 1).expand(2**14, 2**14, 128, 128)  # 16 TiB of results
    with torch.no_grad(), pytest.raises(RuntimeError, match="can't allocate memory"):
        functional.batch_norm_act(x, torch.zeros(2**14), torch.ones(2**14), act="relu")
    assert memory.pool_sizes()[::2] == before[::2]  # in use, and the most, by which it judges how much to keep


@pytest.mark.slow
def test_blocks_that_nothing_uses_go_back():
    code = f"""
import time, torch
from cnnkern import functional, memory
x = torch.randn{LARGE}
functional.add_relu(x, x)
assert memory.pool_sizes().kept >= 4 * 2**20
time.sleep(10.5)
small = torch.randn(1, 64, 64, 64)  # of another class
functional.add_relu(small, small)
print(memory.pool_sizes().kept)
"""
    done = run_child([sys.executable, "-c", code], cwd="/", check=True)
    assert int(done.stdout) < 2 * MIB
