"""What a report is made of: sections of charts, as plain data that ``report_page.js`` draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)
class Chart:
    """One chart: what the reader reads (title, hint) and what the page draws (kind, data)."""

    title: str
    hint: str
    kind: str
    data: dict[str, Any]
    wide: bool = False


@dataclass(kw_only=True, slots=True)
class Section:
    """One heading of the report; without charts it is left out, and ``empty`` says why in the details."""

    id: str
    title: str
    empty: str
    charts: list[Chart] = field(default_factory=list)
