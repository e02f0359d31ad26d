"""Records of models of transformers: every family, generation, and layers of multi-token prediction."""

from typing import Any

import pytest
import torch

import trimtab
from tests.hf_models import MODELS, tiny_model
from tests.hf_reference import router_modules
from trimtab.integrations.mtp import add_mtp
from trimtab.records import WHATS
from trimtab.scores import scores


@pytest.mark.parametrize("family", MODELS)
def test_routers_of_stock_models(family: str) -> None:
    model, make_batch = tiny_model(family)
    outputs: list[Any] = []
    hooks = [m.register_forward_hook(lambda *call: outputs.append(call[2])) for m in router_modules(model)]
    model(**make_batch())
    for hook in hooks:
        hook.remove()
    with trimtab.record_routing(model, what=WHATS) as records:
        model(**make_batch())
    for name, output in zip(records, outputs, strict=True):
        logits_TE, weights, *rest = output if family != "llama4" else reversed(output)
        ids_TK = rest[0] if rest else logits_TE.topk(2).indices
        (record,) = records[name]
        assert torch.equal(record["ids"], ids_TK.reshape(-1, 2))
        assert torch.equal(record["logits"], logits_TE.reshape(-1, 8))
        chosen_TK = weights if rest else weights.gather(1, ids_TK)
        assert torch.equal(record["weights"], chosen_TK.reshape(-1, 2))
        assert torch.equal(record["scores"], scores(record["logits"], MODELS[family][2]))  # type: ignore[arg-type]


def test_a_generation_is_joined() -> None:
    """Prompt and single tokens with a cache, as one forward of the whole sequences; padding on the left."""
    model, _ = tiny_model("mixtral")
    model.eval()
    prompt = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    prompt[mask == 0] = 0
    with trimtab.record_routing(model, what=("ids", "weights")) as rollout:
        tokens = model.generate(
            input_ids=prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert rollout.num_forwards == 6
    whole = torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype)], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    with trimtab.record_routing(model, what=("ids", "weights")) as forward, torch.no_grad():
        model(input_ids=tokens, attention_mask=whole, position_ids=positions)
    joined, weights = rollout.joined("ids", length=11), rollout.joined("weights")
    real = whole[:, :10].bool()
    for name in forward:
        want = forward[name][0]
        ids_BSK = joined[name].view(2, 11, 2)
        assert torch.equal(ids_BSK[:, :10][real], want.by_sequence("ids")[:, :10][real])
        assert bool((ids_BSK[:, 10] == -1).all())
        have_BSK, want_BSK = weights[name].view(2, 10, 2), want.by_sequence("weights")[:, :10]
        torch.testing.assert_close(have_BSK[real], want_BSK[real], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="10 tokens of each sequence were recorded, more than length=9"):
        rollout.joined("ids", length=9)
    with pytest.raises(ValueError, match="length=11 pads ids with -1, and weights with nothing"):
        rollout.joined("weights", length=11)


def test_mtp_layers() -> None:
    model, _ = tiny_model("deepseek_v3")
    add_mtp(model, 2)
    for module in router_modules(model):
        module.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with trimtab.record_routing(model) as records:
        model(input_ids=ids, mtp_input_ids=torch.stack([ids.roll(-1, 1), ids.roll(-2, 1)]))
    assert tuple(records) == (
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
        "mtp.layers.0.mtp_block.mlp.gate",
        "mtp.layers.1.mtp_block.mlp.gate",
    )
    assert records.stacked("ids").shape == (1, 4, 24, 2)
