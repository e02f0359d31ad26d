"""Each family on the trainer's path equals the stock model of transformers in one process.

Plans of several processes are in test_support.py. Here: float32, settings that the support matrix has no room for,
and that the comparison itself would see a difference.
"""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from docs.generate_support import WARNINGS
from tests.models.parity import (
    PLANS,
    TOLERANCE,
    TOLERANCE_FLOAT32,
    Errors,
    Outcome,
    Plan,
    compare,
    expected,
    float32_tolerance,
    parity_step,
    run_step,
    stock_model,
    train_config,
)
from tests.models.sizes import families, small_config
from tests.parallel.pool import Ranks
from trimtab.parallel.mesh import Degrees
from trimtab.train.config import TrainConfig
from trimtab.train.hf_model import YarnConfig
from trimtab.train.registry import load_config
from trimtab.train.vision_model import VisionLanguage

FAMILIES = families()
ONE = PLANS["one"]


def errors_of(ranks: Ranks, config: TrainConfig, plan: Plan, dtype: torch.dtype = torch.float64) -> Errors:
    config = train_config(config, plan)
    outcomes = ranks.run(run_step, plan.world_size, config, dtype, timeout=120)
    model: Any = config.model
    return compare(outcomes, expected(model, config.data.packing, dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_the_stock_model(ranks: Ranks, family: str) -> None:
    """Logits, loss and gradients in the precision that people train in."""
    config = small_config(family)
    errors = errors_of(ranks, config, ONE, torch.float32)
    model: Any = config.model
    tolerance = float32_tolerance(model, packed=False)
    assert errors.loss < TOLERANCE_FLOAT32
    assert errors.worst < tolerance
    if family != "qwen3_5":  # at these sizes it loses more in float32, whoever computes it
        assert tolerance == TOLERANCE_FLOAT32


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_stock_model(family: str) -> None:
    """Names, shapes and ties, and what else a checkpoint holds."""
    model: Any = small_config(family).model
    built = model.build(vocab_size=64, seq_len=24)
    stock = stock_model(model, torch.float32)
    have, want = ({k: t.shape for k, t in m.state_dict().items()} for m in (built, stock))
    assert have == want
    assert [name for name, _ in built.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert built.training


# ------------------------------------------------------------------ further settings

PP = Plan(title="pipeline", degrees=Degrees(pp=2))
TP = Plan(title="tensor", degrees=Degrees(tp=2))
YARN = YarnConfig(factor=4.0, original_max_seq_len=1024)
VARIANTS: dict[str, tuple[str, Plan, dict[str, Any]]] = {
    "deepseek_v2 full queries": ("deepseek_v2", TP, {"q_lora_rank": None}),
    "deepseek_v3 full queries, stretched": ("deepseek_v3", TP, {"q_lora_rank": None, "rope_scaling": YARN}),
    "deepseek_v3 two shared experts": ("deepseek_v3", ONE, {"num_shared_experts": 2, "route_scale": 2.5}),
    "glm4_moe without norms of heads": ("glm4_moe", TP, {"qk_norm": False, "attention_bias": False}),
    "llama4 all layers with experts": ("llama4", ONE, {"moe_interval": 1, "qk_norm": False, "top_k": 2}),
    "llama4 stretched": ("llama4", ONE, {"rope_factor": 16.0}),
    # Scales queries by their place in the row, which ranks of cp must know.
    "llama4 sharpened": (
        "llama4",
        Plan(title="context", degrees=Degrees(cp=2), packed=False),
        {"temperature_len": 3},
    ),
    "mixtral in a window": ("mixtral", Plan(title="context", degrees=Degrees(cp=2)), {"window": 5}),
    "mixtral tied": ("mixtral", PP, {"tie_embeddings": True}),
    "qwen3 tied": ("qwen3", Plan(title="sharded", degrees=Degrees(dp_shard=2)), {"tie_embeddings": True}),
    "qwen3 more rows in the embedding": ("qwen3", ONE, {"vocab_size": 80}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_equal_the_stock_model(ranks: Ranks, name: str) -> None:
    family, plan, changes = VARIANTS[name]
    config = small_config(family)
    config = replace(config, model=replace(config.model, **changes))
    assert errors_of(ranks, config, plan).worst < TOLERANCE


def test_text_alone_equals_the_stock_model(ranks: Ranks) -> None:
    """The language model of Qwen3.5 without its tower."""
    text = load_config("qwen3_5", "qwen3_5_debugmodel_text")
    whole: Any = small_config("qwen3_5").model
    sizes = {field.name: getattr(whole, field.name) for field in fields(text.model)}
    config = replace(text, model=replace(text.model, **sizes))
    assert errors_of(ranks, config, PLANS["packed"]).worst < TOLERANCE


# ------------------------------------------------------------------ the comparison


def outcome(grads: dict[str, Tensor] | None, logits: Tensor, loss: float = 1.0, rows: int = 0) -> Outcome:
    places = torch.arange(logits.shape[2])
    return Outcome(loss, dict(enumerate(logits)), rows, places, grads)


def pair() -> tuple[Any, Outcome]:
    want = expected(small_config("mixtral").model, False)  # type: ignore[arg-type]
    return want, outcome({name: grad.clone() for name, grad in want.grads.items()}, want.logits, want.loss)


def test_comparison_sees_one_token_and_one_element() -> None:
    want, same = pair()
    assert compare([same], want).worst == 0
    logits = want.logits.clone()
    logits[2, 1, 5, 7] += 1e-6
    assert compare([outcome(same.grads, logits, want.loss)], want).logits > 1e-9
    assert compare([outcome(same.grads, want.logits, want.loss * (1 + 1e-9))], want).loss > 1e-10
    assert same.grads is not None
    name = "model.layers.1.mlp.gate.weight"
    same.grads[name][3, 3] += 1e-6
    errors = compare([same], want)
    assert errors.grads[name] > 1e-9
    assert {other: error for other, error in errors.grads.items() if error} == {name: errors.grads[name]}


def test_comparison_sees_what_is_missing() -> None:
    want, same = pair()
    assert same.grads is not None
    with pytest.raises(AssertionError, match="not finite, or not all there"):
        compare([outcome(same.grads, want.logits[:3], want.loss)], want)
    with pytest.raises(AssertionError, match=r"lm_head\.weight"):
        compare([outcome({k: g for k, g in same.grads.items() if k != "lm_head.weight"}, want.logits)], want)
    other = outcome({"lm_head.weight": same.grads["lm_head.weight"] + 1e-12}, want.logits[:0], 0.0)
    with pytest.raises(AssertionError, match=r"lm_head\.weight differs between stages"):
        compare([same, other], want)


def test_nearly_every_expert_and_every_parameter_has_a_gradient() -> None:
    """A parameter whose gradient is zero would hide a wrong one."""
    for family in FAMILIES:
        model: Any = small_config(family).model
        grads = expected(model, packed=False).grads
        silent = [name for name, grad in grads.items() if not grad.any()]
        assert not silent, family
        for name, grad in grads.items():
            if ".experts." in name and grad.dim() > 1:
                assert grad.flatten(1).any(dim=1).sum() >= len(grad) - 2, (family, name)


def test_steps_hold_documents_padding_and_images() -> None:
    for family in FAMILIES:
        model: Any = small_config(family).model
        step, images = parity_step(model, packed=True)
        lengths = torch.cat([rows.cu_seqlens.diff() for rows in step.microbatches])
        assert lengths.min() == 1
        assert lengths.max() > 6
        assert all((~rows.valid_mask).any() for rows in step.microbatches)
        assert (images is not None) == isinstance(model, VisionLanguage)
        if images is not None:
            shown = [int(images_BS.max()) for images_BS in images.images_MBS]
            assert len(images.pictures.pictures) >= 4
            assert shown[-1] == -1  # a microbatch without any
            # A token around or of an image is no label.
            visual = torch.stack([rows.input_ids for rows in step.microbatches]) >= 64
            labels = torch.stack([rows.labels for rows in step.microbatches])
            assert (labels[..., :-1][visual[..., 1:]] == -100).all()


def test_warnings_of_other_libraries_are_named_one_by_one() -> None:
    assert WARNINGS[0] == ("error",)
    assert all(len(entry) > 1 for entry in WARNINGS[1:])
