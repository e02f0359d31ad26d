"""What the invariance suite runs: few enough cases that every pair of settings meets in one of them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations, product
from typing import Any

from trimtab import (
    BatchWise,
    DeviceLevel,
    GlobalBatch,
    Objective,
    SequenceWise,
    Sign,
    ZLoss,
)
from trimtab.bias import BiasRule
from trimtab.parallel.mesh import Degrees

# Name: degrees. Every axis alone first, then what is combined in practice, up to eight ranks.
PLANS: dict[str, Degrees] = {
    "fsdp": Degrees(dp_shard=2),
    "replicate": Degrees(dp_replicate=2),
    "tp": Degrees(tp=2),
    "etp": Degrees(tp=2, etp=2),
    "cp": Degrees(cp=2),
    "ep": Degrees(dp_shard=2, ep=2),
    "pp": Degrees(pp=2),
    "ep_of_tp": Degrees(tp=2, ep=2),
    "ep_of_cp": Degrees(cp=2, ep=2),
    "cp4": Degrees(cp=4),
    "hsdp": Degrees(dp_replicate=2, dp_shard=2),
    "hsdp_ep": Degrees(dp_replicate=2, dp_shard=2, ep=2),
    "fsdp_tp": Degrees(dp_shard=2, tp=2),
    "fsdp_ep": Degrees(dp_shard=4, ep=2),
    "fsdp_cp": Degrees(dp_shard=2, cp=2),
    "cp_tp": Degrees(cp=2, tp=2),
    "fsdp_cp_ep": Degrees(dp_shard=2, cp=2, ep=2),
    "tp_ep_etp1": Degrees(dp_shard=2, tp=2, ep=4),
    "tp_ep_efsdp": Degrees(dp_shard=2, tp=2, ep=2),
    "tp_ep_etp2": Degrees(dp_shard=2, tp=2, ep=2, etp=2),
    "cp_tp_ep": Degrees(cp=2, tp=2, ep=2),
    "pp_fsdp": Degrees(pp=2, dp_shard=2),
    "pp_ep": Degrees(pp=2, dp_shard=2, ep=2),
    "pp_cp": Degrees(pp=2, cp=2),
    "pp_tp": Degrees(pp=2, tp=2),
    "pp_tp_ep": Degrees(pp=2, tp=2, ep=2),
    "hsdp_tp": Degrees(dp_replicate=2, dp_shard=2, tp=2),
    "fsdp_cp_tp_ep_etp2": Degrees(dp_shard=2, cp=2, tp=2, ep=4, etp=2),
    "pp_hsdp_ep": Degrees(pp=2, dp_replicate=2, dp_shard=2, ep=2),
    "pp_fsdp_tp_ep": Degrees(pp=2, dp_shard=2, tp=2, ep=4),
}
# Of each stage's forwards and backwards; stages per rank.
SCHEDULES = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2, "ZBVZeroBubble": 2, "DualPipeV": 2}
NO_SCHEDULE = "none"
FAMILIES = ("deepseek_v3", "qwen3_moe", "gpt_oss", "mixtral", "llama4")
LOSSES = ("sequence", "document", "batch", "global", "device", "z", "all")
# Valid tokens: all; rows end in padding; every row of every microbatch has another length, one has none.
DATA = ("full", "padded", "ragged")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One optimiser step of one model on several ranks.

    Args:
        plan: key of `PLANS`.
        family: transformers model.
        losses: one of `LOSSES`.
        schedule: pipeline schedule, or `NO_SCHEDULE`.
        data: which tokens are valid.
        accumulation: several microbatches per step.
        packed: rows hold several documents.
        checkpointing: layers are computed again in backward.
    """

    plan: str
    family: str
    losses: str
    schedule: str
    data: str
    accumulation: bool
    packed: bool
    checkpointing: bool

    def __str__(self) -> str:
        words = [self.plan, self.schedule, self.family, self.losses, self.data]
        words += [name for name in ("accumulation", "packed", "checkpointing") if getattr(self, name)]
        return "-".join(word for word in words if word != NO_SCHEDULE)

    @property
    def degrees(self) -> Degrees:
        """Ranks along each axis."""
        return PLANS[self.plan]

    @property
    def num_microbatches(self) -> int:
        """Microbatches of the step: enough for every schedule, or a number that halves badly."""
        return 4 if self.degrees.pp > 1 else 3 if self.accumulation else 1

    @property
    def num_layers(self) -> int:
        """Decoder layers: one for each of up to four pipeline stages."""
        return 4 if self.degrees.pp > 1 else 2

    @property
    def exact_counts(self) -> bool:
        """Whether every forward of the step runs before its first backward."""
        return self.num_microbatches == 1 or self.schedule == "GPipe"


FACTORS: dict[str, tuple[Any, ...]] = {
    "plan": tuple(PLANS),
    "family": FAMILIES,
    "losses": LOSSES,
    "schedule": (NO_SCHEDULE, *SCHEDULES),
    "data": DATA,
    "accumulation": (False, True),
    "packed": (False, True),
    "checkpointing": (False, True),
}
Pair = tuple[str, Any, str, Any]


def is_possible(values: dict[str, Any]) -> bool:
    """Whether these settings go together; settings that are not given are no obstacle."""
    if "plan" in values:
        pipelined = PLANS[values["plan"]].pp > 1
        if "schedule" in values and pipelined != (values["schedule"] != NO_SCHEDULE):
            return False
        if pipelined and not values.get("accumulation", True):
            return False
    if values.get("schedule", NO_SCHEDULE) != NO_SCHEDULE and not values.get("accumulation", True):
        return False
    # A loss of each document says nothing new where rows hold one.
    return not (values.get("losses") == "document" and not values.get("packed", True))


def pairs_of(values: dict[str, Any]) -> Iterator[Pair]:
    """Every pair of settings of one case."""
    for (first, a), (second, b) in combinations(values.items(), 2):
        yield first, a, second, b


def settings(case: Case) -> dict[str, Any]:
    """The factors of a case."""
    return {field.name: getattr(case, field.name) for field in fields(case)}


@cache
def covering_cases(seed: int = 0) -> tuple[Case, ...]:
    """Cases that together hold every possible pair of settings, in order of their plans.

    Greedy: each case begins with a pair that is still missing, and every further setting is one that adds
    most missing pairs.
    """
    draw = random.Random(seed)
    missing: dict[Pair, None] = {}
    for first, second in combinations(FACTORS, 2):
        for a, b in product(FACTORS[first], FACTORS[second]):
            if is_possible({first: a, second: b}):
                missing[first, a, second, b] = None
    cases: list[Case] = []
    while missing:
        best: dict[str, Any] = {}
        best_new = 0
        for _ in range(4):
            values = _complete(next(iter(missing)), missing, draw)
            new = sum(pair in missing for pair in pairs_of(values))
            if new > best_new:
                best, best_new = values, new
        for pair in pairs_of(best):
            missing.pop(pair, None)
        cases.append(Case(**best))
    order = list(PLANS)
    return tuple(sorted(cases, key=lambda case: (case.degrees.world_size, order.index(case.plan))))


def _complete(pair: Pair, missing: dict[Pair, None], draw: random.Random) -> dict[str, Any]:
    first, a, second, b = pair
    values = {first: a, second: b}
    # Factors with many values first: few of their pairs meet by chance.
    for name in sorted(FACTORS, key=lambda name: (-len(FACTORS[name]), draw.random())):
        if name in values:
            continue
        possible = [value for value in FACTORS[name] if _extends(values, name, value)]
        gains = [_gain(values, name, value, missing) for value in possible]
        most = max(gains)
        values[name] = draw.choice([v for v, gain in zip(possible, gains, strict=True) if gain == most])
    return {name: values[name] for name in FACTORS}


def _extends(values: dict[str, Any], name: str, value: Any) -> bool:
    return is_possible({**values, name: value})


def _gain(values: dict[str, Any], name: str, value: Any, missing: dict[Pair, None]) -> int:
    order = list(FACTORS)
    new = 0
    for other, known in values.items():
        if order.index(other) < order.index(name):
            new += (other, known, name, value) in missing
        else:
            new += (name, value, other, known) in missing
    return new


def compiled_cases() -> list[Case]:
    """Few, because compiling takes seconds: each compiles another boundary between ranks."""
    rows = [
        ("fsdp", "mixtral", NO_SCHEDULE, True),
        ("ep", "deepseek_v3", NO_SCHEDULE, False),
        ("etp", "llama4", NO_SCHEDULE, False),
        ("cp", "gpt_oss", NO_SCHEDULE, False),
        ("pp", "qwen3_moe", "1F1B", False),
        ("pp", "mixtral", "ZBVZeroBubble", False),
        # FSDP gathers parameters inside of layers, where graphs end.
        ("fsdp_ep", "deepseek_v3", NO_SCHEDULE, False),
        ("fsdp_tp", "qwen3_moe", NO_SCHEDULE, True),
        ("cp_tp_ep", "mixtral", NO_SCHEDULE, False),
    ]
    common: dict[str, Any] = {"losses": "all", "data": "ragged", "packed": True}
    return [
        Case(
            plan=plan,
            family=family,
            schedule=schedule,
            checkpointing=checkpointing,
            accumulation=PLANS[plan].pp > 1,
            **common,
        )
        for plan, family, schedule, checkpointing in rows
    ]


# ------------------------------------------------------------------ what the names mean


def objectives(case: Case) -> list[Objective.Config]:
    """The losses of a case. Coefficients are large: each must be seen in the gradient."""
    counts: Any = "exact" if case.exact_counts else "running"
    table: dict[str, Objective.Config] = {
        "sequence": SequenceWise.Config(coef=0.3, assignments="unbiased"),
        "document": SequenceWise.Config(coef=0.3, unit="document", weighting="token"),
        "batch": BatchWise.Config(coef=0.2, average_microbatches=True),
        "global": GlobalBatch.Config(coef=0.4, counts=counts),
        "device": DeviceLevel.Config(coef=0.3, num_devices=4),
        "z": ZLoss.Config(coef=0.05),
    }
    if case.losses != "all":
        return [table[case.losses]]
    return [config for name, config in table.items() if name != "document" or case.packed]


def bias_rule(case: Case) -> BiasRule.Config | None:
    """The rule for expert biases, of the family that has them."""
    return Sign.Config(speed=0.01) if case.family == "deepseek_v3" else None


def model_settings(family: str, num_layers: int) -> dict[str, Any]:
    """Configuration beside that of `tests.hf_models`: what goes wrong where positions are not this rank's."""
    common: dict[str, Any] = {"num_layers": num_layers, "experts_implementation": "eager"}
    special: dict[str, dict[str, Any]] = {
        # The first layer is dense: with pipeline stages, one stage has no router.
        "deepseek_v3": {"first_k_dense_replace": 1},
        "gpt_oss": {"sliding_window": 5},
        # Chunks of the row, one layer without rotary angles whose queries are scaled by position.
        "llama4": {
            "attention_chunk_size": 6,
            "no_rope_layers": [1 - layer % 2 for layer in range(num_layers)],
            "floor_scale": 3,
        },
    }
    return common | special.get(family, {})
