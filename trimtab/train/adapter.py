"""Adapters of a run's checkpoint: written as files that peft loads, or merged into the weights they adapt.

One process, with one tensor of the checkpoint and the adapters in memory. In a checkpoint the model's own weights
have the names of the stock model, and an adapter's halves are beside them (``q_proj.lora_A.default.weight``; of
stacked experts ``experts.lora_A.down_proj``).

Shapes: E experts, D inner and F outer width of a weight, r rank.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.integrations.discovery import discover
from trimtab.integrations.experts import layout_of
from trimtab.integrations.lora import (
    ADAPTER,
    LORA_A,
    LORA_B,
    Target,
    is_adapter,
    own_layers,
    target_linears,
)
from trimtab.train.checkpoint import CheckpointError
from trimtab.train.finetune import FinetuneConfig
from trimtab.train.lazy_tensor import LazyTensor, Offset, Reader, whole

WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT = "base_model.model."  # before names in a file of peft's


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The adapter of one weight, by names in a checkpoint.

    Args:
        weight: what it is added to.
        a: (r, D), or (E, r, D) of stacked experts.
        b: (F, r), or (E, F, r).
        stacked: the weight is stacked experts'.
    """

    weight: str
    a: str
    b: str
    stacked: bool


def pairs(names: Mapping[str, Any]) -> list[Pair]:
    """The adapters among names of a checkpoint.

    Raises:
        CheckpointError: half of one is missing, or what it is added to.
    """
    found = []
    for name in names:
        parts = name.split(".")
        if LORA_A not in parts:
            continue
        at = parts.index(LORA_A)
        stacked = parts[at + 1] != ADAPTER
        leaf = parts[-1] if stacked else "weight"
        pair = Pair(
            weight=".".join([*parts[:at], leaf]),
            a=name,
            b=".".join([*parts[:at], LORA_B, *parts[at + 1 :]]),
            stacked=stacked,
        )
        missing = next((other for other in (pair.weight, pair.b) if other not in names), None)
        if missing is not None:
            raise CheckpointError(f"the checkpoint has {name} and lacks {missing}; it is incomplete")
        found.append(pair)
    return found


def finetune_of(run: Mapping[str, Any]) -> FinetuneConfig:
    """How a run was trained.

    Args:
        run: its configuration, from `to_dict`.
    """
    settings = {key: value for key, value in run.get("finetune", {}).items() if key != "kind"}
    if "target" in settings:
        settings["target"] = tuple(settings["target"])
    return FinetuneConfig(**settings)


# -------------------------------------------------------------------- merged


def merged(stock: Any, tensors: Mapping[str, LazyTensor], finetune: FinetuneConfig) -> dict[str, LazyTensor]:
    """Tensors of a model with its adapters added to its weights: what the stock model computes the same with.

    Args:
        stock: the model without values.
        tensors: by name, adapters among them; no values are read.
        finetune: what the adapters are.

    Raises:
        CheckpointError: half of an adapter is missing.
    """
    result = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
    halves = _Halves()
    for pair in pairs(tensors):
        base, a, b = result[pair.weight], tensors[pair.a], tensors[pair.b]
        added = _Added(halves, pair.weight, a, b, finetune.scale, _transposed(stock, pair))
        result[pair.weight] = LazyTensor(base.shape, base.dtype, _summed(base, added))
    return result


def _summed(base: LazyTensor, added: _Added) -> Reader:
    """Reads boxes of a weight with its adapter added, in float32 or wider."""

    def read(offset: Offset, out: Tensor) -> None:
        # Before the weight: of the tensors of a checkpoint, the one that was read last stays in memory.
        delta = added(offset, out.shape)
        box = torch.empty(out.shape, dtype=torch.promote_types(base.dtype, torch.float32))
        base.read(offset, box)
        out.copy_(box + delta)

    return read


class _Halves:
    """Both halves of the adapter that was asked for last."""

    def __init__(self) -> None:
        self._name, self._held = "", (torch.empty(0), torch.empty(0))

    def of(self, name: str, a: LazyTensor, b: LazyTensor) -> tuple[Tensor, Tensor]:
        if name != self._name:
            dtype = torch.promote_types(a.dtype, torch.float32)
            self._name, self._held = name, (whole(a, dtype), whole(b, dtype))
        return self._held


@dataclass(frozen=True, slots=True)
class _Added:
    """Boxes of what an adapter adds to a weight."""

    halves: _Halves
    name: str
    a: LazyTensor
    b: LazyTensor
    scale: float
    transposed: bool

    def __call__(self, offset: Offset, shape: Sequence[int]) -> Tensor:
        a, b = self.halves.of(self.name, self.a, self.b)
        *experts, rows, columns = (slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        if self.transposed:
            rows, columns = columns, rows
        added = b[(*experts, rows)] @ a[(*experts, slice(None), columns)] * self.scale
        return added.transpose(-1, -2) if self.transposed else added


def _transposed(stock: Any, pair: Pair) -> bool:
    if not pair.stacked:
        return False
    layout = layout_of(stock.get_submodule(pair.weight.rpartition(".")[0]))
    return layout is not None and layout.transposed


# -------------------------------------------------------------------- files of peft


def write_adapter(
    folder: Path,
    stock: Any,
    tensors: Mapping[str, LazyTensor],
    run: Mapping[str, Any],
) -> list[str]:
    """Write an adapter as `peft.PeftModel.from_pretrained` loads it onto the stock model.

    Routers that were trained, and those whose expert bias was moved, are in it whole.

    Args:
        folder: replaced if it is there, when the new one is complete.
        stock: the model without values.
        tensors: of a checkpoint, by name; what belongs to the adapter is read.
        run: the run's configuration, from `to_dict`.

    Returns:
        Remarks for the user, one line each.

    Raises:
        CheckpointError: the run trained no adapter.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    finetune = finetune_of(run)
    found = pairs(tensors)
    if not found:
        raise CheckpointError("the checkpoint holds no adapter: the run was not of finetune.method lora")
    saved: dict[str, Tensor] = {}
    for pair in found:
        saved |= _peft_halves(stock, pair, found, tensors)
    routers = _moved_routers(stock, finetune, run)
    remarks = []
    for router, lost in routers.items():
        inside = [name for name in tensors if name.startswith(f"{router}.")]
        saved |= {f"{_PEFT}{name}": whole(tensors[name]) for name in inside}
        if lost:
            remarks = [
                f"{lost} was trained and is no part of its router, so peft cannot load it; export the model"
            ]
    linears = [pair.weight.removesuffix(".weight") for pair in found if not pair.stacked]
    mixing = set(_attention(stock, linears))
    # As parameters, because peft takes names such as gate_proj for those of older releases' experts.
    parameters = [p.weight for p in found if p.stacked or p.weight.removesuffix(".weight") not in mixing]
    settings: dict[str, Any] = {"lora_alpha": finetune.alpha, "r": finetune.rank}
    base = (run.get("checkpoint") or {}).get("initial")
    config = LoraConfig(
        **settings,
        # peft adds what it knows as parameters to the weights, where dropout has no place.
        lora_dropout=0.0 if parameters else finetune.dropout,
        target_modules=sorted(mixing),
        target_parameters=sorted(parameters) or None,
        modules_to_save=sorted(routers) or None,
        base_model_name_or_path=base,
        inference_mode=True,
        task_type="CAUSAL_LM",
    )

    def write(unfinished: Path) -> None:
        save_file(
            {name: x.contiguous() for name, x in saved.items()}, unfinished / WEIGHTS_FILE, {"format": "pt"}
        )
        config.save_pretrained(str(unfinished))

    _replace(folder, write)
    return remarks


def _peft_halves(
    stock: Any, pair: Pair, found: list[Pair], tensors: Mapping[str, LazyTensor]
) -> dict[str, Tensor]:
    """Both halves of one adapter under peft's names, in its shapes."""
    module, _, leaf = pair.weight.rpartition(".")
    a, b, path = whole(tensors[pair.a]), whole(tensors[pair.b]), module
    if pair.stacked:
        order = [name for name, _ in stock.get_submodule(module).named_parameters(recurse=False)]
        adapted = [name for name in order if any(p.weight == f"{module}.{name}" for p in found)]
        # peft wraps a module once for each parameter of it, the first one innermost.
        path += ".base_layer" * (len(adapted) - 1 - adapted.index(leaf))
        if _transposed(stock, pair) and not getattr(stock.get_submodule(module), "is_transposed", False):
            # (E, in, out) weights, which peft takes for (E, out, in) because the module does not say so.
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        num_experts, rank, _ = a.shape
        a = a.reshape(num_experts * rank, -1)
        b = b.permute(1, 2, 0).reshape(-1, rank * num_experts)
    return {f"{_PEFT}{path}.lora_A.weight": a, f"{_PEFT}{path}.lora_B.weight": b}


def _attention(stock: Any, linears: list[str]) -> list[str]:
    paths = {module: name for name, module in stock.named_modules()}
    wanted: tuple[Target, ...] = ("attention",)
    chosen = {
        f"{paths[layer]}.{name}" for layer in own_layers(stock) for name in target_linears(layer, (), wanted)
    }
    return [name for name in linears if name in chosen]


def _moved_routers(stock: Any, finetune: FinetuneConfig, run: Mapping[str, Any]) -> dict[str, str | None]:
    """Routers that differ from those of the base, each with what of it is outside its module."""
    moves_bias = run["model"]["balancing"]["bias"] is not None
    if finetune.router == "frozen" and not moves_bias:
        return {}
    found = {}
    for router in discover(stock):
        holder = (router.family.expert_bias or "").partition(".")[0]
        found[router.canonical_name] = router.family.expert_bias if moves_bias and holder == "block" else None
    return found


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a directory complete, or not at all."""
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        if folder.is_dir():
            shutil.rmtree(folder)
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
