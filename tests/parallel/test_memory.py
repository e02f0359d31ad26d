"""What the counts of many microbatches hold where they are summed over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import trimtab
from tests.census import Census
from tests.parallel.pool import Ranks
from tests.toy import VOCAB, toy_model
from trimtab import BatchWise, GlobalBatch, GradReduction, SequenceWise, TokenRanks, ZLoss

L, E, B, S = 2, 16, 16, 64
LOSSES = [
    SequenceWise.Config(coef=0.1),
    BatchWise.Config(coef=0.1, average_microbatches=True),
    GlobalBatch.Config(coef=0.1),
    ZLoss.Config(coef=0.1),
]


def held_after(num_microbatches: int, divides_sequences: bool) -> int:
    """Bytes that a step's microbatches have left when all their backwards are over."""
    model = toy_model(num_layers=L, num_experts=E, top_k=4)
    world = dist.group.WORLD
    ranks = TokenRanks(tokens=world, sequence=world if divides_sequences else None)
    balancer = trimtab.attach(
        model,
        LOSSES,
        accumulation=num_microbatches,
        reduction=GradReduction(num_ranks=2),
        ranks=ranks,
        measure_every=0,
    )
    ids = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(dist.get_rank()))
    own_T = torch.arange(B * S).view(B, S)[:, : S // 2].reshape(-1)
    described = balancer.microbatch(batch_shape=(B, S), tokens=own_T if divides_sequences else None)
    if divides_sequences:
        ids = ids[:, : S // 2]

    def step() -> None:
        for _ in range(num_microbatches):
            with described:
                output = model(ids)
            output.sum().backward()

    step()
    balancer.step()
    with Census() as census:
        step()
        held = census.num_bytes
        balancer.step()
    return held


@pytest.mark.parametrize("divides_sequences", [False, True], ids=["data", "sequence"])
def test_a_step_of_many_microbatches(ranks: Ranks, divides_sequences: bool) -> None:
    """Sums over ranks and what was read of them, (A, E) of a layer; counts of sequences if these are divided."""
    few, many = (ranks.run(held_after, 2, M, divides_sequences) for M in (2, 12))
    groups = L * B * E * 8
    for before, after in zip(few, many, strict=True):
        per_microbatch = (after - before) / 10
        assert per_microbatch <= L * E * (8 + 8 + 8) + 200 + (groups if divides_sequences else 0)
