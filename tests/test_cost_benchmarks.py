"""The benchmarks of what balancing costs: their instruments, and all of them at tiny sizes. No time is asserted."""

import json
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import budget, common, gpu, memory, page, routing_overhead, routing_peers, timing
from benchmarks.budget import INFORMATION, MET, MISSED, UNDECIDED, UNMEASURED, Cell, Promise
from benchmarks.common import ROOT
from benchmarks.instruments import Line, LiveBytes, OpCounter, count_ops, held_bytes
from benchmarks.routing_nets import Case
from benchmarks.routing_variants import OBJECTIVES, build_variants
from benchmarks.timing import Arm, Times
from trimtab import ops, score_node

TINY = {"tokens": 64, "sequences": 4, "num_experts": 16, "top_k": 2, "layers": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """All benchmarks set the number of threads, and these sizes want one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_megatron(monkeypatch):
    """Importing it takes seconds."""
    monkeypatch.setattr(routing_peers, "megatron_utils", lambda: None)


# -------------------------------------------------------------------------------- instruments


@torch.library.custom_op("trimtab_test::two_operators", mutates_args=())
def two_operators(x: torch.Tensor) -> torch.Tensor:
    """Two operators in one."""
    return x.exp().sin()


def test_operators_are_counted_without_views_and_inside_custom_ones():
    x = torch.randn(4, 6, requires_grad=True)
    # exp and sum; in backward the product by exp, its gradient expanded without a copy, and the ones to begin with
    assert count_ops(lambda: x.view(6, 4).t().exp().sum().backward()) == 4
    assert count_ops(lambda: two_operators(x.detach())) == 2
    assert count_ops(lambda: (x.new_empty(3), torch.empty_like(x))) == 0


def test_counting_does_not_change_what_eager_routers_call():
    watched = []
    with OpCounter():
        watched.append(ops._is_watched())
    count_ops(lambda: watched.append(ops._is_watched()))
    assert watched == [True, False]


def test_a_line_through_counts():
    line = Line.fit((1, 2, 4, 8), (7 + 3, 7 + 6, 7 + 12, 7 + 24))
    assert (line.fixed, line.per_layer, line.error) == (7.0, 3.0, 0.0)
    less = line - Line.fit((1, 2, 4), (2, 4, 8))
    assert (less.fixed, less.per_layer) == (7.0, 1.0)
    assert Line.fit((1, 2, 4, 8), (1, 2, 4, 9)).error > 0.1


def test_held_bytes_are_distinct_storages_that_are_not_excluded():
    x = torch.randn(10, 8, requires_grad=True)

    def held(forward, *others):
        return held_bytes(lambda: forward().sum(), lambda loss: loss.backward(), others)

    assert held(lambda: x.exp()) == 10 * 8 * 4  # its result
    assert held(lambda: x.sin()) == 10 * 8 * 4  # its input
    assert held(lambda: x.sin(), x) == 0
    assert held(lambda: x.exp() * x.exp(), x) == 2 * 10 * 8 * 4
    assert held(lambda: x.exp().view(-1).exp().exp()) == 3 * 10 * 8 * 4
    assert held(lambda: x + 1) == 0


def test_what_hooks_of_nodes_hold_is_held_though_no_operator_made_it():
    x = torch.randn(10, 8, requires_grad=True)

    def forward(held):
        y = x + 1
        y.grad_fn.register_prehook(partial(_given_nothing, held()))
        return y.sum()

    def held(what, *others):
        return held_bytes(lambda: forward(what), lambda loss: loss.backward(), others)

    assert held(lambda: None) == 0
    assert held(x.detach) == 10 * 8 * 4
    assert held(lambda: x.detach()[:, :1]) == 10 * 8 * 4  # of its storage
    assert held(x.detach, x) == 0
    assert held(x.detach().exp) == 10 * 8 * 4


def _given_nothing(kept, grads):
    """A hook that holds something."""


def test_live_bytes_and_their_peak():
    x = torch.randn(1000)
    with LiveBytes() as live:
        first = x.exp()
        view = first.view(10, 100)
        x.add_(1)  # nothing new
        assert live.now == 4000
        second = view.sin()
        del first, view
        assert (live.now, live.peak) == (4000, 8000)
        del second
    assert (live.now, live.peak) == (0, 8000)


def test_rounds_are_interleaved_and_end_in_time(monkeypatch):
    ran = []
    now = 0.0

    def take(name, seconds):
        nonlocal now
        ran.append(name)
        now += seconds

    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: now)
    monkeypatch.setitem(timing.CLOCKS, "cpu", lambda: 2 * now)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    arms = [
        Arm(name="base", run=lambda: take("base", 2.0), baseline=True),
        Arm(name="own", run=lambda: take("own", 3.0), clean=lambda: take("clean", 100.0)),
    ]
    times = timing.measure(arms, rounds=50, seconds=60.0, rng=random.Random(0))
    # Two rounds to warm up and five to measure, however long they take; 3 runs of the baseline in each.
    assert (ran.count("base"), ran.count("own"), ran.count("clean")) == (3 * 7, 7, 7)
    assert (len(times["base"].runs["wall"]), len(times["base"].rounds["wall"])) == (15, 5)
    one = timing.compare(times["own"], times["base"], "cpu", layers=2)
    assert (one["ratio"], one["low"], one["high"], one["minima"], one["rounds"]) == (1.5, 1.5, 1.5, 1.5, 5)
    assert (one["ms"], one["extra_ms"]) == (3000.0, 1000.0)
    orders = {tuple(ran[i : i + 5]) for i in range(0, 35, 5)}
    assert len(orders) > 1


def test_ratios_are_of_the_same_round():
    own, base = Times(), Times()
    for round_ in (1.0, 10.0, 2.0):  # a machine that is slow for a while
        base.rounds["cpu"].append(round_)
        own.rounds["cpu"].append(1.1 * round_)
    own.runs["cpu"], base.runs["cpu"] = own.rounds["cpu"], base.rounds["cpu"]
    assert timing.compare(own, base, "cpu")["ratio"] == 1.1


# -------------------------------------------------------------------------------- routing


@pytest.mark.parametrize(("score", "gate_dim"), [("softmax", 8), ("sigmoid", 0)])
def test_every_variant_has_the_reference_gradient(score, gate_dim):
    errors = routing_overhead.check_case(Case(score=score, gate_dim=gate_dim, **TINY))
    assert {name.split(": ")[1] for name in errors} == set(OBJECTIVES) - {"count only"}
    families = {name.split(": ")[0].split(",")[0] for name in errors}
    assert {"trimtab hook", "trimtab fused", "trimtab.Router with hook", "formula + autograd"} <= families
    assert max(errors.values()) < 1e-5


def test_a_wrong_gradient_stops_the_benchmark(monkeypatch, without_megatron):
    monkeypatch.setattr("benchmarks.routing_variants.COEF", 0.02)
    with pytest.raises(RuntimeError, match="formula"):
        routing_overhead.check_case(Case(score="softmax", **TINY))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_variants_of_leaf_logits_run_what_they_say(score, without_megatron):
    case = Case(score=score, **TINY)
    data = routing_overhead.make_data(case)
    weights = {}
    for variant in build_variants(case):
        routers = variant.net.routers
        assert not any(hasattr(router, "weight") for router in routers)
        with torch.no_grad():
            logits_TE = routers[0](data.inputs[0])[0]
        assert logits_TE.data_ptr() == data.inputs[0].data_ptr()  # neither multiplied nor copied
        weights[variant.name] = variant.net(data.input_ids, data.inputs)[0]
        state = getattr(routers[0], "_trimtab_router", None)
        assert (state is not None) == (variant.balancer is not None)
        if state is not None:
            assert state.fused == variant.family.startswith("trimtab fused")
    for name, some in weights.items():
        for have, want in zip(some, weights["routing: none"], strict=True):
            torch.testing.assert_close(have, want, msg=name)


def test_held_memory(without_megatron):
    case = Case(score="softmax", gate_dim=8, **TINY)
    data = routing_overhead.make_data(case)
    held = {v.name: routing_overhead.held_units(v, case, data) for v in build_variants(case)}
    base = held["routing: none"]
    assert base > 1  # the softmax, at least
    small = 2 * case.top_k / case.num_experts + 8 * 4 * 16 * 8 / case.unit  # ids, and counts by sequence
    assert held["trimtab hook, keep=input: all"] - base < small
    assert held["trimtab hook, keep=logits: all"] - base >= 1
    assert held["trimtab fused, keep=input: all"] < 2 * small
    assert 1 <= held["trimtab fused, keep=logits: all"] < 1 + 2 * small
    assert held["formula + autograd: z"] - base >= 1


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_hook_is_measured_at_the_routers_own_scores(score, monkeypatch, without_megatron):
    case = Case(score=score, **TINY)
    data = routing_overhead.make_data(case)
    attached, attach = [], score_node.ScoreGradient.attach
    monkeypatch.setattr(
        score_node.ScoreGradient, "attach", lambda self, node: [attached.append(node), attach(self, node)]
    )
    held = {}
    for variant in build_variants(case):
        attached.clear()
        held[variant.name] = routing_overhead.held_units(variant, case, data)
        adds = variant.family == "trimtab hook" and variant.objective != "count only"
        assert len(attached) == (case.layers if adds else 0), variant.name
    # A z-loss needs logits, which a softmax tells up to a constant by token, and a sigmoid not.
    more = held["trimtab hook: sequence + z"] - held["trimtab hook: sequence"]
    assert int(more) == (score == "sigmoid")


def test_operators_by_layer_and_by_microbatch(without_megatron):
    lines = routing_overhead.fit_operators(Case(score="softmax", **TINY))
    # Softmax, top-k, sum, division; backward: 10.
    assert lines["routing: alone"] == {"fixed": 0.0, "per_layer": 14.0, "error": 0.0}
    assert lines["routing again: none"] == {"fixed": 0.0, "per_layer": 0.0, "error": 0.0}
    for family in ("trimtab hook", "trimtab fused"):
        more = lines[f"{family}: one more balance loss"]
        both = lines[f"{family}: all"], lines[f"{family}: sequence + z"]
        for key in ("fixed", "per_layer"):
            assert more[key] == pytest.approx((both[0][key] - both[1][key]) / 3, abs=1e-5)
        # What the budget promises, whatever else is on.
        assert more["per_layer"] <= budget.OPERATORS


def test_compiled_variants_and_those_that_cannot_be(monkeypatch, without_megatron):
    case = Case(score="softmax", **TINY)
    wanted = ("routing: none", "trimtab hook: sequence + z", "trimtab fused: sequence + z", "routing: other")
    some = [v for v in build_variants(case) if v.name in wanted]
    some.append(replace(some[0], objective="other"))  # not among those to compile
    monkeypatch.setattr(routing_overhead, "build_variants", lambda case: some)
    monkeypatch.setattr(routing_overhead, "check_case", lambda case: {})
    monkeypatch.setattr(routing_overhead, "step_ms", lambda *args: 0.0)
    result = routing_overhead.run_case(case, rounds=1, seconds=1.0, rng=random.Random(0), compiler="eager")
    assert [row["family"] for row in result["rows"]] == ["routing", "trimtab hook", "trimtab fused"]
    data = routing_overhead.make_data(case)
    _, skipped = routing_overhead.compiled(some, data, "no-such-backend")
    assert len(skipped) == 3
    monkeypatch.setattr(routing_overhead, "_compile", lambda net, compiler: _twice(net))
    kept, skipped = routing_overhead.compiled(some, data, "eager")
    assert [variant.name for variant in kept] == ["routing: none"]  # without losses only weights count
    assert all("WRONG" in reason for reason in skipped.values())
    assert len(skipped) == 2


def _twice(net):
    """Other gradients than those of the net."""
    return lambda input_ids, inputs: net(input_ids, [2 * x for x in inputs])


# -------------------------------------------------------------------------------- budget and page


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(1.0, 1.05, MET), (1.051, 1.06, MISSED), (1.04, 1.06, UNDECIDED)]
)
def test_the_outcome_says_what_the_run_can_tell(low, high, outcome):
    cell = Cell(value=(low + high) / 2, low=low, high=high, limit=1.05)
    assert cell.outcome == outcome
    good = Cell(value=1.0, low=1.0, high=1.0, limit=1.05)
    assert Promise(what="x", limit=1.05, cells={"E=8": (good, cell), "E=16": (good,)}).outcome == outcome
    assert Promise(what="x", limit=1.05, cells={}).outcome == UNMEASURED


def test_the_budget_shows_the_worst_loss():
    report = _quick_routing()
    rows = report["results"][0]["rows"]
    for row in rows:
        ratio = 1.2 if (row["family"], row["objective"]) == ("trimtab hook", "z") else 1.0
        row["routing"]["cpu"] |= {"ratio": ratio, "low": ratio, "high": ratio}
    promises = {promise.what: promise for promise in budget.routing_promises(report)}
    assert promises["time, composable, softmax"].outcome == MISSED
    assert promises["time, fused, softmax"].outcome == MET
    text = budget.table([promises["time, composable, softmax"]])
    assert text.splitlines()[-1] == "| time, composable, softmax | 1.10 | 1.200, z | **missed** |"
    limits = sum(promise.limit is not None for promise in promises.values())
    assert budget.summary(list(promises.values())).startswith(f"Of {limits} limits ")
    assert "1 missed" in budget.summary([*promises.values()])
    report["operators"]["softmax"]["trimtab hook: one more balance loss"]["per_layer"] = 6.0
    promises = {promise.what: promise for promise in budget.routing_promises(report)}
    assert promises["operators by layer, composable, each further balance loss"].outcome == MISSED


def test_what_has_no_limit_is_information():
    report = _quick_routing()
    for row in report["results"][0]["rows"]:
        row["own"]["cpu"] = dict(row["own"]["cpu"])
        if (row["family"], row["objective"]) == ("trimtab fused", "all"):
            row["own"]["cpu"] |= {"ratio": 1.4, "low": 1.3, "high": 1.5, "extra_ms": 0.25}
    promises = budget.routing_promises(report)
    without = [promise for promise in promises if promise.limit is None]
    assert [promise.what for promise in without] == [
        "time, fused, over `trimtab.Router` alone, softmax",
        "operators by layer on a CPU, fused, the first balance loss",
        "operators by layer on a CPU, fused, each further balance loss",
    ]
    assert {promise.outcome for promise in without} == {INFORMATION}
    words = "| – | 1.400 [1.300, 1.500], +0.250 ms/layer, all | information |"
    assert budget.table(without).splitlines()[2].endswith(words)
    assert "information" not in budget.summary(promises)


def _quick_routing():
    one = {"ratio": 1.0, "low": 1.0, "high": 1.0, "minima": 1.0, "ms": 1.0, "extra_ms": 0.0, "rounds": 1}
    rows = [
        {
            "family": family,
            "objective": objective,
            "held": 1.0,
            "routing": {"cpu": dict(one)},
            "own": {"cpu": one},
        }
        for family in ("routing", "trimtab hook", "trimtab fused")
        for objective in ("sequence", "z", "all")
    ]
    line = {"fixed": 0.0, "per_layer": 1.0, "error": 0.0}
    names = ("count only", "sequence", "one more balance loss")
    lines = {f"{f}: {n}": dict(line) for f in ("trimtab hook", "trimtab fused") for n in names}
    case = {"num_experts": 8, "score": "softmax", "gate_dim": 0}
    return {
        "clock": "cpu",
        "results": [{"case": case, "compiler": None, "rows": rows}],
        "operators": {"softmax": lines},
    }


def test_everything_runs_and_is_rendered_from_the_result_files(tmp_path, without_megatron, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text(
        "before\n<!-- budget: begin -->\n<!-- budget: end -->\nafter\n"
    )
    assert command.main(["--quick", "--write", "--out", str(tmp_path)]) == 0
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    text = {path: path.read_text() for path in files}
    for name, one in command.BENCHMARKS.items():
        report = json.loads((tmp_path / "benchmarks" / "results" / f"{one.file}.json").read_text())
        assert report["quick"]
        assert report["machine"]["threads"] == 1
        section = one.report.markdown(report)
        assert section in text[tmp_path / "benchmarks" / "RESULTS.md"], name
        assert report["machine"]["date"] in section
        for image, svg in one.report.images(report).items():
            assert text[tmp_path / "docs" / "images" / f"{image}.svg"] == svg
    page_text = text[tmp_path / "docs" / "benchmarks.md"]
    assert page_text.startswith("before\n")
    assert page_text.endswith("after\n")
    assert page.block(tmp_path) in page_text
    for words in (
        "| time, fused, softmax | 1.05 |",
        "| launches by layer on CUDA's path, fused, the first balance loss, over routing alone | 5 |",
        "- MoE layer, over the same",
        "- Held by a router (tiny)",
    ):
        assert words in page_text
    assert ("No GPU was available" in page_text) == (not torch.cuda.is_available())
    assert {path.name for path in files if path.suffix == ".svg"} == {
        f"benchmark-{name}.svg" for name in ("growth", "layer-and-model", "memory", "routing")
    }
    for path in files:
        if path.suffix != ".json":
            path.write_text(path.read_text() if path.name in ("RESULTS.md", "benchmarks.md") else "")
    assert command.main(["--render", "--out", str(tmp_path)]) == 0
    assert {path: path.read_text() for path in files} == text
    assert "routing" in capsys.readouterr().out


def test_what_the_repository_shows_is_what_its_result_files_say():
    hint = "run: python -m benchmarks --render"
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for one in command.BENCHMARKS.values():
        report = json.loads((ROOT / "benchmarks" / "results" / f"{one.file}.json").read_text())
        assert not report["quick"]
        assert one.report.markdown(report) in results, f"{one.file}: {hint}"
        for image, svg in one.report.images(report).items():
            assert (ROOT / "docs" / "images" / f"{image}.svg").read_text() == svg, f"{image}: {hint}"
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert page.with_block(text, page.block(ROOT)) == text, hint


def test_a_benchmark_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    def fail(settings):
        raise RuntimeError("as a test wants it")

    monkeypatch.setattr(memory, "run", fail)
    assert command.main(["--only", "memory", "gpu", "--quick", "--write", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "benchmarks" / "results" / "gpu.json").is_file()
    assert not (tmp_path / "benchmarks" / "results" / "memory.json").exists()
    assert "failed: memory" in capsys.readouterr().err


def test_tiny_sizes_are_kept_out_of_the_repository(capsys):
    with pytest.raises(SystemExit):
        command.main(["--quick", "--write"])
    assert "give --out FOLDER" in capsys.readouterr().err


def test_sections_are_replaced_and_others_left(tmp_path):
    path = tmp_path / "RESULTS.md"
    for name, text in (("one", "first"), ("two", "second"), ("one", "third")):
        common.write_section(name, text, path)
    sections = (
        "<!-- one: begin -->\nthird\n<!-- one: end -->\n\n<!-- two: begin -->\nsecond\n<!-- two: end -->\n"
    )
    assert path.read_text() == f"# Results\n\n{sections}"


# -------------------------------------------------------------------------------- GPU


def test_what_is_timed_on_a_gpu_runs(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "TOKENS", 64)
    monkeypatch.setattr(gpu, "device_ms", lambda run: [run(i) for i in range(5)] and 1.0)
    rows = gpu.time_kernels()
    assert [row["score"] for row in rows] == ["softmax"] * 3 + ["sigmoid"] * 3
    assert all(row["ms"] == 1.0 or "Error" in row["why"] for row in rows)
    assert [row["ms"] for row in rows[:2]] == [1.0, 1.0]


def test_events_of_a_trace():
    events = [
        {"cat": "kernel", "ts": 5.0, "dur": 2.0},
        {"cat": "kernel", "ts": 1.0, "dur": 3.0},
        {"cat": "gpu_memcpy", "ts": 0.0, "dur": 1.0},
        {"name": "process_name"},
    ]
    assert gpu.intervals(events, "kernel") == [(1.0, 4.0), (5.0, 7.0)]


def test_copies_beside_kernels():
    copies = [(0.0, 4.0), (10.0, 12.0)]
    kernels = [(1.0, 2.0), (1.5, 3.0), (11.0, 20.0)]
    assert gpu.common_length(copies, kernels) == 2.0 + 1.0
    assert gpu.common_length(copies, []) == 0.0


def test_the_gpu_section_marks_the_target():
    bandwidth = 4e12
    bound = 1e3 * gpu.TRAFFIC * gpu.TOKENS * gpu.EXPERTS * 4 / bandwidth
    assert math.isclose(bound, 0.0537, rel_tol=1e-2)
    report = {
        "machine": common.machine(),
        "loads": [0.0],
        "gpu": "a card",
        "cuda": "13.0",
        "bandwidth": bandwidth,
        "bound_ms": bound,
        "kernels": [
            {"who": "trimtab's kernels, every objective", "score": "softmax", "ms": 1.2 * bound},
            {"who": "trimtab's kernels, every objective", "score": "sigmoid", "ms": 1.4 * bound},
            {"who": "Transformer Engine's", "score": "softmax", "ms": None, "why": "not installed"},
        ],
        "peak": [{"name": "fused", "held": 2**20, "peak": 2**21, "ms": 1.0}],
        "overlap": {"copies_ms": 2.0, "beside_ms": 1.5},
    }
    text = gpu.markdown(report)
    assert "| softmax | 0.064 | 1.20 | met |" in text
    assert "| sigmoid | 0.075 | 1.40 | **missed** |" in text
    assert "not installed" in text
    assert "1.50 ms of them beside kernels" in text
