"""Several microbatches in one forward on several ranks: the same counts, sums and bits as one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import trimtab
from tests.parallel.pool import Ranks
from tests.test_exactness import OBJECTIVES
from tests.toy import Batch, ToyModel, assert_grads_equal, batch, grads, reference_grads, toy_model
from tests.turns import FORWARD_FIRST, backward, by_turns, described, in_turn, loss_of, together
from trimtab import (
    BatchWise,
    GlobalBatch,
    GradReduction,
    Objective,
    SequenceWise,
    Sign,
    TokenRanks,
)

# By rank: its microbatches of one step.
RAGGED = [
    [batch(2, 5, seed=1, padded=True, packed="position_ids"), batch(3, 5, seed=2, packed="position_ids")],
    [batch(4, 5, seed=3, packed="position_ids"), batch(1, 5, seed=4, padded=True, packed="position_ids")],
]
WAYS: dict[str, Any] = {"in_turn": in_turn, "by_turns": by_turns, "together": together}
LOSSES = {
    name: [objective for objective in OBJECTIVES[name] if not objective.build().needs_prob_sums]
    for name in ("sequence", "document_token", "batch", "global", "z", "all")
}


def merged(batches: Sequence[Batch]) -> Batch:
    """Microbatches of all ranks as one."""
    masks = [one.valid_BS.long() for one in batches]
    return Batch(
        torch.cat([one.input_ids for one in batches]),
        torch.cat(masks),
        torch.cat([one.position_ids for one in batches]),
    )


def sum_grads(model: ToyModel) -> dict[str, Tensor]:
    found = grads(model)
    for grad in found.values():
        dist.all_reduce(grad)
    return found


def one_step(way: str, objectives: list[Objective.Config], checkpoint: str | None) -> Any:
    """Two ragged steps: gradients summed over ranks, metrics, and how many sums counting took."""
    model = toy_model(score="sigmoid", expert_bias=True, checkpoint=checkpoint)
    balancer = trimtab.attach(
        model,
        objectives,
        bias=Sign.Config(),
        accumulation=FORWARD_FIRST,
        reduction=GradReduction(num_ranks=2),
        measure_every=1,
    )
    with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as counted:
        losses = WAYS[way](model, balancer, RAGGED[dist.get_rank()])
        num_sums = counted.call_count
        backward(losses, "sum")
    balancer.step()
    return sum_grads(model), balancer.metrics(), num_sums


@pytest.mark.parametrize("way", ["by_turns", "together"])
@pytest.mark.parametrize("name", LOSSES)
def test_ragged_ranks_are_one_process(ranks: Ranks, name: str, way: str) -> None:
    microbatches = [merged(batches) for batches in zip(*RAGGED, strict=True)]
    model = toy_model(score="sigmoid", expert_bias=True)
    want = reference_grads(model, [c.build() for c in LOSSES[name]], microbatches, "sigmoid")
    plain = ranks.run(one_step, 2, "in_turn", LOSSES[name], None)
    for checkpoint in (None, "nonreentrant", "reentrant"):
        found = ranks.run(one_step, 2, way, LOSSES[name], checkpoint)
        for (have, metrics, num_sums), (same, same_metrics, same_sums) in zip(found, plain, strict=True):
            assert_grads_equal(have, want)
            assert num_sums == same_sums > 0
            assert metrics["load"] == same_metrics["load"]
            if way == "by_turns":
                assert all(torch.equal(have[key], same[key]) for key in have)
                assert metrics == same_metrics


def several_pairs(way: str) -> Any:
    """Three pairs: the last is broken off by an error on all ranks, and run again."""
    model = toy_model()
    objectives = [GlobalBatch.Config(coef=0.4), BatchWise.Config(coef=0.2, average_microbatches=True)]
    reduction = GradReduction(num_ranks=2)
    balancer = trimtab.attach(model, objectives, accumulation=6, reduction=reduction, measure_every=1)
    for number in range(3):
        pair = [batch(2, 5, seed=10 * number + 2 * m + dist.get_rank(), padded=True) for m in range(2)]
        if number == 2 and way == "by_turns":
            hook = model.blocks[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                by_turns(model, balancer, pair)
            hook.remove()
        backward(WAYS[way](model, balancer, pair), "sum")
    balancer.step()
    with pytest.warns(UserWarning, match="1/M of the step"):
        metrics = balancer.metrics()
    return sum_grads(model), metrics


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_several_pairs_and_one_that_is_broken_off(ranks: Ranks) -> None:
    for have, want in zip(
        ranks.run(several_pairs, 2, "by_turns"), ranks.run(several_pairs, 2, "in_turn"), strict=True
    ):
        assert all(torch.equal(have[0][key], want[0][key]) for key in want[0])
        assert have[1] == want[1]


def overlapped(way: str, checkpoint: str | None) -> dict[str, Tensor]:
    """Backward of one microbatch while the other is half way: whose counts nobody reads, or sends, half."""
    objectives = [
        SequenceWise.Config(coef=0.3),
        BatchWise.Config(coef=0.2, average_microbatches=True),
        GlobalBatch.Config(coef=0.4, counts="running"),
    ]
    model = toy_model(checkpoint=checkpoint)
    reduction = GradReduction(num_ranks=2)
    balancer = trimtab.attach(model, objectives, accumulation=2, reduction=reduction)
    first, second = RAGGED[dist.get_rank()]
    balancer.start_step(num_tokens=50, num_sequences=10)
    if way == "in_turn":
        for one in (first, second):
            in_turn(model, balancer, [one])[0].backward()
    else:
        with balancer.interleaved([described(balancer, one) for one in (first, second)]) as (run_a, run_b):
            loss = loss_of(run_a(model, first.input_ids), first)
            run_a.end()
            x = run_b(model.run, model.blocks[0], run_b(model.embed, second.input_ids))
            loss.backward()
            x = run_b(model.run, model.blocks[1], x)
        loss_of(model.head(x), second).backward()
    balancer.step()
    return sum_grads(model)


@pytest.mark.parametrize("checkpoint", [None, "nonreentrant"])
def test_backward_of_one_amid_the_forward_of_another(ranks: Ranks, checkpoint: str | None) -> None:
    want = ranks.run(overlapped, 2, "in_turn", None)
    for have, expected in zip(ranks.run(overlapped, 2, "by_turns", checkpoint), want, strict=True):
        assert all(torch.equal(have[key], expected[key]) for key in expected)


# Columns of every row that each rank holds.
SHARES = ([0, 3, 4], [1, 2, 5])


def divided(way: str, objectives: list[Objective.Config]) -> Any:
    """Ranks share every sequence; each says which of the whole microbatch's tokens it has."""
    model = toy_model()
    world = dist.group.WORLD
    balancer = trimtab.attach(
        model,
        objectives,
        accumulation=FORWARD_FIRST,
        reduction=GradReduction(num_ranks=2),
        ranks=TokenRanks(tokens=world, sequence=world),
    )
    columns = torch.tensor(SHARES[dist.get_rank()])
    parts, masks, descriptions = [], [], []
    for one in divided_batches():
        B, S = one.input_ids.shape
        tokens = (torch.arange(B)[:, None] * S + columns).reshape(-1)
        parts.append(one.input_ids[:, columns])
        masks.append(one.valid_BS[:, columns])
        descriptions.append(
            balancer.microbatch(batch_shape=(B, S), valid_mask=one.attention_mask, tokens=tokens)
        )
    if way == "by_turns":
        with balancer.interleaved(descriptions) as runs:
            logits_M = [run(model, ids) for run, ids in zip(runs, parts, strict=True)]
    else:
        with balancer.concatenated(descriptions):
            logits = model(torch.cat(parts))
        logits_M = list(logits.split([len(part) for part in parts]))
    own = [Batch(ids, mask.long()) for ids, mask in zip(parts, masks, strict=True)]
    backward([loss_of(logits, one) for logits, one in zip(logits_M, own, strict=True)], "sum")
    balancer.step()
    return sum_grads(model)


def divided_batches() -> list[Batch]:
    return [batch(2, 6, seed=1, padded=True), batch(3, 6, seed=2)]


@pytest.mark.parametrize("way", ["by_turns", "together"])
@pytest.mark.parametrize("name", ["sequence", "batch", "global"])
def test_divided_sequences(ranks: Ranks, name: str, way: str) -> None:
    want = reference_grads(toy_model(), [c.build() for c in LOSSES[name]], divided_batches(), "softmax")
    for have in ranks.run(divided, 2, way, LOSSES[name]):
        assert_grads_equal(have, want)
