"""Each model family, as the trainer builds and runs it, against the stock model of transformers in one process.

Shapes: B rows, S length, s tokens of one rank, M microbatches, V vocabulary.

Both have the same weights and see the same step of M microbatches. The stock model knows nothing of trimtab: it
runs its own eager experts, each microbatch whole, or where rows are packed each document by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.hf_reference import Gradients, take_grads
from tests.models.images import Illustrated, illustrate
from tests.models.sizes import VOCAB, small_config
from tests.parallel.cases import Case
from tests.parallel.double import double_precision
from tests.parallel.pool import RankError, Ranks, mesh_of
from tests.parallel.reference import B, Rows, S, Step, make_step
from tests.parallel.runner import parallelism, token_batch
from trimtab.parallel.experts import SPLIT_DIMS
from trimtab.parallel.mesh import Degrees
from trimtab.train.checkpoint_state import canonical_name, parts_of
from trimtab.train.compute import ActivationCheckpointConfig, CompileConfig
from trimtab.train.config import TrainConfig
from trimtab.train.engine import Engine
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.vision_model import VisionLanguage

NUM_MICROBATCHES = 4
TOLERANCE = 1e-10
# Of what computes in float32: compiled layers, which cannot be traced in `double_precision`.
TOLERANCE_FLOAT32 = 1e-5
# Traces forward and backward and decomposes them as Inductor does, but generates no code.
COMPILE = CompileConfig(enable=True, backend="aot_eager_decomp_partition")
ONE = Degrees()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One column of the support matrix.

    Args:
        title: of the column.
        degrees: ranks along each axis.
        schedule: of a pipeline.
        packed: rows hold several documents.
        checkpointing: activation checkpointing.
        compiled: decoder layers are compiled.
    """

    title: str
    degrees: Degrees = ONE
    schedule: str = "1F1B"
    packed: bool = True
    checkpointing: Any = "none"
    compiled: bool = False

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.degrees.world_size


PLANS: dict[str, Plan] = {
    "one": Plan(title="one process", packed=False),
    "packed": Plan(title="packed documents"),
    "fsdp": Plan(title="FSDP", degrees=Degrees(dp_shard=2)),
    "hsdp": Plan(title="HSDP", degrees=Degrees(dp_replicate=2, dp_shard=2)),
    "tp": Plan(title="TP", degrees=Degrees(tp=2)),
    "ep": Plan(title="EP", degrees=Degrees(dp_shard=2, ep=2)),
    "etp": Plan(title="ETP", degrees=Degrees(tp=2, etp=2)),
    "cp": Plan(title="CP", degrees=Degrees(cp=2)),
    "pp": Plan(title="PP 1F1B", degrees=Degrees(pp=2)),
    "zbv": Plan(title="PP ZBV", degrees=Degrees(pp=2), schedule="ZBVZeroBubble"),
    "combined": Plan(
        title="PP x FSDP x EP",
        degrees=Degrees(pp=2, dp_shard=2, ep=2),
        checkpointing="full",
    ),
    "compile": Plan(title="compile", compiled=True),
    "full": Plan(title="checkpointing full", checkpointing="full"),
    "selective": Plan(title="checkpointing selective", checkpointing="selective"),
}


# ------------------------------------------------------------------ the stock model


def stock_model(model: HFModelConfig, dtype: torch.dtype) -> Any:
    """The class of transformers with fixed weights and eager experts."""
    import transformers

    default = torch.get_default_dtype()
    # Rotary frequencies that were computed in float64 would be others.
    torch.set_default_dtype(torch.float32)
    try:
        config = model.hf_config(model.num_embeddings(VOCAB))
        stock: Any = getattr(transformers, model.architecture)(config)
    finally:
        torch.set_default_dtype(default)
    if hasattr(stock, "set_experts_implementation"):
        stock.set_experts_implementation("eager")
    stock = stock.to(dtype).train()
    with torch.no_grad():
        for name, tensor in [*stock.named_parameters(), *_learned_buffers(stock)]:
            tensor.copy_(fixed_values(name, tensor.shape))
    return stock


def fixed_values(name: str, shape: Sequence[int]) -> Tensor:
    """(shape) float64 values of a tensor with this name: none is at rest, and routing is uneven."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    path, _, leaf = name.rpartition(".")
    if leaf == "e_score_correction_bias":
        return 0.05 * values  # all experts are chosen by some tokens
    is_norm = "norm" in path.rpartition(".")[2] and len(shape) == 1
    return 1 + 0.2 * values if is_norm else 0.2 * values


def _learned_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that checkpoints hold: selection biases."""
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


# ------------------------------------------------------------------ the stock model's step


@dataclass(frozen=True, slots=True)
class Expected:
    """A step of the stock model.

    Args:
        loss: cross entropy averaged over the step's labels.
        logits: (M, B, S, V).
        grads: of every parameter; zeros where it has none.
    """

    loss: float
    logits: Tensor
    grads: Gradients


def parity_step(model: HFModelConfig, packed: bool) -> tuple[Step, Illustrated | None]:
    """The step, with images for a model that takes them; one row of each microbatch is all padding.

    Args:
        model: the model.
        packed: rows hold several documents.
    """
    case = Case(
        plan="pp",
        family="",
        losses="z",
        schedule="1F1B",
        data="ragged",
        accumulation=True,
        packed=packed,
        checkpointing=False,
    )
    assert case.num_microbatches == NUM_MICROBATCHES
    step = make_step(case)
    if not isinstance(model, VisionLanguage):
        return step, None
    shown = illustrate(step, model.image_layout(VOCAB))
    return shown.step, shown


@cache
def expected(model: HFModelConfig, packed: bool, dtype: torch.dtype = torch.float64) -> Expected:
    """The stock model's step."""
    with double_precision() if dtype is torch.float64 else contextlib.nullcontext():
        stock = stock_model(model, dtype)
        step, images = parity_step(model, packed)
        logits = torch.stack([_documents(stock, rows, m, images) for m, rows in enumerate(step.microbatches)])
        labels = torch.stack([rows.labels for rows in step.microbatches])
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return Expected(loss.item(), logits.detach(), take_grads(stock))


def _documents(stock: Any, rows: Rows, m: int, images: Illustrated | None) -> Tensor:
    """(B, S, V) logits of microbatch m, of each document by itself."""
    parts = []
    for start, end in pairwise(rows.cu_seqlens.tolist()):
        shown = {} if images is None else images.stock_arguments(images.images_MBS[m].view(-1)[start:end])
        ids = rows.input_ids.reshape(1, -1)[:, start:end]
        parts.append(stock(input_ids=ids, use_cache=False, **shown).logits)
    return torch.cat(parts, dim=1).view(*rows.input_ids.shape, -1)


# ------------------------------------------------------------------ the trainer's step, on each rank


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank has after the step.

    Args:
        loss: this rank's part.
        logits: by microbatch, this rank's tokens' logits; empty on stages without the head.
        rows: its data rank.
        places: (s,) its tokens' places in their rows.
        grads: whole gradients of its stages; None on all ranks of a stage but one.
    """

    loss: float
    logits: dict[int, Tensor]
    rows: int
    places: Tensor
    grads: Gradients | None


def train_config(config: TrainConfig, plan: Plan) -> TrainConfig:
    """The trainer's configuration of a family under a plan."""
    rows = B // plan.degrees.data
    pipeline: dict[str, Any] = {}
    if plan.degrees.pp > 1:
        pipeline = {"pipeline_parallel_schedule": plan.schedule, "pipeline_parallel_microbatch_size": rows}
    return replace(
        config,
        data=replace(config.data, seq_len=S, microbatch_size=rows, packing=plan.packed),
        validation=replace(config.validation, enable=False),
        training=replace(config.training, global_batch_size=B * NUM_MICROBATCHES),
        metrics=replace(config.metrics, log_interval=1),
        parallelism=parallelism(plan.degrees, pipeline),
        activation_checkpoint=ActivationCheckpointConfig(mode=plan.checkpointing),
        compile=CompileConfig(
            enable=plan.compiled, backend="aot_eager_decomp_partition" if plan.compiled else "inductor"
        ),
    )


def run_step(config: TrainConfig, dtype: torch.dtype = torch.float64) -> Outcome:
    """One step by the trainer's engine on this rank.

    Args:
        config: from `train_config`.
        dtype: of weights; float64 computes in it throughout, but for compiled layers.
    """
    torch._dynamo.reset()
    double = dtype is torch.float64 and not config.compile.enable
    with double_precision() if double else contextlib.nullcontext():
        return _run_step(config, dtype)


def _run_step(config: TrainConfig, dtype: torch.dtype) -> Outcome:
    world_size = torch.distributed.get_world_size()
    run = config.for_world(world_size)
    mesh = None if world_size == 1 else mesh_of(run.degrees)
    with _built_as(config.model, dtype):
        engine = Engine(config, run, mesh=mesh, device=torch.device("cpu"), vocab_size=VOCAB, draw=False)
    _set_weights(engine.modules)
    data = 0 if mesh is None else mesh.rank("data")
    step, images = parity_step(config.model, config.data.packing)
    batches = [token_batch(rows.part(data, run.degrees.data)) for rows in step.microbatches]
    if images is not None:
        shown = [images.inputs(m, data, run.degrees.data) for m in range(NUM_MICROBATCHES)]
        batches = [replace(batch, images=inputs) for batch, inputs in zip(batches, shown, strict=True)]
    logits: dict[int, Tensor] = {}
    forward, numbers = engine.forward, {id(batch): m for m, batch in enumerate(batches)}

    def recorded(part: Any, batch: Any, *hidden: Any) -> Any:
        out = forward(part, batch, *hidden)
        if part.stage == engine.num_stages - 1:
            logits[numbers[id(batch)]] = out.detach().clone()
        return out

    engine.forward = recorded  # type: ignore[method-assign]
    with engine.settings():
        loss = engine.train_step(batches, engine.totals(batches))
    grads: Gradients = {}
    for module in engine.modules:
        for name, parameter in module.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad.detach()
            assert canonical_name(name) not in grads, f"{name} is in two stages of one rank"
            grads[canonical_name(name)] = whole.clone()
    first = mesh is None or (group := mesh.group("tokens")) is None or torch.distributed.get_rank(group) == 0
    return Outcome(float(loss), logits, data, engine.shard.own_s, grads if first else None)


@contextlib.contextmanager
def _built_as(model: Any, dtype: torch.dtype) -> Iterator[None]:
    build: Callable[..., nn.Module] = type(model).build
    with mock.patch.object(type(model), "build", lambda self, **sizes: build(self, **sizes).to(dtype)):
        yield


@torch.no_grad()
def _set_weights(modules: Iterable[nn.Module]) -> None:
    """Give this rank's parts of all parameters the values that the stock model has."""
    for part in modules:
        # Of parameters that are tied the first name counts.
        names = {id(parameter): name for name, parameter in part.named_parameters()}
        for module in part.modules():
            split_dims = getattr(module, SPLIT_DIMS, {})
            for key, parameter in module.named_parameters(recurse=False):
                name = canonical_name(names[id(parameter)])
                parts = parts_of(parameter, split_dims.get(key))
                whole = fixed_values(name, parts.shape)
                for offset, box in parts.boxes.items():
                    index = [
                        slice(start, start + size) for start, size in zip(offset, box.shape, strict=True)
                    ]
                    box.copy_(whole[tuple(index)])
        for name, buffer in _learned_buffers(part):
            buffer.copy_(fixed_values(canonical_name(name), buffer.shape))


# ------------------------------------------------------------------ comparison


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest errors relative to the largest element of what is compared.

    Args:
        logits: of all tokens.
        loss: of the step.
        grads: by parameter.
    """

    logits: float
    loss: float
    grads: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max(self.logits, self.loss, *self.grads.values())


def compare(outcomes: Sequence[Outcome], want: Expected) -> Errors:
    """Errors of a step on all its ranks.

    Raises:
        AssertionError: a token or a parameter is missing, or something is not finite.
    """
    num_data = 1 + max(outcome.rows for outcome in outcomes)
    logits = torch.full_like(want.logits, float("nan"))
    grads: Gradients = {}
    for outcome in outcomes:
        for m, part in outcome.logits.items():
            logits[m].chunk(num_data)[outcome.rows][:, outcome.places] = part.to(logits.dtype)
        for name, grad in (outcome.grads or {}).items():
            # Fused weights of experts divided over etp have one more dimension.
            assert torch.equal(grads.setdefault(name, grad), grad), f"{name} differs between stages"
    assert grads.keys() == want.grads.keys(), sorted(grads.keys() ^ want.grads.keys())
    found = Errors(
        _error(logits, want.logits),
        abs(sum(outcome.loss for outcome in outcomes) / want.loss - 1),
        {
            name: _error(grad.reshape(want.grads[name].shape), want.grads[name])
            for name, grad in grads.items()
        },
    )
    assert found.worst < float("inf"), f"not finite, or not all there: {found}"
    return found


def _error(have: Tensor, want: Tensor) -> float:
    scale = want.abs().max().item()
    error = (have.double() - want.double()).abs().max().item()
    return error / scale if scale else error


# ------------------------------------------------------------------ cells of the matrix


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What became of a family under a plan.

    Args:
        refused: why it is not run at all; None if it is.
        whole_rows: why it is run with rows of one document only; None if documents are packed, or need not be.
        errors: of a step that was run.
        tolerance: that they must keep.
        failure: of a step that went wrong.
    """

    refused: str | None = None
    whole_rows: str | None = None
    errors: Errors | None = None
    tolerance: float = TOLERANCE
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the step was run and is right."""
        return self.errors is not None and self.errors.worst < self.tolerance


def configure(family: str, plan: Plan) -> tuple[TrainConfig | None, Cell]:
    """The configuration of a family under a plan, as far as it is accepted, and a cell with the refusals."""
    small, reasons = small_config(family), []
    # What takes no packed rows may take others.
    for packed in (True, False) if plan.packed else (False,):
        try:
            config = train_config(small, replace(plan, packed=packed))
            config.for_world(plan.world_size)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return config, Cell(whole_rows=reasons[0] if reasons else None)
    return None, Cell(refused=reasons[0])


def run_cell(ranks: Ranks, family: str, plan: Plan, *, timeout: float = 120.0) -> Cell:
    """One step of a family under a plan, compared with the stock model."""
    config, cell = configure(family, plan)
    if config is None:
        return cell
    model: Any = config.model
    packed = config.data.packing
    want = expected(model, packed)
    try:
        outcomes = ranks.run(run_step, plan.world_size, config, timeout=timeout)
        errors = compare(outcomes, want)
    except (RankError, AssertionError) as error:
        return replace(cell, failure=str(error))
    tolerance = float32_tolerance(model, packed) if plan.compiled else TOLERANCE
    return replace(cell, errors=errors, tolerance=tolerance)


def float32_tolerance(model: HFModelConfig, packed: bool) -> float:
    """What may be lost in float32: what the stock model loses there, where that is more than usual."""
    have, want = expected(model, packed, torch.float32), expected(model, packed)
    lost = max(_error(have.logits, want.logits), *(_error(have.grads[n], want.grads[n]) for n in want.grads))
    return TOLERANCE_FLOAT32 if lost < TOLERANCE_FLOAT32 else 2 * lost
