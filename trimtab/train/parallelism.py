"""How a run is divided among processes, and what that makes of an optimiser step.

Legend: R data ranks, B rows of a microbatch, M microbatches of an optimiser step on each data rank.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from trimtab.parallel.mesh import Degrees
from trimtab.parallel.schedules import PipelinePlan, check_pipeline, find_schedule, order_of
from trimtab.scale import Accumulation, Order

_DEFAULT_SCHEDULE = "1F1B"
_AXES = {
    "pipeline_parallel_degree": "pp",
    "data_parallel_replicate_degree": "dp_replicate",
    "data_parallel_shard_degree": "dp_shard",
    "context_parallel_degree": "cp",
    "tensor_parallel_degree": "tp",
}
# What schedules call what the command line calls otherwise.
_OPTIONS = {
    "pp": "parallelism.pipeline_parallel_degree",
    "num_layers": "model.num_layers",
    "num_microbatches": "training.global_batch_size / (data ranks * parallelism.pipeline_parallel_microbatch_size)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelismConfig:
    """Number of processes along each axis. The first five multiply to the number of processes.

    Args:
        data_parallel_replicate_degree: copies of the sharded model (HSDP).
        data_parallel_shard_degree: processes that read rows of their own and share parameters by FSDP; -1
            takes the processes that the other axes leave.
        tensor_parallel_degree: processes that divide attention heads, and tokens everywhere else.
        context_parallel_degree: processes that divide each row's tokens between them.
        expert_parallel_degree: processes that divide the experts; taken from the shard, context and tensor axes.
        expert_tensor_parallel_degree: processes that divide each expert's hidden width: 1 or the tensor degree.
        pipeline_parallel_degree: processes that divide the layers.
        pipeline_parallel_schedule: GPipe, 1F1B, Interleaved1F1B, ZBVZeroBubble, DualPipeV, or another of
            `trimtab.parallel.schedules`. Under GPipe all forwards come first, so that counts of the whole step
            are exact.
        pipeline_parallel_microbatch_size: rows of one forward in a pipeline; it takes the place of
            data.microbatch_size there.

    Raises:
        ValueError: a degree that is no number of processes, or a schedule that is unknown.
    """

    data_parallel_replicate_degree: int = 1
    data_parallel_shard_degree: int = -1
    tensor_parallel_degree: int = 1
    context_parallel_degree: int = 1
    expert_parallel_degree: int = 1
    expert_tensor_parallel_degree: int = 1
    pipeline_parallel_degree: int = 1
    pipeline_parallel_schedule: str = _DEFAULT_SCHEDULE
    pipeline_parallel_microbatch_size: int = 1

    def __post_init__(self) -> None:
        """Validate, and warn of settings without effect."""
        for name in (*_AXES, "expert_parallel_degree", "expert_tensor_parallel_degree"):
            degree = getattr(self, name)
            if degree < 1 and (name, degree) != ("data_parallel_shard_degree", -1):
                rest = (
                    ", or -1 for the processes that are left" if name == "data_parallel_shard_degree" else ""
                )
                raise ValueError(f"{name}={degree} must be at least 1{rest}; set parallelism.{name}")
        if self.expert_tensor_parallel_degree not in (1, self.tensor_parallel_degree):
            raise ValueError(
                f"expert_tensor_parallel_degree={self.expert_tensor_parallel_degree} must be 1 or "
                f"tensor_parallel_degree={self.tensor_parallel_degree}: experts are divided as attention is, or "
                "not; set parallelism.expert_tensor_parallel_degree"
            )
        try:
            find_schedule(self.pipeline_parallel_schedule)
        except ValueError as error:
            raise ValueError(f"parallelism.pipeline_parallel_{error}") from None
        if self.pipeline_parallel_microbatch_size < 1:
            raise ValueError(
                f"pipeline_parallel_microbatch_size={self.pipeline_parallel_microbatch_size} must be at least 1; "
                "raise parallelism.pipeline_parallel_microbatch_size"
            )
        if self.pipelined:
            return
        without_effect = []
        if self.pipeline_parallel_schedule != _DEFAULT_SCHEDULE:
            without_effect.append("pipeline_parallel_schedule")
        if self.pipeline_parallel_microbatch_size != 1:
            without_effect.append("pipeline_parallel_microbatch_size")
        for name in without_effect:
            warnings.warn(f"parallelism.{name} has no effect with pipeline_parallel_degree=1", stacklevel=3)

    @property
    def pipelined(self) -> bool:
        """Whether layers are divided among processes."""
        return self.pipeline_parallel_degree > 1

    @property
    def microbatch_option(self) -> str:
        """The option that says how many rows one forward takes."""
        return "parallelism.pipeline_parallel_microbatch_size" if self.pipelined else "data.microbatch_size"

    def resolve(self, world_size: int) -> Degrees:
        """The degrees of a run with so many processes.

        Raises:
            ValueError: they do not multiply to the number of processes, or expert parallelism does not fit.
        """
        degrees = {axis: getattr(self, name) for name, axis in _AXES.items()}
        given = {name: getattr(self, name) for name in _AXES if getattr(self, name) != 1}
        if self.data_parallel_shard_degree == -1:
            del given["data_parallel_shard_degree"]
            taken = math.prod(given.values())
            if world_size % taken:
                raise ValueError(
                    f"parallelism: {_product(given)} must divide the number of processes, {world_size}, so that "
                    f"data_parallel_shard_degree=-1 can take the rest; change a degree, or start a multiple of "
                    f"{taken} processes (NGPU or --nproc)"
                )
            degrees["dp_shard"] = world_size // taken
        elif math.prod(given.values()) != world_size:
            raise ValueError(
                f"parallelism: {_product(given)} must be the number of processes, {world_size}; change a degree "
                f"(data_parallel_shard_degree=-1 takes what is left), or start {math.prod(given.values())} "
                "processes (NGPU or --nproc)"
            )
        self._check_experts(degrees)
        return Degrees(**degrees, ep=self.expert_parallel_degree, etp=self.expert_tensor_parallel_degree)

    def _check_experts(self, degrees: dict[str, int]) -> None:
        """Expert ranks are made of shard and context ranks, and of tensor ranks that do not divide experts."""
        whole = self.expert_tensor_parallel_degree == 1
        room = degrees["dp_shard"] * degrees["cp"] * (degrees["tp"] if whole else 1)
        if room % self.expert_parallel_degree:
            axes = "data_parallel_shard_degree * context_parallel_degree"
            axes += (
                " * tensor_parallel_degree"
                if whole
                else " (expert_tensor_parallel_degree takes the tensor ranks)"
            )
            raise ValueError(
                f"expert_parallel_degree={self.expert_parallel_degree} must divide {axes} = {room}; set "
                f"parallelism.expert_parallel_degree to {_divisors(room)}"
            )

    def order(self, order: Order) -> Order:
        """The order of a step's forwards and backwards, given the one that the balancing asks for.

        Raises:
            ValueError: a pipeline that cannot have it.
        """
        if not self.pipelined:
            return order
        delivered = order_of(self.pipeline_parallel_schedule)
        if order not in ("alternating", delivered):
            raise ValueError(
                f"model.balancing: order={order!r} cannot be had in a pipeline under "
                f"{self.pipeline_parallel_schedule}, whose schedule is the order; use order='alternating', with "
                "parallelism.pipeline_parallel_schedule=GPipe for exact counts of the whole step"
            )
        return delivered

    def plan(self, *, num_layers: int, num_microbatches: int) -> PipelinePlan | None:
        """The schedule on the pipeline's ranks; None without a pipeline.

        Raises:
            ValueError: the schedule cannot run so many layers or microbatches, or this PyTorch lacks it.
        """
        if not self.pipelined:
            return None
        from torch.distributed import pipelining

        name = self.pipeline_parallel_schedule
        try:
            plan = check_pipeline(
                name,
                pp=self.pipeline_parallel_degree,
                num_layers=num_layers,
                num_microbatches=num_microbatches,
            )
        except ValueError as error:
            where = ", ".join(
                f"{word} is {option}" for word, option in _OPTIONS.items() if word in str(error)
            )
            raise ValueError(f"parallelism.pipeline_parallel_schedule: {error} ({where})") from None
        if not hasattr(pipelining, plan.schedule.implementation):
            raise ValueError(
                f"parallelism.pipeline_parallel_schedule={name!r} is not in this PyTorch; install a newer one, "
                "or choose 1F1B"
            )
        return plan


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRun:
    """What a configuration is with a certain number of processes; made by `TrainConfig.for_world`.

    Args:
        degrees: processes along each axis.
        microbatch_size: B, rows of one forward on one data rank.
        num_microbatches: M, forwards of an optimiser step on one data rank.
        order: how they follow each other.
        pipeline: the schedule; None without a pipeline.
    """

    degrees: Degrees
    microbatch_size: int
    num_microbatches: int
    order: Order
    pipeline: PipelinePlan | None = None

    @property
    def global_batch_size(self) -> int:
        """Rows of an optimiser step, R M B."""
        return self.degrees.data * self.num_microbatches * self.microbatch_size

    @property
    def accumulation(self) -> Accumulation:
        """M and the order, as the balancer takes them."""
        return Accumulation(num_microbatches=self.num_microbatches, order=self.order)


def divide_batch(
    parallelism: ParallelismConfig,
    num_data_ranks: int,
    *,
    global_batch_size: int | None,
    microbatch_size: int | None,
) -> tuple[int, int]:
    """Divide the rows of an optimiser step among data ranks and forwards.

    Args:
        parallelism: for the rows of a pipeline's forwards.
        num_data_ranks: R.
        global_batch_size: rows of a step; None: ``microbatch_size`` rows on each data rank, in a pipeline too.
        microbatch_size: rows of one forward outside a pipeline; None: all rows of a data rank.

    Returns:
        B and M.

    Raises:
        ValueError: the rows cannot be divided evenly.
    """
    R = num_data_ranks
    G = global_batch_size if global_batch_size is not None else (microbatch_size or 1) * R
    B = parallelism.pipeline_parallel_microbatch_size if parallelism.pipelined else microbatch_size
    least = R * (B or 1)
    if G % least:
        factors = f"data ranks={R}" + (
            "" if B is None else f" * {parallelism.microbatch_option}={B} = {least}"
        )
        # Without a microbatch size the rows of a data rank are one forward, however many they are.
        way_out = "" if parallelism.pipelined or not B or G % R else ", or data.microbatch_size to None"
        # Rows are drawn microbatch_size at a time in a pipeline too.
        unit = math.lcm(least, microbatch_size or 1)
        below = G // unit * unit
        nearest = f"{below} or {below + unit}" if below else str(unit)
        raise ValueError(
            f"training.global_batch_size={G} must be a multiple of {factors}; set training.global_batch_size to "
            f"{nearest}{way_out}"
        )
    B = B or G // R
    return B, G // (R * B)


def _product(degrees: dict[str, int]) -> str:
    """Degrees above 1 as a product, as the command line names them."""
    if not degrees:
        return "the product of all degrees, 1,"
    named = " * ".join(f"{name}={degree}" for name, degree in degrees.items())
    return named if len(degrees) == 1 else f"{named} = {math.prod(degrees.values())}"


def _divisors(number: int) -> str:
    names = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
