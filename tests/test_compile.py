"""torch.compile: per layer and whole model, with checkpointing, counted once and equal to eager."""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import trimtab
from tests.toy import ToyModel, assert_grads_equal, batch, grads, reference_grads, task_loss, toy_model
from trimtab import Accumulation, CentredSign, GlobalBatch, ImportanceCV, SequenceWise, ZLoss
from trimtab.losses import Objective

OBJECTIVES: list[Objective.Config] = [
    SequenceWise.Config(coef=0.3),
    GlobalBatch.Config(coef=0.4, counts="exact"),
    ImportanceCV.Config(coef=0.1),
    ZLoss.Config(coef=0.1),
]
BATCHES = [batch(3, 6, seed=5, padded=True), batch(3, 6, seed=6, padded=True)]

pytestmark = [
    # Dynamo says so when it meets context_fn, whatever that holds.
    pytest.mark.filterwarnings("ignore:.*context_fn.*"),
    # Dynamo looks at .grad of every graph input, and a layer's input is not a leaf.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def check(model: ToyModel, run: Any, want: dict[str, torch.Tensor], balancer: trimtab.Balancer) -> None:
    """Two steps of all forwards then all backwards: gradients as wanted, every token counted once."""
    for _ in range(2):
        for loss in [task_loss(run, one) for one in BATCHES]:
            loss.backward()
        total = sum(one.num_tokens for one in BATCHES)
        assert [int(row.counts_AE[0].sum()) for row in balancer.ledger.settle()] == [2 * total] * len(
            model.blocks
        )
        balancer.step()
        assert_grads_equal(grads(model), want)


def attached(num_layers: int, **settings: Any) -> tuple[ToyModel, dict[str, torch.Tensor], trimtab.Balancer]:
    model = toy_model(num_layers=num_layers, score="sigmoid", expert_bias=True, **settings)
    want = reference_grads(model, [c.build() for c in OBJECTIVES], BATCHES, "sigmoid")
    order = Accumulation(num_microbatches=2, order="forward_first")
    return model, want, trimtab.attach(model, OBJECTIVES, accumulation=order, measure_every=2)


@pytest.mark.parametrize("checkpoint", [None, "nonreentrant", "reentrant", "selective"])
def test_per_layer(checkpoint: str | None) -> None:
    """Twelve layers share one graph: more than the recompilation limit of eight allows otherwise."""
    model, want, balancer = attached(12)
    model.checkpoint = checkpoint
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    check(model, model, want, balancer)
    # Reentrant checkpointing runs the same code without gradients first: one more graph.
    assert counters["stats"]["unique_graphs"] == (2 if checkpoint == "reentrant" else 1)


@pytest.mark.parametrize("checkpoint", [None, "nonreentrant", "selective"])
def test_whole_model(checkpoint: str | None) -> None:
    model, want, balancer = attached(2)
    model.checkpoint = checkpoint
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    check(model, run, want, balancer)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(model, run, want, balancer)


# Inductor imports parts of torch.jit that torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("checkpoint", [None, "nonreentrant"])
def test_inductor_per_layer(checkpoint: str | None) -> None:
    model, want, balancer = attached(2)
    model.checkpoint = checkpoint
    for block in model.blocks:
        block.compile(fullgraph=True)
    check(model, model, want, balancer)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_inductor_whole_model() -> None:
    """The compiler uses memory of one layer for another within the graph; what the ledger keeps is not in it."""
    model, want, balancer = attached(4)
    check(model, torch.compile(model, fullgraph=True), want, balancer)


def test_what_the_ledger_keeps_is_its_own() -> None:
    """Neither what the operator is given nor what it returns, whose memory a compiler may use again."""
    model = toy_model()
    balancer = trimtab.attach(model, [trimtab.SequenceWise.Config(coef=0.3)])
    state = model.blocks[0].moe.router._trimtab_router
    executed_GE = torch.tensor([[3, 1, 0, 0, 0, 0]])
    logits_TE, ids_TK = torch.randn(2, 6), torch.tensor([[0, 1], [0, 0]])
    described = (None, None, None, torch.tensor([2]), None, 0, 1)
    counts_AGE, _ = torch.ops.trimtab.observe(
        state.handle, torch.tensor(1), logits_TE, ids_TK, *described, executed_GE
    )
    counts_AGE.fill_(-7)
    executed_GE.fill_(-7)
    assert balancer.ledger.settle()[0].counts_AE.tolist() == [[3, 1, 0, 0, 0, 0]]


def test_keeping_logits() -> None:
    model = toy_model(num_layers=2, score="sqrt_softplus")
    want = reference_grads(model, [c.build() for c in OBJECTIVES], BATCHES, "sqrt_softplus")
    order = Accumulation(num_microbatches=2, order="forward_first")
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=order, keep="logits")
    check(model, torch.compile(model, fullgraph=True, backend="aot_eager"), want, balancer)


def test_counting_alone_survives_dead_code_elimination() -> None:
    """Without an objective nothing in backward needs the counts; the bias rule still does."""
    model = toy_model(score="sigmoid", expert_bias=True)
    eager = copy.deepcopy(model)
    trimtab.attach(eager, [], bias=CentredSign.Config())
    task_loss(eager, BATCHES[0])
    trimtab.balancer_of(eager).step()
    balancer = trimtab.attach(model, [], bias=CentredSign.Config())
    task_loss(torch.compile(model, fullgraph=True, backend="aot_eager"), BATCHES[0])
    balancer.step()
    for have, want in zip(model.blocks, eager.blocks, strict=True):
        assert torch.equal(have.moe.router.expert_bias_E, want.moe.router.expert_bias_E)


def test_evaluation_does_not_count() -> None:
    model, _, balancer = attached(1)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        run(BATCHES[0].input_ids)
    model.eval()
    run(BATCHES[0].input_ids)
    assert balancer.ledger.rows[0].num_forwards == 0


def test_documents_described_outside_a_compiled_model() -> None:
    """Finding documents reads the device, so whole-model graphs get them from balancer.microbatch."""
    objectives = [SequenceWise.Config(coef=0.3, unit="document")]
    one = batch(2, 8, seed=3, packed="cu_seqlens")
    model = toy_model()
    want = reference_grads(model, [c.build() for c in objectives], [one], "softmax")
    balancer = trimtab.attach(model, objectives)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    with balancer.microbatch(batch_shape=(2, 8), cu_seqlens=one.cu_seqlens):
        loss = task_loss(run, one)
    loss.backward()
    assert_grads_equal(grads(model), want)


def test_no_global_flag_is_touched() -> None:
    import torch._functorch.config
    import torch._inductor.config

    configs = [torch._dynamo.config, torch._functorch.config, torch._inductor.config]
    before = [config.save_config() for config in configs]
    model, want, balancer = attached(1)
    model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    check(model, model, want, balancer)
    assert [config.save_config() for config in configs] == before
