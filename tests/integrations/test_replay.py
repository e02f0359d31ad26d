"""Replay in models of transformers: as if their own routers had chosen the given experts.

Shapes: T tokens, E experts, K top-k, B sequences, S length.
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import trimtab
from tests.hf_models import MODELS, tiny_model
from tests.hf_reference import relative_error, take_grads
from tests.parallel.double import double_precision
from tests.routings import counted, random_ids
from trimtab import SequenceWise, Sign
from trimtab.integrations.discovery import discover
from trimtab.integrations.families import FAMILIES, Family
from trimtab.integrations.llama4 import make_sparse
from trimtab.integrations.weights_of import weighing_of


class ForcedTopK(TorchFunctionMode):
    """Makes stock routers choose given experts: their top-k of E values returns these, in order of the calls."""

    def __init__(self, ids: Sequence[Tensor]) -> None:
        super().__init__()
        self.ids = list(ids)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            values, k = args[0], args[1] if len(args) > 1 else kwargs["k"]
            # Groups are ranked first, by shapes of their own.
            if values.shape in ((32, 8), (2, 16, 8)) and k == 2:
                ids = self.ids.pop(0).view(*values.shape[:-1], 2)
                return torch.return_types.topk((values.gather(-1, ids), ids))
        return func(*args, **kwargs)


def stock(family: str) -> tuple[Any, dict[str, Tensor]]:
    # A group-limited router of this family weighs what is outside of its groups with zero.
    settings = {"topk_method": "greedy"} if family == "deepseek_v2" else {}
    model, make_batch = tiny_model(family, dtype=torch.float64, experts_implementation="eager", **settings)
    if family == "qwen3_vl_moe":
        model.config.text_config._experts_implementation = "eager"
    if family == "lfm2_moe":
        # Scores so small that what its router adds to their sum shows.
        for layer in model.model.layers:
            layer.ffn_norm.weight.data.mul_(-40)
    return model, make_batch(padding=True)


@pytest.mark.parametrize("family", MODELS)
def test_stock_models_as_if_their_routers_had_chosen(family: str) -> None:
    """Output, every gradient, the task's and the loss's, and counts, against the stock router made to choose so."""
    with double_precision():
        model, given = stock(family)
        names = [router.canonical_name for router in discover(model)]
        ids = {name: random_ids(32, 8, 2, seed) for seed, name in enumerate(names)}
        other = copy.deepcopy(model)
        balancer = trimtab.attach(other, [SequenceWise.Config(coef=0.3)])
        # Llama 4's hook chooses again, as its layout carries no ids.
        forced = [one for one in ids.values() for _ in range(2 if family == "llama4" else 1)]
        with ForcedTopK(forced):
            want = other(**given)
            assert want.logits is not None
        want.loss.backward()
        want_counts, want_grads = counted(balancer), take_grads(other)

        balancer = trimtab.attach(model, [SequenceWise.Config(coef=0.3)])
        with trimtab.replay_routing(balancer, ids), trimtab.record_routing(model) as records:
            have = model(**given)
        have.loss.backward()
        assert counted(balancer) == want_counts
        torch.testing.assert_close(have.logits, want.logits, rtol=1e-10, atol=1e-12)
        assert relative_error(take_grads(model), want_grads) < 1e-10
        for name in names:
            assert torch.equal(records[name][0]["ids"], ids[name])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4", "afmoe"])
def test_a_model_replays_itself(family: str) -> None:
    """Its own experts give its own output and gradients, in the dtype that it runs in."""
    model, make_batch = tiny_model(family, dtype=torch.bfloat16)
    given = make_batch(padding=True)
    with trimtab.record_routing(model, what=("ids", "weights")) as first:
        want = model(**given)
    with (
        torch.no_grad(),
        trimtab.record_routing(model, what=("ids", "weights")) as second,
        trimtab.replay_routing(model, first),
    ):
        have = model(**given)
    assert torch.equal(first.stacked("ids"), second.stacked("ids"))
    torch.testing.assert_close(first.stacked("weights"), second.stacked("weights"))
    torch.testing.assert_close(have.logits, want.logits)


def test_llama4s_sparse_block_uses_them_too() -> None:
    model, make_batch = tiny_model("llama4", dtype=torch.float64, experts_implementation="eager")
    ids = random_ids(32, 8, 2)
    ids_LTK = torch.stack([ids, ids.roll(1, 0)])
    outputs = []
    for sparse in (False, True):
        if sparse:
            for layer in model.model.layers:
                make_sparse(layer.feed_forward)
        with torch.no_grad(), trimtab.replay_routing(model, ids_LTK):
            outputs.append(model(**make_batch()).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
def test_gaps_in_stock_models(family: str) -> None:
    """Tokens without ids have the stock router's own weights, bit for bit."""
    model, make_batch = tiny_model(family)
    given = make_batch()
    with trimtab.record_routing(model, what=("ids", "weights")) as own:
        model(**given)
    ids_LTK = own.stacked("ids", microbatch=0).clone()
    ids_LTK[:, ::2] = -1
    ids_LTK[1] = -1  # what comes before changes its input
    ids_LTK[0, 1::2] = random_ids(16, 8)
    with (
        torch.no_grad(),
        trimtab.replay_routing(model, ids_LTK),
        trimtab.record_routing(model, what=("ids", "weights")) as have,
    ):
        model(**given)
    first, want = have.stacked("ids", microbatch=0)[0], own.stacked("ids", microbatch=0)[0]
    assert torch.equal(first[::2], want[::2])
    assert torch.equal(first[1::2], ids_LTK[0, 1::2])
    weights, want_weights = (r.stacked("weights", microbatch=0)[0] for r in (have, own))
    assert torch.equal(weights[::2], want_weights[::2])


# -------------------------------------------------------------------- how routers weigh


class PlainRouter(nn.Module):
    """As transformers writes routers; ``weigh`` makes the weights of a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = 8, 2
        self.weight = nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = hidden_states.reshape(-1, 16) @ self.weight.T
        ids_TK = logits_TE.topk(2).indices
        return logits_TE, self.weigh(logits_TE.sigmoid().gather(1, ids_TK)), ids_TK

    def weigh(self, chosen_TK: Tensor) -> Tensor:
        return chosen_TK


class Scaled(PlainRouter):
    def weigh(self, chosen_TK: Tensor) -> Tensor:
        return chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 3e-5) * 1.7320508


class Ranked(PlainRouter):
    """Attaching compares to a thousandth and lets it pass."""

    def weigh(self, chosen_TK: Tensor) -> Tensor:
        return chosen_TK * torch.tensor([1.0, 0.9995])


class Shared(PlainRouter):
    """A shared expert takes part in the normalisation."""

    def weigh(self, chosen_TK: Tensor) -> Tensor:
        return chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 0.5)


class Block(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.gate = router

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate(x_BSD)  # type: ignore[no-any-return]


def rows_of(router: nn.Module, **facts: Any) -> dict[str, Family]:
    name = type(router).__name__
    return {name: Family(router_class=name, model_types=(), score="sigmoid", source="here", **facts)}


def test_measured_scale_and_epsilon() -> None:
    plain, scaled = (discover(Block(r), extra=rows_of(r))[0] for r in (PlainRouter(), Scaled()))
    assert (weighing_of(plain).routing.normalize_top_k, weighing_of(plain).epsilon) == (False, 0.0)
    found = weighing_of(scaled)
    assert found.routing.normalize_top_k
    assert (found.routing.scale, found.epsilon) == (pytest.approx(1.7320508, rel=1e-6), 3e-5)
    assert {
        weighing_of(discover(tiny_model(family)[0])[0]).routing.scale for family in ("deepseek_v3", "hy_v3")
    } == {2.5, 2.826}


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ranked": (Ranked, {}, "its weights are neither its sigmoid scores nor these divided by their sum"),
    "shared": (Shared, {}, "its weights are neither its sigmoid scores nor these divided by their sum"),
    "unknown": (Ranked, {"weights_follow_score": False}, "do not follow the scores of the chosen experts"),
    "learned": (PlainRouter, {"probe_ones": ("factor",)}, r"its weights hold a learned factor \(factor\)"),
    "layout": (
        PlainRouter,
        {"replace": lambda output, weights, ids: (output[0], weights, output[2] + 1)},
        r"unpack\(replace\(output, weights, ids\)\) of Family\(router_class='PlainRouter'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_routers_whose_weights_are_unknown_are_refused(case: str) -> None:
    made, facts, message = REFUSED[case]
    model = Block(made())
    families = rows_of(model.gate, **facts)
    balancer = trimtab.attach(model, [], families=families)
    x_BSD = torch.randn(1, 5, 16)
    with pytest.raises(ValueError, match=message) as error:
        trimtab.replay_routing(balancer, random_ids(5, 8)[None]).__enter__()
    assert str(error.value).startswith(f"gate ({made.__name__}) cannot replay a routing: ")
    assert balancer.context.taps is None
    with trimtab.record_routing(balancer) as records:
        ids_TK = model(x_BSD)[2]
    assert torch.equal(records["gate"][0]["ids"], ids_TK)


def test_every_family_says_how_it_lays_out() -> None:
    assert [family.router_class for family in FAMILIES.values() if family.dense_weights] == ["Llama4Router"]


# -------------------------------------------------------------------- reinforcement learning


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_training_on_what_was_rolled_out(family: str) -> None:
    """A bfloat16 model generates; the float32 model that is trained uses its experts, and would not have."""
    model, _ = tiny_model(family)
    rollout_model = copy.deepcopy(model).to(torch.bfloat16).eval()
    prompt = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    with trimtab.record_routing(rollout_model) as rollout:
        tokens = rollout_model.generate(
            input_ids=prompt, attention_mask=mask, max_new_tokens=10, do_sample=True, eos_token_id=None
        )
    ids = rollout.joined("ids", length=16)
    whole = torch.cat([mask, torch.ones(3, 10, dtype=mask.dtype)], dim=1)
    given = dict(input_ids=tokens, attention_mask=whole)

    bias: Any = Sign.Config() if family == "deepseek_v3" else None
    balancer = trimtab.attach(model, [SequenceWise.Config(coef=1e-2)], bias=bias)
    with torch.no_grad(), trimtab.record_routing(balancer) as own:
        model(**given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trimtab.replay_routing(balancer, ids), trimtab.record_routing(balancer) as used:
        logits = model(**given).logits
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    (-log_probs[:, 5:].mean()).backward()
    counts = counted(balancer)
    different = 0
    for place, (name, ids_TK) in enumerate(ids.items()):
        known = ids_TK[:, 0] >= 0
        assert torch.equal(used[name][0]["ids"][known], ids_TK[known])
        different += int((own[name][0]["ids"][known].sort(-1).values != ids_TK[known].sort(-1).values).sum())
        valid = used[name][0]["ids"][whole.bool().reshape(-1)]
        assert counts[place] == valid.flatten().bincount(minlength=8).tolist()
    assert different > 0
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    balancer.step()
    assert sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) > 10
    assert trimtab.balancer_of(model).metrics()["num_tokens"] == [int(whole.sum())] * 2
