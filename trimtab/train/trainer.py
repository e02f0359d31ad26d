"""The trainer: one loop, in one process.

Legend: M microbatches of an optimiser step.
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
from torch import Tensor, nn

import trimtab
from trimtab.integrations.discovery import discover
from trimtab.integrations.experts import use_trimtab_experts
from trimtab.scale import Accumulation
from trimtab.train.checkpoint import Checkpointer, CheckpointError, locate
from trimtab.train.compute import (
    check_precision,
    decoder_layers,
    find_device,
    keep_routers_in_float32,
)
from trimtab.train.config import TrainConfig, differences, to_dict
from trimtab.train.environment import describe_environment
from trimtab.train.evaluation import evaluate, forward, next_token_loss
from trimtab.train.logging import MetricsLog, RunConsole, step_line, validation_line
from trimtab.train.packing import TokenBatch

_STATE_VERSION = 1


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
        self.device = find_device(config.training.device)
        check_precision(config.training.mixed_precision, self.device)
        self.run_dir, checkpoint = self._locate_run()
        # Text is checked before anything is written: a mistyped path must not leave a run directory.
        self.loader = config.data.build()
        random.seed(config.training.seed)
        np.random.seed(config.training.seed % 2**32)
        torch.manual_seed(config.training.seed)
        self.model = self._build_model()
        self.routers = discover(self.model)
        self.balancer = trimtab.attach(
            self.model,
            config.model.balancing.objectives,
            bias=config.model.balancing.bias_for(config.training.steps),
            accumulation=Accumulation(
                num_microbatches=config.num_microbatches, order=config.model.balancing.order
            ),
            measure_every=config.metrics.log_interval,
        )
        if config.training.mixed_precision != "none":
            keep_routers_in_float32([router.module for router in self.routers], self.device)
        self.optimizer = config.optimizer.build(self.model)
        self.checkpointer = Checkpointer(self.run_dir, keep=config.checkpoint.keep)
        if checkpoint is not None:
            self._load(checkpoint)
        if config.compile.enable:
            config.compile.apply(decoder_layers(self.model))
        self.console = RunConsole(quiet=quiet, progress=config.metrics.progress)
        self._signal: int | None = None
        self._saved_step = self.step

    # ---------------------------------------------------------------- the loop

    def train(self) -> TrainResult:
        """Train to the last step, or to the end of the step in which the process is asked to stop.

        Raises:
            TrainingError: loss or gradients are not finite.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._write_json("config", to_dict(self.config))
        self._write_json("environment", describe_environment(self.device))
        self.log = MetricsLog(
            self.run_dir, tensorboard=self.config.metrics.tensorboard, first_step=self.step + 1
        )
        self.log.write(self._start_record())
        self.console.print(
            f"{self.name}: step {self.step} of {self.config.training.steps}, in {self.run_dir}"
        )
        handlers = {name: signal.signal(name, self._stop) for name in (signal.SIGINT, signal.SIGTERM)}
        status = "failed"
        self.console.start(self.step, self.config.training.steps)
        try:
            self._loop()
            status = "finished" if self._signal is None else "interrupted"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self.console.stop()
            for name, handler in handlers.items():
                signal.signal(name, handler)
            end = {"step": self.step, "time": _now(), "seconds": self.seconds, "status": status}
            self.log.write({"event": "end", **end})
            self.log.close()
            report = self._write_report()
        return TrainResult(
            run_dir=self.run_dir, status=status, step=self.step, report=report, signal=self._signal
        )

    def _loop(self) -> None:
        config = self.config
        steps, since, tokens = config.training.steps, time.perf_counter(), 0
        while self.step < steps and self._signal is None:
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
                    "balance": self.balancer.metrics(),
                }
                self.log.write(record)
                self.console.print(step_line(record))
                since, tokens = now, 0
            self.console.advance(self.step)
            interrupted = time.perf_counter()
            if config.validation.enable and (last or self.step % config.validation.interval == 0):
                self._validate()
            if config.checkpoint.enable and (last or self.step % config.checkpoint.interval == 0):
                self._save()
            since += time.perf_counter() - interrupted  # throughput is of training alone
        if self._signal is not None and config.checkpoint.enable and self._saved_step != self.step:
            self._save()

    def _train_step(self) -> dict[str, Any]:
        """One optimiser step: forwards and backwards of its microbatches, clipping, update, bias."""
        config, balancer = self.config, self.balancer
        batches = [next(self.loader).to(self.device) for _ in range(config.num_microbatches)]
        # Known before the first forward, so that microbatches of any size weigh what they hold.
        num_labels = max(1, sum(batch.num_label_tokens for batch in batches))
        num_tokens = sum(batch.num_tokens for batch in batches)
        balancer.start_step(
            num_tokens=num_tokens,
            num_sequences=sum(int(batch.valid_mask_BS.any(dim=1).sum()) for batch in batches),
            num_documents=sum(batch.num_sequences for batch in batches),
        )
        lr = config.optimizer.lr * config.lr_scheduler.factor(self.step + 1, config.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        order = config.model.balancing.order
        losses: list[Tensor] = []
        if order == "counting_pass":
            random_state = torch.get_rng_state()
            with balancer.counting_pass():
                for batch in batches:
                    self._forward(batch)
            torch.set_rng_state(random_state)
        if order == "forward_first":
            losses = [self._forward(batch) / num_labels for batch in batches]
            for loss in losses:
                loss.backward()
        else:
            for batch in batches:
                losses.append(self._forward(batch) / num_labels)
                losses[-1].backward()
        loss = torch.stack([loss.detach() for loss in losses]).sum()
        max_norm = config.training.max_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), math.inf if max_norm is None else max_norm
        )
        numbers = {"loss": loss.item(), "grad_norm": float(grad_norm)}
        # One wait for the device in each step: an update with a bad gradient could not be taken back.
        if not all(map(math.isfinite, numbers.values())):
            raise TrainingError(self._not_finite(numbers))
        self.optimizer.step()
        self.optimizer.zero_grad()
        balancer.step()
        return {**numbers, "lr": lr, "num_tokens": num_tokens}

    def _forward(self, batch: TokenBatch) -> Tensor:
        """Sum of the microbatch's losses over its label tokens."""
        with self.balancer.microbatch(valid_mask=batch.valid_mask_BS, cu_seqlens=batch.cu_seqlens_G):
            logits = forward(self.model, batch, self.config.training.mixed_precision)
        return next_token_loss(logits, batch.labels_BS)

    def evaluate(self) -> dict[str, Any]:
        """Loss and routing of the held-out text; see `trimtab.train.evaluation.evaluate`."""
        return evaluate(
            self.model,
            self.routers,
            self.loader.validation_batches(),
            precision=self.config.training.mixed_precision,
            device=self.device,
        )

    def _validate(self) -> None:
        record = {"event": "validation", "step": self.step, **self.evaluate()}
        self.log.write(record)
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

    def _build_model(self) -> nn.Module:
        config = self.config
        model = config.model.build(vocab_size=self.loader.tokenizer.vocab_size, seq_len=config.data.seq_len)
        use_trimtab_experts(model)
        config.activation_checkpoint.apply(model)
        return model.to(self.device)

    def _start_record(self) -> dict[str, Any]:
        balancer, rule = self.balancer, self.balancer.bias_rule
        return {
            "event": "start",
            "time": _now(),
            "model": self.name,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": [router.canonical_name for router in self.routers],
            "num_experts": self.config.model.num_experts,
            "top_k": self.config.model.top_k,
            "objectives": [
                {"name": objective.name, "coef": objective.coef, "scope": objective.scope}
                for objective in balancer.objectives
            ],
            "bias_rule": None if rule is None else type(rule).__name__,
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
            "balancer": self.balancer.state_dict(),
            "data": self.loader.state_dict(),
            "random": _random_state(self.device),
        }
        self.checkpointer.save(self.step, self.model, self.optimizer, state)
        self._saved_step = self.step

    def _load(self, path: Path) -> None:
        state = self.checkpointer.read_trainer(path)
        if state.get("version") != _STATE_VERSION:
            raise CheckpointError(
                f"checkpoint {path} is of version {state.get('version')!r}, expected {_STATE_VERSION}; resume with "
                "the trimtab that saved it"
            )
        changed = differences(state["config"], to_dict(self.config))
        if changed and not self.config.checkpoint.allow_changes:
            raise CheckpointError(
                f"checkpoint {path} was saved by another configuration; it differs in {'; '.join(changed)}. "
                "Resume with the saved settings, or accept the changes with --checkpoint.allow-changes"
            )
        self.checkpointer.load(path, self.model, self.optimizer)
        self.balancer.load_state_dict(state["balancer"])
        self.loader.load_state_dict(state["data"])
        self.step, self.seconds, self.num_tokens = state["step"], state["seconds"], state["num_tokens"]
        _set_random_state(state["random"])

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
        named = self.model.named_parameters()
        bad = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
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
        if not self.config.metrics.report:
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
