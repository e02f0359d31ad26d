"""Replay: forwards use given experts exactly, with weights, gradients, counts and losses of the current model.

Shapes: T tokens, E experts, K top-k, B sequences, S length, L layers, M microbatches.
"""

import contextlib
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import trimtab
from tests.routings import (
    BATCHES,
    NAMES,
    OBJECTIVES,
    SEQUENCE,
    TWO,
    K,
    balancer_names,
    counted,
    histograms,
    ids_of,
    naive_forward,
    naive_grads,
    random_ids,
)
from tests.toy import assert_grads_equal, grads, task_loss, toy_model
from tests.turns import ROWS, by_turns, loss_of, together
from trimtab import Accumulation

WAYS = {
    "fused": dict(fused=True),
    "hooks": dict(fused=False),
    "keep logits": dict(keep="logits"),
    "hooks, keep logits": dict(fused=False, keep="logits"),
}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": dict(score="sigmoid", expert_bias=True, scale=2.5),
    "raw": dict(score="sqrt_softplus", normalize_top_k=False, num_groups=3, top_k_groups=1),
    "dealt": dict(forced_balance=True),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("way", WAYS)
def test_forwards_use_given_experts(way: str, router: str) -> None:
    """Output, every gradient and counts are the definition's; records show the same."""
    model = toy_model(**ROUTERS[router])
    ids_M = ids_of(BATCHES)
    want_out = naive_forward(model, BATCHES[1].input_ids, ids_M[1])[0]
    want = naive_grads(model, BATCHES, ids_M, OBJECTIVES)
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=TWO, **WAYS[way])  # type: ignore[arg-type]
    with (
        trimtab.replay_routing(balancer, ids_M),
        trimtab.record_routing(balancer, what=("ids", "weights")) as r,
    ):
        outputs = [model(**one.call) for one in BATCHES]
    torch.testing.assert_close(outputs[1], want_out, rtol=1e-10, atol=1e-12)
    for out, one in zip(outputs, BATCHES, strict=True):
        loss_of(out, one).backward()
    assert counted(balancer) == histograms(BATCHES, ids_M)
    assert_grads_equal(grads(model), want)
    assert torch.equal(r.stacked("ids"), torch.stack(ids_M))


@pytest.mark.parametrize("way", ["fused", "hooks"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_layers_that_differ(top_k: int, way: str) -> None:
    model, one = toy_model(), BATCHES[0]
    model.blocks[1] = toy_model(num_layers=1, top_k=top_k, scale=2.0, seed=1).blocks[0]
    ids = {NAMES[0]: random_ids(18), NAMES[1]: random_ids(18, top_k=top_k)}
    want = naive_grads(model, [one], [list(ids.values())], SEQUENCE)  # type: ignore[list-item]
    balancer = trimtab.attach(model, SEQUENCE, **WAYS[way])  # type: ignore[arg-type]
    with trimtab.replay_routing(balancer, ids):
        task_loss(model, one).backward()
    assert_grads_equal(grads(model), want)


def test_ids_move_with_their_microbatch() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [])
    with trimtab.replay_routing(balancer, ids_of(BATCHES[:1])):
        model(**BATCHES[0].call)
    microbatch = balancer.context.current
    assert microbatch is not None
    assert microbatch.to(torch.device("meta")).tap is microbatch.tap is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("objectives", [OBJECTIVES, []])
@pytest.mark.parametrize("mode", ["checkpoint", "reentrant", "selective", "evaluation", "alternating"])
def test_backward_sees_what_forward_did(mode: str, objectives: Any) -> None:
    """Layers computed again, after the block too, use their own microbatch's experts."""
    if mode == "alternating" and objectives:
        objectives = SEQUENCE
    model = toy_model(num_layers=3)
    ids_M = ids_of(BATCHES, 3)
    want = naive_grads(model, BATCHES, ids_M, [] if mode == "evaluation" else objectives)
    model.checkpoint = {"checkpoint": "nonreentrant", "evaluation": "nonreentrant"}.get(mode, mode)
    model.train(mode != "evaluation")
    if mode == "alternating":
        model.checkpoint = "nonreentrant"
        balancer = trimtab.attach(model, objectives, accumulation=2)
        balancer.start_step(
            num_tokens=sum(one.num_tokens for one in BATCHES),
            num_sequences=sum(one.num_sequences for one in BATCHES),
        )
        with trimtab.replay_routing(balancer, ids_M):
            for one in BATCHES:
                task_loss(model, one).backward()
    else:
        balancer = trimtab.attach(model, objectives, accumulation=TWO)
        with trimtab.replay_routing(balancer, ids_M):
            losses = [task_loss(model, one) for one in BATCHES]
        for loss in losses:
            loss.backward()
    assert_grads_equal(grads(model), want)


@pytest.mark.parametrize("layers", ["plain", "nonreentrant"])
@pytest.mark.parametrize("within", [True, False])
def test_the_whole_model_computed_again(within: bool, layers: str) -> None:
    model = toy_model(checkpoint=None if layers == "plain" else layers)
    ids_M = ids_of(BATCHES)
    want = naive_grads(toy_model(), BATCHES, ids_M, OBJECTIVES)
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=TWO)
    with contextlib.ExitStack() as block:
        block.enter_context(trimtab.replay_routing(balancer, ids_M))
        records = block.enter_context(trimtab.record_routing(balancer))
        losses = []
        for one in BATCHES:
            out = checkpoint(model, one.input_ids, one.attention_mask, use_reentrant=False)
            losses.append(loss_of(out, one))
        if not within:
            block.close()
        for loss in losses:
            loss.backward()
    assert_grads_equal(grads(model), want)
    assert torch.equal(records.stacked("ids"), torch.stack(ids_M))


def test_the_whole_model_under_reentrant_checkpointing_is_refused() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=TWO)
    with trimtab.replay_routing(balancer, ids_of(BATCHES)):
        embed = model.embed.weight
        losses = [
            checkpoint(lambda _, one=one: task_loss(model, one), embed, use_reentrant=True) for one in BATCHES
        ]
    with pytest.raises(RuntimeError, match="called again in backward inside replay_routing"):
        losses[0].backward()


@pytest.mark.parametrize("checkpoint", [None, "nonreentrant", "reentrant"])
@pytest.mark.parametrize("way", [by_turns, together])
@pytest.mark.parametrize("fused", [True, False])
def test_several_microbatches_in_one_forward(fused: bool, way: Any, checkpoint: str | None) -> None:
    ids_M = ids_of(ROWS)
    want = naive_grads(toy_model(), ROWS, ids_M, OBJECTIVES)
    model = toy_model(checkpoint=checkpoint)
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=TWO, fused=fused)
    with trimtab.replay_routing(balancer, ids_M):
        losses = way(model, balancer, ROWS)
    torch.stack(losses).sum().backward()
    assert counted(balancer) == histograms(ROWS, ids_M)
    assert_grads_equal(grads(model), want)


def test_returned_losses() -> None:
    """Losses that the caller adds count the experts that were used."""
    model = toy_model()
    ids_M = ids_of(BATCHES)
    want = naive_grads(model, BATCHES, ids_M, SEQUENCE)
    balancer = trimtab.attach(model, SEQUENCE, accumulation=TWO, losses="returned")
    with trimtab.replay_routing(balancer, ids_M):
        losses = [task_loss(model, one) for one in BATCHES]
    found = balancer.finalize()
    (torch.stack(losses).sum() + found.balance_loss + found.z_loss).backward()
    assert_grads_equal(grads(model), want)


@pytest.mark.parametrize("blocks", ["one", "two"])
def test_counting_pass(blocks: str) -> None:
    """It counts the experts that the step will use."""
    model = toy_model()
    ids_M = ids_of(BATCHES)
    want = naive_grads(model, BATCHES, ids_M, OBJECTIVES)
    plan = Accumulation(num_microbatches=2, order="counting_pass")
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=plan)
    with contextlib.ExitStack() as block:
        block.enter_context(trimtab.replay_routing(balancer, ids_M))
        with balancer.counting_pass():
            for one in BATCHES:
                model(**one.call)
        if blocks == "two":
            block.close()
            block.enter_context(trimtab.replay_routing(balancer, ids_M))
        for one in BATCHES:
            task_loss(model, one).backward()
    assert_grads_equal(grads(model), want)
    assert counted(balancer) == histograms(BATCHES, ids_M)


# -------------------------------------------------------------------- tokens and layers without ids


@pytest.mark.parametrize("way", ["fused", "hooks"])
@pytest.mark.parametrize("training", [True, False])
def test_tokens_without_ids_are_routed_by_the_router(training: bool, way: str) -> None:
    model = toy_model(num_layers=3, score="sigmoid", expert_bias=True).train(training)
    one = BATCHES[0]
    ids_LTK = torch.stack([random_ids(18, seed=layer) for layer in range(3)])
    given = ids_LTK.clone()
    given[0, 3:9] = -1
    balancer = trimtab.attach(model, SEQUENCE, **WAYS[way])  # type: ignore[arg-type]
    layers: Any = dict(zip(balancer_names(balancer), [given[0], None, given[2]], strict=True))
    with (
        trimtab.replay_routing(balancer, layers),
        trimtab.record_routing(balancer, what=("logits", "ids")) as r,
    ):
        model(**one.call).square().mean().backward()
    have = grads(model)
    routers = [block.moe.router for block in model.blocks]
    used_LTK = r.stacked("ids", microbatch=0)
    own_LTK = torch.stack(
        [
            (logits_TE.sigmoid() + router.expert_bias_E).topk(K).indices
            for router, logits_TE in zip(routers, r.stacked("logits", microbatch=0), strict=True)
        ]
    )
    assert torch.equal(used_LTK[0], torch.where(given[0] < 0, own_LTK[0], given[0]))
    assert torch.equal(used_LTK[1], own_LTK[1])
    assert torch.equal(used_LTK[2], given[2])
    # The same experts, all of them given, are the same forward and backward.
    balancer.discard_step()
    with trimtab.replay_routing(balancer, used_LTK):
        model(**one.call).square().mean().backward()
    assert_grads_equal(grads(model), have, rtol=1e-12)
