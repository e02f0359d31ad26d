"""Validation: loss of held-out text by domain, and which experts each domain's tokens go to.

Legend: B sequences, S length, T = B S tokens, E experts, K top-k, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.integrations.discovery import FoundRouter
from trimtab.metrics import mutual_information
from trimtab.train.compute import Precision, autocast
from trimtab.train.packing import IGNORED_LABEL, TokenBatch


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


def next_token_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum over label tokens of the cross-entropy of logits at t against the label at t + 1, in float32.

    Args:
        logits_BSV: (B, S, vocabulary). Gradient flows.
        labels_BS: (B, S) int64 at the positions of the inputs; -100 where nothing is predicted.

    Returns:
        Scalar float32 sum in nats.
    """
    logits = logits_BSV[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(logits, labels_BS[:, 1:].flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def forward(model: nn.Module, batch: TokenBatch, precision: Precision) -> Tensor:
    """(B, S, vocabulary) logits of one microbatch.

    The model gets positions and no mask: positions that restart separate packed documents, padding stands at
    the end of a row, where no valid token can see it, and its labels are ignored. With a mask, transformers
    would not look for documents.
    """
    with autocast(precision, batch.input_ids_BS.device):
        output: Any = model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    logits = output.logits
    assert isinstance(logits, Tensor)
    return logits


class LoadCounter:
    """Forward hook of one router that counts its assignments of valid tokens while switched on.

    Args:
        router: the router.
    """

    def __init__(self, router: FoundRouter) -> None:
        self.router = router
        self.valid_mask_T: Tensor | None = None
        self.counts_E: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Count one forward."""
        if self.valid_mask_T is None:
            return
        router = self.router
        _, _, ids_TK = router.family.unpack(output, router.top_k)
        ids = ids_TK.reshape(-1, ids_TK.shape[-1])[self.valid_mask_T]
        counts_E = torch.zeros(router.num_experts, dtype=torch.int64, device=ids.device)
        counts_E.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
        self.counts_E = counts_E if self.counts_E is None else self.counts_E + counts_E


@torch.no_grad()
def evaluate(
    model: nn.Module,
    routers: list[FoundRouter],
    batches: Iterable[tuple[str, TokenBatch]],
    *,
    precision: Precision,
    device: torch.device,
) -> dict[str, Any]:
    """Evaluate held-out microbatches, each of one domain.

    Args:
        model: left in the mode it was in.
        routers: its routers, in order.
        batches: domain and microbatch.
        precision: of the forward.
        device: where the model is.

    Returns:
        ``loss`` over all label tokens, ``domain_loss`` ({domain: loss}), ``domain_load`` ({domain: (L, E)
        assignments}) and ``mutual_information`` ((L,) bits between domain and expert).
    """
    sums: dict[str, Tensor] = {}
    labels: dict[str, int] = {}
    counts: dict[str, list[Tensor]] = {}
    was_training = model.training
    model.eval()
    counters = [LoadCounter(router) for router in routers]
    hooks = [counter.router.module.register_forward_hook(counter) for counter in counters]
    try:
        # Compiled layers run eagerly here: other shapes and hooks would each compile them again.
        with torch.compiler.set_stance("force_eager"):
            for domain, batch in batches:
                batch = batch.to(device)
                for counter in counters:
                    counter.valid_mask_T, counter.counts_E = batch.valid_mask_BS.flatten(), None
                loss = next_token_loss(forward(model, batch, precision), batch.labels_BS)
                new = [counter.counts_E for counter in counters if counter.counts_E is not None]
                known = counts.get(domain)
                counts[domain] = new if known is None else [a + b for a, b in zip(known, new, strict=True)]
                sums[domain] = sums.get(domain, 0) + loss.double()
                labels[domain] = labels.get(domain, 0) + batch.num_label_tokens
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    load_DLE = torch.stack([torch.stack(layers) for layers in counts.values()])
    total = sum(sums.values(), torch.zeros((), dtype=torch.float64, device=device))
    return {
        "loss": total.item() / max(1, sum(labels.values())),
        "domain_loss": {domain: sums[domain].item() / max(1, labels[domain]) for domain in sums},
        "domain_load": {domain: load_LE.tolist() for domain, load_LE in zip(counts, load_DLE, strict=True)},
        "mutual_information": mutual_information(load_DLE.transpose(0, 1)).tolist(),
    }
