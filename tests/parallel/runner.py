"""One optimiser step of a case on its ranks, by the trainer's own engine; runs in workers of the pool.

Shapes: B rows, S length, E experts.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.hf_models import VOCAB, E, K
from tests.parallel.cases import Case, bias_rule, objectives
from tests.parallel.double import double_precision
from tests.parallel.pool import mesh_of
from tests.parallel.reference import B, Rows, S, build_model, make_step
from trimtab.models.deepseek_v3 import deepseek_v3_tiny
from trimtab.parallel.mesh import Degrees, Mesh
from trimtab.train.compute import ActivationCheckpointConfig, CompileConfig
from trimtab.train.config import TrainConfig
from trimtab.train.engine import Engine
from trimtab.train.model import Balancing, ModelConfig
from trimtab.train.packing import TokenBatch
from trimtab.train.parallelism import ParallelismConfig


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank has after the step.

    Args:
        loss: this rank's part of the task loss.
        grads: whole gradients of the parameters of its stages; None on all ranks of a stage but one.
        metrics: of each of its stages that has MoE layers, as `Balancer.metrics` returns them.
        bias: (E,) expert bias by router.
        seen: by router, for each microbatch how many forwards had run when its backward began.
        replicas_agree: whether gradients are the same bits on all ranks that hold copies.
    """

    loss: float
    grads: dict[str, Tensor] | None
    metrics: list[dict[str, Any]]
    bias: dict[str, Tensor]
    seen: dict[str, list[int]]
    replicas_agree: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StockModel(ModelConfig):
    """A tiny stock model in float64, as the trainer takes models."""

    family: str

    @property
    def has_expert_bias(self) -> bool:
        return self.family == "deepseek_v3"

    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        model: nn.Module = build_model(self.family, self.num_layers)
        return model


def run_case(case: Case, compile_backend: str | None = None) -> Outcome:
    """The step of a case on this rank.

    Args:
        case: what to run.
        compile_backend: of torch.compile, which cannot trace `double_precision`: routers, norms and softmax
            are then float32. None does not compile.
    """
    torch._dynamo.reset()
    with double_precision() if compile_backend is None else contextlib.nullcontext():
        return _run(case, compile_backend)


def _run(case: Case, compile_backend: str | None) -> Outcome:
    config, mesh = train_config(case, compile_backend), mesh_of(case.degrees)
    run = config.for_world(case.degrees.world_size)
    engine = Engine(config, run, mesh=mesh, device=torch.device("cpu"), vocab_size=VOCAB)
    data, num_data = mesh.rank("data"), case.degrees.data
    batches = [token_batch(rows.part(data, num_data)) for rows in make_step(case).microbatches]
    seen = _watch(engine, batches)
    with engine.settings():
        loss = engine.train_step(batches, engine.totals(batches))
    grads, digest = {}, hashlib.sha256()
    for part in engine.parts:
        for name, parameter in part.module.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            digest.update(_local(grad).contiguous().numpy().tobytes())
            assert name not in grads, f"{name} is in two stages of one rank"
            grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.detach()
    for balancer in engine.balancers:
        balancer.step()
    first = mesh.group("tokens") is None or dist.get_rank(mesh.group("tokens")) == 0
    return Outcome(
        loss=float(loss),
        grads=grads if first else None,
        metrics=[balancer.metrics() for balancer in engine.balancers],
        bias={r.name: bias.clone() for r, bias in _biases(engine)},
        seen={r.name: seen[i] for i, part in enumerate(engine.parts) for r in part.routers},
        replicas_agree=_same_on_replicas(digest.hexdigest(), mesh),
    )


def train_config(case: Case, compile_backend: str | None) -> TrainConfig:
    """The trainer's configuration of a case."""
    base, degrees = deepseek_v3_tiny(), case.degrees
    balancing = Balancing(objectives=tuple(objectives(case)), bias=bias_rule(case))
    rows = B // degrees.data
    pipeline: dict[str, Any] = {}
    if degrees.pp > 1:
        pipeline = {"pipeline_parallel_schedule": case.schedule, "pipeline_parallel_microbatch_size": rows}
    return replace(
        base,
        model=StockModel(
            balancing=balancing, family=case.family, num_layers=case.num_layers, num_experts=E, top_k=K
        ),
        data=replace(base.data, seq_len=S, microbatch_size=rows, validation_fraction=0.0),
        validation=replace(base.validation, enable=False),
        training=replace(base.training, global_batch_size=B * case.num_microbatches),
        metrics=replace(base.metrics, log_interval=1),
        parallelism=parallelism(degrees, pipeline),
        activation_checkpoint=ActivationCheckpointConfig(mode="full" if case.checkpointing else "none"),
        compile=CompileConfig(enable=compile_backend is not None, backend=compile_backend or "inductor"),
    )


def parallelism(degrees: Degrees, pipeline: dict[str, Any]) -> ParallelismConfig:
    """Degrees as the trainer's options."""
    return ParallelismConfig(
        data_parallel_replicate_degree=degrees.dp_replicate,
        data_parallel_shard_degree=degrees.dp_shard,
        tensor_parallel_degree=degrees.tp,
        context_parallel_degree=degrees.cp,
        expert_parallel_degree=degrees.ep,
        expert_tensor_parallel_degree=degrees.etp,
        pipeline_parallel_degree=degrees.pp,
        **pipeline,
    )


def token_batch(rows: Rows) -> TokenBatch:
    """A microbatch as the trainer's loader would have made it."""
    # The trainer shifts labels itself: a label stands where its token is.
    labels = torch.full_like(rows.labels, -100)
    labels[:, 1:] = rows.labels[:, :-1]
    return TokenBatch(
        input_ids_BS=rows.input_ids,
        labels_BS=labels,
        valid_mask_BS=rows.valid_mask,
        position_ids_BS=rows.position_ids,
        cu_seqlens_G=rows.cu_seqlens.to(torch.int32),
        domain_ids_BS=rows.valid_mask.to(torch.int64) - 1,
        num_tokens=int(rows.valid_mask.sum()),
        num_label_tokens=int((labels >= 0).sum()),
        num_sequences=len(rows.document_ids[rows.valid_mask].unique()),
    )


def _watch(engine: Engine, batches: list[TokenBatch]) -> dict[int, list[int]]:
    """Note, by part and microbatch, how many forwards of the part had run when the backward began."""
    number = {id(batch): m for m, batch in enumerate(batches)}
    forwards = {i: 0 for i in range(len(engine.parts))}
    seen = {i: [0] * len(batches) for i in forwards}
    forward = engine.forward

    def watched(part: Any, batch: TokenBatch, hidden_BsD: Tensor | None = None) -> Tensor:
        index, m = engine.parts.index(part), number[id(batch)]
        out = forward(part, batch, hidden_BsD)
        forwards[index] += 1

        def begins(grad: Tensor) -> None:
            # Zero-bubble schedules come through here again, for gradients of weights.
            seen[index][m] = seen[index][m] or forwards[index]

        out.register_hook(begins)
        return out

    engine.forward = watched  # type: ignore[method-assign]
    return seen


def _biases(engine: Engine) -> Iterator[tuple[Any, Tensor]]:
    for part in engine.parts:
        for router in part.routers:
            bias = getattr(router.module, "e_score_correction_bias", None)
            if bias is not None:
                yield router, bias


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad.detach()


def _same_on_replicas(digest: str, mesh: Mesh) -> bool:
    group = mesh.group("dp_replicate")
    if group is None:
        return True
    digests: list[Any] = [None] * group.size()
    dist.all_gather_object(digests, digest, group=group)
    return len(set(digests)) == 1
