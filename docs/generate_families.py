"""Writes families.md from the table of router families: `python docs/generate_families.py`."""

from collections.abc import Callable
from pathlib import Path

from trimtab.integrations import families
from trimtab.integrations.families import FAMILIES, UNSERVABLE, Family

PAGE = Path(__file__).with_name("families.md")

HEAD = """# Router families

<!-- Written by docs/generate_families.py from trimtab/integrations/families.py. Do not edit. -->

`trimtab.attach` knows {served} router classes of transformers by name, {types} model types with them, and
trimtab's own `Router`. A class that is not listed is served as well if the model's output recorders name it as
the source of its router logits and it behaves like the common ones: (logits, weights, ids), with weights that
follow one of the three scores. Each class that is found is run on random input first and compared with its row,
so a wrong row is an error and not a wrong loss.

The classes are those of transformers 5.23. Rows match by class name, so subclasses and forks that keep the name
are served too.

## Served

- **Score**: the s of `p = s / sum_j s_j`.
- **Selection bias**: where it lives, from the router or from the block that calls it. A bias rule needs one.
- **Groups**: the setting that can limit selection to some expert groups.
- **Input kept**: who holds the router's input for backward in a bfloat16 model anyway. With nobody, or where the
  logits are not a plain linear map of the input, backward keeps the logits, one tensor of tokens x experts per
  layer.
- **Note**: what else differs.

"""

UNSERVED_HEAD = """
## Not served

Attaching to a model with one of these is an error that gives the reason. `families={"Class": None}` leaves such
routers alone; `families={"Class": trimtab.Family(...)}` brings a row of your own.

| Router class | Reason |
|---|---|
"""

ADD = """
## Adding a family

Pass a row to attach, for a class that returns (logits, weights, ids):

```python
import trimtab

row = trimtab.Family(
    router_class="MyRouter",
    model_types=("my_model",),
    score="sigmoid",
    source="my_model/modeling.py",
    expert_bias="router.expert_bias",  # if it has a selection bias
    weight="gate.weight",  # path of the (E, D) weight on the router
)
# balancer = trimtab.attach(model, [...], families={"MyRouter": row})
```

For another output layout give `unpack` and `repack`, module-level functions in plain tensor code, and `replace` if
[routings are to be replayed](router-records.md). To add a row to trimtab itself see CONTRIBUTING.md.
"""

SCORES = {
    families.score_from_selection_fn: "softmax or sigmoid, by `expert_selection_fn`",
    families.score_from_activation: "sqrt_softplus or sigmoid, by `scoring_func`",
}
GROUPS = {
    families.never_grouped: "",
    families.grouped_by_count: "`n_group`, `topk_group`",
    families.grouped_by_method: "`topk_method`, `n_group`, `topk_group`",
}
KEEPERS = {
    families.input_kept_by_gate: "gate",
    families.input_kept_by_shared_expert: "shared experts",
    families.input_not_kept: "nobody",
}


def named(functions: dict[Callable[..., object], str], function: Callable[..., object]) -> str:
    """The words for a function of the table; a new function needs words here."""
    if function not in functions:
        raise KeyError(f"docs/generate_families.py has no words for {function.__name__}; add them")
    return functions[function]


def score(family: Family) -> str:
    """Score function, or what chooses it."""
    return named(SCORES, family.score) if callable(family.score) else family.score


def notes(family: Family) -> str:
    """What a reader of the other columns would not expect."""
    found = []
    if family.bias is not None:
        found.append("logits have a bias")
    if family.bias_on_logits:
        found.append("selection bias is added to logits")
    if not family.exact_logits:
        found.append("returns probabilities: no z-loss")
    elif not family.linear_logits:
        found.append("logits are kept")
    if not family.weights_follow_score:
        found.append("weights do not follow the score")
    if family.unpack is families.unpack_dense_scores:
        found.append("weights are (T, E)")
    return "; ".join(found)


def page() -> str:
    """The whole page."""
    rows = ["| Router class | Model types | Score | Selection bias | Groups | Input kept by | Note |"]
    rows.append("|---|---|---|---|---|---|---|")
    for family in FAMILIES.values():
        cells = [
            f"`{family.router_class}`",
            ", ".join(f"`{name}`" for name in family.model_types),
            score(family),
            f"`{family.expert_bias}`" if family.expert_bias else "",
            named(GROUPS, family.grouped),
            named(KEEPERS, family.keeps_input),
            notes(family),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    types = {name for family in FAMILIES.values() for name in family.model_types}
    head = HEAD.format(served=len(FAMILIES), types=len(types))
    unserved = "".join(f"| `{name}` | {reason} |\n" for name, reason in UNSERVABLE.items())
    return head + "\n".join(rows) + "\n" + UNSERVED_HEAD + unserved + ADD


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
