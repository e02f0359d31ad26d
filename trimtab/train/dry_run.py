"""A run on any number of ranks, built on one machine without memory or peers, to see what it would be.

The same code as in training checks the configuration, makes the mesh, and builds, divides and shards this rank's
part of the model, among processes that are not there and with parameters that have shapes and no values. What is
printed is read off the modules that come of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trimtab.integrations.discovery import discover
from trimtab.integrations.stages import divide_layers
from trimtab.parallel.mesh import Mesh
from trimtab.train.config import TrainConfig
from trimtab.train.engine import Engine
from trimtab.train.footprint import Parameters, RouterState, count_parameters, parameters_of, router_state
from trimtab.train.mtp import mtp_of
from trimtab.train.parallelism import ResolvedRun
from trimtab.train.traffic import Collective, step_traffic

_AXES = ("pp", "dp_replicate", "data", "cp", "tp", "ep", "etp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of the pipeline; without one, the model is the only stage.

    Args:
        index: in the order of the model.
        rank: pipeline rank that holds it.
        layers: decoder layers of it.
        num_mtp: layers of multi-token prediction that follow them and the head.
    """

    index: int
    rank: int
    layers: range
    num_mtp: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What a configuration would be on so many ranks, and what one of them would hold and send.

    Args:
        world_size: ranks.
        rank: the one that is described.
        place: its place along the axes that have several ranks.
        run: degrees, microbatches and schedule.
        seq_len: S.
        num_embeddings: rows of the embedding.
        log_interval: steps between those that measure losses.
        checkpointing: mode of activation checkpointing.
        precision: of the forward.
        stages: of all ranks.
        parameters: of the model and of the rank.
        routers: memory of balancing, of each stage of this rank that has routers.
        collectives: of the rank in one optimiser step.
    """

    world_size: int
    rank: int
    place: Mapping[str, int]
    run: ResolvedRun
    seq_len: int
    num_embeddings: int
    log_interval: int
    checkpointing: str
    precision: str
    stages: tuple[Stage, ...]
    parameters: Parameters
    routers: tuple[RouterState, ...]
    collectives: tuple[Collective, ...]

    @property
    def own_stages(self) -> tuple[Stage, ...]:
        """Stages of this rank."""
        own = self.place.get("pp", 0)
        return tuple(stage for stage in self.stages if stage.rank == own)


def dry_run(config: TrainConfig, world_size: int, *, rank: int = 0, vocab_size: int | None = None) -> DryRun:
    """Build one rank of a run without its memory and without other ranks.

    Reads no text, starts no process and draws no random number. Nothing of it is on a GPU.

    Args:
        config: the run.
        world_size: ranks.
        rank: the one to build, in [0, world_size).
        vocab_size: ids of the tokenizer; None: those of the configured one, which is loaded.

    Raises:
        ValueError: what training would raise on so many ranks, a rank that is none of them, or a process that is
            a rank of something already.
    """
    run = config.for_world(world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be in [0, world_size={world_size})")
    if vocab_size is None:
        vocab_size = config.data.tokenizer.build().vocab_size
    model = _Shapes(config.model, tried_out=run.pipeline is not None)
    hollow = replace(config, model=model)  # type: ignore[arg-type]
    with _pretended_ranks(rank, world_size), torch.random.fork_rng(devices=[]):
        mesh = Mesh(run.degrees, "cpu") if world_size > 1 else None
        engine = Engine(hollow, run, mesh=mesh, device=torch.device("meta"), vocab_size=vocab_size)
        place = {} if mesh is None else {axis: mesh.rank(axis) for axis in _AXES if mesh.size(axis) > 1}
        return DryRun(
            world_size=world_size,
            rank=rank,
            place=place,
            run=run,
            seq_len=config.data.seq_len,
            num_embeddings=model.num_embeddings,
            log_interval=config.metrics.log_interval,
            checkpointing=config.activation_checkpoint.mode,
            precision=config.training.mixed_precision,
            stages=_stages(config, run),
            parameters=parameters_of(engine, {**model.counts, "adapters": _num_adapters(config, vocab_size)}),
            routers=tuple(
                state for part in engine.parts if (state := router_state(engine, part)) is not None
            ),
            collectives=tuple(step_traffic(engine)),
        )


def _num_adapters(config: TrainConfig, vocab_size: int) -> int:
    """Parameters that the run adds to the model."""
    if not config.finetune.adapts:
        return 0
    with torch.device("meta"):
        model = config.model.build(vocab_size=vocab_size, seq_len=config.data.seq_len)
    routers = discover(model)
    config.finetune.apply(model, routers)
    return count_parameters(model, routers)["adapters"]


def _stages(config: TrainConfig, run: ResolvedRun) -> tuple[Stage, ...]:
    plan, mtp = run.pipeline, mtp_of(config.model)
    num_mtp = 0 if mtp is None else mtp.num_layers
    if plan is None:
        return (Stage(index=0, rank=0, layers=range(config.model.num_layers), num_mtp=num_mtp),)
    num_first = config.model.num_first_stage_layers
    divided = divide_layers(config.model.num_layers, plan.num_stages, num_mtp, num_first=num_first)
    last = plan.num_stages - 1
    return tuple(
        Stage(index=i, rank=plan.rank_of(i), layers=layers, num_mtp=num_mtp if i == last else 0)
        for i, layers in enumerate(divided)
    )


@contextmanager
def _pretended_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Make this process one rank of a world in which collectives do nothing."""
    if dist.is_initialized():
        raise ValueError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already; a dry run pretends to be "
            "a rank of its own, so call it in a process without a process group"
        )
    if world_size == 1:
        yield
        return
    # Importing it is what makes the backend known; there is no other way to it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        # PyTorch puts the rank before every traceback, and leaves it there.
        sys.excepthook = hook


class _Shapes:
    """A model's configuration that builds it without values, and counts its parameters.

    Args:
        model: the configuration.
        tried_out: the model is run before it is divided, as pipeline stages are, without its layers: its
            parameters are then zeros that share one place in memory, else they are on the meta device.
    """

    def __init__(self, model: Any, *, tried_out: bool) -> None:
        self._model, self._tried_out = model, tried_out
        self.counts: dict[str, int] = {}
        self.num_embeddings = 0

    def __getattr__(self, name: str) -> Any:
        """Everything but building is the configuration's own."""
        return getattr(self._model, name)

    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        """The model on the meta device, or of zeros."""
        with torch.device("meta"):
            model = self._model.build(vocab_size=vocab_size, seq_len=seq_len)
        if not self.counts:
            self.counts = count_parameters(model, discover(model))
            self.num_embeddings = model.get_input_embeddings().weight.shape[0]
        if self._tried_out:
            _fill(model)
        return model


def _fill(model: nn.Module) -> None:
    """Give every tensor of a model on the meta device values, all of them one zero."""
    new: dict[int, Tensor] = {}

    def filled(tensor: Tensor) -> Tensor:
        if id(tensor) not in new:
            zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            new[id(tensor)] = nn.Parameter(zeros, tensor.requires_grad) if is_parameter else zeros
        return new[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = filled(tensor)  # type: ignore[assignment]


# -------------------------------------------------------------------- the command


def plan_command(argv: list[str]) -> int:
    """``trimtab plan``: print what a run would be; 0, or 2 if it could not be started.

    Args:
        argv: ``--world-size``, ``--rank``, ``--vocab-size``, and everything ``trimtab train`` takes.
    """
    from trimtab.train.cli import parse_train
    from trimtab.train.dry_run_text import render

    parser = argparse.ArgumentParser(
        prog="trimtab plan",
        description="Check a run on any number of ranks, on this machine and without them, and print what one rank "
        "would hold and send.",
        epilog="Everything else is as for trimtab train: --module, --config, and settings such as "
        "--parallelism.expert-parallel-degree 64.",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="number of ranks")
    parser.add_argument("--rank", type=int, default=0, metavar="I", help="the rank to describe (default: 0)")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="V",
        help="ids of the tokenizer (default: the configured tokenizer's)",
    )
    chosen, rest = parser.parse_known_args(argv)
    try:
        if chosen.world_size < 1:
            raise ValueError(f"--world-size={chosen.world_size} must be at least 1")
        config, name = parse_train(rest)
        found = dry_run(config, chosen.world_size, rank=chosen.rank, vocab_size=chosen.vocab_size)
    except ValueError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return 2
    print(render(found, name=name))
    return 0
