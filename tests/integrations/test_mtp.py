"""Multi-token prediction against its formula, and against transformers' own model that drafts with such modules.

Shapes: B rows, S length, D width, E experts, K top-k.
"""

import copy
import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_layers import MtpModel

import trimtab
from tests.hf_models import K, tiny_model
from tests.hf_reference import recorded, relative_error, take_grads
from tests.parallel.double import double_precision
from tests.parallel.mtp import shifted, tiny
from tests.parallel.reference import Rows
from tests.parallel.runner import token_batch
from trimtab.integrations.discovery import discover
from trimtab.integrations.experts import IMPLEMENTATION, use_trimtab_experts
from trimtab.integrations.mtp import MtpOutput, add_mtp, mtp_layers
from trimtab.reference import RoutedTokens, reference_loss
from trimtab.train.mtp import MtpConfig, MtpLoss, mtp_inputs, mtp_targets, num_mtp_labels

FAMILIES = ("deepseek_v3", "glm4_moe", "qwen3_5_moe")
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
# Lengths of documents in rows of 24 tokens, and how many of each row are padding.
DOCUMENTS = ((24,), (7, 1, 16), (3, 2, 2, 17))
PADDING = (0, 0, 5)


def rows() -> Rows:
    """Packed rows with documents shorter than the depths, and padding."""
    lengths = torch.tensor([length for row in DOCUMENTS for length in row])
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()]).view(3, 24)
    documents = torch.arange(len(lengths)).repeat_interleave(lengths).view(3, 24)
    ids = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(24) < 24 - torch.tensor(PADDING)[:, None]
    labels = torch.full((3, 24), -100)
    follows = valid[:, 1:] & (positions[:, 1:] > 0)
    labels[:, :-1] = ids[:, 1:].masked_fill(~follows, -100)
    return Rows(ids, labels, valid, positions, documents)


def run(model: Any, given: Rows, depths: int) -> MtpOutput:
    ids = mtp_inputs(token_batch(given), depths)
    output = model(
        input_ids=given.input_ids, position_ids=given.position_ids, mtp_input_ids=ids, use_cache=False
    )
    assert isinstance(output, MtpOutput)
    return output


# -------------------------------------------------------------------- the formula


def by_the_formula(model: Any, given: Rows, depths: int) -> Tensor:
    """(depths,) sums of cross entropies, each document by itself, each depth on the tokens that it has."""
    decoder, sums = model.model, [torch.zeros(()) for _ in range(depths)]
    for start, end in pairwise(given.cu_seqlens.tolist()):
        ids = given.input_ids.reshape(1, -1)[:, start:end]
        labels = given.labels.reshape(-1)[start:end]  # of the next token
        h = decoder(input_ids=ids, use_cache=False).last_hidden_state
        for k, layer in enumerate(mtp_layers(model), start=1):
            n = ids.shape[1] - k  # tokens that have a token k ahead
            if n < 1:
                break
            emb = decoder.embed_tokens(ids[:, k:])
            x = layer.eh_proj(torch.cat([layer.enorm(emb), layer.hnorm(h[:, :n])], dim=-1))
            # Positions of the token that is looked at: what depends on them is relative.
            rotary = decoder.rotary_emb(x, torch.arange(k, k + n)[None])
            causal = torch.full((n, n), -torch.inf).triu(1)[None, None]
            h = layer.post_norm(layer.mtp_block(x, position_embeddings=rotary, attention_mask=causal))
            logits, ahead = model.lm_head(h[0]), labels[k:]
            sums[k - 1] = sums[k - 1] + F.cross_entropy(logits, ahead, reduction="sum", ignore_index=-100)
    return torch.stack(sums)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_formula(family: str) -> None:
    given, depths = rows(), 2
    numbers = [int((shifted(given, k)[1] >= 0).sum()) for k in (1, 2)]
    assert numbers[0] > numbers[1] > 0
    with double_precision():
        model = tiny(family, 2, depths, attn_implementation="sdpa")
        use_trimtab_experts(model)
        naive = by_the_formula(model, given, depths)
        want = 0.3 * (naive / torch.tensor(numbers)).mean()
        want.backward()
        want_grads = take_grads(model)
        batch = token_batch(given)
        assert num_mtp_labels(batch, depths).tolist() == numbers
        loss = MtpLoss(0.3, numbers, torch.arange(24))
        have = loss.share(run(model, given, depths).mtp_logits, batch)
        have.backward()
    assert have.item() == pytest.approx(want.item(), rel=1e-12)
    assert 0.3 * loss.values[0].item() == pytest.approx(want.item(), rel=1e-12)
    grads = take_grads(model)
    assert all(bool(grads[name].any()) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert all(
        bool(g.any()) for name, g in grads.items() if name.startswith("mtp.") and "experts" not in name
    )
    errors = {name: relative_error({name: grads[name]}, {name: want_grads[name]}) for name in grads}
    assert not {name: error for name, error in errors.items() if error > 1e-10}


def test_tokens_are_shifted_within_documents() -> None:
    given = rows()
    batch = token_batch(given)
    ids, targets = mtp_inputs(batch, 2), mtp_targets(batch, 2)
    for k in (1, 2):
        want_ids, want_labels = shifted(given, k)
        assert torch.equal(ids[k - 1], want_ids)
        assert torch.equal(targets[k - 1], want_labels)
    # Written out: documents of 3, 2, 2 and 17 tokens, the last 5 of which are padding.
    row = given.input_ids[2].tolist()
    assert ids[1, 2, :8].tolist() == [row[2], row[2], row[2], row[4], row[4], row[6], row[6], row[9]]
    assert targets[0, 2, :8].tolist() == [row[2], -100, -100, -100, -100, -100, -100, row[9]]
    assert targets[0, 2, 16:].tolist() == [row[18], *[-100] * 7]


def test_tokens_that_were_not_said_are_not_predicted() -> None:
    """Labels of conversations are -100 in the middle of a document too."""
    batch = token_batch(rows())
    batch.labels_BS[0, 5:9] = -100
    targets = mtp_targets(batch, 2)
    assert (targets[0, 0, 3:7] == -100).all()
    assert (targets[1, 0, 2:6] == -100).all()
    assert targets[0, 0, 2] == batch.labels_BS[0, 4]


def test_other_documents_are_not_seen() -> None:
    model, given = tiny("deepseek_v3", 2, 2), rows()
    changed = given.input_ids.clone()
    changed[1, 8:] = 63 - changed[1, 8:] + 3
    other = Rows(changed, given.labels, given.valid_mask, given.position_ids, given.document_ids)
    with torch.no_grad():
        for one, two in zip(run(model, given, 2).mtp_logits, run(model, other, 2).mtp_logits, strict=True):
            assert torch.equal(one[1, :8], two[1, :8])
            assert not torch.equal(one[1, 8:], two[1, 8:])


# -------------------------------------------------------------------- transformers' own


@pytest.mark.filterwarnings("ignore:.*is falling back to its reference PyTorch implementation")
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_are_those_of_transformers(family: str) -> None:
    depths, S = 2, 12
    layers = {"layer_types": LINEAR[:2]} if family == "qwen3_5_moe" else {}
    model: Any = tiny(family, 2, depths, **layers).eval()
    drafter = MtpModel(model, depths).to(torch.float64).eval()
    own = {f"layers.{name.removeprefix('layers.')}": x for name, x in model.mtp.state_dict().items()}
    missing, unexpected = drafter.load_state_dict(own, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("layers.")]
    ids = torch.randint(3, 64, (2, S), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(S).expand(2, S)
    with torch.no_grad():
        ahead = torch.stack([F.pad(ids[:, k:], (0, k)) for k in (1, 2)])
        output = model(input_ids=ids, position_ids=positions, mtp_input_ids=ahead, use_cache=False)
        main = model(input_ids=ids, position_ids=positions, use_cache=False)
        assert torch.equal(output.logits, main.logits)
        state = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        for k in (1, 2):
            n = S - depths  # what both depths know the next tokens of
            state = drafter.forward_layer(
                k - 1, state[:, :n], positions[:, k : k + n], None, ids[:, k : k + n]
            )
            drafted = drafter._project_to_logits(state)
            torch.testing.assert_close(output.mtp_logits[k - 1][:, :n], drafted, rtol=1e-5, atol=1e-5)


def test_a_last_layer_of_another_kind_is_not_the_pattern() -> None:
    model, _ = tiny_model("qwen3_5_moe", num_layers=3, layer_types=LINEAR)
    add_mtp(model, 1)
    (layer,) = mtp_layers(model)
    assert type(layer.enorm) is type(model.model.norm)
    assert hasattr(layer.mtp_block, "self_attn")
    assert model.config.mtp_layer_types == ["full_attention"]


# -------------------------------------------------------------------- around it


def test_the_model_stays_the_stock_model() -> None:
    model, make_batch = tiny_model("glm4_moe")
    stock, batch = copy.deepcopy(model), make_batch(2, 8)
    before = dict(model.named_parameters())
    add_mtp(model, 1)
    assert isinstance(model, type(stock))
    assert type(model).__name__ == type(stock).__name__
    assert model.config.num_mtp_layers == 1
    with torch.no_grad():
        for name in ("logits", "loss"):
            assert torch.equal(model(**batch)[name], stock(**batch)[name])
        given = {"mtp_input_ids": batch["input_ids"][None]}
        output = model(**batch, **given)
        assert torch.equal(output.loss, stock(**batch).loss)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert torch.equal(other(**batch, **given).mtp_logits[0], output.mtp_logits[0])
    assert all(parameter is before[name] for name, parameter in model.named_parameters() if name in before)
    assert not model.lm_head._forward_pre_hooks
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_initialised_as_the_models_own(family: str) -> None:
    model, _ = tiny_model(family, num_layers=2, initializer_range=0.05)
    torch.manual_seed(0)
    add_mtp(model, 1)
    block = mtp_layers(model)[0].mtp_block
    for weight in (mtp_layers(model)[0].eh_proj.weight, block.mlp.experts.down_proj, block.mlp.gate.weight):
        assert 0.03 < weight.std() < 0.07
    on_meta, _ = tiny_model(family, num_layers=2)
    add_mtp(on_meta.to("meta"), 1)
    assert all(parameter.is_meta for parameter in on_meta.mtp.parameters())
    assert on_meta.mtp.state_dict().keys() == model.mtp.state_dict().keys()


def test_implementations_are_the_main_models() -> None:
    model: Any = tiny_model("deepseek_v3")[0]
    add_mtp(model, 1)
    use_trimtab_experts(model)
    model.set_attn_implementation("sdpa")
    run(model, rows(), 1)
    block = mtp_layers(model)[0].mtp_block
    assert block.mlp.experts.config._experts_implementation == IMPLEMENTATION
    assert block.self_attn.config._attn_implementation == "sdpa"


def test_routers_are_found_and_balanced() -> None:
    """Injected gradients are those of the plain losses, over all valid tokens, of every layer alike."""
    given = rows()
    configs = [trimtab.SequenceWise.Config(coef=0.3), trimtab.ZLoss.Config(coef=0.05)]
    names = [f"model.layers.{i}.mlp.gate" for i in (1,)] + [
        f"mtp.layers.{k}.mtp_block.mlp.gate" for k in (0, 1)
    ]
    with double_precision():
        model = tiny("deepseek_v3", 2, 2)
        assert [router.canonical_name for router in discover(model)] == names
        with recorded(model) as calls:
            output = run(model, given, 2)
            zero = 0.0 * (output.logits.sum() + sum(logits.sum() for logits in output.mtp_logits))
        total = zero
        for ((logits, ids),) in calls:
            sequences = torch.arange(3).repeat_interleave(24)
            routed = RoutedTokens(
                logits.reshape(-1, logits.shape[-1]),
                ids.reshape(-1, K),
                sequences,
                given.document_ids.reshape(-1),
                given.valid_mask.reshape(-1),
            )
            for config in configs:
                total = total + reference_loss(config.build(), [routed], "sigmoid")
        total.backward()
        want = take_grads(model)
        balancer = trimtab.attach(model, configs, bias=trimtab.Sign.Config(speed=0.1), measure_every=1)
        bias = [router.expert_bias.clone() for router in discover(model)]
        with balancer.microbatch(valid_mask=given.valid_mask):
            output = run(model, given, 2)
        (0.0 * (output.logits.sum() + sum(logits.sum() for logits in output.mtp_logits))).backward()
        have = take_grads(model)
        balancer.step()
    assert bool(want["mtp.layers.1.mtp_block.mlp.gate.weight"].any())
    errors = {name: relative_error({name: have[name]}, {name: want[name]}) for name in want}
    assert not {name: error for name, error in errors.items() if error > 1e-10}
    metrics = balancer.metrics()
    assert metrics["layers"] == names
    assert metrics["num_tokens"] == [int(given.valid_mask.sum())] * 3
    assert all(math.isfinite(value) for value in metrics["losses"]["sequence_wise"]["value"])
    for router, before in zip(discover(model), bias, strict=True):
        assert not torch.equal(router.expert_bias, before)


# -------------------------------------------------------------------- settings


def test_the_coefficient_follows_its_schedule() -> None:
    # 0.3 for 10 of 14.8 trillion tokens, then 0.1 (arXiv:2412.19437, section 4.2).
    config = MtpConfig(coef=0.3, schedule=((0, 1.0), (1000, 1.0), (1001, 1 / 3)))
    assert [round(config.coef_at(step), 12) for step in (0, 500, 1000, 1001, 9999)] == [
        0.3,
        0.3,
        0.3,
        0.1,
        0.1,
    ]
    falling = MtpConfig(coef=0.4, schedule=((10, 1.0), (20, 0.0)))
    assert [falling.coef_at(step) for step in (0, 15, 30)] == pytest.approx([0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, r"mtp\.num_layers=0 must be at least 1; leave mtp out"),
        ({"coef": -0.1}, r"mtp\.coef=-0\.1 must be at least 0"),
        ({"coef": float("nan")}, r"mtp\.coef=nan must be at least 0"),
        ({"schedule": ()}, r"mtp\.schedule=\(\) must hold points of increasing step"),
        ({"schedule": ((5, 1.0), (5, 0.0))}, "must hold points of increasing step"),
        ({"schedule": ((0, -1.0),)}, "must not have negative factors"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MtpConfig(**settings)


def test_models_that_cannot_have_it_are_refused() -> None:
    model, _ = tiny_model("glm4_moe")
    with pytest.raises(ValueError, match="num_layers=0 must be at least 1"):
        add_mtp(model, 0)
    model.config.chain_hidden_post_norm = True
    with pytest.raises(
        ValueError, match="chain_hidden_post_norm=True, under which MTP modules are chained or scored"
    ):
        add_mtp(model, 1)
    model.config.chain_hidden_post_norm = None
    granite, _ = tiny_model("granitemoe", embedding_multiplier=12.0)
    with pytest.raises(
        ValueError, match=r"GraniteMoeForCausalLM has embedding_multiplier=12\.0, under which"
    ):
        add_mtp(granite, 1)
    add_mtp(model, 1)
    with pytest.raises(ValueError, match="Glm4MoeForCausalLM has MTP modules already"):
        add_mtp(model, 1)
    assert mtp_layers(torch.nn.Linear(1, 1)) == []
