"""Records and replay on several ranks: each has the layers and tokens that it holds."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import trimtab
from tests.hf_models import VOCAB, E
from tests.parallel.cases import NO_SCHEDULE, Case
from tests.parallel.double import double_precision
from tests.parallel.pool import Ranks, mesh_of
from tests.parallel.reference import make_step
from tests.parallel.runner import token_batch, train_config
from tests.parallel.test_pipeline_balancing import ToyPipeline, toy_batches
from tests.routings import (
    NAMES,
    OBJECTIVES,
    TWO,
    balancer_names,
    counted,
    histograms,
    ids_of,
    naive_grads,
    routing_of,
)
from tests.toy import Batch, assert_grads_equal, batch, grads, toy_model
from tests.turns import in_turn
from trimtab import GradReduction, SequenceWise
from trimtab.parallel.experts import parallelize_moe
from trimtab.parallel.mesh import Degrees
from trimtab.train.engine import Engine


def staged() -> tuple[tuple[str, ...], Tensor]:
    """Names and ids of this rank's stage in a step of 1F1B."""
    toy = ToyPipeline("1F1B", 3, SequenceWise.Config(coef=0.3))
    with trimtab.record_routing(toy.balancer) as records:
        toy.step(toy_batches(3, 0))
    return records.names, records.stacked("ids")


def test_records_of_pipeline_stages(ranks: Ranks) -> None:
    """Each rank has its own layers under their names in the whole model, microbatches in order."""
    want = routing_of(toy_model(), toy_batches(3, 0))
    for stage, (names, ids_MLTK) in enumerate(ranks.run(staged, 2)):
        assert names == (NAMES[stage],)
        assert torch.equal(ids_MLTK[:, 0], torch.stack([values["ids"] for values in want[stage]]))


def replayed_stage() -> dict[str, Tensor]:
    """Gradients of this rank's stage, under 1F1B."""
    toy = ToyPipeline("1F1B", 3, SequenceWise.Config(coef=0.3))
    (name,) = balancer_names(toy.balancer)
    batches = toy_batches(3, 0)
    ids_M = ids_of(batches)
    with trimtab.replay_routing(toy.balancer, [{name: ids[int(name.split(".")[1])]} for ids in ids_M]):
        found = toy.step(batches)
    return found


def test_replay_on_pipeline_stages(ranks: Ranks) -> None:
    batches = toy_batches(3, 0)
    want = naive_grads(toy_model(), batches, ids_of(batches), [SequenceWise.Config(coef=0.3)])
    have = {name: grad for found in ranks.run(replayed_stage, 2) for name, grad in found.items()}
    assert_grads_equal(have, want)


def replayed_rank(way: str) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Gradients summed over two ranks with half of the experts each, and counts."""
    model, rank = toy_model(checkpoint="nonreentrant"), dist.get_rank()
    for block in model.blocks:
        parallelize_moe(block.moe, mesh_of(Degrees(dp_shard=2, ep=2)))
    balancer = trimtab.attach(
        model, OBJECTIVES, accumulation=TWO, reduction=GradReduction(num_ranks=2), fused=way == "fused"
    )
    batches = [batch(2, 5, seed=2 * m + rank, padded=True) for m in range(2)]
    with trimtab.replay_routing(balancer, ids_of(batches, seed=rank)):
        losses = in_turn(model, balancer, batches)
    for loss in losses:
        loss.backward()
    found = grads(model)
    for name, grad in found.items():
        if "experts" not in name:
            dist.all_reduce(grad)
    return found, counted(balancer)


@pytest.mark.parametrize("way", ["fused", "hooks"])
def test_replay_on_expert_parallel_ranks(ranks: Ranks, way: str) -> None:
    """Each rank replays its own tokens; experts of other ranks get the rows, and counts are of all."""
    batches = [[batch(2, 5, seed=2 * m + rank, padded=True) for m in range(2)] for rank in range(2)]
    ids = [ids_of(batches[rank], seed=rank) for rank in range(2)]
    merged = [
        Batch(torch.cat([one.input_ids for one in pair]), torch.cat([one.valid_BS.long() for one in pair]))
        for pair in zip(*batches, strict=True)
    ]
    both = [torch.cat(pair, dim=1) for pair in zip(*ids, strict=True)]
    want = naive_grads(toy_model(), merged, both, OBJECTIVES)
    results = ranks.run(replayed_rank, 2, way)
    for rank, (found, counts) in enumerate(results):
        assert counts == histograms(merged, both)
        for name, grad in found.items():
            local = want[name].chunk(2)[rank] if "experts" in name else want[name]
            grad = grad.to_local() if isinstance(grad, DTensor) else grad
            torch.testing.assert_close(grad, local, rtol=1e-10, atol=1e-12, msg=name)


def replayed_by_the_trainer(case: Case) -> tuple[int, list[str], float]:
    """Layers of this rank, those whose own choice became another one, and the largest difference of gradients."""
    with double_precision():
        config, mesh = train_config(case, None), mesh_of(case.degrees)
        run = config.for_world(case.degrees.world_size)
        engine = Engine(config, run, mesh=mesh, device=torch.device("cpu"), vocab_size=VOCAB)
        data, num_data = mesh.rank("data"), case.degrees.data
        batches = [token_batch(rows.part(data, num_data)) for rows in make_step(case).microbatches]

        def step() -> list[Tensor]:
            with engine.settings():
                engine.train_step(batches, engine.totals(batches))
            for balancer in engine.balancers:
                balancer.step()
            found = []
            for parameter in [p for part in engine.parts for p in part.module.parameters()]:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                found.append(grad.to_local() if isinstance(grad, DTensor) else grad)
                parameter.grad = None
            return found

        with trimtab.record_routing(engine.balancers) as records:
            want = step()
        for part in engine.parts:
            for router in part.routers:
                router.module.e_score_correction_bias.add_(
                    torch.randn(E, generator=torch.Generator().manual_seed(0))
                )
        with trimtab.record_routing(engine.balancers) as own:
            step()
        with trimtab.replay_routing(engine.balancers, records):
            have = step()
    changed = [name for name in records if not torch.equal(records[name][0]["ids"], own[name][0]["ids"])]
    error = max(float((a - b).abs().max()) for a, b in zip(have, want, strict=True))
    return len(records), changed, error


@pytest.mark.parametrize("plan", ["tp", "etp", "cp", "ep", "ep_of_tp", "pp"])
def test_replay_in_the_trainer(ranks: Ranks, plan: str) -> None:
    """With another selection bias, which makes routers choose otherwise, gradients stay what they were."""
    schedule = "1F1B" if plan == "pp" else NO_SCHEDULE
    case = Case(
        plan=plan,
        family="deepseek_v3",
        losses="sequence",
        schedule=schedule,
        data="padded",
        accumulation=True,
        packed=False,
        checkpointing=True,
    )
    for num_layers, changed, error in ranks.run(replayed_by_the_trainer, 2, case):
        assert len(changed) == num_layers > 0
        assert error < 1e-12
