"""The words of a report: headline numbers, what the run was, and the table of its layers, as HTML.

Every text that comes from the run is escaped here.
"""

from __future__ import annotations

import contextlib
from datetime import datetime
from html import escape

import numpy as np

from trimtab.train.report_log import RunLog, as_list, as_mapping, as_number, as_row
from trimtab.train.report_series import layer_labels, layer_series, scalar_series


def model_name(log: RunLog) -> str:
    """The model of the last start record."""
    return str(log.start.get("model") or "unnamed model")


def layer_names(log: RunLog) -> list[str]:
    """A short name for each MoE layer that was measured."""
    labels = layer_labels([str(name) for name in as_list(log.start.get("layers"))])
    rows = [as_row(log.last_balance[1].get(key)) for key in ("maxvio", "load_max")]
    num_layers = next((len(row) for row in rows if row is not None), len(labels))
    # Without a start record, or when it disagrees with what was measured, layers are numbered.
    return labels if len(labels) == num_layers else [f"layer {i}" for i in range(num_layers)]


def header(log: RunLog) -> str:
    """Title, status, headline numbers, setup and notes."""
    status = str(log.end.get("status", "finished")) if log.end is not None else "open"
    label = "not ended: still running, or killed" if status == "open" else status
    setup = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
        for name, text in _setup(log).items()
        if text
    )
    notes = list(log.notes)
    if log.num_starts > 1:
        times = "once" if log.num_starts == 2 else f"{log.num_starts - 1} times"
        notes.insert(0, f"Resumed {times}; a step that was repeated shows its last attempt.")
    title = escape(model_name(log)).replace("/", "/<wbr>").replace("_", "_<wbr>")
    return (
        f'<div class="titleline"><h1>{title}</h1>'
        f'<span class="status {escape(status)}">{escape(label)}</span></div>'
        f'<div class="tiles">{"".join(_loss_tiles(log) + _balance_tiles(log) + _progress_tiles(log))}</div>'
        f"<dl>{setup}</dl>" + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    )


def layer_table(log: RunLog) -> str:
    """One row per layer with its newest balance metrics, folded; empty without any."""
    step, balance = log.last_balance
    columns = {
        title: row
        for title, key in (
            ("MaxVio", "maxvio"),
            ("entropy", "load_entropy"),
            ("least load", "load_min"),
            ("most load", "load_max"),
            ("dead", "dead_experts"),
        )
        if (row := as_row(balance.get(key))) is not None
    }
    if not columns:
        return ""
    head = "".join(f"<th>{title}</th>" for title in columns)
    body = ""
    for i, name in enumerate(layer_names(log)):
        cells = ""
        for title, row in columns.items():
            value = row[i] if i < len(row) and np.isfinite(row[i]) else None
            text = "–" if value is None else f"{value:.0f}" if title == "dead" else f"{value:.3f}"
            cells += f'<td class="bad">{text}</td>' if title == "dead" and value else f"<td>{text}</td>"
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return (
        f"<details><summary>Layer by layer, at step {step:,}</summary>"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></details>"
    )


def _tile(name: str, value: str, detail: str = "", tone: str = "") -> str:
    return (
        f'<div class="tile {tone}"><span class="name">{escape(name)}</span>'
        f'<span class="value">{escape(value)}</span><span class="detail">{escape(detail)}</span></div>'
    )


def _loss_tiles(log: RunLog) -> list[str]:
    tiles = []
    for name, records in (("Training loss", log.steps), ("Validation loss", log.validations)):
        series = scalar_series(records, "loss")
        if series is None:
            tiles.append(_tile(name, "–", "not logged yet"))
            continue
        finite = np.isfinite(series[1])
        steps, values = series[0][finite].astype(int), series[1][finite]
        if not finite[-1]:
            tiles.append(_tile(name, "NaN", f"last finite: {values[-1]:.3f} at step {steps[-1]:,}", "bad"))
            continue
        start = f"from {values[0]:.3f} at step {steps[0]:,}" if len(values) > 1 else f"at step {steps[0]:,}"
        tiles.append(_tile(name, f"{values[-1]:.3f}", start))
    return tiles


def _balance_tiles(log: RunLog) -> list[str]:
    step, balance = log.last_balance
    tiles = []
    maxvio, history = as_row(balance.get("maxvio")), layer_series(log.steps, "balance", "maxvio")
    if maxvio is not None and history is not None:
        worst = int(np.nanargmax(maxvio))
        parts = [layer_names(log)[worst]] if len(maxvio) > 1 else []
        if len(history[0]) > 1:
            parts.append(f"from {np.nanmax(history[1][0]):.2f} at step {int(history[0][0]):,}")
        tiles.append(_tile("Worst MaxVio", f"{maxvio[worst]:.2f}", " · ".join([*parts, "0 is perfect"])))
    dead = as_row(balance.get("dead_experts"))
    if dead is not None:
        count, num_experts = int(np.nansum(dead)), _num_experts(log)
        total = f"of {len(dead) * num_experts:,} at step {step:,}" if num_experts else f"at step {step:,}"
        tiles.append(_tile("Dead experts", f"{count:,}", total, "bad" if count else "good"))
    return tiles


def _progress_tiles(log: RunLog) -> list[str]:
    num_steps, step = as_number(log.start.get("num_steps")), max([*log.steps, *log.validations])
    tiles = [_tile("Steps", f"{step:,}", f"of {num_steps:,.0f}" if num_steps > 0 else "")]
    tokens = scalar_series(log.steps, "num_tokens")
    if tokens is not None:
        count = float(np.nanmax(tokens[1]))
        tiles.append(_tile("Tokens", _short(count), f"{count:,.0f}"))
    seconds = wall_seconds(log)
    if seconds > 0:
        rates = scalar_series(log.steps, "tokens_per_second")
        speed = "" if rates is None else f"median {np.nanmedian(rates[1]):,.0f} tokens/s"
        tiles.append(_tile("Wall time", _duration(seconds), speed))
    return tiles


def _setup(log: RunLog) -> dict[str, str]:
    start = log.start
    num_layers, num_experts = len(layer_names(log)), _num_experts(log)
    top_k, parameters = as_number(start.get("top_k")), as_number(start.get("num_parameters"))
    trained = as_number(start.get("num_trained"))
    size = _short(parameters) if parameters > 0 else ""
    if size and 0 < trained < parameters:
        size += f", {_short(trained)} trained"
    moe = ""
    if num_layers:
        moe = f"{num_layers} {'layer' if num_layers == 1 else 'layers'}"
        moe += f" × {num_experts} experts" if num_experts else ""
        moe += f", top-{top_k:.0f}" if top_k > 0 else ""
    objectives = []
    for entry in as_list(start.get("objectives")):
        objective = as_mapping(entry)
        coef, scope = as_number(objective.get("coef")), objective.get("scope")
        text = str(objective.get("name", "unnamed")) + (f" {coef:g}" if np.isfinite(coef) else "")
        objectives.append(text + (f" per {scope}" if scope else ""))
    started = str(start.get("time") or "")
    with contextlib.suppress(ValueError):
        started = datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M %Z").strip()
    return {
        "MoE": moe,
        "Parameters": size,
        "Started from": str(start.get("initial") or ""),
        "Objectives": ", ".join(objectives) or ("none" if "objectives" in start else ""),
        "Expert bias": f"{start['bias_rule']} rule" if start.get("bias_rule") else ("none" if start else ""),
        "Domains": ", ".join(str(domain) for domain in as_list(start.get("domains"))),
        "Started": started,
    }


def _num_experts(log: RunLog) -> int:
    """Experts per layer as measured, else as announced; 0 when neither is known."""
    if log.load.shape is not None:
        return log.load.shape[1]
    announced = as_number(log.start.get("num_experts"))
    return int(announced) if announced > 0 else 0


def wall_seconds(log: RunLog) -> float:
    """Seconds spent on the steps shown; a clock that a resumed run starts again at 0 is added up."""
    series = scalar_series(log.steps, "seconds")
    clock = [] if series is None else series[1][np.isfinite(series[1])].tolist()
    ended = as_number((log.end or {}).get("seconds"))
    if np.isfinite(ended):
        clock.append(ended)
    total = previous = 0.0
    for value in clock:
        total += value - previous if value >= previous else value
        previous = value
    return total


def _short(number: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
