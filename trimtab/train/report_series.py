"""Series over steps out of a `RunLog`, thinned and packed for the page.

Legend: S steps, L MoE layers.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.train.report_log import Array, as_mapping, as_number, as_row

_MISSING = object()


def extreme_indices(key_S: Array, limit: int) -> NDArray[np.intp]:
    """Indices of at most ``limit`` entries that keep the first, the last and each bucket's extremes.

    Args:
        key_S: (S,) values; NaN is never an extreme.
        limit: at least 4.

    Returns:
        Increasing indices, all of them where S <= ``limit``.
    """
    if len(key_S) <= limit:
        return np.arange(len(key_S))
    kept = {0, len(key_S) - 1}
    edges = np.linspace(0, len(key_S), (limit - 2) // 2 + 1).astype(int)
    for low, high in pairwise(edges):
        bucket = key_S[low:high]
        if np.isfinite(bucket).any():
            kept |= {int(low + np.nanargmin(bucket)), int(low + np.nanargmax(bucket))}
    return np.array(sorted(kept))


def smoothed(values_S: Array) -> Array:
    """Centred moving average over 1/40 of the run; NaN entries are left out of each mean."""
    half = max(1, len(values_S) // 80)
    finite = np.isfinite(values_S)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values_S, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values_S))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values_S))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def pack_float32(values: Array) -> dict[str, Any]:
    """Array as base64 float32, NaN kept."""
    return {"shape": values.shape, "f32": base64.b64encode(values.astype("<f4").tobytes()).decode()}


def pack_uint16(values: Array) -> dict[str, Any]:
    """Array as base64 uint16 codes of 65,535 equal steps from its minimum to its maximum, 65535 for NaN."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    unit = (high - low) / 65534 or 1.0
    codes = np.where(np.isfinite(values), np.round((np.nan_to_num(values) - low) / unit), 65535)
    packed = base64.b64encode(codes.clip(0, 65535).astype("<u2").tobytes()).decode()
    return {"shape": values.shape, "u16": packed, "low": low, "unit": unit}


def plain_numbers(values_S: Array) -> list[float | None]:
    """Six significant digits each, None for NaN."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values_S.tolist()]


def layer_labels(names: list[str]) -> list[str]:
    """Names without the dotted parts that all share: "model.layers.3.mlp.gate" becomes "layer 3"."""
    parts = [name.split(".") for name in names]
    shortest = min((len(part) for part in parts), default=0)
    if len(set(names)) < 2:
        digits = [[piece for piece in part if piece.isdigit()] for part in parts]
        return [
            f"layer {digit[0]}" if len(digit) == 1 else name
            for digit, name in zip(digits, names, strict=True)
        ]
    head = next(i for i in range(shortest + 1) if i == shortest or len({part[i] for part in parts}) > 1)
    tail = 0
    while tail < shortest - head - 1 and len({part[-1 - tail] for part in parts}) == 1:
        tail += 1
    short = [".".join(part[head : len(part) - tail]) for part in parts]
    return [f"layer {label}" if label.isdigit() else label for label in short]


def scalar_series(records: Mapping[int, Mapping[str, Any]], *path: str) -> tuple[Array, Array] | None:
    """Steps and values of one number per record; None when no record has it.

    Steps without the number are left out, except that a null stays in as NaN: a diverged run shows a gap.
    """
    steps, values = [], []
    for step, record in records.items():
        node: Any = record
        for key in path:
            node = as_mapping(node).get(key, _MISSING)
        if node is not _MISSING:
            steps.append(step)
            values.append(as_number(node))
    if not np.isfinite(values).any():
        return None
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def layer_series(records: Mapping[int, Mapping[str, Any]], *path: str) -> tuple[Array, Array] | None:
    """Steps (S,) and values (S, L) of one number per layer and record; None when no record has it."""
    rows: dict[int, Array] = {}
    for step, record in records.items():
        node: Any = record
        for key in path:
            node = as_mapping(node).get(key)
        row = as_row(node)
        if row is not None:
            rows[step] = row
    if not rows:
        return None
    num_layers = len(rows[max(rows)])
    steps = [step for step, row in rows.items() if len(row) == num_layers]
    return np.array(steps, dtype=np.float64), np.stack([rows[step] for step in steps])
