"""The model on its ranks: built, divided, balanced, and run over the microbatches of a step.

Legend: M microbatches of an optimiser step; B rows, S tokens of a row, s of them on this rank.

Order of construction, for each part of the model that this rank holds (one, or several pipeline stages):
the model without values -> experts on trimtab's kernels -> activation checkpointing -> attention and experts
divided over tp, cp, ep, etp -> adapters, and what is frozen -> balancer -> torch.compile of layers -> FSDP ->
memory and values of this rank's part, the same as in one process. Whatever the plan, the loss of a step is the sum
over its label tokens on all ranks, divided by their number, and gradients are summed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import trimtab
from trimtab.balancer import Balancer
from trimtab.integrations.attention_masks import position_arguments
from trimtab.integrations.discovery import FoundRouter, discover
from trimtab.integrations.empty import allocate, to_device
from trimtab.integrations.experts import use_trimtab_experts
from trimtab.integrations.mtp import mtp_layers
from trimtab.integrations.parallel import decoder_layers, parallelize
from trimtab.integrations.stages import call_stage, needs_one_backward, split_into_stages
from trimtab.integrations.vision import image_arguments, tower_blocks
from trimtab.microbatch import Context
from trimtab.parallel.fsdp import gathers_inside_layers, shard_parameters
from trimtab.parallel.mesh import Mesh
from trimtab.parallel.pipeline import Pipeline
from trimtab.parallel.shared_parameters import SharedParameters
from trimtab.parallel.tokens import TokenShard
from trimtab.parallel.zero_bubble import zero_bubble_compile_settings
from trimtab.ranks import TokenRanks
from trimtab.scale import GradReduction
from trimtab.train.checkpoint_state import canonical_name
from trimtab.train.compute import autocast, keep_routers_in_float32
from trimtab.train.config import TrainConfig
from trimtab.train.evaluation import next_token_targets, token_loss
from trimtab.train.initial_weights import draw_weights
from trimtab.train.mtp import mtp_inputs, mtp_of
from trimtab.train.packing import TokenBatch
from trimtab.train.parallelism import ResolvedRun
from trimtab.train.step_losses import Logits, StepLosses, label_totals, summed_losses

# Called before each forward with the part's number and its microbatch.
Listener = Callable[[int, TokenBatch], None]
# What balancers are told of a step.
_DECLARED = ("num_counted_tokens", "num_sequences", "num_documents")


@dataclass(slots=True)
class Part:
    """One part of the model on this rank.

    Args:
        stage: pipeline stage; 0 without a pipeline.
        module: the part, with the whole model's names.
        routers: its routers, which may be none.
        balancer: of those routers; None if there are none.
    """

    stage: int
    module: Any
    routers: list[FoundRouter]
    balancer: Balancer | None


class Engine:
    """The model of a run on this rank.

    Args:
        config: the run.
        run: what it comes to on this many ranks.
        mesh: where ranks are; None for one process.
        device: of this rank.
        vocab_size: rows of the embedding.
        draw: give parameters their initial values; else they have none until something is read into them.

    Raises:
        ValueError: the model cannot be divided as asked.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: ResolvedRun,
        *,
        mesh: Mesh | None,
        device: torch.device,
        vocab_size: int,
        draw: bool = True,
    ) -> None:
        self.config, self.run, self.mesh, self.device = config, run, mesh, device
        degrees = run.degrees
        self.shard = TokenShard.make(
            config.data.seq_len,
            cp=degrees.cp,
            cp_rank=0 if mesh is None else mesh.rank("cp"),
            tp=degrees.tp,
            tp_rank=0 if mesh is None else mesh.rank("tp"),
        ).to(device)
        self.listener: Listener | None = None
        plan = run.pipeline
        self.num_stages = 1 if plan is None else plan.num_stages
        stages = (0,) if plan is None or mesh is None else plan.stages_of(mesh.rank("pp"))
        self.parts = [self._build(stage, vocab_size) for stage in stages]
        if device.type != "meta":
            self._fill(draw)
        if mesh is not None:
            # What is random in the model is drawn by each rank for its own tokens.
            torch.manual_seed(config.training.seed + 1 + dist.get_rank())
        #: This rank's part of the last step's loss of multi-token prediction, without its coefficient.
        self.mtp_loss: Tensor | None = None
        self.pipeline: Pipeline | None = None
        self.shared: SharedParameters | None = None
        if plan is not None and mesh is not None:
            width = self.parts[0].module.config.get_text_config().hidden_size
            self.pipeline = Pipeline(
                self.modules,
                plan,
                mesh,
                hidden_shape=(run.microbatch_size, len(self.shard.own_s), width),
                dtype=next(self.parameters()).dtype,
                one_backward=[part.stage for part in self.parts if needs_one_backward(part.module)],
            )
            self.shared = SharedParameters({part.stage: part.module for part in self.parts}, plan, mesh)

    # ---------------------------------------------------------------- construction

    def _build(self, stage: int, vocab_size: int) -> Part:
        config, mesh = self.config, self.mesh
        # For families that are built with values, which are then those of one process.
        torch.manual_seed(config.training.seed)
        model = config.model.build(vocab_size=vocab_size, seq_len=config.data.seq_len)
        use_trimtab_experts(model)
        routers = discover(model)
        if self.num_stages > 1:
            model = split_into_stages(model, num_stages=self.num_stages, stage=stage)
            mine = set(model.modules())
            routers = [router for router in routers if router.module in mine]
        contexts: list[Context] = []
        config.activation_checkpoint.apply(model, contexts)
        to_device(model, self.device)
        divided = None if mesh is None else parallelize(model, mesh)
        config.finetune.apply(model, routers, mesh=mesh, divided=divided)
        balancer = self._attach(model) if routers else None
        if balancer is not None:
            contexts.append(balancer.context)
        if config.training.mixed_precision != "none":
            keep_routers_in_float32([router.module for router in routers], self.device)
        layers = decoder_layers(model)
        if mesh is None or divided is None:
            config.compile.apply(layers)
        else:
            inner = gathers_inside_layers(mesh, experts=divided.experts, heads=divided.heads)
            config.compile.apply(layers, whole=not inner)
            shard_parameters(
                model,
                mesh,
                layers=[*layers, *tower_blocks(model)],
                experts=divided.experts,
                heads=divided.heads,
                reshard_after_forward=self.num_stages == 1,
            )
        return Part(stage, model, routers, balancer)

    def _fill(self, draw: bool) -> None:
        """Give parameters that were built without values their memory, on this rank's own part of them alone."""
        named = [entry for module in self.modules for entry in module.named_parameters()]
        empty = {canonical_name(name) for name, parameter in named if parameter.is_meta}
        for module in self.modules:
            allocate(module, self.device)
        if draw and empty:
            draw_weights(self.modules, seed=self.config.training.seed, wanted=empty.__contains__)

    def _attach(self, model: nn.Module) -> Balancer:
        config, mesh, degrees = self.config, self.mesh, self.run.degrees
        ranks = TokenRanks()
        if mesh is not None:
            ranks = TokenRanks(tokens=mesh.group("tokens"), sequence=mesh.group("sequence"))
        return trimtab.attach(
            model,
            config.model.balancing.objectives,
            bias=config.model.balancing.bias_for(config.training.steps),
            accumulation=self.run.accumulation,
            reduction=GradReduction(ranks="sum", num_ranks=degrees.data * degrees.sequence),
            ranks=ranks,
            measure_every=config.metrics.log_interval,
        )

    # ---------------------------------------------------------------- what the run sees

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Process-wide settings that the plan needs, around all steps."""
        plan = self.run.pipeline
        if plan is not None and plan.schedule.splits_backward and self.config.compile.enable:
            return zero_bubble_compile_settings()
        return contextlib.nullcontext()

    @property
    def modules(self) -> list[nn.Module]:
        """Parts of the model on this rank."""
        return [part.module for part in self.parts]

    @property
    def balancers(self) -> list[Balancer]:
        """Balancers of the parts that have routers."""
        return [part.balancer for part in self.parts if part.balancer is not None]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of all parts."""
        for part in self.parts:
            yield from part.module.parameters()

    @property
    def copies(self) -> frozenset[nn.Parameter]:
        """Those of `parameters` that are replicas of an earlier stage's."""
        return frozenset() if self.shared is None else self.shared.copies

    # ---------------------------------------------------------------- a step

    def totals(self, batches: Sequence[TokenBatch]) -> dict[str, int]:
        """Label tokens, tokens, sequences and documents of a step on all ranks; label tokens of each MTP depth.

        Args:
            batches: of this data rank, best on the host: on a device their sizes would be waited for.
        """
        labels = label_totals(batches, mtp_of(self.config.model))
        names = [*labels, "num_tokens", *_DECLARED]
        local = [
            *labels.values(),
            sum(batch.num_tokens for batch in batches),
            *map(sum, zip(*map(self._num_counted, batches), strict=True)),
        ]
        if self.mesh is not None and (group := self.mesh.group("tokens")) is not None:
            # Ranks that share sequences have read the same rows, and one of them speaks.
            speaks = int(self.mesh.rank("sequence") == 0)
            # Sizes come from the host and go there; by way of the device they would be waited for.
            summed = torch.tensor(local) * speaks
            dist.all_reduce(summed, group=group)
            local = summed.tolist()
        return dict(zip(names, local, strict=True))

    def train_step(
        self, batches: Sequence[TokenBatch], totals: dict[str, int], *, mtp_coef: float | None = None
    ) -> Tensor:
        """Forwards and backwards of a step's microbatches; gradients are left on the parameters.

        Args:
            batches: of this data rank.
            totals: from `totals`.
            mtp_coef: of multi-token prediction in this step; None: that of the configuration's first step.

        Returns:
            () this rank's part of the step's loss, to be summed over all ranks. That of multi-token prediction is
            no part of it; it is in `mtp_loss`.
        """
        for balancer in self.balancers:
            balancer.start_step(
                num_tokens=totals["num_counted_tokens"],
                num_sequences=totals["num_sequences"],
                num_documents=totals["num_documents"],
            )
        losses = StepLosses(self.loss, totals, self.shard.own_s, mtp_of(self.config.model), mtp_coef)
        self._run_microbatches(batches, losses)
        self.mtp_loss = losses.mtp
        return losses.main

    def _run_microbatches(self, batches: Sequence[TokenBatch], losses: StepLosses) -> None:
        """Forwards and backwards, in the order that the run has."""
        if self.pipeline is not None:
            self.pipeline.step(
                self._caller(batches), lambda output, number: losses.share(output, batches[number])
            )
            assert self.shared is not None
            self.shared.sum_gradients()
            return
        if self.run.order == "counting_pass":
            self._count(batches)
        if self.run.order == "forward_first":
            shares = [losses.share(self.forward(self.parts[0], batch), batch) for batch in batches]
            for number, share in enumerate(shares):
                self._sync_gradients(number == len(shares) - 1)
                share.backward()
        else:
            for number, batch in enumerate(batches):
                self._sync_gradients(number == len(batches) - 1)
                losses.share(self.forward(self.parts[0], batch), batch).backward()

    def _caller(self, batches: Sequence[TokenBatch]) -> Callable[[nn.Module, int, Tensor | None], Logits]:
        """How a pipeline runs one microbatch through one of its parts."""
        part_of = {id(part.module): part for part in self.parts}
        return lambda module, number, hidden: self.forward(part_of[id(module)], batches[number], hidden)

    def _count(self, batches: Sequence[TokenBatch]) -> None:
        """Run the step's forwards once without gradients, so that its counts are known."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), contextlib.ExitStack() as stack:
            for balancer in self.balancers:
                stack.enter_context(balancer.counting_pass())
            for batch in batches:
                self.forward(self.parts[0], batch)

    def _sync_gradients(self, sync: bool) -> None:
        """Sum gradients over ranks in the next backward, or only keep them: summing once is enough."""
        for module in self.modules:
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(sync)

    def _counted(self, batch: TokenBatch) -> Tensor:
        """(B, S) bool tokens that balancing counts."""
        if batch.images is None or self.config.model.balancing.visual_tokens == "count":
            return batch.valid_mask_BS
        return batch.valid_mask_BS & ~batch.images.visual_mask_BS

    def _num_counted(self, batch: TokenBatch) -> tuple[int, int, int]:
        """How many tokens balancing counts, and the sequences and documents that have any."""
        mask_BS = self._counted(batch)
        num_rows = int(mask_BS.any(dim=1).sum())
        if mask_BS is batch.valid_mask_BS:
            return batch.num_tokens, num_rows, batch.num_sequences
        return int(mask_BS.sum()), num_rows, len(batch.document_ids_BS()[mask_BS].unique())

    def loss(self, logits_BsV: Tensor, batch: TokenBatch) -> Tensor:
        """Sum over this rank's label tokens of their loss."""
        targets_BS = next_token_targets(batch.labels_BS)
        return token_loss(logits_BsV, targets_BS[:, self.shard.own_s])

    def forward(self, part: Part, batch: TokenBatch, hidden_BsD: Tensor | None = None) -> Logits:
        """Run one part on one microbatch.

        Args:
            part: the part.
            batch: the whole rows; this rank takes its tokens of them.
            hidden_BsD: output of the stage before; None for the first.

        Returns:
            (B, s, D) hidden states, or of the last stage (B, s, vocabulary) logits, beside those of multi-token
            prediction if it has that.
        """
        if self.listener is not None:
            self.listener(self.parts.index(part), batch)
        described: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if part.balancer is not None:
            tokens_T = None if self.shard.is_whole else self.shard.flat_index(len(batch.input_ids_BS))
            described = part.balancer.microbatch(
                valid_mask=self._counted(batch),
                cu_seqlens=batch.cu_seqlens_G,
                num_documents=len(batch.cu_seqlens_G) - 1,  # each row starts one
                tokens=tokens_T,
            )
        shard, own_s = self.shard, self.shard.own_s
        x = hidden_BsD
        if x is None:
            x = batch.input_ids_BS if shard.is_whole else batch.input_ids_BS[:, own_s]
        dtype = None if hidden_BsD is None else hidden_BsD.dtype
        arguments = position_arguments(part.module, batch.position_ids_BS, shard, dtype=dtype)
        if (images := batch.images) is not None:
            shown = (images.patches_PX, images.grids_I3) if hidden_BsD is None else ()
            arguments |= image_arguments(batch.position_ids_BS, images.positions_3BS, *shown)
        depths = len(mtp_layers(part.module))
        if depths:
            # Shifted in whole rows: a token's successor may be on another rank.
            arguments["mtp_input_ids"] = mtp_inputs(batch, depths)[..., own_s]
        with described, autocast(self.config.training.mixed_precision, self.device):
            output = call_stage(part.module, x, **arguments)
        return output if depths else output.logits

    @property
    def num_losses(self) -> int:
        """The main model's loss, and that of each depth of multi-token prediction."""
        mtp = mtp_of(self.config.model)
        return 1 if mtp is None else 1 + mtp.num_layers

    @torch.no_grad()
    def evaluate(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Of each microbatch (num_losses, 2): each loss, summed over this rank's label tokens, and their number.

        Empty in a pipeline on ranks that do not hold the last stage.
        """
        if self.pipeline is not None:
            shapes = [(len(batch.input_ids_BS), len(self.shard.own_s)) for batch in batches]
            losses = self.pipeline.evaluate(
                self._caller(batches),
                lambda output, number: summed_losses(output, batches[number], self.shard.own_s),
                shapes,
            )
            return losses or []
        outputs = (self.forward(self.parts[0], batch) for batch in batches)
        return [summed_losses(*pair, self.shard.own_s) for pair in zip(outputs, batches, strict=True)]
