"""Facts about schedules: what is checked before anything starts agrees with what PyTorch does."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import pipelining

from tests.parallel.pool import Ranks, mesh_of
from trimtab.parallel.mesh import Degrees
from trimtab.parallel.schedules import SCHEDULES, check_pipeline, find_schedule, order_of
from trimtab.scale import Accumulation

PP = 4


def rejects(schedule: str, pp: int, num_microbatches: int) -> bool:
    try:
        check_pipeline(schedule, pp=pp, num_layers=64, num_microbatches=num_microbatches)
    except ValueError:
        return True
    return False


def facts_by_torch(schedule: str, microbatches: list[int]) -> list[Any]:
    """For each number of microbatches: None if PyTorch rejects it, else (stages by rank, order)."""
    mesh = mesh_of(Degrees(pp=PP))
    row = SCHEDULES[schedule]
    found: list[Any] = []
    for number in microbatches:
        plan = check_pipeline(schedule, pp=PP, num_layers=64, num_microbatches=8)
        stages = [
            pipelining.PipelineStage(
                nn.Identity(),
                index,
                plan.num_stages,
                torch.device("cpu"),
                input_args=(torch.empty(1, device="meta"),),
                output_args=(torch.empty(1, device="meta"),),
                group=mesh.group("pp"),
            )
            for index in plan.stages_of(mesh.rank("pp"))
        ]
        try:
            made = getattr(pipelining, row.implementation)(
                stages[0] if row.placement == "single" else stages, number, loss_fn=nn.Identity()
            )
        except ValueError:
            found.append(None)
            continue
        holds: list[set[int]] = [set() for _ in range(PP)]
        backward_began: set[int] = set()
        order = "forward_first"
        for rank, actions in made.pipeline_order.items():
            for action in [a for whole in actions if whole for a in whole.sub_actions or (whole,)]:
                kind = action.computation_type.value
                if kind.startswith("REDUCE"):
                    continue
                holds[rank].add(action.stage_index)
                if kind == "F" and action.stage_index in backward_began:
                    order = "alternating"
                elif kind != "F":
                    backward_began.add(action.stage_index)
        found.append((holds, order))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pytorch_agrees(ranks: Ranks, schedule: str) -> None:
    microbatches = list(range(1, 14))
    for facts in ranks.run(facts_by_torch, PP, schedule, microbatches):
        for number, found in zip(microbatches, facts, strict=True):
            assert (found is None) == rejects(schedule, PP, number), number
            if found is None:
                continue
            holds, order = found
            plan = check_pipeline(schedule, pp=PP, num_layers=64, num_microbatches=number)
            assert [set(plan.stages_of(rank)) for rank in range(PP)] == holds
            assert all(plan.rank_of(stage) == rank for rank in range(PP) for stage in holds[rank])
            if number > 2 * PP:
                assert order == order_of(schedule)
            assert order == "forward_first" or order_of(schedule) == "alternating"


def test_orders_are_those_of_accumulation() -> None:
    for name in SCHEDULES:
        Accumulation(num_microbatches=2, order=order_of(name))
    assert order_of("GPipe") == "forward_first"
    assert order_of("1F1B") == "alternating"


def test_stages() -> None:
    loop = check_pipeline("Interleaved1F1B", pp=2, num_layers=6, num_microbatches=2, stages_per_rank=3)
    assert (loop.num_stages, loop.stages_of(0), loop.stages_of(1)) == (6, (0, 2, 4), (1, 3, 5))
    v = check_pipeline("DualPipeV", pp=3, num_layers=6, num_microbatches=6)
    assert [v.stages_of(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert [v.rank_of(stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert v.schedule.splits_backward
    assert not loop.schedule.splits_backward


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(schedule="ZeroBubbleV"), r"schedule='ZeroBubbleV' is unknown; did you mean 'ZBVZeroBubble'\?"),
        (dict(schedule="gpipe"), r"did you mean 'GPipe'\?"),
        (dict(schedule="xyz"), r"schedule='xyz' is unknown; the schedules are GPipe, 1F1B, "),
        (dict(pp=1), r"pp=1 must be at least 2"),
        (dict(num_microbatches=0), r"num_microbatches=0 must be at least 1"),
        (
            dict(num_microbatches=3),
            r"1F1B with 4 stages needs at least as many .*num_microbatches=3.* or GPipe",
        ),
        (dict(schedule="DualPipeV", num_microbatches=7), r"DualPipeV with 8 stages needs at least as many"),
        (
            dict(schedule="Interleaved1F1B", num_microbatches=9),
            r"num_microbatches=9 is no multiple of 2 \(pp=4\); use 8 or 10 microbatches",
        ),
        (dict(num_layers=3), r"1F1B on pp=4 ranks has 4 stages, .* num_layers=3; lower pp$"),
        (
            dict(schedule="ZBVZeroBubble", num_layers=7),
            r"has 8 stages, .*; lower pp, or choose a schedule with",
        ),
        (dict(stages_per_rank=2), r"stages_per_rank=2, but 1F1B holds exactly 1 .*Interleaved1F1B"),
        (
            dict(schedule="LoopedBFS", stages_per_rank=1),
            r"stages_per_rank=1 must be at least 2 with LoopedBFS",
        ),
    ],
)
def test_errors(given: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = dict(schedule="1F1B", pp=4, num_layers=16, num_microbatches=8)
    with pytest.raises(ValueError, match=message):
        check_pipeline(**{**settings, **given})


def test_unknown_names_are_found_everywhere() -> None:
    with pytest.raises(ValueError, match=r"did you mean '1F1B'\?"):
        find_schedule("1F1")
    with pytest.raises(ValueError, match="is unknown"):
        order_of("none")
