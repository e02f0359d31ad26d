"""Exported checkpoints: stock transformers loads them without remark and computes the same, to the bit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import MtpModel

from tests.hf_models import make_batch, tiny_config, tiny_model
from tests.parallel.checkpointing import Divided
from tests.train.stock import FAMILIES, Degrees, divide, read, watched_memory, wrong
from tests.train.tiny import build, tiny
from trimtab.integrations.mtp import add_mtp
from trimtab.train import hf_export
from trimtab.train.checkpoint import Checkpointer, CheckpointError
from trimtab.train.checkpoint_state import Saved
from trimtab.train.cli import main
from trimtab.train.hf_export import describe_model, export
from trimtab.train.safetensors_folder import read_entries

BYTES = {"data": {"tokenizer": {"name": "byte", "eos_token": None, "revision": None}}}


def save_run(run_dir, divided, config=BYTES):
    """A checkpoint as the trainer writes it."""
    state = {"config": config, "model_config": describe_model(divided.modules[0])}
    Checkpointer(run_dir).save(1, divided.modules, divided.optimizer, state)
    return run_dir


def load(folder, cls=AutoModelForCausalLM, **options):
    """What stock transformers makes of a directory; it must have nothing to remark."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert info == {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    return model.eval()


def logits(model):
    batch = make_batch()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_loads_it_and_computes_the_same(tmp_path, family):
    own = tiny_model(family)[0]
    save_run(tmp_path / "run", Divided(family, [own]))
    done = export(tmp_path / "run", tmp_path / "out", max_shard_size="40KB")
    assert len(done.files) > 1
    model = load(tmp_path / "out", type(own), attn_implementation="eager")
    assert torch.equal(logits(model), logits(own.eval()))
    expected = own.state_dict()
    assert {name: value.dtype for name, value in model.state_dict().items()} == {
        name: value.dtype for name, value in expected.items()
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    # And trimtab reads what it wrote.
    divided = divide(family, None, seed=1)
    read(tmp_path / "out", divided)
    assert wrong(divided, Divided(family, [own])) == []


def save_divided(run_dir, family, degrees):
    save_run(run_dir, divide(family, degrees, seed=0))


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        ("deepseek_v3", Degrees(dp_shard=2, ep=2)),
        ("gpt_oss", Degrees(tp=2, etp=2)),
        ("qwen3_moe", Degrees(pp=2)),
        ("llama4", Degrees(dp_shard=2, ep=2)),
    ],
)
def test_what_ranks_saved_together(ranks, tmp_path, family, degrees):
    ranks.run(save_divided, 2, tmp_path / "run", family, degrees)
    export(tmp_path / "run", tmp_path / "out")
    own = tiny_model(family)[0]
    assert torch.equal(logits(load(tmp_path / "out", attn_implementation="eager")), logits(own.eval()))


def test_files_are_as_stock_writes_them(tmp_path):
    own = tiny_model("mixtral")[0]
    save_run(tmp_path / "run", Divided("mixtral", [own]))
    export(tmp_path / "run", tmp_path / "out")
    own.save_pretrained(tmp_path / "stock")
    assert read_entries(tmp_path / "out") == read_entries(tmp_path / "stock")
    mine, stock = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "stock"))
    assert mine == stock


def test_tied_embeddings_are_written_once(tmp_path):
    own = tiny_model("glm4_moe", tie_word_embeddings=True)[0]
    save_run(tmp_path / "run", Divided("glm4_moe", [own]))
    export(tmp_path / "run", tmp_path / "out")
    assert "lm_head.weight" not in read_entries(tmp_path / "out")
    model = load(tmp_path / "out", attn_implementation="eager")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(own.eval()))


def test_bfloat16_leaves_biases_of_routers_in_float32(tmp_path):
    own = tiny_model("deepseek_v3")[0]
    save_run(tmp_path / "run", Divided("deepseek_v3", [own]))
    export(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    kept = {name for name, entry in read_entries(tmp_path / "out").items() if entry.dtype != "BF16"}
    assert kept == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (0, 1)}
    model = load(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    for name, value in own.state_dict().items():
        found = model.state_dict()[name]
        assert torch.equal(found, value if "bias" in name else value.bfloat16()), name


def test_sizes_of_files(tmp_path):
    save_run(tmp_path / "run", Divided("qwen3_moe", [tiny_model("qwen3_moe")[0]]))
    done = export(tmp_path / "run", tmp_path / "out", max_shard_size="9KB")
    entries = read_entries(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: entry.file for name, entry in entries.items()}
    assert index["metadata"]["total_size"] == done.num_bytes
    sizes = {}
    for file in done.files:
        tensors = load_file(tmp_path / "out" / file).values()
        sizes[file] = sum(tensor.numel() * 4 for tensor in tensors)
        assert sizes[file] <= 9000 or len(tensors) == 1  # one that is larger has its own
    assert sum(sizes.values()) == done.num_bytes
    assert len(entries) == done.num_tensors
    assert sum(sizes.values()) / len(sizes) > 6000
    for text in ("0GB", "5", "many", "-1MB"):
        with pytest.raises(ValueError, match=f"max_shard_size='{text}' must be a size"):
            export(tmp_path / "run", tmp_path / "more", max_shard_size=text)
    with pytest.raises(ValueError, match="dtype='float16' must be bfloat16 or float32"):
        export(tmp_path / "run", tmp_path / "more", dtype="float16")


# ------------------------------------------------------------------ multi-token prediction


def with_mtp(family, num_layers, seed=3):
    """A tiny model with such layers, all of whose weights are random."""
    model = tiny_model(family)[0]
    add_mtp(model, num_layers)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.mtp.parameters():
        parameter.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize(("family", "num_layers"), [("deepseek_v3", 2), ("glm4_moe", 1), ("qwen3_5_moe", 1)])
def test_layers_of_multi_token_prediction(tmp_path, monkeypatch, family, num_layers):
    own = with_mtp(family, num_layers)
    save_run(tmp_path / "run", Divided(family, [own]))
    export(tmp_path / "run", tmp_path / "out")
    names = set(read_entries(tmp_path / "out"))
    cls = getattr(transformers, type(own).__name__)
    if family == "qwen3_5_moe":
        assert {"mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.q_proj.weight"} < names
    else:
        assert {"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.norm.weight"} < names
        # Which numbers are of such layers, transformers knows of released sizes alone.
        monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23]\."])
    assert not any("mtp_block" in name for name in names)
    model = load(tmp_path / "out", cls, attn_implementation="eager")
    assert torch.equal(logits(model), logits(own.eval()))
    found = MtpModel.from_pretrained(model)  # what drafts tokens in `generate`
    assert found.num_mtp_layers == num_layers
    expected = own.mtp.state_dict()
    for name, value in found.layers.state_dict().items():
        assert torch.equal(value, expected[f"layers.{name}"]), name
    again = with_mtp(family, num_layers, seed=4)
    read(tmp_path / "out", Divided(family, [again]))
    assert wrong(Divided(family, [again]), Divided(family, [own])) == []


# ------------------------------------------------------------------ what goes beside the weights


def test_ids_of_bytes_and_remark(tmp_path):
    own = tiny_model("qwen3_moe", bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False)[0]
    save_run(tmp_path / "run", Divided("qwen3_moe", [own]))
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.remarks == ("no tokenizer files: bytes are ids 0 to 255, then bos, eos, pad",)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, 258)
    assert config.use_cache
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == 257
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def a_tokenizer(folder):
    folder.mkdir()
    backend = Tokenizer(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_text("of another model")
    return folder


@pytest.mark.parametrize("named", ["directory", "file"])
def test_files_of_the_tokenizer(tmp_path, named):
    folder = a_tokenizer(tmp_path / "tokenizer")
    name = folder if named == "directory" else folder / "tokenizer.json"
    config = {"data": {"tokenizer": {"name": str(name), "eos_token": None, "revision": None}}}
    own = tiny_model("qwen3_moe", bos_token_id=None, eos_token_id=None, pad_token_id=None)[0]
    save_run(tmp_path / "run", Divided("qwen3_moe", [own]), config)
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.remarks == ()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("b") == [1]
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    load(tmp_path / "out")


def test_a_tokenizer_that_is_gone_is_a_remark(tmp_path):
    config = {"data": {"tokenizer": {"name": str(tmp_path / "gone"), "eos_token": None, "revision": None}}}
    save_run(tmp_path / "run", Divided("qwen3_moe", [tiny_model("qwen3_moe")[0]]), config)
    (remark,) = export(tmp_path / "run", tmp_path / "out").remarks
    assert "no tokenizer files" in remark
    assert "does not exist" in remark


def test_generation_settings_of_the_initial_checkpoint(tmp_path):
    (tmp_path / "initial").mkdir()
    GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(tmp_path / "initial")
    config = BYTES | {"checkpoint": {"initial": str(tmp_path / "initial")}}
    save_run(tmp_path / "run", Divided("qwen3_moe", [tiny_model("qwen3_moe")[0]]), config)
    export(tmp_path / "run", tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.3


# ------------------------------------------------------------------ all or nothing


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    save_run(tmp_path / "run", Divided("qwen3_moe", [tiny_model("qwen3_moe")[0]]))
    (tmp_path / ".out.unfinished-1").mkdir()  # of one that was killed

    def fail(*args, **kwargs):
        assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == [
            f".out.unfinished-{os.getpid()}"
        ]
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(hf_export, "write_config", fail)
        with pytest.raises(OSError, match="No space left"):
            export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="out exists; give a directory that does not"):
        export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    export(tmp_path / "run", tmp_path / "empty")


def test_wrong_sources(tmp_path):
    with pytest.raises(CheckpointError, match=r"trimtab export \S+none does not exist"):
        export(tmp_path / "none", tmp_path / "out")
    divided = Divided("qwen3_moe", [tiny_model("qwen3_moe")[0]])
    Checkpointer(tmp_path / "old").save(1, divided.modules, divided.optimizer, {"config": BYTES})
    with pytest.raises(CheckpointError, match="does not say which model of transformers"):
        export(tmp_path / "old", tmp_path / "out")
    described = {"architecture": "FormerForCausalLM", "config": "{}"}
    state = {"config": BYTES, "model_config": described}
    Checkpointer(tmp_path / "former").save(1, divided.modules, divided.optimizer, state)
    with pytest.raises(CheckpointError, match=r"is of FormerForCausalLM, which transformers \S+ lacks"):
        export(tmp_path / "former", tmp_path / "out")
    own = divided.modules[0]
    own.model.norm.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    save_run(tmp_path / "more", Divided("qwen3_moe", [own]))
    with pytest.raises(CheckpointError, match=r"it has model.norm.extra, which the model has not"):
        export(tmp_path / "more", tmp_path / "out")
    save_run(tmp_path / "bad", Divided("qwen3_moe", [tiny_model("qwen3_moe")[0]]))
    (data,) = (tmp_path / "bad" / "checkpoints" / "step-000001").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is corrupted"):
        export(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_others_have_no_description():
    assert describe_model(torch.nn.Linear(2, 2)) is None


# ------------------------------------------------------------------ the run and the command


def test_from_a_run_to_the_next(tmp_path, capsys):
    trainer = build(tiny(tmp_path))
    trainer.train()
    assert main(["export", str(trainer.run_dir), str(tmp_path / "out"), "--max-shard-size", "100KB"]) == 0
    out = capsys.readouterr().out
    assert "step-000006 ->" in out
    assert "tensors" in out
    assert "in 3 files" in out
    model = load(tmp_path / "out")
    biases = [name for name in model.state_dict() if "e_score_correction_bias" in name]
    assert biases
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert value.abs().max() > 0  # biases have moved
    # A second run starts where it ended, and resumes by itself.
    config = tiny(
        tmp_path, checkpoint={"initial": str(tmp_path / "out")}, training={"steps": 2}, run_name="next"
    )
    second = build(config)
    assert second.step == 0
    for name, value in second.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    second.train()
    shutil.rmtree(tmp_path / "out")
    third = build(config)
    assert third.step == 2
    for name, value in third.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    # One checkpoint by its name; nothing there to start from.
    checkpoint = trainer.run_dir / "checkpoints" / "step-000003"
    assert main(["export", str(checkpoint), str(tmp_path / "third")]) == 0
    assert not torch.equal(load(tmp_path / "third").lm_head.weight, model.lm_head.weight)
    config = tiny(tmp_path, checkpoint={"initial": str(tmp_path / "out")}, run_name="other")
    with pytest.raises(CheckpointError, match=r"--checkpoint.initial \S+out does not exist"):
        build(config)
    assert not (tmp_path / "runs" / "other").exists()
    assert main(["export", str(tmp_path / "no"), str(tmp_path / "fourth")]) == 2
    assert "trimtab: trimtab export" in capsys.readouterr().err


def test_a_mistyped_directory_starts_no_process(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trimtab.train.launch.launch", lambda *args, **kwargs: pytest.fail("started"))
    quick = ["train", "--config", "deepseek_v3_tiny", "--nproc", "2"]
    assert main([*quick, "--checkpoint.initial", "typo"]) == 2
    assert "--checkpoint.initial typo does not exist" in capsys.readouterr().err


# ------------------------------------------------------------------ memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """About a tensor and a file are in memory: here 16 and 10 MB of 200."""
    run = {}
    for num_layers in (1, 8):
        model_class, config = tiny_config(
            "mixtral", num_layers=num_layers, hidden_size=256, intermediate_size=1024
        )
        model = model_class(config)
        run[num_layers] = save_run(tmp_path / str(num_layers), Divided("mixtral", [model]))
        del model
    most, times = {}, {}
    original = Saved.fill

    def counted(self, state):
        times[num_layers] += 1
        original(self, state)

    monkeypatch.setattr(Saved, "fill", counted)
    for num_layers, run_dir in run.items():
        times[num_layers] = 0
        with watched_memory() as seen:
            export(run_dir, tmp_path / f"out{num_layers}", max_shard_size="10MB")
        most[num_layers] = max(seen)
        # Each tensor once, though 16 files' are made of it.
        assert times[num_layers] == 3 + 9 * num_layers
    size = sum(file.stat().st_size for file in (tmp_path / "out8").glob("*.safetensors"))
    assert size > 200 * 10**6
    assert max(most.values()) < 90 * 10**6, most
