"""Balancing in a pipeline: gradients and counts equal the naive objectives, under every schedule and checkpoint.

M microbatches, p pipeline ranks, E experts.
"""

import warnings
from contextlib import nullcontext
from functools import partial
from itertools import permutations
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import trimtab
from tests.hf_models import MODELS
from tests.hf_reference import recorded, routed_tokens
from tests.parallel.double import double_precision
from tests.parallel.pipelines import (
    Batch,
    Case,
    cross_entropy,
    errors_of,
    joined,
    make_batches,
    make_parts,
    make_pipeline,
    num_labels,
    stage_call,
    stage_loss,
)
from tests.parallel.pool import Ranks, mesh_of
from tests.toy import Batch as ToyBatch
from tests.toy import ToyModel, grads, reference_grads, task_loss, toy_model
from tests.toy import batch as toy_batch
from tests.toy import recorded as toy_recorded
from trimtab import (
    Accumulation,
    Balancer,
    BatchWise,
    GlobalBatch,
    GradReduction,
    Objective,
    SequenceWise,
    ZLoss,
)
from trimtab.integrations.discovery import discover
from trimtab.integrations.parallel import decoder_layers
from trimtab.integrations.stages import run_stage
from trimtab.parallel.mesh import Degrees
from trimtab.parallel.pipeline import Pipeline
from trimtab.parallel.schedules import check_pipeline, order_of
from trimtab.parallel.zero_bubble import keep_microbatch, zero_bubble_compile_settings
from trimtab.reference import naive_counts, reference_loss
from trimtab.scores import ScoreName

SEQUENCE: list[Objective.Config] = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.05)]
EXACT = [*SEQUENCE, GlobalBatch.Config(coef=0.4, counts="exact")]
DOCUMENT: list[Objective.Config] = [SequenceWise.Config(coef=0.3, unit="document")]


def reference(
    case: Case, configs: list[Objective.Config], batches: list[Batch]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One process, naive losses, one graph: gradients, and each router's counts."""
    model = case.model()
    routers = discover(model)
    with recorded(model) as calls:
        total: Any = 0
        for batch in batches:
            logits = run_stage(model, batch.ids_BS, position_ids=batch.positions_BS)
            total = total + cross_entropy(logits, batch, num_labels(batches))
    counts = {}
    for router, record in zip(routers, calls, strict=True):
        described = [
            {"input_ids": b.ids_BS, "attention_mask": b.valid_BS, "position_ids": b.positions_BS}
            for b in batches
        ]
        routed = routed_tokens(record, described)
        counts[router.name] = sum(naive_counts(one.ids_TK[one.valid_T], router.num_experts) for one in routed)
        for config in configs:
            total = total + reference_loss(config.build(), routed, cast(ScoreName, MODELS[case.family][2]))
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}, counts


def attach_parts(case: Case, parts: list[Any], configs: list[Objective.Config]) -> dict[int, Balancer]:
    """A balancer for each part that has routers, by the part's identity."""
    accumulation = Accumulation(num_microbatches=case.num_microbatches, order=order_of(case.schedule))
    with_routers = [part for part in parts if any("Router" in type(m).__name__ for m in part.modules())]
    return {
        id(part): trimtab.attach(
            part, configs, accumulation=accumulation, reduction=GradReduction(num_ranks=1)
        )
        for part in with_routers
    }


def balanced_call(batches: list[Batch], balancers: dict[int, Balancer]) -> Any:
    call = stage_call(batches)

    def described_call(part: nn.Module, microbatch: int, hidden: Tensor | None) -> Tensor:
        balancer = balancers.get(id(part))
        described: Any = nullcontext()
        if balancer is not None:
            batch = batches[microbatch]
            described = balancer.microbatch(valid_mask=batch.valid_BS, position_ids=batch.positions_BS)
        with described:
            return call(part, microbatch, hidden)

    return described_call


def checkpoint(part: Any, mode: str, contexts: list[Any]) -> None:
    context_fn = None
    if mode == "selective":
        context_fn = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    if mode != "none":
        part.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": keep_microbatch(contexts, context_fn)}
        )


def train_balanced(
    case: Case, configs: list[Objective.Config], mode: str
) -> tuple[dict[str, float], list[str]]:
    """Errors of gradients in the second step, and routers whose counts were compared in both steps."""
    with double_precision():
        batches = make_batches(case.num_microbatches, packed=configs == DOCUMENT)
        want, counts = reference(case, configs, batches)
        parts = make_parts(case)
        contexts: list[Any] = []
        for part in parts:
            checkpoint(part, mode, contexts)
        balancers = attach_parts(case, parts, configs)
        contexts += [balancer.context for balancer in balancers.values()]
        pipeline = make_pipeline(case, parts)
        call = balanced_call(batches, balancers)
        seen = []
        for _ in range(2):
            for part in parts:
                part.zero_grad()
            for balancer in balancers.values():
                balancer.start_step(
                    num_tokens=sum(int(b.valid_BS.sum()) for b in batches),
                    num_sequences=sum(len(b.ids_BS) for b in batches),
                    num_documents=sum(b.num_documents for b in batches),
                )
            pipeline.evaluate(call, lambda logits, m: None, [tuple(batches[0].ids_BS.shape)] * 2)
            pipeline.step(call, stage_loss(batches))
            for balancer in balancers.values():
                for row in balancer.ledger.settle():
                    assert row.counts_AE is not None
                    torch.testing.assert_close(row.counts_AE[0], counts[row.name], rtol=0, atol=0)
                    seen.append(row.name)
                balancer.step()
        return errors_of(parts, want), seen


def train_compiled(case: Case, mode: str) -> dict[str, float]:
    """Errors of gradients of compiled layers, in float32."""
    # Dynamo looks at .grad of every graph input, and a layer's input is not a leaf.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    configs = SEQUENCE if mode == "none" else DOCUMENT
    batches = make_batches(case.num_microbatches, packed=configs is DOCUMENT)
    want, _ = reference(case, configs, batches)
    torch.compiler.reset()
    parts = make_parts(case)
    contexts: list[Any] = []
    for part in parts:
        checkpoint(part, mode, contexts)
        part.set_experts_implementation("batched_mm")
    balancers = attach_parts(case, parts, configs)
    contexts += [balancer.context for balancer in balancers.values()]
    with zero_bubble_compile_settings():
        for part in parts:
            for layer in decoder_layers(part):
                layer.compile(backend="aot_eager", fullgraph=True)
        pipeline = make_pipeline(case, parts)
        for balancer in balancers.values():
            balancer.start_step(
                num_tokens=sum(int(b.valid_BS.sum()) for b in batches),
                num_sequences=sum(len(b.ids_BS) for b in batches),
                num_documents=sum(b.num_documents for b in batches),
            )
        pipeline.step(balanced_call(batches, balancers), stage_loss(batches))
    return errors_of(parts, want)


def assert_balanced(ranks: Ranks, case: Case, configs: list[Objective.Config], mode: str) -> None:
    results = ranks.run(train_balanced, case.pp, case, configs, mode)
    model = case.model()
    errors = joined([result[0] for result in results])
    assert errors.keys() == {name for name, _ in model.named_parameters()}
    assert max(errors.values()) < 1e-10, max(errors.items(), key=lambda item: item[1])
    names = [router.name for router in discover(model)]
    assert sorted(name for _, seen in results for name in seen) == sorted(2 * names)


@pytest.mark.parametrize(
    ("schedule", "family", "mode"),
    [
        ("GPipe", "deepseek_v3", "none"),
        ("GPipe", "gpt_oss", "full"),
        ("LoopedBFS", "qwen3_moe", "selective"),
        ("GPipe", "llama4", "none"),
    ],
)
def test_step_scope_is_exact_where_forwards_come_first(
    ranks: Ranks, schedule: str, family: str, mode: str
) -> None:
    assert_balanced(ranks, Case(schedule, family), EXACT, mode)


@pytest.mark.parametrize(
    ("schedule", "family", "mode"),
    [
        ("1F1B", "gpt_oss", "none"),
        ("1F1B", "mixtral", "selective"),
        ("Interleaved1F1B", "deepseek_v3", "full"),
        ("InterleavedZeroBubble", "llama4", "none"),
        ("InterleavedZeroBubble", "qwen3_moe", "full"),
        ("ZBVZeroBubble", "deepseek_v3", "none"),
        ("ZBVZeroBubble", "mixtral", "full"),
        ("ZBVZeroBubble", "qwen3_moe", "selective"),
        ("DualPipeV", "gpt_oss", "none"),
        ("DualPipeV", "deepseek_v3", "full"),
    ],
)
def test_sequence_scope_is_exact_in_any_order(ranks: Ranks, schedule: str, family: str, mode: str) -> None:
    assert_balanced(ranks, Case(schedule, family), SEQUENCE, mode)


@pytest.mark.parametrize(
    ("schedule", "mode"), [("1F1B", "selective"), ("DualPipeV", "none"), ("ZBVZeroBubble", "full")]
)
def test_compiled_layers(ranks: Ranks, schedule: str, mode: str) -> None:
    case = Case(schedule, "mixtral", num_layers=4 if mode == "none" else 8, dtype=torch.float32)
    errors = joined(ranks.run(train_compiled, 2, case, mode, timeout=300))
    assert max(errors.values()) < 2e-5, max(errors.items(), key=lambda item: item[1])


def test_recomputation_sees_its_own_documents(ranks: Ranks) -> None:
    """Gradients of weights are computed when another microbatch, with fewer or more documents, was the last."""
    # Of a stage's last layer nothing that depends on it is computed again.
    assert_balanced(ranks, Case("ZBVZeroBubble", "mixtral", num_layers=8), DOCUMENT, "full")


# -------------------------------------------------------------------- late binding

P = 2


class ToyStage(nn.Module):
    """Blocks of a toy model, one per stage, under their names in the whole model."""

    def __init__(self, model: ToyModel, stage: int) -> None:
        super().__init__()
        self.embed = model.embed if stage == 0 else None
        self.blocks = nn.ModuleDict({str(stage): model.blocks[stage]})
        self.head = model.head if stage == P - 1 else None

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        x_BSD = inputs_embeds if self.embed is None else self.embed(input_ids)
        for block in self.blocks.values():
            x_BSD = block(x_BSD)
        return x_BSD if self.head is None else self.head(x_BSD)


def toy_batches(number: int, seed: int) -> list[ToyBatch]:
    return [toy_batch(2, 5, seed=seed + m) for m in range(number)]


class ToyPipeline:
    """A toy stage on each rank, balanced, under one schedule."""

    def __init__(
        self, schedule: str, num_microbatches: int, config: Objective.Config, only: int | None = None
    ) -> None:
        mesh = mesh_of(Degrees(pp=P))
        configs = [config] if only in (None, mesh.rank("pp")) else []
        self.part = ToyStage(toy_model(), mesh.rank("pp"))
        accumulation = Accumulation(num_microbatches=num_microbatches, order=order_of(schedule))
        self.balancer = trimtab.attach(
            self.part, configs, accumulation=accumulation, reduction=GradReduction(num_ranks=1)
        )
        plan = check_pipeline(schedule, pp=P, num_layers=P, num_microbatches=num_microbatches)
        self.pipeline = Pipeline([self.part], plan, mesh, hidden_shape=(2, 5, 8), dtype=torch.float64)

    def step(self, batches: list[ToyBatch]) -> dict[str, Tensor]:
        """Gradients of one step, whose loss is that of the head's output in `tests.toy`."""

        def call(part: nn.Module, m: int, hidden: Tensor | None) -> Tensor:
            return part(batches[m].input_ids, hidden)

        def loss(logits: Tensor, m: int) -> Tensor:
            return task_loss(cast(ToyModel, lambda **_: logits), batches[m])

        self.pipeline.step(call, loss)
        self.balancer.step()
        found = grads(self.part)
        return found


def seen_at_backward(m: int, num_microbatches: int, stage: int) -> int:
    """Forwards that a stage has run when the backward of microbatch m = 1..M starts under 1F1B."""
    return min(num_microbatches, m + P - 1 - stage)


def expected_load(mode: str, stage: int, now: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    """(E,) load fraction at each backward, from the definition of the mode."""
    M = len(now)
    loads = []
    for m in range(1, M + 1):
        n = seen_at_backward(m, M, stage)
        total: Any = sum(now[:n])
        if mode == "prior":
            total = total + (M - n) / M * cast(Tensor, sum(before))
        loads.append(total / total.mean())
    return loads


def toy_counts(model: ToyModel, batches: list[ToyBatch]) -> list[list[Tensor]]:
    with toy_recorded(model) as calls, torch.no_grad():
        for one in batches:
            model(**one.call)
    return [[naive_counts(ids, 6).double() for _, ids in record] for record in calls]


def late_binding(mode: str, M: int) -> float:
    """Largest relative error of this rank's gradients against loads of n_m = min(M, m + p - 1 - s) forwards."""
    config = GlobalBatch.Config(coef=0.4, counts=mode)
    step, last = toy_batches(M, 0), toy_batches(M, 20)
    model = toy_model()
    now, before = toy_counts(model, step), toy_counts(model, last)
    load = [expected_load(mode, stage, now[stage], before[stage]) for stage in range(P)]
    want = reference_grads(model, [config.build()], step, "softmax", load)
    toy = ToyPipeline("1F1B", M, config)
    toy.step(last)
    found = toy.step(step)
    return max(((found[name] - want[name]).abs().max() / want[name].abs().max()).item() for name in found)


@pytest.mark.parametrize("mode", ["prior", "running"])
@pytest.mark.parametrize("num_microbatches", [2, 5])
def test_1f1b_binds_what_it_has_counted(ranks: Ranks, mode: str, num_microbatches: int) -> None:
    assert max(ranks.run(late_binding, P, mode, num_microbatches)) < 1e-10


def residuals(M: int, stage: int) -> dict[str, Tensor] | None:
    """Gradient of one stage's router under each way to count, averaged over all orders of M microbatches."""
    batches = toy_batches(M, 40)
    weight = f"blocks.{stage}.moe.router.weight"
    configs: dict[str, tuple[str, Objective.Config]] = {
        "exact": ("GPipe", GlobalBatch.Config(coef=1.0, counts="exact")),
        "micro": ("1F1B", BatchWise.Config(coef=1.0, average_microbatches=True)),
        "running": ("1F1B", GlobalBatch.Config(coef=1.0, counts="running")),
        "prior": ("1F1B", GlobalBatch.Config(coef=1.0, counts="prior")),
    }
    found = {}
    for name, (schedule, config) in configs.items():
        # On this stage alone: objectives of later stages reach its router through hidden states.
        toy = ToyPipeline(schedule, M, config, only=stage)
        gradients = []
        for order in permutations(batches):
            toy.step(list(order))  # fills the prior
            gradients.append(toy.step(list(order)).get(weight))
        if mesh_of(Degrees(pp=P)).rank("pp") == stage:
            found[name] = torch.stack([g for g in gradients if g is not None]).mean(dim=0)
    return found or None


@pytest.mark.parametrize("stage", range(P))
def test_measured_residuals_follow_the_formulas(ranks: Ranks, stage: int) -> None:
    """What is left of the micro-batch excess on stage s: (sum_m 1/n_m - 1)/(M - 1), less than with n_m = m.

    With the step's own counts as prior f is (n_m f_seen + (M - n_m) f_final) / M, so the fraction left is
    (1/M) sum_m (n_m / M) (M / n_m - 1) / (M - 1) = (M - mean n_m) / (M (M - 1)); 1/(2M) where n_m = m.
    """
    M = 3
    found = ranks.run(residuals, P, M, stage)[stage]
    n = [seen_at_backward(m, M, stage) for m in range(1, M + 1)]
    assert n == ([2, 3, 3] if stage == 0 else [1, 2, 3])
    micro = found["micro"] - found["exact"]
    assert micro.abs().max() > 1e-5
    running = (sum(1 / k for k in n) - 1) / (M - 1)
    prior = (M - sum(n) / M) / (M * (M - 1))
    torch.testing.assert_close(found["running"] - found["exact"], micro * running, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["prior"] - found["exact"], micro * prior, rtol=1e-9, atol=1e-12)
