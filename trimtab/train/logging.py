"""Where a run's numbers go: one line on stdout, one JSON line in a file, TensorBoard.

The file is `metrics.jsonl`, one record a line: ``start``, ``step``, ``validation``, ``end``; not-a-number and
infinity are written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trimtab.train.report_log import METRICS_FILE

# What a terminal's line holds: more layers than these are summed up.
_LAYERS_IN_FULL, _WORST_LAYERS = 12, 3
_PER_LAYER = (
    "maxvio",
    "maxvio_running",
    "load_entropy",
    "dead_experts",
    "logit_max",
    "router_entropy",
    "count_error",
    "bias_min",
    "bias_max",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """What is logged, and how often.

    Args:
        log_interval: optimiser steps between logged steps. Loss values, router entropy and logits are
            measured at these steps only; load and MaxVio cost nothing and are always known.
        tensorboard: also write TensorBoard events, into the run directory.
        progress: show a progress bar, where stdout is a terminal.
        report: write the HTML report at the end and at each validation.

    Raises:
        ValueError: an interval below 1.
    """

    log_interval: int = 10
    tensorboard: bool = True
    progress: bool = True
    report: bool = True

    def __post_init__(self) -> None:
        """Validate."""
        if self.log_interval < 1:
            raise ValueError(f"log_interval={self.log_interval} must be at least 1; set metrics.log_interval")


class MetricsLog:
    """Writes a run's records to its JSONL file and to TensorBoard.

    Args:
        run_dir: the run's directory.
        tensorboard: write TensorBoard events too.
        first_step: the first step this process will run; later events of an earlier process are hidden.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, first_step: int) -> None:
        self._path = run_dir / METRICS_FILE
        self._end_cut_line()
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir), purge_step=first_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, with its ``event``; it is on disk when this returns."""
        self._file.write(json.dumps(finite(record), allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()
        if self._tensorboard is not None and "step" in record and record["event"] != "end":
            for tag, value in scalars(record):
                self._tensorboard.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _end_cut_line(self) -> None:
        # A killed process may leave half a line, onto which the next record must not be glued.
        if self._path.is_file() and (data := self._path.read_bytes()) and not data.endswith(b"\n"):
            with self._path.open("ab") as file:
                file.write(b"\n")


class RunConsole:
    """Lines on stdout, above a progress bar where stdout is a terminal.

    Where `LOG_RANK` names several ranks, each line begins with its rank, and the first of them shows the bar.

    Args:
        quiet: say nothing, as ranks do that `LOG_RANK` does not name.
        progress: show a bar on a terminal.

    Raises:
        ValueError: `LOG_RANK` is not a list of ranks.
    """

    def __init__(self, *, quiet: bool = False, progress: bool = True) -> None:
        self._console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        ranks, rank = log_ranks(), this_rank()
        self._label = f"[{rank}] " if len(ranks) > 1 else ""
        progress = progress and rank == min(ranks)
        if progress and not quiet and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
        self._task: Any = None

    def start(self, done: int, total: int) -> None:
        """Show the bar."""
        if self._progress is not None:
            self._task = self._progress.add_task("training", completed=done, total=total)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def print(self, line: str) -> None:
        """Print one line; words in brackets are not markup."""
        self._console.print(f"{self._label}{line}", markup=False)
        # Somebody may follow a file or a pipe, where lines otherwise come in blocks.
        self._console.file.flush()

    def stop(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()


def log_ranks() -> tuple[int, ...]:
    """The ranks that print: those of `LOG_RANK`, separated by commas, or rank 0.

    Raises:
        ValueError: `LOG_RANK` is not a list of ranks.
    """
    given = os.environ.get("LOG_RANK") or "0"
    ranks = [part.strip() for part in given.split(",")]
    if not all(rank.isdecimal() for rank in ranks):
        raise ValueError(f"LOG_RANK={given!r} must be ranks separated by commas, such as 0 or 0,1")
    return tuple(sorted({int(rank) for rank in ranks}))


def this_rank() -> int:
    """Number of this process among those of the run, as torchrun tells it; 0 if it is the only one."""
    return int(os.environ.get("RANK") or 0)


def is_quiet() -> bool:
    """Whether `LOG_RANK` leaves this process out.

    Raises:
        ValueError: `LOG_RANK` is not a list of ranks.
    """
    return this_rank() not in log_ranks()


def step_line(record: Mapping[str, Any]) -> str:
    """The line on stdout of one step record."""
    balance = record["balance"]
    parts = [
        f"step: {record['step']}",
        f"loss: {record['loss']:.4f}",
        *([f"mtp_loss: {record['mtp_loss']:.4f}"] if "mtp_loss" in record else []),
        f"grad_norm: {record['grad_norm']:.2f}",
        f"tps: {record['tokens_per_second']:,.0f}",
        f"maxvio: {fmean(balance['maxvio']):.2f}",
    ]
    for name, values in balance["losses"].items():
        parts.append(f"{name}: {fmean(values['value']):.3f}")
    parts.append(f"lr: {record['lr']:.2e}")
    return "  ".join(parts)


def layers_line(record: Mapping[str, Any]) -> str:
    """The line on stdout of the layers of one step record: load of the experts, and each loss that was measured.

    ``layers (load, sequence_wise): 1 0.62-1.41 1.003 | 2 0.55-1.62 1.010``: smallest and largest load of an
    expert, whose mean is 1, then each balance loss. Many layers are summed up, and the worst of them shown.
    """
    balance = record["balance"]
    numbers = layer_numbers(balance["layers"])
    losses = {name: values["value"] for name, values in balance["losses"].items()}
    named = ", ".join(["load", *losses])

    def entry(layer: int) -> str:
        load = balance["load"][layer]
        values = "".join(f" {value[layer]:.3f}" for value in losses.values())
        return f"{numbers[layer]} {min(load):.2f}-{max(load):.2f}{values}"

    layers = range(len(numbers))
    if len(layers) <= _LAYERS_IN_FULL:
        return f"layers ({named}): " + " | ".join(map(entry, layers))
    least = min(min(load) for load in balance["load"])
    most = max(max(load) for load in balance["load"])
    ranges = "".join(f" {min(value):.3f}-{max(value):.3f}" for value in losses.values())
    worst = sorted(sorted(layers, key=lambda layer: -max(balance["load"][layer]))[:_WORST_LAYERS])
    return (
        f"layers ({named}): {numbers[0]}-{numbers[-1]} {least:.2f}-{most:.2f}{ranges} | highest load: "
        + " | ".join(map(entry, worst))
    )


def layer_numbers(names: Sequence[str]) -> list[str]:
    """Short names of layers: their numbers in the model, or their places if names have none of their own.

    Layers of multi-token prediction have numbers of their own, ``mtp0`` the first.

    Args:
        names: canonical names of routers, such as ``model.layers.3.mlp.gate``.
    """
    found = [next((part for part in name.split(".") if part.isdecimal()), "") for name in names]
    found = [
        f"mtp{number}" if name.startswith("mtp.") else number
        for name, number in zip(names, found, strict=True)
    ]
    if "" in found or len(set(found)) < len(found):
        return [str(place) for place in range(len(names))]
    return found


def validation_line(record: Mapping[str, Any]) -> str:
    """The line on stdout of one validation record."""
    domains = "  ".join(f"{name}: {value:.4f}" for name, value in record["domain_loss"].items())
    information = fmean(record["mutual_information"])
    line = (
        f"validation at step {record['step']}: loss: {record['loss']:.4f}  {domains}  mi: {information:.3f}"
    )
    if "mtp_loss" in record:
        line += f"  mtp_loss: {record['mtp_loss']:.4f}"
    for name, values in record.get("modality_maxvio", {}).items():
        line += f"  maxvio of {name}: {fmean(values):.2f}"
    return line


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tags and values that TensorBoard shows of one record."""
    if record["event"] == "validation":
        yield "validation/loss", record["loss"]
        if "mtp_loss" in record:
            yield "validation/mtp_loss", record["mtp_loss"]
        for domain, value in record["domain_loss"].items():
            yield f"validation/loss/{domain}", value
        yield "validation/mutual_information", fmean(record["mutual_information"])
        for name, values in record.get("modality_maxvio", {}).items():
            yield f"validation/maxvio/{name}", fmean(values)
        return
    for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
        yield f"train/{name}", record[name]
    if "mtp_loss" in record:
        yield "train/mtp_loss", record["mtp_loss"]
    balance = record["balance"]
    for name in _PER_LAYER:
        for layer, value in enumerate(balance[name] or ()):
            if value is not None:
                yield f"{name}/layer{layer}", value
    for name, values in balance["losses"].items():
        yield f"balance/{name}", fmean(values["value"])


def finite(value: Any) -> Any:
    """The same value with None for not-a-number and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value
