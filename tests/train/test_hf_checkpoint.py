"""Runs start from directories that stock transformers writes: on any mesh, in little memory."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    MixtralForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)
from transformers.modeling_layers import MtpModel

from tests.hf_models import tiny_config, tiny_model
from tests.parallel.checkpointing import Divided, local
from tests.train.stock import (
    FAMILIES,
    Degrees,
    divide,
    read,
    rewrite,
    save,
    save_all,
    set_config,
    state_of,
    watched_memory,
    wrong,
)
from tests.train.tiny import build, tiny
from trimtab.train import safetensors_folder
from trimtab.train.checkpoint import CheckpointError
from trimtab.train.checkpoint_state import LocalState, Parts
from trimtab.train.hf_checkpoint import read_initial
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.safetensors_folder import SliceReader, read_entries

PLANS = {
    "fsdp": Degrees(dp_shard=2),
    "ep": Degrees(dp_shard=2, ep=2),
    "etp": Degrees(tp=2, etp=2),
    "tp": Degrees(tp=2, ep=2),
    "stages": Degrees(pp=2),
}
NO_TP = {"olmoe", "qwen3_5_moe"}  # refused: norms over all heads, linear attention


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A directory of each family, in several files."""
    return save_all(tmp_path_factory.mktemp("stock"))


# ------------------------------------------------------------------ what is read


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_reads_what_stock_wrote(folders, family):
    divided = divide(family, None, seed=1)
    assert wrong(divided, divide(family, None, seed=0))  # else the test shows nothing
    read(folders[family], divided)
    assert wrong(divided, divide(family, None, seed=0)) == []


def read_all(folders, families, plan):
    found = {}
    for family in families:
        divided = divide(family, PLANS[plan], seed=1)
        read(folders[family], divided)
        found[family] = wrong(divided, divide(family, PLANS[plan], seed=0))
    return found


@pytest.mark.parametrize("plan", PLANS)
def test_every_rank_reads_its_part(ranks, folders, plan):
    excluded = NO_TP if PLANS[plan].tp > 1 else set()
    families = [family for family in FAMILIES if family not in excluded]
    for found in ranks.run(read_all, 2, folders, families, plan):
        assert found == {family: [] for family in families}


def note_slices(folder, plan):
    divided = divide("deepseek_v3", PLANS[plan], seed=1)
    read_bytes = {}
    original = SliceReader.read

    def noted(self, name, offset, out):
        read_bytes[name] = read_bytes.get(name, 0) + out.numel()
        original(self, name, offset, out)

    SliceReader.read = noted
    try:
        read(folder, divided)
    finally:
        SliceReader.read = original
    return read_bytes


def test_ranks_read_only_what_they_hold(ranks, folders):
    whole = {name: torch.Size(e.shape).numel() for name, e in read_entries(folders["deepseek_v3"]).items()}
    first, second = ranks.run(note_slices, 2, folders["deepseek_v3"], "ep")
    # Each expert on one rank, and of anything else its rows, which may be none.
    assert {n for n in first if ".experts." in n}.isdisjoint(n for n in second if ".experts." in n)
    for name, size in whole.items():
        copies = 2 if "e_score_correction_bias" in name else 1
        assert first.get(name, 0) + second.get(name, 0) == copies * size, name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_vl_moe"])
def test_experts_may_be_stacked_in_the_files(tmp_path, family):
    save(tiny_model(family)[0], tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in read_entries(tmp_path))
    divided = divide(family, None, seed=1)
    read(tmp_path, divided)
    assert wrong(divided, divide(family, None, seed=0)) == []


def test_released_layout_with_transposed_experts(tmp_path):
    """The hub's Qwen3-VL files have experts as (E, D, 2F) and (E, F, D)."""
    save(tiny_model("qwen3_vl_moe")[0], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name and tensor.shape[1] != tensor.shape[2]:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    divided = divide("qwen3_vl_moe", None, seed=1)
    read(tmp_path, divided)
    assert wrong(divided, divide("qwen3_vl_moe", None, seed=0)) == []


def test_bfloat16_files_fill_float32_weights(tmp_path):
    save(tiny_model("glm4_moe", dtype=torch.bfloat16)[0], tmp_path)
    assert {entry.dtype for entry in read_entries(tmp_path).values()} == {"BF16"}
    divided = divide("glm4_moe", None, seed=1)
    read(tmp_path, divided)
    for name, value in divided.local().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, divide("glm4_moe", None, seed=0).local()[name].bfloat16().float()), name


def test_biases_of_routers_are_read(folders):
    divided = divide("deepseek_v3", None, seed=1)
    read(folders["deepseek_v3"], divided)
    biases = {n: v for n, v in divided.local().items() if n.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    assert all(bias.abs().min() > 0 for bias in biases.values())


def tied():
    return divide("glm4_moe", None, seed=1, tie_word_embeddings=True)


def test_tied_embeddings_have_one_tensor_in_the_files(tmp_path):
    save(tiny_model("glm4_moe", tie_word_embeddings=True)[0], tmp_path)
    assert "lm_head.weight" not in read_entries(tmp_path)
    divided = tied()
    read(tmp_path, divided)
    assert wrong(divided, divide("glm4_moe", None, seed=0, tie_word_embeddings=True)) == []


def test_tied_embeddings_that_differ_are_refused(tmp_path):
    save(tiny_model("glm4_moe")[0], tmp_path)
    set_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight and model.embed_tokens.weight are one parameter"
    ):
        read(tmp_path, tied())


LLAMA4_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}


def test_text_model_reads_its_part_of_a_multimodal_checkpoint(tmp_path):
    _, text = tiny_config("llama4")
    settings = {name: value for name, value in text.to_dict().items() if name != "attn_implementation"}
    config = Llama4Config(text_config=Llama4TextConfig(**settings), vision_config=LLAMA4_VISION)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        whole = Llama4ForConditionalGeneration(config)
    save(whole, tmp_path)
    assert {"vision_model", "multi_modal_projector"} < {n.partition(".")[0] for n in read_entries(tmp_path)}
    check_text_part(
        tmp_path, "llama4", whole.language_model.state_dict(), "language_model.model.layers.0.extra.weight"
    )


def test_text_model_reads_its_part_of_another(tmp_path):
    """Qwen3.5's multimodal files name the decoder otherwise, and have multi-token prediction beside it."""
    _, text = tiny_config("qwen3_5_moe")
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    settings = {name: value for name, value in text.to_dict().items() if name != "attn_implementation"}
    config = Qwen3_5MoeConfig(text_config=settings, vision_config=vision)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        whole = Qwen3_5MoeForConditionalGeneration(config)
    save(whole, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"mtp.fc.weight": torch.zeros(32, 64)}))
    assert any(name.startswith("model.visual.") for name in read_entries(tmp_path))
    expected = {f"model.{name}": value for name, value in whole.model.language_model.state_dict().items()}
    expected["lm_head.weight"] = whole.lm_head.weight
    check_text_part(tmp_path, "qwen3_5_moe", expected, "model.language_model.extra.weight")


def check_text_part(folder, family, expected, extra):
    divided = divide(family, None, seed=1)
    read(folder, divided)
    assert divided.local().keys() == expected.keys()
    for name, value in divided.local().items():
        assert torch.equal(value, expected[name]), name
    rewrite(folder, lambda t: t.update({extra: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=f"it has {re.escape(extra)}"):
        read(folder, divide(family, None, seed=1))


def test_what_a_text_decoder_has_besides_is_refused(tmp_path):
    """The multimodal class knows it, but it is no part outside the decoder."""
    _, text = tiny_config("llama4", attention_bias=True)
    settings = {name: value for name, value in text.to_dict().items() if name != "attn_implementation"}
    config = Llama4Config(text_config=Llama4TextConfig(**settings), vision_config=LLAMA4_VISION)
    save(Llama4ForConditionalGeneration(config), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"it has language_model\.model\.layers\.0\.self_attn\.k_proj\.bias"
    ):
        read(tmp_path, divide("llama4", None, seed=1))


# ------------------------------------------------------------------ multi-token prediction

MTP_LAYERS = 2


def mtp_folder(folder, layout):
    """Weights of a model and of two such layers, as files number them or have them under `mtp.`."""
    model, _ = tiny_model("deepseek_v3", num_mtp_layers=MTP_LAYERS)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        mtp = MtpModel(model, MTP_LAYERS)
        for parameter in mtp.layers.parameters():
            parameter.data.normal_()
    save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in mtp.layers.state_dict().items():
        number, inner = name.split(".", 1)
        inner = inner.removeprefix("mtp_block.")
        split = {f"{'.'.join(inner.split('.')[:2])}": value}
        if ".experts." in inner:
            split = {}
            for expert, weight in enumerate(value):
                parts = ["gate_proj", "up_proj"] if "gate_up" in inner else ["down_proj"]
                for part, piece in zip(parts, weight.chunk(len(parts)), strict=True):
                    split[f"mlp.experts.{expert}.{part}.weight"] = piece.contiguous()
        else:
            split = {inner: value}
        for key, piece in split.items():
            if layout == "numbered":
                key = f"model.layers.{2 + int(number)}.{key.replace('post_norm', 'shared_head.norm')}"
            elif number == "0" and key.split(".")[0] in ("enorm", "hnorm", "eh_proj", "post_norm"):
                first = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden"}
                first |= {"eh_proj": "fc", "post_norm": "norm"}
                key = f"mtp.{first[key.split('.')[0]]}.weight"
            else:
                key = f"mtp.layers.{number}.{key}"
            tensors[key] = piece
    if layout == "numbered":  # copies of what they share with the model, as releases have them
        tensors["model.layers.2.embed_tokens.weight"] = torch.zeros(64, 32)
        tensors["model.layers.2.shared_head.head.weight"] = torch.zeros(64, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model, mtp


@pytest.mark.parametrize("layout", ["numbered", "under mtp"])
@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_layers_of_multi_token_prediction(tmp_path, layout, num_layers):
    _, mtp = mtp_folder(tmp_path, layout)
    divided = divide("deepseek_v3", None, seed=1)
    state = state_of(divided)
    for name, value in mtp.layers[:num_layers].state_dict().items():
        state[f"model.mtp.layers.{name}"] = Parts(
            tuple(value.shape), value.dtype, {(0,) * value.dim(): torch.full_like(value, torch.nan)}
        )
    read_initial(tmp_path, divided.modules, state)
    assert wrong(divided, divide("deepseek_v3", None, seed=0)) == []
    for name, value in mtp.layers[:num_layers].state_dict().items():
        (box,) = state[f"model.mtp.layers.{name}"].boxes.values()
        assert torch.equal(box, value), name


def test_unknown_tensors_of_these_layers_are_refused(tmp_path):
    _, mtp = mtp_folder(tmp_path, "numbered")
    divided = divide("deepseek_v3", None, seed=1)
    state = state_of(divided)
    for name, value in mtp.layers.state_dict().items():
        if "hnorm" not in name:
            state[f"model.mtp.layers.{name}"] = Parts(tuple(value.shape), value.dtype, {})
    with pytest.raises(CheckpointError, match=r"it has model\.layers\.2\.hnorm\.weight"):
        read_initial(tmp_path, divided.modules, state)
    state["model.mtp.layers.2.enorm.weight"] = state["model.mtp.layers.0.enorm.weight"]
    with pytest.raises(
        CheckpointError, match=r"it lacks mtp\.layers\.2\.enorm\.weight of multi-token prediction"
    ):
        read_initial(tmp_path, divided.modules, state)


# ------------------------------------------------------------------ the trainer on ranks


def run_config(folder, plan, **sections):
    config = tiny(folder, training={"global_batch_size": 8}, **sections)
    model = replace(config.model, tie_embeddings=True)
    return replace(config, model=model, parallelism=ParallelismConfig(**plan))


def start(config):
    """Names of what this rank has when its run begins, and of what is not as in the files."""
    trainer = build(config)
    expected = AutoModelForCausalLM.from_pretrained(config.checkpoint.initial).state_dict()
    state = LocalState(trainer.engine.modules, trainer.optimizer).model
    bad = []
    for name, parts in state.items():
        value = expected.get(name.removeprefix("model."))
        for offset, box in parts.boxes.items():
            if value is None:
                assert name.endswith(("lora_A.default.weight", "lora_B.default.weight")), name
                ok = box.abs().max() == 0 if "lora_B" in name else box.std() > 0.01
            else:
                place = tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))
                ok = torch.equal(box, value[place])
            bad += [] if ok else [name]
    embeddings = [
        local(value)
        for module in trainer.engine.modules
        for name, value in module.state_dict().items()
        if name in ("model.embed_tokens.weight", "lm_head.weight")
    ]
    assert all(torch.equal(one, embeddings[0]) for one in embeddings)
    return set(state), bad, trainer.step


@pytest.mark.parametrize(
    ("plan", "lora"),
    [
        ({"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2}, False),
        ({"expert_parallel_degree": 2}, True),
        ({"tensor_parallel_degree": 2}, False),
    ],
)
def test_runs_on_ranks_start_from_it(ranks, tmp_path, plan, lora):
    config = run_config(tmp_path, {})
    model = build(config).model
    with torch.no_grad():
        for value in model.state_dict().values():
            value.normal_()
    save(model, tmp_path / "given")
    assert "lm_head.weight" not in read_entries(tmp_path / "given")
    finetune = {"method": "lora"} if lora else {}
    given = run_config(tmp_path, plan, checkpoint={"initial": str(tmp_path / "given")}, finetune=finetune)
    results = ranks.run(start, 2, given)
    names = set().union(*(found for found, _, _ in results))
    assert {name.removeprefix("model.") for name in names if "lora" not in name} == model.state_dict().keys()
    assert any("lora" in name for name in names) == lora
    assert [(bad, step) for _, bad, step in results] == [([], 0), ([], 0)]


# ------------------------------------------------------------------ memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """Beside the model's own, which is there before: pieces of 1 MiB, of 24 MiB a layer."""
    monkeypatch.setattr(safetensors_folder, "_PIECE", 2**20)
    layer, most = 24 * 2**20, {}
    for num_layers in (1, 6):
        _, config = tiny_config("mixtral", num_layers=num_layers, hidden_size=256, intermediate_size=1024)
        torch.manual_seed(0)
        model, folder = MixtralForCausalLM(config), tmp_path / str(num_layers)
        save(model, folder, max_shard_size="50MB", save_original_format=False)  # experts as one tensor
        assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > num_layers * layer
        divided = Divided("mixtral", [MixtralForCausalLM(config)])
        with watched_memory() as seen:
            read(folder, divided)
        most[num_layers] = max(seen)
    assert max(most.values()) < layer / 2, most
