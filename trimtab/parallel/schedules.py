"""Pipeline schedules: what each needs, which stages a rank holds, and in which order it runs microbatches.

Legend: M microbatches of an optimiser step, p pipeline ranks.

Facts alone, known before any process group starts. `trimtab.parallel.pipeline` runs them.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

from trimtab.scale import Order

Placement = Literal["single", "loop", "v"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One schedule of `torch.distributed.pipelining`.

    Args:
        implementation: name of the class.
        placement: "single" is one stage per rank; "loop" gives rank r the stages r, r + p, r + 2p, ...;
            "v" gives it the stages r and 2p - 1 - r.
        order: "forward_first" if every stage runs all its forwards before its first backward, so that the
            step's counts are complete in backward; else "alternating".
        splits_backward: whether gradients of inputs and of weights are computed at different times
            (zero bubble).
    """

    implementation: str
    placement: Placement
    order: Order = "alternating"
    splits_backward: bool = False


SCHEDULES: dict[str, Schedule] = {
    "GPipe": Schedule(implementation="ScheduleGPipe", placement="single", order="forward_first"),
    "1F1B": Schedule(implementation="Schedule1F1B", placement="single"),
    "LoopedBFS": Schedule(implementation="ScheduleLoopedBFS", placement="loop", order="forward_first"),
    "Interleaved1F1B": Schedule(implementation="ScheduleInterleaved1F1B", placement="loop"),
    "InterleavedZeroBubble": Schedule(
        implementation="ScheduleInterleavedZeroBubble", placement="loop", splits_backward=True
    ),
    "ZBVZeroBubble": Schedule(implementation="ScheduleZBVZeroBubble", placement="v", splits_backward=True),
    "DualPipeV": Schedule(implementation="ScheduleDualPipeV", placement="v", splits_backward=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelinePlan:
    """A schedule on p ranks, valid; made by `check_pipeline`.

    Args:
        name: of the schedule.
        pp: ranks of the pipeline.
        num_microbatches: M.
        stages_per_rank: stages that each rank holds.
    """

    name: str
    pp: int
    num_microbatches: int
    stages_per_rank: int

    @property
    def schedule(self) -> Schedule:
        """Its row in `SCHEDULES`."""
        return SCHEDULES[self.name]

    @property
    def num_stages(self) -> int:
        """Stages of all ranks."""
        return self.pp * self.stages_per_rank

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages of one pipeline rank, in the order of the model."""
        if self.schedule.placement == "v":
            return rank, 2 * self.pp - 1 - rank
        return tuple(range(rank, self.num_stages, self.pp))

    def rank_of(self, stage: int) -> int:
        """Pipeline rank that holds a stage."""
        if self.schedule.placement == "v":
            return min(stage, 2 * self.pp - 1 - stage)
        return stage % self.pp


def find_schedule(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    lower = {known.lower(): known for known in SCHEDULES}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
    hint = f"did you mean {lower[near[0]]!r}? The schedules" if near else "the schedules"
    raise ValueError(f"schedule={name!r} is unknown; {hint} are {', '.join(SCHEDULES)}")


def order_of(name: str) -> Order:
    """Order of forwards and backwards that a schedule delivers on every stage, for `trimtab.Accumulation`.

    Raises:
        ValueError: no such schedule.
    """
    return find_schedule(name).order


def check_pipeline(
    schedule: str, *, pp: int, num_layers: int, num_microbatches: int, stages_per_rank: int | None = None
) -> PipelinePlan:
    """Check that a schedule can run, before anything is started.

    Args:
        schedule: a name in `SCHEDULES`.
        pp: ranks of the pipeline, at least 2.
        num_layers: decoder layers of the model.
        num_microbatches: M.
        stages_per_rank: stages that each rank holds; None for the fewest that the schedule takes: 1, or 2
            for looped and V schedules.

    Raises:
        ValueError: it cannot; the message says what to change.
    """
    placement = find_schedule(schedule).placement
    if pp < 2:
        raise ValueError(f"pp={pp} must be at least 2; a schedule needs no stages on one rank")
    fewest = 1 if placement == "single" else 2
    if stages_per_rank is None:
        stages_per_rank = fewest
    if placement != "loop" and stages_per_rank != fewest:
        raise ValueError(
            f"stages_per_rank={stages_per_rank}, but {schedule} holds exactly {fewest} on each rank; leave it "
            "out, or choose Interleaved1F1B or LoopedBFS"
        )
    if stages_per_rank < fewest:
        raise ValueError(
            f"stages_per_rank={stages_per_rank} must be at least {fewest} with {schedule}; with one stage on "
            "each rank choose 1F1B or GPipe"
        )
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches={num_microbatches} must be at least 1")
    num_stages = pp * stages_per_rank
    if num_layers < num_stages:
        raise ValueError(
            f"{schedule} on pp={pp} ranks has {num_stages} stages, and each needs a decoder layer of its own, "
            f"but the model has num_layers={num_layers}; lower pp"
            + (
                ""
                if stages_per_rank == 1
                else ", or choose a schedule with fewer stages per rank: 1F1B, GPipe"
            )
        )
    _check_microbatches(schedule, pp, num_stages, num_microbatches)
    return PipelinePlan(
        name=schedule, pp=pp, num_microbatches=num_microbatches, stages_per_rank=stages_per_rank
    )


def _check_microbatches(schedule: str, pp: int, num_stages: int, num_microbatches: int) -> None:
    if schedule in ("1F1B", "DualPipeV") and num_microbatches < num_stages:
        raise ValueError(
            f"{schedule} with {num_stages} stages needs at least as many microbatches per step, given "
            f"num_microbatches={num_microbatches}; use more and smaller microbatches, or GPipe, which takes any "
            "number"
        )
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        if _fits_rounds(num_microbatches, pp):
            return
        lower = next(m for m in range(num_microbatches, 0, -1) if _fits_rounds(m, pp))
        higher = next(m for m in range(num_microbatches, 2 * (num_microbatches + pp)) if _fits_rounds(m, pp))
        raise ValueError(
            f"{schedule} runs microbatches in num_microbatches // pp equal rounds, and num_microbatches="
            f"{num_microbatches} is no multiple of {num_microbatches // pp} (pp={pp}); use {lower} or {higher} "
            "microbatches, or 1F1B"
        )


def _fits_rounds(num_microbatches: int, pp: int) -> bool:
    return num_microbatches % max(1, num_microbatches // pp) == 0
