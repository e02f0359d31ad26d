"""A directory of safetensors files: what is in it, and slices of its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Bytes of a file that are taken at a time: on the way to another device they are held in the other dtype, too.
_PIECE = 64 * 2**20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Args:
        file: name of the file.
        shape: of the tensor.
        dtype: as the file names it, a key of `DTYPES` or the name of a smaller float.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_entries(folder: Path) -> dict[str, Entry]:
    """What is in a directory, from the heads of its files.

    Args:
        folder: holds model.safetensors, or an index and the files that it names.

    Returns:
        By name of the tensor.

    Raises:
        ValueError: there is no such directory, it holds no weights, a file is missing or cut short, or the index
            is not true.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"{what}; give a directory that holds {WEIGHTS} or {INDEX}, as `save_pretrained` writes and model hubs "
            "serve it"
        )
    entries: dict[str, Entry] = {}
    indexed = {} if (folder / WEIGHTS).is_file() else _read_index(folder)
    for file in sorted(set(indexed.values())) or [WEIGHTS]:
        for name, entry in _read_head(folder, file):
            if name in entries:
                raise ValueError(f"{name} is in two of its files, {entries[name].file} and {file}")
            entries[name] = entry
    for name, file in indexed.items():
        if name not in entries or entries[name].file != file:
            raise ValueError(
                f"{INDEX} says that {name} is in {file}, and it is not; copy the directory again"
            )
    return entries


def _read_index(folder: Path) -> Mapping[str, str]:
    index = folder / INDEX
    if not index.is_file():
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf")
        )
        found = f"holds {others[0]}, but neither" if others else "holds neither"
        raise ValueError(
            f"{found} {WEIGHTS} nor {INDEX}; write it with transformers: from_pretrained(...).save_pretrained(...)"
        )
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{INDEX} cannot be read ({describe_short(error)}); copy it again") from error
    missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if missing:
        more = f" and {len(missing) - 1} more of the files" if len(missing) > 1 else ""
        raise ValueError(f"lacks {missing[0]}{more} that {INDEX} names; finish the download")
    if not weight_map:
        raise ValueError(f"{INDEX} names no tensor; copy it again")
    return weight_map


def _read_head(folder: Path, file: str) -> Iterator[tuple[str, Entry]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                tensor = handle.get_slice(name)
                yield name, Entry(file, tuple(tensor.get_shape()), str(tensor.get_dtype()))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"its file {file} cannot be read ({error}): it is cut short or no safetensors file; copy it again"
        ) from error


def describe_short(error: Exception) -> str:
    """Class and text of an error."""
    return f"{type(error).__name__}: {error}"


class SliceReader:
    """Reads slices of a directory's tensors; a context that keeps files open.

    Args:
        folder: the directory.
        entries: what is in it, from `read_entries`.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self.folder, self.entries = folder, entries
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(self, *failure: object) -> None:
        self._handles.clear()
        self._stack.close()

    def read(self, name: str, offset: Sequence[int], out: Tensor) -> None:
        """Fill a tensor with the box of its shape that begins at an offset of a tensor on disk."""
        from safetensors import safe_open

        entry = self.entries[name]
        handle = self._handles.get(entry.file)
        if handle is None:
            handle = self._stack.enter_context(safe_open(self.folder / entry.file, framework="pt"))
            self._handles[entry.file] = handle
        if not entry.shape:
            out.copy_(handle.get_tensor(name))
            return
        tensor = handle.get_slice(name)
        for piece in _pieces(out.shape, _PIECE // DTYPES[entry.dtype].itemsize):
            place = zip(piece, offset, strict=True)
            out[piece].copy_(tensor[tuple(slice(p.start + o, p.stop + o) for p, o in place)])


def _pieces(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Parts of a box, of at most so many numbers, in the order of memory."""
    if not shape:
        yield ()
        return
    rows = limit // max(1, math.prod(shape[1:]))
    if rows:
        rest = tuple(slice(0, size) for size in shape[1:])
        for start in range(0, shape[0], rows):
            yield (slice(start, min(start + rows, shape[0])), *rest)
        return
    for row in range(shape[0]):
        for inner in _pieces(shape[1:], limit):
            yield (slice(row, row + 1), *inner)
