"""What CUDA's path of fused routing launches, as `benchmarks.launches` counts it without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks import budget, launches, routing_report
from benchmarks.budget import UNMEASURED
from benchmarks.common import ROOT

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install -e .[triton]"
)


@needs_triton
def test_launches_on_cudas_path_are_counted_in_the_interpreter():
    report = launches.measure(quick=True)
    assert list(report["lines"]) == ["softmax", "sigmoid"]
    for score, lines in report["lines"].items():
        assert set(lines) == {launches.ALONE, launches.ROUTER_ALONE, *launches.LOSSES}
        # Softmax, top-k, sum, division; sigmoid, bias, top-k, gather, sum, division; backward: 10.
        assert lines[launches.ALONE]["per_layer"] == {"softmax": 14, "sigmoid": 16}[score]
        for name, line in lines.items():
            # One kernel forward, and one backward where there is a loss.
            one_way = name in (launches.ROUTER_ALONE, "count only")
            assert line["kernels"] == (0 if name == launches.ALONE else 1 if one_way else 2), name
            assert line["per_layer"] > line["kernels"]
        first = report["first"][score]
        assert first["device"] == lines["device"]["per_layer"] - lines[launches.ALONE]["per_layer"]
        assert set(report["further"][score]) == {"the second", "the others of all"}
    text = "\n".join(routing_report.launch_lines({"launches": report}))
    assert text.count(f"| {launches.ROUTER_ALONE} |") == 2
    assert "#### Launches: sigmoid" in text


# What `launches.launches` sees, and that an operator more is seen; prints three lines of JSON.
IN_THE_INTERPRETER = """
import json, warnings
import torch
from benchmarks import launches
from benchmarks.routing_nets import Case, backward, forward, make_data
from trimtab import route_ops

warnings.simplefilter("ignore", RuntimeWarning)
case = Case(score="sigmoid", layers=1, tokens=32, sequences=2, num_experts=16, top_k=2)
data, variant = make_data(case), launches.fused_variant(case, launches.LOSSES["all"])
grads = []
for _ in range(2):
    print(json.dumps(launches.launches(lambda: backward(forward(variant, data)))))
    variant.balancer.step()
    grads.append(data.inputs[0].grad)
    data.inputs[0].grad = None
assert route_ops.forward.__module__ == "trimtab.route_ops"  # what was replaced is back
backward(forward(variant, data))
variant.balancer.step()
torch.testing.assert_close(grads[1], data.inputs[0].grad, rtol=1e-5, atol=1e-7)
data.inputs[0].grad = None
kernel_path = launches._backward
launches._backward = lambda *args: kernel_path(*args).exp().log()
print(json.dumps(launches.launches(lambda: backward(forward(variant, data)))))
variant.balancer.step()
"""


@needs_triton
def test_a_launch_is_counted_and_an_operator_more_is_seen():
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    _, names, more = map(json.loads, done.stdout.splitlines())
    assert names["_forward_kernel"] == names["_backward_kernel"] == 1
    assert "aten.topk.default" not in names
    assert "aten.exp.default" not in names  # nor is anything counted of what the interpreter does
    assert more == names | {"aten.exp.default": 1, "aten.log.default": 1}


def test_without_triton_the_budget_says_so(monkeypatch):
    monkeypatch.setattr(launches.importlib.util, "find_spec", lambda name: None)
    report = _routing() | {"launches": launches.measure()}
    found = [promise for promise in budget.routing_promises(report) if "launches" in promise.what]
    assert [promise.outcome for promise in found] == [UNMEASURED, UNMEASURED]
    rows = budget.table(budget.routing_promises(report)).splitlines()
    assert sum(row.endswith("| 5 | Triton is not installed | not measured |") for row in rows) == 2
    assert "Not measured: Triton is not installed." in "\n".join(routing_report.launch_lines(report))


def test_counting_that_fails_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(launches.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(launches.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="interpreter failed"):
        launches.measure()


def test_the_launches_of_cudas_path_have_the_limit():
    report = _routing()
    numbers = {"softmax": {"sequence": -8.0, "batch": -7.0}, "sigmoid": {"sequence": 3.0}}
    report["launches"] = {"lines": {}, "first": numbers, "further": {"softmax": {"the second": 6.0}}}
    rows = [row for row in budget.table(budget.routing_promises(report)).splitlines() if "launches" in row]
    assert rows[0].endswith("over routing alone | 5 | +3, sigmoid, sequence | met |")
    assert rows[1].endswith("each further balance loss | 5 | +6, softmax, the second | **missed** |")
    del report["launches"]  # as result files of before have it
    rows = [row for row in budget.table(budget.routing_promises(report)).splitlines() if "launches" in row]
    assert all(row.endswith("| not counted in that run | not measured |") for row in rows)
    assert "must be made anew" in "\n".join(routing_report.launch_lines(report))


def _routing():
    row = {"family": "routing", "objective": "none", "held": 1.0}
    case = {"num_experts": 8, "score": "softmax", "gate_dim": 0}
    return {
        "clock": "cpu",
        "results": [{"case": case, "compiler": None, "rows": [row]}],
        "operators": {"softmax": {"trimtab fused: one more balance loss": {"per_layer": 0.0}}},
    }
