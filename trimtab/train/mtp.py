"""Training of multi-token prediction: which tokens each depth reads and predicts, and what its loss weighs.

Legend: B rows, S tokens of a row, s of them on this rank, V vocabulary, D depths, T = B S.

The loss of a step is the main model's and, with CE_k the cross entropy of depth k,

    L = CE + coef / D * sum_k CE_k.

Source: DeepSeek-AI 2024, arXiv:2412.19437, section 2.2, equations 24 and 25. There CE_k is the sum over a sequence
divided by its T tokens, among them those at which depth k predicts nothing. Here it is divided by the number of
tokens that it predicts, on all ranks in the step, as CE itself is: the value of a depth then does not depend on how
short documents are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.train.evaluation import token_loss
from trimtab.train.packing import IGNORED_LABEL, TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class MtpConfig:
    """Multi-token prediction: further layers that predict tokens further ahead, trained with the model.

    Their routers are balanced as the main model's: the same objectives with the same coefficients, which
    ``coef`` does not scale, over all valid tokens, because all of them pass the experts.

    Args:
        num_layers: D, depths: depth k = 1 .. D predicts token t + k + 1 at t.
        coef: weight of the mean of the depths' losses beside the main loss.
        schedule: (optimiser step, factor on ``coef``) points, linear in between and constant outside, as those of
            bias rules: ``((0, 1.0), (n, 1.0), (n + 1, 1 / 3))`` lowers 0.3 to 0.1 after n steps.

    Raises:
        ValueError: no depth, a negative coefficient or factor, or points that are not in order.
    """

    num_layers: int = 1
    coef: float = 0.3
    schedule: tuple[tuple[int, float], ...] = ((0, 1.0),)

    def __post_init__(self) -> None:
        """Validate."""
        if self.num_layers < 1:
            raise ValueError(
                f"mtp.num_layers={self.num_layers} must be at least 1; leave mtp out to train without it"
            )
        if not 0 <= self.coef < float("inf"):
            raise ValueError(f"mtp.coef={self.coef} must be at least 0; 0 measures the loss without training")
        steps = [step for step, _ in self.schedule]
        if not steps or steps != sorted(set(steps)):
            raise ValueError(f"mtp.schedule={self.schedule} must hold points of increasing step")
        if not all(0 <= factor < float("inf") for _, factor in self.schedule):
            raise ValueError(f"mtp.schedule={self.schedule} must not have negative factors")

    def coef_at(self, step: int) -> float:
        """The coefficient of an optimiser step, the first of which is 0."""
        steps, factors = zip(*self.schedule, strict=True)
        return self.coef * float(np.interp(step, steps, factors))


def mtp_of(model: Any) -> MtpConfig | None:
    """Multi-token prediction of a model's configuration; None if it has none."""
    found: MtpConfig | None = getattr(model, "mtp", None)
    return found


def mtp_inputs(batch: TokenBatch, num_layers: int) -> Tensor:
    """(D, B, S) int64 ids that depths read: of token t + k of the same document.

    Past the end of a document its last token stands in: what follows belongs to another one, and nothing is
    predicted there.

    Args:
        batch: whole rows.
        num_layers: D.
    """
    last_T, ids_T = _last_of_document(batch), batch.input_ids_BS.reshape(-1)
    places_T = torch.arange(len(last_T), device=last_T.device)
    ids_DT = torch.stack([ids_T[torch.minimum(places_T + k, last_T)] for k in range(1, num_layers + 1)])
    return ids_DT.view(num_layers, *batch.input_ids_BS.shape)


def mtp_targets(batch: TokenBatch, num_layers: int) -> Tensor:
    """(D, B, S) int64 what depths predict: the label at t + k + 1 of the same document, -100 where there is none.

    Args:
        batch: whole rows.
        num_layers: D.
    """
    last_T, labels_T = _last_of_document(batch), batch.labels_BS.reshape(-1)
    places_T = torch.arange(len(last_T), device=last_T.device)
    targets = []
    for k in range(1, num_layers + 1):
        ahead_T = places_T + k + 1
        labels_ahead_T = labels_T[torch.minimum(ahead_T, last_T)]
        targets.append(labels_ahead_T.masked_fill(ahead_T > last_T, IGNORED_LABEL))
    return torch.stack(targets).view(num_layers, *batch.labels_BS.shape)


def num_mtp_labels(batch: TokenBatch, num_layers: int) -> Tensor:
    """(D,) int64 tokens that each depth predicts."""
    return (mtp_targets(batch, num_layers) != IGNORED_LABEL).flatten(1).sum(dim=1)


def _last_of_document(batch: TokenBatch) -> Tensor:
    """(T,) int64 place of the last token of each token's document in the flattened rows; none crosses rows."""
    ends_G = batch.cu_seqlens_G[1:].to(torch.int64) - 1
    return ends_G[batch.document_ids_BS().reshape(-1)]


class MtpLoss:
    """The loss of multi-token prediction in one optimiser step, on one rank.

    Args:
        coef: of this step.
        num_labels: for each depth, tokens that it predicts in the step on all ranks.
        own_s: (s,) places in a row of this rank's tokens.
    """

    def __init__(self, coef: float, num_labels: Sequence[int], own_s: Tensor) -> None:
        self.coef, self.num_labels, self.own_s = coef, num_labels, own_s
        #: Of each microbatch () the mean over depths of this rank's part of CE_k, without the coefficient.
        self.values: list[Tensor] = []

    def share(self, mtp_logits: Sequence[Tensor], batch: TokenBatch) -> Tensor:
        """A microbatch's share of ``coef / D * sum_k CE_k``, of this rank's tokens.

        Args:
            mtp_logits: (B, s, V) of each depth. Gradient flows.
            batch: whole rows.
        """
        num_layers = len(self.num_labels)
        targets_DBs = mtp_targets(batch, num_layers)[..., self.own_s]
        losses = [
            token_loss(logits_BsV, targets_Bs) / max(1, number)
            for logits_BsV, targets_Bs, number in zip(mtp_logits, targets_DBs, self.num_labels, strict=True)
        ]
        mean = torch.stack(losses).mean()
        self.values.append(mean.detach())
        return self.coef * mean
