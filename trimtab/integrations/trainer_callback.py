"""A callback for the Hugging Face Trainer. Importing this module imports transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback

from trimtab.balancer import Balancer
from trimtab.integrations.discovery import stock_aux_loss_active

STATE_FILE = "trimtab_balancer.pt"


class BalancerCallback(TrainerCallback):
    """Ends the balancer's step after each optimizer step, and logs balance.

        balancer = trimtab.attach(model, [...], accumulation=args.gradient_accumulation_steps)
        Trainer(model, args, ..., callbacks=[BalancerCallback(balancer)])

    Injected gradients do not pass through the loss, so the Trainer's own normalisation of the loss (by
    the number of label tokens, or by accumulation steps) does not touch them. Data-parallel training
    averages gradients: attach with ``GradReduction(ranks="mean", num_ranks=world_size)``. With fp16 the
    Trainer scales the loss, and injected gradients must be scaled alike: return
    ``balancer.follow(super().compute_loss(...))`` from ``compute_loss`` of a subclass.

    The last step of an epoch may hold fewer microbatches; the balancer is told so where the dataloader has
    a length. Where microbatches differ in size and an objective is normalised by tokens, override
    ``get_batch_samples`` and call ``balancer.start_step`` there with what the batches hold.

    Reporting integrations run before callbacks given to the Trainer; for TensorBoard to see the values, move
    this one to the front of ``trainer.callback_handler.callbacks``. Loss values appear on steps that the
    balancer measures: attach with ``measure_every=args.logging_steps``.

    Checkpoints of the Trainer hold the balancer's state in ``trimtab_balancer.pt``, and resuming restores it.

    Args:
        balancer: of the model that is trained.
        prefix: of the names of logged values.
    """

    def __init__(self, balancer: Balancer, prefix: str = "balance/") -> None:
        self.balancer = balancer
        self.prefix = prefix

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the Trainer's steps are what the balancer takes them for.

        Raises:
            ValueError: another number of microbatches, an order that the Trainer does not run, or the model's
                own auxiliary loss is on.
        """
        accumulation = self.balancer.accumulation
        num_microbatches = args.gradient_accumulation_steps
        if accumulation.num_microbatches != num_microbatches:
            raise ValueError(
                f"gradient_accumulation_steps={num_microbatches}, but the balancer was attached with "
                f"num_microbatches={accumulation.num_microbatches}; attach with accumulation={num_microbatches}"
            )
        if accumulation.order != "alternating" and num_microbatches > 1:
            raise ValueError(
                f"order={accumulation.order!r}, but the Trainer runs backward after each forward; attach with "
                f"accumulation={num_microbatches}"
            )
        model = kwargs.get("model")
        # Some trainers switch the model's own loss on after attach().
        if self.balancer.objectives and model is not None and (active := stock_aux_loss_active(model)):
            raise ValueError(active)
        if state is not None and state.global_step > 0:
            self._resume(args, state)
        # A run that was broken off, as when the Trainer looks for a batch size that fits, leaves half a step.
        self.balancer.discard_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the balancer's state into the Trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.balancer.state_dict(), folder / STATE_FILE)

    def _resume(self, args: Any, state: Any) -> None:
        given = args.resume_from_checkpoint
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if isinstance(given, str) and Path(given).is_dir():
            folders.insert(0, Path(given))
        for folder in folders:
            if (folder / STATE_FILE).is_file():
                self.balancer.load_state_dict(
                    torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
                )
                return
        warnings.warn(
            f"the run resumes at step {state.global_step}, but {folders[0]} holds no {STATE_FILE}: prior counts, "
            "momenta and the step of a bias schedule start anew",
            stacklevel=2,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the balancer of a last, shorter step of an epoch."""
        try:
            num_batches = len(kwargs["train_dataloader"])
        except (KeyError, TypeError):
            return
        num_microbatches = args.gradient_accumulation_steps
        num_steps, rest = divmod(num_batches, num_microbatches)
        is_short = rest > 0 and state.global_step % (num_steps + 1) == num_steps
        if is_short and self.balancer.ledger.num_microbatches != rest:
            self.balancer.start_step(num_microbatches=rest)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that injected gradients follow a scaled loss.

        Raises:
            RuntimeError: fp16 training scales the loss, and the balancer has not followed it.
        """
        if args.fp16 and self.balancer.objectives and self.balancer.ledger.loss_scale is None:
            raise RuntimeError(
                "fp16=True scales the loss, and injected gradients do not know the scale; train with bf16=True, "
                "or attach with GradReduction(microbatches='sum') and return "
                "balancer.follow(super().compute_loss(...)) from compute_loss of a Trainer subclass"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the balancer's step."""
        self.balancer.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the last step's balance to the logs of a training step."""
        if not logs or "loss" not in logs:
            return
        metrics = self.balancer.metrics()
        if not metrics["layers"]:
            return
        values = {
            "maxvio_mean": fmean(metrics["maxvio"]),
            "maxvio_max": max(metrics["maxvio"]),
            "load_entropy": fmean(metrics["load_entropy"]),
            "dead_experts": sum(metrics["dead_experts"]),
        }
        for name, loss in metrics["losses"].items():
            values[f"{name}_loss"] = fmean(loss["value"])
        named = {f"{self.prefix}{name}": value for name, value in values.items()}
        logs.update(named)
        # The Trainer has copied the logs to its history before it calls back.
        if state.log_history:
            state.log_history[-1].update(named)
