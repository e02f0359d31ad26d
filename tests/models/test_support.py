"""The support matrix in the documentation: it is complete, and says what is so.

All of it is checked against what configurations refuse; numbers are run again for some cells, in which every family
and every plan occurs. `python -m docs.generate_support` runs the rest.
"""

from dataclasses import replace
from typing import Any

import pytest

from docs.generate_support import PAGE, WARNINGS, is_wrong, page, read_page, told
from tests.models.parity import PLANS, Cell, Errors, Plan, configure, run_cell
from tests.models.sizes import SMALL, families, small_config
from tests.parallel.pool import Ranks
from trimtab.integrations.attention_layouts import decoder_of, heads_of
from trimtab.integrations.experts import layout_of
from trimtab.integrations.stages_examination import examine
from trimtab.parallel.mesh import Degrees
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.registry import config_functions, load_module

FAMILIES = families()
ORDER = [name for name in PLANS if name != "compile"]
# Each family under two plans, so that every plan is run for some family.
QUICK = [(family, ORDER[(2 * i + j) % len(ORDER)]) for i, family in enumerate(FAMILIES) for j in range(2)]
COMPILED = [("gpt_oss", "compile"), ("qwen3_vl", "compile")]


@pytest.fixture(scope="module")
def committed() -> dict[tuple[str, str], tuple[bool, str | None]]:
    return read_page(PAGE.read_text(encoding="utf-8"))


def test_every_family_and_plan_is_in_the_matrix(committed: dict[Any, Any]) -> None:
    assert committed.keys() == {(family, plan) for family in FAMILIES for plan in PLANS}, (
        "run: python -m docs.generate_support"
    )
    # Of the issue that asked for them.
    assert {
        "deepseek_v3",
        "llama4",
        "qwen3",
        "qwen3_vl",
        "qwen3_5",
        "gpt_oss",
        "mixtral",
        "olmoe",
        "glm4_moe",
        "deepseek_v2",
        "kimi_k2",
    } <= set(FAMILIES)
    assert {name for _, name in QUICK + COMPILED} == set(PLANS)


def test_every_cell_is_refused_or_accepted_as_the_page_says(committed: dict[Any, Any]) -> None:
    """In this process, from the configuration alone."""
    for (family, name), (runs, reason) in committed.items():
        config, cell = configure(family, PLANS[name])
        assert (config is not None, cell.refused or cell.whole_rows) == (runs, reason), (family, name)


@pytest.mark.parametrize(("family", "plan"), QUICK + COMPILED)
def test_a_cell_of_the_matrix(ranks: Ranks, family: str, plan: str, committed: dict[Any, Any]) -> None:
    before, ranks.filters = ranks.filters, WARNINGS
    try:
        cell = run_cell(ranks, family, PLANS[plan])
    finally:
        ranks.filters = before
    assert not is_wrong(cell), told(cell)
    assert committed[family, plan][0] == cell.passed


# ------------------------------------------------------------------ nothing is refused later


DIVISIONS = [
    Degrees(tp=tp, cp=cp, dp_shard=ep, ep=ep, etp=etp)
    for tp in (1, 2, 3, 4, 5, 8, 16, 20, 64)
    for cp in (1, 2)
    for ep in (1, 2, 3, 5, 8)
    for etp in {1, tp}
]


def accepts(model: HFModelConfig, degrees: Degrees) -> bool:
    try:
        model.check_parallel(degrees)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_configuration_accepts_can_be_divided(family: str) -> None:
    """The checks that need the model itself find nothing that its configuration has not said, at any size."""
    for name, make in config_functions(load_module(family)).items():
        config: Any = make().model
        # Layers with experts and without, with each kind of attention.
        config = replace(config, num_layers=max(4, 1 + getattr(config, "num_dense_layers", 0)))
        model = config.build(vocab_size=config.vocab_size or 64, seq_len=64)
        examine(model)
        decoder = decoder_of(model)
        experts = [module for module in model.modules() if layout_of(module) is not None]
        accepted = [degrees for degrees in DIVISIONS if accepts(config, degrees)]
        for cp, tp in {(degrees.cp, degrees.tp) for degrees in accepted} - {(1, 1)}:
            heads_of(decoder, cp=cp, tp=tp)
        for degrees in accepted:
            assert all(module.num_experts % degrees.ep == 0 for module in experts), name
            assert config.expert_hidden_dim % degrees.etp == 0, name
        assert Degrees(dp_shard=2, ep=2) in accepted, name
        assert experts, name


def test_refusals_name_the_option_and_what_to_do() -> None:
    for name in ("tp", "cp"):
        config, cell = configure("qwen3_vl", PLANS[name])
        assert config is None
        assert cell.refused is not None
        assert cell.refused.startswith(("parallelism.tensor", "parallelism.context"))
        assert cell.refused.endswith("; set it to 1")


# ------------------------------------------------------------------ the machinery


def test_a_failed_cell_is_no_refusal(ranks: Ranks) -> None:
    plan = Plan(title="too short", degrees=Degrees(dp_shard=2))
    cell = run_cell(ranks, "mixtral", plan, timeout=1e-3)
    assert is_wrong(cell)
    assert "did not finish in 0.001 s" in str(cell.failure)
    assert told(cell).startswith("FAILED")


def test_a_page_says_what_was_found() -> None:
    errors = Errors(1e-13, 0.0, {"weight": 2.5e-12})
    cells = {(family, plan): Cell(errors=errors) for family in FAMILIES for plan in PLANS}
    cells["olmoe", "tp"] = cells["olmoe", "etp"] = Cell(refused="norms: of all heads; set it to 1")
    cells["qwen3_5", "compile"] = Cell(errors=errors, whole_rows="shapes change", tolerance=4e-4)
    text = page(cells)
    said = read_page(text)
    assert (
        said.pop(("olmoe", "tp")) == said.pop(("olmoe", "etp")) == (False, "norms: of all heads; set it to 1")
    )
    assert said.pop(("qwen3_5", "compile")) == (True, "shapes change")
    assert set(said.values()) == {(True, None)}
    assert len(said) == len(cells) - 3
    assert '1. `olmoe` under TP, ETP: "norms: of all heads; set it to 1"\n2. `qwen3_5` under compile' in text
    assert "the stock model of `qwen3_5` is 2e-04 from itself" in text
    assert "✓ 2e-12 |" in text
    assert "✓ 2e-12 [2](#refused) |" in text


def test_a_mark_must_be_one_that_is_known() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "✓" in page
    for wrong in ("fails", "✓", "–", ""):
        start = page.index("| ✓")
        end = page.index(" |", start + 2)
        with pytest.raises(ValueError, match="`deepseek_v2` under one process is"):
            read_page(f"{page[:start]}| {wrong}{page[end:]}")


def test_sizes_are_those_of_families() -> None:
    """A size that no family has is a word that was misspelt."""
    known = {name for family in FAMILIES for name in type(small_config(family).model).__dataclass_fields__}
    assert set(SMALL) <= known
