"""Validation: loss of held-out text by domain, and which experts each domain's tokens go to.

Legend: B sequences, S length, s tokens of each on this rank, E experts, K top-k, L MoE layers, D domains,
N losses: the main model's, and those of multi-token prediction.
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
from trimtab.metrics import max_violation, mutual_information
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
    """Forward hook of one router that counts its assignments of valid tokens by domain, and those of images.

    Args:
        router: the router.
        num_domains: D; of ``counts_DE`` one more row counts visual tokens, of all domains.
        device: where the router runs.
    """

    def __init__(self, router: FoundRouter, num_domains: int, device: torch.device) -> None:
        self.router = router
        self.valid_mask_T: Tensor | None = None
        self.visual_mask_T: Tensor | None = None
        self.domain = 0
        self.counts_DE = torch.zeros(num_domains + 1, router.num_experts, dtype=torch.int64, device=device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Count one forward."""
        if self.valid_mask_T is None:
            return
        _, _, ids_TK = self.router.family.unpack(output, self.router.top_k)
        ids_TK = ids_TK.reshape(-1, ids_TK.shape[-1])
        places = [(self.domain, self.valid_mask_T)]
        if self.visual_mask_T is not None:
            places.append((-1, self.visual_mask_T))
        for row, mask_T in places:
            # Adding 0 for other tokens and not leaving them out, which would wait for their number.
            ones_TK = mask_T[:, None].to(torch.int64).expand_as(ids_TK)
            self.counts_DE[row].scatter_add_(0, ids_TK.flatten(), ones_TK.flatten())


class Evaluated(Protocol):
    """What `evaluate` needs of `trimtab.train.engine.Engine`."""

    mesh: Mesh | None
    device: torch.device
    shard: TokenShard
    listener: Callable[[int, TokenBatch], None] | None
    parts: list[Any]

    @property
    def num_losses(self) -> int:
        """N."""
        ...

    def evaluate(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Of each microbatch this rank's part of its losses, and their terms: (num_losses, 2)."""
        ...


def evaluate(engine: Evaluated, batches: Iterable[tuple[str, TokenBatch]]) -> dict[str, Any]:
    """Evaluate held-out microbatches, each of one domain. All ranks do it together.

    Args:
        engine: its model is left in the mode it was in.
        batches: domain and microbatch of this data rank; every rank has the same domains.

    Returns:
        ``loss`` over all label tokens, ``mtp_loss`` likewise of multi-token prediction, its mean over depths,
        where there is any, ``domain_loss`` ({domain: loss}), ``domain_load`` ({domain: (L, E)
        assignments}) and ``mutual_information`` ((L,) bits between domain and expert). Of a source with images
        also ``modality_load`` ({"text" and "image": (L, E) assignments}) and ``modality_maxvio`` ({modality: (L,)
        largest load above the mean}).
    """
    found = [(domain, batch.send(engine.device)) for domain, batch in batches]
    domains = list(dict.fromkeys(domain for domain, _ in found))
    domain_of = {id(batch): domains.index(domain) for domain, batch in found}
    counters = [[LoadCounter(r, len(domains), engine.device) for r in part.routers] for part in engine.parts]

    def before_forward(part: int, batch: TokenBatch) -> None:
        own_s, images = engine.shard.own_s, batch.images
        for counter in counters[part]:
            counter.valid_mask_T = batch.valid_mask_BS[:, own_s].flatten()
            counter.visual_mask_T = None if images is None else images.visual_mask_BS[:, own_s].flatten()
            counter.domain = domain_of[id(batch)]

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
    shape = (len(domains), engine.num_losses, 2)
    sums_DN2 = torch.zeros(shape, dtype=torch.float64, device=engine.device)
    # With a pipeline, the last stage alone has losses, and it alone counts labels.
    for sums_N2, (domain, _) in zip(losses, found, strict=False):
        sums_DN2[domains.index(domain)] += sums_N2
    load_LDE = _sum_over_ranks(engine, counters, sums_DN2)
    load_LDE, visual_LE = load_LDE[:, :-1], load_LDE[:, -1]
    main, *depths = [loss / max(1, number) for loss, number in sums_DN2.sum(dim=0).tolist()]
    return {
        "loss": main,
        **({"mtp_loss": sum(depths) / len(depths)} if depths else {}),
        "domain_loss": {
            domain: loss / max(1, number)
            for domain, (loss, number) in zip(domains, sums_DN2[:, 0].tolist(), strict=True)
        },
        "domain_load": {domain: load_LDE[:, place].tolist() for place, domain in enumerate(domains)},
        "mutual_information": mutual_information(load_LDE).tolist(),
        **(_by_modality(load_LDE.sum(dim=1), visual_LE) if any(batch.images for _, batch in found) else {}),
    }


def _by_modality(all_LE: Tensor, visual_LE: Tensor) -> dict[str, Any]:
    load = {"text": all_LE - visual_LE, "image": visual_LE}
    return {
        "modality_load": {name: load_LE.tolist() for name, load_LE in load.items()},
        "modality_maxvio": {name: max_violation(load_LE).tolist() for name, load_LE in load.items()},
    }


def _sum_over_ranks(engine: Evaluated, counters: list[list[LoadCounter]], sums_DN2: Tensor) -> Tensor:
    """(L, D + 1, E) assignments in all layers of all stages, on the CPU; ``sums_DN2`` is summed in place."""
    load = [[counter.counts_DE for counter in part] for part in counters]
    mesh = engine.mesh
    if mesh is not None:
        dist.all_reduce(sums_DN2)
        if (group := mesh.group("tokens")) is not None and any(load):
            summed = iter(PackedSum([counts_DE for part in load for counts_DE in part], group).wait())
            load = [[next(summed) for _ in part] for part in load]
    own = {part.stage: [c.cpu() for c in counts] for part, counts in zip(engine.parts, load, strict=True)}
    return torch.stack([counts_DE for counts in gather_stages(own, mesh) for counts_DE in counts])
