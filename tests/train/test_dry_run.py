"""The dry run: what it predicts of a step is what a real step does, and what it refuses training would refuse."""

import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._library.custom_ops import OPDEFS
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab import BatchWise, GlobalBatch, Quantile, SequenceWise, Sign, ZLoss
from trimtab.models.deepseek_v3 import deepseek_v3_671b, deepseek_v3_tiny
from trimtab.models.qwen3 import Qwen3ModelConfig
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.dry_run import dry_run, plan_command
from trimtab.train.dry_run_text import render
from trimtab.train.model import Balancing
from trimtab.train.mtp import MtpConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.trainer import Trainer

WORLD = 4
OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
}
# Operations whose first argument is the message; of the others, whichever of the first two is larger.
RECEIVED = {"recv_", "recv_any_source_", "barrier"}
AXES = ("pp", "dp_replicate", "fsdp", "dp_cp", "efsdp", "cp", "tp", "ep", "etp", "sequence", "tokens")


class Recorder(TorchDispatchMode):
    """Counts collectives and the bytes of their messages, by ranks and operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: defaultdict[Any, list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "trimtab":
            # Inside an operator of its own this mode would be off, so call what it runs.
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        # The first step of a pipeline opens its connections with messages of one number.
        opens = name == "send" and args[0][0].numel() == 1
        if namespace == "c10d" and name not in RECEIVED and not opens:
            groups = [
                a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
            ]
            ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(groups[0])))
            tensors = [a[0] if isinstance(a, (list, tuple)) else a for a in args[:2]]
            tensors = [a for a in tensors if isinstance(a, torch.Tensor)]
            if name == "alltoall_base_":
                tensors = tensors[1:]
            entry = self.seen[ranks, OPERATIONS[name]]
            entry[0] += 1
            entry[1] += max(a.numel() * a.element_size() for a in tensors)
        return func(*args, **(kwargs or {}))


def two_steps(config) -> dict[str, Any]:
    """On one rank: what two steps of the trainer communicated, and what its optimiser holds then."""
    os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": "0"}
    try:
        trainer = Trainer(config, name="test", quiet=True)
    finally:
        for name in ("WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    seen, states = [], {part.stage: _watch(trainer.engine, part) for part in trainer.engine.parts}
    with trainer.engine.settings():
        for _ in range(2):
            with Recorder() as recorder:
                trainer._train_step()
            seen.append(dict(recorder.seen))
    groups = {axis: trainer.mesh.group(axis) for axis in AXES if axis not in ("fsdp", "dp_cp", "efsdp")}
    for axis in ("fsdp", "dp_cp", "efsdp"):
        mesh = trainer.mesh.fsdp_mesh(axis)
        groups[axis] = None if mesh is None else mesh.get_group(axis)
    groups["world"] = dist.group.WORLD
    local = [p.to_local() if isinstance(p, DTensor) else p for p in trainer.engine.parameters()]
    moments = [
        value.to_local() if isinstance(value, DTensor) else value
        for state in trainer.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    return {
        "steps": seen,
        "groups": {a: tuple(dist.get_process_group_ranks(g)) for a, g in groups.items() if g is not None},
        "parameters": sum(p.numel() for p in local),
        "states": states,
        "moments": sum(m.numel() * m.element_size() for m in moments),
    }


def _watch(engine, part) -> dict[str, int]:
    """Filled while it trains: bytes of balancing state, and microbatches in flight."""
    noted = {"step": 0, "masks": 0, "in_flight": 0}
    balancer = part.balancer
    if balancer is None:
        return noted
    step = balancer.step

    def note_and_step() -> None:
        row, layer = balancer.ledger.rows[0], balancer.layers[0]
        tensors = [getattr(row, field.name) for field in fields(row)] + [layer.running_load_E]
        bias = layer.router.expert_bias
        tensors += (
            [] if bias is None else [bias, balancer._snapshots[0].bias_E if balancer._snapshots else None]
        )
        tensors += [] if row.statistic is None else [row.statistic.histogram_EN]
        noted["step"] = _bytes(tensors)
        noted["masks"] = _bytes(vars(balancer.context.current).values()) - 8  # the forward's number
        step()

    balancer.step = note_and_step
    if engine.pipeline is not None:
        forward, stages = engine.forward, {id(s.submod): s for s in engine.pipeline._stages}

        def note_and_forward(this, *args):
            if this is part:
                # The stage adds this microbatch to those it keeps when its forward has run.
                noted["in_flight"] = max(noted["in_flight"], len(stages[id(part.module)].fwd_cache) + 1)
            return forward(this, *args)

        engine.forward = note_and_forward
    return noted


def _bytes(values) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def predicted(found, groups, *, measured: bool) -> dict[Any, list[int]]:
    sums: defaultdict[Any, list[int]] = defaultdict(lambda: [0, 0])
    for one in found.collectives:
        if measured or not one.measured:
            entry = sums[groups[one.axis], one.operation]
            entry[0] += one.count
            entry[1] += one.num_bytes
    return dict(sums)


def config_of(tmp_path, *, rows: int, micro: int = 1, model=None, balancing=None, **options):
    base = deepseek_v3_tiny()
    sections = {name: options.pop(name) for name in ("mixed_precision", "checkpointing") if name in options}
    model = replace(model or base.model, num_layers=options.pop("num_layers", 3))
    return replace(
        base,
        model=replace(model, balancing=balancing or base.model.balancing),
        data=replace(base.data, microbatch_size=micro, validation_fraction=0.0),
        training=replace(
            base.training, global_batch_size=rows, mixed_precision=sections.get("mixed_precision", "none")
        ),
        validation=replace(base.validation, enable=False),
        metrics=replace(base.metrics, log_interval=2),
        activation_checkpoint=ActivationCheckpointConfig(mode=sections.get("checkpointing", "none")),
        parallelism=ParallelismConfig(**options),
        dump_folder=str(tmp_path),
    )


QWEN = Qwen3ModelConfig(
    balancing=deepseek_v3_tiny().model.balancing,
    dim=32,
    num_layers=2,
    expert_hidden_dim=16,
    num_experts=8,
    top_k=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
SEVERAL = (
    SequenceWise.Config(coef=1e-3, assignments="unbiased"),
    GlobalBatch.Config(coef=1e-3, counts="running"),
    ZLoss.Config(coef=1e-3),
)
PLANS: dict[str, dict[str, Any]] = {
    "fsdp_ep": {"rows": 8, "micro": 2, "data_parallel_shard_degree": 4, "expert_parallel_degree": 2},
    "tp_ep": {
        "rows": 4,
        "tensor_parallel_degree": 2,
        "expert_parallel_degree": 2,
        "balancing": Balancing(objectives=SEVERAL[:1], bias=Quantile.Config(speed=1e-3, num_bins=64)),
    },
    "pp_fsdp": {"rows": 8, "pipeline_parallel_degree": 2, "expert_parallel_degree": 2},
    "cp_tp_bfloat16": {
        "rows": 2,
        "context_parallel_degree": 2,
        "tensor_parallel_degree": 2,
        "expert_parallel_degree": 2,
        "mixed_precision": "bfloat16",
    },
    "etp_recomputed": {
        "rows": 4,
        "tensor_parallel_degree": 2,
        "expert_tensor_parallel_degree": 2,
        "expert_parallel_degree": 2,
        "checkpointing": "full",
        "mixed_precision": "bfloat16",
    },
    "etp_cp_recomputed_qwen": {
        "rows": 4,
        "model": QWEN,
        "num_layers": 2,
        "tensor_parallel_degree": 2,
        "context_parallel_degree": 2,
        "expert_tensor_parallel_degree": 2,
        "expert_parallel_degree": 2,
        "checkpointing": "full",
        "mixed_precision": "bfloat16",
        "balancing": Balancing(objectives=(BatchWise.Config(coef=1e-2, average_microbatches=True),)),
    },
    "hsdp_forward_first": {
        "rows": 12,
        "data_parallel_replicate_degree": 2,
        "expert_parallel_degree": 2,
        "balancing": Balancing(objectives=SEVERAL, order="forward_first"),
    },
    "counting_pass": {
        "rows": 4,
        "tensor_parallel_degree": 2,
        "checkpointing": "selective",
        "balancing": Balancing(objectives=SEVERAL, bias=Sign.Config(speed=1e-3), order="counting_pass"),
    },
    "pp_tp_interleaved": {
        "rows": 4,
        "num_layers": 5,
        "pipeline_parallel_degree": 2,
        "tensor_parallel_degree": 2,
        "pipeline_parallel_schedule": "Interleaved1F1B",
    },
    "pp_zbv": {
        "rows": 8,
        "num_layers": 5,
        "pipeline_parallel_degree": 2,
        "pipeline_parallel_schedule": "ZBVZeroBubble",
    },
    "mtp_recomputed": {
        "rows": 4,
        "model": replace(deepseek_v3_tiny().model, mtp=MtpConfig(num_layers=2)),
        "tensor_parallel_degree": 2,
        "expert_parallel_degree": 4,
        "checkpointing": "full",
    },
    "mtp_pp": {
        "rows": 8,
        "model": replace(deepseek_v3_tiny().model, mtp=MtpConfig(num_layers=1), tie_embeddings=True),
        "num_layers": 4,
        "pipeline_parallel_degree": 2,
        "expert_parallel_degree": 2,
    },
}


@pytest.mark.parametrize("plan", PLANS)
def test_collectives_of_a_real_step_are_those_that_were_predicted(ranks, plan, tmp_path):
    config = config_of(tmp_path, **PLANS[plan])
    results = ranks.run(two_steps, WORLD, config, timeout=300)
    totals: list[defaultdict[str, list[int]]] = [defaultdict(lambda: [0, 0]) for _ in range(2)]
    for rank, result in enumerate(results):
        found = dry_run(config, WORLD, rank=rank)
        assert found.parameters.num_own == result["parameters"]
        assert 2 * found.parameters.num_own * found.parameters.size == result["moments"]
        for state in found.routers:
            noted = result["states"][state.stage]
            assert (state.step, state.masks) == (noted["step"], noted["masks"]), f"rank {rank}"
            if found.run.pipeline is not None and not found.run.pipeline.schedule.splits_backward:
                assert state.in_flight == noted["in_flight"], f"rank {rank}"
        for step, seen in enumerate(result["steps"]):
            guess = predicted(found, result["groups"], measured=step == 1)
            # How many rows come back is the routing's; over all ranks they are as many as were sent.
            for place, numbers in enumerate((seen, guess)):
                for key in [key for key in numbers if key[1] == "all_to_all"]:
                    count, num_bytes = numbers.pop(key)
                    totals[place][f"step {step}"][0] += count
                    totals[place][f"step {step}"][1] += num_bytes
            differing = {
                key: f"did {seen.get(key)}, predicted {guess.get(key)}"
                for key in sorted({*seen, *guess})
                if seen.get(key) != guess.get(key)
            }
            assert not differing, f"rank {rank}, step {step}"
    assert dict(totals[0]) == dict(totals[1])


# -------------------------------------------------------------------- 2,048 ranks


def test_deepseek_v3_on_2048_ranks():
    config = deepseek_v3_671b()
    assert dry_run(config, 2048).parameters.num_whole == 682_636_472_320
    # The report counts the model without multi-token prediction.
    config = replace(config, model=replace(config.model, mtp=None))
    started = time.process_time()
    found = dry_run(config, 2048, rank=1234)
    assert time.process_time() - started < 60
    text = render(found, name="deepseek_v3/deepseek_v3_671b")
    # "671B total parameters with 37B activated for each token" (arXiv:2412.19437), without its second head.
    assert found.parameters.num_whole == pytest.approx(671.0e9, rel=0.005)
    assert found.parameters.activated == pytest.approx(37e9, rel=0.02)
    assert found.num_embeddings == 129280
    assert found.place == {"pp": 9, "data": 82, "ep": 18}
    assert [layer for stage in found.stages for layer in stage.layers] == list(range(61))
    # An expert is three matrices; this rank has 4 of each layer's 256, halved by FSDP, in the layers of its stages.
    own_layers = [layer for stage in found.own_stages for layer in stage.layers]
    assert found.parameters.own["experts"] == len(own_layers) * 4 // 2 * 3 * 7168 * 2048
    assert max(map(len, text.splitlines())) <= 100
    assert "671,026,404,352" in text
    assert "120 microbatches of 1 x 4,096 tokens" in text
    assert not dist.is_initialized()


def test_ranks_together_hold_the_model_once():
    config = replace(
        deepseek_v3_tiny(),
        training=replace(deepseek_v3_tiny().training, global_batch_size=16),
        parallelism=ParallelismConfig(
            pipeline_parallel_degree=2,
            tensor_parallel_degree=2,
            expert_parallel_degree=4,
        ),
    )
    found = [dry_run(config, 16, rank=rank, vocab_size=259) for rank in range(16)]
    for kind, whole in found[0].parameters.whole.items():
        assert sum(one.parameters.own[kind] for one in found) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world-size", "2001"], "must divide the number of processes, 2001"),
        (
            ["--world-size", "2048", "--parallelism.expert-parallel-degree", "48"],
            "expert_parallel_degree=48 must divide",
        ),
        (
            ["--world-size", "2048", "--parallelism.tensor-parallel-degree", "3"],
            "must divide the number of processes",
        ),
        (
            ["--world-size", "2048", "--training.global-batch-size", "2048"],
            "needs at least as many microbatches per step",
        ),
        (["--world-size", "2048", "--rank", "2048"], r"rank=2048 must be in \[0, world_size=2048\)"),
        (["--world-size", "0"], "--world-size=0 must be at least 1"),
    ],
)
def test_a_contradiction_is_one_message_and_status_2(options, message, capsys):
    assert plan_command(["--config", "deepseek_v3_671b", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err)
    assert len(printed.err.splitlines()) == 1


def test_the_command_prints_a_plan(capsys):
    options = {
        "--config": "deepseek_v3_tiny",
        "--world-size": "8",
        "--rank": "3",
        "--training.global-batch-size": "64",
        "--parallelism.tensor-parallel-degree": "2",
        "--parallelism.expert-parallel-degree": "8",
    }
    status = plan_command([word for option in options.items() for word in option])
    text = capsys.readouterr().out
    assert status == 0
    assert text.startswith("deepseek_v3/deepseek_v3_tiny on 8 ranks\n")
    assert "rank 3           data 1, tp 1, ep 3" in text
    assert "attention's output" in text
    assert max(map(len, text.splitlines())) <= 100


def test_one_rank_communicates_nothing():
    found = dry_run(deepseek_v3_tiny(), 1)
    assert found.collectives == ()
    assert found.parameters.num_own == found.parameters.num_whole
    assert "Collectives: none" in render(found)


def test_it_leaves_no_trace():
    hook, state = sys.excepthook, torch.get_rng_state()
    dry_run(deepseek_v3_tiny(), 2)
    assert sys.excepthook is hook
    assert torch.equal(torch.get_rng_state(), state)
    assert not dist.is_initialized()


def _refusal() -> str:
    with pytest.raises(ValueError, match="a dry run pretends") as error:
        dry_run(deepseek_v3_tiny(), 2)
    return str(error.value)


def test_a_rank_of_a_run_is_not_another_one(ranks):
    for rank, message in enumerate(ranks.run(_refusal, 2)):
        assert message.startswith(f"this process is rank {rank} of 2 already")
