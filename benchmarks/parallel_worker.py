"""One plan on its ranks: an engine for each balancing, their steps in turn, what each of them sends and keeps.

Runs on every rank. All ranks return the same.

Shapes: B rows, S length.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab import BatchWise, DeviceLevel, GlobalBatch, SequenceWise, Sign, ZLoss
from trimtab.balancer import Balancer
from trimtab.models.deepseek_v3 import DeepseekV3ModelConfig
from trimtab.parallel.fsdp import clip_gradients
from trimtab.parallel.mesh import Groups, Mesh
from trimtab.reduction import PackedSum
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.engine import Engine
from trimtab.train.evaluation import ValidationConfig
from trimtab.train.logging import MetricsConfig
from trimtab.train.model import Balancing
from trimtab.train.packing import Rows, TokenBatch
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.traffic import step_traffic

NEVER = 10**9
OFF, OFF_AGAIN, MEASURED = "off", "off, once more", "all, measured"
# So slow that biases stay where they are in float32: every arm does its own work on the same assignments.
_BIAS = Sign.Config(speed=1e-12)
_SEQUENCE = SequenceWise.Config(coef=1e-4, assignments="unbiased")
_GLOBAL, _Z = GlobalBatch.Config(coef=1e-2), ZLoss.Config(coef=1e-3)
_ALL = Balancing(
    objectives=(
        _SEQUENCE,
        BatchWise.Config(coef=1e-2, average_microbatches=True),
        _GLOBAL,
        DeviceLevel.Config(coef=1e-2, num_devices=4),
        _Z,
    ),
    bias=_BIAS,
)
# Name: the balancing, None for none at all; steps between those that measure losses for the log.
ARMS: dict[str, tuple[Balancing | None, int]] = {
    OFF: (None, NEVER),
    OFF_AGAIN: (None, NEVER),
    "sequence + bias": (Balancing(objectives=(_SEQUENCE,), bias=_BIAS), NEVER),
    "global + z + bias": (Balancing(objectives=(_GLOBAL, _Z), bias=_BIAS), NEVER),
    "all": (_ALL, NEVER),
    MEASURED: (_ALL, 1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Model and step.

    Args:
        dim: width.
        layers: decoder layers, all with experts.
        experts: E.
        top_k: K.
        expert_dim: hidden width of an expert, and of the shared one.
        heads: attention heads of width dim / heads.
        vocab: ids.
        rows: of an optimiser step, over all ranks.
        seq_len: S.
    """

    dim: int = 512
    layers: int = 4
    experts: int = 32
    top_k: int = 4
    expert_dim: int = 128
    heads: int = 8
    vocab: int = 4096
    rows: int = 4
    seq_len: int = 256


QUICK = Sizes(dim=32, layers=2, experts=8, top_k=2, expert_dim=16, heads=2, vocab=64, seq_len=32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to divide the work.

    Args:
        name: in tables.
        ranks: processes.
        degrees: options of `ParallelismConfig` that differ from one process.
        rounds: rounds that are timed.
    """

    name: str
    ranks: int
    degrees: dict[str, Any]
    rounds: int

    @property
    def parallelism(self) -> ParallelismConfig:
        """The degrees as the trainer takes them."""
        return ParallelismConfig(**self.degrees)


class Unbalanced(Engine):
    """The engine with nothing attached: no hook, no count, no bias update."""

    def _attach(self, model: nn.Module) -> Balancer:
        return None  # type: ignore[return-value]


class Arm:
    """A model with one balancing, and everything that its optimiser step needs.

    Args:
        name: key of `ARMS`.
        plan: how it is divided.
        sizes: of model and step.
        mesh: where ranks are; None for one process.
    """

    def __init__(self, name: str, plan: Plan, sizes: Sizes, mesh: Mesh | None) -> None:
        self.name = name
        balancing, log_interval = ARMS[name]
        config = _config(sizes, balancing or _ALL, plan.parallelism, log_interval)
        run = config.for_world(plan.ranks)
        engine_class = Unbalanced if balancing is None else Engine
        self.engine = engine_class(config, run, mesh=mesh, device=torch.device("cpu"), vocab_size=sizes.vocab)
        self.batches = _batches(sizes, self.engine)
        self.optimizer = config.optimizer.build(self.engine.parameters())
        for group in self.optimizer.param_groups:
            # Every step is the first one: the same weights, hence the same assignments, in all arms.
            group["lr"] = 0.0

    def step(self) -> float:
        """One optimiser step as the trainer does it, without reading text or logging; the loss."""
        engine = self.engine
        loss = engine.train_step(self.batches, engine.totals(self.batches))
        max_norm = engine.config.training.max_norm
        assert max_norm is not None
        clip_gradients(engine.parameters(), max_norm, engine.mesh)
        # The loss of all ranks, and whether one of them is asked to stop.
        told = torch.tensor([float(loss), 0.0, 0.0], dtype=torch.float64)
        if engine.mesh is not None:
            dist.all_reduce(told)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for balancer in engine.balancers:
            balancer.step()
        return float(told[0])


def _config(
    sizes: Sizes, balancing: Balancing, parallelism: ParallelismConfig, log_interval: int
) -> TrainConfig:
    width = sizes.dim // sizes.heads
    return TrainConfig(
        model=DeepseekV3ModelConfig(
            balancing=balancing,
            dim=sizes.dim,
            num_layers=sizes.layers,
            num_dense_layers=0,
            hidden_dim=sizes.dim,
            expert_hidden_dim=sizes.expert_dim,
            num_experts=sizes.experts,
            top_k=sizes.top_k,
            num_heads=sizes.heads,
            kv_lora_rank=sizes.dim // 4,
            nope_head_dim=width // 2,
            rope_head_dim=width // 2,
            v_head_dim=width,
            max_seq_len=sizes.seq_len,
        ),
        data=DataConfig(seq_len=sizes.seq_len, microbatch_size=None, validation_fraction=0.0),
        training=TrainingConfig(steps=NEVER, global_batch_size=sizes.rows, device="cpu"),
        parallelism=parallelism,
        metrics=MetricsConfig(log_interval=log_interval),
        validation=ValidationConfig(enable=False),
    )


def _batches(sizes: Sizes, engine: Engine) -> list[TokenBatch]:
    """Random rows of one document each; this data rank's part of the step."""
    run, mesh = engine.run, engine.mesh
    ids = np.random.default_rng(0).integers(0, sizes.vocab, (sizes.rows, sizes.seq_len))
    B, M = run.microbatch_size, run.num_microbatches
    first = 0 if mesh is None else mesh.rank("data") * M * B
    batches = []
    for start in range(first, first + M * B, B):
        ids_BS = ids[start : start + B]
        nothing = np.zeros_like(ids_BS)
        rows = Rows(
            ids_BS=ids_BS,
            starts_BS=nothing.astype(bool),
            domain_ids_BS=nothing,
            predicted_BS=np.ones_like(ids_BS, dtype=bool),
        )
        batches.append(rows.to_batch(0))
    return batches


# -------------------------------------------------------------------------------- what a step sends

_OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
}


class Traffic(TorchDispatchMode):
    """Counts collectives and the bytes of their messages, as `Collective` does, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "trimtab":
            # Inside an operator of its own this mode would be off, so what it runs is called here.
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        if namespace == "c10d" and name in _OPERATIONS:
            tensors = [arg[0] if isinstance(arg, (list, tuple)) else arg for arg in args[:2]]
            messages = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
            if name == "alltoall_base_":
                messages = messages[1:]  # what is sent; as much need not be received
            self.count[_OPERATIONS[name]] += 1
            self.num_bytes[_OPERATIONS[name]] += max(x.numel() * x.element_size() for x in messages)
        return func(*args, **(kwargs or {}))


def _traffic(arm: Arm) -> dict[str, dict[str, int]]:
    """Collectives of one step of this rank, compared with what `trimtab.train.traffic` says of it.

    Raises:
        RuntimeError: they differ.
    """
    _barrier()
    with Traffic() as seen:
        arm.step()
    count: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for one in step_traffic(arm.engine):
        if not one.measured or ARMS[arm.name][1] == 1:
            count[one.operation] += one.count
            num_bytes[one.operation] += one.num_bytes
    # Rows that come back from other ranks' experts are an expectation.
    exact = [name for name in count | seen.count if name != "all_to_all"]
    if count != seen.count or any(num_bytes[name] != seen.num_bytes[name] for name in exact):
        raise RuntimeError(
            f"{arm.name}: a step sent {dict(seen.count)} of {dict(seen.num_bytes)} bytes, but step_traffic says "
            f"{dict(count)} of {dict(num_bytes)}; one of them counts wrongly"
        )
    return {"count": dict(seen.count), "bytes": dict(seen.num_bytes)}


# -------------------------------------------------------------------------------- what autograd holds


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _held_bytes(arm: Arm) -> tuple[float, int]:
    """The loss of one step, and most bytes of distinct storages that autograd holds in it on this rank."""
    users: defaultdict[int, int] = defaultdict(int)
    now = most = 0

    def release(key: int, size: int) -> None:
        nonlocal now
        users[key] -= 1
        if not users[key]:
            now -= size

    def pack(tensor: Tensor) -> _Held:
        nonlocal now, most
        held, storage = _Held(tensor), tensor.untyped_storage()
        # Not the data's address: FSDP frees the data of a storage and comes back with other data.
        key, size = storage._cdata, storage.nbytes()
        users[key] += 1
        if users[key] == 1:
            now += size
            most = max(most, now)
        weakref.finalize(held, release, key, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = arm.step()
    return loss, most


# -------------------------------------------------------------------------------- time


class _Waits:
    """Seconds that this rank spends in starting sums of counts, and in waiting for them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        start, wait = PackedSum.__init__, PackedSum.wait

        def timed(function: Any) -> Any:
            def call(*args: Any) -> Any:
                began = time.perf_counter()
                try:
                    return function(*args)
                finally:
                    self.seconds += time.perf_counter() - began

            return call

        PackedSum.__init__, PackedSum.wait = timed(start), timed(wait)  # type: ignore[method-assign]
        try:
            yield
        finally:
            PackedSum.__init__, PackedSum.wait = start, wait  # type: ignore[method-assign]


def _time(arms: list[Arm], rounds: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each arm in each round on this rank: wall clock, CPU time, and in sums of counts.

    Each arm has taken a few steps by then.
    """
    # The same order on every rank.
    rng, waits = random.Random(seed), _Waits()
    times: dict[str, dict[str, list[float]]] = {arm.name: {"wall": [], "cpu": [], "sums": []} for arm in arms}
    gc.collect()
    # What exists now stays: looking at all of it again in each round takes longer than a step.
    gc.freeze()
    gc.disable()
    try:
        with waits.watch():
            for _ in range(rounds):
                for arm in rng.sample(arms, len(arms)):
                    _barrier()
                    waits.seconds = 0.0
                    wall, cpu = time.perf_counter(), time.process_time()
                    arm.step()
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    for name, value in (("wall", wall), ("cpu", cpu), ("sums", waits.seconds)):
                        times[arm.name][name].append(value)
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def _barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def _busy_seconds() -> float:
    """CPU seconds of everything on this machine since it started; 0 where it does not say."""
    with contextlib.suppress(OSError), open("/proc/stat", encoding="ascii") as stat:
        user, nice, system, _, _, irq, softirq, *_ = map(int, stat.readline().split()[1:])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return 0.0


# -------------------------------------------------------------------------------- one plan


def measure(plan: Plan, sizes: Sizes, groups: Groups, seed: int = 0) -> dict[str, Any]:
    """Everything about one plan.

    Raises:
        RuntimeError: an arm computes another loss than the others, or sends what was not predicted.
    """
    load = os.getloadavg()[0]
    degrees = plan.parallelism.resolve(plan.ranks)
    mesh = Mesh(degrees, "cpu", groups) if plan.ranks > 1 else None
    arms = [Arm(name, plan, sizes, mesh) for name in ARMS]
    held = {arm.name: _held_bytes(arm) for arm in arms}
    losses = {name: loss for name, (loss, _) in held.items()}
    if max(losses.values()) - min(losses.values()) > 1e-5 * abs(losses[OFF]):
        raise RuntimeError(f"{plan.name}: arms do not run the same model: losses {losses}")
    traffic = {arm.name: _traffic(arm) for arm in arms}
    own, busy, began = time.process_time(), _busy_seconds(), time.perf_counter()
    times = _time(arms, plan.rounds, seed)
    own, busy, seconds = time.process_time() - own, _busy_seconds() - busy, time.perf_counter() - began
    run = arms[0].engine.run
    # The next plan needs the memory, and engines refer to themselves.
    del arms
    gc.collect()
    here = {"own": own, "traffic": traffic, "held": held, "times": times}
    ranks = _gather(here)
    return {
        "plan": plan.name,
        "ranks": plan.ranks,
        "rounds": plan.rounds,
        "microbatches": run.num_microbatches,
        "microbatch_rows": run.microbatch_size,
        "degrees": {name: getattr(degrees, name) for name in type(degrees).__slots__},
        "load": round(load, 2),
        # Cores that processes of others had while steps were timed.
        "others": round(max(0.0, busy - sum(rank["own"] for rank in ranks)) / seconds, 2),
        "arms": {name: _summary(name, ranks) for name in ARMS},
    }


def _summary(name: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm: a step lasts as long as on its slowest rank; CPU time is of all ranks; the rest is by rank."""
    times = [rank["times"][name] for rank in ranks]
    return {
        "wall": [max(values) for values in zip(*(t["wall"] for t in times), strict=True)],
        "cpu": [sum(values) for values in zip(*(t["cpu"] for t in times), strict=True)],
        "sums": [max(values) for values in zip(*(t["sums"] for t in times), strict=True)],
        "collectives": [sum(rank["traffic"][name]["count"].values()) for rank in ranks],
        "bytes": [sum(rank["traffic"][name]["bytes"].values()) for rank in ranks],
        "operations": ranks[0]["traffic"][name],
        "held": [rank["held"][name][1] for rank in ranks],
    }


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, value)
    return everyones
