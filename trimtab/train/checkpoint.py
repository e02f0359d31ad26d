"""Checkpoints: a fresh directory for each, complete or absent, and a pointer that moves last.

    checkpoints/step-000100/            model and optimiser (torch.distributed.checkpoint), a file of each rank,
                            trainer.pt  everything else that a bitwise resumption needs,
                            manifest.json  size and hash of each file
    checkpoints/latest                  name of the newest complete checkpoint

A save writes into a hidden directory, renames it, then moves the pointer. A process killed at any moment
leaves the last good checkpoint as it was.

All ranks write into one directory, so the run directory must be on a file system that all nodes share. Ranks save
and load together, and fail together: a rank that cannot write keeps the pointer where it is, for all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.train.checkpoint_state import (
    LocalState,
    OptimizerState,
    Saved,
    State,
    shortened,
    write_state,
)
from trimtab.train.together import RanksFailedError, gathered, on_all_ranks, rank_and_size

CHECKPOINT_FOLDER = "checkpoints"
_POINTER, _MANIFEST, _TRAINER = "latest", "manifest.json", "trainer.pt"
_STEP_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = ".unfinished-"
_PER_RANK = "per_rank"
_Files = dict[str, tuple[int, str]]  # size and hash by name


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another run."""


class CheckpointSaveError(CheckpointError, OSError):
    """A checkpoint that cannot be written: a full disk, or a rank that failed."""


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
            is then not the one that was saved. Likewise for the settings that ``initial`` comes with.
        initial: directory of weights to start from, as model hubs serve them: config.json, and
            model.safetensors or its shards with their index. A run that resumes does not read it. None draws
            the weights.

    Raises:
        ValueError: an interval below 1, a negative keep, or an empty path.
    """

    enable: bool = True
    interval: int = 100
    keep: int = 2
    resume: str = "auto"
    allow_changes: bool = False
    initial: str | None = None

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
        if self.initial == "":
            raise ValueError("initial='' names nothing; set checkpoint.initial to a directory of weights")


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
        self,
        step: int,
        model: nn.Module | Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        trainer: Mapping[str, Any],
        *,
        per_rank: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of a step, whole or not at all. All ranks call it.

        Args:
            step: optimiser steps done.
            model: the parts of the model that this rank holds, one or several; parameters and buffers are
                saved under the names of the whole model, expert biases with them.
            optimizer: of all parts; its state is saved under parameter names, without settings such as rates.
            trainer: everything else that is the same on all ranks; tensors, numbers, strings, and containers
                of them. The first rank's is saved.
            per_rank: likewise, what is this rank's own.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointSaveError: it cannot be written; on every rank, whichever failed. The last checkpoint is
                as it was.
        """
        rank, _ = rank_and_size()
        final = self.folder / f"step-{step:06d}"
        modules = [model] if isinstance(model, nn.Module) else list(model)

        def written() -> tuple[_Files, Mapping[str, Any] | None]:
            return _hashed(unfinished.glob(f"__{rank}_*")), per_rank

        def publish(everyones: list[tuple[_Files, Mapping[str, Any] | None]]) -> None:
            state = {**trainer, _PER_RANK: [own for _, own in everyones]}
            with (unfinished / _TRAINER).open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            files = _hashed([unfinished / ".metadata", unfinished / _TRAINER])
            for other, (theirs, _) in enumerate(everyones):
                _check_visible(unfinished, theirs, other)
                files |= theirs
            self._publish(step, unfinished, final, files)

        try:
            unfinished = gathered(lambda: final.name, self._make_directory)
            state = on_all_ranks(lambda: LocalState(modules, optimizer).saved())
            write_state(state, unfinished)
            gathered(written, publish)
        except RanksFailedError as error:
            latest = self.latest()
            rest = f"the last good one, {latest}, is as it was" if latest else "there is no earlier one"
            raise CheckpointSaveError(f"checkpoint {final} cannot be saved: {error}; {rest}") from error
        try:
            gathered(lambda: None, lambda _: self._drop_old(final))
        except RanksFailedError as error:
            raise CheckpointSaveError(
                f"checkpoint {final} is saved, but older ones cannot be removed: {error}; remove them by hand, "
                "or keep all with checkpoint.keep 0"
            ) from error
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
        """Check a checkpoint's files against its manifest and return its trainer state. All ranks call it.

        Each rank reads its share of the files for that.

        Returns:
            What was saved as ``trainer``, and under "per_rank" what this rank saved as its own; None if the
            number of ranks was another.

        Raises:
            CheckpointError: a file is missing, cut short or altered; on every rank.
        """
        rank, num_ranks = rank_and_size()
        try:
            problem = self._problem(path)
            if problem is not None:
                raise CheckpointError(f"checkpoint {path} {problem}; {self._way_out(path)}")
            state: dict[str, Any] = on_all_ranks(
                lambda: torch.load(path / _TRAINER, map_location="cpu", weights_only=True)
            )
        except RanksFailedError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
        everyones = state.get(_PER_RANK) or []
        return {**state, _PER_RANK: everyones[rank] if len(everyones) == num_ranks else None}

    def load(
        self, path: Path, model: nn.Module | Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> None:
        """Read model and optimiser from a checkpoint, in place. All ranks call it.

        The ranks and how they divide the model need not be those that saved it.

        Args:
            path: the checkpoint.
            model: the parts of the model that this rank holds, one or several.
            optimizer: of all parts. It keeps its settings and gets the state of its parameters.

        Raises:
            CheckpointError: its tensors are not those of the model, or cannot be read; on every rank.
        """
        modules = [model] if isinstance(model, nn.Module) else list(model)

        def prepare() -> tuple[Saved, LocalState, State, OptimizerState]:
            saved, local = Saved.read(path), LocalState(modules, optimizer)
            return saved, local, *local.targets(saved)

        def conclude(everyones: list[tuple[list[str], bytes]]) -> list[str]:
            lines = [line for misfits, _ in everyones for line in misfits]
            return [*dict.fromkeys(lines), *saved.surplus([needed for _, needed in everyones])]

        try:
            saved, local, state, optimizer_state = on_all_ranks(prepare)
            problems = gathered(lambda: (saved.misfits(state), saved.needed(state)), conclude)
            if problems:
                name = type(modules[0]).__name__.removeprefix("FSDP")
                raise CheckpointError(
                    f"checkpoint {path} does not fit {name}: {shortened(problems)}; resume with the configuration "
                    "it was saved with"
                )
            on_all_ranks(lambda: saved.fill(state))
            on_all_ranks(lambda: local.restore(optimizer_state))
        except RanksFailedError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error

    def _make_directory(self, names: list[str]) -> Path:
        """An empty hidden directory for the checkpoint that all ranks are about to save."""
        if len(set(names)) > 1:
            raise ValueError(f"ranks save different steps: {', '.join(sorted(set(names)))}")
        unfinished = self.folder / f"{_UNFINISHED}{names[0]}-{os.getpid()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        unfinished.mkdir()
        return unfinished

    def _publish(self, step: int, unfinished: Path, final: Path, files: _Files) -> None:
        """Give a complete directory its manifest and its name, then move the pointer to it."""
        entries = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in sorted(files.items())}
        _write_durably(unfinished / _MANIFEST, json.dumps({"step": step, "files": entries}, indent=1))
        _sync_folder(unfinished)
        if final.exists():  # the same step again, after a resumption from an older one
            os.rename(final, self.folder / f"{_UNFINISHED}replaced-{final.name}")
        os.rename(unfinished, final)
        _sync_folder(self.folder)
        pointer = self.folder / f"{_POINTER}.new"
        _write_durably(pointer, final.name + "\n")
        os.replace(pointer, self.folder / _POINTER)
        _sync_folder(self.folder)

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint's files, or None; every rank checks its share of them."""
        rank, num_ranks = rank_and_size()
        expected = gathered(lambda: path, _read_manifest)
        if expected is None:
            return f"has no readable {_MANIFEST}: it is incomplete"
        share = sorted(expected.items())[rank::num_ranks]

        def check() -> str | None:
            return next(filter(None, (_altered(path / name, *entry) for name, entry in share)), None)

        return gathered(check, lambda found: next(filter(None, found), None))

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
        others = gathered(lambda: None, lambda _: [path for path in self._all() if path != broken])
        for path in reversed(others):
            if self._problem(path) is None:
                return f"an intact one is there: resume from it with --checkpoint.resume {path}"
        return "no other checkpoint of this run is intact; start again with --checkpoint.resume never"


def locate(path: Path, *, option: str = "--checkpoint.resume") -> tuple[Path, Path | None]:
    """Resolve what a user asks to resume from.

    Args:
        path: a run directory, its folder of checkpoints, or one checkpoint.
        option: what the user asked with.

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
            f"{option} {path} {reason}; give a run directory that `trimtab train` wrote, or one of its "
            f"{CHECKPOINT_FOLDER}/step-000100"
        )
    return run_dir, checkpoint


def _read_manifest(paths: list[Path]) -> _Files | None:
    """Files that a checkpoint should have; None without a readable manifest."""
    if len(set(paths)) > 1:
        raise ValueError(f"ranks read different checkpoints: {', '.join(sorted(set(map(str, paths))))}")
    try:
        files = json.loads((paths[0] / _MANIFEST).read_text())["files"]
        return {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _altered(file: Path, size: int, sha256: str) -> str | None:
    """How a file is not what was saved, or None."""
    if not file.is_file():
        return f"lacks its file {file.name}"
    if file.stat().st_size != size:
        return f"is corrupted: {file.name} has {file.stat().st_size} bytes, saved were {size}"
    if _sha256(file) != sha256:
        return f"is corrupted: the content of {file.name} is not what was saved"
    return None


def _check_visible(folder: Path, files: _Files, rank: int) -> None:
    for name, (size, _) in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise OSError(
                f"the first rank does not see {name} as rank {rank} wrote it; put the run directory on a file "
                "system that all nodes share (dump_folder)"
            )


def _hashed(files: Iterable[Path]) -> _Files:
    return {file.name: (file.stat().st_size, _sha256(file)) for file in files}


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
