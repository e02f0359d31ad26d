"""Configurations of seconds for the trainer's tests."""

from dataclasses import replace

from trimtab.models.deepseek_v3 import deepseek_v3_tiny
from trimtab.train.model import Balancing
from trimtab.train.trainer import Trainer


def tiny(tmp_path, *, balancing=None, **sections):
    """`deepseek_v3_tiny` in tmp_path, quick; sections are dictionaries of fields that differ."""
    config = deepseek_v3_tiny()
    quick = {
        "training": {"steps": 6},
        "metrics": {"log_interval": 2, "tensorboard": False, "report": False},
        "checkpoint": {"interval": 3},
        "validation": {"enable": False},
    }
    for section, changes in sections.items():
        if isinstance(changes, dict):
            quick[section] = quick.get(section, {}) | changes
    changed = {section: replace(getattr(config, section), **changes) for section, changes in quick.items()}
    changed |= {name: value for name, value in sections.items() if not isinstance(value, dict)}
    if balancing is not None:
        assert isinstance(balancing, Balancing)
        changed["model"] = replace(changed.get("model", config.model), balancing=balancing)
    return replace(config, dump_folder=str(tmp_path / "runs"), **changed)


def build(config):
    return Trainer(config, name="deepseek_v3/deepseek_v3_tiny", quiet=True)
