"""Multi-token prediction: further decoder layers, each of which looks one token further ahead.

Legend: B sequences, s tokens of each on this rank, D model width, V vocabulary. *Depth* k = 1, 2, ... is the number
of tokens that a module looks ahead of the main model.

Depth k at position t reads the state of depth k - 1 at t and the embedding of token t + k, and predicts token
t + k + 1. Depth 0 is the main model after its final norm. Embedding and head are the main model's own:

    h^k_t = norm(Block_k(M_k [norm(Emb(x_(t+k))); norm(h^(k-1)_t)])),   logits^k_t = Head(h^k_t)

Modules are transformers' `MtpLayer`, whose own model drafts tokens and does not train. Here the depths run as the
layers of a decoder of the model's own class, so masks, rotary angles and arguments are made by the model's own code
from the arguments of the main decoder: documents are told apart as there, ranks that share sequences pass the same
masks. Positions are those of the token whose state is read, t and not t + k: rotary attention sees differences of
positions only, which are the same.

Source: DeepSeek-AI 2024, arXiv:2412.19437, section 2.2, equations 21 to 23. The columns of M_k are in the order of
the released weights, embedding first.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.integrations.attention_layouts import decoder_of
from trimtab.integrations.stages_anatomy import MTP, PassThrough

# Of the main decoder's arguments, what its layers' attention depends on.
_PASSED_ON = (
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
# Settings under which depths are chained or scored in another way than above.
_OTHERWISE = (
    "chain_hidden_post_norm",
    "logits_mup_width_multiplier",
    "unpadded_vocab_size",
    "embedding_multiplier",
    "logits_scaling",
    "logit_scale",
    "final_logit_softcapping",
)


class MtpOutput(NamedTuple):
    """What a model with MTP modules returns. A tuple, in which FSDP finds the tensors that need gradients.

    Args:
        logits: (B, s, V) of the main model.
        mtp_logits: (B, s, V) of each depth.
        loss: the stock model's, of the main model alone; None if it was given no labels.
    """

    logits: Tensor
    mtp_logits: tuple[Tensor, ...]
    loss: Tensor | None


class MtpLayers(nn.Module):
    """The MTP modules of a model.

    Args:
        layers: one for each depth.
        depths_config: transformers' configuration of these layers.
    """

    def __init__(self, layers: Sequence[nn.Module], depths_config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.depths_config = depths_config

    def forward(
        self, decoder: Any, arguments: dict[str, Any], hidden_BsD: Tensor, embeds: Sequence[Tensor]
    ) -> list[Tensor]:
        """States of all depths.

        Args:
            decoder: the main model's, whose forward the depths run through.
            arguments: that it was called with.
            hidden_BsD: (B, s, D) its output after the final norm. Gradient flows.
            embeds: for each depth k the (B, s, D) embedding of token t + k. Gradient flows.

        Returns:
            (B, s, D) of each depth.
        """
        config, main = self.depths_config, decoder.config
        # Attention and experts choose their implementation by name when they run, and it is set on the main model.
        config._attn_implementation = main._attn_implementation
        config._experts_implementation = main._experts_implementation
        outputs: list[Tensor] = []
        standin = copy.copy(decoder)
        # The copy shares its dict of children with the decoder. What comes after its layers is not read.
        standin.__dict__["_modules"] = {
            name: child if next(child.parameters(), None) is None else nn.Identity()
            for name, child in decoder.named_children()
        }
        standin.layers = nn.ModuleList(
            _Depth(layer, embeds_BsD, outputs) for layer, embeds_BsD in zip(self.layers, embeds, strict=True)
        )
        standin.config = config
        passed_on = {name: arguments[name] for name in _PASSED_ON if arguments.get(name) is not None}
        # Without the decorators that record outputs, which know the decoder by its identity.
        forward = inspect.unwrap(type(decoder).forward)
        forward(standin, inputs_embeds=hidden_BsD, use_cache=False, **passed_on)
        return outputs


class _Depth(PassThrough):
    """One MTP module where the decoder calls a layer."""

    def __init__(self, layer: Any, embeds_BsD: Tensor, outputs: list[Tensor]) -> None:
        super().__init__(layer.mtp_block)
        self.layer, self.embeds_BsD, self.outputs = layer, embeds_BsD, outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, s, D) state of the depth before -> that of this one."""
        given = {"attention_mask": None, "position_ids": None, "past_key_values": None, **kwargs}
        out: Tensor = self.layer(inputs_embeds=self.embeds_BsD, previous_hidden_state=hidden_states, **given)
        self.outputs.append(out)
        return out


class WithMtp:
    """Mixed into a model's class: a forward that also runs the MTP modules, if given the tokens they read."""

    def forward(
        self, input_ids: Tensor | None = None, *args: Any, mtp_input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Forward of the stock model, and of its MTP modules.

        Args:
            input_ids: as in the stock model.
            args: likewise.
            mtp_input_ids: (depths, B, s) int64: token t + k for each depth k. None runs the stock model alone.
            kwargs: as in the stock model.

        Returns:
            The stock model's output, or with ``mtp_input_ids`` an `MtpOutput`.
        """
        model: Any = self
        stock = super().forward  # type: ignore[misc]
        if mtp_input_ids is None:
            return stock(input_ids, *args, **kwargs)
        head, decoder = model.get_output_embeddings(), decoder_of(model)
        with _noted(head) as head_calls, _noted(decoder) as decoder_calls:
            output = stock(input_ids, *args, **kwargs)
        ((hidden_BsD,), _), (_, arguments) = head_calls[0], decoder_calls[0]
        embeds = [model.get_input_embeddings()(ids_Bs) for ids_Bs in mtp_input_ids]
        states = getattr(model, MTP)(decoder, arguments, hidden_BsD, embeds)
        return MtpOutput(output.logits, tuple(head(state) for state in states), output.get("loss"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the stock class: this one has no name in a module."""
        state: dict[str, Any] = self.__dict__
        stock = type(self).__mro__[type(self).__mro__.index(WithMtp) + 1]
        return _rebuilt, (stock,), state


def _rebuilt(stock: type) -> Any:
    return object.__new__(_with_mtp(stock))


@cache
def _with_mtp(stock: Any) -> type:
    # Under the stock class's name and module: transformers reads both off a model's class.
    return type(
        stock.__name__, (WithMtp, stock), {"__module__": stock.__module__, "__qualname__": stock.__name__}
    )


@contextmanager
def _noted(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Arguments of the module's calls inside the block."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def add_mtp(model: Any, num_layers: int) -> None:
    """Give a causal language model MTP modules, as ``model.mtp``, in place.

    Call it before anything is attached to the model, divided or wrapped around it. Its configuration then says
    ``num_mtp_layers``, and of families whose layers differ the types of these.

    Args:
        model: of transformers, on any device; on the meta device the modules have no values either.
        num_layers: depths.

    Raises:
        ValueError: the family chains or scores MTP modules in another way, or the model has some already.
    """
    from transformers.modeling_layers import MtpLayer

    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers} must be at least 1; leave MTP out to train without it")
    if hasattr(model, MTP):
        raise ValueError(f"{type(model).__name__} has MTP modules already; call add_mtp once")
    decoder = decoder_of(model)
    config = decoder.config
    for name in _OTHERWISE:
        value = getattr(config, name, None)
        # A factor of 1 changes nothing; True is no factor.
        if value is not None and (isinstance(value, bool) or value != 1):
            raise ValueError(
                f"{type(model).__name__} has {name}={getattr(config, name)!r}, under which MTP modules are chained "
                "or scored in another way than trimtab trains them; train it without MTP"
            )
    config.num_mtp_layers = num_layers
    for kinds, wanted in (("layer_types", "full_attention"), ("mlp_layer_types", "sparse")):
        known = getattr(config, kinds, None)
        if known is not None:
            setattr(config, f"mtp_{kinds}", [wanted if wanted in known else known[-1]] * num_layers)
    depths_config = config.get_mtp_config()
    block, norm = type(decoder.layers[-1]), type(decoder.norm)
    weight = model.get_input_embeddings().weight
    with weight.device:
        layers = [MtpLayer(depths_config, block, norm, depth) for depth in range(num_layers)]
    mtp = MtpLayers(layers, depths_config).train(model.training)
    with torch.no_grad():
        for module in () if weight.is_meta else mtp.modules():
            model._init_weights(module)
    setattr(model, MTP, mtp if weight.is_meta else mtp.to(weight.dtype))
    stock: Any = type(model)
    model.__class__ = _with_mtp(stock)


def mtp_layers(model: nn.Module) -> list[Any]:
    """The MTP modules of a model, or of a pipeline stage of one, in order of depth; none if it has none."""
    found = getattr(model, MTP, None)
    return list(found.layers) if isinstance(found, MtpLayers) else []
