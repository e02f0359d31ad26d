"""Gradients added where a router has its scores: exact, nothing held, another way where they cannot be."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from benchmarks.instruments import count_ops
from tests.census import Census
from tests.test_exactness import OBJECTIVES, RAGGED, totals
from tests.toy import Batch, ToyModel, assert_grads_equal, batch, grads, reference_grads, task_loss, toy_model
from trimtab import Accumulation, GlobalBatch, SequenceWise, ZLoss
from trimtab.injection import Injection
from trimtab.losses import Objective
from trimtab.router import Router
from trimtab.scores import ScoreName


class StockRouter(Router):
    """A softmax router as models write it: softmax over all experts, top-k, weights that sum to 1."""

    def forward(self, x: Tensor, *, replay_ids_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = self._logits(x.reshape(-1, x.shape[-1]))
        weights_TK, ids_TK = self.formed(logits_TE)
        return logits_TE, weights_TK / weights_TK.sum(dim=-1, keepdim=True), ids_TK

    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)


class Gathering(StockRouter):
    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE = torch.softmax(logits_TE.view(1, *logits_TE.shape), dim=-1).view(logits_TE.shape)
        ids_TK = probs_TE.detach().topk(self.top_k, dim=-1).indices
        return probs_TE.gather(1, ids_TK), ids_TK


class Masking(StockRouter):
    """What reaches its softmax is made by a multiplication, whose gradient somebody else may hold."""

    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE = logits_TE.softmax(dim=-1)
        ids_TK = probs_TE.detach().topk(self.top_k, dim=-1).indices
        kept_TE = probs_TE * torch.zeros_like(probs_TE).scatter(1, ids_TK, 1.0)
        return (kept_TE + 0.0).gather(1, ids_TK), ids_TK


class Sigmoids(StockRouter):
    """As DeepSeek-V3 is written: sigmoids of all experts, a bias for selection, weights that sum to 1."""

    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = logits_TE.sigmoid()
        ids_TK = (scores_TE.detach() + self.expert_bias_E).topk(self.top_k, dim=-1).indices
        return scores_TE.gather(1, ids_TK), ids_TK


class TopSigmoids(StockRouter):
    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return logits_TE.view(1, *logits_TE.shape).sigmoid().view(logits_TE.shape).topk(self.top_k, dim=-1)


class Tempered(StockRouter):
    """Its softmax is not of the logits that it returns."""

    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return (logits_TE * 1.0).softmax(dim=-1).topk(self.top_k, dim=-1)


SCORES: dict[type[StockRouter], ScoreName] = {Sigmoids: "sigmoid", TopSigmoids: "sigmoid"}


def model_of(router: type[StockRouter], **settings: Any) -> ToyModel:
    score = SCORES.get(router, "softmax")
    model = toy_model(score=score, expert_bias=router is Sigmoids, **settings)
    for block in model.blocks:
        block.moe.router.__class__ = router
    return model


def one_step(
    model: ToyModel,
    objectives: Sequence[Objective.Config],
    batches: Sequence[Batch],
    order: str,
    **settings: Any,
) -> dict[str, Tensor]:
    plan = Accumulation(num_microbatches=len(batches), order=order)
    balancer = trimtab.attach(model, objectives, accumulation=plan, measure_every=1, **settings)
    balancer.start_step(**totals(batches))
    if order == "forward_first":
        for loss in [task_loss(model, one) for one in batches]:
            loss.backward()
    else:
        for one in batches:
            task_loss(model, one).backward()
    balancer.step()
    balancer.remove()
    return grads(model)


@pytest.fixture
def injections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each router that took the other way."""
    seen: list[int] = []
    apply: Callable[..., Any] = Injection.apply
    monkeypatch.setattr(Injection, "apply", lambda *args: (seen.append(1), apply(*args))[1])
    return seen


@pytest.mark.parametrize("router", [StockRouter, Gathering, Masking, Sigmoids, TopSigmoids])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_the_formula(
    injections: list[int], name: str, router: type[StockRouter]
) -> None:
    model = model_of(router)
    objectives = [config.build() for config in OBJECTIVES[name]]
    want = reference_grads(model, objectives, RAGGED, SCORES.get(router, "softmax"))
    assert_grads_equal(one_step(model, OBJECTIVES[name], RAGGED, "forward_first"), want)
    assert not injections


@pytest.mark.parametrize("router", [StockRouter, Sigmoids])
def test_plain_batches_without_a_mask(injections: list[int], router: type[StockRouter]) -> None:
    model = model_of(router)
    batches = [batch(3, 6, seed=1), batch(3, 6, seed=2)]
    configs = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.05)]
    want = reference_grads(
        model, [config.build() for config in configs], batches, SCORES.get(router, "softmax")
    )
    assert_grads_equal(one_step(model, configs, batches, "alternating"), want)
    assert not injections


@pytest.mark.parametrize("checkpoint", ["reentrant", "nonreentrant", "selective"])
@pytest.mark.parametrize(
    ("router", "has_z"), [(StockRouter, False), (StockRouter, True), (Sigmoids, False), (Sigmoids, True)]
)
def test_checkpointing(
    injections: list[int], checkpoint: str, router: type[StockRouter], has_z: bool
) -> None:
    """What a checkpointed node has saved can be read once: with a z-loss the gradient takes the other way."""
    configs = [SequenceWise.Config(coef=0.3, unit="document"), GlobalBatch.Config(coef=0.4, counts="exact")]
    if has_z:
        configs.append(ZLoss.Config(coef=0.05))
    model = model_of(router)
    want = reference_grads(
        model, [config.build() for config in configs], RAGGED, SCORES.get(router, "softmax")
    )
    model.checkpoint = checkpoint
    assert_grads_equal(one_step(model, configs, RAGGED, "forward_first"), want)
    reads_saved = has_z or router is Sigmoids
    assert bool(injections) == (reads_saved and checkpoint != "reentrant")


def test_scores_that_somebody_else_uses_too() -> None:
    """A second reader of the probabilities, whose gradient is one tensor with the gradient of something else."""
    configs = [SequenceWise.Config(coef=0.3)]

    class Shared(StockRouter):
        def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
            probs_TE = logits_TE.softmax(dim=-1)
            extra_TE = torch.zeros_like(probs_TE).requires_grad_()
            self.read.append((probs_TE + extra_TE, extra_TE))
            return probs_TE.topk(self.top_k, dim=-1)

    found = []
    for attached in (True, False):
        model = model_of(Shared)
        for block in model.blocks:
            block.moe.router.read = []
        balancer = trimtab.attach(model, configs if attached else [])
        routers = [block.moe.router for block in model.blocks]
        for router in routers:
            router.read.clear()
        loss = task_loss(model, RAGGED[0])
        factor = torch.linspace(0, 1, 6, dtype=torch.float64)
        (loss + sum((both * factor).sum() for router in routers for both, _ in router.read)).backward()
        found.append([extra.grad for router in routers for _, extra in router.read])
        balancer.step()
    # Nothing is balanced in what it does not belong to.
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("way", ["tempered", "logits", "returned", "concatenated", "sigmoid"])
def test_where_it_cannot_be_the_gradient_takes_the_other_way(injections: list[int], way: str) -> None:
    configs = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.05)]
    model = model_of(Tempered if way == "tempered" else StockRouter)
    if way == "sigmoid":
        model = toy_model(score="sigmoid")
    score = "sigmoid" if way == "sigmoid" else "softmax"
    want = reference_grads(model, [config.build() for config in configs], RAGGED[:1], score)
    if way in ("tempered", "logits", "sigmoid"):
        keep = "logits" if way == "logits" else "input"
        have = one_step(model, configs, RAGGED[:1], "alternating", keep=keep, fused=False)
    else:
        balancer = trimtab.attach(model, configs, losses="returned" if way == "returned" else "injected")
        if way == "returned":
            loss = task_loss(model, RAGGED[0])
            losses = balancer.finalize()
            (loss + losses.balance_loss + losses.z_loss).backward()
        else:
            balancer.start_step(num_microbatches=2)
            one = balancer.microbatch(valid_mask=RAGGED[0].attention_mask)
            with balancer.concatenated([one, one]):
                ids = RAGGED[0].input_ids.repeat(2, 1)
                task_loss(model, Batch(ids, RAGGED[0].attention_mask.repeat(2, 1))).backward()
            want = None
        balancer.step()
        have = grads(model)
    assert injections
    if want is not None:
        assert_grads_equal(have, want)


@pytest.mark.parametrize("router", [StockRouter, Sigmoids])
def test_backward_twice_adds_the_same_twice(router: type[StockRouter]) -> None:
    model = model_of(router)
    balancer = trimtab.attach(model, OBJECTIVES["all"])
    loss = task_loss(model, RAGGED[0])
    loss.backward(retain_graph=True)
    once = grads(model)
    loss.backward()
    for name, grad in grads(model).items():
        assert torch.equal(grad, once[name]), name
    balancer.step()


def test_a_compiled_model_takes_the_other_way() -> None:
    torch._dynamo.reset()
    model = model_of(StockRouter)
    configs = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.05)]
    want = reference_grads(model, [config.build() for config in configs], RAGGED[:1], "softmax")
    balancer = trimtab.attach(model, configs)
    task_loss(torch.compile(model, backend="aot_eager", fullgraph=True), RAGGED[0]).backward()
    balancer.step()
    assert_grads_equal(grads(model), want)
    torch._dynamo.reset()


@pytest.mark.parametrize(("router", "most"), [(StockRouter, 5), (Sigmoids, 12)])
def test_few_operators_and_nothing_held(router: type[StockRouter], most: int) -> None:
    """Few for one balance loss, none for a further one, and no (T, E) held."""

    def measured(num_layers: int, configs: list[Objective.Config] | None) -> tuple[int, int]:
        model = model_of(router, num_layers=num_layers)
        balancer = None if configs is None else trimtab.attach(model, configs, measure_every=0)
        one = batch(4, 64, seed=0)

        def step() -> None:
            task_loss(model, one).backward()

        with Census() as census:
            loss = task_loss(model, one)
            held = census.num_bytes
        loss.backward()
        if balancer is not None:
            balancer.step()
        return count_ops(step), held

    sequence, more = (
        [SequenceWise.Config(coef=0.3)],
        [SequenceWise.Config(coef=0.3), GlobalBatch.Config(coef=0.1)],
    )
    per_layer = {}
    for name, configs in (("none", None), ("one", sequence), ("two", more)):
        (few, _), (many, held) = measured(2, configs), measured(6, configs)
        per_layer[name] = (many - few) / 4, held
    assert per_layer["one"][0] - per_layer["none"][0] <= most
    assert per_layer["two"][0] == per_layer["one"][0]
    # Counts and the like; the scores of six layers are 6 * 256 * 6 * 8 bytes.
    assert per_layer["two"][1] - per_layer["none"][1] <= 6 * 1000
