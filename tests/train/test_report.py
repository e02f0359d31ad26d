import base64
import json
import math
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest

from trimtab.train.report import render_report, write_report
from trimtab.train.report_header import wall_seconds
from trimtab.train.report_log import MAX_CELLS, MAX_FRAMES, FrameStore, RunLog, read_run_log
from trimtab.train.report_series import extreme_indices, layer_labels, pack_uint16, smoothed

NUM_LAYERS, NUM_EXPERTS = 2, 4
SECTIONS = ("loss", "load", "balance", "objectives", "bias", "domains", "router", "optimiser")


def start(**changes):
    return {
        "event": "start",
        "time": "2026-05-04T10:00:00+00:00",
        "model": "deepseek_v3/deepseek_v3_debugmodel",
        "num_parameters": 12_300_000,
        "layers": [f"model.layers.{i}.mlp.gate" for i in (1, 2)],
        "num_experts": NUM_EXPERTS,
        "top_k": 2,
        "objectives": [{"name": "sequence_wise", "coef": 1e-4, "scope": "sequence"}],
        "bias_rule": "sign",
        "domains": ["prose", "python"],
        "num_steps": 6,
    } | changes


def step(number, **changes):
    rows = {"maxvio": 0.5, "maxvio_running": 0.25, "load_entropy": 0.9, "dead_experts": 1}
    rows |= {"bias_min": -0.1, "bias_max": 0.1, "logit_max": 4.0, "router_entropy": 1.2, "count_error": 0.0}
    return {
        "event": "step",
        "step": number,
        "loss": 8.0 - number,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 1000.0,
        "num_tokens": 1024 * number,
        "seconds": 2.0 * number,
        "balance": {name: [value] * NUM_LAYERS for name, value in rows.items()}
        | {
            "load": [[1.5, 1.5, 1.0, 0.0]] * NUM_LAYERS,
            "bias": [[0.1, 0.0, -0.1, 0.0]] * NUM_LAYERS,
            "losses": {
                name: {"value": [1.1] * NUM_LAYERS, "scaled": [1e-4] * NUM_LAYERS}
                for name in ("sequence_wise", "z")
            },
        },
    } | changes


def validation(number, **changes):
    return {
        "event": "validation",
        "step": number,
        "loss": 9.0 - number,
        "domain_loss": {"prose": 2.0, "python": 3.0},
        "domain_load": {name: [[20, 10, 10, 0]] * NUM_LAYERS for name in ("prose", "python")},
        "mutual_information": [0.1] * NUM_LAYERS,
    } | changes


END = {"event": "end", "step": 6, "time": "2026-05-04T10:01:00+00:00", "seconds": 13.0, "status": "finished"}
FULL = [start(), *map(step, range(1, 7)), validation(3), validation(6), END]


def write_run(run_dir, records, tail=""):
    text = "".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(text + tail)
    return run_dir


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text of each script."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.scripts, self.visible = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        inside = self.elements[-1] if self.elements else ("", {})
        if inside[0] == "script" and (not self.scripts or self.scripts[-1][0] is not inside[1]):
            self.scripts.append((inside[1], data))
        elif inside[0] not in ("script", "style"):
            self.visible.append(data)

    @property
    def payload(self):
        return next(json.loads(text) for attrs, text in self.scripts if attrs.get("id") == "payload")

    @property
    def sections(self):
        return [attrs["id"] for tag, attrs in self.elements if tag == "section"]

    @property
    def text(self):
        return " ".join("".join(self.visible).split())


def page_of(run_dir, records=FULL, tail=""):
    return Page(write_report(write_run(run_dir, records, tail)))


def unpack(packed):
    if "f32" in packed:
        return np.frombuffer(base64.b64decode(packed["f32"]), "<f4").reshape(packed["shape"])
    codes = np.frombuffer(base64.b64decode(packed["u16"]), "<u2").reshape(packed["shape"])
    return np.where(codes == 65535, np.nan, packed["low"] + codes * packed["unit"])


def test_full_run_has_every_section_and_a_place_for_every_chart(tmp_path):
    page = page_of(tmp_path)
    assert page.sections == [*SECTIONS, "details"]
    places = {attrs["id"] for tag, attrs in page.elements if tag == "div" and attrs.get("class") == "plot"}
    assert places == set(page.payload["charts"])
    assert {chart["kind"] for chart in page.payload["charts"].values()} == {
        "lines",
        "layers",
        "frames",
        "experts",
        "domains",
    }


def test_headline_numbers(tmp_path):
    text = page_of(tmp_path).text
    for fact in (
        "Training loss2.000from 7.000 at step 1",
        "Validation loss3.000from 6.000 at step 3",
        "Worst MaxVio0.50layer 1",
        "Dead experts2of 8 at step 6",
        "Steps6of 6",
        "Tokens6.14 k6,144",
        "Wall time13 s",
        "2 layers × 4 experts, top-2",
        "sequence_wise 0.0001 per sequence",
        "sign rule",
        "finished",
    ):
        assert fact in text


def test_data_reach_the_page(tmp_path):
    payload = page_of(tmp_path).payload
    assert payload["layers"] == ["layer 1", "layer 2"]
    assert payload["tables"]["load"]["x"] == [1, 2, 3, 4, 5, 6]
    load = unpack(payload["tables"]["load"]["values"])
    np.testing.assert_allclose(load[-1, 1], [1.5, 1.5, 1.0, 0.0], atol=1e-4)
    domains = unpack(payload["tables"]["domains"]["values"])
    np.testing.assert_allclose(domains[0, 0], [2.0, 1.0, 1.0, 0.0], atol=1e-4)
    objective = payload["charts"]["objectives-0"]
    np.testing.assert_allclose(unpack(objective["values"]), 1.1, rtol=1e-6)
    np.testing.assert_allclose(unpack(objective["extra"]), 1e-4, rtol=1e-6)


def test_loads_nothing_from_anywhere(tmp_path):
    page = page_of(tmp_path)
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:,")), f"<{tag} {name}={attrs[name]}>"
    policy = [
        attrs["content"]
        for tag, attrs in page.elements
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policy) == 1
    assert policy[0].startswith("default-src 'none'")
    assert "http" not in policy[0]
    assert "connect-src" not in policy[0]
    own = [text for _, text in page.scripts if "plotly.js v" not in text[:200]]
    assert len(own) == len(page.scripts) - 1 == 3
    assert not any(re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", text) for text in own)


def test_names_are_escaped(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    records = [
        start(model=evil, layers=[evil + "0", evil + "1"], domains=[evil], bias_rule=evil, time=evil),
        step(1),
        validation(1, domain_load={evil: [[1.0] * 4] * 2}, domain_loss={evil: 1.0}),
        END | {"status": evil},
    ]
    (tmp_path / "config.json").write_text(json.dumps({evil: evil}))
    (tmp_path / "environment.json").write_text(evil)
    page = page_of(tmp_path, records)
    assert sum(tag == "script" for tag, _ in page.elements) == 4
    assert not any(tag == "img" for tag, _ in page.elements)
    assert page.payload["tables"]["domains"]["domains"] == [evil]
    assert page.text.count("<script>alert(1)") >= 4


@pytest.mark.parametrize(
    ("records", "present", "reason"),
    [
        ([start(), step(1)], set(SECTIONS) - {"domains"}, "No validation was logged yet"),
        ([start(), step(1, balance={}), step(2, balance=None)],
         {"loss", "optimiser"}, "No expert load was logged"),
        ([step(1, loss=None)], set(SECTIONS) - {"loss", "domains"}, "No loss has been logged yet"),
        ([validation(1)], {"loss", "domains"}, "No balance metrics were logged"),
        ([start(bias_rule=None), step(1, balance={"maxvio": [0.1, 0.2], "bias_max": None})],
         {"loss", "balance", "optimiser"}, "did not balance by expert bias"),
    ],
)  # fmt: skip
def test_partial_run_leaves_sections_out_and_says_why(tmp_path, records, present, reason):
    page = page_of(tmp_path, records)
    assert set(page.sections) == present | {"details"}
    assert reason in page.text
    assert "not ended: still running, or killed" in page.text


def test_steps_without_moe_metrics_fall_back_to_the_newest_that_has_them(tmp_path):
    records = [start(), step(1), step(2, balance={"load": None, "maxvio": [None, None]}), step(3, balance={})]
    page = page_of(tmp_path, records)
    assert "Dead experts2of 8 at step 1" in page.text
    assert page.payload["charts"]["balance-0"]["x"] == [1]


def test_later_record_of_a_step_wins(tmp_path):
    log = read_run_log(write_run(tmp_path, [start(), step(1), step(2), step(2, loss=99.0), step(3)]))
    assert list(log.steps) == [1, 2, 3]
    assert log.steps[2]["loss"] == 99.0


def test_resume_forgets_what_the_earlier_attempt_logged_beyond_it(tmp_path):
    first = [start(), *map(step, range(1, 7)), validation(2), validation(6), END | {"status": "interrupted"}]
    resumed = [start(), step(4, loss=0.5, seconds=2.0, balance={"load": [[4.0, 0.0, 0.0, 0.0]] * 2})]
    write_run(tmp_path, first + resumed)
    log = read_run_log(tmp_path)
    assert list(log.steps) == [1, 2, 3, 4]
    assert log.steps[4]["loss"] == 0.5
    assert list(log.validations) == [2]
    assert log.end is None
    steps, load = log.load.stacked()
    assert steps == [1, 2, 3, 4]
    assert load[-1, 0, 0] == 4.0
    # 6 seconds to step 3, and 2 on a clock that started again.
    assert wall_seconds(log) == 8.0
    assert "Resumed once" in Page(write_report(tmp_path)).text


def test_last_line_cut_short_is_no_fault(tmp_path):
    for cut in (1, 40, len(json.dumps(step(2))) - 1):
        page = page_of(tmp_path, [start(), step(1)], tail=json.dumps(step(2))[:cut])
        assert "skipped" not in page.text
        assert page.payload["charts"]["loss-0"]["lines"][0]["x"] == [1]


def test_corrupt_middle_line_is_named(tmp_path):
    write_run(tmp_path, [start(), step(1), '{"event": "step", "ste\n', step(3)])
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 3: expected one JSON object, given .*ste"):
        page = Page(write_report(tmp_path))
    assert "metrics.jsonl line 3 is not a complete record and was skipped." in page.text
    assert page.payload["charts"]["loss-0"]["lines"][0]["x"] == [1, 3]


def test_start_record_behind_half_a_line_is_found(tmp_path):
    write_run(tmp_path, [start(), step(1), json.dumps(step(2))[:30], start(model="resumed"), step(2)])
    with pytest.warns(UserWarning, match="line 3"):
        log = read_run_log(tmp_path)
    assert (log.num_starts, log.start["model"], list(log.steps)) == (2, "resumed", [1, 2])


def test_null_loss_is_shown_as_nan_with_the_last_finite_value(tmp_path):
    page = page_of(tmp_path, [start(), step(1), step(2), step(3, loss=None)])
    assert "NaNlast finite: 6.000 at step 2" in page.text
    assert page.payload["charts"]["loss-0"]["lines"][0]["y"] == [7.0, 6.0, None]


def test_errors_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl; give the directory of one run"):
        write_report(tmp_path)
    write_run(tmp_path, [start()])
    with pytest.raises(ValueError, match="no step and no validation record yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_report(write_run(tmp_path, FULL))
    assert path == tmp_path / "report.html"
    before = path.read_text()

    def fail(*_):
        raise OSError("disk is gone")

    monkeypatch.setattr("trimtab.train.report.os.replace", fail)
    write_run(tmp_path, [start(), step(1)])
    with pytest.raises(OSError, match="disk is gone"):
        write_report(tmp_path)
    assert path.read_text() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_config_and_environment_are_folded_in(tmp_path):
    (tmp_path / "config.json").write_text('{"router": {"top_k": 2}}')
    (tmp_path / "environment.json").write_text("not json")
    page = page_of(tmp_path)
    assert 'Configuration{ "router": { "top_k": 2 } }' in page.text
    assert "Environmentnot json" in page.text
    assert sum(tag == "details" for tag, _ in page.elements) == 3


def test_long_run_of_a_large_model_stays_small(tmp_path):
    num_layers, num_experts, num_steps = 60, 256, 3000
    log = RunLog(start=start(layers=[f"layers.{i}" for i in range(num_layers)]))
    generator = np.random.default_rng(0)
    table = generator.gamma(2.0, 0.5, (num_layers, num_experts))
    for number in range(1, num_steps + 1):
        record = step(number)
        record["balance"] = {
            name: generator.random(num_layers).astype(np.float32)
            for name in record["balance"]
            if name not in ("load", "bias", "losses")
        }
        log.steps[number] = record
        log.load.add(number, table)
        log.bias.add(number, table)
    page = render_report(log)
    assert len(page) < 25_000_000
    path = tmp_path / "report.html"
    path.write_text(page)
    payload = Page(path).payload
    frames = payload["tables"]["load"]["x"]
    assert len(frames) * table.size <= MAX_CELLS
    assert (frames[0], frames[-1]) == (1, num_steps)
    curve = payload["charts"]["balance-0"]["x"]
    assert (curve[0], curve[-1], len(curve) <= 400) == (1, num_steps, True)
    assert len(payload["charts"]["loss-0"]["lines"][0]["x"]) <= 1200


def test_frame_store_is_bounded_even_and_keeps_the_newest():
    store = FrameStore()
    for number in range(1, 2001):
        store.add(number, np.full((2, 4), float(number)))
        assert len(store._frames) <= 2 * MAX_FRAMES
    steps, frames = store.stacked()
    assert len(steps) <= MAX_FRAMES
    assert (steps[0], steps[-1]) == (1, 2000)
    np.testing.assert_array_equal(frames[:, 0, 0], steps)
    gaps = np.diff(steps)
    assert gaps.max() <= 2 * 2000 / MAX_FRAMES


def test_thinning_keeps_ends_and_spikes():
    values = np.sin(np.arange(10_000) / 500)
    values[4321], values[7777], values[100] = 50.0, -50.0, np.nan
    kept = extreme_indices(values, 100)
    assert len(kept) <= 100
    assert {0, 4321, 7777, 9999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(extreme_indices(values[:100], 100), np.arange(100))


def test_packing_keeps_16_bits_and_gaps():
    values = np.array([[0.0, 1.0, np.nan], [32.0, 0.25, 1e-3]])
    unpacked = unpack(pack_uint16(values))
    np.testing.assert_allclose(unpacked, values, atol=32 / 65534 / 2 * 1.001)
    assert unpacked[0, 0] == 0.0  # a dead expert stays exactly dead
    assert math.isnan(unpacked[0, 2])
    np.testing.assert_array_equal(unpack(pack_uint16(np.full((2, 2), 3.0))), 3.0)


def test_moving_average_of_a_line_is_the_line_and_skips_gaps():
    values = np.arange(160.0)
    np.testing.assert_allclose(smoothed(values)[5:-5], values[5:-5])
    values[50] = np.nan
    assert np.isfinite(smoothed(values)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(smoothed(np.full(5, np.nan))).all()


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["model.layers.1.mlp.gate", "model.layers.12.mlp.gate"], ["layer 1", "layer 12"]),
        (["model.layers.3.mlp.gate"], ["layer 3"]),
        (["encoder.0.gate", "decoder.0.gate"], ["encoder", "decoder"]),
        (["model.layers.1.gate", "model.mtp.0.gate"], ["layers.1", "mtp.0"]),
        (["router"], ["router"]),
        ([], []),
    ],
)
def test_layer_labels(names, labels):
    assert layer_labels(names) == labels
