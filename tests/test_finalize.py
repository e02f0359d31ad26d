"""Losses that a step returns: their values, their gradients bit for bit those that are injected, one collective."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import trimtab
from tests.parallel.pool import Ranks
from tests.test_exactness import OBJECTIVES, RAGGED, totals
from tests.toy import (
    Batch,
    ToyModel,
    assert_grads_equal,
    batch,
    grads,
    recorded,
    reference_grads,
    task_loss,
    toy_model,
)
from trimtab import Accumulation, GlobalBatch, GradReduction, SequenceWise, ZLoss
from trimtab.finalize import StepLosses
from trimtab.losses import Objective
from trimtab.ranks import TokenRanks
from trimtab.reference import RoutedTokens, reference_loss
from trimtab.scores import SCORE_NAMES

SOME = [SequenceWise.Config(coef=0.3, unit="document"), GlobalBatch.Config(coef=0.4), ZLoss.Config(coef=0.05)]


def attach(
    model: ToyModel, objectives: Sequence[Objective.Config], M: int, **settings: Any
) -> trimtab.Balancer:
    plan = Accumulation(num_microbatches=M, order="forward_first")
    return trimtab.attach(model, objectives, accumulation=plan, fused=False, **settings)


def returned(
    model: ToyModel,
    objectives: Sequence[Objective.Config],
    batches: Sequence[Batch],
    factors: tuple[float, float] = (1.0, 1.0),
    run: Any = None,
) -> tuple[StepLosses, dict[str, Tensor]]:
    """One step whose losses are added to the task's; they and all gradients."""
    balancer = attach(model, objectives, len(batches), losses="returned")
    total = sum(task_loss(run or model, one) for one in batches)
    losses = balancer.finalize()
    (total + factors[0] * losses.balance_loss + factors[1] * losses.z_loss).backward()
    balancer.step()
    balancer.metrics()
    balancer.remove()
    return losses, grads(model)


def injected(
    model: ToyModel, objectives: Sequence[Objective.Config], batches: Sequence[Batch], run: Any = None
) -> dict[str, Tensor]:
    balancer = attach(model, objectives, len(batches), measure_every=0)
    sum(task_loss(run or model, one) for one in batches).backward()
    balancer.step()
    balancer.remove()
    return grads(model)


def reference_values(
    model: ToyModel, objectives: Sequence[Objective.Config], batches: Sequence[Batch], score: str
) -> tuple[float, float]:
    """Sum over layers of the plain formula: of balance losses, and of z-losses."""
    with recorded(model) as calls:
        for one in batches:
            model(**one.call)
    balance, z = 0.0, 0.0
    for record in calls:
        routed = [
            RoutedTokens(logits, ids, one.sequence_T, one.document_T, one.valid_BS.reshape(-1))
            for (logits, ids), one in zip(record, batches, strict=True)
        ]
        for config in objectives:
            value = reference_loss(config.build(), routed, score, None).item()
            balance, z = (balance, z + value) if isinstance(config, ZLoss.Config) else (balance + value, z)
    return balance, z


@pytest.mark.parametrize("score", SCORE_NAMES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_are_those_of_the_formula(name: str, score: str) -> None:
    model = toy_model(score=score, expert_bias=True)
    want = reference_grads(model, [c.build() for c in OBJECTIVES[name]], RAGGED, score)
    values = reference_values(model, OBJECTIVES[name], RAGGED, score)
    losses, have = returned(model, OBJECTIVES[name], RAGGED)
    assert_grads_equal(have, want)
    assert losses.balance_loss.item() == pytest.approx(values[0], rel=1e-10, abs=1e-14)
    assert losses.z_loss.item() == pytest.approx(values[1], rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("checkpoint", [None, "nonreentrant", "selective"])
@pytest.mark.parametrize("batches", [RAGGED[:1], RAGGED], ids=["one", "three"])
@pytest.mark.parametrize("score", SCORE_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_the_injected_ones_bit_for_bit(
    dtype: torch.dtype, score: str, batches: list[Batch], checkpoint: str | None
) -> None:
    model = toy_model(score=score, expert_bias=True, dtype=dtype).to(dtype)
    model.checkpoint = checkpoint
    want = injected(model, OBJECTIVES["all"], batches)
    _, have = returned(model, OBJECTIVES["all"], batches)
    assert all(torch.equal(have[name], want[name]) for name in want)
    without = injected(model, [], batches)
    assert not any(torch.equal(have[name], without[name]) for name in want if "router.weight" in name)


def test_each_loss_follows_what_it_is_multiplied_with() -> None:
    model = toy_model(score="sigmoid")
    scaled = [SequenceWise.Config(coef=0.6), ZLoss.Config(coef=0.15)]
    want = reference_grads(model, [c.build() for c in scaled], RAGGED[:1], "sigmoid")
    _, have = returned(
        model, [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.05)], RAGGED[:1], factors=(2.0, 3.0)
    )
    assert_grads_equal(have, want)


def test_half_precision_follows_the_scale_of_the_loss() -> None:
    layer = toy_model().half().blocks[0].moe.router
    layer.config = type(layer.config)(
        dim=8, num_experts=6, top_k=2, score="softmax", normalize_top_k=True, dtype=None
    )
    balancer = trimtab.attach(layer, [SequenceWise.Config(coef=1e-6)], losses="returned")
    layer(torch.randn(1, 64, 8, dtype=torch.float16))
    (balancer.finalize().balance_loss * 2.0**16).backward()
    assert layer.weight.grad.abs().max() > 1e-4
    balancer.step()


def test_injected_losses_are_numbers_to_look_at() -> None:
    model = toy_model(score="sigmoid")
    balancer = trimtab.attach(model, SOME, accumulation=3, measure_every=2)
    for step in range(2):
        balancer.start_step(**totals(RAGGED))
        for one in RAGGED:
            task_loss(model, one).backward()
        if step == 0:
            with pytest.raises(RuntimeError, match="not measured; attach with measure_every=1"):
                balancer.finalize()
        else:
            losses = balancer.finalize()
            assert balancer.finalize().z_loss == losses.z_loss
        balancer.step()
    assert not losses.balance_loss.requires_grad
    values = reference_values(model, SOME, RAGGED, "sigmoid")
    assert losses.balance_loss.item() == pytest.approx(values[0], rel=1e-10)
    assert losses.z_loss.item() == pytest.approx(values[1], rel=1e-10)


def test_tokens_per_expert_are_the_steps() -> None:
    model = toy_model(expert_bias=True)
    losses, _ = returned(model, SOME, RAGGED)
    with recorded(model) as calls:
        for one in RAGGED:
            model(**one.call)
    assert list(losses.tokens_per_expert) == ["blocks.0.moe.router", "blocks.1.moe.router"]
    for counts_E, record in zip(losses.tokens_per_expert.values(), calls, strict=True):
        valid = torch.cat(
            [ids[one.valid_BS.reshape(-1)] for (_, ids), one in zip(record, RAGGED, strict=True)]
        )
        assert torch.equal(counts_E, valid.flatten().bincount(minlength=6))


# Reading the gradient of an activation, as the compiler does to guard it, warns in torch 2.13.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
def test_compiled_layers_return_their_losses(whole: bool) -> None:
    torch._dynamo.reset()
    model = toy_model(score="sigmoid", expert_bias=True)
    batches = [batch(2, 6, seed=seed) for seed in range(2)]
    objectives = [SequenceWise.Config(coef=0.3), GlobalBatch.Config(coef=0.4), ZLoss.Config(coef=0.05)]
    want = injected(model, objectives, batches)
    balancer = attach(model, objectives, len(batches), losses="returned")
    run: Any = model
    if whole:
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        total = sum(task_loss(run, one) for one in batches)
        losses = balancer.finalize()
        (total + losses.balance_loss + losses.z_loss).backward()
        balancer.step()
        assert_grads_equal(grads(model), want)
    torch._dynamo.reset()


# ---------------------------------------------------------------- several ranks


def step_on_ranks(batches: list[Batch], losses: str) -> Any:
    model = toy_model(score="sigmoid", expert_bias=True)
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    balancer = trimtab.attach(
        model,
        SOME,
        reduction=GradReduction(ranks="sum", num_ranks=num_ranks),
        ranks=TokenRanks(tokens=dist.group.WORLD),
        losses=losses,
        fused=False,
        measure_every=1 if losses == "injected" else 0,
    )
    total = task_loss(model, batches[rank])
    calls, real = [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    dist.all_reduce = counted
    try:
        found = balancer.finalize()
        during = len(calls)
        balancer.finalize()
        if losses == "returned":
            total = total + found.balance_loss + found.z_loss
        total.backward()
        balancer.step()
        after = len(calls) - during
    finally:
        dist.all_reduce = real
    summed = {}
    for name, grad in grads(model).items():
        real(grad)
        summed[name] = grad
    counts = {name: value.clone() for name, value in found.tokens_per_expert.items()}
    return found.balance_loss.item(), found.z_loss.item(), counts, summed, during, after


@pytest.mark.parametrize("losses", ["returned", "injected"])
def test_one_collective_gives_every_rank_the_losses_of_the_step(ranks: Ranks, losses: str) -> None:
    batches = [batch(3, 5, seed=1, padded=True), batch(2, 7, seed=2)]
    model = toy_model(score="sigmoid", expert_bias=True)
    # Two ranks' rows in one step: as two microbatches of one process, whose losses of microbatch scope are none.
    want, gradients = returned(model, SOME, batches)
    for balance, z, counts, summed, during, after in ranks.run(step_on_ranks, 2, batches, losses):
        assert during == 1
        assert after == (1 if losses == "injected" else 0)  # the largest logit of a step that is logged
        assert balance == pytest.approx(want.balance_loss.item(), rel=1e-10)
        assert z == pytest.approx(want.z_loss.item(), rel=1e-10)
        assert all(torch.equal(counts[name], value) for name, value in want.tokens_per_expert.items())
        assert_grads_equal(summed, gradients)


# ---------------------------------------------------------------- mistakes


def test_losses_of_a_step_do_not_exist_before_its_last_forward() -> None:
    with pytest.raises(ValueError, match=r"run all forwards first .*order='forward_first'"):
        trimtab.attach(toy_model(), SOME, accumulation=2, losses="returned")
    with pytest.raises(ValueError, match="run all forwards first"):
        trimtab.attach(toy_model(), SOME, losses="returned").start_step(num_microbatches=2)
    model = toy_model()
    balancer = attach(model, SOME, 2, losses="returned")
    with pytest.raises(RuntimeError, match="without a training forward"):
        balancer.finalize()
    task_loss(model, RAGGED[0])
    with pytest.raises(RuntimeError, match="after 1 of num_microbatches=2 forwards"):
        balancer.finalize()
    task_loss(model, RAGGED[1])
    balancer.finalize()
    with pytest.raises(RuntimeError, match="a training forward after"):
        task_loss(model, RAGGED[2])
    balancer.discard_step()
    sum(task_loss(model, one) for one in RAGGED[:2])
    balancer.finalize()
    balancer.step()


def test_a_forward_that_was_broken_off_returns_no_losses() -> None:
    model = toy_model()
    want = returned(model, SOME, RAGGED[:1])
    balancer = attach(model, SOME, 1, losses="returned")
    described = balancer.microbatch(
        valid_mask=RAGGED[0].attention_mask, position_ids=RAGGED[0].position_ids.expand(3, 5)
    )
    with contextlib.suppress(KeyError), balancer.interleaved([described]) as (run,):
        run(model, RAGGED[0].input_ids)
        raise KeyError
    total = task_loss(model, RAGGED[0])
    losses = balancer.finalize()
    (total + losses.balance_loss + losses.z_loss).backward()
    balancer.step()
    assert_grads_equal(grads(model), want[1])


def test_tokens_per_expert_are_the_callers_own() -> None:
    model = toy_model()
    balancer = attach(model, SOME, 1, losses="returned")
    (task_loss(model, RAGGED[0]) + (losses := balancer.finalize()).balance_loss).backward()
    for counts_E in losses.tokens_per_expert.values():
        counts_E.zero_()
    balancer.step()
    assert sum(balancer.metrics()["load"][0]) == pytest.approx(6)


def test_ranks_that_are_only_declared_keep_their_share() -> None:
    """Without process groups the gradient's factor is that of every rank's part, before finalize() and after."""
    reduction = GradReduction(ranks="mean", num_ranks=4)
    found = []
    for losses in ("injected", "returned"):
        model = toy_model()
        balancer = attach(model, SOME, 1, reduction=reduction, losses=losses, measure_every=1)
        total = task_loss(model, RAGGED[0])
        step = balancer.finalize()
        (total + (step.balance_loss + step.z_loss if losses == "returned" else 0)).backward()
        balancer.step()
        found.append(grads(model))
    model = toy_model()
    balancer = attach(model, SOME, 1, reduction=reduction)
    task_loss(model, RAGGED[0]).backward()
    balancer.step()
    assert_grads_equal(found[0], grads(model))
    assert_grads_equal(found[1], found[0])


def test_a_step_whose_losses_nobody_asked_for_warns() -> None:
    model = toy_model()
    balancer = attach(model, SOME, 1, losses="returned")
    task_loss(model, RAGGED[0]).backward()
    with pytest.warns(UserWarning, match="nobody asked for"):
        balancer.step()


def test_reentrant_checkpointing_cannot_return_losses() -> None:
    model = toy_model(checkpoint="reentrant")
    balancer = attach(model, SOME, 1, losses="returned")
    total = task_loss(model, RAGGED[0])
    losses = balancer.finalize()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        (total + losses.balance_loss).backward()
    balancer.discard_step()


def test_what_contradicts_returned_losses_is_refused() -> None:
    model = toy_model()
    with pytest.raises(ValueError, match="losses='added' must be 'injected' or 'returned'"):
        trimtab.attach(model, SOME, losses="added")
    balancer = attach(model, SOME, 1, losses="returned")
    with pytest.raises(ValueError, match="scale them with the loss"):
        balancer.follow(torch.zeros(()))
    task_loss(model, RAGGED[0])
    with pytest.raises(RuntimeError, match="copy it after"):
        copy.deepcopy(model)


def test_the_audit_sees_losses_that_are_added_and_those_that_are_not() -> None:
    model = toy_model(score="sigmoid")
    balancer = attach(model, [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.05)], 1, losses="returned")

    def step(added: bool) -> None:
        total = task_loss(model, RAGGED[0])
        losses = balancer.finalize()
        if added:
            total = total + losses.balance_loss + losses.z_loss
        total.backward()

    for added, coefficient in ((True, 1.0), (False, 0.0)):
        found = trimtab.audit(balancer, lambda added=added: step(added))
        assert [layer.effective_coef for layer in found.layers] == pytest.approx([coefficient] * 2, abs=1e-9)
