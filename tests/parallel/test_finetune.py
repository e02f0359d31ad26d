"""Fine-tuning on several ranks: gradients of what is trained against one process, in float64.

One process is trimtab's own engine, which `tests/train/test_finetune.py` compares with peft and the plain losses.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.hf_models import VOCAB
from tests.parallel.cases import NO_SCHEDULE, Case
from tests.parallel.double import double_precision
from tests.parallel.pool import mesh_of
from tests.parallel.reference import B, make_step
from tests.parallel.runner import token_batch, train_config
from tests.train.test_dry_run import WORLD, config_of, predicted, two_steps
from trimtab.integrations import lora
from trimtab.parallel.mesh import Degrees
from trimtab.train.checkpoint_state import canonical_name
from trimtab.train.dry_run import dry_run
from trimtab.train.engine import Engine
from trimtab.train.finetune import FinetuneConfig
from trimtab.train.model import Balancing
from trimtab.train.parallelism import ParallelismConfig

ALL = ("attention", "mlp", "experts")


def case_of(plan: str, family: str, *, schedule: str = NO_SCHEDULE, **options: Any) -> Case:
    settings = {"losses": "all", "data": "ragged", "accumulation": schedule != NO_SCHEDULE, "packed": True}
    return Case(
        plan=plan, family=family, schedule=schedule, **{"checkpointing": False, **settings, **options}
    )


def run_step(
    case: Case, finetune: FinetuneConfig, *, alone: bool = False, backend: str | None = None
) -> dict[str, Tensor | None]:
    """Gradients of this rank's parameters after one step, whole, by the stock model's names; None if frozen.

    Args:
        case: what to run.
        finetune: what is trained.
        alone: on one process, whatever the case's plan.
        backend: of torch.compile; None does not compile, and computes in float64 throughout.
    """
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        if backend is None:
            stack.enter_context(double_precision())
        # As after some steps: as long as B is zero, A has no gradient.
        for name in ("draw_a", "draw_b"):
            stack.enter_context(mock.patch.object(lora, name, _waves))
        config, mesh, degrees = train_config(case, backend), None, Degrees()
        if alone:
            data = replace(config.data, microbatch_size=B)
            config = replace(config, data=data, parallelism=ParallelismConfig())
        else:
            degrees = case.degrees
            mesh = mesh_of(degrees)
        config = replace(config, finetune=finetune)
        run = config.for_world(degrees.world_size)
        engine = Engine(config, run, mesh=mesh, device=torch.device("cpu"), vocab_size=VOCAB)
        rank = 0 if mesh is None else mesh.rank("data")
        batches = [token_batch(rows.part(rank, degrees.data)) for rows in make_step(case).microbatches]
        with engine.settings():
            engine.train_step(batches, engine.totals(batches))
        return dict(_grads(engine))


def waves(shape: torch.Size, number: int) -> Tensor:
    """Numbers without a pattern that a matrix product would lose."""
    places = torch.arange(shape.numel(), dtype=torch.float64)
    return 0.1 * torch.sin(0.7 * places + number).view(shape)


@torch.no_grad()
def _waves(half: nn.Module) -> None:
    """Values of adapters that are the same in every precision."""
    for number, parameter in enumerate(half.parameters(recurse=False)):
        parameter.copy_(waves(parameter.shape, number))


def _grads(engine: Engine) -> Iterator[tuple[str, Tensor | None]]:
    for part in engine.parts:
        for name, parameter in part.module.named_parameters():
            grad = parameter.grad
            if not parameter.requires_grad:
                assert grad is None, name
            elif grad is None:
                grad = torch.zeros_like(parameter)
            yield canonical_name(name), grad.full_tensor() if isinstance(grad, DTensor) else grad


@cache
def alone(case: Case, finetune: FinetuneConfig) -> dict[str, Tensor | None]:
    """The step in this process."""
    return run_step(case, finetune, alone=True)


def _plain(case: Case) -> Case:
    """One case for all that must agree."""
    return replace(case, plan="pp" if case.degrees.pp > 1 else "fsdp", checkpointing=False)


def check(
    ranks, case: Case, finetune: FinetuneConfig, *, backend: str | None = None, tolerance: float = 1e-10
):
    """Compare all gradients of a plan with those of one process."""
    expected = alone(_plain(case), finetune)
    trained = {name for name, grad in expected.items() if grad is not None}
    found: dict[str, Tensor | None] = {}
    for grads in ranks.run(run_step, case.degrees.world_size, case, finetune, backend=backend):
        assert not {n for n in found.keys() & grads if found[n] is not None and not _same(found[n], grads[n])}
        found |= grads
    assert found.keys() == expected.keys()
    assert {name for name, grad in found.items() if grad is not None} == trained
    for name in trained:
        # Sliced experts have gate and up apart.
        difference = found[name].reshape(expected[name].shape) - expected[name]
        error = difference.abs().max() / expected[name].abs().max().clamp(min=1e-30)
        assert error < tolerance, f"{name}: {error:.1e}"
        assert expected[name].abs().max() > 0, f"{name} has no gradient, so nothing was compared"


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.equal(a, b)


LORA = FinetuneConfig(method="lora", rank=2, alpha=3.0, target=ALL)
PLANS = (
    ("fsdp", "qwen3_moe", {"accumulation": True}),
    ("ep", "deepseek_v3", {"checkpointing": True}),
    ("tp", "gpt_oss", {}),
    ("cp", "mixtral", {}),
    ("ep_of_tp", "llama4", {}),
    ("fsdp_tp", "qwen3_moe", {"checkpointing": True}),
    ("cp_tp_ep", "deepseek_v3", {}),
)


@pytest.mark.parametrize(("plan", "family", "options"), PLANS)
def test_adapters_have_the_gradients_of_one_process(ranks, plan, family, options):
    check(ranks, case_of(plan, family, **options), LORA)


PIPELINES = (
    ("pp", "qwen3_moe", "1F1B", ALL),
    ("pp_ep", "deepseek_v3", "ZBVZeroBubble", ALL),
)


@pytest.mark.parametrize(("plan", "family", "schedule", "target"), PIPELINES)
def test_adapters_train_in_a_pipeline(ranks, plan, family, schedule, target):
    # What a global-batch loss sees depends on the schedule; it has its own tests.
    case = case_of(plan, family, schedule=schedule, losses="sequence")
    check(ranks, case, replace(LORA, target=target))


@pytest.mark.parametrize(
    ("plan", "family", "method", "options"),
    [
        ("fsdp_ep", "deepseek_v3", "full", {"accumulation": True}),
        ("fsdp", "mixtral", "lora", {"checkpointing": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:finetune.router is frozen")
def test_a_frozen_router_leaves_other_gradients_as_they_are(ranks, plan, family, method, options):
    """Losses of balance go through it, to what feeds it."""
    finetune = (
        FinetuneConfig(router="frozen")
        if method == "full"
        else replace(LORA, router="frozen", target=ALL[:1])
    )
    case = case_of(plan, family, **options)
    check(ranks, case, finetune)
    routers = [
        name for name, grad in alone(_plain(case), finetune).items() if ".gate." in name or ".router." in name
    ]
    assert routers
    assert all(alone(_plain(case), finetune)[name] is None for name in routers)


# Whole layers, and layers in which FSDP gathers experts.
COMPILED = (("fsdp", "mixtral", {}), ("fsdp_ep", "deepseek_v3", {"checkpointing": True}))


# dynamo looks at .grad of every input of a compiled layer and filters its own warning, below pytest's filter.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("plan", "family", "options"), COMPILED)
def test_compiled_adapters_train_the_same(ranks, plan, family, options):
    check(ranks, case_of(plan, family, **options), LORA, backend="aot_eager", tolerance=1e-5)


def test_a_dry_run_predicts_what_adapters_send_and_hold(ranks, tmp_path):
    plan = {"data_parallel_shard_degree": 4, "expert_parallel_degree": 2, "balancing": Balancing.off()}
    config = config_of(tmp_path, rows=8, micro=2, **plan)
    finetune = replace(LORA, router="frozen", target=("attention", "experts"))
    config = replace(config, finetune=finetune)
    for rank, result in enumerate(ranks.run(two_steps, WORLD, config, timeout=120)):
        found = dry_run(config, WORLD, rank=rank)
        assert found.parameters.num_own == result["parameters"]
        assert 2 * found.parameters.num_trained * found.parameters.size == result["moments"]
        guess, seen = predicted(found, result["groups"], measured=False), result["steps"][0]
        assert guess.keys() == seen.keys()
        # How many rows come back from experts is the routing's.
        assert not [key for key in seen if key[1] != "all_to_all" and seen[key] != guess[key]]
