import json
from dataclasses import replace

import pytest
import torch

from tests.train.tiny import tiny
from trimtab import BatchWise, CommunicationLevel, GlobalBatch, Quantile, SequenceWise, Sign
from trimtab.integrations.parallel import decoder_layers
from trimtab.models.deepseek_v3 import deepseek_v3_debugmodel, deepseek_v3_tiny
from trimtab.models.pretrained import PretrainedModelConfig
from trimtab.train.compute import ActivationCheckpointConfig, CompileConfig, check_precision
from trimtab.train.config import TrainConfig, TrainingConfig, differences, flatten, to_dict
from trimtab.train.evaluation import ValidationConfig
from trimtab.train.logging import (
    MetricsConfig,
    RunConsole,
    finite,
    is_quiet,
    layer_numbers,
    layers_line,
    scalars,
    step_line,
)
from trimtab.train.model import Balancing
from trimtab.train.mtp import mtp_of
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.registry import config_functions, load_config, load_module, module_names


def test_every_registered_config_is_valid_and_builds_its_model_on_meta():
    assert "deepseek_v3" in module_names()
    for module in module_names():
        functions = config_functions(load_module(module))
        assert functions
        for name in functions:
            config = load_config(module, name)
            assert isinstance(config, TrainConfig)
            if isinstance(config.model, PretrainedModelConfig):
                continue  # a model only once its directory is given
            with torch.device("meta"):
                model = config.model.build(vocab_size=259, seq_len=config.data.seq_len)
            assert model.training
            mtp = mtp_of(config.model)
            depths = 0 if mtp is None else mtp.num_layers
            assert len(decoder_layers(model)) == config.model.num_layers + depths


def test_the_debug_model_is_balanced_as_the_report_says():
    balancing = deepseek_v3_debugmodel().model.balancing
    (objective,) = balancing.objectives
    assert isinstance(objective, SequenceWise.Config)
    assert objective.assignments == "unbiased"
    assert isinstance(balancing.bias, Sign.Config)


def test_a_family_elsewhere_is_found_by_its_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_family.py").write_text(
        "from trimtab.models.deepseek_v3 import deepseek_v3_tiny\n"
        "from trimtab.train.config import TrainConfig\n"
        'def mine() -> TrainConfig:\n    "Mine."\n    return deepseek_v3_tiny()\n'
        "def _private() -> TrainConfig: ...\n"
        "def helper() -> int: ...\n"
    )
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "my_family.py").rename(tmp_path / "pack" / "my_family.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(config_functions(load_module("pack.my_family"))) == ["mine"]
    assert load_config("pack.my_family", "mine") == deepseek_v3_tiny()


@pytest.mark.parametrize(
    ("module", "config", "said"),
    [
        ("deepsek_v3", "x", "unknown module 'deepsek_v3': did you mean deepseek_v3 or deepseek_v2?"),
        ("deepseek_v3", "debugmodel", "unknown config 'debugmodel': did you mean deepseek_v3_debugmodel"),
        ("no.such.place", "x", "unknown module 'no.such.place'"),
    ],
)
def test_unknown_names_come_with_the_nearest(module, config, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        load_config(module, config)


def test_a_missing_dependency_of_a_family_is_not_called_an_unknown_family(tmp_path, monkeypatch):
    (tmp_path / "family_b").mkdir()
    (tmp_path / "family_b" / "__init__.py").write_text("")
    (tmp_path / "family_b" / "model.py").write_text("import a_package_that_is_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_absent"):
        load_module("family_b.model")


def sections(**changes):
    """`deepseek_v3_tiny` with fields of sections replaced."""
    config = deepseek_v3_tiny()
    named = {name: replace(getattr(config, name), **fields) for name, fields in changes.items()}
    return replace(config, **named)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"training": {"global_batch_size": 6}},
            r"global_batch_size=6 must be a multiple of .*microbatch_size=4",
        ),
        (
            {"data": {"microbatch_size": None}},
            r"global_batch_size=None and data\.microbatch_size=None: .*set one of them",
        ),
        ({"data": {"seq_len": 512}}, r"data\.seq_len=512 is longer than model\.max_seq_len=256"),
        ({"lr_scheduler": {"warmup_steps": 15, "decay_steps": 10}}, r"do not fit into training\.steps=20"),
        (
            {"data": {"validation_fraction": 0.0}},
            r"validation\.enable is set, but .*=0 .*--validation\.no-enable",
        ),
        ({"model": {"top_k": 9}}, r"top_k=9 must be in \[1, num_experts=8\]; lower model\.top_k"),
        ({"model": {"num_groups": 3}}, r"num_groups=3 must divide num_experts=8"),
        ({"model": {"num_groups": 4, "top_k": 3}}, r"top_k=3 is more than the 2 experts"),
        ({"model": {"num_limited_groups": 2}}, r"num_limited_groups=2 must be at most num_groups=1"),
        ({"model": {"num_dense_layers": 3}}, r"one layer has experts; lower model\.num_dense_layers"),
        ({"model": {"rope_head_dim": 7}}, r"rope_head_dim=7 must be even"),
        ({"model": {"dim": 0}}, r"dim=0 must be at least 1; raise model\.dim"),
        ({"model": {"num_layers": 0}}, r"num_layers=0 must be at least 1; raise model\.num_layers"),
        ({"training": {"steps": 0}}, r"steps=0 must be at least 1"),
        ({"training": {"max_norm": 0.0}}, r"max_norm=0\.0 must be positive"),
        ({"training": {"seed": -1}}, r"seed=-1 must be at least 0"),
        ({"training": {"global_batch_size": 0}}, r"global_batch_size=0 must be at least 1"),
        ({"optimizer": {"lr": float("nan")}}, r"lr=nan must be a positive number"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, r"betas=\(0\.9, 1\.0\) must each be in \[0, 1\)"),
        ({"optimizer": {"eps": 0.0}}, r"eps=0\.0 must be positive"),
        ({"optimizer": {"weight_decay": -1.0}}, r"weight_decay=-1\.0 must be at least 0"),
        ({"lr_scheduler": {"min_factor": 2.0}}, r"min_factor=2\.0 must be in \[0, 1\]"),
        ({"lr_scheduler": {"warmup_steps": -1}}, r"warmup_steps=-1 must be at least 0"),
        (
            {"compile": {"enable": True, "backend": "indutor"}},
            r"backend='indutor' must be one of .*'inductor'",
        ),
        ({"metrics": {"log_interval": 0}}, r"log_interval=0 must be at least 1"),
        ({"validation": {"interval": 0}}, r"interval=0 must be at least 1; .*validation\.enable"),
    ],
)
def test_contradictions_are_refused_when_the_config_is_built(changes, said):
    with pytest.raises(ValueError, match=said):
        sections(**changes)


@pytest.mark.parametrize(
    ("balancing", "said"),
    [
        (
            Balancing(objectives=(BatchWise.Config(coef=1.0),)),
            r"model\.balancing: BatchWise .*GlobalBatch.* num_microbatches=2 is training\.global_batch_size=8 / "
            r"\(data ranks=1 \* data\.microbatch_size=4\)",
        ),
        (
            Balancing(objectives=(GlobalBatch.Config(coef=1.0, counts="exact"),)),
            r"model\.balancing: counts='exact' cannot be had",
        ),
    ],
)
def test_balancing_that_the_step_cannot_have_is_refused(balancing, said):
    config = deepseek_v3_tiny()
    config = replace(
        config,
        model=replace(config.model, balancing=balancing),
        training=replace(config.training, global_batch_size=8),
    )
    assert config.for_world(2).num_microbatches == 1
    with pytest.raises(ValueError, match=said):
        config.for_world(1)


def test_balancing_that_the_router_cannot_have_is_refused_when_the_config_is_built():
    config = deepseek_v3_tiny()
    objective = CommunicationLevel.Config(coef=1.0, num_devices=3, max_devices_per_token=2)
    with pytest.raises(ValueError, match=r"num_devices=3 must divide num_experts=8"):
        replace(config, model=replace(config.model, balancing=Balancing(objectives=(objective,))))


def test_a_rule_that_the_router_cannot_serve_is_refused():
    config = deepseek_v3_tiny()
    model = replace(
        config.model, num_groups=4, num_limited_groups=2, balancing=Balancing(bias=Quantile.Config())
    )
    with pytest.raises(ValueError, match=r"model\.balancing: the quantile rule .*limits groups"):
        replace(config, model=model)
    with pytest.raises(ValueError, match="needs routers with an expert bias"):
        Balancing(bias=Sign.Config(speed=1.0)).check(8, 2, grouped=False, has_bias=False, num_microbatches=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "balances nothing"),
        ({"objectives": (SequenceWise.Config(coef=1.0),) * 2}, "given twice"),
        ({"objectives": (SequenceWise.Config(coef=1.0),), "bias_decay": 0.5}, "needs a rule"),
        ({"bias": Sign.Config(speed=1.0), "bias_decay": 0.0}, "share of the run"),
        (
            {"bias": Sign.Config(speed=1.0, schedule=((0, 1.0), (9, 0.0))), "bias_decay": 0.5},
            "both set the speed",
        ),
        ({"bias": Sign.Config(speed=1.0), "order": "backwards"}, "order='backwards'"),
    ],
)
def test_balancing_is_validated_when_built(arguments, said):
    with pytest.raises(ValueError, match=said):
        Balancing(**arguments)


@pytest.mark.parametrize("name", ["a/b", "..", ""])
def test_a_run_name_is_one_folder(tmp_path, name):
    with pytest.raises(ValueError, match="run_name="):
        tiny(tmp_path, run_name=name)


def test_the_learning_rate_rises_stays_and_falls():
    schedule = LRSchedulerConfig(warmup_steps=2, decay_steps=4, min_factor=0.1)
    factors = [schedule.factor(step, 10) for step in range(1, 11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.82, 0.64, 0.46, 0.28])
    assert LRSchedulerConfig().phases(100) == (5, 20)
    assert LRSchedulerConfig(decay_steps=100).phases(100) == (0, 100)
    assert LRSchedulerConfig().phases(1) == (0, 0)
    assert LRSchedulerConfig(warmup_steps=0, decay_steps=0).factor(1, 1) == 1


def test_vectors_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    decayed, plain = OptimizerConfig(weight_decay=0.5).build(model.parameters()).param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert [p.dim() for p in plain["params"]] == [1, 1, 1]


def test_differences_name_what_changes_a_run():
    saved = to_dict(deepseek_v3_tiny())
    config = sections(
        optimizer={"lr": 1.0},
        metrics={"log_interval": 7},
        validation={"interval": 3},
        data={"max_validation_microbatches": 2},
        parallelism={"tensor_parallel_degree": 2},
    )
    assert differences(saved, to_dict(config)) == ["optimizer.lr (saved 0.01, now 1.0)"]
    assert differences(saved, to_dict(deepseek_v3_tiny())) == []
    assert json.loads(json.dumps(saved)) == saved
    assert flatten(saved)["model.balancing.bias.kind"] == "Sign"


def test_json_has_no_infinity():
    assert finite({"a": [1.0, float("nan")], "b": (float("-inf"), "x", 3)}) == {
        "a": [1.0, None],
        "b": [None, "x", 3],
    }


@pytest.mark.parametrize(
    ("log_rank", "rank", "quiet"), [(None, None, False), ("1", "0", True), ("0,1", "1", False)]
)
def test_log_rank_chooses_who_prints(monkeypatch, log_rank, rank, quiet):
    for name, value in (("LOG_RANK", log_rank), ("RANK", rank)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert is_quiet() is quiet


def test_log_rank_must_be_ranks(monkeypatch):
    monkeypatch.setenv("LOG_RANK", "all")
    with pytest.raises(ValueError, match="LOG_RANK='all' must be ranks"):
        is_quiet()


def test_the_line_of_a_step():
    balance = {"maxvio": [0.25, 0.37], "losses": {"sequence_wise": {"value": [1.0, 1.1]}}}
    record = {"step": 10, "loss": 5.1234, "grad_norm": 1.02, "tokens_per_second": 12345.6, "lr": 1e-3}
    assert step_line(record | {"balance": balance}) == (
        "step: 10  loss: 5.1234  grad_norm: 1.02  tps: 12,346  maxvio: 0.31  sequence_wise: 1.050  lr: 1.00e-03"
    )


def layers_record(num_layers, *, measured=True):
    """A step record of layers 1, 2, ... whose largest load and loss grow with the layer."""
    layers = range(1, num_layers + 1)
    loads = [[2 - (1 + layer / 100), 1.0, 1 + layer / 100] for layer in layers]
    losses = {"sequence_wise": {"value": [1 + layer / 1000 for layer in layers]}} if measured else {}
    names = [f"model.layers.{layer}.mlp.gate" for layer in layers]
    return {"balance": {"layers": names, "load": loads, "losses": losses}}


def test_the_line_of_a_few_layers_shows_each():
    assert layers_line(layers_record(2)) == (
        "layers (load, sequence_wise): 1 0.99-1.01 1.001 | 2 0.98-1.02 1.002"
    )
    assert layers_line(layers_record(2, measured=False)) == "layers (load): 1 0.99-1.01 | 2 0.98-1.02"
    assert layers_line(layers_record(12)).count("|") == 11


def test_the_line_of_many_layers_is_a_range_and_the_worst():
    record = layers_record(60)
    record["balance"]["load"][6][2] = 2.5
    assert layers_line(record) == (
        "layers (load, sequence_wise): 1-60 0.40-2.50 1.001-1.060 | highest load: "
        "7 0.93-2.50 1.007 | 59 0.41-1.59 1.059 | 60 0.40-1.60 1.060"
    )


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["model.layers.3.mlp.gate", "model.layers.10.mlp.gate"], ["3", "10"]),
        (["encoder.0.gate", "decoder.0.gate"], ["0", "1"]),
        (["gate"], ["0"]),
    ],
)
def test_layers_are_numbered_as_in_the_model(names, numbers):
    assert layer_numbers(names) == numbers


def test_several_printing_ranks_say_which_they_are(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    RunConsole().print("alone")
    monkeypatch.setenv("LOG_RANK", "2,0")
    RunConsole().print("one [of] two")
    assert capsys.readouterr().out == "alone\n[2] one [of] two\n"


def test_tensorboard_gets_what_is_known():
    balance = {
        "maxvio": [0.5, 1.0],
        "maxvio_running": [0.5, 1.0],
        "load_entropy": [1.0, 0.9],
        "dead_experts": [0, 1],
        "logit_max": None,
        "router_entropy": None,
        "count_error": [None, 0.25],
        "bias_min": None,
        "bias_max": None,
        "losses": {"z": {"value": [1.0, 3.0]}},
    }
    record = {"event": "step", "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0}
    found = dict(scalars(record | {"balance": balance}))
    assert (found["maxvio/layer1"], found["balance/z"], found["count_error/layer1"]) == (1.0, 2.0, 0.25)
    assert not {"count_error/layer0", "logit_max/layer0"} & found.keys()


def test_bfloat16_is_refused_where_the_gpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    with pytest.raises(
        ValueError, match=r"not supported by an old GPU; set training\.mixed_precision to none"
    ):
        check_precision("bfloat16", torch.device("cuda"))
    check_precision("bfloat16", torch.device("cpu"))


def test_the_debug_models_fit_every_pipeline_of_four_stages():
    for module in module_names():
        for name in config_functions(load_module(module)):
            if "debugmodel" in name:
                config = load_config(module, name)
                assert config.model.num_layers >= 4
                assert config.training.global_batch_size == 16
                for world_size in (1, 2, 4):
                    config.for_world(world_size)


def test_models_without_layers_or_checkpointing_are_named():
    with pytest.raises(ValueError, match="Linear has no list of decoder layers"):
        decoder_layers(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Linear has no checkpointing"):
        ActivationCheckpointConfig(mode="full").apply(torch.nn.Linear(1, 1))
    CompileConfig(enable=False, backend="anything")


def test_defaults_build():
    assert TrainingConfig(steps=1).global_batch_size is None
    assert MetricsConfig().log_interval == 10
    assert ValidationConfig().enable
