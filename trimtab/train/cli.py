"""The command line: ``trimtab train``, ``trimtab report``, ``trimtab configs``.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from trimtab.train.config import TrainConfig

_HELP = """\
usage: trimtab COMMAND ...

Train Mixture-of-Experts language models with balanced experts.

commands:
  train      train a model: trimtab train --module deepseek_v3 --config deepseek_v3_debugmodel
  configs    list the modules and their configs
  report     write the HTML report of a run again: trimtab report runs/NAME

trimtab COMMAND --help says more. The first thing to try, a few minutes on a CPU:

  trimtab train
"""

_TRAIN = """\
Train a model. A config is a Python function that returns all settings; flags override them.

  --module NAME   family of the model, see `trimtab configs` (default: deepseek_v3)
  --config NAME   config of that family (default: deepseek_v3_debugmodel)

Examples:
  trimtab train --training.steps 1000 --data.source my.jsonl code=src/
  trimtab train --run-name first          # started again, it continues
  trimtab train --checkpoint.resume runs/NAME
  trimtab train --config deepseek_v3_debugmodel_global_batch --training.mixed-precision bfloat16

How experts are balanced is part of the model's config, in Python, and has no flag.
The defaults below are those of {name}.\
"""

_COMMANDS = ("train", "configs", "report")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failed run, 2 for bad input, 128 + signal."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    command, rest = argv[0], argv[1:]
    if command == "--version":
        from trimtab import __version__

        print(f"trimtab {__version__}")
        return 0
    if command not in _COMMANDS:
        close = get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(_COMMANDS)}"
        return _fail(f"unknown command {command!r}; {hint} See trimtab --help")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            return {"train": _train, "configs": _configs, "report": _report}[command](rest)
        except ValueError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130


def parse_train(argv: list[str]) -> tuple[TrainConfig, str]:
    """Resolve the arguments of ``trimtab train`` to a configuration and its name, ``module/config``.

    Raises:
        ValueError: an unknown module, config or option, or settings that contradict each other.
        SystemExit: help was asked for, or a value cannot be read.
    """
    from trimtab.train.registry import DEFAULT_CONFIG, DEFAULT_MODULE, load_config

    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--module", default=DEFAULT_MODULE)
    chooser.add_argument("--config", default=DEFAULT_CONFIG)
    chosen, rest = chooser.parse_known_args(argv)
    default = load_config(chosen.module, chosen.config)

    import tyro

    name = f"{chosen.module}/{chosen.config}"
    config, unknown = tyro.cli(
        type(default),
        default=default,
        args=rest,
        prog="trimtab train",
        description=_TRAIN.format(name=name),
        return_unknown_args=True,
    )
    if unknown:
        raise ValueError(_unknown_options(unknown, default))
    return config, name


def _train(argv: list[str]) -> int:
    from trimtab.train.logging import is_quiet

    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        return _fail(
            f"WORLD_SIZE={world_size}, but this version trains in one process; start it without torchrun, or "
            "attach trimtab's balancer in a distributed trainer (trimtab.attach)"
        )
    quiet = is_quiet()
    config, name = parse_train(argv)
    from trimtab.train.trainer import Trainer, TrainingError

    trainer = Trainer(config, name=name, quiet=quiet)
    try:
        result = trainer.train()
    except (TrainingError, OSError) as error:  # a full disk is no bug either
        print(f"trimtab: the run stopped at step {trainer.step}: {error}", file=sys.stderr)
        return 1
    if not quiet:
        print(f"\n{result.status} at step {result.step}")
        print(f"run directory: {result.run_dir.resolve()}")
        if result.report is not None:
            print(f"report:        {result.report.resolve()}")
        if result.status == "interrupted" and config.checkpoint.enable:
            print(f"continue with: --checkpoint.resume {result.run_dir}")
    return 0 if result.signal is None else 128 + result.signal


def _configs(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="trimtab configs", description="List the model families and their configs."
    )
    parser.add_argument("module", nargs="*", help="only these modules; default: all of trimtab.models")
    chosen = parser.parse_args(argv)
    from trimtab.train.registry import config_functions, load_module, module_names, summary

    for name in chosen.module or module_names():
        module = load_module(name)
        functions = config_functions(module)
        if not functions:
            continue
        print(f"{name}: {summary(module)}")
        for config_name, function in functions.items():
            print(f"  {config_name}\n      {summary(function)}")
    return 0


def _report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="trimtab report",
        description="Write report.html from a run's metrics; the run may be unfinished, or still running.",
    )
    parser.add_argument("run_dir", type=Path, help="directory that `trimtab train` wrote, such as runs/NAME")
    chosen = parser.parse_args(argv)
    from trimtab.train.report import write_report

    print(write_report(chosen.run_dir))
    return 0


def _unknown_options(unknown: list[str], default: object) -> str:
    """One line for each option that does not exist, with the nearest that does."""
    from dataclasses import fields, is_dataclass

    def names(section: object, prefix: str) -> list[str]:
        found = []
        for field in fields(section):  # type: ignore[arg-type]
            if field.name == "balancing":
                continue
            value = getattr(section, field.name)
            inner = names(value, f"{prefix}{field.name}.") if is_dataclass(value) else []
            found += inner or [f"{prefix}{field.name}"]
        return found

    known = ["module", "config", *names(default, "")]
    by_last = {name.rpartition(".")[2]: name for name in known}
    lines = []
    for option in unknown:
        given = option.lstrip("-").partition("=")[0].replace("-", "_")
        if not option.startswith("--"):
            continue
        if given.startswith("model.balancing"):
            lines.append(f"{option}: balancing is part of the model's config in Python and has no flag")
            continue
        close = get_close_matches(given, known, n=1, cutoff=0.75)
        last = get_close_matches(given.rpartition(".")[2].removeprefix("no_"), by_last, n=1, cutoff=0.7)
        nearest = close[0] if close else by_last[last[0]] if last else None
        lines.append(
            f"unknown option {option}; "
            + (f"did you mean --{nearest}?" if nearest else "see trimtab train --help")
        )
    if not lines:
        lines = [f"unexpected argument {unknown[0]!r}; options are written --section.option value"]
    return "\n".join(lines)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"trimtab: {message}", file=sys.stderr)
    return 2


def run() -> NoReturn:
    """Entry point of ``python -m trimtab.train.cli``."""
    raise SystemExit(main())


if __name__ == "__main__":
    run()
