"""The CUDA engine calls the right streams in the right order; what CUDA does then is tested in `tests/gpu`."""

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.copy_engine import CudaEngine
from trimtab.host_copies import HostCopies
from trimtab.host_tensor import is_ready

CPU = torch.device("cpu")


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "Event") -> None:
        self.log.append(f"{self.name} waits for the event")


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log, self.reached = log, False

    def record(self, stream: Stream) -> None:
        self.log.append(f"event on {stream.name}")

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.log.append("the host waits")
        self.reached = True


class Engine(CudaEngine):
    """On the CPU, whose memory cannot be pinned without CUDA."""

    device_type = "cpu"

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    compute = Stream(calls, "compute")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        calls.append(f"on {stream.name}")
        yield
        calls.append("off")

    def made(device: int) -> Stream:
        calls.append(f"new stream on {device}")
        return Stream(calls, "side")

    monkeypatch.setattr(torch.cuda, "Stream", made)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(calls))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: calls.append(f"kept for {stream.name}")
    )
    return calls


def test_there_and_back(log: list[str]) -> None:
    copies = HostCopies(Engine())
    sent = copies.send(torch.arange(4.0))
    copied = ["side waits for compute", "on side", "off", "kept for side", "event on side"]
    assert log == ["new stream on 3", *copied]
    assert not is_ready(sent)
    assert sent.tolist() == [0, 1, 2, 3]
    assert log[-1] == "the host waits"
    assert is_ready(sent)
    log.clear()
    held = copies.start(torch.ones(4))
    assert held is not None
    fetched, event = held.fetch()
    copies.engine.compute_waits(event, CPU)
    assert log == [*copied, *copied, "compute waits for the event"]
    assert fetched.tolist() == [1] * 4


def test_memory_is_given_back_to_the_system(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: log.append("emptied"), raising=False)
    copies = HostCopies(Engine(), max_bytes=1024)
    held = [copies.send(torch.ones(4)) for _ in range(2)]
    for sent in held:
        sent.sum()
    del held, sent
    assert copies.send(torch.ones(200)).sum() == 200
    assert log.count("emptied") == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_streams_are_not_copied(log: list[str], duplicate: Any) -> None:
    engine = CudaEngine()
    engine.side_waits(torch.device("cuda", 1))
    engine.side_waits(torch.device("cuda", 1))
    assert log.count("new stream on 1") == 1
    duplicate(engine).side_waits(torch.device("cuda", 1))
    assert log.count("new stream on 1") == 2
