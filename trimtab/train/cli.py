"""The command line: ``trimtab train``, ``plan``, ``configs``, ``report`` and ``export``.

Nothing heavy is imported before a command needs it. `trimtab train` with several processes checks everything in
this one, starts them, and each of them runs the same command as torchrun would.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from trimtab.train.config import TrainConfig
    from trimtab.train.launch import LaunchConfig

_HELP = """\
usage: trimtab COMMAND ...

Train Mixture-of-Experts language models with balanced experts.

commands:
  train      train a model: trimtab train --module deepseek_v3 --config deepseek_v3_debugmodel
  plan       check a run on any number of ranks without them, and print what it would be
  configs    list the modules and their configs
  report     write the HTML report of a run again: trimtab report runs/NAME
  export     write a checkpoint for transformers: trimtab export runs/NAME DIRECTORY

trimtab COMMAND --help says more. The first thing to try, a few minutes on a CPU:

  trimtab train
"""

_TRAIN = """\
Train a model. A config is a Python function that returns all settings; flags override them.

  --module NAME   family of the model, see `trimtab configs` (default: deepseek_v3)
  --config NAME   config of that family (default: deepseek_v3_debugmodel)

Processes:
  --nproc N         processes on this machine (default: 1); parallelism.* says how they divide the work
  --nnodes N        machines (default: 1); each runs the same command with its own --node-rank
  --node-rank I     number of this machine, from 0
  --master-addr A   name or address of machine 0
  --master-port P   free port of machine 0 (default: 29500)
The variable LOG_RANK names the ranks that print, as in 0,1 (default: 0). Started by torchrun, the command takes
its processes from there instead.

Examples:
  trimtab train --training.steps 1000 --data.source my.jsonl code=src/
  trimtab train --run-name first          # started again, it continues
  trimtab train --checkpoint.resume runs/NAME
  trimtab train --config deepseek_v3_debugmodel_global_batch --training.mixed-precision bfloat16
  trimtab train --nproc 4 --parallelism.pipeline-parallel-degree 2 --parallelism.expert-parallel-degree 2

How experts are balanced is part of the model's config, in Python, and has no flag.
The defaults below are those of {name}.\
"""

_COMMANDS = ("train", "plan", "configs", "report", "export")
_LAUNCH_OPTIONS = {"nproc": int, "nnodes": int, "node_rank": int, "master_addr": str, "master_port": int}


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
            run_command = {
                "train": _train,
                "plan": _plan,
                "configs": _configs,
                "report": _report,
                "export": _export,
            }[command]
            return run_command(rest)
        except ValueError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except Exception as error:
            from trimtab.train.launch import is_launched, record_failure

            record_failure(f"{type(error).__name__}: {error}", status=1, error=error)
            if not is_launched():
                raise
            return 1


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


def parse_launch(argv: list[str]) -> tuple[LaunchConfig, list[str]]:
    """Take the options that say which processes to start out of the arguments of ``trimtab train``.

    Returns:
        These options, and the arguments without them.

    Raises:
        ValueError: a value out of range.
        SystemExit: a value cannot be read.
    """
    from trimtab.train.launch import LaunchConfig

    parser = argparse.ArgumentParser(prog="trimtab train", add_help=False, allow_abbrev=False)
    for name, kind in _LAUNCH_OPTIONS.items():
        flags = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(*sorted(flags), dest=name, type=kind, default=argparse.SUPPRESS)
    given, rest = parser.parse_known_args(argv)
    return LaunchConfig(**vars(given)), rest


def _train(argv: list[str]) -> int:
    from trimtab.train.logging import is_quiet, log_ranks

    ranks, quiet = log_ranks(), is_quiet()
    processes, rest = parse_launch(argv)
    started = os.environ.get("WORLD_SIZE")  # by torchrun, or by `launch`
    if started is not None and processes.world_size > 1:
        raise ValueError(
            f"--nproc and --nnodes start processes, but torchrun already started WORLD_SIZE={started}; give the "
            "number to one of them"
        )
    world_size = _number("WORLD_SIZE") if started is not None else processes.world_size
    num_local = _number("LOCAL_WORLD_SIZE") if started is not None else processes.nproc
    with _told_once():
        config, name = parse_train(rest)
        _check(config, world_size, num_local)
        if ranks[-1] >= world_size:
            named = ",".join(map(str, ranks))
            warnings.warn(
                f"LOG_RANK={named} names rank {ranks[-1]}, but the last rank of this run is {world_size - 1}",
                stacklevel=1,
            )
    if processes.world_size > 1:
        from trimtab.train.launch import launch

        return launch([sys.executable, "-m", "trimtab.train.cli", "train", *rest], processes, log_ranks=ranks)
    return _run(config, name, quiet=quiet)


def _check(config: TrainConfig, world_size: int, num_local: int) -> None:
    """Everything that can be known before processes meet.

    Raises:
        ValueError: the configuration cannot be run by so many processes, or on this machine's devices, or from
            the directory it names.
    """
    config.for_world(world_size)
    checkpoint = config.checkpoint
    may_resume = checkpoint.resume != "never" and (checkpoint.resume != "auto" or config.run_name is not None)
    if checkpoint.initial is not None and not may_resume:  # a run that resumes does not read it
        from trimtab.train.hf_checkpoint import check_initial

        check_initial(Path(checkpoint.initial))
    from trimtab.train.compute import check_precision, find_device

    device = find_device(config.training.device)
    check_precision(config.training.mixed_precision, device)
    if device.type == "cuda":
        import torch

        if num_local > (num_gpus := torch.cuda.device_count()):
            raise ValueError(
                f"{num_local} processes on this machine need a GPU each, and it has {num_gpus}; start "
                f"{num_gpus} (NGPU or --nproc), or set training.device to cpu"
            )


def _run(config: TrainConfig, name: str, *, quiet: bool) -> int:
    """Train in this process, alone or as one rank."""
    from trimtab.train.distributed import stop_process_group
    from trimtab.train.launch import is_launched, prepare_rank
    from trimtab.train.trainer import Trainer, TrainingError

    if is_launched():
        prepare_rank()
    trainer = Trainer(config, name=name, quiet=quiet)
    try:
        result = trainer.train()
    except (TrainingError, OSError) as error:  # a full disk is no bug either
        return _fail(f"the run stopped at step {trainer.step}: {error}", status=1)
    if not quiet:
        print(f"\n{result.status} at step {result.step}")
        print(f"run directory: {result.run_dir.resolve()}")
        if result.report is not None:
            print(f"report:        {result.report.resolve()}")
        if result.status == "interrupted" and config.checkpoint.enable:
            print(f"continue with: --checkpoint.resume {result.run_dir}")
    stop_process_group()
    return 0 if result.signal is None else 128 + result.signal


def _plan(argv: list[str]) -> int:
    from trimtab.train.dry_run import plan_command

    try:
        return plan_command(argv)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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


def _export(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="trimtab export",
        description="Write a checkpoint as a directory that transformers' from_pretrained loads.",
    )
    parser.add_argument(
        "run", type=Path, help="run directory, whose newest checkpoint is taken, or a checkpoint"
    )
    parser.add_argument("directory", type=Path, help="directory to make")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file of weights (default: 5GB)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of weights (default: as trained)")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapter alone, as peft loads it (default: the model, with its adapter merged)",
    )
    chosen = parser.parse_args(argv)
    from trimtab.train.hf_export import export, export_adapter

    if chosen.adapter:
        checkpoint, remarks = export_adapter(chosen.run, chosen.directory)
        print(f"{checkpoint} -> {chosen.directory}")
        for remark in remarks:
            print(remark)
        return 0

    done = export(chosen.run, chosen.directory, max_shard_size=chosen.max_shard_size, dtype=chosen.dtype)
    files = f"{len(done.files)} file{'s' * (len(done.files) > 1)}"
    print(
        f"{done.checkpoint} -> {done.folder}: {done.num_tensors} tensors, {done.num_bytes:,} bytes in {files}"
    )
    for remark in done.remarks:
        print(remark)
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

    known = ["module", "config", *_LAUNCH_OPTIONS, *names(default, "")]
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


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Silence on all ranks of a machine but one about what every rank finds alike, or its starter has told."""
    from trimtab.train.launch import is_launched

    if not is_launched() and os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except ValueError as error:
        raise SystemExit(2) from error


def _number(name: str) -> int:
    """A number of processes in the environment.

    Raises:
        ValueError: it is none.
    """
    given = os.environ.get(name, "1")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{name}={given!r} must be a positive number; torchrun sets it")
    return int(given)


def _fail(message: str, *, status: int = 2) -> int:
    """Tell an error, or leave it to the process that started this one."""
    from trimtab.train.launch import is_launched, record_failure

    record_failure(message, status=status)
    if not is_launched():
        print(f"trimtab: {message}", file=sys.stderr)
    return status


def run() -> NoReturn:
    """Entry point of ``python -m trimtab.train.cli``."""
    from trimtab.train.launch import is_launched, leave

    status = main()
    if status and is_launched():
        leave(status)
    raise SystemExit(status)


if __name__ == "__main__":
    run()
