"""Other ways to run inference, beside cnnkern.fold: what they give is compared before it is timed."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from benchmarks.suite import models, peers
from benchmarks.suite.groups import AGAIN, Contender, Unavailable
from benchmarks.suite.options import Options
from benchmarks.suite.plan import make_plan
from tests.test_gpu_minutes import Tiny

ROOT = Path(__file__).resolve().parent.parent
TIMED = [("eager", "channels_last"), ("cnnkern.fold", "channels_last"), *itertools.product(peers.PEERS, models.LAYOUTS)]


@pytest.mark.filterwarnings("ignore")  # exporters' and tracers' own
@pytest.mark.parametrize(("name", "layout"), TIMED)
def test_a_peer_is_compared_with_eager_before_it_is_timed(name, layout, monkeypatch):
    torch.manual_seed(0)
    model, images = (
        torch.nn.Sequential(*list(Tiny())[:4]),
        torch.rand(2, 3, 32, 32),
    )  # thousands of results: their worst errors are much alike
    monkeypatch.setattr(models, "build", lambda name: model)
    monkeypatch.setattr(models, "photographs", lambda batch: images)
    bench = models.ModelBench("m", 2, training=False, device="cpu")
    try:
        bench.step(Contender(name, layout), verify=True)()
    except Unavailable as error:
        pytest.skip(str(error))
    if name in peers.PEERS:
        load = peers.load
        monkeypatch.setattr(peers, "load", lambda *given: lambda x: load(*given)(x) + 1e-2)
        with pytest.raises(AssertionError, match="output: error"):
            bench.step(Contender(name, layout), verify=True)


def test_what_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="needs `pip install onnx onnxscript onnxruntime`"):
        peers.load("onnxruntime", Tiny(), torch.rand(1, 3, 8, 8))


def test_peers_have_a_plan_of_their_own():
    plan = make_plan(Options(peers=True), "tuned")
    shapes = {(g.operator, g.shape.partition("x")[0]) for g in plan}
    assert shapes == set(itertools.product(peers.MODELS, map(str, peers.BATCHES)))
    for group in plan:
        assert group.mode == "inference"
        assert {"eager", AGAIN, "cnnkern.fold", *peers.PEERS} <= {c.name for c in group.contenders}
    assert make_plan(Options(peers=True), "default") == []
    more = {g.operator for g in make_plan(Options(peers=True, networks="all"), "tuned")}
    assert more == {*peers.MODELS, *peers.MORE}


def test_the_documents_say_what_each_needs():
    table = dict(re.findall(r"^\| ([\w-]+) \| `pip install ([\w ]+)` \|", (ROOT / "docs/fold.md").read_text(), re.M))
    assert {name: tuple(needs.split()) for name, needs in table.items()} == {
        name: peer.packages for name, peer in peers.PEERS.items()
    }
