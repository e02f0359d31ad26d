"""What one rank holds: parameters by what they are for, and the state of balancing.

Shapes: T tokens of a microbatch on this rank, E experts, A count maps, G groups, M microbatches of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trimtab.integrations.discovery import FoundRouter
from trimtab.integrations.experts import layout_of
from trimtab.integrations.lora import is_adapter
from trimtab.moe import MoE
from trimtab.parallel.parameter_groups import parameter_groups
from trimtab.train.engine import Engine, Part
from trimtab.train.traffic import groups_of_microbatch

KINDS = ("experts", "routers", "attention", "feed-forward", "norms", "embedding", "head", "adapters")
_INT64, _FLOAT32 = torch.int64.itemsize, torch.float32.itemsize


def count_parameters(model: Any, routers: Iterable[FoundRouter]) -> dict[str, int]:
    """Number of parameters on this rank by kind, as in `KINDS`; shared experts are feed-forward.

    Args:
        model: a transformers model or a pipeline stage of one, divided or not.
        routers: its routers.
    """
    kinds: dict[nn.Module, str] = {router.module: "routers" for router in routers}
    kinds |= {model.get_input_embeddings(): "embedding", model.get_output_embeddings(): "head"}
    for module in model.modules():
        if layout_of(module) is not None:
            kinds[module] = "experts"
        elif isinstance(module, MoE):
            kinds[module.experts] = "experts"
        elif hasattr(module, "o_proj"):
            kinds[module] = "attention"
    counts: defaultdict[str, int] = defaultdict(int)
    seen: set[int] = set()

    def walk(module: nn.Module, kind: str) -> None:
        kind = kinds.get(module, kind)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = "norms" if kind == "feed-forward" and parameter.dim() < 2 else kind
                counts[name] += local_numel(parameter)
        for name, child in module.named_children():
            walk(child, "adapters" if is_adapter(name) else kind)

    walk(model, "feed-forward")
    return {kind: counts[kind] for kind in KINDS}


def local_numel(parameter: torch.Tensor) -> int:
    """Elements of this rank's part."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameters of the model and of one rank.

    Gradients take as much memory as what is trained, AdamW's moments twice that.

    Args:
        whole: of the model, by kind.
        own: of this rank, by kind.
        activated: of the model, that one token passes: K / E of the experts and everything else.
        num_trained: of this rank, that are trained.
        size: bytes of a parameter.
        padding: bytes that FSDP adds to this rank's weights, so that all ranks have as much.
        gathered: bytes of weights that this rank holds beside its own while it trains: all of its stages' in a
            pipeline, else the root's.
        accumulated: bytes of gradients that it holds between microbatches, before they are summed over ranks.
    """

    whole: Mapping[str, int]
    own: Mapping[str, int]
    activated: int
    num_trained: int
    size: int
    padding: int
    gathered: int
    accumulated: int

    @property
    def num_whole(self) -> int:
        """Parameters of the model."""
        return sum(self.whole.values())

    @property
    def num_own(self) -> int:
        """Parameters of this rank."""
        return sum(self.own.values())


def parameters_of(engine: Engine, whole: Mapping[str, int]) -> Parameters:
    """Parameters of a rank.

    Args:
        engine: its engine, on any device.
        whole: `count_parameters` of the model before it was divided.
    """
    own = dict.fromkeys(KINDS, 0)
    for part in engine.parts:
        for kind, number in count_parameters(part.module, part.routers).items():
            own[kind] += number
    groups = [group for part in engine.parts for group in parameter_groups(part.module)]
    kept = engine.run.pipeline is not None
    model = engine.config.model
    return Parameters(
        whole=whole,
        own=own,
        activated=sum(whole.values())
        - whole["experts"] * (model.num_experts - model.top_k) // model.num_experts,
        num_trained=sum(local_numel(p) for p in engine.parameters() if p.requires_grad),
        size=next(engine.parameters()).element_size(),
        padding=sum(group.shard_bytes - group.own_bytes for group in groups),
        gathered=sum(group.whole_bytes for group in groups if kept or group.is_root),
        accumulated=sum(group.whole_gradient_bytes for group in groups)
        if engine.run.num_microbatches > 1
        else 0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterState:
    """Bytes that balancing adds to one part of the model on one rank.

    Args:
        stage: of the pipeline.
        layers: names of its routers.
        in_flight: microbatches whose backward is to come, at most.
        logits: per layer and microbatch, where logits are kept, ``attach(keep="logits")``; with "input", as the
            trainer has it, there are none of them.
        counts: per layer and microbatch: counts of this rank, and those summed over ranks.
        handles: per layer and microbatch, on the host.
        masks: per microbatch, for all layers together.
        step: per layer: counts of the step and of the step before, loads, and biases.
    """

    stage: int
    layers: tuple[str, ...]
    in_flight: int
    logits: int
    counts: int
    handles: int
    masks: int
    step: int

    def total(self, *, keeps_logits: bool) -> int:
        """Bytes at most."""
        per_layer = self.counts + self.handles + (self.logits if keeps_logits else 0)
        return len(self.layers) * (self.in_flight * per_layer + self.step) + self.in_flight * self.masks


def router_state(engine: Engine, part: Part) -> RouterState | None:
    """Memory of balancing one part; None if it has no router."""
    balancer = part.balancer
    if balancer is None:
        return None
    ledger, G = balancer.ledger, groups_of_microbatch(engine, part)
    row, layer = ledger.rows[0], balancer.layers[0]
    A, E = len(row.maps), row.num_experts
    T = engine.run.microbatch_size * len(engine.shard.own_s)
    counts = A * G * E * _INT64
    if ledger.sums.sums_groups:
        counts *= 2
    if ledger.sums.reads_totals:
        counts += (A * E + 3) * _INT64
    has_documents = balancer.context.unit == "document"
    masks = T + G * _INT64 + (G * _INT64 if has_documents else 0)
    if has_documents or (not engine.shard.is_whole and G > 1):
        masks += T * _INT64  # each token says which group it is in
    # Counts of this step and the last, (tokens, sequences, documents) in all, at least and at most, the last
    # step's tokens; the running load.
    step = (2 * A * E + 3 * 3 + 1) * _INT64 + E * _FLOAT32
    if any(objective.scope == "step" for objective in ledger.objectives):
        step += 2 * A * E * _FLOAT32  # least and largest load that backward has read
    if layer.router.expert_bias is not None:
        step += 2 * E * _FLOAT32  # the bias, and the one that metrics show
    if row.statistic is not None:
        step += E * row.statistic.num_bins * _INT64
    return RouterState(
        stage=part.stage,
        layers=tuple(row.name for row in ledger.rows),
        in_flight=microbatches_in_flight(engine, part.stage),
        logits=T * E * _FLOAT32,
        counts=counts,
        handles=3 * _INT64,
        masks=masks,
        step=step,
    )


def microbatches_in_flight(engine: Engine, stage: int) -> int:
    """Microbatches of a stage whose forward has run and whose backward has not ended, at most."""
    run = engine.run
    if run.pipeline is None or engine.pipeline is None:
        return run.num_microbatches if run.order == "forward_first" else 1
    if run.order == "forward_first":
        return run.num_microbatches
    if run.pipeline.schedule.placement == "single":
        return min(run.num_microbatches, run.pipeline.num_stages - stage)
    order: Any = engine.pipeline._schedule.pipeline_order[run.pipeline.rank_of(stage)]
    held = most = 0
    for action in order:
        for one in getattr(action, "sub_actions", None) or (action,):
            if one is None or one.stage_index != stage:
                continue
            held += {"F": 1, "B": -1, "W": -1}.get(one.computation_type.value, 0)
            most = max(most, held)
    return most
