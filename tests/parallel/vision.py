"""One optimiser step of a vision-language model on one process, as plainly as it can be written, and on ranks.

Shapes: B rows, S length, T tokens, E experts, K top-k.

The plain step runs the stock model, in float64, all microbatches in one graph: those without images do not reach
the vision tower at all. Nothing in it knows of ranks, hooks or injection.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.hf_reference import Gradients, take_grads
from tests.parallel.double import double_precision
from tests.parallel.pool import mesh_of
from tests.parallel.runner import parallelism
from trimtab import GlobalBatch, Objective, SequenceWise, ZLoss
from trimtab.integrations.discovery import discover
from trimtab.integrations.linear_attention import separate_documents
from trimtab.integrations.vision import prepare_vision
from trimtab.models.qwen3_5 import Qwen35ModelConfig
from trimtab.models.qwen3_vl import Qwen3VLModelConfig
from trimtab.parallel.mesh import Degrees
from trimtab.reference import RoutedTokens, reference_loss
from trimtab.train.compute import ActivationCheckpointConfig, CompileConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.engine import Engine
from trimtab.train.evaluation import ValidationConfig, next_token_targets
from trimtab.train.images_shapes import ShapesConfig
from trimtab.train.images_store import ImagesConfig
from trimtab.train.logging import MetricsConfig
from trimtab.train.model import Balancing
from trimtab.train.packing import TokenBatch
from trimtab.train.vision_model import VisionTowerConfig

VOCAB, S, B, M = 259, 72, 2, 4
ONE = Degrees()


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One step of a tiny model, of four microbatches on all ranks together, two of them without images."""

    family: str = "qwen3_vl"
    degrees: Degrees = ONE
    schedule: str | None = None
    visual_tokens: Any = "count"
    checkpointing: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        axes = [
            f"{a}{n}" for a in ("pp", "dp_replicate", "dp_shard", "ep") if (n := getattr(self.degrees, a)) > 1
        ]
        words = [self.family, *axes, self.schedule, self.visual_tokens]
        words += [name for name in ("checkpointing", "compiled") if getattr(self, name)]
        return "-".join(word for word in words if word)

    @property
    def objectives(self) -> list[Objective.Config]:
        """Coefficients are large: each must be seen in the gradient. Counts of the step where all are known."""
        losses: list[Objective.Config] = [
            SequenceWise.Config(coef=0.3, unit="document"),
            ZLoss.Config(coef=0.05),
        ]
        if self.schedule in (None, "GPipe"):
            losses.append(GlobalBatch.Config(coef=0.4, counts="exact"))
        return losses


class _Real:
    """Built with values, of the stock constructor, in float64 unless compiled."""

    __slots__ = ()

    def build(self: Any, *, vocab_size: int, seq_len: int) -> nn.Module:
        model = stock_model(self, vocab_size)
        prepare_vision(model)
        if isinstance(self, Qwen35ModelConfig):
            separate_documents(model)
        return model


@dataclass(frozen=True, kw_only=True, slots=True)
class RealQwen3VL(_Real, Qwen3VLModelConfig):
    """With features of images after the first two of its layers."""

    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, kw_only=True, slots=True)
class RealQwen35(_Real, Qwen35ModelConfig):
    """Gated delta networks and full attention in turn."""

    dtype: torch.dtype = torch.float64


def stock_model(config: Any, vocab_size: int = VOCAB) -> Any:
    """The model before the step; the same weights in every process."""
    import transformers

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            hf_config = config.hf_config(config.num_embeddings(vocab_size))
            model = getattr(transformers, config.architecture)(hf_config)
    finally:
        torch.set_default_dtype(default)
    model.set_experts_implementation("eager")
    return model.to(config.dtype).train()


def model_config(case: Case, num_layers: int | None = None) -> Any:
    """Sizes of a tiny model."""
    if num_layers is None:
        num_layers = 5 if case.degrees.pp > 1 else 3
    balancing = Balancing(
        objectives=tuple(case.objectives),
        order="forward_first" if case.schedule is None else "alternating",
        visual_tokens=case.visual_tokens,
    )
    sizes: dict[str, Any] = {
        "balancing": balancing,
        "dim": 32,
        "num_layers": num_layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "expert_hidden_dim": 8,
        "num_experts": 8,
        "top_k": 2,
        "init_std": 0.2,
        "dtype": torch.float32 if case.compiled else torch.float64,
    }
    tower: dict[str, Any] = {
        "dim": 16,
        "hidden_dim": 16,
        "num_heads": 2,
        "patch_size": 4,
        "num_positions": 16,
    }
    if case.family == "qwen3_vl":
        vision = VisionTowerConfig(depth=2, deepstack=(0, 1), **tower)
        return RealQwen3VL(**sizes, mrope_section=(4, 2, 2), vision=vision)
    return RealQwen35(
        **sizes,
        rotary_share=0.5,
        mrope_section=(2, 1, 1),
        attention_interval=2,
        num_linear_key_heads=2,
        num_linear_value_heads=4,
        linear_head_dim=8,
        shared_hidden_dim=8,
        vision=VisionTowerConfig(depth=2, **tower),
    )


def train_config(case: Case) -> TrainConfig:
    """The trainer's configuration of a case."""
    pipeline: dict[str, Any] = {}
    if case.schedule is not None:
        pipeline = {"pipeline_parallel_schedule": case.schedule, "pipeline_parallel_microbatch_size": B}
    shapes = ShapesConfig(num_documents=16, max_images=2, min_side=1, max_side=2)
    return TrainConfig(
        model=model_config(case),
        data=DataConfig(
            source="shapes",
            seq_len=S,
            microbatch_size=B,
            images=ImagesConfig(shapes=shapes),
            domain_pure=True,
            validation_fraction=0.0,
        ),
        validation=ValidationConfig(enable=False),
        training=TrainingConfig(steps=1, global_batch_size=B * M),
        metrics=MetricsConfig(log_interval=1),
        parallelism=parallelism(case.degrees, pipeline),
        activation_checkpoint=ActivationCheckpointConfig(mode="full" if case.checkpointing else "none"),
        compile=CompileConfig(enable=case.compiled, backend="aot_eager"),
    )


# Microbatches of each data rank; of two ranks, one has no image in the whole step.
_CHOSEN = {(0, 1): (0, 1, 2, 3), (0, 2): (0, 2), (1, 2): (1, 3)}


def microbatches(case: Case, rank: int = 0, num_ranks: int = 1) -> list[TokenBatch]:
    """A data rank's microbatches of the step; of those of all ranks, every second is without images."""
    config = train_config(replace(case, degrees=Degrees(), schedule=None))
    loader = config.build_loader(config.for_world(1))
    found: dict[bool, list[TokenBatch]] = {True: [], False: []}
    while min(map(len, found.values())) < M:
        batch = next(loader)
        assert batch.images is not None
        found[bool(len(batch.images.grids_I3))].append(batch)
    with_images, without = found[True], found[False]
    step = [with_images[0], without[0], with_images[1], without[1]]
    return [step[number] for number in _CHOSEN[rank, num_ranks]]


# ------------------------------------------------------------------ one process, plainly


@dataclass(frozen=True, slots=True)
class Expected:
    """What one process gets."""

    loss: float
    grads: Gradients


def expected(case: Case) -> Expected:
    """The step of a case on one process; plan and checkpointing have no influence."""
    plain = Case(
        family=case.family,
        degrees=Degrees(pp=min(case.degrees.pp, 2)),
        schedule=None if case.schedule is None else "GPipe" if case.schedule == "GPipe" else "1F1B",
        visual_tokens=case.visual_tokens,
    )
    with double_precision():
        return _expected(plain)


@cache
def _expected(case: Case) -> Expected:
    model, batches = stock_model(model_config(case)), microbatches(case)
    names = {id(router.module): router.name for router in discover(model)}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names.values()}
    for module in model.modules():
        if id(module) in names:
            record = calls[names[id(module)]]
            module.register_forward_hook(lambda m, a, out, record=record: record.append((out[0], out[2])))
    num_labels = sum(batch.num_label_tokens for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        targets = next_token_targets(batch.labels_BS).flatten()
        logits = plain_logits(model, case.family, batch).flatten(0, 1)
        total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_labels
    loss = total.item()
    for record in calls.values():
        for objective in case.objectives:
            routed = [
                routed_tokens(case, out, batch)
                for out, batch in zip(_joined(record, batches), batches, strict=True)
            ]
            total = total + reference_loss(objective.build(), routed, "softmax")
    total.backward()  # type: ignore[no-untyped-call]
    return Expected(loss, take_grads(model))


def plain_logits(model: Any, family: str, batch: TokenBatch) -> Tensor:
    """(B, S, vocabulary) of the stock model: each document by itself where it does not keep them apart."""
    images = batch.images
    assert images is not None
    merge = model.config.vision_config.spatial_merge_size
    if family == "qwen3_vl":
        return _forward(model, batch.input_ids_BS, batch.position_ids_BS, images, slice(None), merge)
    rows = []
    for b, starts in enumerate(batch.position_ids_BS == 0):
        bounds = [*starts.nonzero()[:, 0].tolist(), len(starts)]
        pieces = [_document(model, batch, b, slice(lo, hi), merge) for lo, hi in pairwise(bounds)]
        rows.append(torch.cat(pieces, dim=1))
    return torch.cat(rows)


def _document(model: Any, batch: TokenBatch, row: int, columns: slice, merge: int) -> Tensor:
    images = batch.images
    assert images is not None
    tokens = images.grids_I3.prod(dim=1) // merge**2
    # Which images these are: visual tokens before the document say it.
    before = int(images.visual_mask_BS[:row].sum() + images.visual_mask_BS[row, : columns.start].sum())
    inside = int(images.visual_mask_BS[row, columns].sum())
    ends = tokens.cumsum(0)
    chosen = slice(int((ends <= before).sum()), int((ends <= before + inside).sum()))
    patches = images.patches_PX[before * merge**2 : (before + inside) * merge**2]
    own = replace(
        images,
        patches_PX=patches,
        grids_I3=images.grids_I3[chosen],
        positions_3BS=images.positions_3BS[:, row : row + 1, columns],
    )
    ids, places = batch.input_ids_BS[row : row + 1, columns], batch.position_ids_BS[row : row + 1, columns]
    return _forward(model, ids, places, own, slice(None), merge)


def _forward(model: Any, ids: Tensor, places: Tensor, images: Any, rows: slice, merge: int) -> Tensor:
    shown: dict[str, Tensor] = {}
    if len(images.grids_I3):
        shown = {"pixel_values": images.patches_PX, "image_grid_thw": images.grids_I3}
    positions = torch.cat([places[None], images.positions_3BS])
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, **shown).logits
    return logits


def _joined(record: list[tuple[Tensor, Tensor]], batches: list[TokenBatch]) -> list[tuple[Tensor, Tensor]]:
    """Calls of one router, put together so that there is one for each microbatch."""
    joined = []
    calls = iter(record)
    for batch in batches:
        logits, ids, have = [], [], 0
        while have < batch.input_ids_BS.numel():
            one = next(calls)
            logits.append(one[0].reshape(-1, one[0].shape[-1]))
            ids.append(one[1].reshape(-1, one[1].shape[-1]))
            have += len(logits[-1])
        joined.append((torch.cat(logits), torch.cat(ids)))
    return joined


def routed_tokens(case: Case, out: tuple[Tensor, Tensor], batch: TokenBatch) -> RoutedTokens:
    """One microbatch of one layer, as the reference losses take it."""
    valid_BS = batch.valid_mask_BS
    if case.visual_tokens == "exclude":
        assert batch.images is not None
        valid_BS = valid_BS & ~batch.images.visual_mask_BS
    sequence_T = torch.arange(len(valid_BS)).repeat_interleave(valid_BS.shape[1])
    documents_T = batch.document_ids_BS().reshape(-1)
    return RoutedTokens(out[0], out[1], sequence_T, documents_T, valid_BS.reshape(-1))


# ------------------------------------------------------------------ on ranks


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank has after the step: its part of the loss, and whole gradients of its stages on one rank."""

    loss: float
    grads: Gradients | None
    replicas_agree: bool


def run_case(case: Case) -> Outcome:
    """The step of a case on this rank."""
    torch._dynamo.reset()
    if case.compiled:
        return _run(case)
    with double_precision():
        return _run(case)


def _run(case: Case) -> Outcome:
    config, mesh = train_config(case), mesh_of(case.degrees)
    run = config.for_world(case.degrees.world_size)
    engine = Engine(config, run, mesh=mesh, device=torch.device("cpu"), vocab_size=VOCAB)
    batches = microbatches(case, mesh.rank("data"), case.degrees.data)
    with engine.settings():
        loss = engine.train_step(batches, engine.totals(batches))
    grads, digest = {}, hashlib.sha256()
    for part in engine.parts:
        for name, parameter in part.module.named_parameters():
            grad = parameter.grad
            assert grad is not None, f"{name} has no gradient on rank {dist.get_rank()}"
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            digest.update(local.contiguous().numpy().tobytes())
            grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.detach()
    group = mesh.group("dp_replicate")
    digests: list[Any] = [digest.hexdigest()] * (1 if group is None else group.size())
    if group is not None:
        dist.all_gather_object(digests, digest.hexdigest(), group=group)
    first = mesh.group("tokens") is None or dist.get_rank(mesh.group("tokens")) == 0
    return Outcome(float(loss), grads if first else None, len(set(digests)) == 1)
