"""What is wrong with a directory of weights is found before it is read, by all ranks, and said."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.hf_models import tiny_config
from tests.train.stock import FAMILIES, Degrees, divide, read, rewrite, save_all, set_config, wrong
from trimtab.integrations.checkpoint_config import as_config_of, config_differences
from trimtab.train import safetensors_folder
from trimtab.train.checkpoint import CheckpointConfig, CheckpointError
from trimtab.train.hf_checkpoint import check_initial, read_initial


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A directory of each family, in several files."""
    return save_all(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def folder(folders, tmp_path):
    """One to spoil."""
    return Path(shutil.copytree(folders["deepseek_v3"], tmp_path / "given"))


# ------------------------------------------------------------------ what is refused


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
SPOILED = {
    "missing": (lambda t: t.pop("model.norm.weight"), "it lacks model.norm.weight"),
    "missing expert": (lambda t: t.pop(EXPERT), f"it lacks {EXPERT}"),
    "missing last expert": (
        lambda t: [t.pop(f"model.layers.0.mlp.experts.7.{p}_proj.weight") for p in ("gate", "up", "down")],
        r"experts.gate_up_proj has shape \(7, 32, 32\) in it and \(8, 32, 32\) in the model",
    ),
    "unexpected": (
        lambda t: t.update({"model.layers.0.extra": torch.zeros(2)}),
        "it has model.layers.0.extra, which the model has not",
    ),
    "further expert": (
        lambda t: [
            t.update({f"model.layers.0.mlp.experts.8.{p}_proj.weight": torch.zeros(s)})
            for p, s in (("gate", (16, 32)), ("up", (16, 32)), ("down", (32, 16)))
        ],
        r"has shape \(9, 32, 32\) in it and \(8, 32, 32\) in the model",
    ),
    "misshapen": (
        lambda t: t.update({"lm_head.weight": torch.zeros(65, 32)}),
        r"lm_head.weight has shape \(65, 32\) in it and \(64, 32\) in the model",
    ),
    "misshapen expert": (
        lambda t: t.update({EXPERT: torch.zeros(17, 32)}),
        "gate_up_proj cannot be put together from 16 tensors such as model.layers.1.mlp.experts.0.gate_proj.weight",
    ),
    "twice": (
        lambda t: t.update({"norm.weight": torch.zeros(32)}),
        "model.norm.weight is in it more than once, as model.norm.weight and norm.weight",
    ),
    "quantised": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
        r"it is quantised \(lm_head.weight is F8_E4M3, method fp8\).*FineGrainedFP8Config\(dequantize=True\)",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_wrong_tensors(folder, kind):
    change, message = SPOILED[kind]
    rewrite(folder, change)
    if kind == "quantised":
        set_config(folder, quantization_config={"quant_method": "fp8"})
    divided = divide("deepseek_v3", None, seed=1)
    with pytest.raises(CheckpointError, match=message):
        read(folder, divided)
    assert wrong(divided, divide("deepseek_v3", None, seed=1)) == []  # found before anything was read


def test_unpacked_blocks_of_integers_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["gpt_oss"], tmp_path / "given")
    set_config(folder, quantization_config={"quant_method": "mxfp4"})
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    rewrite(folder, lambda t: t.update({name: torch.zeros(8, 32, 1, 16, dtype=torch.uint8)}))
    with pytest.raises(CheckpointError, match=rf"{name} is U8, method mxfp4.*Mxfp4Config"):
        read(folder, divide("gpt_oss", None, seed=1))


def _first_shard(folder):
    return min(folder.glob("*.safetensors"))


def _cut(folder):
    file = _first_shard(folder)
    file.write_bytes(file.read_bytes()[:-10])


DAMAGED = {
    "shard": (
        lambda f: _first_shard(f).unlink(),
        r"lacks model-00001-of-\d+.safetensors that model.safetensors",
    ),
    "cut": (_cut, r"its file model-00001-of-\d+.safetensors cannot be read .* cut short"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no readable config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds no settings"),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("model*")],
        "holds neither model.safetensors nor model.safetensors.index.json",
    ),
    "pickles": (
        lambda f: [(f / "model.safetensors.index.json").unlink(), (f / "pytorch_model.bin").touch()],
        "holds pytorch_model.bin, but neither",
    ),
    "index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "index.json cannot be read",
    ),
    "empty index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "index.json names no tensor",
    ),
    "untrue index": (
        lambda f: _set_index(f, {"model.other.weight": _first_shard(f).name}),
        "says that model.other.weight is in model-00001",
    ),
    "family": (
        lambda f: set_config(f, model_type="mixtral", architectures=["MixtralForCausalLM"]),
        "it holds a model of type 'mixtral'",
    ),
}


def _set_index(folder, more):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"] | more}))


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_directories(folder, kind):
    damage, message = DAMAGED[kind]
    damage(folder)
    with pytest.raises(CheckpointError, match=rf"--checkpoint.initial {re.escape(str(folder))}: .*{message}"):
        read(folder, divide("deepseek_v3", None, seed=1))


def test_no_directory(tmp_path):
    (tmp_path / "file").touch()
    for name, message in (("none", "does not exist; give a directory"), ("file", "is a file")):
        for attempt in (
            lambda path: read(path, divide("deepseek_v3", None, seed=1)),
            check_initial,
        ):
            with pytest.raises(CheckpointError, match=message):
                attempt(tmp_path / name)
    with pytest.raises(ValueError, match="initial='' names nothing"):
        CheckpointConfig(initial="")


def test_models_that_transformers_does_not_know(folder):
    class Own(torch.nn.Linear):
        pass

    with pytest.raises(CheckpointError, match="Own is no model of transformers"):
        read_initial(folder, [Own(2, 2)], {})


def read_on_ranks(folder, spoil_rank=None):
    divided = divide("deepseek_v3", Degrees(dp_shard=2, ep=2), seed=1)
    if spoil_rank == torch.distributed.get_rank():
        safetensors_folder._pieces = None
    try:
        read(folder, divided)
    except CheckpointError as error:
        return str(error)
    finally:
        safetensors_folder._pieces = _pieces


_pieces = safetensors_folder._pieces


def test_ranks_fail_as_one(ranks, folder):
    # While reading, on one rank.
    first, second = ranks.run(read_on_ranks, 2, folder, 1)
    assert first == second
    assert re.search(r"cannot be read: rank 1 of 2: TypeError", first)
    # Before it, whatever is wrong.
    rewrite(folder, lambda t: t.pop(EXPERT))
    first, second = ranks.run(read_on_ranks, 2, folder)
    assert first == second
    assert f"it lacks {EXPERT}" in first
    shutil.rmtree(folder)
    first, second = ranks.run(read_on_ranks, 2, folder)
    assert first == second
    assert "does not exist" in first


# ------------------------------------------------------------------ the configuration beside the weights


CHANGES = {
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "older rope": {"rope_parameters": None, "rope_theta": 5e5},
    "rope_scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "rms_norm_eps": {"rms_norm_eps": 1e-5},
    "num_experts_per_tok": {"num_experts_per_tok": 1},
    "routed_scaling_factor": {"routed_scaling_factor": 1.0},
    "n_group": {"n_group": 2},
    "topk_group": {"topk_group": 1},
    "norm_topk_prob": {"norm_topk_prob": False},
    "hidden_act": {"hidden_act": "gelu"},
    "num_attention_heads": {"num_attention_heads": 2},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "num_hidden_layers": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_change_what_weights_compute(folder, name):
    set_config(folder, **CHANGES[name])
    shown = {"older rope": "rope_theta", "rope_scaling": "rope_type"}.get(name, name)
    with pytest.raises(CheckpointError, match=rf"config.json differs .*{shown} \(.* there, .* here\)"):
        read(folder, divide("deepseek_v3", None, seed=1))


def test_settings_explain_what_does_not_fit(folder):
    with pytest.raises(
        CheckpointError, match=r"it lacks model.layers.2.self_attn.*num_hidden_layers \(2 there, 3 here\)"
    ):
        read(folder, divide("deepseek_v3", None, seed=1, num_layers=3))


def test_changes_can_be_accepted(folder):
    set_config(folder, rms_norm_eps=1e-5)
    divided = divide("deepseek_v3", None, seed=1)
    with pytest.warns(UserWarning, match=r"rms_norm_eps \(1e-05 there, 1e-06 here\)"):
        read(folder, divided, allow_changes=True)
    assert wrong(divided, divide("deepseek_v3", None, seed=0)) == []


def test_settings_that_change_nothing(folder):
    set_config(
        folder,
        eos_token_id=7,
        use_cache=True,
        attention_dropout=0.1,
        initializer_range=1.0,
        max_position_embeddings=1024,
        num_nextn_predict_layers=3,
        dtype="bfloat16",
        made_up=1,
        model_type="kimi_k2",  # another name of the same class
    )
    divided = divide("deepseek_v3", None, seed=1)
    read(folder, divided)
    assert wrong(divided, divide("deepseek_v3", None, seed=0)) == []


def test_lengths_count_where_angles_depend_on_them():
    _, config = tiny_config("deepseek_v3")
    settings = config.to_dict() | {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    }
    own = as_config_of(config, "", settings)
    there = as_config_of(config, "", settings | {"max_position_embeddings": 128})
    assert config_differences(there, own) == ["max_position_embeddings (128 there, 64 here)"]


def test_settings_of_parts_have_their_names():
    _, config = tiny_config("qwen3_vl_moe")
    settings = json.loads(config.to_json_string(use_diff=False))
    settings["vision_config"]["spatial_merge_size"] = 1
    settings["text_config"]["rms_norm_eps"] = 1e-5
    assert config_differences(as_config_of(config, "", settings), config) == [
        "text_config.rms_norm_eps (1e-05 there, 1e-06 here)",
        "vision_config.spatial_merge_size (1 there, 2 here)",
    ]


def test_every_family_agrees_with_what_it_wrote(folders):
    for family in FAMILIES:
        _, config = tiny_config(family)
        there = as_config_of(config, "", json.loads((folders[family] / "config.json").read_text()))
        assert config_differences(there, config) == [], family
