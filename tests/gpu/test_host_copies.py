"""Copies beside the compute on a device: real streams, the caching allocator, and a trace in which they overlap."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import trimtab
from tests.no_sync import unsynchronised
from tests.test_host_copies import DTYPES, SHAPES, values
from tests.toy import assert_grads_equal, batch, grads, task_loss, toy_model
from trimtab import SequenceWise, ZLoss
from trimtab.copy_engine import CudaEngine
from trimtab.host_copies import HostCopies
from trimtab.host_logits import HostLogits, hold, take
from trimtab.host_tensor import is_ready, wait

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
LONG = 200_000_000  # cycles, about a tenth of a second
OBJECTIVES: list[trimtab.Objective.Config] = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.1)]


def side(engine: CudaEngine) -> torch.cuda.Stream:
    return engine._side(DEVICE)


def test_values_arrive_bit_for_bit() -> None:
    copies = HostCopies()
    for shape, of in SHAPES.items():
        for dtype in DTYPES:
            tensor = of(values(dtype).to(DEVICE))
            sent = copies.send(tensor)
            assert torch.equal(wait(sent), tensor.cpu()), (shape, dtype)
            assert wait(sent).is_pinned()


def test_sending_does_not_wait() -> None:
    copies = HostCopies()
    copies.send(torch.zeros(1024, device=DEVICE)).sum()  # pinned memory is allocated
    tensor = torch.zeros(1024, device=DEVICE)
    torch.cuda._sleep(LONG)
    tensor.fill_(7)
    sent = copies.send(tensor)
    joined = torch.stack([sent, sent])
    assert not is_ready(joined)
    assert joined.sum() == 2 * 7 * 1024
    assert is_ready(sent)


def test_the_allocator_keeps_memory_that_is_being_copied() -> None:
    engine = CudaEngine()
    copies = HostCopies(engine)
    tensor = torch.arange(1 << 20, device=DEVICE)
    place = tensor.data_ptr()
    with torch.cuda.stream(side(engine)):
        torch.cuda._sleep(LONG)  # the copy starts late
    sent = copies.send(tensor)
    del tensor
    others = [torch.full((1 << 20,), -1, device=DEVICE) for _ in range(4)]
    assert not is_ready(sent)
    assert place not in [other.data_ptr() for other in others]
    assert torch.equal(wait(sent), torch.arange(1 << 20))


def test_what_is_fetched_is_written_after_its_memory_is_free() -> None:
    copies = HostCopies()
    held = copies.start(torch.arange(1 << 20, device=DEVICE))
    assert held is not None
    held.result()
    old = torch.zeros(1 << 20, dtype=torch.int64, device=DEVICE)
    torch.cuda._sleep(LONG)
    old.fill_(-1)  # late, into memory that is fetched into next
    del old
    fetched, event = held.fetch()
    copies.engine.compute_waits(event, DEVICE)
    assert torch.equal(fetched.cpu(), torch.arange(1 << 20))


def test_memory_is_used_again_and_bounded() -> None:
    copies = HostCopies(max_bytes=4 << 20)
    for step in range(64):
        sent = copies.send(torch.full((1 << 18,), float(step), device=DEVICE))  # 1 MiB
        if step % 8 == 0:
            assert sent[0].item() == step
        del sent
    torch.cuda.synchronize()
    assert copies.used_bytes == 0
    assert copies.pinned_bytes <= 4 << 20


def test_logits_go_and_come_back_without_the_host_waiting() -> None:
    place, logits_TE = HostLogits(HostCopies()), torch.randn(8192, 256, device=DEVICE)
    held, rows_T0 = hold(logits_TE, place.handle(), torch.tensor(0))
    del held  # its pinned memory is there now
    torch.cuda.synchronize()
    with unsynchronised("cuda"):
        held, rows_T0 = hold(logits_TE, place.handle(), torch.tensor(1))
        fetched_TE = take(logits_TE, held, rows_T0, 256, torch.float32)
    assert fetched_TE.data_ptr() != logits_TE.data_ptr()
    assert torch.equal(fetched_TE, logits_TE)


# ---------------------------------------------------------------------------------------- keep="host"


def run(keep: Any, compiled: bool = False, num_steps: int = 2, **settings: Any) -> dict[str, Tensor]:
    model = toy_model(score="sigmoid", expert_bias=True, num_layers=3, **settings).to(DEVICE)
    balancer = trimtab.attach(model, OBJECTIVES, keep=keep)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    for seed in range(num_steps):
        one = batch(3, 6, seed=seed)
        one.input_ids = one.input_ids.to(DEVICE)
        task_loss(model, one).backward()
        balancer.step()
    return grads(model)


@pytest.mark.parametrize("checkpoint", [None, "nonreentrant", "reentrant"])
def test_gradients_are_those_of_kept_logits(checkpoint: str | None) -> None:
    assert_grads_equal(run("host", checkpoint=checkpoint), run("logits", checkpoint=checkpoint))


@pytest.mark.filterwarnings("ignore")
def test_compiled_gradients_are_those_of_kept_logits() -> None:
    assert_grads_equal(run("host", compiled=True), run("logits"))


def test_no_logits_are_held_on_the_device() -> None:
    """Four layers of 4,096 tokens by 256 experts in float32 are 16 MiB."""
    allocated = {}
    for keep in ("logits", "host"):
        model = toy_model(num_layers=4, num_experts=256, dtype=torch.float32).float().to(DEVICE)
        balancer = trimtab.attach(model, OBJECTIVES, keep=keep)  # type: ignore[arg-type]
        one = batch(8, 512, seed=0)
        one.input_ids = one.input_ids.to(DEVICE)
        for _ in range(2):
            loss = task_loss(model, one)
            torch.cuda.synchronize()
            allocated[keep] = torch.cuda.memory_allocated()
            loss.backward()
            balancer.step()
            grads(model)
        del loss, model, balancer
    assert allocated["logits"] - allocated["host"] >= 15 << 20


# ---------------------------------------------------------------------------------------- overlap


def intervals(trace: Any, chosen: Callable[[str], bool]) -> list[tuple[float, float]]:
    return [
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and chosen(event.name)
    ]


def overlapped(copies: list[tuple[float, float]], kernels: list[tuple[float, float]]) -> float:
    """Time of the copies during which a kernel runs."""
    return sum(
        max(0.0, min(stop, kernel_stop) - max(start, kernel_start))
        for start, stop in copies
        for kernel_start, kernel_stop in kernels
    )


def test_copies_overlap_compute_in_a_trace() -> None:
    copies = HostCopies()
    weight = torch.randn(4096, 4096, device=DEVICE)
    logits_TE = torch.randn(8192, 256, device=DEVICE)

    def layers() -> list[Tensor]:
        x, sent = weight, []
        for _ in range(8):
            sent.append(copies.send(logits_TE))
            x = x @ weight
        return sent

    for one in layers():
        wait(one)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        sent = layers()
        torch.cuda.synchronize()
    assert len(sent) == 8
    to_host = intervals(trace, lambda name: "Memcpy DtoH" in name)
    kernels = intervals(trace, lambda name: "Memcpy" not in name and "Memset" not in name)
    assert len(to_host) == 8
    total = sum(stop - start for start, stop in to_host)
    assert overlapped(to_host, kernels) > total / 2
