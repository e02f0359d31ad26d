"""Divides a transformers causal language model into pipeline stages.

Legend: B sequences, S length, D model width.

A stage is the whole model with every decoder layer, embedding, final norm and head that it does not own
replaced in place by a module that passes hidden states through. So whatever the model's forward does around its
layers (masks, rotary angles) is done on every stage by the model's own code, and parameters keep the names they
have in the whole model. Inner stages are given hidden states as ``inputs_embeds`` and return them as logits.

That is right only if the model does nothing else to hidden states between embedding and head, and if its layers
share nothing but them. `split_into_stages` finds out by running the model with *all* of these replaced: hidden
states must come out as they went in. Nothing in it knows a model family.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.integrations.stages_anatomy import NoHead, PassThrough, replace
from trimtab.integrations.stages_examination import examine


def split_into_stages(model: nn.Module, *, num_stages: int, stage: int) -> nn.Module:
    """Make a model one stage of a pipeline, in place.

    Args:
        model: a causal language model of transformers, with real parameters, before anything is attached to it,
            wrapped around it or compiled. What the stage does not own is dropped.
        num_stages: number of stages.
        stage: which one, from 0. The first owns the embedding, the last the final norm and the head.

    Returns:
        The model.

    Raises:
        ValueError: the model does not survive the division; the message says why.
    """
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage={stage} must be in [0, num_stages={num_stages})")
    anatomy = examine(model)
    owned = divide_layers(len(anatomy.layers), num_stages)[stage]
    for index, layer in enumerate(anatomy.layers):
        if index not in owned:
            anatomy.layers[index] = PassThrough(layer)
    if stage > 0:
        replace(model, anatomy.embedding)
    if stage < num_stages - 1:
        for name in anatomy.final:
            replace(model, name)
        replace(model, anatomy.head, NoHead(model.get_submodule(anatomy.head)))
    return model


def divide_layers(num_layers: int, num_stages: int) -> list[range]:
    """Layers of each stage: as even as can be, where the embedding and the head count as one layer each.

    Raises:
        ValueError: fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ValueError(
            f"num_layers={num_layers} cannot be divided into num_stages={num_stages}: each stage needs a layer"
        )
    counts = [1] * num_stages
    extra = [0] * num_stages
    extra[0] += 1
    extra[-1] += 1
    for _ in range(num_layers - num_stages):
        # Of equals an inner stage: it has no embedding or head to hold beside its layers.
        lightest = min(range(num_stages), key=lambda s: (counts[s] + extra[s], extra[s], s))
        counts[lightest] += 1
    starts = [sum(counts[:s]) for s in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def run_stage(stage: nn.Module, x: Tensor, **arguments: Any) -> Tensor:
    """Forward of one stage.

    Args:
        stage: from `split_into_stages`, or a whole model.
        x: (B, S) token ids in the first stage, else (B, S, D) hidden states. Gradient flows.
        arguments: of the model's forward, the same for all stages: ``position_ids``, ``attention_mask``.

    Returns:
        (B, S, D) hidden states, or of the last stage (B, S, vocabulary) logits.
    """
    name = "inputs_embeds" if x.is_floating_point() else "input_ids"
    output: Any = stage(**{name: x}, use_cache=False, **arguments)
    logits = output.logits
    assert isinstance(logits, Tensor)
    return logits
