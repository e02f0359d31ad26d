"""Counts over ranks at their edges: ragged ranks, layers that a rank does not run, divided sequences, signals."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import trimtab
from tests.parallel.pool import Ranks
from tests.parallel.test_trainer import PLANS, config_of
from tests.toy import Batch, ToyModel, batch, grads, reference_grads, task_loss, toy_model
from trimtab import (
    Balancer,
    BatchWise,
    GlobalBatch,
    GradReduction,
    Objective,
    SequenceWise,
    Sign,
    TokenRanks,
    ZLoss,
)
from trimtab.train.trainer import Trainer

RAGGED = [batch(2, 5, seed=1, padded=True), batch(4, 5, seed=2)]
LOSSES: dict[str, list[Objective.Config]] = {
    "z": [ZLoss.Config(coef=0.5)],
    "sequence": [SequenceWise.Config(coef=0.5)],
    "token": [SequenceWise.Config(coef=0.5, weighting="token")],
    "batch": [BatchWise.Config(coef=0.5)],
}


def merged(batches: list[Batch]) -> Batch:
    mask = torch.cat([one.valid_BS.long() for one in batches])
    return Batch(torch.cat([one.input_ids for one in batches]), mask)


def one_step(objectives: list[Objective.Config], world_size: int) -> tuple[dict[str, Tensor], float]:
    """Gradients of one ragged step that declares nothing, summed over ranks; what the audit says."""
    model = toy_model()
    balancer = trimtab.attach(model, objectives, reduction=GradReduction(num_ranks=world_size))

    def step() -> None:
        task_loss(model, RAGGED[dist.get_rank()]).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)

    step()
    balancer.step()
    found = grads(model)
    audit = trimtab.audit(balancer, step)
    return found, max(abs(layer.effective_coef - 1) + layer.residual for layer in audit.layers)


@pytest.mark.parametrize("name", LOSSES)
def test_ragged_ranks_are_exact_without_declared_totals(ranks: Ranks, name: str) -> None:
    found = ranks.run(one_step, 2, LOSSES[name], 2)
    want = reference_grads(toy_model(), [c.build() for c in LOSSES[name]], [merged(RAGGED)], "softmax")
    for have, error in found:
        for parameter in want:
            torch.testing.assert_close(
                have[parameter], want[parameter], rtol=1e-10, atol=1e-13, msg=parameter
            )
        assert error < 1e-9


def skip_a_layer(objectives: list[Objective.Config], rank_that_skips: int) -> dict[str, Any]:
    """One step in which one rank leaves the second layer out."""
    model = toy_model(score="sigmoid", expert_bias=True)
    reduction = GradReduction(num_ranks=2)
    balancer = trimtab.attach(model, objectives, bias=Sign.Config(), reduction=reduction, measure_every=1)
    if dist.get_rank() == rank_that_skips:
        model.blocks[1].forward = lambda x: x
    task_loss(model, batch(2, 5, seed=3)).backward()
    balancer.step()
    return balancer.metrics()


@pytest.mark.parametrize("rank_that_skips", [0, 1])
@pytest.mark.parametrize("name", ["sequence", "batch"])
def test_a_layer_that_one_rank_does_not_run(ranks: Ranks, name: str, rank_that_skips: int) -> None:
    first, second = ranks.run(skip_a_layer, 2, LOSSES[name], rank_that_skips)
    for key in ("num_tokens", "load", "bias", "layers"):
        assert first[key] == second[key]
    assert first["num_tokens"] == [20, 10]


def divided(act: Callable[[ToyModel, Balancer], object]) -> str:
    model = toy_model()
    world = dist.group.WORLD
    balancer = trimtab.attach(
        model,
        [SequenceWise.Config(coef=1.0)],
        reduction=GradReduction(num_ranks=2),
        ranks=TokenRanks(tokens=world, sequence=world),
    )
    try:
        act(model, balancer)
    except ValueError as error:
        return str(error)
    return "accepted"


def call_plainly(model: ToyModel, balancer: Balancer) -> None:
    task_loss(model, batch(2, 4, seed=0))


def describe_without_tokens(model: ToyModel, balancer: Balancer) -> None:
    with balancer.microbatch(batch_shape=(2, 8)):
        task_loss(model, batch(2, 4, seed=0))


@pytest.mark.parametrize("act", [call_plainly, describe_without_tokens])
def test_a_part_of_a_sequence_must_be_said_to_be_one(ranks: Ranks, act: Any) -> None:
    assert all(
        "balancer.microbatch(" in error and "tokens=..." in error for error in ranks.run(divided, 2, act)
    )


def between_forward_and_backward() -> list[str]:
    model = toy_model()
    balancer = trimtab.attach(model, [GlobalBatch.Config(coef=1.0)], reduction=GradReduction(num_ranks=2))
    loss = task_loss(model, batch(2, 5, seed=0))
    errors = []
    actions: list[Callable[[], object]] = [
        balancer.state_dict,
        lambda: balancer.start_step(num_tokens=1),
        lambda: copy.deepcopy(model),
    ]
    for act in actions:
        try:
            act()
        except RuntimeError as error:
            errors.append(str(error))
    loss.backward()
    balancer.step()
    balancer.state_dict()
    copy.deepcopy(model)
    return errors


def test_what_belongs_between_steps_is_refused_within_one(ranks: Ranks) -> None:
    for state, start, copied in ranks.run(between_forward_and_backward, 2):
        assert "state_dict() belongs between steps" in state
        assert "start_step comes before the step's first forward" in start
        assert "copied within a step" in copied


def signals(folder: Path) -> tuple[list[bool], bool]:
    """Whether this rank stops, before and after a signal that came too late to be agreed on; and after its own."""
    trainer = Trainer(config_of(folder, PLANS["fsdp"][1]), name="deepseek_v3/tiny", quiet=True)
    trainer._agree({"loss": torch.zeros(())}, torch.zeros(()))
    seen = [trainer._stopping]
    if dist.get_rank() == 0:
        trainer._stop(signal.SIGTERM, None)
    trainer._agree({"loss": torch.zeros(())}, torch.zeros(()))
    seen.append(trainer._stopping)
    try:
        # The first that this rank receives itself, although it knows of the other's: no reason to break off.
        if dist.get_rank() == 1:
            trainer._stop(signal.SIGTERM, None)
    except KeyboardInterrupt:
        return seen, True
    return seen, False


def late_signal(folder: Path) -> bool:
    """One rank receives a signal while it waits for the others to agree: it stops with them, a step later."""
    trainer = Trainer(config_of(folder, PLANS["fsdp"][1]), name="deepseek_v3/tiny", quiet=True)
    all_reduce = dist.all_reduce

    def and_then(*args: Any, **kwargs: Any) -> None:
        all_reduce(*args, **kwargs)
        if dist.get_rank() == 0:
            trainer._signal = signal.SIGTERM

    dist.all_reduce = and_then  # type: ignore[assignment]
    try:
        trainer._agree({"loss": torch.zeros(())}, torch.zeros(()))
    finally:
        dist.all_reduce = all_reduce
    return trainer._stopping


def test_all_ranks_stop_at_the_same_step(ranks: Ranks, tmp_path: Path) -> None:
    for seen, broke_off in ranks.run(signals, 2, tmp_path):
        assert seen == [False, True]
        assert not broke_off
    assert ranks.run(late_signal, 2, tmp_path) == [False, False]
