"""The benchmarks of specialisation and of parallel plans at tiny sizes; nothing is asserted about time."""

import json

import pytest
import torch

from benchmarks import (
    common,
    parallel_plans,
    parallel_report,
    parallel_worker,
    specialization,
)
from benchmarks.parallel_report import TARGET_PLAN
from benchmarks.parallel_worker import ARMS, OFF, OFF_AGAIN, QUICK, Arm, Plan
from trimtab.parallel.mesh import Groups
from trimtab.train.traffic import Collective


@pytest.fixture(autouse=True)
def one_thread():
    """All benchmarks set the number of threads, and these sizes want one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (common, parallel_plans, specialization):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(common.write_section, "__defaults__", (tmp_path / "RESULTS.md",))
    return tmp_path


TINY_RUN = specialization.Settings(
    steps=2,
    num_microbatches=2,
    sequences=4,
    seq_len=32,
    layers=1,
    dim=8,
    heads=2,
    hidden_dim=8,
    num_experts=4,
    source="fixed",
    validation_fraction=0.1,
)


def test_specialization_runs_and_resumes(results, monkeypatch, capsys):
    monkeypatch.setattr(specialization, "Settings", lambda steps: TINY_RUN)
    monkeypatch.setattr(specialization.Settings, "steps", 2, raising=False)
    trained = []
    train = specialization.train
    monkeypatch.setattr(
        specialization, "train", lambda name, seed, s: trained.append(name) or train(name, seed, s, log=False)
    )
    command = ["--seeds", "0", "--folder", str(results / "runs")]
    arms = ["micro", "exact", "bias"]
    specialization.main([*command, "--arms", *arms, "--write"])
    assert trained == arms
    text = (results / "RESULTS.md").read_text()
    assert "MI micro < exact" in text
    assert all(specialization.ARMS[name].title in text for name in arms)
    run = json.loads((results / "runs" / "exact-seed0.json").read_text())
    assert run["count_error"] == 0.0
    assert 0 <= run["validation"]["mutual_information"] <= 2
    assert run["validation"]["bytes"] > 500
    specialization.main([*command, "--arms", "micro", "exact"])
    assert trained == arms  # nothing was trained again
    (results / "runs" / "micro-seed0.json").unlink()
    specialization.main([*command, "--arms", "micro", "exact"])
    assert trained == [*arms, "micro"]
    assert "exact" in capsys.readouterr().out


ONE_PROCESS = Plan(name="one process", ranks=1, degrees={}, rounds=2)


def test_off_is_off():
    hooked = {}
    for name in (OFF, "all"):
        arm = Arm(name, ONE_PROCESS, QUICK, None)
        modules = list(arm.engine.modules[0].modules())
        hooked[name] = sum(bool(module._forward_hooks or module._forward_pre_hooks) for module in modules)
        assert bool(arm.engine.balancers) == (name != OFF)
        assert any("trimtab" in attribute for module in modules for attribute in vars(module)) == (
            name != OFF
        )
    assert hooked == {OFF: 0, "all": QUICK.layers + 1}


def test_parallel_plans_write_their_results(results, capsys):
    report = parallel_plans.main(["--quick", "--write"])
    one, target, pipeline = report["results"]
    assert (one["ranks"], target["plan"], pipeline["microbatches"]) == (1, TARGET_PLAN, 4)
    for result in report["results"]:
        assert list(result["arms"]) == list(ARMS)
        assert all(
            len(arm["wall"]) == len(arm["cpu"]) == result["rounds"] == 2 for arm in result["arms"].values()
        )
    # One sum of the counts of both layers: maps * experts + 3 sizes, of 8 bytes each.
    extra = {name: parallel_report.summary(target, name) for name in ARMS}
    for name, num_maps in ((OFF_AGAIN, None), ("sequence + bias", 2), ("global + z + bias", 1), ("all", 2)):
        want = 0 if num_maps is None else 2 * (num_maps * 8 + 3) * 8
        assert (extra[name]["collectives"], extra[name]["bytes"]) == (want > 0, want)
    assert extra["all, measured"]["collectives"] == 3
    assert json.loads((results / "parallel_plans.json").read_text())["results"] == report["results"]
    assert "plotly" in (results / "parallel_plans.html").read_text()
    text = (results / "RESULTS.md").read_text()
    assert all(f"| {result['plan']} | {result['ranks']} |" in text for result in report["results"])
    assert "Target: at most 3%" in text
    assert "global + z + bias" in capsys.readouterr().out


def test_arms_that_run_other_models_stop_the_benchmark(monkeypatch):
    step = Arm.step
    monkeypatch.setattr(Arm, "step", lambda arm: step(arm) + (arm.name == "all"))
    with pytest.raises(RuntimeError, match="do not run the same model"):
        parallel_worker.measure(ONE_PROCESS, QUICK, Groups())


def test_a_wrong_prediction_of_collectives_stops_the_benchmark(monkeypatch):
    wrong = [Collective("world", "all_reduce", "nothing", 1, 8)]
    monkeypatch.setattr(parallel_worker, "step_traffic", lambda engine: wrong)
    with pytest.raises(RuntimeError, match="step_traffic says"):
        parallel_worker.measure(ONE_PROCESS, QUICK, Groups())


@pytest.mark.parametrize(("extra", "outcome"), [(0.01, "met"), (0.06, "missed"), (0.03, "not decided")])
def test_the_verdict_says_what_the_run_can_tell(extra, outcome):
    rounds = 20
    off = {"wall": [1.0] * rounds}
    own = {"wall": [1 + extra + 0.001 * (i - rounds / 2) for i in range(rounds)]}
    result = {"plan": TARGET_PLAN, "rounds": rounds, "arms": {OFF: off, OFF_AGAIN: off, "all": own}}
    assert f"**{outcome}**" in parallel_report.verdict({"results": [result]})
    assert "nothing is said" in parallel_report.verdict({"results": []})


def test_an_interval_of_the_median():
    # The 10th and the 21st of 30 hold the median with a probability of 0.957.
    assert parallel_report.interval(range(1, 31)) == (10, 21)
    assert parallel_report.interval([3, 1, 2]) == (1, 3)
