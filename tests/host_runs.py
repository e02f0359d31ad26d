"""A toy model whose logits wait for backward somewhere, on a copy engine without a device."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import trimtab
from tests.side_stream import SideStream
from tests.toy import Batch, ToyModel, batch, grads, task_loss, toy_model
from trimtab import Accumulation, GlobalBatch, ImportanceCV, SequenceWise, ZLoss
from trimtab.host_copies import HostCopies
from trimtab.host_logits import _held

OBJECTIVES: list[trimtab.Objective.Config] = [
    SequenceWise.Config(coef=0.3),
    GlobalBatch.Config(coef=0.4, counts="exact"),
    ImportanceCV.Config(coef=0.1),
    ZLoss.Config(coef=0.1),
]
BATCHES = [batch(3, 6, seed=5, padded=True), batch(3, 6, seed=6, padded=True), batch(3, 6, seed=7)]
L, M = 3, len(BATCHES)


class Run:
    """A model with a balancer that keeps its logits somewhere."""

    def __init__(
        self, model: ToyModel, keep: Any = "host", engine: SideStream | None = None, **settings: Any
    ) -> None:
        self.engine = engine or SideStream()
        self.copies = HostCopies(self.engine, **settings.pop("memory", {}))
        self.model = copy.deepcopy(model)
        self.call = self.model
        settings = {"accumulation": Accumulation(num_microbatches=M, order="forward_first"), **settings}
        if keep == "host":
            settings["host_copies"] = self.copies
        self.balancer = trimtab.attach(
            self.model, settings.pop("objectives", OBJECTIVES), keep=keep, **settings
        )

    def compile(self, backend: str = "aot_eager", dynamic: bool | None = None) -> "Run":
        for block in self.model.blocks:
            block.compile(fullgraph=True, backend=backend, dynamic=dynamic)
        return self

    def step(
        self, batches: Sequence[Batch] = BATCHES, order: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        losses = [task_loss(self.call, one) for one in batches]
        for place in order or range(len(batches)):
            losses[place].backward()
        self.balancer.step()
        return grads(self.model)

    def assert_all_is_returned(self) -> None:
        self.engine.run()
        assert not self.engine.mistakes
        assert self.copies.used_bytes == 0
        assert not _held


def assert_equal(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert have.keys() == want.keys()
    different = [name for name in want if not torch.equal(have[name], want[name])]
    assert not different
    assert any(value.abs().max() > 0 for value in want.values())


def model_of(score: str = "sigmoid", num_layers: int = L, **settings: Any) -> ToyModel:
    return toy_model(score=score, expert_bias=True, num_layers=num_layers, **settings)
