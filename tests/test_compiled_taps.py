"""Records and replay in compiled models: one graph for all layers, microbatches and ids."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import trimtab
from tests.hf_models import tiny_model
from tests.hf_reference import relative_error, take_grads
from tests.routings import (
    BATCHES,
    OBJECTIVES,
    SEQUENCE,
    TWO,
    assert_records,
    counted,
    histograms,
    ids_of,
    naive_grads,
    random_ids,
    routing_of,
)
from tests.toy import assert_grads_equal, batch, grads, task_loss, toy_model
from trimtab.records import WHATS

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # As in `tests.test_compile`.
    pytest.mark.filterwarnings("ignore:.*context_fn.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# -------------------------------------------------------------------- records


@pytest.mark.parametrize(("checkpoint", "fused"), [("nonreentrant", True), ("selective", False)])
def test_recording_layers_share_a_graph(checkpoint: str | None, fused: bool) -> None:
    """Ten layers, more than Dynamo compiles one function again for; recording is one more graph."""
    model = toy_model(num_layers=10)
    batches = [batch(3, 6, seed=seed) for seed in (5, 6)]
    want = routing_of(model, batches)
    model.checkpoint = checkpoint
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=TWO, fused=fused)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")

    def step() -> None:
        for loss in [task_loss(model, one) for one in batches]:
            loss.backward()
        balancer.step()

    step()
    num_graphs = counters["stats"]["unique_graphs"]
    with trimtab.record_routing(balancer, what=WHATS) as records:
        step()
    assert counters["stats"]["unique_graphs"] == num_graphs + 1
    assert_records(records, want)
    with torch.compiler.set_stance("fail_on_recompile"):
        step()
        with trimtab.record_routing(balancer, what=("ids",)) as records:
            step()
    assert torch.equal(records.stacked("ids")[1, 9], want[9][1]["ids"])


# Inductor imports parts of torch.jit that torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_recording_a_compiled_model() -> None:
    """Inductor, which writes over the memory of what a graph needs no more."""
    model = toy_model(score="sigmoid").eval()
    batches = [batch(3, 6, seed=seed) for seed in (5, 6)]
    want = routing_of(model, batches)
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=TWO)
    run = torch.compile(model, fullgraph=True)
    with trimtab.record_routing(balancer, what=WHATS) as records, torch.no_grad():
        for one in batches:
            run(one.input_ids)
    assert_records(records, want)


# -------------------------------------------------------------------- replay


@contextlib.contextmanager
def no_more_graphs(number: int) -> Iterator[None]:
    before = counters["stats"]["unique_graphs"]
    yield
    assert counters["stats"]["unique_graphs"] <= before + number


@pytest.mark.parametrize(("checkpoint", "fused"), [("nonreentrant", True), (None, False)])
def test_replaying_layers_share_a_graph(checkpoint: str | None, fused: bool) -> None:
    """Ten layers, several microbatches and other ids: one more graph, whose ids are inputs."""
    model = toy_model(num_layers=10, score="sigmoid")
    first, second = ids_of(BATCHES, 10), ids_of(BATCHES, 10, seed=1)
    want_first, want_second = (naive_grads(model, BATCHES, ids, OBJECTIVES) for ids in (first, second))
    model.checkpoint = checkpoint
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=TWO, fused=fused)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")

    def step(ids_M: list[Tensor] | None) -> dict[str, Tensor]:
        replay = contextlib.nullcontext() if ids_M is None else trimtab.replay_routing(balancer, ids_M)
        with replay:
            losses = [task_loss(model, one) for one in BATCHES]
        for loss in losses:
            loss.backward()
        if ids_M is not None:
            assert counted(balancer) == histograms(BATCHES, ids_M)
        balancer.step()
        return grads(model)

    step(None)
    with no_more_graphs(1):
        assert_grads_equal(step(first), want_first)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_grads_equal(step(second), want_second)
        step(None)


@pytest.mark.parametrize("checkpoint", [None, "nonreentrant"])
def test_replaying_in_a_compiled_model(checkpoint: str | None) -> None:
    model = toy_model()
    first, second = ids_of(BATCHES), ids_of(BATCHES, seed=1)
    want_first, want_second = (naive_grads(model, BATCHES, ids, OBJECTIVES) for ids in (first, second))
    model.checkpoint = checkpoint
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=TWO)
    run: Any = torch.compile(model, fullgraph=True, backend="aot_eager")

    def step(ids_M: list[Tensor]) -> dict[str, Tensor]:
        with trimtab.replay_routing(balancer, ids_M), trimtab.record_routing(balancer) as records:
            losses = [task_loss(run, one) for one in BATCHES]
        for loss in losses:
            loss.backward()
        assert torch.equal(records.stacked("ids"), torch.stack(ids_M))
        balancer.step()
        return grads(model)

    assert_grads_equal(step(first), want_first)
    step(first)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_grads_equal(step(second), want_second)


def test_replaying_in_compiled_stock_layers_with_gaps() -> None:
    model, make_batch = tiny_model("deepseek_v3")
    given = make_batch()
    ids_LTK = torch.stack([random_ids(32, 8, seed=layer) for layer in range(2)])
    ids_LTK[:, 5] = -1
    outputs = []
    for compiled in (False, True):
        if compiled:
            for layer in model.model.layers:
                layer.mlp.gate.compile(fullgraph=True, backend="aot_eager")
        balancer = trimtab.attach(model, SEQUENCE)
        with trimtab.replay_routing(balancer, ids_LTK):
            out = model(**given)
        out.loss.backward()
        outputs.append((out.logits, take_grads(model)))
        balancer.remove()
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    assert relative_error(outputs[1][1], outputs[0][1]) < 1e-5
