"""What the report shows of a run that starts from given weights."""

import json
import re

import numpy as np
import pytest

from trimtab.train.report import write_report
from trimtab.train.report_comparison import before_and_after, comparison_sections
from trimtab.train.report_log import read_run_log

START = {
    "event": "start",
    "model": "m",
    "layers": ["layers.0.gate", "layers.1.gate"],
    "num_parameters": 5_000,
}
BEFORE = {"a": [[3, 1, 2, 2], [4, 4, 0, 0]], "b": [[1, 1, 0, 6], [0, 0, 4, 4]]}
AFTER = {"a": [[2, 2, 2, 2], [8, 0, 0, 0]], "b": [[2, 2, 2, 2], [8, 0, 0, 0]]}


def validation(step, load):
    return {"event": "validation", "step": step, "loss": 2.0, "domain_load": load}


def write(folder, *records):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_loads_of_all_domains_are_compared_with_the_newest(tmp_path):
    log = read_run_log(
        write(tmp_path, START, validation(0, BEFORE), validation(5, BEFORE), validation(9, AFTER))
    )
    step, loads = before_and_after(log)
    assert step == 9
    # 16 assignments of 4 experts: 4 are a fair share.
    assert np.array_equal(loads[0], [[1, 0.5, 0.5, 2], [1, 1, 1, 1]])
    assert np.array_equal(loads[1], [[1, 1, 1, 1], [4, 0, 0, 0]])
    (section,) = comparison_sections((step, loads))
    bars = {bar["name"]: bar["y"] for bar in section.charts[1].data["bars"]}
    assert bars == {"before": [1.0, 0.0], "after 9 steps": [0.0, 3.0]}


@pytest.mark.parametrize(
    "records",
    [
        (START, validation(5, BEFORE), validation(9, AFTER)),
        (START, validation(0, BEFORE)),
        (START, validation(0, BEFORE), validation(9, {"a": AFTER["a"][:1]})),
    ],
    ids=["from random weights", "not trained yet", "another shape"],
)
def test_without_both_there_is_nothing_to_compare(tmp_path, records):
    log = read_run_log(write(tmp_path, *records))
    assert before_and_after(log) is None
    assert comparison_sections(None) == []
    assert "Load before and after" not in write_report(tmp_path).read_text()


def test_a_resumed_run_keeps_what_was_before_its_first_step(tmp_path):
    records = (START, validation(0, BEFORE), validation(9, BEFORE), START, validation(7, AFTER))
    step, loads = before_and_after(read_run_log(write(tmp_path, *records)))
    assert step == 7
    assert loads[0, 0, 3] == 2
    assert loads[1, 1, 0] == 4


def test_the_page_has_both_tables_and_says_what_was_trained(tmp_path):
    start = {**START, "num_trained": 120, "initial": "models/<b>"}
    page = write_report(write(tmp_path, start, validation(0, BEFORE), validation(9, AFTER))).read_text()
    payload = json.loads(re.search(r'<script[^>]*id="payload"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert payload["tables"]["compared"]["values"]["shape"] == [2, 2, 4]
    assert [c["kind"] for c in payload["charts"].values() if c["kind"] in ("compared", "bars")] == [
        "compared",
        "bars",
    ]
    assert "5 k, 120 trained" in page
    assert "models/&lt;b&gt;" in page
