"""Writes presets.md from the presets of the trainer's families: `python docs/generate_presets.py`."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from trimtab.bias import CentredSign, Momentum, Proportional, Quantile, Sign
from trimtab.device_losses import CommunicationLevel, DeviceLevel
from trimtab.losses import BatchWise, GlobalBatch, ImportanceCV, SequenceWise, ZLoss
from trimtab.train.config import TrainConfig
from trimtab.train.model import Balancing
from trimtab.train.registry import config_functions, load_module, module_names

PAGE = Path(__file__).with_name("presets.md")

HEAD = """# Published balancing

<!-- Written by docs/generate_presets.py from the presets in trimtab/models. Do not edit. -->

Each model family has a preset, a function `NAME_balancing()` in its module, with the balancing that its technical
report used. Where the report is silent the preset says so, and where its numbers come from instead. Coefficients in
released configurations are no evidence: DeepSeek-V3's says 0.001 and its report 0.0001, gpt-oss's says 0.9, and
transformers fills in 0.001 where nobody gave anything.

A preset is a `Balancing`, part of a model's configuration and written in Python; there is no flag for it. It is
checked with the model when a config is made, and with the number of processes, the pipeline and the accumulation
of the run before a process starts. Debug models use their family's preset, often with larger numbers, because
they train for a hundred steps.

## Who used what

*Reported* stands in the family's report with its number. *Named* is a loss that the report names without a
coefficient. *Chosen* is not in the report at all. Losses are summed over layers, and a balance loss is its
coefficient where load is even ([The step's objective](mathematics.md#the-steps-objective)). OLMoE's report averages
over layers: its 0.01 and 0.001 are divided by 16 here.

"""

FULL_HEAD = """
## In the configs of full size

Reports write schedules in tokens; configs have optimiser steps, which are tokens divided by those of a step.
Configs that end in `_released` go on from released weights with biases as they are, and are left out.

"""

SOURCES_HEAD = """
## Sources

"""

# How tables call an objective or a rule, and docstrings the same.
PARTS = {
    SequenceWise.Config: "sequence-wise loss",
    BatchWise.Config: "batch-wise loss",
    GlobalBatch.Config: "global-batch loss",
    DeviceLevel.Config: "device-level loss",
    CommunicationLevel.Config: "communication-level loss",
    ImportanceCV.Config: "importance loss",
    ZLoss.Config: "z-loss",
}
RULES = {
    Sign.Config: "sign",
    CentredSign.Config: "centred sign",
    Proportional.Config: "proportional",
    Momentum.Config: "momentum",
    Quantile.Config: "quantile",
}
FIELDS = ("Reported", "Chosen", "Source")


class Preset(NamedTuple):
    """One preset: its module, its name, what it returns, and the fields of its docstring."""

    module: str
    name: str
    balancing: Balancing
    summary: str
    fields: dict[str, str]


def fields_of(function: Callable[..., object]) -> dict[str, str]:
    """The paragraphs of a docstring that begin with a field's name."""
    doc = inspect.getdoc(function) or ""
    found = {}
    for name in FIELDS:
        match = re.search(rf"^{name}: (.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
        if match is None:
            raise ValueError(
                f"{function.__module__}.{function.__name__} has no {name}: in its docstring; docs/new-family.md "
                "says what belongs there"
            )
        found[name] = " ".join(match[1].split())
    return found


def full_configs(module: ModuleType) -> dict[str, TrainConfig]:
    """The configs of full size of a module that pretrain."""
    return {
        name: function()
        for name, function in config_functions(module).items()
        if not name.endswith(("_released", "_tiny")) and "debugmodel" not in name
    }


def called(module: ModuleType, preset: Callable[..., Balancing]) -> Balancing:
    """What a preset returns for the first model of full size of its module."""
    known = {"num_layers": next(iter(full_configs(module).values())).model.num_layers}
    parameters = inspect.signature(preset).parameters.values()
    return preset(**{p.name: known[p.name] for p in parameters if p.default is p.empty})


def presets_of(module: ModuleType) -> Iterator[Preset]:
    """The presets of a family."""
    for name, function in vars(module).items():
        own = inspect.isfunction(function) and function.__module__ == module.__name__
        if own and name.endswith("_balancing") and not name.startswith("_"):
            summary = (inspect.getdoc(function) or "").partition("\n")[0]
            yield Preset(
                module.__name__.rpartition(".")[2],
                name,
                called(module, function),
                summary,
                fields_of(function),
            )


def presets() -> list[Preset]:
    """Those of all families."""
    return [preset for name in module_names() for preset in presets_of(load_module(name))]


def parts(balancing: Balancing) -> dict[str, str]:
    """What a preset has, by the words for it, with its number."""
    found = {}
    for objective in balancing.objectives:
        words = [f"{objective.coef:g}"]
        if getattr(objective, "assignments", "executed") == "unbiased":
            words.append("on unbiased scores")
        if getattr(objective, "local", False):
            words.append("of each data rank's microbatch")
        if isinstance(objective, CommunicationLevel.Config):
            words.append(f"{objective.num_devices} devices, {objective.max_devices_per_token} for a token")
        elif isinstance(objective, DeviceLevel.Config):
            words.append(f"{objective.num_devices} devices")
        found[PARTS[type(objective)]] = ", ".join(words)
    if balancing.bias is not None:
        found["bias rule"] = f"{RULES[type(balancing.bias)]} {balancing.bias.speed:g}"
    return found


def origin(preset: Preset, part: str) -> str:
    """Whether the report has a part of a preset."""
    reported = preset.fields["Reported"].lower()
    if part not in reported:
        return "chosen"
    return "named" if f"{part}, without its coefficient" in reported else "reported"


def cell(preset: Preset, *names: str) -> str:
    """One cell of the first table."""
    found = parts(preset.balancing)
    return "<br>".join(f"*{origin(preset, part)}* {found[part]}" for part in names if part in found)


def schedule(config: TrainConfig) -> str:
    """When the speed of biases changes in a run, in tokens."""
    bias = config.model.balancing.bias
    if bias is None or len(bias.schedule) == 1:
        return ""
    rows = config.training.global_batch_size or config.data.microbatch_size or 1
    step, factor = bias.schedule[-1]
    tokens = step * rows * config.data.seq_len / 1e12
    return f", {bias.speed * factor:g} from step {step:,} ({tokens:.1f} trillion tokens) on"


def page() -> str:
    """The whole page."""
    found = presets()
    lines = [
        "| Family | Preset | Sequence-wise | Batch-wise | Global-batch | Devices | Bias rule | z-loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for preset in found:
        cells = [
            f"`{preset.module}`",
            f"`{preset.name}`",
            cell(preset, "sequence-wise loss"),
            cell(preset, "batch-wise loss"),
            cell(preset, "global-batch loss"),
            cell(preset, "device-level loss", "communication-level loss"),
            cell(preset, "bias rule"),
            cell(preset, "z-loss"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    full = ["| Config | Losses | Bias rule |", "|---|---|---|"]
    for module in dict.fromkeys(preset.module for preset in found):
        for name, config in full_configs(load_module(module)).items():
            has = parts(config.model.balancing)
            rule = has.pop("bias rule", "")
            losses = "<br>".join(f"{part} {number}" for part, number in has.items())
            full.append(f"| `{name}` | {losses} | {rule}{schedule(config)} |")
    sources = []
    for preset in found:
        sources.append(f"### {preset.name}\n\n{preset.summary}\n")
        sources += [f"- **{name}**: {preset.fields[name]}" for name in FIELDS]
        sources.append("")
    table = "\n".join(lines) + "\n"
    return (
        HEAD + table + FULL_HEAD + "\n".join(full) + "\n" + SOURCES_HEAD + "\n".join(sources).rstrip() + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
