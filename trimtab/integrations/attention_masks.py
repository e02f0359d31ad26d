"""Arguments with which a rank calls its model when ranks share sequences: tokens, positions and masks.

Masks are those that the model itself would build for the whole batch. Its decoder's forward runs on layers
that only note the mask they are given, and transformers' mask functions are asked for this rank's rows alone.
So a family's masks need no description here, and documents are told apart exactly as the model does it. Models
that do not look at positions when they build masks (gpt-oss, AFMoE), and so let documents of one row see each
other, are found by trying, and given masks of transformers that do, on one rank too.

Shapes: B sequences, S length, s tokens of this rank, c tokens that attention on this rank has queries for,
D model.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.integrations.attention_layouts import decoder_of
from trimtab.parallel.tokens import TokenShard

# The model's implementation, and the name under which it runs divided over ranks.
IMPLEMENTATIONS = {"eager": "trimtab_eager", "sdpa": "trimtab_sdpa"}
_SHARD = "_trimtab_shard"
_SEPARATES = "_trimtab_separates_documents"

Masks = Tensor | dict[str, Tensor]


def model_arguments(
    model: nn.Module,
    input_ids_BS: Tensor,
    position_ids_BS: Tensor,
    shard: TokenShard,
    hidden_BsD: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Keyword arguments for one forward of a model on one rank.

    Args:
        model: a model, or a pipeline stage of one; divided by `parallelize_attention` if ranks share sequences.
        input_ids_BS: (B, S) ids of all tokens.
        position_ids_BS: (B, S) positions of all tokens; they restart where a document begins.
        shard: this rank's tokens.
        hidden_BsD: (B, s, D) hidden states of this rank's tokens, for a stage that has no embedding; they take
            the place of ids. Gradient flows.
        dtype: as in `attention_masks`.

    Returns:
        ``input_ids`` (B, s), or ``inputs_embeds``, beside `position_arguments`.
    """
    if hidden_BsD is not None:
        return {
            "inputs_embeds": hidden_BsD,
            **position_arguments(model, position_ids_BS, shard, dtype=hidden_BsD.dtype),
        }
    own_ids = input_ids_BS if shard.is_whole else input_ids_BS[:, shard.own_s.to(input_ids_BS.device)]
    return {"input_ids": own_ids, **position_arguments(model, position_ids_BS, shard, dtype=dtype)}


def position_arguments(
    model: nn.Module, position_ids_BS: Tensor, shard: TokenShard, *, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """``position_ids`` (B, c) and ``attention_mask`` for a rank; usually only the former if it has all tokens.

    Args:
        model: as in `model_arguments`.
        position_ids_BS: (B, S) positions of all tokens.
        shard: this rank's tokens.
        dtype: as in `attention_masks`.
    """
    if shard.is_whole:
        decoder = decoder_of(model)
        if separates_documents(decoder):
            return {"position_ids": position_ids_BS}
        masks = _document_masks(
            decoder, decoder.config, position_ids_BS, dtype or next(model.parameters()).dtype
        )
        return {"position_ids": position_ids_BS, "attention_mask": masks}
    return {
        "position_ids": position_ids_BS[:, shard.queries_c.to(position_ids_BS.device)],
        "attention_mask": attention_masks(model, position_ids_BS, shard, dtype=dtype),
    }


@torch.no_grad()
def attention_masks(
    model: nn.Module, position_ids_BS: Tensor, shard: TokenShard, *, dtype: torch.dtype | None = None
) -> Masks:
    """This rank's part of the masks that the model builds from (B, S) position ids and no padding mask.

    Args:
        model: a model that `parallelize_attention` has divided.
        position_ids_BS: (B, S) positions of all tokens, on the device of the masks. No gradient.
        shard: this rank's tokens.
        dtype: of the hidden states of layers, None for that of the embedding; only eager attention, whose
            masks are added to scores, depends on it.

    Returns:
        (B, 1, c, S) with rows ``shard.queries_c`` and columns ``shard.keys_S``; where layers differ, a dict
        of such masks by layer type. Each takes B * c * S bytes under sdpa (bool, True may attend), B * c * S
        elements of ``dtype`` under eager; c * S if no row has several documents. No (S, S) tensor is made.

    Raises:
        ValueError: the model is not divided, or its masks cannot be had.
    """
    decoder = decoder_of(model)
    if decoder.config._attn_implementation not in IMPLEMENTATIONS.values():
        raise ValueError(
            f"{type(model).__name__} is not divided over ranks, but this rank has {len(shard.own_s)} of "
            f"{len(shard.keys_S)} tokens; call parallelize_attention(model, mesh) first"
        )
    if dtype is None:
        dtype = next(model.parameters()).dtype
    config = copy.copy(decoder.config)
    setattr(config, _SHARD, shard)
    if not separates_documents(decoder):
        return _document_masks(decoder, config, position_ids_BS, dtype)
    masks = _noted_masks(decoder, config, position_ids_BS, dtype)
    if not all(isinstance(mask, Tensor) for mask in masks):
        raise ValueError(
            f"{type(decoder).__name__} does not give its layers an attention_mask that transformers' mask "
            "functions build; set tensor_parallel_degree=1 and context_parallel_degree=1"
        )
    if all(mask is masks[0] for mask in masks):
        first: Tensor = masks[0]
        return first
    return dict(zip(config.layer_types, masks, strict=True))


def separates_documents(decoder: Any) -> bool:
    """Whether the masks that a decoder makes of positions keep documents of one row apart.

    True also of decoders whose layers are given no masks to look at.
    """
    known: bool | None = getattr(decoder, _SEPARATES, None)
    if known is None:
        # Two documents of two tokens: the third must not see the second.
        positions = torch.tensor([[0, 1, 0, 1]], device="cpu")
        config = copy.copy(decoder.config)
        config._attn_implementation = "eager"
        masks = _noted_masks(decoder, config, positions, torch.float32)
        seen = [mask for mask in masks if isinstance(mask, Tensor) and mask.dim() == 4]
        known = all(bool(mask[0, 0, 2, 1] < 0) for mask in seen)
        setattr(decoder, _SEPARATES, known)
    return known


def _document_masks(decoder: Any, config: Any, position_ids_BS: Tensor, dtype: torch.dtype) -> Masks:
    """transformers' masks for a configuration's kinds of layers, with documents kept apart."""
    from transformers.masking_utils import create_masks_for_generate

    hidden = _no_hidden(config, position_ids_BS, dtype)
    masks: Masks = create_masks_for_generate(config, hidden, None, None, position_ids_BS)
    return masks


def _no_hidden(config: Any, position_ids_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S, D) hidden states that take no memory."""
    zero = torch.zeros(1, dtype=dtype, device=position_ids_BS.device)
    return zero.expand(*position_ids_BS.shape, config.hidden_size)


def _noted_masks(decoder: Any, config: Any, position_ids_BS: Tensor, dtype: torch.dtype) -> list[Any]:
    """What the decoder's forward gives each of its layers as ``attention_mask``."""
    notes = [_Note(layer) for layer in decoder.layers]
    standin = copy.copy(decoder)
    # The copy shares its dict of children with the decoder.
    standin.__dict__["_modules"] = {
        name: child if next(child.parameters(), None) is None else _Same()
        for name, child in decoder.named_children()
    }
    standin.layers = nn.ModuleList(notes)
    standin.config = config
    # Without the decorators that record outputs, which know the decoder by its identity.
    forward = inspect.unwrap(type(decoder).forward)
    forward(standin, inputs_embeds=_no_hidden(config, position_ids_BS, dtype), position_ids=position_ids_BS)
    return [note.mask for note in notes]


class _Same(nn.Module):
    """Stands in for a module with parameters."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


class _Note(nn.Module):
    """Stands in for a decoder layer and keeps the mask it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Some models choose the mask by an attribute of the layer.
        self.__dict__.update({k: v for k, v in vars(layer).items() if isinstance(v, str | int)})
        self.mask: Any = None

    def forward(self, hidden_states: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        self.mask = attention_mask
        return hidden_states


def register_masks(implementation: str) -> None:
    """Tell transformers how to build masks of a divided model."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    function = {"eager": _additive_rows, "sdpa": _boolean_rows}[implementation]
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATIONS[implementation], function)


def _boolean_rows(*, batch_size: int, **kwargs: Any) -> Tensor:
    """transformers' sdpa_mask at this rank's rows, its columns in the order of gathered keys."""
    return _allowed(batch_size=batch_size, **kwargs).expand(batch_size, -1, -1, -1)


def _additive_rows(*, batch_size: int, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """transformers' eager_mask at this rank's rows."""
    allowed = _allowed(batch_size=batch_size, **kwargs)
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min).expand(batch_size, -1, -1, -1)


def _allowed(
    *, batch_size: int, mask_function: Any, config: Any, device: Any = "cpu", **kwargs: Any
) -> Tensor:
    """(B, 1, c, S) bool, or (1, 1, c, S) if the function does not ask for the row."""
    shard: TokenShard | None = getattr(config, _SHARD, None)
    if shard is None:
        raise ValueError(
            "a model divided over ranks needs its masks from outside; call it as "
            "model(**model_arguments(model, input_ids, position_ids, shard))"
        )
    rows_B = torch.arange(batch_size, device=device)
    head = torch.zeros(1, dtype=torch.int64, device=device)
    queries_c, keys_S = shard.queries_c.to(device), shard.keys_S.to(device)
    allowed: Tensor = mask_function(
        rows_B[:, None, None, None], head[None, :, None, None], queries_c[None, None, :, None], keys_S
    )
    return allowed.expand(-1, -1, len(queries_c), len(keys_S))
