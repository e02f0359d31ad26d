"""Tiny models in a pipeline, and the same in one process. B sequences, S length."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.hf_models import VOCAB, D, tiny_model
from tests.parallel.pool import mesh_of
from trimtab.integrations.stages import run_stage, split_into_stages
from trimtab.parallel.mesh import Degrees
from trimtab.parallel.pipeline import Pipeline
from trimtab.parallel.schedules import PipelinePlan, check_pipeline

B, S = 2, 12
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 1},
    "gpt_oss": {"sliding_window": 5},
    "llama4": {"attention_chunk_size": 6, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0] * 2},
}


@dataclass(frozen=True)
class Case:
    """One way to train a tiny model."""

    schedule: str
    family: str
    pp: int = 2
    num_microbatches: int = 4
    num_layers: int = 4
    stages_per_rank: int | None = None
    dp_shard: int = 1
    dtype: torch.dtype = torch.float64
    hidden_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.schedule}-{self.family}-{self.pp}x{self.num_microbatches}"

    @property
    def plan(self) -> PipelinePlan:
        return check_pipeline(
            self.schedule,
            pp=self.pp,
            num_layers=self.num_layers,
            num_microbatches=self.num_microbatches,
            stages_per_rank=self.stages_per_rank,
        )

    @property
    def degrees(self) -> Degrees:
        return Degrees(pp=self.pp, dp_shard=self.dp_shard)

    def model(self) -> Any:
        settings = FAMILY_SETTINGS.get(self.family, {})
        return tiny_model(
            self.family,
            num_layers=self.num_layers,
            dtype=self.dtype,
            experts_implementation="eager",
            **settings,
        )[0]


@dataclass(frozen=True)
class Batch:
    """One microbatch: rows of unequal lengths, padding at their ends has no labels.

    Positions restart with each document.
    """

    ids_BS: Tensor
    labels_BS: Tensor
    valid_BS: Tensor
    positions_BS: Tensor

    def rows(self, rank: int, num_ranks: int) -> "Batch":
        whole = (self.ids_BS, self.labels_BS, self.valid_BS, self.positions_BS)
        return Batch(*(x.chunk(num_ranks)[rank] for x in whole))

    @property
    def num_documents(self) -> int:
        """Documents that have a valid token."""
        return int((self.valid_BS & (self.positions_BS == 0)).sum())


def make_batches(number: int, num_rows: int = B, seed: int = 0, *, packed: bool = False) -> list[Batch]:
    """Random microbatches; ``packed`` ones have another number of documents each."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(number):
        ids_BS = torch.randint(3, VOCAB, (num_rows, S), generator=generator)
        lengths_B1 = torch.randint(S // 3, S + 1, (num_rows, 1), generator=generator)
        valid_BS = torch.arange(S) < lengths_B1
        labels_BS = ids_BS.roll(-1, dims=1).masked_fill(torch.arange(S) >= lengths_B1 - 1, -100)
        positions_BS = torch.arange(S).repeat(num_rows, 1)
        if packed:
            positions_BS %= S // (1 + len(batches) % 3)
        batches.append(Batch(ids_BS, labels_BS, valid_BS, positions_BS))
    return batches


def num_labels(batches: list[Batch]) -> int:
    return sum(int((batch.labels_BS >= 0).sum()) for batch in batches)


def cross_entropy(logits: Tensor, batch: Batch, total: int) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten(), reduction="sum")
    return loss / total


def one_process(case: Case, batches: list[Batch]) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of all parameters, and the loss of each microbatch."""
    model = case.model()
    losses = []
    for batch in batches:
        logits = run_stage(model, batch.ids_BS, position_ids=batch.positions_BS)
        losses.append(cross_entropy(logits, batch, num_labels(batches)))
        losses[-1].backward()
    return {name: p.grad for name, p in model.named_parameters()}, torch.stack(losses).detach()


def make_parts(case: Case) -> list[Any]:
    plan = case.plan
    return [
        split_into_stages(case.model(), num_stages=plan.num_stages, stage=stage)
        for stage in plan.stages_of(mesh_of(case.degrees).rank("pp"))
    ]


def make_pipeline(case: Case, parts: list[Any], num_rows: int = B) -> Pipeline:
    dtype = case.hidden_dtype or case.dtype
    return Pipeline(parts, case.plan, mesh_of(case.degrees), hidden_shape=(num_rows, S, D), dtype=dtype)


def stage_call(batches: list[Batch]) -> Any:
    def call(part: nn.Module, microbatch: int, hidden: Tensor | None) -> Tensor:
        batch = batches[microbatch]
        x = batch.ids_BS if hidden is None else hidden
        return run_stage(part, x, position_ids=batch.positions_BS)

    return call


def stage_loss(batches: list[Batch], mine: list[Batch] | None = None) -> Any:
    """Loss of the step's batches, or of this rank's rows of them."""
    return lambda logits, m: cross_entropy(logits, (mine or batches)[m], num_labels(batches))


def error(have: Tensor | None, want: Tensor) -> float:
    if have is None:
        have = torch.zeros_like(want)
    if isinstance(have, DTensor):
        have = have.full_tensor()
    scale = want.abs().max().item()
    return (have - want).abs().max().item() / (scale or 1.0)


def errors_of(parts: list[Any], want: dict[str, Tensor]) -> dict[str, float]:
    return {name: error(p.grad, want[name]) for part in parts for name, p in part.named_parameters()}


def joined(results: list[dict[str, float]]) -> dict[str, float]:
    """What every rank found, as one."""
    out: dict[str, float] = {}
    for result in results:
        out |= result
    return out
