"""The trainer: one loop, the same on every process of a run.

The first rank writes files; ranks that `LOG_RANK` names print. Whatever one rank alone decides (the run's
directory, a signal) is told to all, so that they stop, save and fail together.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trimtab.balancer import Balancer
from trimtab.integrations.lora import is_adapter
from trimtab.parallel.fsdp import clip_gradients
from trimtab.parallel.mesh import Mesh
from trimtab.parallel.placements import local
from trimtab.train.checkpoint import Checkpointer, CheckpointError, locate
from trimtab.train.checkpoint_state import LocalState
from trimtab.train.compute import check_precision, find_device
from trimtab.train.config import TrainConfig, differences, to_dict
from trimtab.train.distributed import is_first_rank, on_first_rank, start_process_group, world_size
from trimtab.train.engine import Engine
from trimtab.train.environment import describe_environment
from trimtab.train.evaluation import evaluate
from trimtab.train.hf_checkpoint import check_initial, read_initial
from trimtab.train.hf_export import describe_model, save_adapter
from trimtab.train.initial_weights import draw_weights
from trimtab.train.logging import MetricsLog, RunConsole, layers_line, step_line, validation_line
from trimtab.train.mtp import mtp_of
from trimtab.train.stages import gather_stages, join_metrics

_STATE_VERSION = 1
# Within a run's directory: its adapter, as peft reads it.
ADAPTER_FOLDER = "adapter"


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended.

    Args:
        run_dir: its directory.
        status: "finished" or "interrupted".
        step: optimiser steps done.
        report: its HTML report, if one was written.
        signal: number of the signal that interrupted it.
    """

    run_dir: Path
    status: str
    step: int
    report: Path | None
    signal: int | None = None


class Trainer:
    """Everything of one run, built from its configuration, at the start or at a checkpoint.

    Args:
        config: the run.
        name: what it is, ``module/config``.
        quiet: print nothing.

    Raises:
        ValueError: the data, the model, the device or the checkpoint cannot be had as configured.
    """

    def __init__(self, config: TrainConfig, *, name: str, quiet: bool = False) -> None:
        self.config = config
        self.name = name
        self.quiet = quiet
        self.step = 0
        self.seconds = 0.0
        self.num_tokens = 0
        device = find_device(config.training.device)
        check_precision(config.training.mixed_precision, device)
        run = config.for_world(world_size())
        self.device = start_process_group(device.type, config.training.timeout_seconds)
        self.mesh = Mesh(run.degrees, device.type) if world_size() > 1 else None
        self.run_dir, checkpoint = on_first_rank(self._locate_run)
        initial = None if checkpoint is not None else config.checkpoint.initial
        if initial is not None:
            on_first_rank(lambda: check_initial(Path(initial)))
        # Text is checked before anything is written: a mistyped path must not leave a run directory.
        data_rank = 0 if self.mesh is None else self.mesh.rank("data")
        plan = run.pipeline
        stages = (0,) if plan is None or self.mesh is None else plan.stages_of(self.mesh.rank("pp"))
        self.loader = config.build_loader(run, data_rank=data_rank, stages=stages)
        random.seed(config.training.seed)
        np.random.seed(config.training.seed % 2**32)
        self.engine = Engine(
            config,
            run,
            mesh=self.mesh,
            device=self.device,
            vocab_size=self.loader.tokenizer.vocab_size,
            draw=checkpoint is None and initial is None,
        )
        self.optimizer = config.optimizer.build(self.engine.parameters())
        self.checkpointer = Checkpointer(self.run_dir, keep=config.checkpoint.keep)
        if checkpoint is not None:
            self._load(checkpoint)
        elif initial is not None:
            modules = self.engine.modules
            state = LocalState(modules, self.optimizer)
            read_initial(Path(initial), modules, state.model, allow_changes=config.checkpoint.allow_changes)
            state.spread()
            draw_weights(modules, seed=config.training.seed, wanted=is_adapter)
        self.console = RunConsole(quiet=quiet, progress=config.metrics.progress)
        self._signal: int | None = None  # that this process has received
        self._agreed: int | None = None  # that some process had received, as all know
        self._stopping = False
        self.log: MetricsLog | None = None
        self._saved_step = self.step
        self._initial = initial

    @property
    def model(self) -> Any:
        """The model; with a pipeline, the first part of it that this rank holds."""
        return self.engine.parts[0].module

    @property
    def balancer(self) -> Balancer:
        """Its balancer; with a pipeline, that of the first part here that has one."""
        return self.engine.balancers[0]

    # ---------------------------------------------------------------- the loop

    def train(self) -> TrainResult:
        """Train to the last step, or to the end of the step in which the process is asked to stop.

        Raises:
            TrainingError: loss or gradients are not finite.
        """
        self._start_log()
        self.console.print(
            f"{self.name}: step {self.step} of {self.config.training.steps}, in {self.run_dir}"
        )
        handlers = {name: signal.signal(name, self._stop) for name in (signal.SIGINT, signal.SIGTERM)}
        status = "failed"
        self.console.start(self.step, self.config.training.steps)
        try:
            with self.engine.settings():
                self._loop()
            self._save_adapter()
            status = "interrupted" if self._stopping else "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self.console.stop()
            for name, handler in handlers.items():
                signal.signal(name, handler)
            end = {"step": self.step, "time": _now(), "seconds": self.seconds, "status": status}
            self._log({"event": "end", **end})
            if self.log is not None:
                self.log.close()
            report = self._write_report()
        return TrainResult(
            run_dir=self.run_dir, status=status, step=self.step, report=report, signal=self._agreed
        )

    def _loop(self) -> None:
        config = self.config
        if config.validation.enable and self._initial is not None and self.step == 0:
            self._validate()  # what the given weights are like, for the report to compare
        steps, since, tokens = config.training.steps, time.perf_counter(), 0
        while self.step < steps and not self._stopping:
            started = time.perf_counter()
            record = self._train_step()
            self.step += 1
            self.num_tokens += record["num_tokens"]
            self.seconds += time.perf_counter() - started
            tokens += record["num_tokens"]
            last = self.step == steps
            if self.step == 1 or last or self.step % config.metrics.log_interval == 0:
                now = time.perf_counter()
                record |= {
                    "event": "step",
                    "step": self.step,
                    "tokens_per_second": tokens / (now - since),
                    "num_tokens": self.num_tokens,
                    "seconds": self.seconds,
                    "balance": self._balance(),
                }
                self._log(record)
                self.console.print(step_line(record))
                self.console.print(layers_line(record))
                since, tokens = now, 0
            self.console.advance(self.step)
            interrupted = time.perf_counter()
            if config.validation.enable and (last or self.step % config.validation.interval == 0):
                self._validate()
            if config.checkpoint.enable and (last or self.step % config.checkpoint.interval == 0):
                self._save()
            since += time.perf_counter() - interrupted  # throughput is of training alone
        if self._stopping and config.checkpoint.enable and self._saved_step != self.step:
            self._save()

    def _train_step(self) -> dict[str, Any]:
        """One optimiser step: forwards and backwards of its microbatches, clipping, update, bias."""
        config, engine = self.config, self.engine
        batches = [next(self.loader) for _ in range(engine.run.num_microbatches)]
        # Known before the first forward, so that microbatches of any size weigh what they hold.
        totals = engine.totals(batches)
        batches = [batch.send(self.device) for batch in batches]
        lr = config.optimizer.lr * config.lr_scheduler.factor(self.step + 1, config.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        mtp = mtp_of(config.model)
        losses = {
            "loss": engine.train_step(
                batches, totals, mtp_coef=None if mtp is None else mtp.coef_at(self.step)
            )
        }
        if engine.mtp_loss is not None:
            losses["mtp_loss"] = engine.mtp_loss
        max_norm = math.inf if config.training.max_norm is None else config.training.max_norm
        grad_norm = clip_gradients(engine.parameters(), max_norm, self.mesh, copies=engine.copies)
        numbers = self._agree(losses, grad_norm)
        if not all(map(math.isfinite, numbers.values())):
            raise TrainingError(self._not_finite(numbers))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for balancer in engine.balancers:
            balancer.step()
        return {**numbers, "lr": lr, "num_tokens": totals["num_tokens"]}

    def _agree(self, losses: dict[str, Tensor], grad_norm: Tensor) -> dict[str, float]:
        """Losses of all ranks and the norm, which all know; and whether a signal has reached one of them.

        If one has, all stop after this step.
        """
        signals = (signal.SIGINT, signal.SIGTERM)
        reached_here = [grad_norm.new_full((), self._signal == name) for name in signals]
        told = torch.stack([value.double() for value in (*losses.values(), *reached_here)])
        if self.mesh is not None:
            dist.all_reduce(told)
        # One wait for the device in each step: an update with a bad gradient could not be taken back.
        *values, norm = torch.cat([told, grad_norm.double()[None]]).tolist()
        totals, reached = dict(zip(losses, values, strict=False)), values[len(losses) :]
        totals["grad_norm"] = norm
        # Not self._signal: one that has come since is not known to the others, who would go on without this rank.
        self._agreed = next((name for name, number in zip(signals, reached, strict=True) if number), None)
        self._stopping = self._agreed is not None
        return totals

    def _balance(self) -> dict[str, Any]:
        """Metrics of all layers, whichever ranks hold them."""
        parts = self.engine.parts
        own = {part.stage: part.balancer.metrics() for part in parts if part.balancer is not None}
        return join_metrics(gather_stages(own, self.mesh))

    def evaluate(self) -> dict[str, Any]:
        """Loss and routing of the held-out text; see `trimtab.train.evaluation.evaluate`."""
        return evaluate(self.engine, self.loader.validation_batches())

    def _validate(self) -> None:
        record = {"event": "validation", "step": self.step, **self.evaluate()}
        self._log(record)
        self.console.print(validation_line(record))
        self._write_report()

    # ---------------------------------------------------------------- construction

    def _locate_run(self) -> tuple[Path, Path | None]:
        """The run's directory, and the checkpoint to continue from."""
        config = self.config
        if config.checkpoint.resume not in ("auto", "never"):
            run_dir, checkpoint = locate(Path(config.checkpoint.resume))
            return run_dir, checkpoint or Checkpointer(run_dir).latest()
        folder = Path(config.dump_folder)
        if config.run_name is not None:
            run_dir = folder / config.run_name
            found = Checkpointer(run_dir).latest()
            if found is not None and config.checkpoint.resume == "never":
                raise CheckpointError(
                    f"run directory {run_dir} holds checkpoints, and checkpoint.resume='never' would mix two runs "
                    "in it; choose another run_name, or leave checkpoint.resume at auto to continue"
                )
            return run_dir, found
        stem = f"{self.name.replace('/', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
        number = 1
        while (run_dir := folder / (stem if number == 1 else f"{stem}-{number}")).exists():
            number += 1
        return run_dir, None

    def _start_log(self) -> None:
        """Open the run's files, on the first rank."""
        record = self._start_record()

        def start() -> None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._write_json("config", to_dict(self.config))
            self._write_json("environment", describe_environment(self.device))
            self.log = MetricsLog(
                self.run_dir, tensorboard=self.config.metrics.tensorboard, first_step=self.step + 1
            )
            self.log.write(record)

        on_first_rank(start)

    def _log(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(record)

    def _start_record(self) -> dict[str, Any]:
        balancing, model = self.config.model.balancing, self.config.model
        own = {
            part.stage: (
                sum(p.numel() for p in part.module.parameters() if p not in self.engine.copies),
                sum(
                    p.numel()
                    for p in part.module.parameters()
                    if p.requires_grad and p not in self.engine.copies
                ),
                [router.canonical_name for router in part.routers],
            )
            for part in self.engine.parts
        }
        stages = gather_stages(own, self.mesh)
        objectives = [config.build() for config in balancing.objectives]
        rule = None if balancing.bias is None else type(balancing.bias.build()).__name__
        return {
            "event": "start",
            "time": _now(),
            "model": self.name,
            "num_parameters": sum(number for number, _, _ in stages),
            "num_trained": sum(number for _, number, _ in stages),
            "layers": [name for _, _, names in stages for name in names],
            "initial": self.config.checkpoint.initial,
            "num_experts": model.num_experts,
            "top_k": model.top_k,
            "objectives": [{"name": o.name, "coef": o.coef, "scope": o.scope} for o in objectives],
            "bias_rule": rule,
            "domains": list(self.loader.domains),
            "num_steps": self.config.training.steps,
            "first_step": self.step + 1,
        }

    # ---------------------------------------------------------------- state

    def _save(self) -> None:
        state = {
            "version": _STATE_VERSION,
            "name": self.name,
            "step": self.step,
            "seconds": self.seconds,
            "num_tokens": self.num_tokens,
            "config": to_dict(self.config),
            "model_config": describe_model(self.model),
            "global_batch_size": self.engine.run.global_batch_size,
            "balancer": self._balancer_state(),
            "data": self.loader.state_dict(),
        }
        own = {"random": _random_state(self.device)}
        self.checkpointer.save(self.step, self.engine.modules, self.optimizer, state, per_rank=own)
        self._saved_step = self.step

    def _save_adapter(self) -> None:
        """Write the adapter of the last checkpoint as peft reads it."""
        config, checkpoint = self.config, self.checkpointer.latest()
        wanted = config.finetune.adapts and config.finetune.save_adapter
        described = describe_model(self.model)
        if not wanted or checkpoint is None or described is None or self._saved_step != self.step:
            return
        remarks = on_first_rank(
            lambda: save_adapter(self.run_dir / ADAPTER_FOLDER, checkpoint, described, to_dict(config))
        )
        for remark in remarks:
            self.console.print(remark)

    def _balancer_state(self) -> dict[str, Any]:
        """State of the balancers of all layers, as one balancer of the whole model would have it."""
        parts = self.engine.parts
        own = {part.stage: part.balancer.state_dict() for part in parts if part.balancer is not None}
        stages = gather_stages(own, self.mesh)
        layers = {name: layer for stage in stages for name, layer in stage["layers"].items()}
        return {**stages[0], "layers": layers}

    def _load(self, path: Path) -> None:
        state = self.checkpointer.read_trainer(path)
        if state.get("version") != _STATE_VERSION:
            raise CheckpointError(
                f"checkpoint {path} is of version {state.get('version')!r}, expected {_STATE_VERSION}; resume with "
                "the trimtab that saved it"
            )
        changed = differences(state["config"], to_dict(self.config))
        rows, saved_rows = self.engine.run.global_batch_size, state.get("global_batch_size")
        if saved_rows not in (None, rows):
            # Left to follow from the number of data ranks, it is not in the configuration.
            changed.append(f"rows of a step (saved {saved_rows}, now {rows})")
        if changed and not self.config.checkpoint.allow_changes:
            raise CheckpointError(
                f"checkpoint {path} was saved by another configuration; it differs in {'; '.join(changed)}. "
                "Resume with the saved settings, or accept the changes with --checkpoint.allow-changes"
            )
        self.checkpointer.load(path, self.engine.modules, self.optimizer)
        layers = state["balancer"]["layers"]
        for balancer in self.engine.balancers:
            own = {name: layers[name] for row in balancer.ledger.rows if (name := row.name) in layers}
            balancer.load_state_dict({**state["balancer"], "layers": own})
        self.loader.load_state_dict(state["data"])
        self.step, self.seconds, self.num_tokens = state["step"], state["seconds"], state["num_tokens"]
        if state["per_rank"] is not None:
            _set_random_state(state["per_rank"]["random"])

    # ---------------------------------------------------------------- the rest

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ask the loop to stop after the current step; a second signal does not wait."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        if not self.quiet:
            # Not through the console: a handler may interrupt a print, which must not be entered twice.
            text = f"{signal.Signals(number).name}: stopping after this step; again to stop at once\n"
            os.write(2, text.encode())

    def _not_finite(self, numbers: dict[str, float]) -> str:
        named = [entry for module in self.engine.modules for entry in module.named_parameters()]
        bad = [n for n, p in named if p.grad is not None and not local(p.grad).isfinite().all()]
        latest = self.checkpointer.latest()
        way_back = (
            f"the last good checkpoint is {latest}" if latest is not None else "no checkpoint was saved yet"
        )
        return (
            f"step {self.step + 1}: loss={numbers['loss']} and grad_norm={numbers['grad_norm']} are not finite "
            f"(first bad gradient: {bad[0] if bad else 'none'}), and the step was not applied; {way_back}. Lower "
            "optimizer.lr, lengthen lr_scheduler.warmup_steps or lower training.max_norm; "
            "with mixed_precision='bfloat16' try 'none'"
        )

    def _write_json(self, name: str, value: Any) -> None:
        (self.run_dir / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def _write_report(self) -> Path | None:
        if not self.config.metrics.report or not is_first_rank():
            return None
        from trimtab.train.report import write_report

        try:
            return write_report(self.run_dir)
        except ValueError as error:  # a run that ended before its first logged step has nothing to show
            self.console.print(f"no report: {error}")
            return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _random_state(device: torch.device) -> dict[str, Any]:
    """States of all global generators, of types that loading without pickled code accepts."""
    algorithm, keys, *numpy_rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), *numpy_rest],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    algorithm, keys, *numpy_rest = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *numpy_rest))
    random.setstate(state["python"])
