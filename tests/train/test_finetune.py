"""Fine-tuning in one process: what is trained, what it is compared with, and the files that come of it."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from tests.hf_models import tiny_model
from tests.parallel import reference
from tests.parallel.double import double_precision
from tests.parallel.reference import build_model
from tests.parallel.test_finetune import LORA, case_of, run_step, waves
from tests.train.tiny import build, tiny
from trimtab import Sign
from trimtab.integrations.experts import layout_of
from trimtab.integrations.lora import is_adapter
from trimtab.models.pretrained import PretrainedModelConfig, pretrained_tiny
from trimtab.parallel.mesh import Degrees
from trimtab.train.adapter import Pair, pairs
from trimtab.train.checkpoint_state import canonical_name
from trimtab.train.cli import main
from trimtab.train.finetune import FinetuneConfig
from trimtab.train.hf_export import export, export_adapter
from trimtab.train.model import Balancing
from trimtab.train.trainer import Trainer

ALL = ("attention", "mlp", "experts")
EVERYTHING = FinetuneConfig(method="lora", rank=2, target=ALL)


@cache
def directory(family: str, folder: Path) -> str:
    """A small random model as a hub would serve it."""
    model, _ = tiny_model(family, vocab_size=320, max_position_embeddings=512)
    model.eval().save_pretrained(folder / family)
    return str(folder / family)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return lambda family: directory(family, folder)


def finetuning(path, tmp_path, finetune, *, balancing=None, steps=4, **sections):
    """A run of seconds on the shipped conversations."""
    base = pretrained_tiny()
    model = (
        PretrainedModelConfig(path=path)
        if balancing is None
        else PretrainedModelConfig(path=path, balancing=balancing)
    )
    changed = {
        "model": model,
        "finetune": finetune,
        "data": replace(base.data, seq_len=256, microbatch_size=2),
        "training": replace(base.training, steps=steps),
        "metrics": replace(base.metrics, log_interval=1, tensorboard=False, report=False),
        "optimizer": replace(base.optimizer, lr=2e-2),
        "validation": replace(base.validation, enable=False),
        "dump_folder": str(tmp_path / "runs"),
    }
    return replace(base, **changed | sections)


cut = pytest.mark.filterwarnings("ignore:2 of 24 conversations are longer")


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4"])
def test_gradients_of_adapters_follow_from_those_of_weights(family):
    """dA = s B^T dW and dB = s dW A^T, dW of a stock model whose weights have the adapters in them."""
    case = case_of("fsdp", family)
    found = run_step(case, LORA, alone=True)
    adapters = pairs(found)
    assert any(pair.stacked for pair in adapters)
    assert any("self_attn" in pair.weight for pair in adapters)

    def halves(pair):
        number = int(pair.stacked and pair.weight.endswith("down_proj"))
        return [waves(found[name].shape, number) for name in (pair.a, pair.b)]

    def merged_model(family, num_layers):
        model = build_model(family, num_layers)
        for pair in adapters:
            a, b = halves(pair)
            added = LORA.scale * b @ a
            with torch.no_grad():
                model.get_parameter(pair.weight).add_(added.mT if transposed(model, pair) else added)
        return model

    with double_precision(), mock.patch.object(reference, "build_model", merged_model):
        # Not the cached one, which is of the model without adapters.
        expected = reference._expected.__wrapped__(case, ()).grads
    model = build_model(family, case.num_layers)
    for pair in adapters:
        a, b = halves(pair)
        grad = expected[pair.weight]
        grad = grad.mT if transposed(model, pair) else grad
        for name, wanted in ((pair.a, b.mT @ grad), (pair.b, grad @ a.mT)):
            wanted = LORA.scale * wanted
            assert (found[name] - wanted).abs().max() < 1e-10 * wanted.abs().max(), name
    frozen = [name for name, grad in found.items() if grad is None]
    assert {pair.weight for pair in adapters} < set(frozen)
    for name, grad in found.items():
        if grad is not None and not is_adapter(name):  # routers, which learn beside the adapters
            assert (grad - expected[name]).abs().max() < 1e-10 * expected[name].abs().max(), name


def transposed(model, pair: Pair) -> bool:
    return pair.stacked and layout_of(model.get_submodule(pair.weight.rpartition(".")[0])).transposed


# ------------------------------------------------------------------ files


# peft 0.21 reads a property that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@cut
@pytest.mark.parametrize(
    ("family", "target", "router", "balancing"),
    [
        ("deepseek_v3", ALL, "trained", None),
        ("llama4", ALL, "trained", Balancing.off()),
        ("gpt_oss", ("experts",), "frozen", Balancing.off()),
    ],
)
def test_stock_peft_and_stock_transformers_compute_what_was_trained(
    hub, tmp_path, family, target, router, balancing
):
    from peft import PeftModel

    finetune = FinetuneConfig(method="lora", rank=2, target=target, router=router)
    if balancing is None:  # a rule that moves the biases far
        balancing = Balancing(bias=Sign.Config(speed=0.1))
    trainer = Trainer(
        finetuning(hub(family), tmp_path, finetune, balancing=balancing), name="test", quiet=True
    )
    run_dir = trainer.train().run_dir
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    places = torch.arange(24).expand(2, 24)
    trained = trainer.model.eval()
    for pair in pairs(dict(named(trained))):
        assert dict(named(trained))[pair.b].abs().max() > 1e-3, f"{pair.b} was not trained"
    with torch.no_grad():
        expected = trained(input_ids=ids, position_ids=places).logits
        cls = getattr(transformers, trained.config.architectures[0])
        base = cls.from_pretrained(hub(family)).eval()
        assert (base(input_ids=ids).logits - expected).abs().max() > 0.05
        adapted = PeftModel.from_pretrained(base, run_dir / "adapter").eval()
        assert (adapted(input_ids=ids).logits - expected).abs().max() < 1e-5
        export(run_dir, tmp_path / "merged")
        merged = cls.from_pretrained(tmp_path / "merged").eval()
        assert (merged(input_ids=ids).logits - expected).abs().max() < 2e-5
    settings = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == hub(family)
    assert bool(settings["modules_to_save"]) == (router == "trained" or balancing.bias is not None)
    # The same, asked for later.
    export_adapter(run_dir, tmp_path / "again")
    first, again = (path / "adapter_model.safetensors" for path in (run_dir / "adapter", tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()
    with pytest.raises(ValueError, match=r"again exists; give a directory that does not"):
        export_adapter(run_dir, tmp_path / "again")


def named(model):
    return ((canonical_name(name), parameter.detach()) for name, parameter in model.named_parameters())


@cut
def test_a_full_run_has_no_adapter_to_export(hub, tmp_path):
    trainer = Trainer(finetuning(hub("qwen3_moe"), tmp_path, FinetuneConfig(), steps=1), name="t", quiet=True)
    run_dir = trainer.train().run_dir
    assert not (run_dir / "adapter").exists()
    with pytest.raises(ValueError, match=r"holds no adapter: the run was not of finetune.method lora"):
        export_adapter(run_dir, tmp_path / "adapter")


# ------------------------------------------------------------------ what is trained


@cut
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("router", ["trained", "frozen"])
def test_what_is_frozen_stays_to_the_bit(hub, tmp_path, method, router):
    finetune = FinetuneConfig(method=method, router=router)
    config = finetuning(
        hub("deepseek_v3"), tmp_path, finetune, balancing=Balancing(bias=Sign.Config(speed=0.1))
    )
    trainer = Trainer(config, name="test", quiet=True)
    before = {name: value.clone() for name, value in named(trainer.model)}
    biases = [r.expert_bias.clone() for r in trainer.engine.parts[0].routers]
    trainer.train()
    routers = {f"{r.canonical_name}.weight" for r in trainer.engine.parts[0].routers}
    moved = {name for name, value in named(trainer.model) if not torch.equal(value, before[name])}
    expected = {name for name in before if method == "full" or is_adapter(name)} - routers
    expected |= routers if router == "trained" else set()
    assert moved == expected
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {p for p in trainer.engine.parameters() if p.requires_grad}
    # An expert bias is no weight: the rule moves it under a frozen router as well.
    for router_, bias in zip(trainer.engine.parts[0].routers, biases, strict=True):
        assert (router_.expert_bias - bias).abs().max() > 0.05
    record = json.loads((trainer.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert record["num_trained"] == sum(
        value.numel() for name, value in named(trainer.model) if name in expected
    )


@cut
def test_a_resumed_run_is_bitwise_the_one_that_was_not_interrupted(hub, tmp_path):
    finetune = replace(EVERYTHING, dropout=0.1)
    config = finetuning(hub("deepseek_v3"), tmp_path, finetune, steps=6)
    config = replace(config, checkpoint=replace(config.checkpoint, interval=3))
    whole = Trainer(replace(config, run_name="whole"), name="test", quiet=True)
    whole.train()
    checkpoint = whole.run_dir / "checkpoints" / "step-000003"
    second = Trainer(
        replace(config, checkpoint=replace(config.checkpoint, resume=str(checkpoint))),
        name="test",
        quiet=True,
    )
    assert second.step == 3
    second.train()
    for (name, value), (_, expected) in zip(named(second.model), named(whole.model), strict=True):
        assert torch.equal(value, expected), name
    changed = replace(
        config,
        finetune=replace(finetune, rank=4),
        checkpoint=replace(config.checkpoint, resume=str(checkpoint)),
    )
    with pytest.raises(ValueError, match=r"finetune.rank \(saved 2, now 4\)"):
        Trainer(changed, name="test", quiet=True)


def test_new_adapters_change_nothing(tmp_path):
    ids = torch.arange(40).view(2, 20)
    plain = build(tiny(tmp_path)).model.eval()
    adapted = build(tiny(tmp_path, finetune=EVERYTHING)).model.eval()
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=ids).logits, plain(input_ids=ids).logits)
    for name, value in named(adapted):
        if is_adapter(name):
            assert (value == 0).all() == ("lora_B" in name), name
            if "lora_A" in name:  # uniform in +-1 / sqrt(D)
                bound = value.shape[-1] ** -0.5
                assert value.abs().max() <= bound
                assert value.abs().max() > 0.9 * bound


def test_dropout_is_of_training_alone(tmp_path):
    finetune = replace(EVERYTHING, dropout=0.5)
    model = build(tiny(tmp_path, finetune=finetune)).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.fill_(0.1)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():  # outside of a step
        logits = [model.train(mode)(input_ids=ids).logits for mode in (True, True, False, False)]
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(logits[2], logits[3])


# ------------------------------------------------------------------ balancing off


@cut
def test_without_balancing_loads_are_watched_all_the_same(hub, tmp_path):
    config = finetuning(hub("deepseek_v3"), tmp_path, FinetuneConfig(), balancing=Balancing.off(), steps=2)
    trainer = Trainer(config, name="test", quiet=True)
    biases = [r.expert_bias.clone() for r in trainer.engine.parts[0].routers]
    trainer.train()
    records = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    balance = [r for r in records if r["event"] == "step"][-1]["balance"]
    assert len(balance["load"]) == 2
    assert all(abs(sum(row) - len(row)) < 1e-3 for row in balance["load"])
    assert all(value > 0 for value in balance["maxvio"])
    assert all(value > 0 for value in balance["router_entropy"])
    assert not balance.get("losses")
    for router, bias in zip(trainer.engine.parts[0].routers, biases, strict=True):
        assert torch.equal(router.expert_bias, bias)


def test_balancing_that_says_nothing_is_still_refused():
    with pytest.raises(
        ValueError, match=r"balances nothing; .* or Balancing.off\(\) to watch the load alone"
    ):
        Balancing()
    with pytest.raises(
        ValueError, match=r"observe_only=True balances nothing, and objectives or bias are given"
    ):
        Balancing(observe_only=True, bias=Sign.Config())


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank=0 must be at least 1; raise finetune.rank"),
        ({"alpha": 0.0}, r"alpha=0.0 must be positive; raise finetune.alpha"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\); lower finetune.dropout"),
        ({"target": ()}, r"target=\(\) must name each of attention, mlp and experts at most once"),
        ({"target": ("mlp", "mlp")}, r"must name each of attention, mlp and experts at most once"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(method="lora", **settings)


def test_settings_without_effect_warn(tmp_path):
    with pytest.warns(UserWarning, match=r"finetune.rank has no effect without finetune.method lora"):
        FinetuneConfig(rank=4)
    with pytest.warns(
        UserWarning, match=r"finetune.router is frozen: sequence_wise of model.balancing cannot move"
    ):
        tiny(tmp_path, finetune=FinetuneConfig(router="frozen"))
    tiny(tmp_path, finetune=FinetuneConfig(router="frozen"), balancing=Balancing(bias=Sign.Config()))


def test_sliced_experts_take_no_adapters():
    finetune = FinetuneConfig(method="lora", target=("experts",))
    finetune.check_parallel(Degrees(tp=2, ep=2))
    with pytest.raises(
        ValueError, match=r"expert_tensor_parallel_degree=2 divides the hidden layer of each expert"
    ):
        finetune.check_parallel(Degrees(tp=2, etp=2))


# ------------------------------------------------------------------ the model of a directory


def test_sizes_and_balancing_are_those_of_the_directory(hub):
    model = PretrainedModelConfig(path=hub("deepseek_v3"))
    assert (model.num_layers, model.num_experts, model.top_k, model.max_seq_len) == (2, 8, 2, 512)
    assert model.grouped
    assert model.has_expert_bias
    assert isinstance(model.balancing.bias, Sign.Config)
    # Another directory is another family's, unless balancing was given.
    other = replace(model, path=hub("qwen3_moe"))
    assert other.balancing.bias is None
    assert other.balancing.objectives
    off = PretrainedModelConfig(path=hub("qwen3_moe"), balancing=Balancing.off())
    assert replace(off, path=hub("deepseek_v3")).balancing == Balancing.off()
    config = pretrained_tiny()
    taken = replace(
        config, model=model, data=replace(config.data, tokenizer=replace(config.data.tokenizer, name="model"))
    )
    assert taken.checkpoint.initial == hub("deepseek_v3")
    assert taken.data.tokenizer.name == hub("deepseek_v3")


def test_a_family_that_is_not_known_is_watched(hub):
    with pytest.warns(
        UserWarning, match=r"MiniMaxM2ForCausalLM\) are watched and not balanced: no module of"
    ):
        model = PretrainedModelConfig(path=hub("minimax_m2"))
    assert not model.balancing.objectives


def test_a_directory_that_cannot_be_trained_says_why(hub, tmp_path):
    with pytest.raises(
        ValueError, match=r"model.path is not set; give --model.path a directory with config.json"
    ):
        pretrained_tiny().for_world(1)
    with pytest.raises(
        ValueError, match=r"holds no configuration that transformers reads .*; give a directory"
    ):
        PretrainedModelConfig(path=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "architectures": ["Nobody"]}')
    with pytest.raises(ValueError, match=r"architectures=\['Nobody'\] names no class of transformers"):
        PretrainedModelConfig(path=str(tmp_path))
    model = PretrainedModelConfig(path=hub("qwen3_moe"))
    with pytest.raises(ValueError, match=r"tensor_parallel_degree=8 must divide num_attention_heads=4"):
        model.check_parallel(Degrees(tp=8))
    with pytest.raises(ValueError, match=r"has 320 rows in its embedding and the tokenizer 999 ids"):
        model.build(vocab_size=999, seq_len=8)


# ------------------------------------------------------------------ the command


def test_the_commands_from_a_directory_to_a_directory(hub, tmp_path, capsys):
    options = [
        "--module",
        "pretrained",
        "--config",
        "pretrained_tiny",
        "--model.path",
        hub("qwen3_moe"),
    ]
    options += ["--dump-folder", str(tmp_path), "--training.device", "cpu", "--metrics.no-tensorboard"]
    lora = [
        "--finetune.method",
        "lora",
        "--finetune.target",
        "attention",
        "experts",
        "--optimizer.lr",
        "0.02",
    ]
    assert main(["train", *options, *lora, "--run-name", "a", "--training.steps", "10"]) == 0
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    validations = {r["step"]: r for r in records if r["event"] == "validation"}
    assert sorted(validations) == [0, 10]
    # Little, because a frozen random head is all that the adapters have.
    assert validations[10]["loss"] < validations[0]["loss"] - 0.05
    assert {"capitals", "sums"} == validations[0]["domain_load"].keys()
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Load before and after" in page
    assert "by those of step 10" in page
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "model")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "model" / "model.safetensors").is_file()
    # What was written can be trained further.
    assert (
        main(
            [
                "train",
                *options[:4],
                "--model.path",
                str(tmp_path / "model"),
                *options[6:],
                "--training.steps",
                "1",
            ]
        )
        == 0
    )
