"""Finds configurations by name: functions that return a `TrainConfig`, in modules under `trimtab.models`.

Adding a family is adding a module; nothing is registered anywhere. A module name with a dot is imported as it
is, so that families can live in other packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from types import ModuleType
from typing import TYPE_CHECKING

import trimtab.models

if TYPE_CHECKING:
    from trimtab.train.config import TrainConfig

DEFAULT_MODULE, DEFAULT_CONFIG = "deepseek_v3", "deepseek_v3_debugmodel"


def module_names() -> list[str]:
    """Modules of the package `trimtab.models`."""
    return sorted(info.name for info in pkgutil.iter_modules(trimtab.models.__path__))


def load_module(name: str) -> ModuleType:
    """Import a family's module.

    Args:
        name: a module of `trimtab.models`, or the dotted path of any other.

    Raises:
        ValueError: there is no such module.
    """
    path = name if "." in name else f"{trimtab.models.__name__}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A module that exists but lacks a dependency says so itself.
        if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
            raise
    raise ValueError(_unknown("module", name, module_names(), "trimtab configs lists all"))


def config_functions(module: ModuleType) -> dict[str, Callable[[], TrainConfig]]:
    """The public functions of a module that return a configuration, by name."""
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
        and _return_name(function) == "TrainConfig"
    }


def load_config(module_name: str, config_name: str) -> TrainConfig:
    """Call a configuration function by name.

    Raises:
        ValueError: there is no such module or function.
    """
    functions = config_functions(load_module(module_name))
    if config_name not in functions:
        where = f"of module {module_name!r}"
        raise ValueError(_unknown("config", config_name, sorted(functions), where))
    return functions[config_name]()


def summary(thing: object) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _return_name(function: Callable[..., object]) -> str:
    annotation = function.__annotations__.get("return", "")
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def _unknown(kind: str, name: str, known: list[str], remark: str) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"unknown {kind} {name!r}: {hint}Choose from {', '.join(known)} ({remark})"
