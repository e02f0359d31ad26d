"""Linear attention that keeps documents of one row apart.

Gated delta networks of transformers read a row as one sequence unless special kernels are installed: their plain
PyTorch code takes the offsets of documents and ignores them, in the convolution and in the recurrence. Both begin
with nothing before the first token of a sequence. So a prepared model hands each document to the stock code as a
sequence of its own, and puts the results back where the tokens were.

Documents are stacked by length, padded at their ends, to powers of two: at most twice as many tokens are computed,
beside what short documents take to fill a chunk, which the stock code does too. What follows a token cannot change
it, so padding may hold anything.

Shapes: B sequences, S length, D model, T = B S tokens, g documents of about one length, L their padded length.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.integrations.attention_layouts import decoder_of

# Documents of fewer tokens are stacked together; the stock code pads to as many.
_SHORTEST = 64
Documents = tuple[tuple[Tensor, ...], Tensor]


def separate_documents(model: nn.Module) -> None:
    """Let linear attention start anew where position ids restart, in place; parameters, hooks and names stay.

    Args:
        model: a causal language model of transformers whose layers hand keyword arguments on to attention.

    Raises:
        ValueError: it has no gated delta networks.
    """
    decoder = decoder_of(model)
    found: list[Any] = [
        module for module in decoder.modules() if type(module).__name__.endswith("GatedDeltaNet")
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no gated delta networks, which alone are known here")
    for module in found:
        # A class and not a replaced method: it pickles, copies and compiles as any other.
        module.__class__ = _by_document(cast(Any, type(module)))
    decoder.register_forward_pre_hook(_tell_documents, with_kwargs=True)


def stack_documents(position_ids_BS: Tensor) -> Documents | None:
    """Where the tokens of documents go.

    Args:
        position_ids_BS: (B, S) positions, 0 at the first token of each document.

    Returns:
        For each length (g, L) places of tokens in the flattened batch, and (T,) places of the tokens in all of
        them one after another; None if every row is one document.
    """
    num_rows, length = position_ids_BS.shape
    starts_BS = position_ids_BS == 0
    starts_BS[:, 0] = True
    firsts = starts_BS.reshape(-1).nonzero()[:, 0].cpu()
    if len(firsts) == num_rows:
        return None
    lengths = torch.diff(firsts, append=torch.tensor([num_rows * length]))
    padded = (
        (2 ** lengths.clamp(min=_SHORTEST).double().log2().ceil()).long().clamp(max=max(length, _SHORTEST))
    )
    groups: list[Tensor] = []
    inverse_T = torch.empty(num_rows * length, dtype=torch.int64)
    placed = 0
    for size in padded.unique().tolist():
        chosen = padded == size
        first_g1, length_g1 = firsts[chosen, None], lengths[chosen, None]
        columns_L = torch.arange(min(size, int(length_g1.max())))
        index_gL = first_g1 + torch.minimum(columns_L, length_g1 - 1)
        inside_gL = columns_L < length_g1
        inverse_T[index_gL[inside_gL]] = placed + inside_gL.reshape(-1).nonzero()[:, 0]
        groups.append(index_gL)
        placed += index_gL.numel()
    device = position_ids_BS.device
    return tuple(index_gL.to(device) for index_gL in groups), inverse_T.to(device)


def _tell_documents(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Add what `_ByDocument` needs to the arguments that layers are called with, also when they run again."""
    positions = kwargs.get("position_ids")
    if positions is None:
        return None
    # Four axes: places in the document, then rotary positions.
    documents = stack_documents(positions[0] if positions.dim() == 3 else positions)
    return None if documents is None else (args, {**kwargs, "documents": documents})


@cache
def _by_document(stock: Any) -> type[nn.Module]:
    if issubclass(stock, _ByDocument):
        return cast(type[nn.Module], stock)
    return type(stock.__name__, (_ByDocument, stock), {"__module__": __name__})


class _ByDocument(nn.Module):
    """Mixed into gated delta networks."""

    def forward(
        self, hidden_states: Tensor, *args: Any, documents: Documents | None = None, **kwargs: Any
    ) -> Tensor:
        """(B, S, D) as the stock module, each document by itself."""
        stock: Any = super().forward
        if documents is None:
            out: Tensor = stock(hidden_states, *args, **kwargs)
            return out
        groups, inverse_T = documents
        x_TD = hidden_states.flatten(0, 1)
        parts = [stock(x_TD[index_gL], *args, **kwargs).flatten(0, 1) for index_gL in groups]
        return torch.cat(parts)[inverse_T].view_as(hidden_states)
