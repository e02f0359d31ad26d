"""Tokens to experts on other ranks, and their results back.

Each rank of ``ep`` holds E / R of the experts, and each rank of ``etp`` a slice of every expert's hidden
layer. A token's rows travel to the rank of their expert and the results travel back; where experts are
sliced, all ranks of ``etp`` first gather each other's tokens, and in the end sum their results.

Shapes: T tokens of this rank, or of all its etp ranks where there are several; K top-k, N = T * K rows sent,
M rows received, D model, E experts, e = E / R local experts, R ranks of ep.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.dispatch import DispatchedTokens, LocalDispatcher, LocalPlan, place_rows
from trimtab.parallel import collectives
from trimtab.parallel.mesh import Mesh
from trimtab.parallel.placements import CROSSINGS


class Exchange(NamedTuple):
    """Where rows went, and how the rows that came were sorted.

    Attributes:
        num_rows: N.
        send_R: (R,) int64 rows sent to each rank; on the host.
        receive_R: (R,) int64 rows received from each; on the host.
        to_source_M: (M,) int64, place in order of arrival of each row sorted by expert.
    """

    num_rows: int
    send_R: Tensor
    receive_R: Tensor
    to_source_M: Tensor


class ExpertParallelPlan(NamedTuple):
    """What undoes a dispatch.

    Attributes:
        local: permutation on this rank.
        exchange: exchange between ranks; None if ep has one rank.
    """

    local: LocalPlan
    exchange: Exchange | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertParallelDispatcher:
    """Experts live on the ranks of ep, in order, and their hidden layers on the ranks of etp.

    A rank without tokens, an expert that nobody chose and one that everybody chose are ordinary; ranks of etp
    must hold the same number of tokens. The host waits for the device once a layer, for the rows that each
    rank gets. Beyond the exchanges, forward and backward only permute rows and sum over fixed axes, so both
    give the same bits on every run.

    Attributes:
        num_experts: E.
        ep: name of the process group whose ranks divide the experts; None for one rank.
        num_ep_ranks: R.
        etp: name of the process group whose ranks divide each expert; None for one rank.
    """

    num_experts: int
    ep: str | None
    num_ep_ranks: int
    etp: str | None

    @staticmethod
    def make(num_experts: int, mesh: Mesh) -> "ExpertParallelDispatcher":
        """Dispatch over the ep and etp axes of a mesh.

        Raises:
            ValueError: ep does not divide the number of experts.
        """
        num_ranks = mesh.size("ep")
        if num_experts % num_ranks:
            raise ValueError(
                f"ep={num_ranks} must divide num_experts={num_experts}, so that ranks hold equally many; "
                "choose another ep"
            )
        ep, etp = mesh.group("ep"), mesh.group("etp")
        return ExpertParallelDispatcher(
            num_experts=num_experts,
            ep=None if ep is None else ep.group_name,
            num_ep_ranks=num_ranks,
            etp=None if etp is None else etp.group_name,
        )

    def dispatch(
        self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, *, score_before_experts: bool
    ) -> DispatchedTokens:
        """Copy each token to its K experts, wherever they are; see `trimtab.dispatch.Dispatcher.dispatch`.

        Within an expert rows are sorted by the rank they came from, then by token.
        """
        if self.etp is not None:
            x_TD = CROSSINGS["experts.input"].convert(x_TD, 0, self.etp)
            topk_weights_TK = CROSSINGS["experts.weights"].convert(topk_weights_TK, 0, self.etp)
            topk_ids_TK = collectives.gather(topk_ids_TK, 0, self.etp)
        x_ND, counts_E, plan = LocalDispatcher(num_experts=self.num_experts).dispatch(
            x_TD, topk_ids_TK, topk_weights_TK, score_before_experts=score_before_experts
        )
        if self.ep is None:
            return DispatchedTokens(x_ND, counts_E, ExpertParallelPlan(plan, None))
        sent_Re = counts_E.view(self.num_ep_ranks, -1)
        received_Re = collectives.exchange_counts(sent_Re, self.ep)
        # The exchanges, two forward and two backward, read their splits on the host: wait for them here, once.
        send_R, receive_R = torch.stack([sent_Re.sum(1), received_Re.sum(1)]).cpu().unbind()
        x_MD = collectives.exchange_rows(x_ND, send_R, receive_R, -1, self.ep)
        num_received = x_MD.shape[0]
        x_MD = place_rows(x_MD, swapped_blocks(received_Re, num_received))
        exchange = Exchange(
            x_ND.shape[0], send_R, receive_R, swapped_blocks(received_Re.transpose(0, 1), num_received)
        )
        return DispatchedTokens(x_MD, received_Re.sum(0), ExpertParallelPlan(plan, exchange))

    def combine(self, y_ND: Tensor, plan: ExpertParallelPlan) -> Tensor:
        """Bring each token's K results back and sum them; see `trimtab.dispatch.Dispatcher.combine`.

        With etp the results are parts of sums over hidden slices, which are summed here as well.
        """
        if plan.exchange is not None and self.ep is not None:
            num_rows, send_R, receive_R, to_source_M = plan.exchange
            y_MD = place_rows(y_ND, to_source_M)
            y_ND = collectives.exchange_rows(y_MD, receive_R, send_R, num_rows, self.ep)
        y_TD = LocalDispatcher(num_experts=self.num_experts).combine(y_ND, plan.local)
        if self.etp is not None:
            y_TD = CROSSINGS["experts.output"].convert(y_TD, 0, self.etp)
        return y_TD


def swapped_blocks(sizes_AB: Tensor, num_rows: int) -> Tensor:
    """Where rows go when blocks in the order (a, b) are put in the order (b, a).

    Args:
        sizes_AB: (A, B) int64 rows of each block; zeros are ordinary.
        num_rows: their sum.

    Returns:
        (num_rows,) int64, new place of each row: a permutation.
    """
    ends_AB = sizes_AB.flatten().cumsum(0)
    new_ends_BA = sizes_AB.t().flatten().cumsum(0)
    shift_AB = new_ends_BA.view(sizes_AB.t().shape).t().flatten() - ends_AB
    rows_N = torch.arange(num_rows, device=sizes_AB.device)
    return rows_N + shift_AB[torch.searchsorted(ends_AB, rows_N, right=True)]
