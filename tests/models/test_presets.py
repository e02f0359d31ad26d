"""Published balancing: the numbers of each report, where they stand, and that nothing overrides them unseen."""

import inspect
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.models.test_families import FAMILIES
from trimtab.bias import CentredSign, Quantile, Sign
from trimtab.device_losses import CommunicationLevel, DeviceLevel
from trimtab.losses import BatchWise, GlobalBatch, SequenceWise, ZLoss
from trimtab.models.deepseek_v2 import (
    deepseek_v2_balancing,
    deepseek_v2_debugmodel,
    deepseek_v2_lite_balancing,
)
from trimtab.models.deepseek_v3 import deepseek_v3_671b, deepseek_v3_balancing
from trimtab.models.glm4_moe import glm4_5_355b, glm4_5_air_106b, glm4_moe_balancing, glm4_moe_debugmodel
from trimtab.models.gpt_oss import gpt_oss_balancing
from trimtab.models.kimi_k2 import kimi_k2_balancing, moonlight_16b, moonlight_balancing
from trimtab.models.llama4 import llama4_balancing, llama4_debugmodel
from trimtab.models.mixtral import mixtral_balancing, mixtral_debugmodel
from trimtab.models.olmoe import olmoe_1b_7b, olmoe_balancing, olmoe_debugmodel
from trimtab.models.qwen3 import qwen3_balancing, qwen3_debugmodel
from trimtab.train.cli import main
from trimtab.train.model import Balancing
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.registry import config_functions, load_config, load_module

DOCS = Path(__file__).parents[2] / "docs"
FROZEN = ((0, 1.0),)

# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("preset", "objectives", "bias"),
    [
        (
            deepseek_v3_balancing(),
            (SequenceWise.Config(coef=1e-4, assignments="unbiased"),),
            Sign.Config(speed=1e-3, schedule=FROZEN),
        ),
        (
            deepseek_v2_balancing(),
            (
                SequenceWise.Config(coef=0.003, assignments="executed"),
                DeviceLevel.Config(coef=0.05, num_devices=8),
                CommunicationLevel.Config(coef=0.02, num_devices=8, max_devices_per_token=3),
            ),
            None,
        ),
        (deepseek_v2_lite_balancing(), (SequenceWise.Config(coef=0.001),), None),
        (moonlight_balancing(), (), CentredSign.Config(speed=1e-3, schedule=FROZEN)),
        (kimi_k2_balancing(), (), CentredSign.Config(speed=1e-3, schedule=FROZEN)),
        (
            glm4_moe_balancing(),
            (SequenceWise.Config(coef=1e-4, assignments="unbiased"),),
            Sign.Config(speed=1e-3, schedule=FROZEN),
        ),
        (qwen3_balancing(), (GlobalBatch.Config(coef=8e-3),), None),
        (llama4_balancing(), (GlobalBatch.Config(coef=8e-3),), None),
        (gpt_oss_balancing(), (GlobalBatch.Config(coef=8e-3),), None),
        (mixtral_balancing(), (BatchWise.Config(coef=1e-2),), None),
        (
            olmoe_balancing(num_layers=16),
            (
                BatchWise.Config(coef=0.01 / 16, local=True, average_microbatches=True),
                ZLoss.Config(coef=0.001 / 16),
            ),
            None,
        ),
    ],
)
def test_presets_have_the_numbers_of_the_reports(preset, objectives, bias):
    assert preset == Balancing(objectives=objectives, bias=bias)


@pytest.mark.parametrize(
    ("config", "trillions", "of"),
    [
        (deepseek_v3_671b, 14.3, 14.8),
        (glm4_5_355b, 15.0, 22.0),
        (glm4_5_air_106b, 15.0, 22.0),
        (moonlight_16b, 5.2, 5.7),
    ],
)
def test_biases_stop_after_the_reported_number_of_tokens(config, trillions, of):
    config = config()
    bias = config.model.balancing.bias
    step_tokens = config.training.global_batch_size * config.data.seq_len
    stops = next(step for step in range(config.training.steps) if bias.build().speed(step) < bias.speed)
    assert stops * step_tokens == pytest.approx(trillions * 1e12, rel=1e-4)
    assert bias.build().speed(stops) == 0 == bias.build().speed(config.training.steps)
    assert config.training.steps * step_tokens == pytest.approx(of * 1e12, rel=1e-4)


def test_released_weights_keep_their_biases():
    for family, name in (
        ("deepseek_v3", "deepseek_v3_671b_released"),
        ("kimi_k2", "kimi_k2_1t_released"),
        ("glm4_moe", "glm4_5_355b_released"),
        ("glm4_moe", "glm4_5_air_106b_released"),
    ):
        bias = load_config(family, name).model.balancing.bias.build()
        assert bias.speed(0) == bias.speed(10_000) == 0


def test_olmoe_divides_the_reports_weights_by_its_own_layers():
    first, z = olmoe_debugmodel().model.balancing.objectives
    assert olmoe_debugmodel().model.num_layers == 4
    assert (first.coef, z.coef) == (4e-2 / 4, 1e-3 / 4)
    assert olmoe_1b_7b().model.balancing == olmoe_balancing(num_layers=olmoe_1b_7b().model.num_layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_config_is_balanced_as_a_preset_of_its_family(family):
    """Debug models may have other numbers; nothing may have other parts."""
    generator = runpy.run_path(str(DOCS / "generate_presets.py"))
    module = load_module(family)
    kinds = {frozenset(generator["parts"](p.balancing)) for p in generator["presets_of"](module)}
    assert kinds
    for name in config_functions(module):
        if name.startswith(("deepseek_v3_debugmodel_", "deepseek_v3_tiny")):
            continue  # named after another loss
        assert frozenset(generator["parts"](load_config(family, name).model.balancing)) in kinds


# ---------------------------------------------------------------- where they stand


def test_the_page_is_current():
    generator = runpy.run_path(str(DOCS / "generate_presets.py"))
    assert generator["PAGE"].read_text() == generator["page"](), "run: python docs/generate_presets.py"


def test_every_part_of_a_preset_is_reported_or_explained():
    generator = runpy.run_path(str(DOCS / "generate_presets.py"))
    presets = generator["presets"]()
    assert {preset.module for preset in presets} >= set(FAMILIES)
    for preset in presets:
        source, chosen = preset.fields["Source"], preset.fields["Chosen"]
        assert re.search(r"arXiv:\d{4}\.\d{5}|https://|none was found", source), preset.name
        for part in generator["parts"](preset.balancing):
            origin = generator["origin"](preset, part)
            if origin == "reported":
                assert re.search(r"section|appendix|table", source), f"{preset.name}: where in the report?"
            else:
                assert re.search(r"arXiv:\d{4}\.\d{5}", chosen), f"{preset.name}: where is {part} from?"
                assert "coefficient" in chosen or part in chosen


def test_who_used_what():
    """Point by point: what the reports say, written by hand."""
    generator = runpy.run_path(str(DOCS / "generate_presets.py"))
    said = {
        preset.name: {
            part: generator["origin"](preset, part) for part in generator["parts"](preset.balancing)
        }
        for preset in generator["presets"]()
    }
    assert {name: parts for name, parts in said.items() if not name.startswith(("qwen3_vl", "qwen3_5"))} == {
        "deepseek_v2_balancing": {
            "sequence-wise loss": "reported",
            "device-level loss": "reported",
            "communication-level loss": "reported",
        },
        "deepseek_v2_lite_balancing": {"sequence-wise loss": "reported"},
        "deepseek_v3_balancing": {"sequence-wise loss": "reported", "bias rule": "reported"},
        "glm4_moe_balancing": {"sequence-wise loss": "reported", "bias rule": "reported"},
        "gpt_oss_balancing": {"global-batch loss": "chosen"},
        "kimi_k2_balancing": {"bias rule": "chosen"},
        "llama4_balancing": {"global-batch loss": "chosen"},
        "mixtral_balancing": {"batch-wise loss": "chosen"},
        "moonlight_balancing": {"bias rule": "reported"},
        "olmoe_balancing": {"batch-wise loss": "reported", "z-loss": "reported"},
        "qwen3_balancing": {"global-batch loss": "named"},
    }


# ---------------------------------------------------------------- checked with the model, and no flag


@pytest.mark.parametrize(
    ("config", "balancing", "said"),
    [
        (mixtral_debugmodel, glm4_moe_balancing(), "bias=Sign.Config needs routers with an expert bias"),
        (llama4_debugmodel, kimi_k2_balancing(), "bias=CentredSign.Config needs routers with an expert bias"),
        (qwen3_debugmodel, deepseek_v2_balancing(num_devices=5), "num_devices=5 must divide num_experts=16"),
        (qwen3_debugmodel, Balancing(objectives=(GlobalBatch.Config(coef=1.0, counts="exact"),)), None),
        (glm4_moe_debugmodel, Balancing(bias=Quantile.Config()), None),
        (deepseek_v2_debugmodel, Balancing(bias=Quantile.Config()), "routers with an expert bias"),
    ],
)
def test_balancing_is_checked_where_the_model_is_configured(config, balancing, said):
    model = replace(config().model, balancing=balancing)
    if said is None:
        assert replace(config(), model=model).model.balancing == balancing
        return
    with pytest.raises(ValueError, match=rf"model\.balancing: .*{said}"):
        replace(config(), model=model)


def test_groups_refuse_the_quantile_rule():
    model = replace(
        glm4_moe_debugmodel().model,
        num_groups=4,
        num_limited_groups=2,
        balancing=Balancing(bias=Quantile.Config()),
    )
    with pytest.raises(ValueError, match=r"model\.balancing: the quantile rule .* this router limits groups"):
        replace(glm4_moe_debugmodel(), model=model)


def test_balancing_is_checked_against_the_parallel_plan():
    exact = Balancing(objectives=(GlobalBatch.Config(coef=1e-2, counts="exact"),))
    config = qwen3_debugmodel()
    config = replace(config, model=replace(config.model, balancing=exact))
    pipeline = ParallelismConfig(pipeline_parallel_degree=2, pipeline_parallel_schedule="GPipe")
    assert replace(config, parallelism=pipeline).for_world(2).order == "forward_first"
    for refused in (
        ParallelismConfig(),
        replace(pipeline, pipeline_parallel_schedule="1F1B"),
    ):
        with pytest.raises(ValueError, match=r"model\.balancing: counts='exact' cannot be had"):
            replace(config, parallelism=refused).for_world(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_balancing_has_no_flag(family, capsys):
    named = ["train", "--module", family, "--config", f"{family}_debugmodel"]
    with pytest.raises(SystemExit) as ended:
        main([*named, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--model.num-experts" in shown
    assert "balancing." not in shown
    assert "--model.balancing" not in shown
    # Every size says what it is.
    assert not re.findall(r"│ (--\S+) \S+ +│\n│ +\(default", shown)
    assert main([*named, "--model.balancing.bias.speed", "1"]) == 2
    assert "in Python and has no flag" in capsys.readouterr().err


# ---------------------------------------------------------------- a family from elsewhere


def test_a_family_outside_the_package_trains_and_changes_nothing_in_it(tmp_path, monkeypatch, capsys):
    """The module of docs/new-family.md, word by word, in a package of its own."""
    page = (DOCS / "new-family.md").read_text()
    module = re.search(r"## A whole one\n\n```python\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "dots1.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    argv = ["--module", "mine.dots1", "--config", "dots1_tiny"]
    quick = ["--validation.no-enable", "--data.validation-fraction", "0", "--metrics.no-tensorboard"]
    assert main(["train", *argv, *quick, "--training.steps", "2", "--model.num-kv-heads", "1"]) == 0
    assert "finished at step 2" in capsys.readouterr().out
    assert main(["plan", *argv, "--world-size", "2", "--parallelism.tensor-parallel-degree", "2"]) == 0
    assert inspect.getfile(sys.modules["mine.dots1"]).startswith(str(tmp_path))
    assert "mine.dots1" not in before
    for name in ("mine", "mine.dots1"):
        sys.modules.pop(name, None)
