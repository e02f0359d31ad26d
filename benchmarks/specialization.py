"""Do experts specialise by domain? A small reproduction of the effect of the scope of a balance loss.

    python -m benchmarks.specialization --write

Qiu et al. 2025 (arXiv:2501.11873): a balance loss over micro-batches asks every microbatch, hence every domain, to
use all experts alike, and so prevents specialisation; over the global batch it asks it only of the mixture.
A byte-level language model with MoE layers is trained on microbatches of one domain each, once per arm and seed;
arms differ in balancing alone. Every (arm, seed) is one file: a stopped run continues where it was.

Shapes: B sequences, S length, T = B S tokens, D model, V vocabulary, E experts, K top-k, L MoE layers,
C domains (of text).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from benchmarks.common import (
    RESULTS,
    describe,
    machine,
    markdown_table,
    print_table,
    read_json,
    write_json,
    write_section,
)
from trimtab.experts import Experts
from trimtab.metrics import max_violation, mutual_information
from trimtab.moe import MoE
from trimtab.router import Router
from trimtab.train.corpus import EmbeddedCorpusConfig
from trimtab.train.data import DataConfig, TokenLoader
from trimtab.train.packing import IGNORED_LABEL, TokenBatch

VOCAB = 259


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, alike in all arms."""

    steps: int = 300
    num_microbatches: int = 8
    sequences: int = 2
    seq_len: int = 192
    layers: int = 3
    dim: int = 96
    heads: int = 4
    hidden_dim: int = 96
    num_experts: int = 16
    top_k: int = 2
    coef: float = 0.01
    bias_speed: float = 1e-2
    init_std: float = 0.1
    lr: float = 6e-3
    warmup: int = 20
    weight_decay: float = 0.1
    bytes_per_domain: int = 400_000
    validation_fraction: float = 0.25
    source: str = "embedded"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of balancing."""

    title: str
    score: str = "softmax"
    objective: Any = None  # (coef) -> Objective.Config
    order: str = "alternating"
    moves_bias: bool = False


ARMS = {
    "none": Arm(title="none"),
    "micro": Arm(
        title="micro-batch loss",
        objective=lambda coef: trimtab.BatchWise.Config(coef=coef, average_microbatches=True),
    ),
    "running": Arm(
        title="global-batch loss, running counts",
        objective=lambda coef: trimtab.GlobalBatch.Config(coef=coef, counts="running"),
    ),
    "prior": Arm(
        title="global-batch loss, prior counts",
        objective=lambda coef: trimtab.GlobalBatch.Config(coef=coef, counts="prior"),
    ),
    "exact": Arm(
        title="global-batch loss, exact counts",
        objective=lambda coef: trimtab.GlobalBatch.Config(coef=coef, counts="exact"),
        order="forward_first",
    ),
    "bias": Arm(title="expert bias (sigmoid), no loss", score="sigmoid", moves_bias=True),
}


class Attention(nn.Module):
    """Causal self-attention with learned positions left to the embedding."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BSD).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MoE layer, each normalised before and added to the stream."""

    def __init__(self, settings: Settings, score: str, expert_bias: bool) -> None:
        super().__init__()
        s = settings
        self.attention_norm, self.moe_norm = nn.RMSNorm(s.dim), nn.RMSNorm(s.dim)
        self.attention = Attention(s.dim, s.heads)
        router = Router.Config(
            dim=s.dim,
            num_experts=s.num_experts,
            top_k=s.top_k,
            score=score,
            normalize_top_k=True,
            expert_bias=expert_bias,
        )
        # 1 / sqrt(D): with the 0.02 of wide models, experts this small give next to nothing for 100 steps.
        experts = Experts.Config(
            dim=s.dim, hidden_dim=s.hidden_dim, num_experts=s.num_experts, init_std=s.init_std
        )
        self.moe = MoE.Config(router=router, experts=experts).build()

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.moe(self.moe_norm(x_BSD))


class ByteModel(nn.Module):
    """A byte-level language model. Packed documents see each other: positions count from the row's start."""

    def __init__(self, settings: Settings, arm: Arm) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, settings.dim)
        self.position = nn.Embedding(settings.seq_len, settings.dim)
        self.blocks = nn.ModuleList(
            Block(settings, arm.score, arm.moves_bias) for _ in range(settings.layers)
        )
        self.norm = nn.RMSNorm(settings.dim)
        self.head = nn.Linear(settings.dim, VOCAB, bias=False)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=settings.init_std)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BSD = self.embed(input_ids) + self.position.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


def loss_sum(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Sum of next-byte cross-entropies in nats."""
    logits_BSV = model(batch.input_ids_BS)[:, :-1]
    return F.cross_entropy(
        logits_BSV.flatten(0, 1),
        batch.labels_BS[:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )


class IdCounter:
    """Forward hook of one router: assignments of valid tokens per domain while a domain is set."""

    def __init__(self, num_domains: int, num_experts: int) -> None:
        self.counts_CE = torch.zeros(num_domains, num_experts, dtype=torch.int64)
        self.domain = 0
        self.valid_T: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        ids = output[2][self.valid_T].flatten()
        self.counts_CE[self.domain].scatter_add_(0, ids, torch.ones_like(ids))


@torch.no_grad()
def validate(model: ByteModel, loader: TokenLoader, settings: Settings) -> dict[str, Any]:
    """Validation loss, and what each domain's held-out bytes were routed to."""
    counters = [IdCounter(len(loader.domains), settings.num_experts) for _ in model.blocks]
    hooks = [
        block.moe.router.register_forward_hook(counter)
        for block, counter in zip(model.blocks, counters, strict=True)
    ]
    model.eval()
    total, labels = 0.0, 0
    for domain, batch in loader.validation_batches():
        for counter in counters:
            counter.domain, counter.valid_T = loader.domains.index(domain), batch.valid_mask_BS.flatten()
        total += loss_sum(model, batch).item()
        labels += batch.num_label_tokens
    for hook in hooks:
        hook.remove()
    model.train()
    counts_LCE = torch.stack([counter.counts_CE for counter in counters])
    return {
        "nats_per_byte": total / labels,
        "maxvio_global": max_violation(counts_LCE.sum(dim=1)).mean().item(),
        "maxvio_per_domain": max_violation(counts_LCE).mean().item(),
        "mutual_information": mutual_information(counts_LCE).mean().item(),
        "bytes": int(counts_LCE[0].sum()) // settings.top_k,
        "counts_LCE": counts_LCE.tolist(),
    }


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def attach(model: ByteModel, arm: Arm, settings: Settings) -> trimtab.Balancer:
    """The arm's balancing, or plain counting where it has none."""
    bias = None
    if arm.moves_bias:
        # Sign steps reach a bias of speed * steps at most: 1e-3 of long runs is too slow for 300 steps.
        schedule = ((0, 1.0), (settings.steps // 2, 1.0), (settings.steps, 0.0))
        bias = trimtab.Sign.Config(speed=settings.bias_speed, schedule=schedule)
    return trimtab.attach(
        model,
        [] if arm.objective is None else [arm.objective(settings.coef)],
        bias=bias,
        accumulation=trimtab.Accumulation(num_microbatches=settings.num_microbatches, order=arm.order),
        measure_every=0,
    )


def build_loader(settings: Settings, seed: int) -> TokenLoader:
    """Microbatches of one domain each; the held-out text does not depend on the seed."""
    kwargs: dict[str, Any] = {}
    if settings.source == "embedded":
        kwargs["embedded"] = EmbeddedCorpusConfig(bytes_per_domain=settings.bytes_per_domain)
    return DataConfig(
        seq_len=settings.seq_len,
        microbatch_size=settings.sequences,
        source=settings.source,
        domain_pure=True,
        seed=seed,
        validation_fraction=settings.validation_fraction,
        **kwargs,
    ).build()


def train(name: str, seed: int, settings: Settings, *, log: bool = True) -> dict[str, Any]:
    """Train one arm with one seed and evaluate it."""
    arm = ARMS[name]
    loader = build_loader(settings, seed)
    torch.manual_seed(seed)
    model = ByteModel(settings, arm).train()
    balancer = attach(model, arm, settings)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    maxvio, count_error, losses = [], [], []
    started = time.perf_counter()
    for step in range(settings.steps):
        batches = [next(loader) for _ in range(settings.num_microbatches)]
        num_labels = sum(batch.num_label_tokens for batch in batches)
        if arm.order == "forward_first":
            parts = [loss_sum(model, batch) / num_labels for batch in batches]
            for part in parts:
                part.backward()
        else:
            parts = []
            for batch in batches:
                parts.append(loss_sum(model, batch) / num_labels)
                parts[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balancer.step()
        losses.append(sum(part.item() for part in parts))
        metrics = balancer.metrics()
        maxvio.append(fmean(metrics["maxvio"]))
        if metrics["count_error"] is not None:
            count_error.append(max(metrics["count_error"]))
        if log and (step + 1) % 50 == 0:
            seconds = (time.perf_counter() - started) / (step + 1)
            print(
                f"{name} seed {seed} step {step + 1}: loss {losses[-1]:.3f}, maxvio {maxvio[-1]:.2f}, "
                f"{seconds:.2f} s/step, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    seconds_per_step = (time.perf_counter() - started) / settings.steps
    last = max(1, settings.steps // 3)
    return {
        "arm": name,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "machine": machine(),
        "domains": list(loader.domains),
        "epochs": loader.epoch,
        "seconds_per_step": seconds_per_step,
        "train_loss": losses,
        "maxvio_batch": fmean(maxvio[-last:]),
        "count_error": fmean(count_error[-last:]) if count_error else None,
        "validation": validate(model, loader, settings),
    }


# -------------------------------------------------------------------------------- results


MEASURES = {
    "mutual_information": "MI (bits)",
    "nats_per_byte": "val nats/byte",
    "maxvio_global": "MaxVio global",
    "maxvio_per_domain": "MaxVio per domain",
    "maxvio_batch": "MaxVio batch",
    "count_error": "max error of f",
}


def value(run: dict[str, Any], measure: str) -> float | None:
    """One measure of one run."""
    return run[measure] if measure in ("maxvio_batch", "count_error") else run["validation"][measure]


def spread(runs: Iterable[dict[str, Any]], measure: str) -> str:
    """Mean [lowest, highest] over seeds."""
    values = [v for v in (value(run, measure) for run in runs) if v is not None]
    if not values:
        return "–"
    return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def orderings(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Whether the published ordering of mutual information holds, pair by pair and seed by seed."""
    lines = []
    chain = [name for name in ("micro", "running", "prior", "exact") if name in runs]
    for low, high in itertools.pairwise(chain):
        pairs = _paired(runs[low], runs[high])
        holds = sum(a < b for a, b in pairs)
        lines.append(f"- MI {low} < {high}: {holds} of {len(pairs)} seeds")
    if "micro" in runs and "exact" in runs:
        pairs = _paired(runs["micro"], runs["exact"])
        factors = ", ".join(f"{b / a:.1f}" for a, b in pairs)
        lines.append(f"- MI exact / micro, by seed: {factors}")
    return lines


def _paired(
    low: list[dict[str, Any]], high: list[dict[str, Any]], measure: str = "mutual_information"
) -> list[tuple[float, float]]:
    by_seed = {run["seed"]: run for run in high}
    return [
        (value(run, measure), value(by_seed[run["seed"]], measure)) for run in low if run["seed"] in by_seed
    ]


def table_rows(runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """One row per arm."""
    return [[ARMS[name].title, *(spread(one, m) for m in MEASURES)] for name, one in runs.items()]


def markdown(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The section of RESULTS.md."""
    first = next(iter(runs.values()))[0]
    dates = [run["machine"]["date"] for one in runs.values() for run in one]
    # The runs may come from several calls; this one put them together.
    this_machine = {**first["machine"], "command": machine()["command"], "date": max(dates)}
    s = first["settings"]
    loads = [run["machine"]["load_average"][0] for one in runs.values() for run in one]
    seeds = sorted({run["seed"] for one in runs.values() for run in one})
    seconds = [run["seconds_per_step"] for one in runs.values() for run in one]
    return f"""## Specialisation by domain

{describe(this_machine, loads=loads)}
- Model: bytes, D={s["dim"]}, L={s["layers"]} MoE layers, E={s["num_experts"]}, K={s["top_k"]}, F={s["hidden_dim"]};
  {s["num_microbatches"]} domain-pure microbatches x {s["sequences"]} sequences of {s["seq_len"]} per step,
  {s["steps"]} steps, coef={s["coef"]}, AdamW lr={s["lr"]}; domains {", ".join(first["domains"])}
- {first["epochs"]:.2f} passes over the training text; {first["validation"]["bytes"]:,} held-out bytes;
  seeds {", ".join(map(str, seeds))} (initialisation and data order);
  {min(seconds):.2f} to {max(seconds):.2f} s per step, on a machine in use

Mean [lowest, highest] over seeds; MaxVio and MI are means over layers. MaxVio batch is of the training step,
mean of the last third; "max error of f" is |f used - f final| at its largest expert and read, same steps.

{markdown_table(["balancing", *MEASURES.values()], table_rows(runs))}

{chr(10).join(orderings(runs))}
"""


def figure(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plotly page: mutual information and domain MaxVio per arm, one dot per seed."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    shown = ("mutual_information", "maxvio_per_domain", "maxvio_global", "nats_per_byte")
    fig = make_subplots(
        rows=2, cols=2, subplot_titles=[MEASURES[m] for m in shown], shared_yaxes=True, vertical_spacing=0.15
    )
    for place, measure in enumerate(shown):
        for name, one in runs.items():
            fig.add_trace(
                go.Scatter(
                    x=[value(run, measure) for run in one],
                    y=[ARMS[name].title] * len(one),
                    mode="markers",
                    marker={"size": 11, "color": "#1f6f8b", "opacity": 0.75},
                    customdata=[run["seed"] for run in one],
                    hovertemplate="%{y}, seed %{customdata}: %{x:.3f}<extra></extra>",
                    showlegend=False,
                ),
                row=place // 2 + 1,
                col=place % 2 + 1,
            )
    fig.update_yaxes(autorange="reversed")
    fig.update_layout(
        template="plotly_white", height=640, title="One dot per seed", margin={"l": 220, "r": 30}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.write_html(path, include_plotlyjs=True)


def collect(
    arms: Iterable[str], seeds: Iterable[int], settings: Settings, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Finished runs of these arms and seeds with these settings."""
    wanted = dataclasses.asdict(settings)
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in arms:
        for seed in seeds:
            run = read_json(run_path(folder, name, seed))
            if run is not None and run["settings"] == wanted:
                runs.setdefault(name, []).append(run)
    return runs


def run_path(folder: Path, arm: str, seed: int) -> Path:
    """File of one run."""
    return folder / f"{arm}-seed{seed}.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=RESULTS / "specialization")
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md and the figure")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    settings = Settings(steps=args.steps)
    # Seeds outside: a stopped run has every arm for the seeds it finished.
    for seed in args.seeds:
        for name in args.arms:
            if not collect([name], [seed], settings, args.folder):
                write_json(run_path(args.folder, name, seed), train(name, seed, settings))
    runs = collect(args.arms, args.seeds, settings, args.folder)
    rows = table_rows(runs)
    print_table("Mean [lowest, highest] over seeds", ["balancing", *MEASURES.values()], rows)
    print("\n".join(orderings(runs)))
    if args.write:
        write_section("specialization", markdown(runs))
        figure(runs, RESULTS / "specialization.html")


if __name__ == "__main__":
    main()
