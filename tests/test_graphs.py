"""Captures, on a stand-in for CUDA that notes what is asked of it, and in which order."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from vistoken import clock, graphs
from vistoken.eval import speed


class Cuda:
    """Streams and graphs by name; a graph's replay calls again what was called while capturing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self.streams = self.graphs = 0
        note, cuda = self.notes.append, self

        class Stream:
            def __init__(self, device=None) -> None:
                self.name, self.device = f"side{cuda.streams}", device
                cuda.streams += 1

            def wait_stream(self, other) -> None:
                note(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def __init__(self) -> None:
                self.name = f"graph{cuda.graphs}"
                cuda.graphs += 1

            def pool(self) -> str:
                return f"pool of {self.name}"

            def replay(self) -> None:
                note(f"replay {self.name}")

        @contextmanager
        def inside(name: str):
            note(f"[{name}")
            yield
            note("]")

        main = Stream()
        main.name, self.streams = "main", 0
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: main)
        patch.setattr(torch.cuda, "stream", lambda stream: inside(stream.name))
        patch.setattr(torch.cuda, "graph", lambda graph, pool=None: inside(f"{graph.name} {pool}"))

    def captured(self, name: str, graph: int = 0, times: int = 1, warm: str | None = None,
                 pool: str | None = None, side: int = 0) -> list[str]:  # fmt: skip
        """What one capture asks for."""
        return [
            f"side{side} waits for main", f"[side{side}", *[warm or name] * times, "]",
            f"main waits for side{side}", f"[graph{graph} {pool}", name, "]",
        ]  # fmt: skip


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_call_is_warmed_up_beside_the_stream_and_recorded_once(cuda: Cuda) -> None:
    def run() -> int:
        cuda.notes.append("run")
        return 7

    graph, output = graphs.record(run)
    assert (graph.name, output, cuda.notes) == ("graph0", 7, cuda.captured("run"))
    cuda.notes.clear()
    graphs.record(run, lambda: cuda.notes.append("warm"), times=2, pool="shared")
    assert cuda.notes == cuda.captured("run", 1, 2, "warm", "shared", side=1)


def test_timed_calls_share_one_stream_and_one_pool(cuda: Cuda) -> None:
    runs = {(name, 1): lambda name=name: cuda.notes.append(name) for name in "ab"}
    found = clock.captured(runs)
    wanted = cuda.captured("a", 0, 2) + cuda.captured("b", 1, 2, pool="pool of graph0")
    assert cuda.notes == wanted
    for replay in found.values():
        replay()
    assert cuda.notes == [*wanted, "replay graph0", "replay graph1"]


def test_a_model_is_captured_once_per_shape(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cuda.notes.append(f"{tuple(x.shape)}, gradients {torch.is_grad_enabled()}")
            return super().forward(x)

    monkeypatch.setattr(graphs, "check", lambda model, x: None)
    graphed = graphs.Graphed(Model(3, 2).eval())
    x, other = torch.randn(4, 3), torch.randn(5, 3)
    first = graphed(x)
    wanted = [*cuda.captured("(4, 3), gradients False", 0, graphs.WARM_UP), "replay graph0"]
    assert cuda.notes == wanted
    assert torch.equal(first, nn.functional.linear(x, graphed.model.weight, graphed.model.bias))
    assert not first.requires_grad
    graphed(other), graphed(x)
    pool = "pool of graph0"
    wanted += cuda.captured("(5, 3), gradients False", 1, graphs.WARM_UP, pool=pool, side=1)
    assert cuda.notes == [*wanted, "replay graph1", "replay graph0"]


def test_speeds_of_graphs_are_of_replays(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the host's clock, as events are no part of the stand-in."""
    monkeypatch.setattr(speed, "_peak", lambda *_: None)
    monkeypatch.setattr(speed, "_cuda_ms", speed._wall_ms)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    images = type("Images", (), {"device": torch.device("cuda"), "__len__": lambda self: 2})()
    monkeypatch.setattr(speed, "_eager", lambda *_: lambda: cuda.notes.append("run"))
    speed.measure(nn.Identity(), [None], images, mode="graph", repeats=2, warmup=1)
    assert cuda.notes == ["run", *cuda.captured("run"), "replay graph0", "replay graph0"]


def test_a_replay_warms_up_with_a_call_of_its_own(cuda: Cuda) -> None:
    decode = pytest.importorskip("vistoken.vlm.decode")

    def note(word: str):
        return lambda: cuda.notes.append(word)

    recorded = decode.Replay(note("steps"), note("step"), "shared")
    wanted = cuda.captured("steps", warm="step", pool="shared")
    assert cuda.notes == wanted
    recorded()
    decode.Replay(note("plain"), note("unused"), None)()
    assert cuda.notes == [*wanted, "replay graph0", "plain"], "without a pool nothing is recorded"


def test_the_least_time_is_of_replays(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pytest.importorskip("vistoken.vlm.decode_plan")
    taken = iter([3.0, 1.0, 2.0, 4.0, 5.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.record = self.synchronize = lambda: None

        def elapsed_time(self, end: object) -> float:
            return next(taken)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert plan.least_time(lambda: cuda.notes.append("run")) == 1.0
    assert cuda.notes == [*cuda.captured("run"), *["replay graph0"] * (1 + plan.REPLAYS)]
