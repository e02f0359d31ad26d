"""Validation: loss of held-out text by domain, and which experts each domain's tokens go to.

Legend: B sequences, S length, s tokens of each on this rank, E experts, K top-k, L MoE layers, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.integrations.discovery import FoundRouter
from trimtab.metrics import mutual_information
from trimtab.parallel.mesh import Mesh
from trimtab.parallel.tokens import TokenShard
from trimtab.reduction import PackedSum
from trimtab.train.packing import IGNORED_LABEL, TokenBatch
from trimtab.train.stages import gather_stages


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """When held-out text is evaluated.

    Args:
        enable: evaluate at all: every ``interval`` steps, and at the end.
        interval: optimiser steps between evaluations.

    Raises:
        ValueError: an interval below 1.
    """

    enable: bool = True
    interval: int = 100

    def __post_init__(self) -> None:
        """Validate."""
        if self.interval < 1:
            raise ValueError(
                f"interval={self.interval} must be at least 1; to evaluate nothing, disable validation.enable"
            )


def next_token_targets(labels_BS: Tensor) -> Tensor:
    """(B, S) int64 what each position predicts: the label at t + 1; -100 where nothing is predicted."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED_LABEL)


def token_loss(logits_BsV: Tensor, targets_Bs: Tensor) -> Tensor:
    """Sum over tokens that predict something of the cross-entropy of their logits, in float32 or wider.

    Args:
        logits_BsV: (B, s, vocabulary), of any s positions. Gradient flows.
        targets_Bs: (B, s) int64 from `next_token_targets`; -100 where nothing is predicted.

    Returns:
        Scalar sum in nats.
    """
    logits = logits_BsV.flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets_Bs.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


class LoadCounter:
    """Forward hook of one router that counts its assignments of valid tokens by domain.

    Args:
        router: the router.
        num_domains: D.
        device: where the router runs.
    """

    def __init__(self, router: FoundRouter, num_domains: int, device: torch.device) -> None:
        self.router = router
        self.valid_mask_T: Tensor | None = None
        self.domain = 0
        self.counts_DE = torch.zeros(num_domains, router.num_experts, dtype=torch.int64, device=device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Count one forward."""
        if self.valid_mask_T is None:
            return
        _, _, ids_TK = self.router.family.unpack(output, self.router.top_k)
        ids = ids_TK.reshape(-1, ids_TK.shape[-1])[self.valid_mask_T].flatten()
        self.counts_DE[self.domain].scatter_add_(0, ids, torch.ones_like(ids))


class Evaluated(Protocol):
    """What `evaluate` needs of `trimtab.train.engine.Engine`."""

    mesh: Mesh | None
    device: torch.device
    shard: TokenShard
    listener: Callable[[int, TokenBatch], None] | None
    parts: list[Any]

    def evaluate(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """This rank's part of the loss of each microbatch."""
        ...


def evaluate(engine: Evaluated, batches: Iterable[tuple[str, TokenBatch]]) -> dict[str, Any]:
    """Evaluate held-out microbatches, each of one domain. All ranks do it together.

    Args:
        engine: its model is left in the mode it was in.
        batches: domain and microbatch of this data rank; every rank has the same domains.

    Returns:
        ``loss`` over all label tokens, ``domain_loss`` ({domain: loss}), ``domain_load`` ({domain: (L, E)
        assignments}) and ``mutual_information`` ((L,) bits between domain and expert).
    """
    found = [(domain, batch.to(engine.device)) for domain, batch in batches]
    domains = list(dict.fromkeys(domain for domain, _ in found))
    domain_of = {id(batch): domains.index(domain) for domain, batch in found}
    counters = [[LoadCounter(r, len(domains), engine.device) for r in part.routers] for part in engine.parts]

    def before_forward(part: int, batch: TokenBatch) -> None:
        valid_Bs = batch.valid_mask_BS[:, engine.shard.own_s]
        for counter in counters[part]:
            counter.valid_mask_T, counter.domain = valid_Bs.flatten(), domain_of[id(batch)]

    modes = [part.module.training for part in engine.parts]
    hooks = [c.router.module.register_forward_hook(c) for part in counters for c in part]
    engine.listener = before_forward
    try:
        for part in engine.parts:
            part.module.eval()
        # Compiled layers run eagerly here: other shapes and hooks would each compile them again.
        with torch.compiler.set_stance("force_eager"):
            losses = engine.evaluate([batch for _, batch in found])
    finally:
        engine.listener = None
        for hook in hooks:
            hook.remove()
        for part, training in zip(engine.parts, modes, strict=True):
            part.module.train(training)
    sums_D2 = torch.zeros(len(domains), 2, dtype=torch.float64, device=engine.device)
    # With a pipeline, the last stage alone has losses, and it alone counts labels.
    for loss, (domain, batch) in zip(losses, found, strict=False):
        num_labels = (next_token_targets(batch.labels_BS)[:, engine.shard.own_s] != IGNORED_LABEL).sum()
        sums_D2[domains.index(domain)] += torch.stack([loss.double(), num_labels.double()])
    load_LDE = _sum_over_ranks(engine, counters, sums_D2)
    total, num_total = sums_D2.sum(dim=0).tolist()
    return {
        "loss": total / max(1, num_total),
        "domain_loss": {
            domain: loss / max(1, num) for domain, (loss, num) in zip(domains, sums_D2.tolist(), strict=True)
        },
        "domain_load": {domain: load_LDE[:, place].tolist() for place, domain in enumerate(domains)},
        "mutual_information": mutual_information(load_LDE).tolist(),
    }


def _sum_over_ranks(engine: Evaluated, counters: list[list[LoadCounter]], sums_D2: Tensor) -> Tensor:
    """(L, D, E) assignments in all layers of all stages, on the CPU; ``sums_D2`` is summed in place."""
    load = [[counter.counts_DE for counter in part] for part in counters]
    mesh = engine.mesh
    if mesh is not None:
        dist.all_reduce(sums_D2)
        if (group := mesh.group("tokens")) is not None and any(load):
            summed = iter(PackedSum([counts_DE for part in load for counts_DE in part], group).wait())
            load = [[next(summed) for _ in part] for part in load]
    own = {part.stage: [c.cpu() for c in counts] for part, counts in zip(engine.parts, load, strict=True)}
    return torch.stack([counts_DE for counts in gather_stages(own, mesh) for counts_DE in counts])
