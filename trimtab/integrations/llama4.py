"""Llama 4's MoE block on trimtab's dispatch: each token through its K experts, not through all of them.

Shape suffixes: T tokens, D model, F hidden, E experts, K top-k, N rows sorted by expert.
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from trimtab.experts import grouped_linear
from trimtab.integrations.expert_adapters import expert_adapter
from trimtab.integrations.experts import dispatcher_of, reader_of


class SparseLlama4TextExperts(Llama4TextExperts):
    """The stacked experts, each on its own tokens. A call of their own: FSDP gathers parameters around it."""

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:  # type: ignore[override]
        """(T, D) sum of each token's K experts, whose inputs are weighted."""
        dispatcher, read = dispatcher_of(self), reader_of(self)
        x_ND, counts_e, plan = dispatcher.dispatch(x_TD, ids_TK, weights_TK, score_before_experts=True)

        def linear(name: str, rows: Tensor) -> Tensor:
            out = grouped_linear(rows, read(self, name), None, counts_e, transposed=True)
            added = expert_adapter(self, name, rows, counts_e)
            return out if added is None else out + added

        gate_NF, up_NF = linear("gate_up_proj", x_ND).chunk(2, dim=-1)
        return dispatcher.combine(linear("down_proj", up_NF * self.act_fn(gate_NF)), plan)


class SparseLlama4TextMoe(Llama4TextMoe):
    """The stock block, which runs every expert on every token, with a sparse forward of the same value."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states: (..., D). Gradient flows.

        Returns:
            (T, D) output and (T, E) router logits, as the stock block.
        """
        x_TD = hidden_states.reshape(-1, self.hidden_dim)
        scores_TE, logits_TE = self.router(x_TD)
        # The output carries no ids, and names experts by its weights alone, which hooks on the router may have
        # replaced. A weight that underflowed to zero may stand for another expert: it adds nothing.
        ids_TK = scores_TE.detach().topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        return self.shared_expert(x_TD) + self.experts(x_TD, ids_TK, weights_TK), logits_TE


def make_sparse(block: nn.Module) -> None:
    """Give one block the sparse forward, in place; parameters, hooks and names stay."""
    # A class and not a replaced method: it pickles, copies and compiles as any other.
    cast(Any, block).__class__ = SparseLlama4TextMoe
    cast(Any, block).experts.__class__ = SparseLlama4TextExperts
