"""Read a run's ``metrics.jsonl`` into a `RunLog` of bounded size, whatever state the run is in.

Legend: L MoE layers, E experts, D domains.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

METRICS_FILE = "metrics.jsonl"

# 1.5 million values are 4 MB of HTML; a 3-layer, 16-expert run never reaches it and is bounded by frames.
MAX_CELLS = 1_500_000
MAX_FRAMES = 120


def frame_limit(num_cells: int) -> int:
    """Number of (L, E) tables of ``num_cells`` values that a report keeps: at least 8, at most 120."""
    return max(8, min(MAX_FRAMES, MAX_CELLS // max(1, num_cells)))


class FrameStore:
    """Tables over steps, thinned while they are read: at most twice `frame_limit` are in memory.

    Every n-th table is kept, n a power of two that doubles when the store is full, and the newest always.
    """

    def __init__(self) -> None:
        self._frames: dict[int, Array] = {}
        self._newest: tuple[int, Array] | None = None
        self._num_seen = 0
        self._stride = 1

    def add(self, step: int, table: Array) -> None:
        """Add the table of one step; a step that is already there is replaced."""
        if step in self._frames or self._num_seen % self._stride == 0:
            self._frames[step] = table
        if self._newest is None or step != self._newest[0]:
            self._num_seen += 1
        self._newest = (step, table)
        if len(self._frames) > 2 * frame_limit(table.size):
            self._frames = {step: self._frames[step] for step in sorted(self._frames)[::2]}
            self._stride *= 2

    @property
    def shape(self) -> tuple[int, int] | None:
        """(L, E) of the newest table, None when there is none."""
        return None if self._newest is None else (self._newest[1].shape[0], self._newest[1].shape[1])

    def drop_from(self, step: int) -> None:
        """Forget tables of this step and later ones."""
        self._frames = {kept: table for kept, table in self._frames.items() if kept < step}
        self._newest = max(self._frames.items(), key=lambda item: item[0], default=None)

    def stacked(self) -> tuple[list[int], Array] | None:
        """Steps in order and their tables as (frames, L, E); None when there are none."""
        frames = dict(self._frames)
        if self._newest is not None:
            frames[self._newest[0]] = self._newest[1]
        if not frames:
            return None
        # A resumed run may have changed shape; tables unlike the newest have no place in one picture.
        shape = frames[max(frames)].shape
        steps = sorted(step for step, table in frames.items() if table.shape == shape)
        limit = frame_limit(frames[steps[-1]].size)
        if len(steps) > limit:
            picks = np.unique(np.linspace(0, len(steps) - 1, limit).round().astype(int))
            steps = [steps[i] for i in picks]
        return steps, np.stack([frames[step] for step in steps])


@dataclass(kw_only=True, slots=True)
class RunLog:
    """What a run has logged so far, one record per step.

    Attributes:
        start: the last start record, empty when there is none.
        end: the last end record, None while the run has not ended since its last start.
        num_starts: 1 for a run that was never resumed.
        steps: step records by step, in order, without the tables below.
        validations: validation records by step, in order, without ``domain_load`` and ``modality_load``.
        load: (L, E) expert loads over steps.
        bias: (L, E) expert biases over steps.
        domain_load: step, domain names and their (D, L, E) loads at the newest validation that has them.
        modality_load: likewise of text and images.
        load_before: (L, E) load of all domains before the first step, of a run that starts from given weights.
        notes: sentences for the reader about lines that could not be used.
    """

    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    num_starts: int = 0
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    validations: dict[int, dict[str, Any]] = field(default_factory=dict)
    load: FrameStore = field(default_factory=FrameStore)
    bias: FrameStore = field(default_factory=FrameStore)
    domain_load: tuple[int, list[str], Array] | None = None
    modality_load: tuple[int, list[str], Array] | None = None
    load_before: Array | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def last_balance(self) -> tuple[int, Mapping[str, Any]]:
        """Step and balance metrics of the newest step record that has any; (0, {}) when none has."""
        for step in reversed(self.steps):
            if self.steps[step]["balance"]:
                return step, self.steps[step]["balance"]
        return 0, {}


def as_number(value: object) -> float:
    """A finite float, or NaN for anything else (null, text, a missing key)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan


def as_row(value: object) -> Array | None:
    """A list of numbers as (L,), unusable entries NaN; None when it is no list or has no number."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    row = np.array([as_number(entry) for entry in value], dtype=np.float64)
    return row if np.isfinite(row).any() else None


def as_table(value: object) -> Array | None:
    """Lists of equally many numbers as (L, E); None when it is anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    try:
        table = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return table if table.ndim == 2 and table.size else None


def as_mapping(value: object) -> Mapping[str, Any]:
    """The mapping itself, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[Any]:
    """The list itself, or an empty one."""
    return value if isinstance(value, list) else []


def read_run_log(run_dir: Path) -> RunLog:
    """Read ``run_dir/metrics.jsonl``, tolerating what an interrupted or resumed run leaves in it.

    The last line may be cut short (the run is writing it). Any other line that is no record is skipped
    with a warning and a note for the report. A step that appears twice counts as it was logged last, and
    after a resume the steps that the earlier attempt had logged beyond it are forgotten.

    Args:
        run_dir: directory that ``trimtab train`` wrote.

    Returns:
        The log, with at least one step or validation record.

    Raises:
        ValueError: there is no metrics file, or no step and no validation in it.

    Warns:
        UserWarning: naming file and line, for each line that was skipped.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(
            f"{run_dir} has no {METRICS_FILE}; give the directory of one run, as `trimtab train` wrote it"
        )
    log = RunLog()
    resumed = False
    for record in _records(path, log.notes):
        event = record.get("event")
        step = record.get("step")
        if event == "start":
            log.start, log.end, resumed = record, None, log.num_starts > 0
            log.num_starts += 1
        elif event == "end":
            log.end = record
        elif event in ("step", "validation") and isinstance(step, int):
            if resumed:
                _forget_from(log, step)
                resumed = False
            if event == "step":
                _add_step(log, step, record)
            else:
                _add_validation(log, step, record)
    if not log.steps and not log.validations:
        raise ValueError(f"{path} has no step and no validation record yet; wait for the first logged step")
    log.steps = dict(sorted(log.steps.items()))
    log.validations = dict(sorted(log.validations.items()))
    return log


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        number, line = 1, lines.readline()
        while line:
            following = lines.readline()
            record = _parse(line)
            if record is None and line.strip():
                # A killed run leaves half a line, and the resumed one may continue on it.
                record = _parse(line[max(line.rfind(b'{"event"'), 0) :])
                if following or line.endswith(b"\n") or record is not None:
                    notes.append(f"{METRICS_FILE} line {number} is not a complete record and was skipped.")
                    warnings.warn(
                        f"{path}, line {number}: expected one JSON object, given {line[:60]!r}; "
                        "the line was skipped, the rest of the run is in the report",
                        stacklevel=4,
                    )
            if record is not None:
                yield record
            number, line = number + 1, following


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _add_step(log: RunLog, step: int, record: dict[str, Any]) -> None:
    balance = dict(as_mapping(record.get("balance")))
    for name, store in (("load", log.load), ("bias", log.bias)):
        table = as_table(balance.pop(name, None))
        if table is not None:
            if name == "load":
                balance["load_max"] = table.max(axis=1).tolist()
                balance["load_min"] = table.min(axis=1).tolist()
            store.add(step, table)
    log.steps[step] = {**record, "balance": _compact(balance)}


def _compact(node: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as float32 arrays: a tenth of their memory; what holds no number is left out."""
    compact: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            compact[name] = _compact(value)
        elif (row := as_row(value)) is not None:
            compact[name] = row.astype(np.float32)
    return compact


def _add_validation(log: RunLog, step: int, record: dict[str, Any]) -> None:
    log.domain_load = _stacked(step, record.get("domain_load")) or log.domain_load
    if step == 0 and log.domain_load is not None:
        log.load_before = log.domain_load[2].sum(axis=0)
    log.modality_load = _stacked(step, record.get("modality_load")) or log.modality_load
    log.validations[step] = {
        name: value for name, value in record.items() if name not in ("domain_load", "modality_load")
    }


def _stacked(step: int, loads: Any) -> tuple[int, list[str], Array] | None:
    """The step, names and their loads; None where none can be used."""
    tables = {str(name): as_table(value) for name, value in as_mapping(loads).items()}
    usable = {name: table for name, table in tables.items() if table is not None}
    if not usable:
        return None
    shape = next(iter(usable.values())).shape
    usable = {name: table for name, table in usable.items() if table.shape == shape}
    return step, list(usable), np.stack(list(usable.values()))


def _forget_from(log: RunLog, step: int) -> None:
    log.steps = {kept: record for kept, record in log.steps.items() if kept < step}
    log.validations = {kept: record for kept, record in log.validations.items() if kept < step}
    log.load.drop_from(step)
    log.bias.drop_from(step)
    if log.domain_load is not None and log.domain_load[0] >= step:
        log.domain_load = None
    if log.modality_load is not None and log.modality_load[0] >= step:
        log.modality_load = None
