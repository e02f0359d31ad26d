"""Writes support.md by running it: `python -m docs.generate_support`.

It runs every family under every plan of `tests.models.parity.PLANS`; `--families` and `--plans` run a part, and
write nothing.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.parity import COMPILE, PLANS, TOLERANCE, TOLERANCE_FLOAT32, Cell, Plan, run_cell
from tests.models.sizes import families
from tests.parallel.pool import Ranks

PAGE = Path(__file__).with_name("support.md")
# Of dynamo, which looks at .grad of every input of a compiled layer, and of torch's own decompositions.
WARNINGS = (
    ("error",),
    ("ignore", "The .grad attribute of a Tensor that is not a leaf"),
    ("ignore", ".*autograd.function.Function.* should not be instantiated", DeprecationWarning),
    ("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning),
)
Cells = dict[tuple[str, str], Cell]

HEAD = """# Support matrix

<!-- Written by docs/generate_support.py, which runs what it tells. Do not edit. -->

Which family trains under which plan. Each cell is one optimiser step of the trainer's engine: four microbatches,
accumulated or in a pipeline, of a family's debug configuration at sizes of a test, with balancing off. It is
compared with the stock class of transformers in one process, which runs its own eager experts, each microbatch
whole and each document by itself: the **logits** of every token, the **loss**, and the **gradient** of every
parameter. Rows end in padding; where a plan allows it they hold several documents, and those of families with a
vision tower hold images.

- **✓** and a number: they agree; the number is the largest error of any of them, relative to the largest element of
  its tensor. Everything is computed in float64, and {tolerance:.0e} would fail. Under *compile* norms, routers,
  softmax and linear attention compute in float32, and what fails is more than 1e-5, or than twice what the stock
  model itself loses in float32 at these sizes.
- **✓** with a note: it agrees with rows of one document, and packed rows are refused for the reason given.
- **–**: refused before anything starts, for the reason given. Nothing fails later than that.

Made on {date} with torch {torch} and transformers {transformers}, on CPU (gloo), in some minutes,
by `python -m docs.generate_support`. `tests/models/test_support.py` runs some of the cells again, and checks that
all are refused or accepted as it says here.

## Families and plans

"""

LEGEND = """
| Plan | Processes | What it is |
|---|---|---|
"""

REFUSED = """
## Refused

What the trainer says, on the command line before any process is started:

"""

AFTER = """
## What this does not say

Plans are combined freely: `tests/parallel/test_invariance.py` runs 30 of them, to 8 processes, with every kind of
loss. Layers are compiled with the backend `{backend}`, which traces and decomposes them as
Inductor does, and generates no code. What each plan divides, and what it costs, is in
[Parallelism](parallelism.md).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells, and write the page if they are all and right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=families(), choices=families())
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of a cell")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells: Cells = {}
    ranks = Ranks(WARNINGS)
    try:
        for family in options.families:
            for name in options.plans:
                start = time.monotonic()
                cell = cells[family, name] = run_cell(ranks, family, PLANS[name], timeout=options.timeout)
                seconds = time.monotonic() - start
                print(f"{family:14} {name:10} {seconds:6.1f} s  {told(cell)}", flush=True)
    finally:
        ranks.close()
    wrong = [f"{family} under {name}" for (family, name), cell in cells.items() if is_wrong(cell)]
    if wrong:
        print(f"not right: {', '.join(wrong)}; support.md is left as it was")
        return 1
    if len(cells) == len(PLANS) * len(families()):
        PAGE.write_text(page(cells), encoding="utf-8")
        print(f"wrote {PAGE}")
    return 0


def is_wrong(cell: Cell) -> bool:
    """Whether a cell is neither refused nor right."""
    return cell.refused is None and not cell.passed


def told(cell: Cell) -> str:
    """A cell as a line of progress."""
    if cell.refused is not None:
        return f"refused: {cell.refused}"
    if cell.errors is None:
        return f"FAILED: {str(cell.failure).partition(chr(10))[0]}"
    errors = cell.errors
    name, worst = max(errors.grads.items(), key=lambda entry: entry[1])
    line = f"logits {errors.logits:.0e}, loss {errors.loss:.0e}, gradients {worst:.0e}"
    return line if cell.passed else f"WRONG: {line} ({name}), allowed {cell.tolerance:.0e}"


def page(cells: Cells) -> str:
    """The whole page."""
    notes: dict[str, list[tuple[str, str]]] = {}
    for (family, name), cell in cells.items():
        if (reason := cell.refused or cell.whole_rows) is not None:
            notes.setdefault(reason, []).append((family, PLANS[name].title))
    numbers = {reason: number for number, reason in enumerate(notes, start=1)}
    rows = [[f"`{family}`", *(mark(cells[family, name], numbers) for name in PLANS)] for family in families()]
    head = HEAD.format(
        tolerance=TOLERANCE,
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
    )
    return "".join(
        [
            head,
            table(["Family", *(plan.title for plan in PLANS.values())], rows),
            LEGEND,
            *(f"| {plan.title} | {plan.world_size} | {meaning(plan)} |\n" for plan in PLANS.values()),
            REFUSED,
            *(f'{numbers[reason]}. {cells_of(where)}: "{reason}"\n' for reason, where in notes.items()),
            AFTER.format(backend=COMPILE.backend),
            *(
                f"\nIn float32 the stock model of `{family}` is {cell.tolerance / 2:.0e} from itself in float64 at "
                f"these sizes, whence its number under *{PLANS[name].title}*.\n"
                for (family, name), cell in cells.items()
                if cell.tolerance > TOLERANCE_FLOAT32
            ),
        ]
    )


def cells_of(where: Iterable[tuple[str, str]]) -> str:
    """Families and the plans that one reason refuses for them."""
    plans: dict[str, list[str]] = {}
    for family, title in where:
        plans.setdefault(family, []).append(title)
    return "; ".join(f"`{family}` under {', '.join(titles)}" for family, titles in plans.items())


def mark(cell: Cell, numbers: dict[str, int]) -> str:
    """What stands in the table for a cell."""
    reason = cell.refused or cell.whole_rows
    note = "" if reason is None else f" [{numbers[reason]}](#refused)"
    return f"–{note}" if cell.errors is None else f"✓ {cell.errors.worst:.0e}{note}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def meaning(plan: Plan) -> str:
    """What a plan is, in the words of the trainer's options."""
    words = {
        "dp_replicate": "data_parallel_replicate_degree",
        "dp_shard": "data_parallel_shard_degree",
        "cp": "context_parallel_degree",
        "tp": "tensor_parallel_degree",
        "ep": "expert_parallel_degree",
        "etp": "expert_tensor_parallel_degree",
        "pp": "pipeline_parallel_degree",
    }
    said = [
        f"`{word}={degree}`" for axis, word in words.items() if (degree := getattr(plan.degrees, axis)) > 1
    ]
    if plan.degrees.pp > 1:
        said.append(f"`pipeline_parallel_schedule={plan.schedule}`")
    if plan.checkpointing != "none":
        said.append(f"`activation_checkpoint.mode={plan.checkpointing}`")
    if plan.compiled:
        said.append("`compile.enable`")
    said.append("several documents in a row" if plan.packed else "one document in a row")
    return ", ".join(said)


def read_page(text: str) -> dict[tuple[str, str], tuple[bool, str | None]]:
    """What a page says: by family and plan, whether it runs, and the reason that stands beside the mark.

    Raises:
        ValueError: a cell that says neither.
    """
    reasons = dict(re.findall(r'^(\d+)\. .*?: "(.*)"$', text, re.MULTILINE))
    names = {plan.title: name for name, plan in PLANS.items()}
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head = next(row for row in rows if row[0] == "Family")
    found: dict[tuple[str, str], tuple[bool, str | None]] = {}
    for row in rows:
        if not row[0].startswith("`") or len(row) != len(head):
            continue
        for title, text_of_cell in zip(head[1:], row[1:], strict=True):
            parsed: Any = re.fullmatch(r"(✓ \de-\d\d|–)(?: \[(\d+)\]\(#refused\))?", text_of_cell)
            if parsed is None or (parsed[1] == "–" and parsed[2] is None):
                raise ValueError(f"{row[0]} under {title} is {text_of_cell!r}")
            reason = None if parsed[2] is None else reasons[parsed[2]]
            found[row[0].strip("`"), names.get(title, title)] = (parsed[1] != "–", reason)
    return found


if __name__ == "__main__":
    sys.exit(main())
