"""Model families: published sizes and configurations, tiny runs, and what is refused before a run."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers

from tests.models import released_configs as released
from trimtab.integrations.checkpoint_config import config_differences
from trimtab.models.deepseek_v2 import deepseek_v2_debugmodel
from trimtab.models.glm4_moe import glm4_moe_debugmodel
from trimtab.models.gpt_oss import gpt_oss_debugmodel
from trimtab.models.llama4 import llama4_debugmodel, llama4_maverick, llama4_scout
from trimtab.models.mixtral import mixtral_debugmodel
from trimtab.models.olmoe import olmoe_debugmodel
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.registry import config_functions, load_config, load_module
from trimtab.train.trainer import Trainer

FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "kimi_k2",
    "llama4",
    "mixtral",
    "olmoe",
    "qwen3",
)
# Billions of parameters as published, and by whom.
PUBLISHED = {
    "deepseek_v3_671b": 671,  # arXiv:2412.19437, section 4.2, without multi-token prediction
    "deepseek_v2_236b": 236,  # arXiv:2405.04434, section 3.1.2
    "deepseek_v2_lite": 15.7,  # the same, table 6
    "kimi_k2_1t": 1026,  # released weights; 1,043 of arXiv:2507.20534 need one layer more
    "qwen3_30b_a3b": 30.5,  # model card of Qwen3-30B-A3B
    "qwen3_235b_a22b": 235,  # arXiv:2505.09388, section 2
    "gpt_oss_20b": 20.91,  # arXiv:2508.10925, table 1
    "gpt_oss_120b": 116.83,  # the same
    "mixtral_8x7b": 46.7,  # announcement of Mixtral 8x7B
    "mixtral_8x22b": 141,  # announcement of Mixtral 8x22B
    "olmoe_1b_7b": 6.9,  # arXiv:2409.02060, section 2
}
RELEASED = {
    "deepseek_v3_671b_released": released.DEEPSEEK_V3,
    "deepseek_v2_236b_released": released.DEEPSEEK_V2,
    "deepseek_v2_lite_released": released.DEEPSEEK_V2_LITE,
    "kimi_k2_1t_released": released.KIMI_K2,
    "moonlight_16b": released.MOONLIGHT,
    "llama4_scout_released": released.LLAMA4_SCOUT,
    "llama4_maverick": released.LLAMA4_MAVERICK,
    "qwen3_30b_a3b_released": released.QWEN3_30B_A3B,
    "qwen3_235b_a22b_released": released.QWEN3_235B_A22B,
    "gpt_oss_20b": released.GPT_OSS_20B,
    "gpt_oss_120b": released.GPT_OSS_120B,
    "mixtral_8x7b": released.MIXTRAL_8X7B,
    "mixtral_8x22b": released.MIXTRAL_8X22B,
    "olmoe_1b_7b": released.OLMOE_1B_7B,
    "glm4_5_355b_released": released.GLM4_5,
    "glm4_5_air_106b_released": released.GLM4_5_AIR,
}
CONFIGS = {name: family for family in FAMILIES for name in config_functions(load_module(family))}
FULL = [name for name in CONFIGS if "debugmodel" not in name and not name.endswith("_tiny")]


def build(name, **changes):
    config = load_config(CONFIGS[name], name)
    return replace(config.model, **changes).build(vocab_size=259, seq_len=config.data.seq_len)


def billions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


# ---------------------------------------------------------------- published shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    assert billions(build(name, mtp=None)) == pytest.approx(PUBLISHED[name], rel=0.005)


def test_moonlight_has_the_parameters_of_its_report_without_embeddings():
    model = build("moonlight_16b")
    embeddings = 2 * model.get_input_embeddings().weight.numel() / 1e9
    assert billions(model) - embeddings == pytest.approx(15.29, rel=0.0005)
    assert billions(model) == pytest.approx(16, rel=0.005)


def test_one_more_layer_makes_the_parameters_of_kimi_k2s_report():
    assert billions(build("kimi_k2_1t", num_layers=62)) == pytest.approx(1043, rel=0.0005)


@pytest.mark.parametrize(("config", "published"), [(llama4_scout, 109), (llama4_maverick, 400)])
def test_llama4_has_the_published_parameters_with_its_vision_tower(config, published):
    model = config().model
    whole = transformers.Llama4Config(
        text_config=model.hf_config(model.vocab_size).to_dict(), vision_config=released.LLAMA4_VISION
    )
    with torch.device("meta"):
        whole = transformers.Llama4ForConditionalGeneration(whole)
    assert billions(whole) == pytest.approx(published, rel=0.005)
    text = model.build(vocab_size=259, seq_len=8192)
    assert billions(text) == pytest.approx(billions(whole.language_model), abs=1e-9)


# Table 1 of arXiv:2508.06471 counts the layer of multi-token prediction, but neither embedding nor head. The number
# of the smaller model fits only without that layer.
@pytest.mark.parametrize(
    ("name", "published", "changes"),
    [("glm4_5_355b", 355, {}), ("glm4_5_air_106b", 106, {"mtp": None})],
)
def test_glm4_5_has_the_parameters_of_table_1(name, published, changes):
    model = build(name, **changes)
    assert hasattr(model, "mtp") == (not changes)
    embeddings = 2 * model.get_input_embeddings().weight.numel() / 1e9
    assert billions(model) - embeddings == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(
    ("name", "trillions"), [("deepseek_v3_671b", 10), ("glm4_5_355b", 15), ("glm4_5_air_106b", 15)]
)
def test_multi_token_prediction_weighs_what_the_reports_say(name, trillions):
    """arXiv:2412.19437, section 4.2, and arXiv:2508.06471, section 2.4: 0.3, later 0.1."""
    config = load_config(CONFIGS[name], name)
    change = trillions * 1e12 / (config.training.global_batch_size * config.data.seq_len)
    mtp = config.model.mtp
    assert mtp.num_layers == 1
    assert mtp.coef_at(0) == mtp.coef_at(round(change) - 1) == 0.3
    assert mtp.coef_at(round(change)) == mtp.coef_at(config.training.steps) == pytest.approx(0.1)
    assert load_config(CONFIGS[name], f"{name}_released").model.mtp.coef_at(0) == 0.1


@pytest.mark.parametrize("name", RELEASED)
def test_configurations_are_those_of_the_released_weights(name):
    model = load_config(CONFIGS[name], name).model
    own = model.hf_config(model.num_embeddings(259))
    there = type(own).from_dict(dict(RELEASED[name]))
    assert config_differences(there, own) == []
    unequal = {
        key
        for key in RELEASED[name]
        # transformers keeps rope_scaling as another name of rope_parameters, compared above.
        if key != "rope_scaling" and getattr(there, key, None) != getattr(own, key, None)
    }
    assert unequal == set()


def test_all_sizes_are_compared_with_released_ones():
    pretraining = {name.removesuffix("_released") for name in RELEASED}
    assert {name.removesuffix("_released") for name in FULL} == pretraining


@pytest.mark.parametrize("name", [name for name in FULL if not name.endswith("_released")])
def test_full_configs_run_on_the_processes_they_name(name):
    function = getattr(load_module(CONFIGS[name]), name)
    world_size = int(re.search(r"for ([\d,]+) processes", function.__doc__)[1].replace(",", ""))
    run = function().for_world(world_size)
    assert run.global_batch_size == function().training.global_batch_size
    twin = f"{name}_released"
    if twin in CONFIGS:
        assert load_config(CONFIGS[name], twin).for_world(world_size).degrees == run.degrees


# ---------------------------------------------------------------- training


def smallest(family, tmp_path):
    """The family's debug model, on the text shipped with trimtab, for three steps of a second."""
    config = load_config(family, f"{family}_debugmodel")
    return replace(
        config,
        model=replace(config.model, num_layers=2, dim=32),
        data=replace(
            config.data,
            source="fixed",
            seq_len=32,
            microbatch_size=config.data.microbatch_size and 4,
            validation_fraction=0.0,
            max_validation_microbatches=None,
        ),
        training=replace(config.training, steps=3, global_batch_size=8),
        optimizer=replace(config.optimizer, lr=1e-2),
        metrics=replace(config.metrics, log_interval=1, tensorboard=False, report=False),
        validation=replace(config.validation, enable=False),
        checkpoint=replace(config.checkpoint, interval=1000),
        dump_folder=str(tmp_path),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_debug_models_train(family, tmp_path):
    config = smallest(family, tmp_path)
    trainer = Trainer(config, name=f"{family}/{family}_debugmodel", quiet=True)
    assert trainer.train().step == 3
    (written,) = tmp_path.rglob("metrics.jsonl")
    records = [json.loads(line) for line in written.read_text().splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    measured = steps[-1]["balance"]["losses"]
    assert set(measured) == {objective.build().name for objective in config.model.balancing.objectives}
    assert all(loss["scaled"][0] > 0 for loss in measured.values())
    biases = [router.expert_bias for router in trainer.engine.parts[0].routers]
    assert all((bias is not None) == config.model.has_expert_bias for bias in biases)
    assert all(bool((bias != 0).any()) for bias in biases if bias is not None)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (deepseek_v2_debugmodel, {"num_groups": 3}, "num_groups=3 must divide num_experts=16"),
        (
            deepseek_v2_debugmodel,
            {"num_limited_groups": 5},
            "num_limited_groups=5 must be at most num_groups=4",
        ),
        (deepseek_v2_debugmodel, {"num_dense_layers": 4}, "num_dense_layers=4 must be in"),
        (glm4_moe_debugmodel, {"num_groups": 16}, "into groups of at least 2"),
        (
            glm4_moe_debugmodel,
            {"rotary_share": 0.45},
            "must be in .0, 1. and turn an even part of head_dim=32",
        ),
        (gpt_oss_debugmodel, {"swiglu_limit": 0.0}, "swiglu_limit=0.0 must be positive"),
        (gpt_oss_debugmodel, {"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        (llama4_debugmodel, {"moe_interval": 5}, "moe_interval=5 must be at most num_layers=4"),
        (llama4_debugmodel, {"rope_factor": 0.5}, "rope_factor=0.5 must be at least 1"),
        (mixtral_debugmodel, {"num_heads": 6}, "num_heads=6 must divide dim=128"),
        (olmoe_debugmodel, {"num_heads": 128}, "dim=128 / num_heads=128 must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, changes, said):
    with pytest.raises(ValueError, match=said):
        replace(config().model, **changes)


def test_a_group_of_one_expert_is_enough_where_groups_are_scored_by_one():
    model = replace(deepseek_v2_debugmodel().model, num_groups=16, num_limited_groups=4)
    assert model.grouped
    assert not model.has_expert_bias


@pytest.mark.parametrize(
    ("config", "plan", "world_size", "said"),
    [
        (
            olmoe_debugmodel,
            {"tensor_parallel_degree": 2},
            2,
            "parallelism.tensor_parallel_degree=2: OlmoeForCausalLM cannot be divided so, because its norms of "
            "queries and keys span all heads",
        ),
        (
            glm4_moe_debugmodel,
            {"tensor_parallel_degree": 4},
            4,
            "parallelism.tensor_parallel_degree=4 must divide model.num_kv_heads=2",
        ),
        (
            llama4_debugmodel,
            {"expert_parallel_degree": 16},
            16,
            "parallelism.expert_parallel_degree=16 must divide model.num_experts=8",
        ),
        (mixtral_debugmodel, {"pipeline_parallel_degree": 2}, 2, "model.balancing: BatchWise with"),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_anything_starts(config, plan, world_size, said):
    with pytest.raises(ValueError, match=said):
        replace(config(), parallelism=ParallelismConfig(**plan)).for_world(world_size)


def test_tensor_ranks_divide_gpt_oss_by_the_width_of_its_output_bias():
    model = replace(gpt_oss_debugmodel().model, dim=126, num_heads=4, num_kv_heads=4)
    config = replace(gpt_oss_debugmodel(), model=model)
    with pytest.raises(ValueError, match=r"tensor_parallel_degree=4 must divide model.dim=126"):
        replace(config, parallelism=ParallelismConfig(tensor_parallel_degree=4)).for_world(4)
