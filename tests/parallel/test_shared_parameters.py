"""Parameters that two pipeline stages hold: one gradient, one norm, equal bits, one entry in checkpoints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.hf_reference import relative_error
from tests.parallel.cases import Case
from tests.parallel.double import double_precision
from tests.parallel.mtp import check, expected, make_engine, mtp_train_config, run_step, tiny
from tests.parallel.pool import RankError, Ranks, mesh_of
from tests.parallel.reference import make_step
from tests.parallel.runner import token_batch
from trimtab.integrations.mtp import mtp_layers
from trimtab.integrations.stages import (
    call_stage,
    divide_layers,
    needs_one_backward,
    run_stage,
    split_into_stages,
)
from trimtab.parallel.fsdp import clip_gradients
from trimtab.parallel.mesh import Degrees
from trimtab.parallel.schedules import check_pipeline
from trimtab.parallel.shared_parameters import SharedParameters, share, shared_names
from trimtab.train.checkpoint import Checkpointer
from trimtab.train.checkpoint_state import LocalState, Saved

EMBEDDING = "model.embed_tokens.weight"


def case_of(plan: str, schedule: str, family: str = "qwen3_moe", **settings: Any) -> Case:
    common = {"losses": "all", "data": "ragged", "packed": True, "accumulation": True, "checkpointing": False}
    return Case(plan=plan, family=family, schedule=schedule, **{**common, **settings})


# ------------------------------------------------------------------ an embedding that is the head

TIED = [
    (case_of("pp", "1F1B"), 0),
    (case_of("pp", "DualPipeV", "mixtral", checkpointing=True), 0),
    (case_of("pp_ep", "Interleaved1F1B"), 0),
    (case_of("pp_hsdp_ep", "ZBVZeroBubble"), 0),
    # Three uses on the last stage, of which one depends on the other.
    (case_of("pp", "1F1B", "glm4_moe"), 1),
    (case_of("pp_fsdp", "ZBVZeroBubble", "glm4_moe"), 1),
]


@pytest.mark.parametrize(("case", "num_depths"), TIED, ids=str)
def test_a_tied_embedding_equals_one_process(ranks: Ranks, case: Case, num_depths: int) -> None:
    outcomes = ranks.run(run_step, case.degrees.world_size, case, num_depths, True, timeout=120)
    check(outcomes, expected(case, num_depths, tied=True), tolerance=1e-10)


# ------------------------------------------------------------------ over several steps, saved and read


def train(case: Case, folder: Path, load: bool) -> dict[str, Any]:
    """Two steps of training, with a checkpoint between them or from one; what a rank has then."""
    with double_precision():
        engine = make_engine(case, mtp_train_config(case, 1, tied=False))
        mesh = engine.mesh
        optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-2)
        checkpointer = Checkpointer(folder)
        data, num_data = (0, 1) if mesh is None else (mesh.rank("data"), case.degrees.data)
        batches = [token_batch(rows.part(data, num_data)) for rows in make_step(case).microbatches]
        for step in (2,) if load else (1, 2):
            if load:
                latest = checkpointer.latest()
                assert latest is not None
                checkpointer.load(latest, engine.modules, optimizer)
            engine.train_step(batches, engine.totals(batches))
            clip_gradients(engine.parameters(), 0.1, mesh, copies=engine.copies)
            optimizer.step()
            optimizer.zero_grad()
            for balancer in engine.balancers:
                balancer.step()
            if step == 1:
                checkpointer.save(1, engine.modules, optimizer, {})
                for part in engine.parts:
                    for parameter in part.module.parameters():
                        assert len(optimizer.state[parameter]) == 3
    named = [(name, p) for part in engine.parts for name, p in part.module.named_parameters()]
    weights = [(name, p.full_tensor() if isinstance(p, DTensor) else p.detach()) for name, p in named]
    return {"weights": weights, "copies": len(engine.copies)}


def joined(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Weights of all ranks; replicas are the same bits."""
    weights: dict[str, torch.Tensor] = {}
    for result in results:
        for name, weight in result["weights"]:
            assert torch.equal(weights.setdefault(name, weight), weight), name
    return weights


@pytest.mark.parametrize(("plan", "schedule"), [("pp", "ZBVZeroBubble"), ("pp_fsdp", "1F1B")])
def test_replicas_stay_equal_and_are_saved_once(
    ranks: Ranks, tmp_path: Path, plan: str, schedule: str
) -> None:
    case = case_of(plan, schedule, "deepseek_v3")
    world_size = case.degrees.world_size
    # Replicas are on one rank under a V schedule, else on two of each pipeline.
    results = ranks.run(train, world_size, case, tmp_path, False, timeout=120)
    assert sum(result["copies"] for result in results) == world_size // 2
    weights = joined(results)
    folder = Checkpointer(tmp_path).latest()
    assert folder is not None
    saved = Saved.read(next(path.parent for path in folder.rglob(".metadata")))
    for name in (f"model.{EMBEDDING}", f"optimizer.state.{EMBEDDING}.exp_avg"):
        entry = saved.tensors[name]
        assert sum(chunk.sizes.numel() for chunk in entry.chunks) == entry.size.numel()
    # Read by the same ranks, and by others: the next step is the same, to the bit where sums are in one order.
    again = joined(ranks.run(train, world_size, case, tmp_path, True, timeout=120))
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    other = case_of("pp_fsdp" if plan == "pp" else "pp", "1F1B", "deepseek_v3")
    elsewhere = joined(ranks.run(train, other.degrees.world_size, other, tmp_path, True, timeout=120))
    errors = {
        name: relative_error({name: elsewhere[name]}, {name: weight}) for name, weight in weights.items()
    }
    assert max(errors.values()) < 1e-10


# ------------------------------------------------------------------ stages


@pytest.mark.parametrize(("num_depths", "tied"), [(0, True), (2, False), (1, True)])
def test_stages_in_a_row_are_the_model(num_depths: int, tied: bool) -> None:
    model = tiny("glm4_moe", 3, num_depths, tied=tied).eval()
    stages = [split_into_stages(copy.deepcopy(model), num_stages=3, stage=stage) for stage in range(3)]
    ids, positions = torch.randint(3, 64, (2, 8)), torch.arange(8).expand(2, 8)
    ahead = {"mtp_input_ids": ids.expand(num_depths, 2, 8)} if num_depths else {}
    x = ids
    with torch.no_grad():
        want = call_stage(model, ids, position_ids=positions, **ahead)
        for stage in stages[:-1]:
            x = run_stage(stage, x, position_ids=positions)
        have = call_stage(stages[-1], x, position_ids=positions, **ahead)
    assert torch.equal(have.logits, want.logits)
    if num_depths:
        for one, other in zip(have.mtp_logits, want.mtp_logits, strict=True):
            assert torch.equal(one, other)
    names = [dict(stage.named_parameters()) for stage in stages]
    assert [EMBEDDING in found for found in names] == [True, False, True]
    assert [shared_names(stage) for stage in stages] == [{EMBEDDING: (0, 2)}, {}, {EMBEDDING: (0, 2)}]
    assert [len(mtp_layers(stage)) for stage in stages] == [0, 0, num_depths]
    assert {name for found in names for name in found} == dict(model.named_parameters()).keys()
    assert [needs_one_backward(stage) for stage in stages] == [False, False, num_depths + tied > 1]


def test_layers_of_multi_token_prediction_count_on_the_last_stage() -> None:
    assert [len(one) for one in divide_layers(10, 4)] == [2, 3, 3, 2]
    assert [len(one) for one in divide_layers(10, 4, 1)] == [2, 4, 3, 1]
    assert [len(one) for one in divide_layers(12, 3, 3)] == [5, 6, 1]


# ------------------------------------------------------------------ by itself


def sum_over(stages: tuple[int, ...], schedule: str, wrong: bool = False) -> list[torch.Tensor]:
    """Gradients of one parameter that some stages hold; that of stage s is 10^s before."""
    mesh = mesh_of(Degrees(pp=3))
    plan = check_pipeline(schedule, pp=3, num_layers=6, num_microbatches=6)
    parts = {}
    for stage in plan.stages_of(mesh.rank("pp")):
        parts[stage] = torch.nn.Linear(2, 1)
        if stage in stages:
            parts[stage].weight.grad = torch.full((1, 2), 10.0**stage)
            share(parts[stage], {"missing" if wrong else "weight": stages})
    shared = SharedParameters(parts, plan, mesh)
    shared.sum_gradients()
    assert all(part.bias.grad is None for part in parts.values())
    assert shared.copies == {part.weight for stage, part in parts.items() if stage in stages[1:]}
    return [part.weight.grad for stage, part in parts.items() if stage in stages]


@pytest.mark.parametrize(
    ("stages", "schedule"), [((0, 2), "1F1B"), ((0, 5), "ZBVZeroBubble"), ((0, 3, 4), "Interleaved1F1B")]
)
def test_every_replica_has_the_sum(ranks: Ranks, stages: tuple[int, ...], schedule: str) -> None:
    found = [grad for grads in ranks.run(sum_over, 3, stages, schedule) for grad in grads]
    assert len(found) == len(stages)
    total = sum(10.0**stage for stage in stages)
    assert all(torch.equal(grad, torch.full((1, 2), total)) for grad in found)


def test_a_replica_without_gradient_has_the_others(ranks: Ranks) -> None:
    assert ranks.run(one_without_gradient, 2) == [3.0, 3.0]


def one_without_gradient() -> float:
    mesh = mesh_of(Degrees(pp=2))
    part = torch.nn.Linear(1, 1)
    if mesh.rank("pp") == 1:
        part.weight.grad = torch.full((1, 1), 3.0)
    share(part, {"weight": (0, 1)})
    plan = check_pipeline("1F1B", pp=2, num_layers=2, num_microbatches=2)
    SharedParameters({mesh.rank("pp"): part}, plan, mesh).sum_gradients()
    assert part.weight.grad is not None
    return part.weight.grad.item()


def test_a_name_that_is_not_there_is_refused(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"stage [02] is said to share 'missing', but has no parameter"):
        ranks.run(sum_over, 3, (0, 2), "1F1B", True)


def test_a_name_in_two_parts_must_be_shared() -> None:
    parts = [torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)]
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()])
    with pytest.raises(
        ValueError, match="'weight' is in two parts of the model on this rank, expected in one"
    ):
        LocalState(parts, optimizer)
    for part in parts:
        share(part, {"weight": (0, 1), "bias": (0, 1)})
    state = LocalState(parts, optimizer)
    with torch.no_grad():
        parts[0].weight.fill_(7.0)
    state.spread()
    assert torch.equal(parts[1].weight, parts[0].weight)
