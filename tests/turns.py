"""A step of the toy model's microbatches, run in turn, by turns or together."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import trimtab
from tests.test_exactness import RAGGED, totals
from tests.toy import Batch, ToyModel, batch, grads, task_loss
from trimtab import Accumulation, Balancer
from trimtab.microbatch import Description

PAIR = RAGGED[:2]
# Of one length, so that they fit into one batch; with different numbers of rows.
ROWS = [
    batch(3, 6, seed=1, padded=True, packed="position_ids"),
    batch(1, 6, seed=2, packed="position_ids"),
]
FORWARD_FIRST = Accumulation(num_microbatches=2, order="forward_first")

Losses = Callable[[ToyModel, Balancer, Sequence[Batch]], list[Tensor]]


def loss_of(logits: Tensor, one: Batch) -> Tensor:
    """As `tests.toy.task_loss`."""
    loss_T = F.cross_entropy(logits.flatten(0, 1), one.input_ids.flatten(), reduction="none")
    return loss_T[one.valid_BS.flatten()].sum() / 10


def described(balancer: Balancer, one: Batch) -> Description:
    return balancer.microbatch(
        batch_shape=tuple(one.input_ids.shape),
        valid_mask=one.attention_mask,
        cu_seqlens=one.cu_seqlens,
        position_ids=one.position_ids,
    )


def by_turns(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
    """Layer by layer through all microbatches."""
    with balancer.interleaved([described(balancer, one) for one in batches]) as runs:
        x_M = [run(model.embed, one.input_ids) for run, one in zip(runs, batches, strict=True)]
        for block in model.blocks:
            x_M = [run(model.run, block, x) for run, x in zip(runs, x_M, strict=True)]
        logits_M = [run(model.head, x) for run, x in zip(runs, x_M, strict=True)]
    return [loss_of(logits, one) for logits, one in zip(logits_M, batches, strict=True)]


def in_turn(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
    """One after the other, as always."""
    return [task_loss(model, one) for one in batches]


def together(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
    """One forward on the rows of all microbatches."""
    with balancer.concatenated([described(balancer, one) for one in batches]):
        logits = model(torch.cat([one.input_ids for one in batches]))
    parts = logits.split([len(one.input_ids) for one in batches])
    return [loss_of(part, one) for part, one in zip(parts, batches, strict=True)]


def backward(losses: Sequence[Tensor], order: str) -> None:
    if order == "sum":
        torch.stack(list(losses)).sum().backward()
        return
    for loss in losses if order == "first_first" else reversed(losses):
        loss.backward(retain_graph=True)


def step(
    losses: Losses,
    model: ToyModel,
    batches: Sequence[Batch],
    objectives: Sequence[trimtab.Objective.Config],
    *,
    num_turns: int | None = None,
    accumulation: Accumulation | None = None,
    order: str = "sum",
    num_steps: int = 1,
    **settings: Any,
) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]:
    """Gradients, metrics and expert biases after steps that run ``num_turns`` microbatches at a time, or all."""
    model = copy.deepcopy(model)
    parts = (
        [batches[i : i + num_turns] for i in range(0, len(batches), num_turns)] if num_turns else [batches]
    )
    plan = accumulation or Accumulation(num_microbatches=len(batches), order="forward_first")
    balancer = trimtab.attach(model, objectives, accumulation=plan, measure_every=1, **settings)
    for _ in range(num_steps):
        grads(model)
        if plan.order == "counting_pass":
            with balancer.counting_pass():
                for some in parts:
                    losses(model, balancer, some)
        if plan.order == "alternating":
            balancer.start_step(**totals(batches))
        for some in parts:
            backward(losses(model, balancer, some), order)
        balancer.step()
    biases = [b.moe.router.expert_bias_E for b in model.blocks if b.moe.router.expert_bias_E is not None]
    return grads(model), balancer.metrics(), biases


def assert_same(have: Any, want: Any) -> None:
    """The same bits."""
    for name in want[0]:
        assert torch.equal(have[0][name], want[0][name]), name
    assert have[1] == want[1]
    assert all(torch.equal(a, b) for a, b in zip(have[2], want[2], strict=True))
