"""What further training of given weights did to the load of their experts: the same text through both.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import numpy as np

from trimtab.train.report_chart import Chart, Section
from trimtab.train.report_log import Array, RunLog
from trimtab.train.report_series import plain_numbers


def before_and_after(log: RunLog) -> tuple[int, Array] | None:
    """Load of held-out text before the first step and at the newest validation.

    Args:
        log: what the run logged.

    Returns:
        The step of the latter and (2, L, E) loads, 1.0 for a fair share; None unless there are both, as in a run
        that started from given weights and has validated since.
    """
    before, newest = log.load_before, log.domain_load
    if before is None or newest is None or newest[0] == 0:
        return None
    after = newest[2].sum(axis=0)
    if after.shape != before.shape:
        return None
    both = np.stack([before, after])
    with np.errstate(all="ignore"):
        return newest[0], both * both.shape[2] / both.sum(axis=2, keepdims=True)


def comparison_sections(compared: tuple[int, Array] | None) -> list[Section]:
    """The section of the report, and nothing for a run that started from random weights.

    Args:
        compared: from `before_and_after`.
    """
    if compared is None:
        return []
    step, loads = compared
    maxvio = loads.max(axis=2) - 1
    section = Section(id="compared", title="Load before and after", empty="")
    section.charts = [
        Chart(
            title=f"Load of held-out text by the weights given and by those of step {step:,}",
            hint="The same text through both. What turned orange has drawn tokens to it, what turned dark is used "
            "no more; two like pictures mean that training left the routing as it was.",
            kind="compared",
            data={"table": "compared", "scale": "load"},
            wide=True,
        ),
        Chart(
            title="MaxVio of held-out text in each layer, before and after",
            hint="How far the busiest expert is above its fair share: 0 is perfect. Where the second bar is the "
            "higher one, training has unbalanced the layer.",
            kind="bars",
            data={
                "bars": [
                    {"name": name, "y": plain_numbers(row)}
                    for name, row in zip(("before", f"after {step:,} steps"), maxvio, strict=True)
                ],
                "y": "MaxVio",
            },
            wide=True,
        ),
    ]
    return [section]
