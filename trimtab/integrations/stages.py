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
from trimtab.parallel.shared_parameters import share

# Attribute of a stage.
_ONE_BACKWARD = "_trimtab_one_backward"


def split_into_stages(model: nn.Module, *, num_stages: int, stage: int) -> nn.Module:
    """Make a model one stage of a pipeline, in place.

    Args:
        model: a causal language model of transformers, with real parameters, before anything is attached to it,
            wrapped around it or compiled. What the stage does not own is dropped.
        num_stages: number of stages.
        stage: which one, from 0. The first owns the embedding, the last the final norm, the head and modules of
            multi-token prediction. With these, or if embedding and head are one parameter, the last stage has
            the embedding too, under the same name: see `trimtab.parallel.shared_parameters`.

    Returns:
        The model.

    Raises:
        ValueError: the model does not survive the division; the message says why.
    """
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage={stage} must be in [0, num_stages={num_stages})")
    anatomy = examine(model)
    num_mtp = 0 if anatomy.mtp is None else len(model.get_submodule(anatomy.mtp).layers)  # type: ignore[arg-type]
    owned = divide_layers(len(anatomy.layers), num_stages, num_mtp, num_first=anatomy.num_first)[stage]
    for index, layer in enumerate(anatomy.layers):
        if index not in owned:
            anatomy.layers[index] = PassThrough(layer)
    last = num_stages - 1
    if stage > 0 and not (stage == last and anatomy.last_embeds):
        replace(model, anatomy.embedding)
    if stage > 0:
        for name in anatomy.first:
            replace(model, name)
    if anatomy.last_embeds and stage in (0, last) and last > 0:
        # Every depth reads the embedding, and depends on what the depth before made of it; so does its head.
        setattr(model, _ONE_BACKWARD, stage == last and num_mtp + anatomy.tied > 1)
        embedding = model.get_submodule(anatomy.embedding)
        share(model, {f"{anatomy.embedding}.{name}": (0, last) for name, _ in embedding.named_parameters()})
    if stage < last:
        if anatomy.mtp is not None:
            delattr(model, anatomy.mtp)
        for name in anatomy.final:
            replace(model, name)
        replace(model, anatomy.head, NoHead(model.get_submodule(anatomy.head)))
    return model


def needs_one_backward(stage: nn.Module) -> bool:
    """Whether a stage uses a parameter in two places of which one depends on the other.

    See ``one_backward`` of `trimtab.parallel.pipeline.Pipeline`.
    """
    return bool(getattr(stage, _ONE_BACKWARD, False))


def divide_layers(num_layers: int, num_stages: int, num_mtp: int = 0, *, num_first: int = 0) -> list[range]:
    """Layers of each stage: as even as can be, where the embedding and the head count as one layer each.

    Args:
        num_layers: decoder layers.
        num_stages: stages.
        num_mtp: layers of multi-token prediction, which the last stage has beside the head.
        num_first: layers that the first stage has at least.

    Raises:
        ValueError: fewer layers than stages, or none left for a stage after the first.
    """
    if num_layers < num_stages:
        raise ValueError(
            f"num_layers={num_layers} cannot be divided into num_stages={num_stages}: each stage needs a layer"
        )
    counts = [max(1, num_first), *[1] * (num_stages - 1)]
    if sum(counts) > num_layers:
        raise ValueError(
            f"num_layers={num_layers} cannot be divided into num_stages={num_stages}: features of images are added "
            f"after the first {num_first} layers, which the first stage must have, and every other needs one; use "
            "fewer stages, or add layers"
        )
    extra = [0] * num_stages
    extra[0] += 1
    extra[-1] += 1 + num_mtp
    for _ in range(num_layers - sum(counts)):
        # Of equals an inner stage: it has no embedding or head to hold beside its layers.
        lightest = min(range(num_stages), key=lambda s: (counts[s] + extra[s], extra[s], s))
        counts[lightest] += 1
    starts = [sum(counts[:s]) for s in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def call_stage(stage: nn.Module, x: Tensor, **arguments: Any) -> Any:
    """Call one stage; arguments are those of `run_stage`.

    Returns:
        What the model returns, with ``logits``.
    """
    name = "inputs_embeds" if x.is_floating_point() else "input_ids"
    return stage(**{name: x}, use_cache=False, **arguments)


def run_stage(stage: nn.Module, x: Tensor, **arguments: Any) -> Tensor:
    """Forward of one stage.

    Args:
        stage: from `split_into_stages`, or a whole model.
        x: (B, S) token ids in the first stage, else (B, S, D) hidden states. Gradient flows.
        arguments: of the model's forward, the same for all stages: ``position_ids``, ``attention_mask``.

    Returns:
        (B, S, D) hidden states, or of the last stage (B, S, vocabulary) logits.
    """
    logits = call_stage(stage, x, **arguments).logits
    assert isinstance(logits, Tensor)
    return logits
