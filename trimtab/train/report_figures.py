"""Turn a `RunLog` into sections of charts: titles, one-sentence explanations and thinned, packed data.

A chart is plain data; ``report_page.js`` draws it. Thinning, so that a long run of a large model stays a
file that opens at once:

- a curve keeps at most 1,200 points, a curve per layer at most 400 steps: the steps are cut into equal
  buckets and each bucket keeps its smallest and largest value, so that no spike disappears;
- tables of load or bias per layer and expert keep at most 120 steps and 1.5 million values, evenly spread;
- domain loads are those of the newest validation;
- the first and the last step are always kept.

Legend: S steps, L MoE layers, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.train.report_chart import Chart, Section
from trimtab.train.report_comparison import before_and_after, comparison_sections
from trimtab.train.report_log import Array, RunLog, as_list, as_mapping, as_number
from trimtab.train.report_series import (
    extreme_indices,
    layer_series,
    pack_float32,
    pack_uint16,
    plain_numbers,
    scalar_series,
    smoothed,
)

MAX_POINTS = 1_200
MAX_LAYER_POINTS = 400


def _line(name: str, series: tuple[Array, Array], style: str = "line") -> dict[str, Any]:
    steps, values = series
    kept = extreme_indices(values, MAX_POINTS)
    return {
        "name": name,
        "style": style,
        "x": steps[kept].astype(int).tolist(),
        "y": plain_numbers(values[kept]),
    }


def _lines_chart(title: str, hint: str, lines: list[dict[str, Any]], **data: Any) -> Chart:
    wide = data.pop("wide", False)
    return Chart(title=title, hint=hint, kind="lines", wide=wide, data={"lines": lines, **data})


def _layers_chart(
    title: str,
    hint: str,
    series: tuple[Array, Array] | None,
    *,
    key: Callable[[Array], Array] = lambda values: values,
    lower: tuple[Array, Array] | None = None,
    extra: tuple[str, tuple[Array, Array] | None] | None = None,
    **data: Any,
) -> Chart | None:
    """Chart of one number per layer over steps, or None without data.

    Args:
        title: heading.
        hint: what is good and what is bad.
        series: steps and (S, L) values.
        key: maps values to what thinning protects the extremes of, over layers.
        lower: a second bound on the same steps; the chart then shows a range per layer.
        extra: a name and a second series of the same steps, shown on hover.
        data: passed on to the page.
    """
    if series is None:
        return None
    steps, values = series
    with np.errstate(all="ignore"):
        worst = np.nanmax(np.where(np.isfinite(key(values)), key(values), -np.inf), axis=1)
    kept = extreme_indices(np.where(np.isfinite(worst), worst, np.nan), MAX_LAYER_POINTS)
    data |= {"x": steps[kept].astype(int).tolist(), "values": pack_float32(values[kept])}
    if lower is not None and lower[1].shape == values.shape:
        data["lower"] = pack_float32(lower[1][kept])
    if extra is not None and extra[1] is not None and extra[1][1].shape == values.shape:
        data |= {"extra_name": extra[0], "extra": pack_float32(extra[1][1][kept])}
    return Chart(title=title, hint=hint, kind="layers", data=data)


def build_sections(log: RunLog) -> tuple[list[Section], dict[str, Any]]:
    """Sections in reading order, and the packed tables that several charts share, by name."""
    tables: dict[str, Any] = {}
    for name, store in (("load", log.load), ("bias", log.bias)):
        stacked = store.stacked()
        if stacked is not None:
            tables[name] = {"x": stacked[0], "values": pack_uint16(stacked[1])}
    for name, found in (("domains", log.domain_load), ("modalities", log.modality_load)):
        if found is not None:
            step, domains, loads = found
            with np.errstate(all="ignore"):
                loads = loads * loads.shape[2] / np.nansum(loads, axis=2, keepdims=True)
            tables[name] = {"step": step, "domains": domains, "values": pack_uint16(loads)}
    compared = before_and_after(log)
    if compared is not None:
        tables["compared"] = {"x": [0, compared[0]], "values": pack_uint16(compared[1])}
    sections = [
        _loss_section(log),
        *comparison_sections(compared),
        _load_section(tables),
        _balance_section(log),
        _objective_section(log),
        _bias_section(log, tables),
        _domain_section(log, tables),
        _modality_section(log, tables),
        _router_section(log),
        _optimiser_section(log),
    ]
    for section in sections:
        narrow = [chart for chart in section.charts if not chart.wide]
        if len(narrow) % 2:  # two columns: a chart without a neighbour takes both
            narrow[-1].wide = True
    return sections, tables


def _loss_section(log: RunLog) -> Section:
    section = Section(id="loss", title="Loss", empty="No loss has been logged yet.")
    lines = []
    train = scalar_series(log.steps, "loss")
    if train is not None:
        noisy = len(train[0]) >= 40
        lines.append(
            _line("training, each logged step" if noisy else "training", train, "faint" if noisy else "line")
        )
        if noisy:
            lines.append(_line("training, moving average", (train[0], smoothed(train[1]))))
    validation = scalar_series(log.validations, "loss")
    if validation is not None:
        lines.append(_line("validation", validation, "points"))
    if lines:
        hint = (
            "Both should fall and flatten together; validation that rises while training falls is "
            "overfitting, and a jump that does not recover is divergence."
        )
        if validation is None:
            hint = "Should fall and flatten; a jump that does not recover is divergence. No validation yet."
        section.charts.append(
            _lines_chart(
                "Training and validation loss", hint, lines, y="cross-entropy, nats per token", wide=True
            )
        )
    return section


def _load_section(tables: dict[str, Any]) -> Section:
    section = Section(
        id="load",
        title="Expert load",
        empty="No expert load was logged: the model has no MoE layer that was watched.",
    )
    if "load" in tables:
        section.charts = [
            Chart(
                title="Load of every expert in every layer",
                hint="An even, faint picture is good: 1.0 is an expert's fair share of tokens. Orange experts "
                "get too many, blue ones too few, and the darkest get none.",
                kind="frames",
                data={"table": "load", "scale": "load"},
                wide=True,
            ),
            Chart(
                title="Load of each expert over time, one layer",
                hint="Stripes that stay orange or blue are experts that the router has locked in; colours "
                "that fade show balancing at work.",
                kind="experts",
                data={"table": "load", "scale": "load"},
                wide=True,
            ),
        ]
    return section


def _balance_section(log: RunLog) -> Section:
    section = Section(id="balance", title="Balance", empty="No balance metrics were logged for this run.")
    series = {
        name: layer_series(log.steps, "balance", name)
        for name in ("maxvio", "maxvio_running", "load_entropy", "dead_experts", "effective_coef")
    }
    charts = [
        _layers_chart(
            "MaxVio of each step",
            "How far the busiest expert is above its fair share: 0 is perfect, 1 means twice its share.",
            series["maxvio"],
            reference=0,
        ),
        _layers_chart(
            "MaxVio, running",
            "The same on load accumulated over steps: chance cancels, and what stays is persistent.",
            series["maxvio_running"],
            reference=0,
        ),
        _layers_chart(
            "Load entropy",
            "1.0 is perfect balance, 0 means that one expert takes everything; a falling line is a collapse.",
            series["load_entropy"],
            key=np.negative,
            reference=1,
        ),
        _layers_chart(
            "Dead experts",
            "Experts that got no token: 0 is right, and those that stay dead never learn.",
            series["dead_experts"],
            reference=0,
            integer=True,
        ),
        _layers_chart(
            "Effective coefficient",
            "Measured gradient of the injected loss divided by its reference: exactly 1.000 is right, "
            "anything else means that the trainer scaled it.",
            series["effective_coef"],
            key=lambda values: np.abs(values - 1),
            reference=1,
        ),
    ]
    section.charts = [chart for chart in charts if chart is not None]
    return section


def _objective_section(log: RunLog) -> Section:
    section = Section(
        id="objectives",
        title="Balance and z-loss",
        empty="No objective was attached, so there is no loss to show.",
    )
    coefs = {
        str(as_mapping(objective).get("name")): as_mapping(objective)
        for objective in as_list(log.start.get("objectives"))
    }
    names = dict.fromkeys(
        name
        for record in log.steps.values()
        for name in as_mapping(as_mapping(record.get("balance")).get("losses"))
    )
    for name in names:
        value = layer_series(log.steps, "balance", "losses", name, "value")
        scaled = layer_series(log.steps, "balance", "losses", name, "scaled")
        is_z = name in ("z", "z_loss")
        hint = (
            "Mean of logsumexp² of the router logits: lower is calmer; a steady rise means that logits drift."
            if is_z
            else "Before its coefficient: 1.0 is perfect balance, number of experts / top-k the worst."
        )
        coef = as_number(coefs.get(name, {}).get("coef"))
        if np.isfinite(coef):
            hint += f" Coefficient {coef:g}."
        chart = _layers_chart(
            f"z-loss ({name})" if is_z else f"Balance loss: {name}",
            hint,
            value,
            extra=("scaled", scaled),
            reference=None if is_z else 1,
        )
        if chart is not None:
            section.charts.append(chart)
    return section


def _bias_section(log: RunLog, tables: dict[str, Any]) -> Section:
    section = Section(
        id="bias",
        title="Expert bias",
        empty="The run did not balance by expert bias, so there is no bias to show.",
    )
    chart = _layers_chart(
        "Range of the expert bias",
        "Smallest to largest bias that is added for selection: a range that levels off has found its "
        "balance, one that widens without end is fighting the router.",
        layer_series(log.steps, "balance", "bias_max"),
        lower=layer_series(log.steps, "balance", "bias_min"),
        reference=0,
    )
    if chart is not None:
        chart.wide = True
        section.charts.append(chart)
    if "bias" in tables:
        section.charts.append(
            Chart(
                title="Bias of each expert over time, one layer",
                hint="Green experts are pushed up because too few tokens chose them, purple ones are held "
                "back; steady colours mean that the bias has settled. Only differences between experts "
                "count: a shift of all of them changes no choice.",
                kind="experts",
                data={"table": "bias", "scale": "bias"},
                wide=True,
            )
        )
    return section


def _domain_section(log: RunLog, tables: dict[str, Any]) -> Section:
    empty = "No validation by domain was logged yet." if log.validations else "No validation was logged yet."
    section = Section(id="domains", title="Specialisation by domain", empty=empty)
    if "domains" in tables:
        section.charts.append(
            Chart(
                title=f"Which domain uses which expert, validation at step {tables['domains']['step']:,}",
                hint="An expert's share of a domain's tokens against a uniform share, log₂ scale. Rows that "
                "differ show specialisation; equal rows mean that experts ignore the domain.",
                kind="domains",
                data={"table": "domains", "scale": "load"},
                wide=True,
            )
        )
    information = _layers_chart(
        "Mutual information of domain and expert",
        "How much one routing decision tells about the domain, in bits: 0 is no specialisation at all.",
        layer_series(log.validations, "mutual_information"),
        reference=0,
    )
    if information is not None:
        section.charts.append(information)
    domains = dict.fromkeys(
        name for record in log.validations.values() for name in as_mapping(record.get("domain_loss"))
    )
    losses = {name: scalar_series(log.validations, "domain_loss", name) for name in domains}
    lines = [_line(str(name), series, "points") for name, series in losses.items() if series is not None]
    if lines:
        section.charts.append(
            _lines_chart(
                "Validation loss by domain",
                "All should fall; one that stalls or rises is losing capacity to the others.",
                lines,
                y="nats per token",
            )
        )
    return section


def _modality_section(log: RunLog, tables: dict[str, Any]) -> Section:
    section = Section(id="modalities", title="Text and images", empty="The run had no images.")
    if "modalities" not in tables:
        return section
    section.charts.append(
        Chart(
            title=f"Load of text and of images, validation at step {tables['modalities']['step']:,}",
            hint="An expert's share of a modality's tokens against a uniform share, log₂ scale. Rows that "
            "differ are experts of one modality; an orange one in a row of images waits for images alone.",
            kind="domains",
            data={"table": "modalities", "scale": "load"},
            wide=True,
        )
    )
    for name in tables["modalities"]["domains"]:
        chart = _layers_chart(
            f"MaxVio of {name}",
            "Largest load of an expert by this modality's tokens above the mean, less 1: 0 is an even load.",
            layer_series(log.validations, "modality_maxvio", name),
            reference=0,
        )
        if chart is not None:
            section.charts.append(chart)
    return section


def _router_section(log: RunLog) -> Section:
    section = Section(id="router", title="Router", empty="No router metrics were logged for this run.")
    charts = [
        _layers_chart(
            "Largest router logit",
            "Should level off; growth without end makes routing hard, then unstable (the z-loss holds it).",
            layer_series(log.steps, "balance", "logit_max"),
        ),
        _layers_chart(
            "Router entropy",
            "How undecided the router is per token: a slow fall is learning, a sudden one to 0 a collapse.",
            layer_series(log.steps, "balance", "router_entropy"),
            key=np.negative,
        ),
        _layers_chart(
            "Count error",
            "Largest difference between the load fraction used in backward and the final one: 0 is exact.",
            layer_series(log.steps, "balance", "count_error"),
            reference=0,
        ),
    ]
    section.charts = [chart for chart in charts if chart is not None]
    return section


def _optimiser_section(log: RunLog) -> Section:
    section = Section(id="optimiser", title="Optimiser and speed", empty="Nothing was logged for this run.")
    speed = {"y": "tokens per second", "reference": 0, "format": "~s"}
    for key, title, hint, data in (
        ("lr", "Learning rate", "What the schedule asked for at each step.", {}),
        (
            "grad_norm",
            "Gradient norm",
            "Before clipping. Steady is good; spikes often come before divergence.",
            {"reference": 0},
        ),
        (
            "tokens_per_second",
            "Throughput",
            "Flat is good; validation and checkpoints are left out, so a dip is a slow step or a busy machine.",
            speed,
        ),
    ):
        series = scalar_series(log.steps, key)
        if series is not None:
            section.charts.append(_lines_chart(title, hint, [_line(title.lower(), series)], **data))
    return section
