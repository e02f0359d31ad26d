"""Attention of transformers models divided over ranks: heads over tp, queries over cp.

Outside attention every rank of cp and tp holds tokens of its own. At the boundary of an attention module the
hidden states of the tp ranks are gathered, each rank computes its heads, and the sum over heads goes back to
the ranks whose tokens they are; inside, keys and values are gathered over cp. Masks and arguments for such a
call come from `trimtab.integrations.attention_masks`.

Parameters that lie along heads become DTensors over tp and have complete gradients of their part. All others
stay whole, with gradients that are partial over tp, as those of every parameter outside attention.

Shapes: B sequences, s tokens of this rank, c tokens that attention on this rank has queries for, D model,
H heads, S all tokens, h head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from trimtab.integrations.attention_layouts import Heads, decoder_of, heads_of
from trimtab.integrations.attention_masks import (
    IMPLEMENTATIONS,
    attention_masks,
    model_arguments,
    position_arguments,
    register_masks,
)
from trimtab.integrations.mtp import mtp_layers
from trimtab.parallel.mesh import Mesh
from trimtab.parallel.placements import CROSSINGS, local
from trimtab.parallel.tokens import TokenShard

__all__ = ["attention_masks", "model_arguments", "parallelize_attention", "position_arguments"]

ATTENTION_STATE = "_trimtab_attention"


@dataclass(frozen=True)
class _State:
    """What hooks and the attention function need of one attention module.

    Groups are named, not held: process groups cannot be copied, and compiled graphs take names.
    """

    tp_group: str | None
    cp_group: str | None
    tp: int
    tp_rank: int
    cp: int
    cp_rank: int
    per_head: tuple[str, ...]
    tempered: bool
    attend: Callable[..., Any]


def parallelize_attention(model: nn.Module, mesh: Mesh) -> list[list[nn.Module]]:
    """Divide the attention of a transformers model over tp and cp, in place.

    Every rank calls it on the same model, before FSDP, compile and checkpointing; parameters may be on the
    meta device. Decoder layers without parameters (of other pipeline stages) are left alone. Afterwards the
    model takes only the arguments of `model_arguments`. Attention dropout is drawn on each rank for itself.

    Args:
        model: a causal language model with eager or sdpa attention, whole on each rank.
        mesh: the ranks.

    Returns:
        For each attention module, in order, the linears whose parameters are divided over tp: what FSDP must
        group by itself, over "dp_cp". Empty with tp = 1.

    Raises:
        ValueError: attention that cannot be divided, or not by these degrees; nothing has been changed.
    """
    degrees = mesh.degrees
    if degrees.cp * degrees.tp == 1:
        return []
    decoder = decoder_of(model)
    if any(hasattr(module, ATTENTION_STATE) for module in decoder.modules()):
        raise ValueError(f"{type(model).__name__} is divided already; call parallelize_attention once")
    # Stages of one pipeline rank may share a configuration, and the first of them has renamed it.
    names = {name: stock for stock, name in IMPLEMENTATIONS.items()}
    implementation = decoder.config._attn_implementation
    implementation = names.get(implementation, implementation)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} must be {' or '.join(map(repr, IMPLEMENTATIONS))} "
            "on ranks that share sequences; give attn_implementation='sdpa' when the model is made"
        )
    further = [layer.mtp_block for layer in mtp_layers(model)]
    blocks = heads_of(decoder, cp=degrees.cp, tp=degrees.tp, further=further)
    attend = [_attend_of(block.module, implementation) for block in blocks]
    _register(implementation)
    decoder.config._attn_implementation = IMPLEMENTATIONS[implementation]
    for block, function in zip(blocks, attend, strict=True):
        state = _State(
            tp_group=_name(mesh, "tp"),
            cp_group=_name(mesh, "cp"),
            tp=degrees.tp,
            tp_rank=mesh.rank("tp"),
            cp=degrees.cp,
            cp_rank=mesh.rank("cp"),
            per_head=block.per_head,
            tempered=block.tempered,
            attend=function,
        )
        setattr(block.module, ATTENTION_STATE, state)
        if block.tempered:
            # The module takes a query's place in the tensor for its place in the row; `attention_forward` does not.
            block.module.attn_temperature_tuning = False
    if degrees.tp == 1:
        return []
    return [_divide(block, mesh) for block in blocks]


def _name(mesh: Mesh, axis: str) -> str | None:
    group = mesh.group(axis)
    return None if group is None else group.group_name


def _divide(block: Heads, mesh: Mesh) -> list[nn.Module]:
    """Keep this rank's heads of one attention module."""
    attention, tp = block.module, mesh.degrees.tp
    for linear in block.column:
        linear.__class__ = ColumnLinear
        shard_linear(linear, "weight", 0, mesh)
        shard_linear(linear, "bias", 0, mesh)
    row = block.row
    row.__class__ = RowLinear
    shard_linear(row, "weight", 1, mesh)
    if row.bias is not None:
        part = row.out_features // tp
        row.bias_place = (part * mesh.rank("tp"), row.out_features - part * (mesh.rank("tp") + 1))
        shard_linear(row, "bias", 0, mesh)
    for name in block.counts:
        setattr(attention, name, getattr(attention, name) // tp)
    attention.register_forward_pre_hook(_gather_input, with_kwargs=True)
    attention.register_forward_hook(_scatter_output)
    return [*block.column, row]


def shard_linear(linear: nn.Linear, name: str, dim: int, mesh: Mesh) -> None:
    """Keep this rank's part of a parameter of a linear, along one dimension, over tp."""
    whole = getattr(linear, name)
    if whole is None:
        return
    # A copy: a view would keep the whole parameter in memory.
    part = whole.detach().chunk(mesh.degrees.tp, dim=dim)[mesh.rank("tp")].clone()
    sharded = DTensor.from_local(part, mesh.device_mesh("tp"), [Shard(dim)], run_check=False)
    setattr(linear, name, nn.Parameter(sharded, requires_grad=whole.requires_grad))


class ColumnLinear(nn.Linear):
    """A linear whose outputs are heads: this rank computes its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, D) -> (B, c, this rank's outputs)."""
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


class RowLinear(nn.Linear):
    """A linear whose inputs are heads: this rank's output is its part of the sum over heads."""

    bias_place: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, this rank's inputs) -> (B, c, D), partial over tp."""
        out = F.linear(x, local(self.weight))
        if self.bias is None:
            return out
        # Outputs are summed over ranks. Each adds its part of the bias in that part's place, so the sum has
        # the bias once, and each part has its complete gradient with nothing to communicate.
        return out + F.pad(local(self.bias), self.bias_place).to(out.dtype)  # under autocast they differ


# Hooks and the attention function are module-level and read their state from the module: torch.compile then
# makes one graph for all layers, and copies of a model work.


def _gather_input(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    group = getattr(attention, ATTENTION_STATE).tp_group
    crossing = CROSSINGS["attention.input"]
    if args:
        return (crossing.convert(args[0], 1, group), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": crossing.convert(kwargs["hidden_states"], 1, group)}


def _scatter_output(attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    group = getattr(attention, ATTENTION_STATE).tp_group
    crossing = CROSSINGS["attention.output"]
    if isinstance(output, tuple):
        return (crossing.convert(output[0], 1, group), *output[1:])
    return crossing.convert(output, 1, group)


class _OwnHeads:
    """What attention functions read of a module, with per-head parameters narrowed to this rank's heads."""

    def __init__(self, attention: Any, state: _State) -> None:
        self.training = attention.training
        self.num_key_value_groups = attention.num_key_value_groups
        self.is_causal = attention.is_causal
        for name in state.per_head:
            whole = getattr(attention, name)
            heads = whole.shape[0] // state.tp
            setattr(self, name, whole.narrow(0, heads * state.tp_rank, heads))


def attention_forward(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: the model's own, with the keys and values of all cp ranks.

    Args:
        attention: a module that `parallelize_attention` has divided.
        query: (B, H, c, h).
        key: (B, key-value heads, c, h).
        value: (B, key-value heads, c, h of values).
        attention_mask: (B, 1, c, S), its columns in the order of the gathered keys.
        kwargs: what the family passes besides.

    Returns:
        (B, c, H, h of values), and weights where the model's own function returns them.
    """
    state: _State = getattr(attention, ATTENTION_STATE)
    if state.tempered:
        query = _temper(attention, state, query)
    if state.cp_group is not None:
        key = CROSSINGS["attention.keys"].convert(key, 2, state.cp_group)
        value = CROSSINGS["attention.values"].convert(value, 2, state.cp_group)
    if state.per_head and state.tp > 1:
        attention = _OwnHeads(attention, state)
    out: tuple[Tensor, Tensor | None] = state.attend(attention, query, key, value, attention_mask, **kwargs)
    return out


def _temper(attention: Any, state: _State, query: Tensor) -> Tensor:
    """Queries scaled by the logarithm of their position in the row, as Llama 4 does without rotary angles."""
    shard = TokenShard.make(query.shape[2] * state.cp, cp=state.cp, cp_rank=state.cp_rank)
    positions_c = shard.queries_c.to(query.device)
    steps_c = torch.floor((positions_c.float() + 1.0) / attention.floor_scale)
    scales_c = torch.log1p(steps_c) * attention.attn_scale + 1.0
    return (query * scales_c[:, None]).to(query.dtype)


def _attend_of(attention: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function that this attention class calls under the implementation."""
    names = inspect.unwrap(type(attention).forward).__globals__
    try:
        eager, functions = names["eager_attention_forward"], names["ALL_ATTENTION_FUNCTIONS"]
    except KeyError:
        raise ValueError(
            f"{type(attention).__name__} does not choose its attention function by name, so keys cannot be "
            "gathered for it; set context_parallel_degree=1 and tensor_parallel_degree=1"
        ) from None
    function: Callable[..., Any] = functions.get_interface(implementation, eager)
    return function


def _register(implementation: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATIONS[implementation], attention_forward)
    register_masks(implementation)
