"""Write ``report.html``: one self-contained page that shows how a run went.

The page holds plotly.js once and its data as JSON; it loads nothing, and its content security policy forbids
it to. What is kept of a long run is in `trimtab.train.report_figures`.
"""

from __future__ import annotations

import json
import os
from html import escape
from importlib.resources import files
from pathlib import Path

from trimtab.train.report_figures import Section, build_sections
from trimtab.train.report_header import header, layer_names, layer_table, model_name
from trimtab.train.report_log import RunLog, read_run_log

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from the run's metrics, finished or not.

    Reads ``metrics.jsonl`` and, where they exist, ``config.json`` and ``environment.json``. The report
    appears whole or not at all: it is written beside its place and moved there.

    Args:
        run_dir: directory that ``trimtab train`` wrote.

    Returns:
        Path of the report.

    Raises:
        ValueError: the directory holds no metrics, or no step and no validation in them.

    Warns:
        UserWarning: a line of the metrics, named, could not be read and was skipped.
    """
    run_dir = Path(run_dir)
    log = read_run_log(run_dir)
    page = render_report(
        log, config=_json_text(run_dir, "config"), environment=_json_text(run_dir, "environment")
    )
    path = run_dir / REPORT_FILE
    unfinished = path.with_name(f".{REPORT_FILE}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render_report(log: RunLog, *, config: str | None = None, environment: str | None = None) -> str:
    """The page as text.

    Args:
        log: what the run logged.
        config: the resolved configuration, shown as it is given; None leaves it out.
        environment: versions and machine, likewise.

    Returns:
        A complete HTML document, user text escaped.
    """
    from plotly.offline import get_plotlyjs

    sections, tables = build_sections(log)
    charts = {f"{section.id}-{i}": chart for section in sections for i, chart in enumerate(section.charts)}
    payload = {
        "layers": layer_names(log),
        "tables": tables,
        "charts": {
            name: {"kind": chart.kind, "title": chart.title, **chart.data} for name, chart in charts.items()
        },
    }
    fields = {
        "title": escape(model_name(log)),
        "css": _page_part("css"),
        "header": header(log),
        "navigation": "".join(
            f'<a href="#{section.id}">{escape(section.title)}</a>' for section in sections if section.charts
        ),
        "sections": "".join(_section_html(section) for section in sections if section.charts),
        "absent": "".join(
            f'<p class="absent"><b>{escape(section.title)}</b>: {escape(section.empty)}</p>'
            for section in sections
            if not section.charts
        ),
        "layer_table": layer_table(log),
        "details": _details("Configuration", config) + _details("Environment", environment),
        # "<" cannot end the script element when it is written as an escape, which JSON reads back unchanged.
        "payload": json.dumps(payload, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": get_plotlyjs(),
        "js": _page_part("js"),
    }
    pieces = _page_part("html").split("%%")
    return "".join(fields[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _page_part(suffix: str) -> str:
    return files("trimtab.train").joinpath(f"report_page.{suffix}").read_text(encoding="utf-8")


def _json_text(run_dir: Path, name: str) -> str | None:
    path = run_dir / f"{name}.json"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        return text


def _section_html(section: Section) -> str:
    cards = "".join(
        f'<figure class="card{" wide" if chart.wide else ""}"><figcaption><h3>{escape(chart.title)}</h3>'
        f"<p>{escape(chart.hint)}</p></figcaption>"
        f'<div class="controls" id="{section.id}-{i}-controls"></div>'
        f'<div class="plot" id="{section.id}-{i}"></div></figure>'
        for i, chart in enumerate(section.charts)
    )
    title = escape(section.title)
    return f'<section id="{section.id}"><h2>{title}</h2><div class="grid">{cards}</div></section>'


def _details(title: str, text: str | None) -> str:
    if text is None:
        return ""
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
