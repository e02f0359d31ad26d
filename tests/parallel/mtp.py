"""Models with multi-token prediction: one optimiser step on ranks, and as plainly as it can be written on one.

Shapes: B rows, S length, D depths, E experts, K top-k.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.hf_models import MODELS, VOCAB, E, K, randomize_routing, tiny_config
from tests.hf_reference import recorded, relative_error, router_modules, take_grads
from tests.parallel.cases import Case, model_settings, objectives
from tests.parallel.double import double_precision
from tests.parallel.pool import mesh_of
from tests.parallel.reference import B, Rows, S, make_step, task_loss
from tests.parallel.runner import token_batch, train_config
from trimtab import GlobalBatch, Sign
from trimtab.integrations.mtp import add_mtp
from trimtab.parallel.fsdp import clip_gradients
from trimtab.reference import RoutedTokens, naive_counts, reference_loss
from trimtab.scores import ScoreName
from trimtab.train.config import TrainConfig
from trimtab.train.engine import Engine
from trimtab.train.model import Balancing, ModelConfig
from trimtab.train.mtp import MtpConfig

BIAS_FAMILIES = ("deepseek_v3", "glm4_moe")
SPEED, COEF = 0.01, 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyModel(ModelConfig):
    """A tiny stock model in float64 with MTP modules, or with an embedding that is the head too."""

    family: str
    mtp: MtpConfig | None = None
    tied: bool = False

    @property
    def has_expert_bias(self) -> bool:
        return self.family in BIAS_FAMILIES

    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        depths = 0 if self.mtp is None else self.mtp.num_layers
        return tiny(self.family, self.num_layers, depths, tied=self.tied)


def tiny(family: str, num_layers: int, num_depths: int, *, tied: bool = False, **overrides: Any) -> Any:
    """The model before the step; the same weights in every process."""
    settings = {**model_settings(family, num_layers), "tie_word_embeddings": tied, **overrides}
    if family == "qwen3_5_moe":
        settings.setdefault("layer_types", ["full_attention"] * num_layers)
    default = torch.get_default_dtype()
    # Random numbers drawn as float64 would be others.
    torch.set_default_dtype(torch.float32)
    try:
        model_class, config = tiny_config(family, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = model_class(config)
            if num_depths:
                add_mtp(model, num_depths)
        with torch.no_grad():
            # Larger than as initialised, so that each part is seen in the gradients of the others.
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter *= 3
        randomize_routing(model)
    finally:
        torch.set_default_dtype(default)
    return model.to(torch.float64).train()


# -------------------------------------------------------------------- plainly, on one process


@dataclass(frozen=True, slots=True)
class Expected:
    """What one process gets; layers by the name of their router.

    Args:
        loss: the main model's.
        mtp_loss: mean over depths, without the coefficient.
        norm: of all gradients.
        grads: gradient of every parameter.
        counts: (E,) assignments of the step by layer.
        bias: (E,) expert bias after the step by layer.
        num_tokens: valid tokens of the step.
    """

    loss: float
    mtp_loss: float
    norm: float
    grads: dict[str, Tensor]
    counts: dict[str, Tensor]
    bias: dict[str, Tensor]
    num_tokens: int


def shifted(rows: Rows, depth: int) -> tuple[Tensor, Tensor]:
    """(B, S) ids that a depth reads and labels that it predicts, token by token."""
    ids, labels = [], []
    for row_ids, row_labels, documents in zip(
        rows.input_ids.tolist(), rows.labels.tolist(), rows.document_ids.tolist(), strict=True
    ):
        last = {document: place for place, document in enumerate(documents)}
        ends = [last[document] for document in documents]
        ids.append([row_ids[min(t + depth, end)] for t, end in enumerate(ends)])
        # Labels of rows are of the next token already.
        labels.append([row_labels[t + depth] if t + depth <= end else -100 for t, end in enumerate(ends)])
    return torch.tensor(ids), torch.tensor(labels)


def expected(case: Case, num_depths: int, *, tied: bool = False) -> Expected:
    """The step of a case on one process, all microbatches in one graph."""
    with double_precision():
        return _expected(case, num_depths, tied)


def _expected(case: Case, num_depths: int, tied: bool) -> Expected:
    step, model = make_step(case), tiny(case.family, case.num_layers, num_depths, tied=tied)
    paths = {id(module): name for name, module in model.named_modules()}
    names = [paths[id(router)] for router in router_modules(model)]
    ahead = [[shifted(rows, k) for k in range(1, num_depths + 1)] for rows in step.microbatches]
    numbers = [sum(int((each[k][1] >= 0).sum()) for each in ahead) for k in range(num_depths)]
    main, mtp = torch.zeros(()), torch.zeros(())
    with recorded(model) as calls:
        for rows, depths in zip(step.microbatches, ahead, strict=True):
            given = {"mtp_input_ids": torch.stack([ids for ids, _ in depths])} if depths else {}
            output = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **given)
            main = main + task_loss(output.logits, rows.labels, step.num_labels)
            for k, (_, labels) in enumerate(depths):
                logits = output.mtp_logits[k].flatten(0, 1)
                depth = F.cross_entropy(logits, labels.reshape(-1), reduction="sum")
                mtp = mtp + depth / numbers[k] / num_depths
    total, counts = main + COEF * mtp, {}
    for name, record in zip(names, calls, strict=True):
        routed = [
            _routed(logits_TE, ids, rows)
            for (logits_TE, ids), rows in zip(record, step.microbatches, strict=True)
        ]
        counts[name] = torch.stack([naive_counts(r.ids_TK[r.valid_T], E) for r in routed]).sum(dim=0)
        for config in objectives(case):
            if not isinstance(config, GlobalBatch.Config):
                score = cast(ScoreName, MODELS[case.family][2])
                total = total + reference_loss(config.build(), routed, score)
    total.backward()  # type: ignore[no-untyped-call]
    bias = {}
    for name, counts_E in counts.items():
        if case.family in BIAS_FAMILIES:
            excess_E = counts_E.double() - counts_E.double().mean()
            bias[name] = model.get_submodule(name).e_score_correction_bias - SPEED * excess_E.sign()
    grads = take_grads(model)
    norm = float(torch.stack([grad.norm() for grad in grads.values()]).norm())
    return Expected(main.item(), mtp.item(), norm, grads, counts, bias, step.totals["num_tokens"])


def _routed(logits_TE: Tensor, ids_TK: Tensor, rows: Rows) -> RoutedTokens:
    return RoutedTokens(
        logits_TE.reshape(-1, logits_TE.shape[-1]),
        ids_TK.reshape(-1, K),
        torch.arange(B).repeat_interleave(S),
        rows.document_ids.reshape(-1),
        rows.valid_mask.reshape(-1),
    )


# -------------------------------------------------------------------- on ranks


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank has after the step.

    Args:
        loss: this rank's part of the main loss.
        mtp_loss: likewise of multi-token prediction, without the coefficient.
        norm: of all gradients, as they are clipped by.
        grads: (name, whole gradient) of the parameters of its stages; empty on all ranks of a stage but one.
        layers: names of its routers with the load of their experts.
        num_tokens: that each of them counted.
        bias: (E,) expert bias by router.
        replicas_agree: whether gradients are the same bits on all ranks that hold copies.
    """

    loss: float
    mtp_loss: float
    norm: float
    grads: list[tuple[str, Tensor]]
    layers: dict[str, list[float]]
    num_tokens: list[int]
    bias: dict[str, Tensor]
    replicas_agree: bool


def mtp_train_config(
    case: Case, num_depths: int, *, tied: bool = False, backend: str | None = None
) -> TrainConfig:
    """The trainer's configuration of a case."""
    # Global-batch counts depend on the schedule; whether a balancer gets them right is not asked here.
    losses = tuple(config for config in objectives(case) if not isinstance(config, GlobalBatch.Config))
    bias = Sign.Config(speed=SPEED) if case.family in BIAS_FAMILIES else None
    mtp = MtpConfig(num_layers=num_depths, coef=COEF) if num_depths else None
    model = TinyModel(
        balancing=Balancing(objectives=losses, bias=bias),
        family=case.family,
        num_layers=case.num_layers,
        num_experts=E,
        top_k=K,
        mtp=mtp,
        tied=tied,
    )
    return replace(train_config(replace(case, family="mixtral"), backend), model=model)


def run_step(case: Case, num_depths: int, tied: bool = False, backend: str | None = None) -> Outcome:
    """The step of a case on this rank; with ``backend`` compiled and to the precision of float32."""
    torch._dynamo.reset()
    if backend is not None:
        return _run(case, num_depths, tied, backend)
    with double_precision():
        return _run(case, num_depths, tied, None)


def make_engine(case: Case, config: TrainConfig) -> Engine:
    """The trainer's engine of a case on this rank."""
    run, mesh = config.for_world(case.degrees.world_size), mesh_of(case.degrees)
    return Engine(config, run, mesh=mesh, device=torch.device("cpu"), vocab_size=VOCAB)


def _run(case: Case, num_depths: int, tied: bool, backend: str | None) -> Outcome:
    engine = make_engine(case, mtp_train_config(case, num_depths, tied=tied, backend=backend))
    mesh = engine.mesh
    assert mesh is not None
    batches = [
        token_batch(r.part(mesh.rank("data"), case.degrees.data)) for r in make_step(case).microbatches
    ]
    with engine.settings():
        loss = engine.train_step(batches, engine.totals(batches))
    norm = clip_gradients(engine.parameters(), float("inf"), mesh, copies=engine.copies)
    grads, digest = [], hashlib.sha256()
    for part in engine.parts:
        for name, parameter in part.module.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            digest.update(local.detach().contiguous().numpy().tobytes())
            grads.append((name, grad.full_tensor() if isinstance(grad, DTensor) else grad.detach()))
    for balancer in engine.balancers:
        balancer.step()
    metrics = [balancer.metrics() for balancer in engine.balancers]
    first = mesh.group("tokens") is None or dist.get_rank(mesh.group("tokens")) == 0
    return Outcome(
        loss=float(loss),
        mtp_loss=0.0 if engine.mtp_loss is None else float(engine.mtp_loss),
        norm=float(norm),
        grads=grads if first else [],
        layers={n: load for m in metrics for n, load in zip(m["layers"], m["load"], strict=True)},
        num_tokens=[number for m in metrics for number in m["num_tokens"]],
        bias={
            router.name: bias.clone()
            for part in engine.parts
            for router in part.routers
            if (bias := router.expert_bias) is not None
        },
        replicas_agree=_same(digest.hexdigest(), mesh.group("dp_replicate")),
    )


def _same(digest: str, group: Any) -> bool:
    if group is None:
        return True
    digests: list[Any] = [None] * group.size()
    dist.all_gather_object(digests, digest, group=group)
    return len(set(digests)) == 1


def check(outcomes: list[Outcome], want: Expected, tolerance: float) -> None:
    """Everything one process has, on every rank that has it."""
    grads: dict[str, torch.Tensor] = {}
    for outcome in outcomes:
        for name, grad in outcome.grads:
            if name in grads:  # a replica on another stage: the same bits
                assert name == "model.embed_tokens.weight"
                assert torch.equal(grads[name], grad)
            grads[name] = grad
    assert grads.keys() == want.grads.keys()
    grads = {name: grad.reshape(want.grads[name].shape) for name, grad in grads.items()}
    errors = {name: relative_error({name: grad}, {name: want.grads[name]}) for name, grad in grads.items()}
    assert not {name: error for name, error in errors.items() if not error < tolerance}
    assert sum(outcome.loss for outcome in outcomes) == pytest.approx(want.loss, rel=tolerance)
    assert sum(outcome.mtp_loss for outcome in outcomes) == pytest.approx(want.mtp_loss, rel=tolerance)
    assert all(outcome.norm == pytest.approx(want.norm, rel=tolerance) for outcome in outcomes)
    assert all(outcome.replicas_agree for outcome in outcomes)
    for outcome in outcomes:
        assert set(outcome.num_tokens) <= {want.num_tokens}
        for name, load in outcome.layers.items():
            counts_E = want.counts[name].double()
            assert load == pytest.approx((counts_E / counts_E.mean()).tolist(), rel=1e-12)
        for name, bias_E in outcome.bias.items():
            torch.testing.assert_close(bias_E.double(), want.bias[name], rtol=tolerance, atol=tolerance)
    assert {name for outcome in outcomes for name in outcome.layers} == want.counts.keys()
    assert {name for outcome in outcomes for name in outcome.bias} == want.bias.keys()
