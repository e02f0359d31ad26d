"""Multi-token prediction under every kind of plan: gradients, loads and biases are those of one process.

In float64. The reference shifts tokens one by one, holds all microbatches in one graph, and adds every loss to it.
"""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.tensor import DTensor

from tests.parallel.cases import Case
from tests.parallel.mtp import check, expected, run_step
from tests.parallel.pool import Ranks
from tests.train.tiny import tiny
from trimtab import SequenceWise, Sign
from trimtab.models.qwen3_5 import qwen3_5_debugmodel
from trimtab.train.config import TrainConfig
from trimtab.train.logging import layers_line, scalars, step_line, validation_line
from trimtab.train.model import Balancing
from trimtab.train.mtp import MtpConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.trainer import Trainer

COMMON: dict[str, Any] = {"losses": "all", "data": "ragged", "packed": True, "checkpointing": False}


def case_of(plan: str, family: str, schedule: str = "none", **settings: Any) -> Case:
    settings = {**COMMON, "accumulation": schedule != "none", **settings}
    return Case(plan=plan, family=family, schedule=schedule, **settings)


CASES = [
    (case_of("fsdp", "glm4_moe", accumulation=True), 2),
    (case_of("ep", "deepseek_v3", checkpointing=True), 1),
    (case_of("tp", "deepseek_v3"), 2),
    (case_of("etp", "glm4_moe"), 2),
    (case_of("cp", "deepseek_v3", accumulation=True), 2),
    (case_of("cp", "qwen3_5_moe"), 2),
    (case_of("cp_tp_ep", "glm4_moe"), 1),
    (case_of("hsdp_ep", "qwen3_5_moe"), 2),
    (case_of("pp", "deepseek_v3", "1F1B"), 2),
    (case_of("pp", "qwen3_5_moe", "Interleaved1F1B"), 2),
    (case_of("pp", "deepseek_v3", "ZBVZeroBubble"), 2),
    (case_of("pp", "glm4_moe", "ZBVZeroBubble", checkpointing=True), 1),
    (case_of("pp_ep", "deepseek_v3", "1F1B"), 2),
    (case_of("pp_fsdp", "glm4_moe", "ZBVZeroBubble"), 1),
    (case_of("pp_tp", "glm4_moe", "1F1B", checkpointing=True), 1),
]


@pytest.mark.parametrize(("case", "num_depths"), CASES, ids=str)
def test_a_plan_equals_one_process(ranks: Ranks, case: Case, num_depths: int) -> None:
    want = expected(case, num_depths)
    assert sum(name.startswith("mtp.") for name in want.counts) == num_depths
    outcomes = ranks.run(run_step, case.degrees.world_size, case, num_depths, timeout=120)
    check(outcomes, want, tolerance=1e-10)


# dynamo looks at .grad of every input of a compiled layer and filters its own warning, below pytest's filter.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "case",
    [case_of("fsdp", "glm4_moe", checkpointing=True), case_of("pp", "glm4_moe", "ZBVZeroBubble")],
    ids=str,
)
def test_a_compiled_plan_equals_one_process(ranks: Ranks, case: Case) -> None:
    """To the precision of float32, in which routers, norms and softmax compute here."""
    outcomes = ranks.run(run_step, case.degrees.world_size, case, 1, False, "aot_eager", timeout=300)
    check(outcomes, expected(case, 1), tolerance=1e-5)


# ------------------------------------------------------------------ runs of the trainer

STEPS = 3
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "pp-zbv": (
        2,
        {
            "pipeline_parallel_degree": 2,
            "pipeline_parallel_microbatch_size": 2,
            "pipeline_parallel_schedule": "ZBVZeroBubble",
        },
    ),
}


def config_of(folder: Path, plan: str, **sections: Any) -> TrainConfig:
    """Three steps of 8 rows, whose coefficient falls; validation at the end; an embedding that is the head."""
    config = tiny(
        folder,
        balancing=Balancing(
            objectives=(SequenceWise.Config(coef=1e-2, unit="document"),), bias=Sign.Config(speed=1e-2)
        ),
        training={"steps": STEPS, "global_batch_size": 8},
        data={"microbatch_size": 2},
        metrics={"log_interval": 1, "tensorboard": True},
        optimizer={"eps": 1e-2},
        validation={"enable": True, "interval": STEPS},
        checkpoint={"interval": STEPS - 1},
        **sections,
    )
    mtp = MtpConfig(num_layers=2, coef=0.5, schedule=((0, 1.0), (STEPS - 1, 0.0)))
    model = replace(config.model, num_layers=4, mtp=mtp, tie_embeddings=True)  # type: ignore[call-arg]
    return replace(config, model=model, parallelism=ParallelismConfig(**RUNS[plan][1]), run_name="run")


def run(config: TrainConfig, resumed_from: str | None = None) -> dict[str, str]:
    """Train to the end on this rank, from a checkpoint if one is given; digests of its weights and biases."""
    if resumed_from is not None:
        config = replace(
            config, checkpoint=replace(config.checkpoint, resume=resumed_from, allow_changes=True)
        )
    trainer = Trainer(config, name="deepseek_v3/deepseek_v3_tiny", quiet=True)
    trainer.train()
    found = {}
    for part in trainer.engine.parts:
        for name, tensor in part.module.state_dict().items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            digest = hashlib.sha256(local.contiguous().numpy().tobytes()).hexdigest()
            assert found.setdefault(name, digest) == digest, f"replicas of {name} differ"
    return found


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == event]


@pytest.mark.parametrize("plan", RUNS)
def test_a_run_is_logged_and_resumes_to_the_bit(ranks: Ranks, tmp_path: Path, plan: str) -> None:
    world_size = RUNS[plan][0]
    whole, again = tmp_path / "whole", tmp_path / "again"
    first = ranks.run(run, world_size, config_of(whole, plan), timeout=120)
    checkpoint = whole / "runs" / "run" / "checkpoints" / f"step-{STEPS - 1:06d}"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "runs" / "run" / "checkpoints" / f"step-{STEPS:06d}")
    (again / "runs" / "run" / "checkpoints" / "latest").write_text(f"{checkpoint.name}\n")
    assert ranks.run(run, world_size, config_of(again, plan), timeout=120) == first
    steps = records(whole, "step")
    # Random weights know nothing: neither of the next token nor of those after it.
    assert steps[0]["loss"] == pytest.approx(math.log(259), abs=0.1)
    assert steps[0]["mtp_loss"] == pytest.approx(math.log(259), abs=0.1)
    assert all(record["loss"] < record["mtp_loss"] for record in steps[1:])
    (start,), (validation,) = records(whole, "start"), records(whole, "validation")
    layers = [f"model.layers.{i}.mlp.gate" for i in (1, 2, 3)]
    layers += [f"mtp.layers.{k}.mtp_block.mlp.gate" for k in (0, 1)]
    assert start["layers"] == layers
    assert all(record["balance"]["layers"] == layers for record in steps)
    assert validation["loss"] < validation["mtp_loss"] < math.log(259)
    load = validation["domain_load"]["python"]
    assert len(load) == len(layers)
    assert [sum(load_E) for load_E in load] == [sum(load[0])] * len(layers)
    assert f"mtp_loss: {steps[0]['mtp_loss']:.4f}" in step_line(steps[0])
    assert "mtp0" in layers_line(steps[0])
    assert dict(scalars(steps[0]))["train/mtp_loss"] == steps[0]["mtp_loss"]
    assert f"mtp_loss: {validation['mtp_loss']:.4f}" in validation_line(validation)
    if plan == "one":
        return
    # Another plan, and one process goes on from this one's checkpoint.
    one = tmp_path / "one"
    run(config_of(one, "one"))
    (alone,), (parameters,) = records(one, "validation"), records(one, "start")
    assert start["num_parameters"] == parameters["num_parameters"]
    for mine, other in zip(steps, records(one, "step"), strict=True):
        for name in ("loss", "mtp_loss", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), (mine["step"], name)
    assert validation["mtp_loss"] == pytest.approx(alone["mtp_loss"], rel=1e-4)
    run(config_of(tmp_path / "on", "one"), resumed_from=str(checkpoint))
    last = records(whole, "step")[-1]
    assert last["mtp_loss"] == pytest.approx(steps[-1]["mtp_loss"], rel=1e-4)


def test_the_coefficient_is_that_of_the_step(tmp_path: Path) -> None:
    """With a coefficient of 0 nothing reaches the modules' weights; the loss is measured all the same."""
    config = config_of(tmp_path, "one")
    moved = []
    for factors in ((1.0, 0.0), (0.0, 1.0)):
        mtp = MtpConfig(num_layers=1, coef=0.5, schedule=((0, factors[0]), (1, factors[1])))
        model = replace(config.model, mtp=mtp, balancing=Balancing.off())  # type: ignore[call-arg]
        trainer = Trainer(replace(config, model=model, run_name=f"run{factors[0]}"), name="test", quiet=True)
        weight = trainer.model.get_submodule("mtp.layers.0.eh_proj").weight
        for _ in range(2):
            seen: list[float] = []
            weight.register_hook(lambda grad, seen=seen: seen.append(float(grad.norm())))
            assert trainer._train_step()["mtp_loss"] > 1
            trainer.step += 1
            moved.append(sum(seen) > 0)
    assert moved == [True, False, False, True]


def test_images_are_refused() -> None:
    config = qwen3_5_debugmodel()
    with pytest.raises(ValueError, match=r"has images and model\.mtp is set: .*set model\.mtp to None"):
        replace(config, model=replace(config.model, mtp=MtpConfig()))  # type: ignore[call-arg]
