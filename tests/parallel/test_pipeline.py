"""Pipelines against one process: gradients, losses and the number of forwards under every schedule."""

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.hf_models import D
from tests.parallel.double import double_precision
from tests.parallel.pipelines import (
    B,
    Batch,
    Case,
    S,
    error,
    errors_of,
    joined,
    make_batches,
    make_parts,
    make_pipeline,
    one_process,
    stage_call,
    stage_loss,
)
from tests.parallel.pool import RankError, Ranks, mesh_of
from trimtab.integrations.parallel import decoder_layers
from trimtab.parallel.fsdp import shard_parameters
from trimtab.parallel.mesh import Degrees
from trimtab.parallel.pipeline import Pipeline
from trimtab.parallel.schedules import SCHEDULES, check_pipeline

CASES = [
    Case("GPipe", "deepseek_v3"),
    Case("1F1B", "qwen3_moe"),
    Case("Interleaved1F1B", "gpt_oss"),
    Case("ZBVZeroBubble", "mixtral"),
    Case("DualPipeV", "llama4"),
    Case("InterleavedZeroBubble", "deepseek_v3"),
    Case("LoopedBFS", "llama4"),
    Case("Interleaved1F1B", "mixtral", num_layers=6, stages_per_rank=3, num_microbatches=3),
    Case("1F1B", "gpt_oss", pp=4, num_microbatches=6),
    Case("GPipe", "mixtral", pp=4, num_microbatches=2),
    Case("GPipe", "qwen3_moe", num_microbatches=1),
    Case("DualPipeV", "deepseek_v3", num_microbatches=5),
    Case("ZBVZeroBubble", "qwen3_moe", num_microbatches=2),
]


# Renamed in torch 2.13.
REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


def count(forwards: list[int], index: int, *_: Any) -> None:
    forwards[index] += 1


def train_twice(case: Case) -> tuple[dict[str, float], float, list[int]]:
    """Errors of gradients and losses, and forwards of each part in the first and in the second step."""
    with double_precision():
        batches = make_batches(case.num_microbatches)
        want, want_losses = one_process(case, batches)
        parts = make_parts(case)
        forwards = [0 for _ in parts]
        for index, part in enumerate(parts):
            part.register_forward_hook(partial(count, forwards, index))
        pipeline = make_pipeline(case, parts)
        worst = 0.0
        seen: list[int] = []
        for _ in range(2):
            for part in parts:
                part.zero_grad()
            losses = pipeline.step(stage_call(batches), stage_loss(batches))
            assert (losses is not None) == pipeline.has_last_stage
            if losses is not None:
                worst = max(worst, error(losses, want_losses))
                assert not losses.requires_grad
            seen += forwards
            forwards[:] = [0 for _ in parts]
        return errors_of(parts, want), worst, seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_one_process(ranks: Ranks, case: Case) -> None:
    results = ranks.run(train_twice, case.pp, case)
    errors = joined([result[0] for result in results])
    assert errors.keys() == {name for name, _ in case.model().named_parameters()}
    assert max(errors.values()) < 1e-10, max(errors.items(), key=lambda item: item[1])
    assert max(result[1] for result in results) < 1e-10
    for result in results:
        # In the first step as in the second: nothing runs to find out shapes.
        assert result[2] == [case.num_microbatches] * len(result[2])


# -------------------------------------------------------------------- with FSDP


@torch.no_grad()
def evaluate_other_values(pipeline: Pipeline, batches: list[Batch]) -> None:
    """Evaluate before parameters change, as an optimiser changes them: what it gathered must not be used again."""
    parameters = [p for part in pipeline.parts for p in part.parameters()]
    values = [p.clone() for p in parameters]
    for parameter in parameters:
        parameter.zero_()
    pipeline.evaluate(stage_call(batches), lambda logits, m: None, [(B, S)] * len(batches))
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def train_sharded(case: Case, checkpoint: bool) -> tuple[dict[str, float], int, int]:
    """Errors of gradients, sums over ranks in the second step, and groups of parameters that FSDP sums together."""
    mesh = mesh_of(case.degrees)
    with double_precision():
        whole = make_batches(case.num_microbatches, num_rows=B * case.dp_shard)
        want, want_losses = one_process(case, whole)
        mine = [batch.rows(mesh.rank("data"), case.dp_shard) for batch in whole]
        parts = make_parts(case)
        for part in parts:
            if checkpoint:
                part.activation_checkpointing_enable({"use_reentrant": False})
            shard_parameters(part, mesh, layers=decoder_layers(part), reshard_after_forward=False)
        pipeline = make_pipeline(case, parts)
        # An inner stage owns nothing beside its layers.
        groups = {
            (part, name.partition(".layers.")[2][:1]) for part in parts for name, _ in part.named_parameters()
        }
        for _ in range(2):
            for part in parts:
                part.zero_grad()
            evaluate_other_values(pipeline, mine)
            reduce = mock.Mock(side_effect=getattr(dist, REDUCE_SCATTER))
            with mock.patch.object(dist, REDUCE_SCATTER, reduce):
                losses = pipeline.step(stage_call(mine), stage_loss(whole, mine))
        if losses is not None:
            dist.all_reduce(losses, group=mesh.group("data"))
            assert error(losses, want_losses) < 1e-10
        # Also what would be left behind if parameters stayed gathered.
        assert all(isinstance(p, DTensor) for part in parts for p in part.parameters())
        return errors_of(parts, want), reduce.call_count, len(groups)


@pytest.mark.parametrize(
    ("schedule", "checkpoint"),
    [*((name, False) for name in SCHEDULES), ("1F1B", True), ("ZBVZeroBubble", True)],
)
def test_fsdp_sums_gradients_once(ranks: Ranks, schedule: str, checkpoint: bool) -> None:
    case = Case(schedule, "qwen3_moe", dp_shard=2)
    results = ranks.run(train_sharded, 4, case, checkpoint)
    errors = joined([result[0] for result in results])
    assert errors.keys() == {name for name, _ in case.model().named_parameters()}
    assert max(errors.values()) < 1e-10, max(errors.items(), key=lambda item: item[1])
    for _, num_reductions, num_groups in results:
        assert num_reductions == num_groups


def shard_a_layer_only() -> None:
    case = Case("1F1B", "mixtral", dp_shard=2)
    (part,) = make_parts(case)
    fully_shard(decoder_layers(part)[0], mesh=mesh_of(case.degrees).fsdp_mesh("fsdp"))
    with pytest.raises(
        ValueError, match=r"layers\.\d' is sharded by FSDP but its stage, a MixtralForCausalLM"
    ):
        make_pipeline(case, [part])


def test_fsdp_must_include_the_stage(ranks: Ranks) -> None:
    ranks.run(shard_a_layer_only, 4)


# -------------------------------------------------------------------- evaluation


def evaluate_between_steps(case: Case) -> tuple[Any, dict[str, float]]:
    with double_precision():
        batches = make_batches(case.num_microbatches)
        # Another number of microbatches, of other shapes.
        held_out = [*make_batches(2, seed=1), *make_batches(1, num_rows=1, seed=2)]
        want, _ = one_process(case, batches)
        model = case.model().eval()
        call = stage_call(held_out)
        expected = [call(model, m, None).detach() for m in range(len(held_out))]
        parts = make_parts(case)
        parts[0].model.norm.eval()
        modes = [module.training for part in parts for module in part.modules()]
        pipeline = make_pipeline(case, parts)
        errors: list[float] | None = None
        for _ in range(2):
            results = pipeline.evaluate(
                call, lambda logits, m: error(logits, expected[m]), [(2, S), (2, S), (1, S)]
            )
            errors = results if errors is None else [*errors, *(results or [])]
            assert all(p.grad is None for part in parts for p in part.parameters())
            assert modes == [module.training for part in parts for module in part.modules()]
            pipeline.step(stage_call(batches), stage_loss(batches))
            gradients = errors_of(parts, want)
            for part in parts:
                part.zero_grad()
        return errors, gradients


@pytest.mark.parametrize(
    "case",
    [
        Case("GPipe", "mixtral"),
        Case("Interleaved1F1B", "llama4"),
        Case("ZBVZeroBubble", "gpt_oss"),
        Case("1F1B", "qwen3_moe", pp=4),
    ],
    ids=str,
)
def test_evaluation(ranks: Ranks, case: Case) -> None:
    results = ranks.run(evaluate_between_steps, case.pp, case)
    last = case.plan.rank_of(case.plan.num_stages - 1)
    for rank, (errors, gradients) in enumerate(results):
        assert (errors is not None) == (rank == last)
        assert max(gradients.values()) < 1e-10
    errors = results[last][0]
    assert len(errors) == 6
    assert max(errors) < 1e-12


# -------------------------------------------------------------------- errors


def make_wrong_pipelines() -> None:
    case = Case("ZBVZeroBubble", "mixtral")
    mesh = mesh_of(Degrees(pp=2))
    shape: Any = {"hidden_shape": (B, S, D), "dtype": torch.float32}
    with pytest.raises(ValueError, match=r"given 1 parts, .* this rank holds the stages \([01], [23]\)"):
        Pipeline([nn.Identity()], case.plan, mesh, **shape)
    plan = check_pipeline("GPipe", pp=4, num_layers=4, num_microbatches=1)
    with pytest.raises(ValueError, match=r"the plan is for pp=4 ranks, the mesh has pp=2"):
        Pipeline([nn.Identity()], plan, mesh, **shape)


def test_parts_must_fit_the_plan(ranks: Ranks) -> None:
    ranks.run(make_wrong_pipelines, 2)


def step_with(case: Case, call_of: Any, loss_of: Any) -> None:
    with double_precision():
        batches = make_batches(case.num_microbatches)
        make_pipeline(case, make_parts(case)).step(call_of(batches), loss_of(batches))


def shorter(batches: list[Batch]) -> Any:
    call = stage_call(batches)

    def short_call(part: nn.Module, microbatch: int, hidden: Tensor | None) -> Tensor:
        return call(part, microbatch, hidden)[:, 1:]

    return short_call


def loss_per_token(batches: list[Batch]) -> Any:
    return lambda logits, microbatch: logits.sum(dim=-1)


def test_another_shape_is_an_error(ranks: Ranks) -> None:
    expected = (
        r"stage 0 of 2 returned \(2, 11, 32\) of torch.float64, but the next stage awaits \(2, 12, 32\)"
    )
    with pytest.raises(RankError, match=expected):
        ranks.run(step_with, 2, Case("GPipe", "mixtral"), shorter, stage_loss)


def test_another_dtype_is_an_error(ranks: Ranks) -> None:
    case = replace(Case("GPipe", "mixtral"), hidden_dtype=torch.float32)
    with pytest.raises(RankError, match=r"of torch.float64, but the next stage awaits .* of torch.float32"):
        ranks.run(step_with, 2, case, stage_call, stage_loss)


def test_the_loss_is_a_scalar(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"the loss has shape \(2, 12\), expected a scalar"):
        ranks.run(step_with, 2, Case("GPipe", "mixtral"), stage_call, loss_per_token)
