"""The balancer's life: what goes wrong in a training loop is loud, and nothing is left behind."""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.hf_models import tiny_model
from tests.toy import (
    assert_grads_equal,
    batch,
    grads,
    recorded,
    reference_grads,
    task_loss,
    toy_model,
)
from trimtab import Accumulation, GlobalBatch, GradReduction, Momentum, SequenceWise, Sign, ZLoss
from trimtab.reference import naive_counts

OBJECTIVES = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.1)]
ONE, TWO = batch(2, 5, seed=1, padded=True), batch(3, 4, seed=2, padded=True)


def built() -> list[Any]:
    return [config.build() for config in OBJECTIVES]


# ---------------------------------------------------------------- steps


def test_a_step_with_another_number_of_microbatches_is_exact() -> None:
    """The plan of the step, not the configured one, decides what is complete."""
    batches = [batch(2, 5, seed=seed) for seed in range(3)]
    model = toy_model()
    want = reference_grads(model, built(), batches, "softmax")
    balancer = trimtab.attach(model, OBJECTIVES)
    balancer.start_step(num_microbatches=3)
    for one in batches:
        task_loss(model, one).backward()
    balancer.step()
    assert_grads_equal(grads(model), want)
    assert balancer.ledger.num_microbatches == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_breaking_the_declared_order_is_an_error_for_every_objective(objective: Any) -> None:
    model = toy_model()
    order = Accumulation(num_microbatches=2, order="forward_first")
    trimtab.attach(model, [objective], accumulation=order)
    with pytest.raises(RuntimeError, match=r"after 1 of 2 .*order='forward_first' was declared"):
        task_loss(model, ONE).backward()


def test_prior_counts_are_of_that_steps_number_of_microbatches() -> None:
    model = toy_model()
    before, now = [batch(2, 5, seed=s) for s in range(4)], [batch(2, 5, seed=9 + s) for s in range(2)]
    with recorded(model) as calls, torch.no_grad():
        for one in [*before, *now]:
            model(**one.call)
    load = []
    for record in calls:
        counts = [naive_counts(ids, 6).double() for _, ids in record]
        prior = sum(counts[:4]) / 4
        seen = [counts[4] + prior, counts[4] + counts[5]]
        load.append([c / c.mean() for c in seen])
    want = reference_grads(model, [GlobalBatch.Config(coef=0.4).build()], now, "softmax", load)
    balancer = trimtab.attach(model, [GlobalBatch.Config(coef=0.4)], accumulation=4)
    for batches in (before, now):
        balancer.start_step(num_microbatches=len(batches))
        grads(model)
        for one in batches:
            task_loss(model, one).backward()
        balancer.step()
    assert_grads_equal(grads(model), want)


def test_start_step_in_the_middle_is_an_error() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=Accumulation(order="counting_pass"))
    with balancer.counting_pass():
        model(**ONE.call)
    with pytest.raises(RuntimeError, match="start_step comes before the step's first forward"):
        balancer.start_step(num_tokens=3)


def test_discard_forgets_everything_of_the_step() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES, reduction=GradReduction(microbatches="mean"))
    balancer.start_step(num_microbatches=2, num_tokens=1)
    (1024 * balancer.follow(task_loss(model, ONE))).backward()
    balancer.discard_step()
    grads(model)
    want = reference_grads(copy_without_balancer(model), built(), [TWO], "softmax")
    task_loss(model, TWO).backward()
    balancer.step()
    assert_grads_equal(grads(model), want)


def copy_without_balancer(model: nn.Module) -> Any:
    other = copy.deepcopy(model)
    trimtab.balancer_of(other).remove()
    return other


def test_an_interrupted_counting_pass_leaves_nothing() -> None:
    model = toy_model()
    order = Accumulation(num_microbatches=2, order="counting_pass")
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=order)

    def interrupted() -> None:
        with balancer.counting_pass():
            model(**ONE.call)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert balancer.ledger.settle()[0].num_counted == 0
    assert not balancer.context.counting


def test_a_failed_audit_leaves_nothing() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=2)

    def run_step() -> None:
        task_loss(model, ONE)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trimtab.audit(balancer, run_step)
    assert balancer.ledger.rows[0].num_forwards == 0
    assert all(getattr(b.moe.router, "_trimtab_router").injects for b in model.blocks)  # noqa: B009


# ---------------------------------------------------------------- scaling


def test_reduction_and_a_followed_scale_multiply() -> None:
    model = toy_model()
    want = reference_grads(model, built(), [ONE, TWO], "softmax")
    reduction = GradReduction(microbatches="mean", divisor=5.0)
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=2, reduction=reduction)
    sizes = {name: getattr(ONE, name) + getattr(TWO, name) for name in ("num_tokens", "num_sequences")}
    balancer.start_step(**sizes)
    for one in (ONE, TWO):
        loss = balancer.follow(task_loss(model, one) * 2 * 5)
        loss /= 2  # in place: the followed loss is no view
        (64 * loss).backward()
    balancer.step()
    have = {name: grad / (64 * 5) for name, grad in grads(model).items()}
    assert_grads_equal(have, want)


def test_float16_logits_must_follow_a_scale() -> None:
    model, make_batch = tiny_model("qwen3_moe", dtype=torch.float16)
    balancer = trimtab.attach(model, OBJECTIVES)
    loss = model(**make_batch(1, 4, seed=0)).loss
    with pytest.raises(RuntimeError, match=r"the logits are float16.*balancer\.follow\(loss\)"):
        loss.backward()
    balancer.discard_step()
    loss = balancer.follow(model(**make_batch(1, 4, seed=0)).loss)
    (1024 * loss).backward()


# ---------------------------------------------------------------- which tokens


class Pair(NamedTuple):
    first: Tensor
    rest: tuple[Tensor, ...]


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, None],
        lambda x: {"nested": (x, {"deep": x})},
        lambda x: Pair(x.detach(), (x,)),
        Output,
    ],
)
def test_recomputation_sees_its_microbatch_whatever_the_output_is(wrap: Any) -> None:
    objectives = [SequenceWise.Config(coef=0.3)]
    model = toy_model(checkpoint="nonreentrant")
    want = reference_grads(model, [c.build() for c in objectives], [ONE, TWO], "softmax")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return wrap(self.inner(input_ids))

    outer = Wrapped()
    order = Accumulation(num_microbatches=2, order="forward_first")
    balancer = trimtab.attach(outer, objectives, accumulation=order)
    # The innermost module that takes input_ids is the toy model, which is not told of the mask.
    balancer.context.argument_names = ()
    outputs = []
    for one in (ONE, TWO):
        with balancer.microbatch(valid_mask=one.attention_mask):
            outputs.append(outer(**one.call))
    for one, output in zip((ONE, TWO), outputs, strict=True):
        found: list[Tensor] = []
        torch.utils._pytree.tree_map_only(
            Tensor, found.append, vars(output) if isinstance(output, Output) else output
        )
        logits = next(t for t in found if t.requires_grad)
        loss_T = nn.functional.cross_entropy(logits.flatten(0, 1), one.input_ids.flatten(), reduction="none")
        (loss_T[one.valid_BS.flatten()].sum() / 10).backward()
    balancer.step()
    assert_grads_equal(grads(model), want)


def test_evaluation_between_forward_and_backward_changes_nothing() -> None:
    model = toy_model(checkpoint="nonreentrant")
    want = reference_grads(model, built(), [ONE], "softmax")
    balancer = trimtab.attach(model, OBJECTIVES)
    loss = task_loss(model, ONE)
    model.eval()
    with torch.no_grad():
        model(**TWO.call)
    model.train()
    loss.backward()
    balancer.step()
    assert_grads_equal(grads(model), want)


def test_a_layer_called_alone_is_not_of_the_last_microbatch() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [], accumulation=3)
    model(**ONE.call)
    layer = model.blocks[0].moe
    with torch.no_grad():
        layer(torch.randn(2, 5, 8, dtype=torch.float64))
    layer.eval()
    layer(torch.randn(7, 3, 8, dtype=torch.float64))
    layer.train()
    assert balancer.ledger.rows[0].num_forwards == 1
    layer(torch.randn(7, 3, 8, dtype=torch.float64))
    assert int(balancer.ledger.settle()[0].sizes[0]) == ONE.num_tokens + 21


def test_an_explicit_microbatch_ends_with_its_block() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=2)
    with balancer.microbatch(valid_mask=torch.tensor([[1, 0], [0, 0]])):
        model(torch.zeros(2, 2, dtype=torch.int64))
    model(torch.zeros(2, 2, dtype=torch.int64))
    assert balancer.ledger.settle()[0].sizes.tolist() == [1 + 4, 1 + 2, 1 + 2]


def test_documents_are_cut_at_row_starts() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [SequenceWise.Config(coef=1, unit="document")])
    model(torch.zeros(2, 4, dtype=torch.int64), cu_seqlens=torch.tensor([0, 6, 8]))
    assert balancer.ledger.settle()[0].sizes.tolist() == [8, 2, 3]


def test_evaluation_does_not_read_masks_or_positions() -> None:
    model = toy_model().eval()
    trimtab.attach(model, [SequenceWise.Config(coef=1, unit="document")])
    odd = torch.zeros(3, 2, 4, dtype=torch.int64)
    model(torch.zeros(2, 4, dtype=torch.int64), attention_mask=odd, position_ids=odd)


def test_an_empty_batch() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES, measure_every=1)
    empty = torch.zeros(0, 4, dtype=torch.int64)
    model(empty, attention_mask=empty).sum().backward()
    balancer.step()
    assert balancer.metrics()["losses"]["z"]["value"] == [0.0, 0.0]
    assert all(not grad.any() for grad in grads(model).values())


def test_padding_does_not_reach_the_largest_logit() -> None:
    model = toy_model(num_layers=1)
    balancer = trimtab.attach(model, [], measure_every=1)
    with recorded(model) as calls, torch.no_grad():
        model(TWO.input_ids)
    logits = calls[0][0][0]
    mask = torch.ones_like(TWO.input_ids)
    mask.flatten()[logits.amax(dim=1) == logits.max()] = 0
    model(TWO.input_ids, attention_mask=mask)
    balancer.step()
    logits = logits[mask.flatten().bool()]
    assert calls[0][0][0].max() > logits.max()
    assert balancer.metrics()["logit_max"] == [pytest.approx(logits.max().item())]


def test_replayed_ids_are_not_unbiased_counts() -> None:
    layer = toy_model().blocks[0].moe
    objective = SequenceWise.Config(coef=1, assignments="unbiased")
    balancer = trimtab.attach(layer, [objective])
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    with recorded_ids(layer) as record:
        layer(x, replay_ids_TK=torch.tensor([[0, 1]] * 5))
    executed, unbiased = balancer.ledger.settle()[0].counts_AE
    assert executed.tolist() == [5, 5, 0, 0, 0, 0]
    assert torch.equal(unbiased, naive_counts(record[0].topk(2).indices, 6))


class recorded_ids:  # noqa: N801
    def __init__(self, layer: Any) -> None:
        self.layer, self.record = layer, []

    def __enter__(self) -> list[Tensor]:
        self.handle = self.layer.router.register_forward_hook(lambda m, a, out: self.record.append(out[0]))
        return self.record

    def __exit__(self, *args: Any) -> None:
        self.handle.remove()


def test_jittered_inputs_are_not_recomputed_from() -> None:
    """The gate multiplies by noise of its own: only its logits tell what it did."""
    grads_of = []
    for keep in ("input", "logits"):
        model = toy_model(input_jitter=0.3)
        balancer = trimtab.attach(model, OBJECTIVES, keep=keep)
        torch.manual_seed(0)
        task_loss(model, ONE).backward()
        balancer.step()
        grads_of.append(grads(model))
    assert_grads_equal(*grads_of)


def test_infinite_logits_do_not_spoil_the_entropy() -> None:
    layer = toy_model().blocks[0].moe
    balancer = trimtab.attach(layer, [], measure_every=1)
    row, ledger = balancer.ledger.rows[0], balancer.ledger
    logits = torch.tensor([[0.0, 0.0, *[-torch.inf] * 4]])
    ledger.observe(0, 0, logits, torch.tensor([[0, 1]]), None, None, None, torch.tensor([1]), None, 0)
    assert row.measured[0].entropy_sum.item() == pytest.approx(0.6931472)


# ---------------------------------------------------------------- state


def test_state_restores_momentum_running_load_and_schedule() -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    balancer = trimtab.attach(model, [GlobalBatch.Config(coef=0.1)], bias=Momentum.Config(), measure_every=3)
    for seed in (1, 2):
        task_loss(model, batch(2, 5, seed=seed)).backward()
        balancer.step()
    other = toy_model(score="sigmoid", expert_bias=True)
    resumed = trimtab.attach(other, [GlobalBatch.Config(coef=0.1)], bias=Momentum.Config(), measure_every=3)
    resumed.load_state_dict(copy.deepcopy(balancer.state_dict()))
    other.load_state_dict(model.state_dict())
    grads(model)
    for one in (model, other):
        task_loss(one, ONE).backward()
        trimtab.balancer_of(one).step()
    assert balancer.metrics() == resumed.metrics()
    assert balancer.metrics()["losses"]["global_batch"]  # due in step 3 of both
    assert_grads_equal(grads(other), grads(model), rtol=0)
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_state_of_other_objectives_is_refused() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [SequenceWise.Config(coef=1, assignments="unbiased")])
    task_loss(model, ONE).backward()
    balancer.step()
    state = balancer.state_dict()
    balancer.remove()
    other = trimtab.attach(
        model, [trimtab.CommunicationLevel.Config(coef=1, num_devices=2, max_devices_per_token=1)]
    )
    with pytest.raises(ValueError, match=r"the saved counts are of 6 experts and \[.*UnbiasedCounts"):
        other.load_state_dict(state)


def test_layers_freeze_on_their_own() -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    balancer = trimtab.attach(model, [], bias=Sign.Config())
    balancer.freeze_bias(layers=["blocks.0.*"])
    before = [b.moe.router.expert_bias_E.clone() for b in model.blocks]
    task_loss(model, ONE)
    balancer.step()
    after = [b.moe.router.expert_bias_E for b in model.blocks]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    with pytest.raises(ValueError, match=r"no router with bias balancing matches layers=\('x',\)"):
        balancer.freeze_bias(layers=["x"])


def test_a_refused_attach_leaves_nothing() -> None:
    model = toy_model()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match="num_devices=4 must divide num_experts=6"):
        trimtab.attach(model, [trimtab.DeviceLevel.Config(coef=1, num_devices=4)])
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    trimtab.attach(model, OBJECTIVES)


@pytest.mark.parametrize(
    ("objectives", "settings", "message"),
    [
        (ZLoss.Config(coef=1), {}, r"must be a list of configs"),
        ([ZLoss], {}, r"must be a list of configs"),
        ([], {"accumulation": 2.0}, r"accumulation=2.0 must be a number of microbatches"),
        ([], {"accumulation": 0}, r"num_microbatches=0 must be at least 1"),
        ([], {"keep": "both"}, r"keep='both' must be 'input', 'logits' or 'host'"),
        ([], {"measure_every": -1}, r"measure_every=-1 must be at least 0"),
        ([ZLoss.Config(coef=1)] * 2, {}, r"objective 'z' is given more than once"),
    ],
)
def test_wrong_arguments(objectives: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trimtab.attach(toy_model(), objectives, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": "max"}, r"ranks='max' must be 'sum' or 'mean'"),
        ({"microbatches": "max"}, r"microbatches='max' must be 'sum' or 'mean'"),
        ({"num_ranks": 0}, r"num_ranks=0 must be at least 1"),
        ({"divisor": 0.0}, r"divisor=0.0 must be positive"),
        ({"divisor": float("inf")}, r"divisor=inf must be positive and finite"),
    ],
)
def test_wrong_reductions(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradReduction(**settings)


def test_a_new_objective_is_one_class() -> None:
    """Subclasses with another name inject like their parents: nothing else knows the names."""

    class MyZ(ZLoss):
        name = "my_z"

        class Config(ZLoss.Config):
            __slots__ = ()

            def build(self) -> "MyZ":
                return MyZ(self)

    model = toy_model()
    want = reference_grads(model, [ZLoss.Config(coef=0.1).build()], [ONE], "softmax")
    balancer = trimtab.attach(model, [MyZ.Config(coef=0.1)], measure_every=1)
    task_loss(model, ONE).backward()
    balancer.step()
    assert_grads_equal(grads(model), want)
    assert "my_z" in balancer.metrics()["losses"]


def test_second_derivatives_are_refused() -> None:
    model = toy_model()
    trimtab.attach(model, OBJECTIVES)
    loss = task_loss(model, ONE)
    (grad,) = torch.autograd.grad(loss, model.embed.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_ops_are_kept_out_of_cuda_graphs() -> None:
    for op in (torch.ops.trimtab.observe.default, torch.ops.trimtab.bind.default):
        assert torch.Tag.cudagraph_unsafe in op.tags


def test_default_dtype_does_not_matter() -> None:
    model = toy_model()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        balancer = trimtab.attach(model, OBJECTIVES)
        task_loss(model, ONE).backward()
        balancer.step()
        assert balancer._snapshots[0].running_load_E.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    have = grads(model)
    balancer.remove()
    assert_grads_equal(have, reference_grads(model, built(), [ONE], "softmax"))
