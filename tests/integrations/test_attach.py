"""attach() on stock transformers models: every parameter's gradient is that of plainly added losses."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from tests.hf_models import REQUIRED, D, E, K, tiny_model
from tests.hf_reference import (
    FLOAT32_ROUTERS,
    OBJECTIVES,
    Gradients,
    attached_grads,
    counts,
    num_valid,
    reference_grads,
    relative_error,
    router_modules,
    stock_model,
    take_grads,
    task_loss,
)
from trimtab import Accumulation, SequenceWise, ZLoss, attach
from trimtab.integrations.families import FAMILIES

# The gradients of the linear attention's decay cancel to 1e-4 of their terms in float32; in float64 these
# families are as exact as the others.
FLOAT32_TOLERANCE = {"qwen3_next": 2e-5, "qwen3_5_moe": 2e-5}

# transformers 5.23 deprecates this name for one that 5.20 does not have yet.
deprecated_name = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")


def tolerance(family: str) -> float:
    return FLOAT32_TOLERANCE.get(family, 4e-6)


@pytest.mark.parametrize("objectives", OBJECTIVES)
@pytest.mark.parametrize("family", REQUIRED)
def test_gradients_equal_added_losses(family: str, objectives: str) -> None:
    model, make_batch = stock_model(family)
    batch = make_batch(3, 12, seed=1, padding=True)
    configs = OBJECTIVES[objectives]
    want = reference_grads(model, family, configs, [batch])
    stock = model(**batch)
    for keep in ("input", "logits"):
        balancer = attach(model, configs, keep=keep)
        output = model(**batch)
        assert torch.equal(output.logits, stock.logits)
        assert torch.equal(output.loss, stock.loss)
        output.loss.backward()
        assert counts(balancer) == [K * num_valid(batch)] * 2
        balancer.remove()
        assert relative_error(take_grads(model), want) < tolerance(family)


@pytest.mark.parametrize("family", REQUIRED)
def test_ragged_accumulation_in_float64(family: str) -> None:
    """With the rounding of float32 gone nothing is left, but where the router itself is in float32."""
    model, make_batch = stock_model(family, dtype=torch.float64)
    # grouped_mm has no float64
    model.set_experts_implementation("eager")
    batches = [make_batch(3, 12, seed=1, padding=True), make_batch(2, 8, seed=2, padding=True)]
    want = reference_grads(model, family, OBJECTIVES["all"], batches)
    have, _ = attached_grads(model, OBJECTIVES["all"], batches)
    assert relative_error(have, want) < (4e-6 if family in FLOAT32_ROUTERS else 1e-13)


def test_effect_is_large() -> None:
    """The comparisons above can fail: without injection gradients differ by more than their size."""
    model, make_batch = stock_model("qwen3_moe")
    batch = make_batch(3, 12, seed=1, padding=True)
    want = reference_grads(model, "qwen3_moe", OBJECTIVES["all"], [batch])
    assert relative_error(reference_grads(model, "qwen3_moe", [], [batch]), want) > 0.5


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_documents_of_packed_rows(family: str) -> None:
    model, make_batch = stock_model(family)
    batch = make_batch(2, 12, seed=3)
    batch["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(3), *range(4), *range(5)]])
    for weighting in ("sequence", "token"):
        configs = [SequenceWise.Config(coef=0.3, unit="document", weighting=weighting)]
        want = reference_grads(model, family, configs, [batch])
        have, _ = attached_grads(model, configs, [batch])
        assert relative_error(have, want) < tolerance(family)
    rows_only = reference_grads(model, family, [SequenceWise.Config(coef=0.3)], [batch])
    assert relative_error(rows_only, want) > 1e-2


@pytest.mark.parametrize(
    "call", ["embeddings", "positional", "boolean mask", "row of padding", "left padding"]
)
def test_ways_to_call(call: str) -> None:
    model, make_batch = stock_model("mixtral")
    batch = make_batch(3, 12, seed=1, padding=True)
    mask = batch["attention_mask"]
    if call == "row of padding":
        mask[1] = 0
        batch["labels"][1] = -100
    if call == "left padding":
        batch["attention_mask"] = mask = mask.flip(1)
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
    want = reference_grads(model, "mixtral", OBJECTIVES["all"], [batch])
    balancer = attach(model, OBJECTIVES["all"])
    ids, labels = batch["input_ids"], batch["labels"]
    if call == "embeddings":
        loss = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, labels=labels).loss
    elif call == "positional":
        loss = model(ids, mask, labels=labels).loss
    elif call == "boolean mask":
        loss = model(input_ids=ids, attention_mask=mask.bool(), labels=labels).loss
    else:
        loss = model(**batch).loss
    loss.backward()
    assert counts(balancer) == [K * int(mask.sum())] * 2
    assert relative_error(take_grads(model), want) < tolerance("mixtral")


def injected(model: Any, batch: dict[str, Tensor], autocast: bool = False) -> Gradients:
    """What attaching adds to the gradients."""

    def run() -> Gradients:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        return take_grads(model)

    without = run()
    balancer = attach(model, OBJECTIVES["all"])
    with_losses = run()
    balancer.remove()
    return {name: with_losses[name].float() - without[name].float() for name in without}


@pytest.mark.parametrize("mode", ["bfloat16 model", "autocast"])
@pytest.mark.parametrize("family", REQUIRED)
def test_low_precision(family: str, mode: str) -> None:
    model, make_batch = stock_model(family)
    batch = make_batch(3, 12, seed=1, padding=True)
    want = injected(model, batch)
    autocast = mode == "autocast"
    have = injected(model if autocast else stock_model(family, dtype=torch.bfloat16)[0], batch, autocast)
    assert all(gradient.isfinite().all() for gradient in have.values())
    gates = [name for name in want if name.endswith(("gate.weight", "router.weight", "router.layer.weight"))]
    gates = [name for name in gates if want[name].shape == (E, D)]
    assert len(gates) == 2

    def flat(gradients: Gradients) -> Tensor:
        return torch.cat([gradients[name].flatten() for name in gates])

    assert F.cosine_similarity(flat(have), flat(want), dim=0) > 0.99
    assert 0.95 < flat(have).norm() / flat(want).norm() < 1.05


@deprecated_name
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", REQUIRED)
def test_checkpointing_counts_once(family: str, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two microbatches with other masks and shapes, both forwards first: each recomputation sees its own."""
    if not use_reentrant:
        # There the z-loss's gradient reaches a softmax router by the other node, which rounds otherwise: both
        # runs take that one.
        monkeypatch.setattr(trimtab.hooks, "saved_tensors_are_packed", lambda: True)
    model, make_batch = stock_model(family)
    batches = [make_batch(3, 12, seed=1, padding=True), make_batch(2, 8, seed=2, padding=True)]
    want, plain_counts = attached_grads(model, OBJECTIVES["all"], batches)
    calls = []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    handle = router_modules(model)[0].register_forward_hook(lambda *_: calls.append(1))
    have, counted = attached_grads(model, OBJECTIVES["all"], batches)
    handle.remove()
    # two forwards and two recomputations
    assert len(calls) == 4
    assert [int(c.sum()) for c in counted] == [K * sum(map(num_valid, batches))] * 2
    assert all(torch.equal(a, b) for a, b in zip(counted, plain_counts, strict=True))
    assert relative_error(have, want) < 1e-6


@deprecated_name
def test_checkpointing_in_plain_accumulation() -> None:
    model, make_batch = stock_model("qwen3_moe")
    batches = [make_batch(2, 8, seed=seed) for seed in range(3)]
    configs = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.05)]
    want = reference_grads(model, "qwen3_moe", configs, batches)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    balancer = attach(model, configs, accumulation=3)
    for batch in batches:
        task_loss(model, batch, 3).backward()
    assert counts(balancer) == [K * 48] * 2
    assert relative_error(take_grads(model), want) < tolerance("qwen3_moe")


def test_counting_pass_is_exact() -> None:
    model, make_batch = stock_model("deepseek_v3")
    batches = [make_batch(3, 12, seed=1, padding=True), make_batch(2, 8, seed=2, padding=True)]
    want = reference_grads(model, "deepseek_v3", OBJECTIVES["all"], batches)
    accumulation = Accumulation(num_microbatches=2, order="counting_pass")
    balancer = attach(model, OBJECTIVES["all"], accumulation=accumulation)
    with balancer.counting_pass():
        for batch in batches:
            model(**batch)
    for batch in batches:
        task_loss(model, batch, 2).backward()
    assert counts(balancer) == [K * sum(map(num_valid, batches))] * 2
    assert relative_error(take_grads(model), want) < tolerance("deepseek_v3")


class TestRefusals:
    def test_z_loss_without_logits(self) -> None:
        model, _ = stock_model("mixtral")
        row = dataclasses.replace(FAMILIES["MixtralTopKRouter"], exact_logits=False)
        with pytest.raises(
            ValueError, match=r"layers\.0\.mlp\.gate \(MixtralTopKRouter\) returns probabilities.*leave ZLoss"
        ):
            attach(model, [ZLoss.Config(coef=0.1)], families={"MixtralTopKRouter": row})
        # A refused attach leaves nothing behind.
        attach(model, [SequenceWise.Config(coef=0.1)], families={"MixtralTopKRouter": row})

    def test_second_balancer(self) -> None:
        model, _ = stock_model("mixtral")
        balancer = attach(model, OBJECTIVES["sequence"])
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate has a balancer already; call its remove"):
            attach(model, OBJECTIVES["sequence"])
        balancer.remove()
        attach(model, OBJECTIVES["sequence"])

    def test_unknown_model(self) -> None:
        with pytest.raises(ValueError, match="has no Mixture-of-Experts routers"):
            attach(nn.Sequential(nn.Linear(2, 2)), [])
        with pytest.raises(ValueError, match=r"no balancer is attached to this Linear; call trimtab\.attach"):
            trimtab.balancer_of(nn.Linear(2, 2))

    def test_unknown_router_is_named(self) -> None:
        model, _ = stock_model("mixtral")
        row = dataclasses.replace(FAMILIES["MixtralTopKRouter"], score="sigmoid")
        with pytest.raises(ValueError, match=r"MixtralTopKRouter at 'model\.layers\.0\.mlp\.gate'.*softmax"):
            attach(model, OBJECTIVES["sequence"], families={"MixtralTopKRouter": row})

    def test_stock_loss(self) -> None:
        model, _ = stock_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.02)
        with pytest.raises(
            ValueError,
            match=r"adds its own load-balancing loss: model\.config\.output_router_logits=True with "
            r"router_aux_loss_coef=0\.02; set model\.config\.output_router_logits = False",
        ):
            attach(model, OBJECTIVES["sequence"])
        # Counting and bias balancing alone do not clash with it.
        attach(model, [])

    def test_mask_that_hides_padding(self) -> None:
        model, make_batch = stock_model("mixtral")
        attach(model, OBJECTIVES["sequence"])
        batch = make_batch(2, 8)
        batch["attention_mask"] = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match=r"attention_mask is \(2, 1, 8, 8\).*balancer\.microbatch\("):
            model(**batch)

    def test_mask_that_hides_padding_can_be_told(self) -> None:
        model, make_batch = stock_model("mixtral")
        batch = make_batch(2, 8, padding=True)
        want = reference_grads(model, "mixtral", OBJECTIVES["all"], [batch])
        balancer = attach(model, OBJECTIVES["all"])
        mask = batch["attention_mask"].bool()
        visible = torch.ones(8, 8, dtype=torch.bool).tril() & mask[:, None, None, :]
        square = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        with balancer.microbatch(valid_mask=mask):
            model(**(batch | {"attention_mask": square})).loss.backward()
        assert counts(balancer) == [K * int(mask.sum())] * 2
        assert relative_error(take_grads(model), want) < tolerance("mixtral")

    def test_other_words(self) -> None:
        model, _ = stock_model("mixtral")
        with pytest.raises(ValueError, match="keep='scores' must be 'input', 'logits' or 'host'"):
            attach(model, [], keep="scores")  # type: ignore[arg-type]


def test_a_stock_loss_asked_for_in_a_call_is_reported_once() -> None:
    model, make_batch = tiny_model("mixtral", router_aux_loss_coef=0.01)
    trimtab.attach(model, [SequenceWise.Config(coef=0.1)], accumulation=3)
    with pytest.warns(UserWarning, match=r"MixtralForCausalLM adds its own .* \(router_aux_loss_coef=0.01\)"):
        model(**make_batch(1, 4, seed=0), output_router_logits=True)
    model(**make_batch(1, 4, seed=0), output_router_logits=True)
    model(**make_batch(1, 4, seed=0))


def test_router_logits_may_be_asked_for_where_there_is_no_stock_loss() -> None:
    model, make_batch = tiny_model("mixtral", router_aux_loss_coef=0.0)
    trimtab.attach(model, [SequenceWise.Config(coef=0.1)])
    model(**make_batch(1, 4, seed=0), output_router_logits=True)
