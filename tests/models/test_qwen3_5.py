"""Qwen3.5: published sizes, and training with and without its vision tower."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.models.test_qwen3_vl import engine_of, small, stock_model, without_balancing
from trimtab.losses import GlobalBatch
from trimtab.models.qwen3_5 import (
    qwen3_5_35b_a3b,
    qwen3_5_397b_a17b,
    qwen3_5_balancing,
    qwen3_5_debugmodel,
    qwen3_5_debugmodel_text,
)
from trimtab.train.packing import TokenBatch


@pytest.mark.parametrize(("config", "published"), [(qwen3_5_35b_a3b, 35e9), (qwen3_5_397b_a17b, 397e9)])
def test_parameters_are_as_many_as_published(config, published):
    """Published: 35 and 397 billion, without the layer of multi-token prediction."""
    model = config().model.build(vocab_size=248_077, seq_len=8)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(published, rel=0.005)


def test_layers_are_as_published():
    config = qwen3_5_397b_a17b().model.hf_config(248_320)
    assert config.text_config.layer_types[:4] == ["linear_attention"] * 3 + ["full_attention"]
    assert config.text_config.layer_types.count("full_attention") == 15
    assert config.text_config.rope_parameters["partial_rotary_factor"] == 0.25
    assert config.image_token_id == 248_056


def test_the_preset_is_the_global_batch_loss():
    (objective,) = qwen3_5_balancing().objectives
    assert objective == GlobalBatch.Config(coef=8e-3)


def document(batch: TokenBatch, row: int, columns: slice) -> dict[str, torch.Tensor]:
    """Arguments of the stock model for one document of text."""
    return {
        "input_ids": batch.input_ids_BS[row : row + 1, columns],
        "position_ids": batch.position_ids_BS[row : row + 1, columns],
    }


def test_documents_are_those_of_the_stock_model():
    config = without_balancing(qwen3_5_debugmodel_text())
    config = replace(
        config,
        data=replace(config.data, source="fixed", seq_len=96, microbatch_size=4, domain_pure=False),
        training=replace(config.training, global_batch_size=4),
    )
    engine, loader = engine_of(config)
    module = engine.parts[0].module
    stock = stock_model(config, module.state_dict(), loader.tokenizer.vocab_size)
    batch = next(loader)
    while batch.num_sequences == 4:
        batch = next(loader)
    with torch.no_grad():
        have = engine.forward(engine.parts[0], batch)
        for row, starts in enumerate(batch.position_ids_BS == 0):
            bounds = [*starts.nonzero()[:, 0].tolist(), 96]
            for first, end in pairwise(bounds):
                want = stock(**document(batch, row, slice(first, end)), use_cache=False).logits[0]
                assert (have[row, first:end] - want).abs().max() < 2e-5 * want.abs().max()


def test_images_are_seen():
    config = small(qwen3_5_debugmodel())
    engine, loader = engine_of(config)
    batch = next(loader)
    while not len(batch.images.grids_I3):
        batch = next(loader)
    with torch.no_grad():
        before = engine.forward(engine.parts[0], batch)
        batch.images.patches_PX.neg_()
        after = engine.forward(engine.parts[0], batch)
    assert (before - after).abs().max() > 1e-3


def test_packed_rows_are_not_compiled():
    config = qwen3_5_debugmodel()
    compiled = replace(config.compile, enable=True)
    with pytest.raises(ValueError, match=r"compile\.enable with data\.packing: gated delta networks"):
        replace(config, compile=compiled)
    assert replace(config, compile=compiled, data=replace(config.data, packing=False))


@pytest.mark.parametrize("config", [qwen3_5_debugmodel, qwen3_5_debugmodel_text])
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_sequences_are_not_divided(config, axis):
    degrees = replace(config().parallelism, **{f"{axis}_parallel_degree": 2})
    with pytest.raises(
        ValueError, match=rf"parallelism\.{axis}_parallel_degree=2: Qwen3_5Moe.* cannot be divided so"
    ):
        replace(config(), parallelism=degrees).for_world(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_linear_key_heads": 3}, "num_linear_key_heads=3 must divide num_linear_value_heads=4"),
        (
            {"mrope_section": (2, 2, 3)},
            r"mrope_section=\(2, 2, 3\) must sum to half of head_dim \* rotary_share = 12",
        ),
    ],
)
def test_model_is_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(qwen3_5_debugmodel().model, **changes)


def test_features_of_images_enter_no_later_layer():
    model = qwen3_5_debugmodel().model
    with pytest.raises(
        ValueError, match=r"deepstack=\(0,\): the family adds features of images to the embeddings"
    ):
        replace(model, vision=replace(model.vision, deepstack=(0,)))
