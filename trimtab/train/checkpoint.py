"""Checkpoints: a fresh directory for each, complete or absent, and a pointer that moves last.

    checkpoints/step-000100/            model and optimiser (torch.distributed.checkpoint),
                            trainer.pt  everything else that a bitwise resumption needs,
                            manifest.json  size and hash of each file
    checkpoints/latest                  name of the newest complete checkpoint

A save writes into a hidden directory, renames it, then moves the pointer. A process killed at any moment
leaves the last good checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

CHECKPOINT_FOLDER = "checkpoints"
_POINTER, _MANIFEST, _TRAINER = "latest", "manifest.json", "trainer.pt"
_STEP_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = ".unfinished-"


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the state of a run is saved, and whether a run continues from a saved one.

    Args:
        enable: save checkpoints: every ``interval`` steps, at the end, and when the run is interrupted.
        interval: optimiser steps between checkpoints.
        keep: newest checkpoints to keep; 0 keeps all.
        resume: "auto" continues the run directory named by ``run_name`` if it holds a checkpoint, and
            otherwise starts; "never" always starts; a path continues the run of that run directory, or of
            that one checkpoint of it.
        allow_changes: continue although settings differ from those the checkpoint was saved with. The run
            is then not the one that was saved.

    Raises:
        ValueError: an interval below 1, a negative keep, or an empty path.
    """

    enable: bool = True
    interval: int = 100
    keep: int = 2
    resume: str = "auto"
    allow_changes: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        if self.interval < 1:
            raise ValueError(
                f"interval={self.interval} must be at least 1; to save nothing, disable checkpoint.enable"
            )
        if self.keep < 0:
            raise ValueError(f"keep={self.keep} must be at least 0, which keeps all; set checkpoint.keep")
        if not self.resume:
            raise ValueError("resume='' names nothing; set checkpoint.resume to auto, never or a path")


class Checkpointer:
    """Saves and loads the checkpoints of one run.

    Args:
        run_dir: the run's directory.
        keep: newest checkpoints to keep; 0 keeps all.
    """

    def __init__(self, run_dir: Path, *, keep: int = 0) -> None:
        self.folder = run_dir / CHECKPOINT_FOLDER
        self.keep = keep

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, trainer: Mapping[str, Any]
    ) -> Path:
        """Write the checkpoint of a step, whole or not at all.

        Args:
            step: optimiser steps done.
            model: its parameters and buffers are saved, expert biases with them.
            optimizer: its state is saved under parameter names.
            trainer: everything else; tensors, numbers, strings, and containers of them.

        Returns:
            The checkpoint's directory.
        """
        final = self.folder / f"step-{step:06d}"
        unfinished = self.folder / f"{_UNFINISHED}{final.name}-{os.getpid()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        unfinished.mkdir()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        with _one_process():
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=unfinished)
        torch.save(dict(trainer), unfinished / _TRAINER)
        manifest = {
            path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(unfinished.iterdir())
        }
        _write_durably(unfinished / _MANIFEST, json.dumps({"step": step, "files": manifest}, indent=1))
        if final.exists():  # the same step again, after a resumption from an older one
            os.rename(final, self.folder / f"{_UNFINISHED}replaced-{final.name}")
        os.rename(unfinished, final)
        _sync_folder(self.folder)
        pointer = self.folder / f"{_POINTER}.new"
        _write_durably(pointer, final.name + "\n")
        os.replace(pointer, self.folder / _POINTER)
        _sync_folder(self.folder)
        self._drop_old(final)
        return final

    def latest(self) -> Path | None:
        """The checkpoint the pointer names, else the newest one; None if the run has none."""
        pointer = self.folder / _POINTER
        if pointer.is_file():
            named = self.folder / pointer.read_text().strip()
            if _STEP_NAME.fullmatch(named.name) and named.is_dir():
                return named
        return max(self._all(), default=None, key=_step_of)

    def read_trainer(self, path: Path) -> dict[str, Any]:
        """Check a checkpoint's files against its manifest and return its trainer state.

        Raises:
            CheckpointError: a file is missing, cut short or altered.
        """
        problem = _problem(path)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path} {problem}; {self._way_out(path)}")
        state = torch.load(path / _TRAINER, map_location="cpu", weights_only=True)
        assert isinstance(state, dict)
        return state

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read model and optimiser from a checkpoint, in place.

        Raises:
            CheckpointError: its tensors do not fit the model.
        """
        model_state, optimizer_state = get_state_dict(model, optimizer)
        try:
            with _one_process():
                dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        except Exception as error:  # every cause (missing key, other shape) has its own class in there
            raise CheckpointError(
                f"checkpoint {path} does not fit {type(model).__name__}: {error}; resume with the configuration "
                "it was saved with"
            ) from error
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.is_dir() and _STEP_NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def _drop_old(self, newest: Path) -> None:
        # Also later steps, which only exist if the run went back to an older checkpoint: they are another past.
        later = [path for path in self._all() if _step_of(path) > _step_of(newest)]
        earlier = [path for path in self._all() if _step_of(path) < _step_of(newest)]
        surplus = earlier[: len(earlier) + 1 - self.keep] if self.keep else []
        for path in (*later, *surplus, *self.folder.glob(f"{_UNFINISHED}replaced-*")):
            # Renamed first: a removal that is cut short must not leave half a checkpoint under its name.
            gone = path.with_name(f"{_UNFINISHED}removed-{path.name.removeprefix(_UNFINISHED)}")
            os.rename(path, gone)
            shutil.rmtree(gone)

    def _way_out(self, broken: Path) -> str:
        intact = [path for path in self._all() if path != broken and _problem(path) is None]
        if intact:
            return f"an intact one is there: resume from it with --checkpoint.resume {intact[-1]}"
        return "no other checkpoint of this run is intact; start again with --checkpoint.resume never"


def locate(path: Path) -> tuple[Path, Path | None]:
    """Resolve what a user asks to resume from.

    Args:
        path: a run directory, its folder of checkpoints, or one checkpoint.

    Returns:
        The run directory, and the checkpoint if one was meant.

    Raises:
        CheckpointError: it is none of these.
    """
    path = path.expanduser()
    if _STEP_NAME.fullmatch(path.name) and path.parent.name == CHECKPOINT_FOLDER:
        run_dir, checkpoint = path.parent.parent, path
    else:
        run_dir, checkpoint = (path.parent if path.name == CHECKPOINT_FOLDER else path), None
    found = Checkpointer(run_dir).latest()
    if not path.is_dir() or found is None:
        reason = "does not exist" if not path.exists() else "holds no checkpoint"
        raise CheckpointError(
            f"--checkpoint.resume {path} {reason}; give a run directory that `trimtab train` wrote, or one of its "
            f"{CHECKPOINT_FOLDER}/step-000100"
        )
    return run_dir, checkpoint


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((path / _MANIFEST).read_text())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"has no readable {_MANIFEST}: it is incomplete"
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            return f"lacks its file {name}"
        if file.stat().st_size != size:
            return f"is corrupted: {name} has {file.stat().st_size} bytes, saved were {size}"
        if _sha256(file) != sha256:
            return f"is corrupted: the content of {name} is not what was saved"
    return None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Save or load as one process: torch's remark that there is one is silenced, and errors are plain ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        try:
            yield
        except CheckpointException as error:  # a BaseException around what went wrong on each rank
            cause, _ = next(iter(error.failures.values()))
            raise cause from None
