"""Model and optimiser as parts of whole tensors: what a rank writes to a checkpoint and reads from one.

A checkpoint knows whole tensors and nothing of meshes. Its names and shapes are those of the stock model in one
process, ``model.<name>`` and ``optimizer.state.<parameter>.<key>``, so any division of the model among ranks can
read what any other one wrote. On a rank a tensor is a set of boxes: views of local memory, each with its place
in the whole.

A module may hold a parameter with one dimension divided in two, so that a shard is a part of each half: its
attribute ``_trimtab_split_dims`` maps the parameter's name to the first of the two. The checkpoint has them as one
dimension; on the rank such a parameter is several boxes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from trimtab.parallel.experts import SPLIT_DIMS
from trimtab.parallel.shared_parameters import shared_names
from trimtab.train.together import RanksFailedError, describe, lost, rank_and_size

_MODEL, _STATE = "model.", "optimizer.state."
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer")
_SHOWN = 5
Offset = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """What this rank holds of one tensor.

    Args:
        shape: of the whole tensor.
        dtype: of the tensor.
        boxes: local views by their place in the whole; none where this rank's share is empty.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: dict[Offset, Tensor]


State = dict[str, Parts]  # by name in the checkpoint
OptimizerState = dict[str, dict[str, Tensor]]  # by parameter and key


def parts_of(tensor: Tensor, split_dim: int | None = None) -> Parts:
    """This rank's boxes of a tensor.

    Args:
        tensor: a plain tensor, which is whole, or a DTensor on any mesh.
        split_dim: dimension that is one with the next in the whole tensor.

    Raises:
        ValueError: a DTensor that no single box can describe, or one without memory.
    """
    whole, local, offset = tensor.detach(), tensor.detach(), (0,) * tensor.dim()
    if isinstance(whole, DTensor):
        (chunk,) = whole.__create_chunk_list__()
        local, offset = whole.to_local(), tuple(chunk.offsets)
        if local.numel() and local.shape != chunk.sizes:
            raise ValueError(
                f"a rank's part of a tensor has shape {tuple(local.shape)}, but its placements "
                f"{whole.placements} make it {tuple(chunk.sizes)}"
            )
    if local.is_meta:
        raise ValueError("a tensor is on the meta device and has no values; build the model on a real one")
    shape = tuple(whole.shape)
    boxes = {offset: local}
    if split_dim is not None:
        d, width = split_dim, shape[split_dim + 1]
        shape = (*shape[:d], shape[d] * width, *shape[d + 2 :])
        boxes = {
            (*offset[:d], (offset[d] + i) * width + offset[d + 1], *offset[d + 2 :]): part
            for i, part in enumerate(local.unbind(d))
        }
    return Parts(shape, whole.dtype, {place: box for place, box in boxes.items() if box.numel()})


class LocalState:
    """Parameters, persistent buffers and optimiser state of this rank, by name.

    Args:
        modules: parts of the model that this rank holds. Of names that they have in common, which are those of
            `trimtab.parallel.shared_parameters`, the first part's tensor is saved and read, and the others' are
            replicas of it.
        optimizer: one optimiser of their parameters.

    Raises:
        ValueError: names that are not unique, state that is no tensor, or a parameter of the optimiser that
            is not in the model.
    """

    def __init__(self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.model: State = {}
        self._split_dims: dict[str, int] = {}
        self._replicas: list[tuple[Tensor, Tensor]] = []
        names: dict[nn.Parameter, str] = {}
        first: dict[str, Tensor] = {}
        for module in modules:
            # First of all: it also brings FSDP's parameters back to the shards that the optimiser has.
            state = module.state_dict()
            self._split_dims |= dict(_split_dims(module))
            for name, value in _canonical(state.items()):
                if not isinstance(value, Tensor):
                    raise ValueError(
                        f"state {name!r} is no tensor but {type(value).__name__}, expected tensors"
                    )
                if name in first:
                    if name not in shared_names(module):
                        raise ValueError(
                            f"{name!r} is in two parts of the model on this rank, expected in one"
                        )
                    self._replicas.append((first[name], value))
                    continue
                if value.numel():
                    first[name] = value
                    self.model[f"{_MODEL}{name}"] = parts_of(value, self._split_dims.get(name))
            for name, parameter in _canonical(module.named_parameters()):
                names.setdefault(parameter, name)
        self._trained: dict[str, nn.Parameter] = {}
        self._order: list[str] = []  # of the optimiser's parameters
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in names:
                    raise ValueError(
                        f"the optimiser has a parameter of shape {tuple(parameter.shape)} that no part of the "
                        "model has; build it from the parts' parameters, after FSDP"
                    )
                self._trained.setdefault(names[parameter], parameter)
                self._order.append(names[parameter])

    def saved(self) -> State:
        """Everything there is to save. A parameter without optimiser state has none in the checkpoint."""
        state = dict(self.model)
        for name, parameter in self._trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    raise ValueError(
                        f"optimiser state {key!r} of {name} is no tensor but {type(value).__name__}; use AdamW"
                    )
                if value.numel():
                    state[f"{_STATE}{name}.{key}"] = self._state_parts(name, value)
        return state

    def targets(self, saved: Saved) -> tuple[State, OptimizerState]:
        """Where a checkpoint's tensors belong on this rank: the model's own memory, and new optimiser state.

        Returns:
            The boxes to fill, and the optimiser state that they are views of.
        """
        state, optimizer_state = dict(self.model), OptimizerState()
        for full, entry in saved.tensors.items():
            name, _, key = full.removeprefix(_STATE).rpartition(".")
            parameter = self._trained.get(name) if full.startswith(_STATE) else None
            if parameter is None:
                continue
            dtype = entry.properties.dtype
            value = torch.zeros_like(parameter, dtype=dtype) if entry.size else torch.zeros((), dtype=dtype)
            optimizer_state.setdefault(name, {})[key] = value
            state[full] = self._state_parts(name, value)
        return state, optimizer_state

    @torch.no_grad()
    def spread(self) -> None:
        """Give replicas on this rank the values that have been read into the first."""
        for first, replica in self._replicas:
            replica.copy_(first)

    def restore(self, optimizer_state: OptimizerState) -> None:
        """Give the optimiser its state; parameters without any are as before their first step."""
        self.spread()
        groups = self.optimizer.state_dict()["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        state, given = {}, set[str]()
        for number, name in zip(numbers, self._order, strict=True):
            values = optimizer_state.get(name)
            if values is not None:
                # Replicas have the same state, but not the same memory.
                state[number] = {k: v.clone() for k, v in values.items()} if name in given else values
                given.add(name)
        # Moves the steps of fused and capturable optimisers to the device, which is not to be known here.
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _state_parts(self, name: str, value: Tensor) -> Parts:
        return parts_of(value, self._split_dims.get(name) if value.dim() else None)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint's directory holds.

    Args:
        folder: the directory.
        metadata: what torch knows of it.
        tensors: shape, dtype and chunks of each tensor.
    """

    folder: Path
    metadata: Metadata
    tensors: dict[str, TensorStorageMetadata]

    @staticmethod
    def read(folder: Path) -> Saved:
        """Read what is there, without its values."""
        metadata = dcp.FileSystemReader(folder).read_metadata()
        entries = metadata.state_dict_metadata.items()
        tensors = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        return Saved(folder, metadata, tensors)

    def misfits(self, state: State) -> list[str]:
        """What a rank needs and the checkpoint lacks or has in another shape or dtype, one line each."""
        found = []
        for name, parts in state.items():
            entry = self.tensors.get(name)
            if entry is None:
                found.append(f"it lacks {name}")
            elif tuple(entry.size) != parts.shape:
                found.append(f"{name} has shape {tuple(entry.size)} in it and {parts.shape} in the model")
            elif entry.properties.dtype != parts.dtype:
                found.append(f"{name} is {entry.properties.dtype} in it and {parts.dtype} in the model")
        return found

    def needed(self, state: State) -> bytes:
        """Which tensors a rank needs, one byte for each in order of their names."""
        return bytes(name in state for name in sorted(self.tensors))

    def surplus(self, needed: Iterable[bytes]) -> list[str]:
        """What no rank needs, one line each, given `needed` of every rank."""
        by_any = [any(flags) for flags in zip(*needed, strict=True)]
        names = [name for name, wanted in zip(sorted(self.tensors), by_any, strict=True) if not wanted]
        return [f"it has {name}, which the model has not" for name in names]

    def fill(self, state: State) -> None:
        """Read a rank's boxes, in place. Ranks need not call it together.

        Raises:
            ValueError: the checkpoint does not hold all of a box.
        """
        reader = dcp.FileSystemReader(self.folder)
        reader.set_up_storage_reader(self.metadata, is_coordinator=False)
        items: list[ReadItem] = []
        for name, parts in state.items():
            for offset, box in parts.boxes.items():
                chunk = ChunkStorageMetadata(torch.Size(offset), box.shape)
                found = create_read_items_for_chunk_list(name, self.tensors[name], [chunk])
                # Saved chunks are disjoint: what they have of the box must add up to it.
                if sum(item.lengths.numel() for item in found) != box.numel():
                    raise ValueError(f"{name} is not complete in the checkpoint")
                items += found
        reader.read_data(LoadPlan(items), _LoadPlanner(state)).wait()


def write_state(state: State, folder: Path) -> None:
    """Write every rank's boxes into one directory; all ranks call it.

    What several ranks hold is written once, by the one with the least to write.

    Raises:
        RanksFailedError: on every rank, if any cannot write.
    """
    rank, num_ranks = rank_and_size()
    with warnings.catch_warnings():
        # Its remark that there is one process.
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        try:
            dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=_SavePlanner(state))
        except CheckpointException as error:  # a BaseException, the same on all ranks
            causes = {other: cause for other, (cause, _) in error.failures.items()}
            if rank in causes and not isinstance(causes[rank], Exception):
                raise causes[rank] from None  # this process was asked to stop
            failures = {other: describe(cause) for other, cause in causes.items()}
            raise RanksFailedError(failures, num_ranks) from error
        except RuntimeError as error:
            raise lost(error) from error


def shortened(lines: Sequence[str]) -> str:
    """Lines as one, the first few of them."""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "; ".join([*lines[:_SHOWN], *more])


class _SavePlanner(DefaultSavePlanner):
    """Plans to write boxes; the base class shares out what several ranks hold and checks that all is there."""

    def __init__(self, state: State) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = state

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, offset),
                    # Also if whole: only shards may be on several ranks.
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(offset), box.shape),
                        properties=TensorProperties(dtype=parts.dtype),
                        size=torch.Size(parts.shape),
                    ),
                )
                for name, parts in self.parts.items()
                for offset, box in parts.boxes.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _box(self.parts, index)


class _LoadPlanner(DefaultLoadPlanner):
    """Finds the memory that a box is read into."""

    def __init__(self, state: State) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = state

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _box(self.parts, index)


def _box(state: State, index: MetadataIndex) -> Tensor:
    assert index.offset is not None
    return state[index.fqn].boxes[tuple(index.offset)]


def canonical_name(name: str) -> str:
    """The name that a module or tensor has in the stock model, without those of wrappers."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)


def _canonical(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    for name, value in named:
        yield canonical_name(name), value


def _split_dims(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, child in _canonical(module.named_modules()):
        for parameter, dim in getattr(child, SPLIT_DIMS, {}).items():
            yield f"{name}.{parameter}" if name else parameter, dim
