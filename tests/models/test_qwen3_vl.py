"""Qwen3-VL: published sizes, and training on images as the stock model would."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.hf_reference import take_grads
from trimtab.losses import GlobalBatch, SequenceWise
from trimtab.models.qwen3_vl import (
    qwen3_vl_30b_a3b,
    qwen3_vl_235b_a22b,
    qwen3_vl_balancing,
    qwen3_vl_debugmodel,
)
from trimtab.train.engine import Engine
from trimtab.train.evaluation import evaluate, next_token_targets
from trimtab.train.images_shapes import ShapesConfig
from trimtab.train.images_store import ImagesConfig
from trimtab.train.model import Balancing
from trimtab.train.trainer import Trainer
from trimtab.train.vision_model import VisionTokens, VisionTowerConfig


def small(config=None, **training):
    """The debug configuration on few images, without files."""
    config = config or qwen3_vl_debugmodel()
    shapes = ShapesConfig(num_documents=400)
    return replace(
        config,
        data=replace(config.data, microbatch_size=2, seq_len=80, images=ImagesConfig(shapes=shapes)),
        training=replace(config.training, **{"steps": 4, "global_batch_size": 4, **training}),
    )


def engine_of(config):
    run = config.for_world(1)
    loader = config.build_loader(run)
    engine = Engine(
        config, run, mesh=None, device=torch.device("cpu"), vocab_size=loader.tokenizer.vocab_size
    )
    return engine, loader


def without_balancing(config):
    off = Balancing(objectives=(SequenceWise.Config(coef=0.0),))
    return replace(config, model=replace(config.model, balancing=off))


def stock_model(config, state, vocab_size):
    import transformers

    hf_config = config.model.hf_config(config.model.num_embeddings(vocab_size))
    model = getattr(transformers, config.model.architecture)(hf_config)
    model.load_state_dict(state)
    return model.train()


@pytest.mark.parametrize(
    ("config", "published"), [(qwen3_vl_30b_a3b, 31_070_754_032), (qwen3_vl_235b_a22b, 235_670_022_896)]
)
def test_parameters_are_as_many_as_published(config, published):
    """Published: the sums over the released checkpoints' tensors (31B and 236B on their pages)."""
    model = config().model.build(vocab_size=151_669, seq_len=8)
    assert sum(parameter.numel() for parameter in model.parameters()) == published
    assert all(parameter.is_meta for parameter in model.parameters())


def test_released_tokens_stand_for_images():
    model = qwen3_vl_30b_a3b().model
    layout = model.image_layout(151_669)
    assert (layout.start_id, layout.image_id, layout.end_id) == (151_652, 151_655, 151_653)
    assert layout.cell == 32
    config = model.build(vocab_size=151_669, seq_len=8).config
    assert (config.image_token_id, config.vision_start_token_id) == (151_655, 151_652)


def test_tokens_that_are_not_given_are_the_last_of_the_embedding():
    model = qwen3_vl_debugmodel().model
    assert model.num_embeddings(259) == 263
    assert model.image_layout(259).start_id == 259
    wide = replace(model, vocab_size=300)
    assert wide.image_layout(259).image_id == 297
    assert wide.build(vocab_size=259, seq_len=8).config.image_token_id == 297


def test_the_preset_is_the_global_batch_loss():
    (objective,) = qwen3_vl_balancing().objectives
    assert objective == GlobalBatch.Config(coef=8e-3)
    assert qwen3_vl_balancing().visual_tokens == "count"


def test_the_first_step_is_the_stock_model_s():
    config = without_balancing(small())
    engine, loader = engine_of(config)
    vocab_size = loader.tokenizer.vocab_size
    module = engine.parts[0].module
    state = {name: value.clone() for name, value in module.state_dict().items()}
    batches = [next(loader) for _ in range(2)]
    num_images = [len(batch.images.grids_I3) for batch in batches]
    assert max(num_images) > 1
    stock, num_labels = (
        stock_model(config, state, vocab_size),
        sum(batch.num_label_tokens for batch in batches),
    )
    total = 0.0
    for batch in batches:
        images = batch.images
        shown = (
            {"pixel_values": images.patches_PX, "image_grid_thw": images.grids_I3}
            if len(images.grids_I3)
            else {}
        )
        positions = torch.cat([batch.position_ids_BS[None], images.positions_3BS])
        want = stock(input_ids=batch.input_ids_BS, position_ids=positions, use_cache=False, **shown).logits
        with torch.no_grad():
            have = engine.forward(engine.parts[0], batch)
        assert (have - want).abs().max() < 1e-5 * want.abs().max()
        targets = next_token_targets(batch.labels_BS).flatten()
        total = (
            total
            + F.cross_entropy(want.flatten(0, 1), targets, ignore_index=-100, reduction="sum") / num_labels
        )
    total.backward()
    loss = engine.train_step(batches, engine.totals(batches))
    assert float(loss) == pytest.approx(total.item(), rel=1e-5)
    for name, want in take_grads(stock).items():
        have = module.get_parameter(name).grad
        assert (have - want).abs().max() < 1e-4 * want.abs().max().clamp(min=1e-3), name


def test_captions_are_learned_from_images(tmp_path):
    """After some steps a caption is likelier beside its own image than beside another's."""
    config = small(steps=60, global_batch_size=8)
    images = ImagesConfig(
        shapes=ShapesConfig(num_documents=200, max_images=1, min_side=1, max_side=1, text=False)
    )
    vision = replace(config.model.vision, depth=1, deepstack=(0,), dim=32, hidden_dim=32, num_heads=2)
    config = replace(
        config,
        model=replace(config.model, num_layers=2, num_experts=4, vision=vision),
        data=replace(config.data, images=images, microbatch_size=8),
        metrics=replace(config.metrics, report=False, tensorboard=False, log_interval=30),
        checkpoint=replace(config.checkpoint, enable=False),
        dump_folder=str(tmp_path),
    )
    trainer = Trainer(config, name="qwen3_vl", quiet=True)
    first = evaluate(trainer.engine, trainer.loader.validation_batches())["loss"]
    trainer.train()
    held_out = [batch for _, batch in trainer.loader.validation_batches() if batch.num_tokens]
    own = evaluate(trainer.engine, [("own", batch) for batch in held_out])["loss"]
    for batch in held_out:
        patches = batch.images.patches_PX.unflatten(0, (len(batch.images.grids_I3), -1))
        batch.images.patches_PX.copy_(patches.roll(1, dims=0).flatten(0, 1))
    others = evaluate(trainer.engine, [("others", batch) for batch in held_out])["loss"]
    assert own < 0.1 * first
    assert own < 0.9 * others


def test_validation_tells_images_and_text_apart():
    config = small()
    engine, loader = engine_of(config)
    batches = [("shapes", next(loader)) for _ in range(3)]
    record = evaluate(engine, batches)
    counts = {name: torch.zeros(4, 16, dtype=torch.int64) for name in ("text", "image")}
    with torch.no_grad():
        for _, batch in batches:
            ids = []
            hooks = [
                router.module.register_forward_hook(lambda module, args, out, ids=ids: ids.append(out[2]))
                for router in engine.parts[0].routers
            ]
            engine.parts[0].module.eval()
            engine.forward(engine.parts[0], batch)
            for hook in hooks:
                hook.remove()
            visual = batch.images.visual_mask_BS.flatten()
            masks = {"image": visual, "text": batch.valid_mask_BS.flatten() & ~visual}
            for name, mask in masks.items():
                for layer, ids_TK in enumerate(ids):
                    counts[name][layer] += torch.bincount(ids_TK[mask].flatten(), minlength=16)
    assert counts["image"].any()
    for name, counts_LE in counts.items():
        assert torch.equal(torch.tensor(record["modality_load"][name]), counts_LE)
        want = counts_LE.amax(dim=1) / counts_LE.double().mean(dim=1) - 1
        assert torch.allclose(torch.tensor(record["modality_maxvio"][name], dtype=torch.float64), want)
    total = torch.tensor(record["domain_load"]["shapes"])
    assert torch.equal(total, counts["image"] + counts["text"])


@pytest.mark.parametrize("visual_tokens", ["count", "exclude"])
def test_visual_tokens_are_counted_by_declaration(visual_tokens):
    config = small()
    balancing = replace(config.model.balancing, visual_tokens=visual_tokens)
    config = replace(config, model=replace(config.model, balancing=balancing))
    engine, loader = engine_of(config)
    batches = [next(loader) for _ in range(2)]
    engine.train_step(batches, engine.totals(batches))
    engine.balancers[0].step()
    num_valid = sum(batch.num_tokens for batch in batches)
    num_visual = sum(int(batch.images.visual_mask_BS.sum()) for batch in batches)
    assert num_visual > 0
    want = num_valid - (num_visual if visual_tokens == "exclude" else 0)
    assert engine.balancers[0].metrics()["num_tokens"] == [want] * 4
    assert engine.totals(batches)["num_tokens"] == num_valid


def test_declaration_is_validated():
    with pytest.raises(ValueError, match="visual_tokens='some' must be 'count' or 'exclude'"):
        Balancing(objectives=(GlobalBatch.Config(coef=1e-2),), visual_tokens="some")


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_sequences_are_not_divided(axis):
    config = qwen3_vl_debugmodel()
    degrees = replace(config.parallelism, **{f"{axis}_parallel_degree": 2})
    message = (
        rf"parallelism\.{axis}_parallel_degree=2: Qwen3VLMoe.* because images are placed into whole sequences"
    )
    with pytest.raises(ValueError, match=message):
        replace(config, parallelism=degrees).for_world(2)


def test_stages_that_would_cut_deepstack_layers_are_refused():
    config = qwen3_vl_debugmodel()
    vision = replace(config.model.vision, deepstack=(0, 1, 2))
    model = replace(config.model, vision=vision)
    parallelism = replace(config.parallelism, pipeline_parallel_degree=4)
    message = (
        r"pipeline_parallel_degree=4 \(1F1B\): num_layers=4 cannot be divided .* after the first 3 layers"
    )
    with pytest.raises(ValueError, match=message):
        replace(config, model=model, parallelism=parallelism).for_world(4)
    assert replace(config, parallelism=replace(parallelism, pipeline_parallel_degree=2)).for_world(2).pipeline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1; raise model.vision.depth"),
        ({"dim": 36}, r"dim=36 must be a multiple of 4 \* num_heads=16"),
        ({"num_positions": 10}, "num_positions=10 must be a square number"),
        ({"deepstack": (1, 0)}, r"deepstack=\(1, 0\) must be increasing numbers of blocks in \[0, depth=3\)"),
    ],
)
def test_tower_is_validated(changes, message):
    tower = {"depth": 3, "dim": 32, "hidden_dim": 32, "num_heads": 4}
    with pytest.raises(ValueError, match=message):
        VisionTowerConfig(**{**tower, **changes})


def test_model_is_validated():
    model = qwen3_vl_debugmodel().model
    with pytest.raises(ValueError, match="features for more layers than num_layers=1"):
        replace(model, num_layers=1)
    with pytest.raises(ValueError, match=r"mrope_section=\(4, 4, 5\) must sum to half of head_dim=24"):
        replace(model, mrope_section=(4, 4, 5))
    tokens = VisionTokens(start=1, image=2, end=3, video=400)
    with pytest.raises(ValueError, match="vocab_size=300 must be at least"):
        replace(model, vocab_size=300, vision_tokens=tokens).num_embeddings(259)
