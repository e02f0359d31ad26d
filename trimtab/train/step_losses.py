"""Cross entropies of a step's tokens: the main model's, and those of multi-token prediction.

Legend: B rows, S tokens of a row, s of them on this rank, V vocabulary, D depths, N = 1 + D losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from trimtab.integrations.mtp import MtpOutput
from trimtab.train.evaluation import next_token_targets, token_loss
from trimtab.train.mtp import MtpConfig, MtpLoss, mtp_targets, num_mtp_labels
from trimtab.train.packing import IGNORED_LABEL, TokenBatch

# What a last stage returns: logits, or logits beside those of multi-token prediction.
Logits = Tensor | MtpOutput


def label_totals(batches: Sequence[TokenBatch], mtp: MtpConfig | None) -> dict[str, int]:
    """Label tokens of a step's microbatches: ``num_labels``, and ``num_mtp_labels_<k>`` of each depth k."""
    totals = {"num_labels": sum(batch.num_label_tokens for batch in batches)}
    if mtp is not None:
        numbers = torch.stack([num_mtp_labels(batch, mtp.num_layers) for batch in batches]).sum(dim=0)
        totals |= {_name(depth): number for depth, number in enumerate(numbers.tolist())}
    return totals


def summed_losses(output: Logits, batch: TokenBatch, own_s: Tensor) -> Tensor:
    """(N, 2) float64: each loss, summed over this rank's label tokens, and their number.

    Args:
        output: of the last stage, of this rank's tokens.
        batch: whole rows.
        own_s: (s,) places in a row of this rank's tokens.
    """
    pairs = [(_main(output), next_token_targets(batch.labels_BS)[:, own_s])]
    if isinstance(output, MtpOutput):
        targets_DBs = mtp_targets(batch, len(output.mtp_logits))[..., own_s]
        pairs += zip(output.mtp_logits, targets_DBs, strict=True)
    return torch.stack(
        [
            torch.stack([token_loss(logits_BsV, targets_Bs).double(), (targets_Bs != IGNORED_LABEL).sum()])
            for logits_BsV, targets_Bs in pairs
        ]
    )


class StepLosses:
    """The losses of one optimiser step's microbatches on one rank.

    Args:
        main_loss: (logits, microbatch) -> sum of the main loss over this rank's label tokens.
        totals: label tokens of the step on all ranks, as `label_totals` names them.
        own_s: (s,) places in a row of this rank's tokens.
        mtp: multi-token prediction; None without.
        mtp_coef: its coefficient in this step; None: that of the first step.
    """

    def __init__(
        self,
        main_loss: Callable[[Tensor, TokenBatch], Tensor],
        totals: Mapping[str, int],
        own_s: Tensor,
        mtp: MtpConfig | None = None,
        mtp_coef: float | None = None,
    ) -> None:
        self._main_loss, self._num_labels, self._own_s = main_loss, max(1, totals["num_labels"]), own_s
        self._main: list[Tensor] = []
        self._mtp: MtpLoss | None = None
        if mtp is not None:
            coef = mtp.coef_at(0) if mtp_coef is None else mtp_coef
            self._mtp = MtpLoss(coef, [totals[_name(depth)] for depth in range(mtp.num_layers)], own_s)

    def share(self, output: Logits, batch: TokenBatch) -> Tensor:
        """A microbatch's share of what the step minimises, on this rank, balance losses apart.

        Args:
            output: of the last stage. Gradient flows.
            batch: whole rows.
        """
        share = self._main_loss(_main(output), batch) / self._num_labels
        self._main.append(share.detach())
        if self._mtp is None or not isinstance(output, MtpOutput):
            return share
        return share + self._mtp.share(output.mtp_logits, batch)

    @property
    def main(self) -> Tensor:
        """() this rank's part of the main loss; 0 if it had no microbatch."""
        return _sum(self._main, self._own_s)

    @property
    def mtp(self) -> Tensor | None:
        """() this rank's part of multi-token prediction's, without its coefficient; None without it."""
        return None if self._mtp is None else _sum(self._mtp.values, self._own_s)


def _sum(values: Sequence[Tensor], on: Tensor) -> Tensor:
    return torch.stack(list(values)).sum() if values else torch.zeros((), device=on.device)


def _main(output: Logits) -> Tensor:
    return output.logits if isinstance(output, MtpOutput) else output


def _name(depth: int) -> str:
    return f"num_mtp_labels_{depth + 1}"
