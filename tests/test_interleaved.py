"""Several microbatches in one forward are what they are one after the other: by turns, and as rows of one batch."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import trimtab
from tests.test_exactness import OBJECTIVES, RAGGED
from tests.toy import Batch, ToyModel, assert_grads_equal, batch, grads, reference_grads, toy_model
from tests.turns import (
    FORWARD_FIRST,
    PAIR,
    ROWS,
    Losses,
    assert_same,
    backward,
    by_turns,
    described,
    in_turn,
    loss_of,
    step,
    together,
)
from trimtab import (
    Accumulation,
    Balancer,
    BatchWise,
    GlobalBatch,
    GradReduction,
    ImportanceCV,
    Quantile,
    SequenceWise,
    ZLoss,
)

PADDING = Batch(PAIR[0].input_ids, torch.zeros_like(PAIR[0].input_ids), PAIR[0].position_ids)
CHECKPOINTS = [None, "nonreentrant", "reentrant", "selective"]


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def when_compiled(test: Any) -> Any:
    """Warnings of Dynamo, as in `tests.test_compile`; no graph is left to the next test."""
    for message in (".*context_fn.*", "The .grad attribute of a Tensor that is not a leaf"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return pytest.mark.usefixtures("fresh_compiler")(test)


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("losses", [by_turns, together])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_the_formula_of_separate_microbatches(name: str, losses: Losses) -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    want = reference_grads(model, [c.build() for c in OBJECTIVES[name]], ROWS, "sigmoid")
    assert_grads_equal(step(losses, model, ROWS, OBJECTIVES[name])[0], want)


@pytest.mark.parametrize("order", ["sum", "first_first", "last_first"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_bits_do_not_depend_on_turns(checkpoint: str | None, order: str) -> None:
    """Gradients, metrics and biases; recomputed layers see their own masks and documents, whose is the turn."""
    model = toy_model(score="sigmoid", expert_bias=True, num_layers=3)
    want = step(in_turn, model, PAIR, OBJECTIVES["all"], bias=Quantile.Config(), num_steps=2)
    model.checkpoint = checkpoint
    have = step(by_turns, model, PAIR, OBJECTIVES["all"], bias=Quantile.Config(), num_steps=2, order=order)
    assert_same(have, want)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_rows_of_one_batch_stay_microbatches(checkpoint: str | None) -> None:
    model = toy_model(score="sigmoid", expert_bias=True, num_layers=3)
    want = step(in_turn, model, ROWS, OBJECTIVES["all"], bias=Quantile.Config(), num_steps=2)
    model.checkpoint = checkpoint
    have = step(together, model, ROWS, OBJECTIVES["all"], bias=Quantile.Config(), num_steps=2)
    # Matrix products over more rows add up in another order.
    assert_grads_equal(have[0], want[0], rtol=1e-12)
    for key in ("load", "num_tokens", "bias", "dead_experts", "count_error"):
        assert have[1][key] == want[1][key]
    for name, value in want[1]["losses"].items():
        assert have[1]["losses"][name]["value"] == pytest.approx(value["value"], rel=1e-12)


def test_stretches_of_one_packed_row() -> None:
    """Microbatches of different lengths, one behind the other in a row."""
    model = toy_model()
    want = step(in_turn, model, RAGGED, OBJECTIVES["all"])

    def packed(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
        with balancer.concatenated([described(balancer, one) for one in batches]):
            logits = model(torch.cat([one.input_ids.flatten() for one in batches])[None])[0]
        parts = logits.split([one.input_ids.numel() for one in batches])
        return [loss_of(part[None], one) for part, one in zip(parts, batches, strict=True)]

    assert_grads_equal(step(packed, model, RAGGED, OBJECTIVES["all"])[0], want[0], rtol=1e-12)


@pytest.mark.parametrize("keep", ["input", "logits"])
@pytest.mark.parametrize("losses", [by_turns, together])
def test_what_backward_keeps(losses: Losses, keep: Any) -> None:
    model = toy_model(score="sqrt_softplus")
    want = reference_grads(model, [c.build() for c in OBJECTIVES["all"]], ROWS, "sqrt_softplus")
    assert_grads_equal(step(losses, model, ROWS, OBJECTIVES["all"], keep=keep)[0], want)


@pytest.mark.parametrize("mode", ["prior", "running", "previous"])
@pytest.mark.parametrize("losses", [by_turns, together])
def test_several_pairs_in_a_step(losses: Losses, mode: Any) -> None:
    """Step-scope losses see the same counts as when the forwards of each pair follow each other."""
    batches = [batch(2, 5, seed=seed, padded=True, packed="position_ids") for seed in range(6)]
    objectives = [
        GlobalBatch.Config(coef=0.4, counts=mode),
        SequenceWise.Config(coef=0.3, unit="document"),
        BatchWise.Config(coef=0.2, average_microbatches=True),
        ZLoss.Config(coef=0.1),
    ]
    model, plan = toy_model(num_layers=2), Accumulation(num_microbatches=6)
    want, have = (
        step(way, model, batches, objectives, num_turns=2, accumulation=plan, num_steps=2)
        for way in (in_turn, losses)
    )
    assert_grads_equal(have[0], want[0], rtol=1e-12)
    # The last bits of sums over more rows may differ, and so may whether two counts are compared as equal.
    assert have[1]["count_error"] == pytest.approx(want[1]["count_error"], rel=1e-12)
    assert have[1]["load"] == want[1]["load"]


@pytest.mark.parametrize("losses", [by_turns, together])
def test_undeclared_totals_are_each_microbatchs_own(losses: Losses) -> None:
    """As in plain accumulation each counts as 1 / M of the step, whatever its size: not each of its tokens."""
    objectives = [ZLoss.Config(coef=0.5), SequenceWise.Config(coef=0.3)]
    found = []
    for way in (in_turn, losses):
        model = toy_model()
        balancer = trimtab.attach(model, objectives, accumulation=2)
        backward(way(model, balancer, ROWS), "sum")
        balancer.step()
        found.append(grads(model))
    assert_grads_equal(found[1], found[0], rtol=1e-12)
    want = reference_grads(toy_model(), [c.build() for c in objectives], ROWS, "softmax")
    with pytest.raises(AssertionError, match="error"):
        assert_grads_equal(found[0], want)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("checkpoint", [None, "reentrant"])
@pytest.mark.parametrize("losses", [by_turns, together])
def test_counting_pass(losses: Losses, checkpoint: str | None) -> None:
    model = toy_model()
    want = reference_grads(model, [c.build() for c in OBJECTIVES["all"]], ROWS * 2, "softmax")
    model.checkpoint = checkpoint
    plan = Accumulation(num_microbatches=4, order="counting_pass")
    have = step(losses, model, ROWS * 2, OBJECTIVES["all"], num_turns=2, accumulation=plan)
    assert_grads_equal(have[0], want)


@pytest.mark.parametrize("checkpoint", [None, "nonreentrant", "reentrant"])
@pytest.mark.parametrize("pair", [[PAIR[0], PADDING], [PADDING, PAIR[1]], [PADDING, PADDING]])
def test_one_may_be_all_padding(pair: list[Batch], checkpoint: str | None) -> None:
    model = toy_model(checkpoint=checkpoint)
    want = step(in_turn, model, pair, OBJECTIVES["all"])
    assert_same(step(by_turns, model, pair, OBJECTIVES["all"]), want)
    assert want[1]["num_tokens"][0] == sum(one.num_tokens for one in pair)


def test_any_number_at_a_time() -> None:
    model = toy_model(checkpoint="nonreentrant")
    want = step(in_turn, model, RAGGED, OBJECTIVES["all"])
    have = step(by_turns, model, RAGGED, OBJECTIVES["all"])
    assert_grads_equal(have[0], want[0], rtol=1e-12)  # three terms add up in another order
    assert have[1] == want[1]
    one = RAGGED[:1]
    assert_same(step(by_turns, model, one, OBJECTIVES["all"]), step(in_turn, model, one, OBJECTIVES["all"]))


def test_turns_of_concatenated_microbatches() -> None:
    """Two batches by turns, each of them two microbatches."""
    batches = [*ROWS, batch(2, 6, seed=8, padded=True), batch(2, 6, seed=9)]
    model = toy_model(checkpoint="nonreentrant")
    want = step(in_turn, model, batches, OBJECTIVES["all"])

    def both(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
        pairs = [batches[:2], batches[2:]]
        tokens = [torch.cat([one.input_ids for one in pair]) for pair in pairs]
        joined = [balancer.concatenated([described(balancer, one) for one in pair]) for pair in pairs]
        with balancer.interleaved(joined) as runs:
            x_M = [run(model.embed, ids) for run, ids in zip(runs, tokens, strict=True)]
            for block in model.blocks:
                x_M = [run(model.run, block, x) for run, x in zip(runs, x_M, strict=True)]
        logits = torch.cat([model.head(x) for x in x_M])
        parts = logits.split([len(one.input_ids) for one in batches])
        return [loss_of(part, one) for part, one in zip(parts, batches, strict=True)]

    have = step(both, model, batches, OBJECTIVES["all"])
    assert_grads_equal(have[0], want[0], rtol=1e-12)
    assert have[1]["load"] == want[1]["load"]


def test_loss_scaling_is_followed() -> None:
    model = toy_model(checkpoint="nonreentrant")
    want = reference_grads(model, [c.build() for c in OBJECTIVES["all"]], PAIR, "softmax")
    reduction = GradReduction(microbatches="mean")
    balancer = trimtab.attach(model, OBJECTIVES["all"], accumulation=FORWARD_FIRST, reduction=reduction)
    losses = [balancer.follow(loss * 2) / 2 for loss in by_turns(model, balancer, PAIR)]
    (64 * torch.stack(losses)).sum().backward()
    assert_grads_equal({name: grad / 64 for name, grad in grads(model).items()}, want)


@pytest.mark.parametrize("losses", [by_turns, together])
def test_audit(losses: Losses) -> None:
    model = toy_model(checkpoint="reentrant")
    balancer = trimtab.attach(model, OBJECTIVES["all"], accumulation=FORWARD_FIRST)
    audit = trimtab.audit(balancer, lambda: backward(losses(model, balancer, ROWS), "sum"))
    assert audit.ok, audit


# ---------------------------------------------------------------- where parts begin and end


def test_parts_may_be_as_small_as_one_likes() -> None:
    """A layer is taken apart, as overlapping its dispatch with another microbatch's attention does."""
    model = toy_model(num_layers=2)
    want = step(in_turn, model, PAIR, OBJECTIVES["all"])

    def torn(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
        with balancer.interleaved([described(balancer, one) for one in batches]) as runs:
            x_M = [model.embed(one.input_ids) for one in batches]
            for block in model.blocks:
                normed_M = [block.norm(x) for x in x_M]
                routed_M = [run(block.moe.router, x) for run, x in zip(runs, normed_M, strict=True)]
                for place, (x, (_, weights, ids)) in enumerate(zip(normed_M, routed_M, strict=True)):
                    tokens = block.moe.dispatcher.dispatch(
                        x.flatten(0, 1),
                        ids,
                        weights,
                        score_before_experts=block.moe.config.score_before_experts,
                    )
                    y_ND = block.moe.experts(tokens.x_ND, tokens.num_tokens_per_expert_e)
                    y_TD = block.moe.dispatcher.combine(y_ND, tokens.plan)
                    x_M[place] = x_M[place] + y_TD.view_as(x)
        return [loss_of(model.head(x), one) for x, one in zip(x_M, batches, strict=True)]

    have = step(torn, model, PAIR, OBJECTIVES["all"])
    assert_grads_equal(have[0], want[0], rtol=1e-12)
    assert have[1] == want[1]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_checkpoints_around_and_inside_runs(whole: bool, outside: bool, reentrant: bool) -> None:
    """Around layers, and around the model, whose arguments do not tell of masks and documents."""
    model = toy_model(num_layers=2)
    want = step(in_turn, model, PAIR, OBJECTIVES["all"])

    def checkpointed(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
        # Reentrant checkpoints want an input with a gradient.
        zero = torch.zeros((), requires_grad=True)
        x_M: list[Any] = [one.input_ids if whole else model.embed(one.input_ids) for one in batches]
        with balancer.interleaved([described(balancer, one) for one in batches]) as runs:
            for part in [model] if whole else model.blocks:
                for place, run in enumerate(runs):
                    arguments = (lambda x, zero, part=part: part(x) + zero, x_M[place], zero)
                    if outside:
                        x_M[place] = checkpoint(run, *arguments, use_reentrant=reentrant)
                    else:
                        x_M[place] = run(checkpoint, *arguments, use_reentrant=reentrant)
        logits_M = x_M if whole else [model.head(x) for x in x_M]
        return [loss_of(logits, one) for logits, one in zip(logits_M, batches, strict=True)]

    assert_same(step(checkpointed, model, PAIR, OBJECTIVES["all"]), want)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_backward_of_one_between_layers_of_the_other(checkpoint: str | None) -> None:
    """Forward of B takes turns with backward of A, cut into its layers: counts of B are not read half."""
    objectives = [
        SequenceWise.Config(coef=0.3, unit="document"),
        BatchWise.Config(coef=0.2, average_microbatches=True),
        GlobalBatch.Config(coef=0.4, counts="running"),
        ImportanceCV.Config(coef=0.1),
        ZLoss.Config(coef=0.05),
    ]
    plan = Accumulation(num_microbatches=2)
    model = toy_model(num_layers=2)
    want = step(in_turn, model, PAIR, objectives, num_turns=1, accumulation=plan)
    model.checkpoint = checkpoint

    def overlapped(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
        first, second = batches
        with balancer.interleaved([described(balancer, one) for one in batches]) as (run_a, run_b):
            kept = [run_a(model.embed, first.input_ids)]
            cut = []
            for block in model.blocks:
                cut.append(kept[-1].detach().requires_grad_())
                kept.append(run_a(model.run, block, cut[-1]))
            run_a.end()
            head_input = kept[-1].detach().requires_grad_()
            loss_of(model.head(head_input), first).backward()
            grad = head_input.grad
            x = run_b(model.embed, second.input_ids)
            for index, block in enumerate(model.blocks):
                x = run_b(model.run, block, x)
                kept[-1 - index].backward(grad)
                grad = cut[-1 - index].grad
            kept[0].backward(grad)
        return [loss_of(model.head(x), second)]

    assert_same(step(overlapped, model, PAIR, objectives, accumulation=plan), want)


@pytest.mark.parametrize(
    "wrap", [lambda x: (x, None), lambda x: [{"x": x}], lambda x: {"nested": (x.detach(), [x])}]
)
def test_outputs_of_any_form_are_marked(wrap: Any) -> None:
    model = toy_model(num_layers=2)
    want = step(in_turn, model, PAIR, OBJECTIVES["all"])
    model.checkpoint = "nonreentrant"

    def wrapped(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
        with balancer.interleaved([described(balancer, one) for one in batches]) as runs:
            x_M = [model.embed(one.input_ids) for one in batches]
            for block in model.blocks:
                out_M = [
                    run(lambda *a: wrap(model.run(*a)), block, x) for run, x in zip(runs, x_M, strict=True)
                ]
                leaves = [torch.utils._pytree.tree_leaves(out) for out in out_M]
                x_M = [next(t for t in found if t is not None and t.requires_grad) for found in leaves]
        return [loss_of(model.head(x), one) for x, one in zip(x_M, batches, strict=True)]

    assert_same(step(wrapped, model, PAIR, OBJECTIVES["all"]), want)


# ---------------------------------------------------------------- models of one's own


class TwoBatchModel(nn.Module):
    """A model whose forward takes a list of microbatches and goes to and fro between them."""

    def __init__(self, inner: ToyModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens_M: list[Tensor], runs: Sequence[Any]) -> list[Tensor]:
        x_M = [self.inner.embed(tokens) for tokens in tokens_M]
        for block in self.inner.blocks:
            x_M = [run(self.inner.run, block, x) for run, x in zip(runs, x_M, strict=True)]
        return [self.inner.head(x) for x in x_M]


@when_compiled
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpoint", [None, "nonreentrant"])
def test_a_model_that_takes_a_list(checkpoint: str | None, compiled: bool) -> None:
    """Its forward is hooked, and knows that its parts speak for themselves; compiled it is one graph."""
    inner = toy_model(num_layers=2)
    want = step(in_turn, inner, ROWS, OBJECTIVES["all"])
    inner.checkpoint = checkpoint
    model = TwoBatchModel(inner)
    balancer = trimtab.attach(model, OBJECTIVES["all"], accumulation=FORWARD_FIRST, measure_every=1)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for number in range(3):
        grads(inner)
        described_M = [described(balancer, one) for one in ROWS]
        stance = torch.compiler.set_stance("fail_on_recompile" if number else "default")
        with balancer.interleaved(described_M) as runs, stance:
            logits_M = run([one.input_ids for one in ROWS], runs)
        backward([loss_of(x, one) for x, one in zip(logits_M, ROWS, strict=True)], "sum")
        balancer.step()
        assert_grads_equal(grads(inner), want[0], rtol=1e-12)
        assert balancer.metrics()["load"] == want[1]["load"]


def test_whole_models_may_be_parts() -> None:
    model = toy_model()
    want = step(in_turn, model, PAIR, OBJECTIVES["all"])

    def whole(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
        with balancer.interleaved([described(balancer, one) for one in batches]) as runs:
            logits_M = [run(model, one.input_ids) for run, one in zip(runs, batches, strict=True)]
        return [loss_of(logits, one) for logits, one in zip(logits_M, batches, strict=True)]

    assert_same(step(whole, model, PAIR, OBJECTIVES["all"]), want)


# ---------------------------------------------------------------- compiled


@when_compiled
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("losses", [by_turns, together])
def test_compiled_layers(losses: Losses, checkpoint: str | None) -> None:
    """One graph for all layers and microbatches, checkpointed inside or outside of it."""
    batches = [batch(3, 6, seed=5, padded=True), batch(3, 6, seed=6, padded=True)]
    model = toy_model(num_layers=10, score="sigmoid", expert_bias=True)
    want = reference_grads(model, [c.build() for c in OBJECTIVES["global"]], batches, "sigmoid")
    model.checkpoint = checkpoint
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    balancer = trimtab.attach(model, OBJECTIVES["global"], accumulation=FORWARD_FIRST)
    for _ in range(2):
        backward(losses(model, balancer, batches), "sum")
        balancer.step()
        assert_grads_equal(grads(model), want)
    assert counters["stats"]["unique_graphs"] == (2 if checkpoint == "reentrant" else 1)


@when_compiled
def test_compiled_layers_serve_every_division_of_rows() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES["sequence"], accumulation=FORWARD_FIRST)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for rows in range(1, 13):
        pair = [batch(rows, 3, seed=rows), batch(14 - rows, 3, seed=rows)]
        want = reference_grads(
            copy_without_balancer(model), [OBJECTIVES["sequence"][0].build()], pair, "softmax"
        )
        backward(together(model, balancer, pair), "sum")
        balancer.step()
        assert_grads_equal(grads(model), want)
    assert counters["stats"]["unique_graphs"] <= 4  # as it is, and with sizes that vary


def copy_without_balancer(model: ToyModel) -> ToyModel:
    other = copy.deepcopy(model)
    trimtab.balancer_of(other).remove()
    for block in other.blocks:
        block._compiled_call_impl = None
    return other
