"""`attach(..., keep="host")` under torch.compile: sent once, fetched in time, whatever becomes of memory."""

import gc
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from tests.host_runs import BATCHES, L, M, Run, assert_equal, model_of
from tests.side_stream import SideStream
from tests.toy import assert_grads_equal, batch, task_loss
from trimtab.host_copies import HostCopies
from trimtab.host_logits import HostLogits, _held, hold_traced, take_traced

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*context_fn.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    if _held:
        gc.collect()
    assert not _held


def test_bits() -> None:
    want, have = Run(model_of(), "logits").compile(), Run(model_of()).compile()
    for _ in range(2):
        assert_equal(have.step(), want.step())
        have.assert_all_is_returned()
    assert have.engine.count("to_host") == have.engine.count("to_device") == 2 * L * M


@pytest.mark.parametrize(
    ("checkpoint", "fused"), [(None, False), ("nonreentrant", True), ("reentrant", False)]
)
def test_per_layer(checkpoint: str | None, fused: bool) -> None:
    model = model_of(checkpoint=checkpoint)
    have = Run(model, fused=fused).compile()
    assert_grads_equal(have.step(), Run(model, "logits").step())
    have.assert_all_is_returned()
    sent = L * M if checkpoint is None else 0
    assert have.engine.count("to_host") == have.engine.count("to_device") == sent


@pytest.mark.parametrize("checkpoint", [None, "selective"])
def test_whole_model(checkpoint: str | None) -> None:
    model = model_of(checkpoint=checkpoint, num_layers=2)
    want, have = Run(model, "logits").step(), Run(model)
    have.call = torch.compile(have.model, fullgraph=True, backend="aot_eager")
    assert_grads_equal(have.step(), want)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_grads_equal(have.step(), want)
    have.assert_all_is_returned()
    assert have.engine.count("to_host") == (2 * 2 * M if checkpoint is None else 0)


def test_inductor() -> None:
    model = model_of(num_layers=2)
    have = Run(model).compile("inductor")
    assert_grads_equal(have.step(), Run(model, "logits").step())
    assert have.engine.count("to_host") == 2 * M
    have.assert_all_is_returned()


def test_one_graph_serves_all_layers_and_sizes() -> None:
    run = Run(model_of(num_layers=10), accumulation=1).compile(dynamic=True)
    for seed, rows in enumerate((3, 5, 2)):
        run.step([batch(rows, 6, seed=seed)])
    assert counters["stats"]["unique_graphs"] == 1
    assert run.engine.count("to_host") == run.engine.count("to_device") == 30
    run.assert_all_is_returned()


def test_a_full_host_keeps_logits_on_the_device() -> None:
    place, logits_TE = HostLogits(HostCopies(SideStream(), max_bytes=512)), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="logits of routers stay on the device"):
        keys = [hold_traced(logits_TE, place.handle(), torch.tensor(0)) for _ in range(2)]
    taken = [take_traced(logits_TE, keys[i], logits_TE[:, :0], 4, torch.float32) for i in (0, 1, 1)]
    assert all(torch.equal(one, logits_TE) for one in taken)
    # Compiled code may write to what an operator returns.
    assert len({one.data_ptr() for one in (*taken, logits_TE)}) == 4


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("max_bytes", [512, 16])
@pytest.mark.filterwarnings("ignore:max_bytes=16 of pinned memory are full")
def test_a_compiler_may_write_to_logits_that_were_sent(max_bytes: int, contiguous: bool) -> None:
    engine = SideStream()
    place = HostLogits(HostCopies(engine, max_bytes=max_bytes))
    logits_TE = torch.randn(3, 4) if contiguous else torch.randn(4, 3).T
    want = logits_TE.clone()
    key = hold_traced(logits_TE, place.handle(), torch.tensor(0))
    logits_TE.fill_(torch.nan)
    taken = take_traced(want, key, want[:, :0], 4, torch.float32)
    assert torch.equal(taken, want)
    assert taken.is_contiguous()
    assert not engine.mistakes


def test_it_fetches_one_layer_ahead_and_leaves_nothing() -> None:
    run = Run(model_of(), accumulation=1).compile()
    loss = task_loss(run.model, BATCHES[0])
    assert len(_held) == L
    del loss
    assert not _held
    run.balancer.discard_step()
    loss = task_loss(run.model, BATCHES[0])
    run.engine.log.clear()
    loss.backward()
    calls = [entry.split()[0] for entry in run.engine.log]
    assert [name for name in calls if name in ("to_device", "compute_waits")] == [
        *("to_device", "to_device", "compute_waits"),
        *("to_device", "compute_waits", "compute_waits"),
    ]


def test_hooks_that_copy_the_key_are_an_error() -> None:
    """Code that runs before the hooks are active has decided to send."""
    run = Run(model_of(), accumulation=1)
    routers = [block.moe.router for block in run.model.blocks]
    for router in routers:
        router.compile(fullgraph=True, backend="aot_eager")
    with saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        loss = task_loss(run.model, BATCHES[0])
    with pytest.raises(
        RuntimeError, match="are gone: hooks on saved tensors gave backward a copy of their key"
    ):
        loss.backward()


def test_a_graph_of_a_balancer_that_is_gone() -> None:
    handle = HostLogits(HostCopies(SideStream())).handle()
    with pytest.raises(
        RuntimeError, match=r"is gone; keep the model, or its balancer, and call torch.compiler.re"
    ):
        hold_traced(torch.ones(2, 3), handle, torch.tensor(0))
