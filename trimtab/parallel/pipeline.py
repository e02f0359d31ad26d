"""Runs one optimiser step's microbatches through the stages of a pipeline.

Legend: M microbatches, B sequences, s tokens of each that this rank holds, D model width.

The trainer says how one microbatch runs through one part of the model, and how a loss comes of it; both are
told the microbatch's number, so positions, masks, labels and the balancer's description are looked up on
each rank and only hidden states (B, s, D) travel.

    plan = check_pipeline("1F1B", pp=2, num_layers=8, num_microbatches=4)
    parts = [split_into_stages(build(), num_stages=plan.num_stages, stage=stage)
             for stage in plan.stages_of(mesh.rank("pp"))]
    pipeline = Pipeline(parts, plan, mesh, hidden_shape=(B, s, D), dtype=torch.float32)

    def call(part, microbatch, hidden):       # hidden is None in the first stage
        batch = batches[microbatch]
        x = batch.input_ids if hidden is None else hidden
        return run_stage(part, x, position_ids=batch.position_ids)

    losses_M = pipeline.step(call, lambda logits, microbatch: loss(logits, batches[microbatch]))

Schedules are those of `torch.distributed.pipelining`, with shapes given beforehand: left to find them out, it
would run one more forward in the first step, whose tokens would be counted. Losses are summed, never averaged.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.fsdp import FSDPModule

from trimtab.parallel.mesh import Mesh
from trimtab.parallel.schedules import PipelinePlan

# The last stage may return anything that its loss can be computed of.
Call = Callable[[nn.Module, int, Tensor | None], Any]
Loss = Callable[[Any, int], Tensor]
T = TypeVar("T")


class Pipeline:
    """The stages of this rank, and the schedule that runs them with those of the others.

    Args:
        parts: this rank's stage modules, as in ``plan.stages_of(mesh.rank("pp"))``. With FSDP each is itself
            sharded (`fully_shard` on the part, ``reshard_after_forward=False``); gradients are then reduced
            once, after the last microbatch.
        plan: the schedule, from `check_pipeline`.
        mesh: where ranks are.
        hidden_shape: (B, s, D) of the hidden states that stages pass on, the same for all microbatches.
        dtype: of the hidden states.
        one_backward: stages whose backward runs in one piece under schedules that split it: those where a
            parameter is used in two places of which one depends on the other. PyTorch would run what lies
            between them twice.

    Raises:
        ValueError: parts that do not fit the plan, or FSDP inside a part that is not sharded itself.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        plan: PipelinePlan,
        mesh: Mesh,
        *,
        hidden_shape: tuple[int, int, int],
        dtype: torch.dtype,
        one_backward: Collection[int] = (),
    ) -> None:
        group = mesh.group("pp")
        if group is None or group.size() != plan.pp:
            raise ValueError(f"the plan is for pp={plan.pp} ranks, the mesh has pp={mesh.size('pp')}")
        indices = plan.stages_of(mesh.rank("pp"))
        if len(parts) != len(indices):
            raise ValueError(
                f"given {len(parts)} parts, but with {plan.name} this rank holds the stages {indices}; pass "
                "one module for each, in that order"
            )
        for part in parts:
            _check_root_is_sharded(part)
        self.plan = plan
        self.parts = tuple(parts)
        self.hidden_shape, self.dtype = tuple(hidden_shape), dtype
        self.has_last_stage = plan.num_stages - 1 in indices
        self._group = group
        self._device = torch.device(mesh.device_type)
        self._call: Call | None = None
        self._loss: Loss | None = None
        # At least float32: a loss in bfloat16 would lose what the sum over microbatches needs.
        self._loss_dtype = torch.promote_types(dtype, torch.float32)
        self._one_backward = frozenset(one_backward) if plan.schedule.splits_backward else frozenset()
        self._stages = [self._stage(part, index) for part, index in zip(parts, indices, strict=True)]
        self._schedule: Any = getattr(pipelining, plan.schedule.implementation)(
            self._stages[0] if plan.schedule.placement == "single" else self._stages,
            n_microbatches=plan.num_microbatches,
            loss_fn=_output_is_loss,
            scale_grads=False,
        )

    def _stage(self, part: nn.Module, index: int) -> "_Stage":
        last = self.plan.num_stages - 1
        hidden = torch.empty(self.hidden_shape, dtype=self.dtype, device="meta", requires_grad=True)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=self._loss_dtype, device="meta", requires_grad=True)
        return _Stage(
            self,
            part,
            index,
            self.plan.num_stages,
            self._device,
            input_args=(number if index == 0 else hidden,),
            output_args=(loss if index == last else hidden,),
            group=self._group,
            # What builds the second half of a backward that was run whole: nothing is left to do.
            dw_builder=_nothing_left if index in self._one_backward else None,
        )

    # ---------------------------------------------------------------- one optimiser step

    def step(self, call: Call, loss: Loss) -> Tensor | None:
        """Run forward and backward of every microbatch; gradients are added to the parameters'.

        Args:
            call: (part, microbatch, hidden) -> (B, s, D) hidden states, or of the last stage its logits.
                ``hidden`` is None in the first stage, which reads its tokens by the microbatch's number.
                Called once for each part and microbatch.
            loss: (logits, microbatch) -> scalar, this microbatch's share of the step's loss. Called on the
                rank that holds the last stage.

        Returns:
            (M,) losses without gradient on the rank that holds the last stage, None elsewhere.

        Raises:
            ValueError: a stage's hidden states are not as the pipeline was told.
        """
        numbers_M = torch.arange(self.plan.num_microbatches)
        losses: list[Tensor] = []
        self._call, self._loss = call, loss
        try:
            self._schedule.step(
                numbers_M, target=numbers_M, losses=losses, return_outputs=False, microbatch=numbers_M
            )
        finally:
            self._call = self._loss = None
        return torch.stack([value.detach() for value in losses]) if self.has_last_stage else None

    def run_stage(self, stage: "_Stage", x: Tensor, microbatch: int) -> Tensor:
        """Forward of one microbatch through one stage; of the last stage, its loss."""
        assert self._call is not None
        assert self._loss is not None
        out = self._call(stage.submod, microbatch, None if stage.is_first else x)
        if not stage.is_last:
            return self._checked(out, self.hidden_shape, stage.stage_index)
        # Inside the stage, so that logits live no longer than in one process: a stage's output is kept until
        # its backward, and its shape must be known beforehand.
        value = self._loss(out, microbatch)
        if value.dim() != 0:
            raise ValueError(f"the loss has shape {tuple(value.shape)}, expected a scalar: ()")
        return _own(value.to(self._loss_dtype))

    def _checked(self, hidden: Tensor, shape: tuple[int, ...], stage: int) -> Tensor:
        if tuple(hidden.shape) != shape or hidden.dtype != self.dtype:
            raise ValueError(
                f"stage {stage} of {self.plan.num_stages} returned {tuple(hidden.shape)} of {hidden.dtype}, but "
                f"the next stage awaits {shape} of {self.dtype}; hidden states must be of the shape and dtype "
                "that the pipeline was made with"
            )
        return _own(hidden.contiguous())

    # ---------------------------------------------------------------- without training

    @torch.no_grad()
    def evaluate(
        self, call: Call, result: Callable[[Any, int], T], batch_shapes: Sequence[tuple[int, int]]
    ) -> list[T] | None:
        """Run microbatches forward in evaluation mode; nothing is trained or counted.

        Args:
            call: as in `step`.
            result: (logits, microbatch) -> what is wanted of it.
            batch_shapes: (B, s) of each microbatch, in any number; the same on all ranks of the pipeline.

        Returns:
            One result per microbatch on the rank that holds the last stage, None elsewhere.

        Raises:
            ValueError: a stage's hidden states are not of the shape given.
        """
        modes = [(module, module.training) for part in self.parts for module in part.modules()]
        for part in self.parts:
            part.eval()
        shapes = [(*batch_shape, self.hidden_shape[2]) for batch_shape in batch_shapes]
        results: list[T] = []
        sends: list[Any] = []
        held: list[Tensor] = []  # hidden states under way, and those for a stage of this same rank
        try:
            for stage in self._stages:
                held, received = [], held
                before = self.plan.rank_of(stage.stage_index - 1)
                if not stage.is_first and before != self.plan.rank_of(stage.stage_index):
                    # All of a stage's receives come before its first send: with two ranks that exchange in both
                    # directions, any other order could let each wait for the other.
                    received, waits = self._receive(shapes, before)
                else:
                    waits = [None] * len(shapes)
                for number, shape in enumerate(shapes):
                    if waits[number] is not None:
                        waits[number].wait()
                    out = call(stage.submod, number, None if stage.is_first else received[number])
                    if stage.is_last:
                        results.append(result(out, number))
                        continue
                    held.append(self._checked(out, shape, stage.stage_index))
                    after = self.plan.rank_of(stage.stage_index + 1)
                    if after != self.plan.rank_of(stage.stage_index):
                        sends.append((dist.isend(held[-1], group=self._group, group_dst=after), held[-1]))
            for work, _ in sends:
                work.wait()
        finally:
            for module, training in modes:
                module.training = training
            for part in self.parts:
                _reshard(part)
        return results if self.has_last_stage else None

    def _receive(self, shapes: Sequence[tuple[int, ...]], source: int) -> tuple[list[Tensor], list[Any]]:
        hidden = [torch.empty(shape, dtype=self.dtype, device=self._device) for shape in shapes]
        return hidden, [dist.irecv(x, group=self._group, group_src=source) for x in hidden]


class _Stage(pipelining.PipelineStage):
    """A stage that asks the pipeline to run its part, so that the part itself may be what FSDP wrapped."""

    def __init__(self, pipeline: Pipeline, part: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(part, *args, **kwargs)
        self._pipeline = pipeline

    def forward_maybe_with_nosync(self, x: Tensor, *, microbatch: Tensor) -> Tensor:
        return self._pipeline.run_stage(self, x, int(microbatch))


def _own(x: Tensor) -> Tensor:
    """A tensor that is no view: schedules detach a stage's output in place after its backward."""
    return x.clone() if x._is_view() else x


def _nothing_left() -> Callable[[], None]:
    return lambda: None


def _output_is_loss(output: Tensor, target: Tensor) -> Tensor:
    return output


def _check_root_is_sharded(part: nn.Module) -> None:
    inside = next((name for name, module in part.named_modules() if isinstance(module, FSDPModule)), "")
    if inside and not isinstance(part, FSDPModule):
        raise ValueError(
            f"{inside!r} is sharded by FSDP but its stage, a {type(part).__name__}, is not; call fully_shard on "
            "the stage as well, which is what sums gradients after the last microbatch"
        )


def _reshard(part: nn.Module) -> None:
    """Give gathered parameters back: an optimiser step would leave them behind."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
