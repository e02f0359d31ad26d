"""Writes a checkpoint of a run as a directory that stock `from_pretrained` loads.

One process, tensor by tensor: in memory are about one tensor of the checkpoint and the file being written. The
directory appears under its name when it is complete, or not at all. Adapters are added to the weights they adapt.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.integrations.checkpoint_mtp import MTP
from trimtab.integrations.checkpoint_names import stock_class, stock_model, to_disk, to_memory
from trimtab.integrations.lora import is_adapter
from trimtab.train.adapter import finetune_of, merged, write_adapter
from trimtab.train.checkpoint import Checkpointer, CheckpointError, locate
from trimtab.train.checkpoint_state import Parts, Saved, shortened
from trimtab.train.hf_export_extras import write_config, write_tokenizer
from trimtab.train.lazy_tensor import LazyTensor, Offset, Reader, whole
from trimtab.train.safetensors_folder import INDEX, WEIGHTS

_MODEL = "model."  # before names in a checkpoint
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def describe_model(model: nn.Module) -> dict[str, str] | None:
    """What has to be kept beside a checkpoint to know its model again; None for a model that cannot be exported."""
    try:
        architecture = stock_class(model).__name__
    except ValueError:
        return None
    config: Any = model.config
    return {"architecture": architecture, "config": config.to_json_string(use_diff=False)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written.

    Args:
        folder: where.
        checkpoint: of what.
        num_tensors: in all files.
        num_bytes: of all tensors.
        files: names of the files of weights.
        remarks: what is left for the user to do, one line each.
    """

    folder: Path
    checkpoint: Path
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]
    remarks: tuple[str, ...]


def export(source: Path, folder: Path, *, max_shard_size: str = "5GB", dtype: str | None = None) -> Exported:
    """Write a run's checkpoint for stock transformers.

    Args:
        source: a run directory, whose newest checkpoint is taken, or one checkpoint of it.
        folder: directory to make.
        max_shard_size: of one file; a tensor that is larger gets a file of its own.
        dtype: "bfloat16" or "float32" of weights; None: as they were trained. What a family needs in float32, as
            expert biases, stays so.

    Raises:
        CheckpointError: the checkpoint is damaged, or its model is not one of transformers.
        ValueError: an option out of range, or the directory is there already.
    """
    limit = _num_bytes(max_shard_size)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be bfloat16 or float32; set --dtype")
    _check_new(folder)
    checkpoint, state, stock = _open(source)
    memory = _in_memory(stock, Saved.read(checkpoint), None if dtype is None else _DTYPES[dtype])
    if any(map(is_adapter, memory)):
        memory = merged(stock, memory, finetune_of(state["config"]))
    tensors = _on_disk(stock, memory, checkpoint)
    shards = _divide(tensors, limit)

    unfinished = folder.parent / f".{folder.name}.unfinished-{os.getpid()}"
    for leftover in folder.parent.glob(f".{folder.name}.unfinished-*"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)
    try:
        num_bytes = _write(unfinished, tensors, shards)
        remarks, ids = write_tokenizer(unfinished, state["config"])
        main = next(x.dtype for x in tensors.values() if x.is_floating_point())
        write_config(unfinished, stock, dtype=_DTYPES[dtype] if dtype else main, run=state["config"], ids=ids)
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Exported(
        folder=folder,
        checkpoint=checkpoint,
        num_tensors=len(tensors),
        num_bytes=num_bytes,
        files=tuple(shards),
        remarks=tuple(remarks),
    )


def export_adapter(source: Path, folder: Path) -> tuple[Path, list[str]]:
    """Write the adapter of a run's checkpoint as peft loads it onto the model that the run started from.

    Args:
        source: a run directory, whose newest checkpoint is taken, or one checkpoint of it.
        folder: directory to make.

    Returns:
        The checkpoint, and what is left for the user to know, one line each.

    Raises:
        CheckpointError: the checkpoint is damaged, holds no adapter, or its model is not one of transformers.
        ValueError: the directory is there already.
    """
    _check_new(folder)
    checkpoint, state, stock = _open(source)
    memory = _in_memory(stock, Saved.read(checkpoint), None)
    return checkpoint, write_adapter(folder, stock, memory, state["config"])


def save_adapter(
    folder: Path, checkpoint: Path, described: Mapping[str, str], run: Mapping[str, Any]
) -> list[str]:
    """Like `export_adapter`, of a checkpoint that was just written; one rank of a run may call it alone.

    Args:
        folder: directory to make; replaced if it is there.
        checkpoint: the checkpoint.
        described: from `describe_model`.
        run: the run's configuration, from `to_dict`.
    """
    stock = _model_of(checkpoint, {"model_config": described})
    return write_adapter(folder, stock, _in_memory(stock, Saved.read(checkpoint), None), run)


def _check_new(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists; give a directory that does not, or remove it")


def _open(source: Path) -> tuple[Path, dict[str, Any], Any]:
    """A checkpoint, what it says of its run, and its model without values."""
    run_dir, checkpoint = locate(source, option="trimtab export")
    checkpoint = checkpoint or Checkpointer(run_dir).latest()
    assert checkpoint is not None
    state = Checkpointer(run_dir).read_trainer(checkpoint)
    return checkpoint, state, _model_of(checkpoint, state)


def _model_of(checkpoint: Path, state: Mapping[str, Any]) -> Any:
    """The checkpoint's model, without values.

    Raises:
        CheckpointError: it is not known, or no longer in transformers.
    """
    import transformers

    described = state.get("model_config")
    if described is None:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not say which model of transformers it is of: the model is none, or an "
            "older trimtab saved it; in that case resume the run for a step, and export what it saves"
        )
    cls = getattr(transformers, described["architecture"], None)
    if cls is None:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of {described['architecture']}, which transformers "
            f"{transformers.__version__} lacks; install the version the run was trained with"
        )
    return stock_model(cls, cls.config_class.from_dict(json.loads(described["config"])))


def _in_memory(stock: Any, saved: Saved, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Tensors of a checkpoint's model, by name, in the dtype that they are to have."""
    source = _Source(saved)
    in_float32 = [re.compile(name) for name in (stock._get_dtype_plan(dtype) if dtype else ())]
    memory: dict[str, LazyTensor] = {}
    for full_name, entry in saved.tensors.items():
        if not full_name.startswith(_MODEL):
            continue
        name, own = full_name.removeprefix(_MODEL), entry.properties.dtype
        keeps = dtype is None or not own.is_floating_point or any(p.search(name) for p in in_float32)
        memory[name] = LazyTensor(
            entry.size, own if keeps or dtype is None else dtype, source.reader(full_name)
        )
    return memory


def _on_disk(stock: Any, memory: dict[str, LazyTensor], checkpoint: Path) -> dict[str, LazyTensor]:
    """Tensors of the directory, made of those of a model, by name.

    Raises:
        CheckpointError: there are others than the model has, or they would not be found again.
    """
    shapes = {name: tuple(x.shape) for name, x in stock.state_dict().items()}
    problems = [f"it lacks {name}" for name in shapes if name not in memory]
    problems += [
        f"it has {name}, which the model has not"
        for name in memory
        if name not in shapes and not name.startswith(MTP)
    ]
    problems += [
        f"{name} has shape {tuple(memory[name].shape)} in it and {shape} in the model"
        for name, shape in shapes.items()
        if name in memory and tuple(memory[name].shape) != shape
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not fit {type(stock).__name__}: {shortened(problems)}"
        )
    tensors: Any = to_disk(stock, memory)
    again = to_memory(stock, tensors, lambda name, _: tensors[name], {n: x.dtype for n, x in memory.items()})
    lost = [
        name
        for name, x in memory.items()
        if name not in stock.all_tied_weights_keys
        and (name not in again.tensors or again.tensors[name].shape != x.shape)
    ]
    if lost or again.unknown or again.problems:
        raise CheckpointError(
            f"checkpoint {checkpoint}: transformers would not read {shortened([*lost, *again.unknown])} as "
            "they are written; this family cannot be exported"
        )
    found: dict[str, LazyTensor] = tensors
    return found


class _Source:
    """Tensors of a checkpoint; those read last stay in memory, for what else is made of them.

    They take as much as the largest tensor and half of that: room for an adapter beside what it is added to.
    """

    def __init__(self, saved: Saved) -> None:
        self._saved = saved
        self._held: dict[str, Tensor] = {}  # the one read last at the end
        sizes = [entry.size.numel() * entry.properties.dtype.itemsize for entry in saved.tensors.values()]
        self._limit = 1.5 * max(sizes, default=0)

    def reader(self, name: str) -> Reader:
        """What reads boxes of one tensor."""

        def read(offset: Offset, out: Tensor) -> None:
            values = self._load(name)
            out.copy_(values[tuple(slice(o, o + n) for o, n in zip(offset, out.shape, strict=True))])

        return read

    def _load(self, name: str) -> Tensor:
        values = self._held.pop(name, None)
        if values is None:
            entry = self._saved.tensors[name]
            dtype = entry.properties.dtype
            size = entry.size.numel() * dtype.itemsize
            while self._held and size + sum(map(_size, self._held.values())) > self._limit:
                del self._held[next(iter(self._held))]
            values = torch.empty(entry.size, dtype=dtype)
            self._saved.fill({name: Parts(tuple(entry.size), dtype, {(0,) * values.dim(): values})})
        self._held[name] = values
        return values


def _divide(tensors: Mapping[str, Tensor], limit: int) -> dict[str, list[str]]:
    """Names of the tensors of each file, in their order."""
    shards: list[list[str]] = []
    room = -1
    for name, tensor in tensors.items():
        room -= _size(tensor)
        if room < 0:
            shards.append([])
            room = limit - _size(tensor)
        shards[-1].append(name)
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    stem = Path(WEIGHTS).stem
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _write(folder: Path, tensors: Mapping[str, LazyTensor], shards: Mapping[str, Sequence[str]]) -> int:
    """Write all files of weights, one at a time, and their index; returns the bytes of all tensors."""
    from safetensors.torch import save_file

    for file, names in shards.items():
        save_file({name: whole(tensors[name]) for name in names}, folder / file, metadata={"format": "pt"})
    num_bytes = sum(map(_size, tensors.values()))
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return num_bytes


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]I?B)", text.strip().upper())
    if match is None or not float(match[1]):
        raise ValueError(f"max_shard_size={text!r} must be a size such as 5GB or 500MB; set --max-shard-size")
    return int(float(match[1]) * _UNITS[match[2]])
