"""Starts a run from a directory of weights as model hubs serve them.

Each rank reads from the files what it holds of the model, however the ranks divide it: its experts, and its rows of
each tensor. Nobody holds a whole model, nor more than a piece of a tensor beside the rank's own memory; where a
tensor is made of others in a way that cannot be cut, one whole tensor. What files and the model disagree about is
found before anything is read, by all ranks alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.integrations.checkpoint_config import as_config_of, config_differences, read_config
from trimtab.integrations.checkpoint_mtp import MTP, num_mtp_layers
from trimtab.integrations.checkpoint_names import (
    expected_unknown,
    stock_class,
    stock_model,
    to_memory,
)
from trimtab.integrations.lora import is_adapter
from trimtab.train.checkpoint import CheckpointError
from trimtab.train.checkpoint_state import State, shortened
from trimtab.train.lazy_tensor import LazyTensor
from trimtab.train.safetensors_folder import DTYPES, Entry, SliceReader, read_entries
from trimtab.train.together import RanksFailedError, gathered, on_all_ranks, rank_and_size

_OPTION = "--checkpoint.initial"
_MODEL = "model."  # before names in a `State`
# transformers' configuration that makes a quantised checkpoint plain, by its own name for the method.
_DEQUANTIZE = {
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(run_compressed=False)",
}
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def check_initial(folder: Path) -> None:
    """Check that a directory can hold initial weights, without opening its files.

    Raises:
        CheckpointError: it cannot.
    """
    if not folder.expanduser().is_dir():
        what = "is a file" if folder.expanduser().exists() else "does not exist"
        raise CheckpointError(
            f"{_OPTION} {folder} {what}; give a directory that holds model.safetensors or its shards with their "
            "index, and config.json"
        )


def read_initial(
    folder: Path, modules: Sequence[nn.Module], state: State, *, allow_changes: bool = False
) -> None:
    """Fill this rank's parts of a model from a directory of safetensors files. All ranks call it.

    Adapters are no part of it and stay as they are.

    Args:
        folder: holds config.json, and model.safetensors or its shards with their index.
        modules: the parts of the model that this rank holds, one or several.
        state: this rank's boxes of parameters and persistent buffers, by name, as `LocalState.model` has them.
            What is not in it on any rank is not expected in the files.
        allow_changes: warn, where the directory's configuration says that the weights are to be used otherwise
            than the model does, instead of refusing it.

    Raises:
        CheckpointError: the directory does not hold the model's weights, or holds others; on every rank.
    """
    folder = folder.expanduser()
    state = {name: parts for name, parts in state.items() if not is_adapter(name)}

    def own_shapes() -> Shapes:
        return {name.removeprefix(_MODEL): (parts.shape, parts.dtype) for name, parts in state.items()}

    def look(everyones: list[Shapes]) -> tuple[dict[str, Entry], dict[str, Any], Shapes] | str:
        wanted = {name: what for own in everyones for name, what in own.items()}
        try:
            return read_entries(folder), read_config(folder), wanted
        except ValueError as error:
            return str(error)

    def examine(reader: SliceReader, *given: Any) -> _Examined | str:
        try:
            return _examine(modules[0], reader, *given)
        except ValueError as error:
            return str(error)

    try:
        # One rank opens all files. Of thousands, each then opens those it needs.
        seen = gathered(own_shapes, look)
        if isinstance(seen, str):
            raise CheckpointError(f"{_OPTION} {folder}: {seen}")
        entries, config, wanted = seen
        with SliceReader(folder, entries) as reader:
            # The same on all ranks.
            examined = on_all_ranks(lambda: examine(reader, entries, config, wanted))
            found = _refuse(folder, examined, allow_changes=allow_changes)
            on_all_ranks(lambda: _fill(state, found))
    except RanksFailedError as error:
        raise CheckpointError(f"{_OPTION} {folder} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class _Examined:
    """What the model's tensors are made of, with everything that is wrong.

    Args:
        tensors: by name in the model.
        copies: those that are there twice, with the name of the other.
        problems: what does not fit, one line each.
        changed: settings that differ, likewise.
    """

    tensors: dict[str, Tensor]
    copies: dict[str, str]
    problems: list[str]
    changed: list[str]


def _refuse(folder: Path, found: _Examined | str, *, allow_changes: bool) -> _Examined:
    """What was found, if nothing is wrong with it; else the same error on all ranks."""
    if isinstance(found, str):
        raise CheckpointError(f"{_OPTION} {folder}: {found}")
    if found.problems:
        settings = (
            f" Settings of its config.json that differ: {shortened(found.changed)}." if found.changed else ""
        )
        raise CheckpointError(
            f"{_OPTION} {folder} does not fit the model: {shortened(found.problems)}.{settings} Give the "
            "checkpoint that the model's sizes were taken from, or the sizes of this one"
        )
    if not found.changed:
        return found
    text = (
        f"{_OPTION} {folder}: its config.json differs from the model's settings in {shortened(found.changed)}"
    )
    if not allow_changes:
        raise CheckpointError(
            f"{text}. The weights would be used otherwise than they were trained; set the model's options so, or "
            "accept the changes with --checkpoint.allow-changes"
        )
    if rank_and_size()[0] == 0:
        warnings.warn(text, stacklevel=3)
    return found


def _examine(
    model: Any, reader: SliceReader, entries: Mapping[str, Entry], config: Mapping[str, Any], wanted: Shapes
) -> _Examined:
    """Find out what the model's tensors are made of.

    Raises:
        ValueError: the files are of another family, or hold no plain weights.
    """
    cls, own_config = stock_class(model), model.config
    there = as_config_of(own_config, cls.__name__, config)
    _check_plain(entries, config, wanted)
    stock = stock_model(cls, own_config)

    def open_tensor(name: str, dtype: torch.dtype) -> Tensor:
        return LazyTensor(entries[name].shape, dtype, lambda offset, out: reader.read(name, offset, out))

    found = to_memory(stock, entries, open_tensor, {name: dtype for name, (_, dtype) in wanted.items()})
    problems, tensors, copies = list(found.problems), found.tensors, {}
    for name, source in stock.all_tied_weights_keys.items():
        if source in tensors and name in wanted:
            if name in tensors:
                copies[name] = source
            tensors.setdefault(name, tensors[source])
    for name, (shape, _) in wanted.items():
        tensor = tensors.get(name)
        if name in found.broken:
            continue
        if tensor is None:
            problems.append(_missing(name))
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)} in it and {shape} in the model")
    allowed = expected_unknown(
        stock,
        found.unknown,
        num_layers=own_config.get_text_config().num_hidden_layers,
        num_mtp_layers=num_mtp_layers(wanted),
        other=_other_model(cls, config) if found.unknown else None,
    )
    problems += [f"it has {name}, which the model has not" for name in found.unknown if name not in allowed]
    return _Examined(tensors, copies, problems, config_differences(there, own_config))


def _missing(name: str) -> str:
    if name.startswith(MTP):
        return f"it lacks {name} of multi-token prediction, which a model without model.mtp does not need"
    return f"it lacks {name}"


def _other_model(cls: Any, config: Mapping[str, Any]) -> Any:
    """The class that files were written for, without values, if it is not the model's own."""
    import transformers

    for name in config.get("architectures") or ():
        other = getattr(transformers, str(name), None)
        if other is not None and other is not cls and "text_config" in config:
            settings = {key: value for key, value in config.items() if key != "quantization_config"}
            return stock_model(other, other.config_class.from_dict(settings))
    return None


def _check_plain(entries: Mapping[str, Entry], config: Mapping[str, Any], wanted: Shapes) -> None:
    """Refuse numbers that are not the weights themselves.

    Raises:
        ValueError: the checkpoint is quantised.
    """
    integers = {name for name, (_, dtype) in wanted.items() if not dtype.is_floating_point}
    for name, entry in entries.items():
        dtype = DTYPES.get(entry.dtype)
        if (dtype is not None and dtype.is_floating_point) or name in integers:
            continue
        method = str((config.get("quantization_config") or {}).get("quant_method"))
        way = _DEQUANTIZE.get(method, "...")
        raise ValueError(
            f"it is quantised ({name} is {entry.dtype}, method {method}), and a run starts from weights in "
            "float32, float16 or bfloat16; write these once with transformers, from_pretrained(DIR, "
            f"dtype='bfloat16', quantization_config={way}).save_pretrained(PLAIN), and give PLAIN"
        )


@torch.no_grad()
def _fill(state: State, found: _Examined) -> None:
    for full_name, parts in state.items():
        name = full_name.removeprefix(_MODEL)
        for offset, box in parts.boxes.items():
            _read(found.tensors[name], offset, box)
            if name in found.copies:
                other = found.copies[name]
                _read(found.tensors[other], offset, again := torch.empty_like(box))
                if not torch.equal(box, again):
                    raise ValueError(
                        f"{name} and {other} are one parameter of the model and differ in it; set "
                        "model.tie-embeddings to what the checkpoint has"
                    )


def _read(tensor: Tensor, offset: tuple[int, ...], out: Tensor) -> None:
    assert isinstance(tensor, LazyTensor)
    tensor.read(offset, out)
