"""The trainer on several ranks: the same run as in one process, its files, and going on under another plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.pool import Ranks
from tests.train.tiny import tiny
from trimtab import SequenceWise, Sign, ZLoss
from trimtab.train.config import TrainConfig
from trimtab.train.model import Balancing
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.trainer import Trainer, TrainingError

STEPS = 3
# No loss of step scope: what its backward knows depends on how a plan divides the step into forwards.
BALANCING = Balancing(
    objectives=(SequenceWise.Config(coef=1e-2, unit="document"), ZLoss.Config(coef=1e-3)),
    bias=Sign.Config(speed=1e-2),
)
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp": (2, {}),
    "hsdp": (4, {"data_parallel_replicate_degree": 2}),
    "tp": (2, {"tensor_parallel_degree": 2}),
    "cp-ep": (2, {"context_parallel_degree": 2, "expert_parallel_degree": 2}),
    "tp-ep-etp": (
        4,
        {"tensor_parallel_degree": 2, "expert_tensor_parallel_degree": 2, "expert_parallel_degree": 2},
    ),
    "pp": (2, {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2}),
    "pp-fsdp-ep": (
        4,
        {
            "pipeline_parallel_degree": 2,
            "pipeline_parallel_microbatch_size": 2,
            "pipeline_parallel_schedule": "GPipe",
            "expert_parallel_degree": 2,
        },
    ),
}


def config_of(folder: Path, plan: dict[str, Any], **sections: Any) -> TrainConfig:
    """Six steps of 8 rows, saved every third, on documents that ranks cut; 4 layers."""
    sections.setdefault("training", {"steps": STEPS, "global_batch_size": 8})
    sections.setdefault("data", {"microbatch_size": 2})
    # AdamW's first step is the sign of a gradient, and rounding decides the sign of those that vanish.
    sections.setdefault("optimizer", {"eps": 1e-2})
    config = tiny(
        folder, balancing=BALANCING, metrics={"log_interval": 1}, checkpoint={"interval": STEPS}, **sections
    )
    model = replace(config.model, num_layers=4)  # type: ignore[call-arg]
    return replace(config, model=model, parallelism=ParallelismConfig(**plan), run_name="run")


def run(config: TrainConfig) -> dict[str, Any]:
    """Train to the end on this rank."""
    result = Trainer(config, name="deepseek_v3/deepseek_v3_tiny", quiet=True).train()
    return {"status": result.status, "step": result.step, "report": result.report}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == "step"]


def assert_same(have: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """Loss, gradient norm, load and losses of each step; rounding may tip few assignments."""
    assert [record["step"] for record in have] == [record["step"] for record in want]
    for mine, other in zip(have, want, strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), (mine["step"], name)
        assert mine["num_tokens"] == other["num_tokens"]
        assert mine["balance"]["layers"] == other["balance"]["layers"]
        assert mine["balance"]["num_tokens"] == other["balance"]["num_tokens"]
        for name, values in other["balance"]["losses"].items():
            assert mine["balance"]["losses"][name]["value"] == pytest.approx(values["value"], rel=1e-3), name
    assert have[0]["balance"]["load"] == want[0]["balance"]["load"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    run(config_of(folder, {}))
    return steps_of(folder)


@pytest.mark.parametrize("name", PLANS)
def test_the_run_is_that_of_one_process(
    ranks: Ranks, tmp_path: Path, one_process: list[dict[str, Any]], name: str
) -> None:
    world_size, plan = PLANS[name]
    results = ranks.run(run, world_size, config_of(tmp_path, plan))
    assert all((r["status"], r["step"], r["report"]) == ("finished", STEPS, None) for r in results)
    assert_same(steps_of(tmp_path), one_process)


def test_validation_and_report_are_of_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"validation": {"enable": True, "interval": STEPS}}
    found = []
    for name, plan in (("pp-fsdp-ep", PLANS["pp-fsdp-ep"]), ("one", (1, {}))):
        config = config_of(tmp_path / name, plan[1], **sections)
        config = replace(config, metrics=replace(config.metrics, report=True))
        if plan[0] == 1:
            run(config)
        else:
            results = ranks.run(run, plan[0], config)
            # The first rank writes, and knows where.
            assert [r["report"] is not None for r in results] == [True, False, False, False]
        lines = (tmp_path / name / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
        found.append(next(r for line in lines if (r := json.loads(line))["event"] == "validation"))
    have, want = found
    assert have["loss"] == pytest.approx(want["loss"], rel=1e-4)
    assert have["domain_loss"] == pytest.approx(want["domain_loss"], rel=1e-4)
    for domain, load in want["domain_load"].items():
        assert [sum(layer) for layer in have["domain_load"][domain]] == [sum(layer) for layer in load]


def test_a_run_goes_on_under_another_plan(ranks: Ranks, tmp_path: Path) -> None:
    longer = {"training": {"steps": 2 * STEPS, "global_batch_size": 8}, "lr_scheduler": {"decay_steps": 0}}
    shorter = {"training": {"steps": STEPS, "global_batch_size": 8}, "lr_scheduler": {"decay_steps": 0}}
    run(config_of(tmp_path / "one", {}, **longer))
    world_size, plan = PLANS["tp-ep-etp"]
    ranks.run(run, world_size, config_of(tmp_path / "moved", plan, **shorter))
    world_size, plan = PLANS["pp-fsdp-ep"]
    config = config_of(tmp_path / "moved", plan, **longer)
    # The number of steps is not the saved one.
    config = replace(config, checkpoint=replace(config.checkpoint, allow_changes=True))
    ranks.run(run, world_size, config)
    assert_same(steps_of(tmp_path / "moved"), steps_of(tmp_path / "one"))


def fail(config: TrainConfig) -> str:
    try:
        run(config)
    except TrainingError as error:
        return str(error)
    return "finished"


def test_a_loss_that_is_not_finite_stops_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    config = config_of(tmp_path, PLANS["pp"][1])
    config = replace(config, optimizer=replace(config.optimizer, lr=1e30, eps=1e-8))
    errors = ranks.run(fail, 2, config)
    assert all("are not finite" in error for error in errors), errors
