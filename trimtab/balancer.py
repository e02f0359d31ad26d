"""The balancer: what a user holds while training.

Shapes: E experts, L MoE layers, B sequences, S length.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bias import BiasRule
from trimtab.finalize import Losses, StepLosses, finalize
from trimtab.hooks import MODEL_STATE, ROUTER_STATE, RouterState, after_model, after_router, before_model
from trimtab.interleaved import MicrobatchRun, concatenate, interleave
from trimtab.layer import Layer, RouterView, check_bias_dtype, layer_bias, load_layers, save_layers
from trimtab.ledger import DeclaredTotals, Ledger
from trimtab.metrics import LayerSnapshot, check_totals, summarize
from trimtab.microbatch import Context, Description, Follow, describe_given
from trimtab.objective import Objective
from trimtab.ranks import TokenRanks
from trimtab.scale import Accumulation, GradReduction

BALANCER = "_trimtab_balancer"


class Balancer:
    """Balances the experts of one model over optimiser steps; made by `trimtab.attach`.

    A step is ``num_microbatches`` training forwards and backwards, then the optimiser's step, then
    `step`. Gradients are injected during backward; there is no loss to add.

    Args:
        objectives: losses, in any number.
        bias_rule: rule for expert biases, or None.
        accumulation: microbatches per step and their order.
        reduction: how the host trainer treats gradients.
        measure_every: steps between measurements of loss values, router entropy and logits; 0 for never.
            Load, MaxVio and bias are known every step at no cost.
        ranks: process groups that counts are summed over; None for one rank.
        losses: "injected" adds gradients during backward; "returned" gives them to the losses of `finalize`.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        bias_rule: BiasRule | None,
        accumulation: Accumulation,
        reduction: GradReduction,
        measure_every: int = 10,
        ranks: TokenRanks | None = None,
        losses: Losses = "injected",
    ) -> None:
        names = [objective.name for objective in objectives]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(
                f"objective {sorted(repeated)[0]!r} is given more than once; add the coefficients into one"
            )
        if measure_every < 0:
            raise ValueError(f"measure_every={measure_every} must be at least 0; 0 never measures")
        self.objectives = tuple(objectives)
        self.bias_rule = bias_rule
        self.accumulation = accumulation
        self.reduction = reduction
        self.measure_every = measure_every
        units = {objective.unit for objective in objectives}
        self.context = Context(
            "document" if "document" in units else "sequence" if "sequence" in units else None
        )
        self.ranks = ranks or TokenRanks()
        self.context.divided = self.ranks.num_sequence_ranks > 1
        self.losses = losses
        self._check_plan(accumulation)
        self.ledger = Ledger(objectives, accumulation, reduction, self.ranks, returns=losses == "returned")
        if self.ledger.sums.is_needed:
            self.context.ledger = self.ledger
        self.layers: list[Layer] = []
        self.num_steps = 0
        self.bias_frozen = False
        self._snapshots: list[LayerSnapshot] = []
        # Of the step that the snapshots are of.
        self._declared, self._plan = DeclaredTotals(), accumulation
        self.model: nn.Module | None = None
        self._context_module: nn.Module | None = None
        self._context_hooks: list[Any] = []
        self._arm()

    # ---------------------------------------------------------------- construction

    def add_router(self, router: RouterView, hook: dict[str, Any], bias_path: str | None) -> None:
        """Open a ledger row for a router and put the hook on it.

        Args:
            router: the router.
            hook: further arguments of `RouterState`.
            bias_path: attribute path of the selection bias from ``router.`` or ``block.``.

        Raises:
            ValueError: an objective or the bias rule cannot serve this router.
        """
        name = router.canonical_name
        try:
            for objective in self.objectives:
                objective.check(router.num_experts, router.top_k, self.accumulation)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        row = self.ledger.new_row(name, router.num_experts, router.top_k, router.score)
        layer = Layer(router, layer_bias(self.bias_rule, router))
        extra: dict[str, Any] = {}
        if layer.bias is not None and self.bias_rule is not None:
            self.ledger.rows[row].statistic = self.bias_rule.statistic()
            if self.ledger.rows[row].statistic is not None and bias_path is not None:
                holder, _, path = bias_path.partition(".")
                extra["bias_holder"] = router.module if holder == "router" else router.block
                extra["bias_path"] = tuple(path.split("."))
        state = RouterState(
            ledger=self.ledger,
            row=row,
            context=self.context,
            score=router.score,
            top_k=router.top_k,
            **hook,
            **extra,
        )
        setattr(router.module, ROUTER_STATE, state)
        if not state.fused:
            layer.hooks.append(router.module.register_forward_hook(after_router, with_kwargs=True))
        self.layers.append(layer)

    def add_context(self, model: nn.Module, module: nn.Module, argument_names: tuple[str, ...]) -> None:
        """Put the hooks on ``module``, whose forward tells the batch, and the balancer on ``model``."""
        self.context.argument_names, self.context.module = argument_names, module
        setattr(module, MODEL_STATE, self.context)
        self._context_hooks = [
            module.register_forward_pre_hook(before_model, with_kwargs=True),
            module.register_forward_hook(after_model, with_kwargs=True),
        ]
        self.model, self._context_module = model, module
        setattr(model, BALANCER, self)

    def remove(self) -> None:
        """Take everything off the model again; its forward, attributes and state dict are as before."""
        for layer in self.layers:
            for hook in layer.hooks:
                hook.remove()
            delattr(layer.router.module, ROUTER_STATE)
        for hook in self._context_hooks:
            hook.remove()
        if self._context_module is not None:
            delattr(self._context_module, MODEL_STATE)
        if self.model is not None:
            delattr(self.model, BALANCER)
        self.layers, self._context_hooks = [], []
        self.context.module = self._context_module = self.model = None

    # ---------------------------------------------------------------- during a step

    def start_step(
        self,
        *,
        num_microbatches: int | None = None,
        num_tokens: int | None = None,
        num_sequences: int | None = None,
        num_documents: int | None = None,
    ) -> None:
        """Say what the coming step holds; needed only where microbatches differ in size or number.

        With totals, ragged microbatches are exact: every weight uses the step's totals. Without them and
        with plain accumulation each microbatch counts as 1 / M of the step.

        Args:
            num_microbatches: microbatches of this step, if not the configured number.
            num_tokens: valid tokens of the step.
            num_sequences: sequences of the step that have a valid token.
            num_documents: documents of the step that have a valid token.

        With several ranks that share a step, totals are of all of them, and all say the same.

        Raises:
            RuntimeError: forwards of this step have already run.
            ValueError: no microbatch, or a negative total.
        """
        if self.ledger.in_step:
            raise RuntimeError(
                "start_step comes before the step's first forward; call balancer.step() to end one"
            )
        if num_microbatches is not None and num_microbatches < 1:
            raise ValueError(f"num_microbatches={num_microbatches} must be at least 1")
        totals = {"num_tokens": num_tokens, "num_sequences": num_sequences, "num_documents": num_documents}
        for name, value in totals.items():
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if num_microbatches is not None:
            plan = Accumulation(num_microbatches=num_microbatches, order=self.accumulation.order)
            self._check_plan(plan)
            for layer in self.layers:
                for objective in self.objectives:
                    objective.check(layer.router.num_experts, layer.router.top_k, plan)
            self.ledger.plan = plan
        self.ledger.declare(DeclaredTotals(num_tokens, num_sequences, num_documents))

    def _check_plan(self, plan: Accumulation) -> None:
        if self.losses == "returned" and not plan.counts_are_complete:
            raise ValueError(
                f"losses='returned' with num_microbatches={plan.num_microbatches} in order={plan.order!r}: the "
                "step's losses exist when its last forward has run, which is after its first backward; run all "
                "forwards first (Accumulation(order='forward_first')), or leave losses='injected'"
            )

    def microbatch(
        self,
        *,
        batch_shape: tuple[int, int] | None = None,
        valid_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_documents: int | None = None,
        tokens: Tensor | None = None,
    ) -> Description:
        """Describe the tokens of a forward, where the model's arguments cannot.

        Enter it around the forward, ``with balancer.microbatch(...): model(...)``, or give several to
        `interleaved` or `concatenated`.

        Args:
            batch_shape: (B, S) of the tokens that routers see; read off the mask or positions if None.
            valid_mask: (B, S), nonzero where a token counts; None for all.
            cu_seqlens: document offsets in the flattened tokens.
            position_ids: (B, S) positions that restart with each document.
            num_documents: at most, counting each part of a document that rows divide. Without it, losses of
                documents found by ``position_ids`` make each forward wait for it; ``cu_seqlens`` tell it.
            tokens: (t,) int64 places in the flattened (B, S) batch of the tokens that this rank's routers see,
                where sequences are divided over ranks (`TokenRanks.sequence`); everything else describes
                the whole batch. None for all.

        Raises:
            ValueError: no shape, or shapes that disagree.
            RuntimeError: the balancer was removed.
        """
        if self.model is None:
            raise RuntimeError("microbatch() of a balancer that was removed; attach again to go on balancing")
        return describe_given(
            self.context,
            next(self.layers[0].router.module.parameters()).device,
            batch_shape=batch_shape,
            valid_mask=valid_mask,
            cu_seqlens=cu_seqlens,
            position_ids=position_ids,
            num_documents=num_documents,
            tokens=tokens,
        )

    def interleaved(
        self, microbatches: Sequence[Description]
    ) -> contextlib.AbstractContextManager[tuple[MicrobatchRun, ...]]:
        """Run the forwards of several microbatches by turns, as overlapping two batches does.

            with balancer.interleaved([balancer.microbatch(...), balancer.microbatch(...)]) as (run_a, run_b):
                for layer in layers:
                    x_a = run_a(layer, x_a)
                    x_b = run_b(layer, x_b)

        Each is a training forward of its own, as if they ran one after the other. They end with the block, and
        backward runs after it, of their losses one by one or of the sum. If the block raises, nothing of the
        microbatches that have not ended is counted.

        Args:
            microbatches: what `microbatch` or `concatenated` returned, in the order of their forwards.

        Returns:
            A context manager whose value is one `MicrobatchRun` for each.

        Raises:
            ValueError: no microbatch, or something else.
            RuntimeError: on entering, inside another block or `microbatch`; on leaving, a layer that ran some
                of the microbatches and not others.
        """
        return interleave(self.context, self.ledger, microbatches)

    def concatenated(self, microbatches: Sequence[Description]) -> Description:
        """Describe one forward on the tokens of several microbatches, each following the one before.

            with balancer.concatenated([balancer.microbatch(...), balancer.microbatch(...)]):
                model(torch.cat([tokens_a, tokens_b]))

        Each stays a microbatch: of the step's number, of losses of microbatch scope, of what is logged.

        Args:
            microbatches: what `microbatch` returned, in the order of their tokens.

        Raises:
            ValueError: no microbatch, or something else.
        """
        return concatenate(self.context, microbatches)

    @contextlib.contextmanager
    def counting_pass(self) -> Iterator[None]:
        """Run the step's microbatches forward inside this block first: they count, and nothing else.

        With ``Accumulation(order="counting_pass")`` the counts of the whole step are then known before its
        first backward. Use the same parameters and random state as in the step itself.

        Raises:
            RuntimeError: another order was configured.
        """
        if self.accumulation.order != "counting_pass":
            raise RuntimeError(
                f"a counting pass was not declared (order={self.accumulation.order!r}): its tokens would count "
                "twice; attach with Accumulation(order='counting_pass')"
            )
        self.ledger.counting = self.context.counting = True
        try:
            with torch.no_grad():
                yield
        except BaseException:
            self.ledger.discard_step()
            raise
        finally:
            self.ledger.counting = self.context.counting = False

    def follow(self, loss: Tensor) -> Tensor:
        """Identity on the microbatch's loss that makes injected gradients follow its scale.

        Wrap the loss before the trainer scales it: ``scaler.scale(balancer.follow(loss) / M).backward()``.
        Whatever factor reaches the loss in backward (a `torch.amp.GradScaler`, the division by M) then
        also reaches the injected gradients. Follow every microbatch's loss of a step, or none: a backward
        that is not followed takes the factor seen last in the step.

        Args:
            loss: scalar loss of the microbatch.

        Returns:
            The same value.

        Raises:
            ValueError: with gradient accumulation, if `GradReduction.microbatches` does not say whether
                the trainer divides by the number of microbatches.
        """
        if self.losses == "returned":
            raise ValueError(
                "follow() is for losses that are injected; with losses='returned' scale them with the loss that "
                "they are added to"
            )
        if self.ledger.num_microbatches > 1 and self.reduction.microbatches is None:
            raise ValueError(
                "follow() with gradient accumulation must know what the loss is: attach with "
                "GradReduction(microbatches='mean') if it is the mean of its microbatch and the trainer divides "
                "it by the number of microbatches, or 'sum' if it is already a share of the step's loss"
            )
        out = Follow.apply(loss, self.context, self.ledger)
        assert isinstance(out, Tensor)
        return out

    # ---------------------------------------------------------------- end of a step

    def finalize(self) -> StepLosses:
        """Balance loss, z-loss and tokens per expert of the whole step, with one collective; after its forwards.

        With ``losses="returned"`` they carry the gradient, and the caller adds them to its own loss:

            losses = balancer.finalize()
            (loss + losses.balance_loss + losses.z_loss).backward()

        The gradient is bit for bit the one that is injected otherwise. Each rank's is of its own tokens, so that
        ranks are reduced as for the caller's loss (`GradReduction`). With "injected" they are numbers to look at.
        May be called again before `step`; several ranks that share a step call it together.

        Raises:
            RuntimeError: no training forward, or not all of the step's, have run; or losses are injected and this
                step is none that ``measure_every`` measures.
        """
        return finalize(self.ledger)

    @torch.no_grad()
    def step(self) -> None:
        """End the optimiser step: move expert biases, keep what metrics need, start the next counts.

        With several ranks that share a step, all of them call it together.
        """
        if self.model is None:
            raise RuntimeError("step() of a balancer that was removed; attach again to go on balancing")
        self._snapshots = []
        if any(row.terms for row in self.ledger.rows) and self.ledger.numbers is None:
            warnings.warn(
                "balancer.step() ends a step whose losses nobody asked for: with losses='returned' gradients reach "
                "the model only if balancer.finalize()'s losses are added to the loss before its backward",
                stacklevel=3,
            )
        numbers = self.ledger.finish_step()
        for layer, row, measured in zip(self.layers, self.ledger.rows, numbers, strict=True):
            if row.counts_AE is None or row.num_tokens is None:
                continue
            counts_E = row.counts_AE[0]
            bias = layer.router.expert_bias
            moves = layer.bias is not None and layer.bias.enabled and not self.bias_frozen
            if moves and self.bias_rule is not None and layer.bias is not None and bias is not None:
                # Casting the model after attach() casts its buffers as well.
                check_bias_dtype(row.name, bias, self.bias_rule)
                speed = self.bias_rule.speed(self.num_steps)
                change_E = self.bias_rule.update(
                    bias.float(), counts_E, speed, layer.bias.state, row.statistic, row.top_k
                )
                layer.router.add_to_expert_bias(change_E)
            elif row.statistic is not None:
                row.statistic.clear()
            self._snapshots.append(layer.snapshot(row, measured, self.ledger.count_error(row)))
        if self.layers and not self._snapshots:
            warnings.warn(
                "balancer.step() ends a step in which no training forward was counted; is the model in eval mode, "
                "is step() called twice, or did a compiled model run before attach()?",
                stacklevel=3,
            )
        self._declared, self._plan = self.ledger.declared, self.ledger.plan
        self.ledger.close_step()
        self.context.current = None  # its masks would be held until the next forward
        self.num_steps += 1
        self._arm()

    def discard_step(self) -> None:
        """Forget the forwards since the last `step`: for a step that was abandoned, say out of memory.

        With several ranks that share a step, only if all of them abandoned it at the same forward: sums that one
        rank has started are waited for on the others.
        """
        self.ledger.discard_step()
        # A forward that failed has left its microbatch behind.
        self.context.running, self.context.current = False, None

    def _arm(self) -> None:
        every = self.measure_every
        self.ledger.logging = every > 0 and (self.num_steps + 1) % every == 0
        self.ledger.measuring = self.ledger.logging or self.losses == "returned"

    def metrics(self) -> dict[str, Any]:
        """Numbers of the step that `step` ended last; see `trimtab.metrics.summarize`. Reads the device.

        Warns if declared totals of the step were not what was counted, or if microbatches differed in size
        and nobody declared the totals that the objectives need.
        """
        needed = {name for objective in self.objectives for name in objective.totals}
        declared = {name: getattr(self._declared, name) for name in needed}
        check_totals(self._snapshots, declared, complete=self._plan.counts_are_complete)
        coefs = {objective.name: objective.coef for objective in self.objectives}
        return summarize(self._snapshots, coefs)

    # ---------------------------------------------------------------- bias and state

    def freeze_bias(self, frozen: bool = True, *, layers: Sequence[str] | None = None) -> None:
        """Stop (or resume) bias updates; counting and losses go on.

        Args:
            frozen: whether biases stay as they are.
            layers: name patterns of the routers meant, as in `fnmatch`; None for all, whatever was said of
                single ones.

        Raises:
            ValueError: no balanced bias matches.
        """
        if layers is None:
            self.bias_frozen = frozen
            return
        biases = [
            layer.bias
            for layer in self.layers
            if layer.bias is not None and any(fnmatch(layer.router.canonical_name, p) for p in layers)
        ]
        if not biases:
            raise ValueError(f"no router with bias balancing matches layers={tuple(layers)}")
        for bias in biases:
            bias.enabled = not frozen

    def state_dict(self) -> dict[str, Any]:
        """What a bitwise resumption needs beside the model: prior counts, momenta, running loads, step.

        Expert biases are buffers of the model and in its own state dict. Take it between steps.

        Raises:
            RuntimeError: in the middle of a step.
        """
        if self.ledger.in_step:
            raise RuntimeError("state_dict() belongs between steps; call balancer.step() first")
        layers = save_layers(self.layers, self.ledger.rows)
        return {"num_steps": self.num_steps, "bias_frozen": self.bias_frozen, "layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state belongs to a model with other MoE layers.
        """
        load_layers(self.layers, self.ledger.rows, state["layers"])
        self.num_steps, self.bias_frozen = state["num_steps"], state["bias_frozen"]
        self._arm()
