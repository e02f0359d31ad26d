"""Which parameters of an attention module lie along its heads: one table, and the checks behind it.

A module is recognised by the names of its parameters, all of which must be in one row; what can be verified
by shapes is. Nothing that is not understood is divided: a part that is wrongly left whole, or wrongly split,
gives results that are silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

# The linear whose inputs are heads, in every family so far.
ROW = "o_proj"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Names in one kind of attention.

    Args:
        kind: what it is called.
        query: linears whose outputs are query heads; absent ones are skipped.
        key_value: linears whose outputs are key and value heads.
        same_width: heads of queries are as wide as those that the row linear takes.
        head_norms: norms of one head's features, whole on each rank.
        whole: other modules that every rank has whole.
        per_head: parameters with one element per head: whole, and narrowed where they are used.
        required: names that tell this kind from others.
    """

    kind: str
    query: tuple[str, ...]
    key_value: tuple[str, ...] = ()
    same_width: bool
    head_norms: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    required: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """Every name in the row."""
        return {*self.query, *self.key_value, ROW, *self.head_norms, *self.whole, *self.per_head}


LAYOUTS = (
    Layout(
        kind="multi-head",
        query=("q_proj", "gate_proj"),
        same_width=True,
        key_value=("k_proj", "v_proj"),
        head_norms=("q_norm", "k_norm", "query_layernorm", "key_layernorm"),
        per_head=("sinks",),
        required=("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    Layout(
        kind="latent",
        query=("q_proj", "q_b_proj", "kv_b_proj"),
        same_width=False,
        # The latents, and the part of the keys that all heads share, are computed by every rank.
        whole=("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"),
        required=("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ),
)
# Numbers of heads that some attention classes keep and use in views.
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads")
# Layers with another kind of mixing over tokens beside attention.
_OTHER_MIXING = ("linear_attention", "mamba", "conv", "recurrent", "hybrid")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Heads:
    """One attention module and what of it lies along heads.

    Args:
        module: the attention module.
        column: linears divided by output.
        row: the linear divided by input.
        per_head: names of parameters with one element per head.
        counts: names of its attributes that count heads.
        tempered: it scales queries by their place in the tensor, which under cp is not their place in the row.
    """

    module: Any
    column: tuple[nn.Linear, ...]
    row: Any
    per_head: tuple[str, ...]
    counts: tuple[str, ...]
    tempered: bool


def decoder_of(model: nn.Module) -> Any:
    """The module of a transformers model that builds masks and runs the decoder layers.

    Raises:
        ValueError: there is none, or several.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "config")
    ]
    if len(found) != 1:
        names = [type(module).__name__ for module in found]
        raise ValueError(
            f"{type(model).__name__} has {len(found)} modules with decoder layers {names}, expected one; "
            "tensor and context parallelism serve causal language models of transformers"
        )
    return found[0]


def heads_of(decoder: Any, *, cp: int, tp: int, further: Sequence[nn.Module] = ()) -> list[Heads]:
    """The attention modules of a decoder, checked for these degrees; layers without parameters are skipped.

    Args:
        decoder: the decoder.
        cp: ranks that divide queries.
        tp: ranks that divide heads.
        further: layers outside the decoder that run with its arguments: those of multi-token prediction.

    Raises:
        ValueError: a layer that cannot be divided.
    """
    if cp > 1:
        _check_positions(decoder)
    for kind in getattr(decoder.config, "layer_types", None) or ():
        if any(name in kind for name in _OTHER_MIXING):
            raise ValueError(
                f"{type(decoder).__name__} has layers of type {kind!r}, which mix tokens in order and not by "
                "attention; set tensor_parallel_degree=1 and context_parallel_degree=1"
            )
    blocks = []
    for index, layer in enumerate([*decoder.layers, *further]):
        if next(layer.parameters(), None) is None:
            continue
        attention = [child for child in layer.children() if isinstance(getattr(child, ROW, None), nn.Module)]
        if len(attention) != 1 or any(isinstance(module, nn.Conv1d) for module in layer.modules()):
            raise ValueError(
                f"layer {index} ({type(layer).__name__}) mixes tokens in another way than by one attention module "
                "with an o_proj; set tensor_parallel_degree=1 and context_parallel_degree=1"
            )
        blocks.append(_recognise(attention[0], decoder.config, cp=cp, tp=tp))
    return blocks


def _check_positions(decoder: Any) -> None:
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                raise ValueError(
                    f"rope_type={kind!r} depends on the longest position of a forward, which ranks that share a "
                    "sequence do not agree on; set context_parallel_degree=1, or another rope_type"
                )


def _recognise(attention: Any, config: Any, *, cp: int, tp: int) -> Heads:
    name = type(attention).__name__
    tensors = [*attention.named_parameters(), *attention.named_buffers()]
    present = {path.partition(".")[0] for path, _ in tensors}
    layout = next((row for row in LAYOUTS if present >= set(row.required) and present <= row.names), None)
    if layout is None:
        best = max(LAYOUTS, key=lambda row: len(present & set(row.required)))
        raise ValueError(
            f"{name} has {sorted(present - best.names) or sorted(present)}, which no row of "
            "trimtab.integrations.attention_layouts.LAYOUTS explains; add a row that says how they lie along "
            "heads, or set tensor_parallel_degree=1 and context_parallel_degree=1"
        )
    # Llama 4's layers without rotary angles.
    tempered = cp > 1 and getattr(attention, "attn_temperature_tuning", False) and not attention.use_rope
    counts = tuple(count for count in _COUNTS if isinstance(getattr(attention, count, None), int))
    column = [
        getattr(attention, linear) for linear in (*layout.query, *layout.key_value) if linear in present
    ]
    block = Heads(
        module=attention,
        column=tuple(column),
        row=getattr(attention, ROW),
        per_head=tuple(parameter for parameter in layout.per_head if parameter in present),
        counts=counts,
        tempered=tempered,
    )
    if tp > 1:
        _check_heads(block, layout, config, tp)
    return block


def _check_heads(block: Heads, layout: Layout, config: Any, tp: int) -> None:
    """Everything that dividing by heads relies on."""
    attention, row, name = block.module, block.row, type(block.module).__name__
    for linear in (*block.column, row):
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{name} has a {type(linear).__name__} where tensor parallelism divides an nn.Linear; parallelise "
                "before adapters and quantisation, or set tensor_parallel_degree=1"
            )
    width = row.in_features // config.num_attention_heads
    for linear in (*layout.query, ROW):
        _check_linear(
            attention, linear, "num_attention_heads", config, tp, width if layout.same_width else None
        )
    for linear in layout.key_value:
        _check_linear(attention, linear, "num_key_value_heads", config, tp, width)
    if row.bias is not None and row.out_features % tp:
        raise ValueError(
            f"hidden_size={row.out_features} must be a multiple of tensor_parallel_degree={tp}, over which the "
            f"output bias of {name} is divided; lower tensor_parallel_degree"
        )
    for norm in layout.head_norms:
        module = getattr(attention, norm, None)
        for parameter in module.parameters() if isinstance(module, nn.Module) else ():
            if parameter.numel() != width:
                raise ValueError(
                    f"{name}.{norm} normalises {parameter.numel()} features, not the {width} of one head, so a "
                    "rank with some of the heads cannot compute it; set tensor_parallel_degree=1 and use "
                    "context_parallel_degree"
                )
    for per_head in block.per_head:
        shape = tuple(getattr(attention, per_head).shape)
        if shape != (config.num_attention_heads,):
            raise ValueError(
                f"{name}.{per_head} has shape {shape}, expected one element for each of "
                f"{config.num_attention_heads} heads; set tensor_parallel_degree=1"
            )


def _check_linear(attention: Any, linear: str, setting: str, config: Any, tp: int, width: int | None) -> None:
    """The features along which one linear is divided are heads, and as many for each rank."""
    module = getattr(attention, linear, None)
    if module is None:
        return
    name, heads = type(attention).__name__, getattr(config, setting)
    if heads % tp:
        raise ValueError(
            f"{setting}={heads} of {name} must be a multiple of tensor_parallel_degree={tp}; lower "
            "tensor_parallel_degree"
        )
    features = module.in_features if module is getattr(attention, ROW) else module.out_features
    if features % heads or (width is not None and features != heads * width):
        raise ValueError(
            f"{name}.{linear} has {features} features, expected {heads} heads of {width or 'equal'}: they do not "
            "lie along heads as the table says; set tensor_parallel_degree=1"
        )
