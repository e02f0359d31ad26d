"""The documentation is true: its code runs, its links resolve, its generated page is current, its site builds."""

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from trimtab.parallel.placements import table

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.*\S) *-->")
LINK = re.compile(r"(?<!!)!?\[(?:[^\]]|\](?=\]))*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line of its first line, the reason not to run it."""

    language: str
    code: str
    line: int
    not_run: str | None


def blocks(text: str) -> Iterator[Block]:
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"(```+)(.*)", lines[number])
        if fence is None:
            number += 1
            continue
        before = lines[number - 1] if number else ""
        end = next(i for i in range(number + 1, len(lines)) if lines[i].startswith(fence[1]))
        marked = NOT_RUN.fullmatch(before.strip())
        code = "\n".join(lines[number + 1 : end])
        yield Block(fence[2].strip(), code, number + 2, marked["reason"] if marked else None)
        number = end + 1


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text()) if block.language == "python"]


def prose(page: Path) -> str:
    """The page without its code, in which brackets are not links."""
    text = page.read_text()
    for block in blocks(text):
        text = text.replace(block.code, "")
    return re.sub(r"`[^`\n]*`", "``", text)


def anchors(page: Path) -> set[str]:
    """Anchors of the page's headings, as both GitHub and MkDocs make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


# peft 0.21 reads a name that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks of one page share a namespace, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in python_blocks(page):
        # Leading line breaks make the line numbers of a traceback those of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.not_run is None:
            exec(code, namespace)


def test_nearly_all_code_runs() -> None:
    found = [block for page in PAGES for block in python_blocks(page)]
    assert sum(block.not_run is None for block in found) > 20
    assert sum(block.not_run is not None for block in found) <= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_runs(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", printed)]
    maxvio = [float(value) for value in re.findall(r"maxvio (\d+\.\d+)", printed)]
    assert losses[-1] < 0.6 * losses[0]
    assert maxvio[-1] < 0.5 * maxvio[0]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for match in LINK.finditer(prose(page)):
        target = match["target"]
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target} does not exist"
        if page.parent == ROOT / "docs":
            assert file.parent == page.parent, f"{name_of(page)}: {target} is not part of the site"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)}: no heading for #{anchor} in {name_of(file)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    """Repository paths in code type, such as `tests/test_docs.py`."""
    names = re.findall(r"`((?:trimtab|tests|docs|examples|benchmarks)/[\w/.-]+\.\w+)`", page.read_text())
    for name in names:
        assert (ROOT / name).is_file(), f"{name_of(page)} names {name}"


def test_troubleshooting_quotes_real_messages() -> None:
    """Every piece of a quoted message, between its placeholders, stands in the source."""
    source = "\n".join(path.read_text() for path in (ROOT / "trimtab").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    table = (ROOT / "docs" / "attach.md").read_text().partition("## Troubleshooting")[2]
    messages = re.findall(r"^\| (?:warning )?`([^`]*)`", table, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        pieces = [piece.strip() for piece in re.split(r"\.\.\.|\b[XMNabmn]\b(?:\+1)?", message)]
        long = [piece for piece in pieces if len(piece) > 8]
        assert long, message
        for piece in long:
            assert piece in source, f"no message of trimtab holds {piece!r}"


def test_families_page_is_current() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate_families.py"))
    assert generator["PAGE"].read_text() == generator["page"](), "run: python docs/generate_families.py"


def test_placements_on_the_parallelism_page_are_current() -> None:
    page = (ROOT / "docs" / "parallelism.md").read_text()
    between = page.split("<!-- placements: begin -->\n")[1].split("\n<!-- placements: end -->")[0]
    assert between == table(), "write trimtab.parallel.placements.table() there"


def test_every_public_name_is_documented() -> None:
    import trimtab

    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in trimtab.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.py"))
    for file in tmp_path.rglob("*.html"):
        loaded = re.findall(r"""(?:src=|<link[^>]*href=)["'](?:https?:)?//[^"']*""", file.read_text())
        assert loaded == [], f"{file.name} loads {loaded}"
    for file in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\W?https?://|@import", file.read_text()), (
            f"{file.name} loads from a network"
        )
