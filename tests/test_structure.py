"""The package keeps its own rules: import direction, core on torch alone, file sizes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

PACKAGE = Path(trimtab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Upper layers may import lower ones, never the reverse (DESIGN section 1).
CORE, LAYER, PARALLEL, INTEGRATIONS, TRAIN = range(5)
MOE = {"moe", "router", "experts", "dispatch", "grouped_mm"}


def layer_of(module: str) -> int:
    parts = module.split(".")
    if parts == ["trimtab"]:
        return TRAIN  # the package itself re-exports, so only the top may import it
    if parts[1] in ("train", "models"):
        return TRAIN
    if parts[1] == "integrations":
        return INTEGRATIONS
    if parts[1] == "parallel":
        return PARALLEL
    return LAYER if parts[1] in MOE else CORE


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {node.module or ""}
            if node.module == "trimtab":
                found |= {f"trimtab.{a.name}" for a in node.names if (PACKAGE / f"{a.name}.py").exists()}
                if all((PACKAGE / f"{a.name}.py").exists() for a in node.names):
                    found.discard("trimtab")
    return found


def name_of(path: Path) -> str:
    parts = ["trimtab", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    own = layer_of(name_of(path))
    for module in imports(path):
        if module.split(".")[0] == "trimtab":
            assert layer_of(module) <= own, f"{name_of(path)} imports {module}, which lies above it"


@pytest.mark.parametrize("path", [p for p in FILES if layer_of(name_of(p)) <= LAYER], ids=name_of)
def test_core_needs_torch_alone(path: Path) -> None:
    allowed = {"torch", "trimtab", *sys.stdlib_module_names}
    if path.stem.startswith("triton_"):
        allowed.add("triton")  # which trimtab.kernels imports on CUDA only, and does without
    assert {module.split(".")[0] for module in imports(path)} <= allowed


def test_losses_know_nothing_of_ranks() -> None:
    for name in ("losses", "counts", "scores", "reference"):
        assert not any(m.startswith("torch.distributed") for m in imports(PACKAGE / f"{name}.py"))


def test_importing_trimtab_imports_no_other_library() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import trimtab;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "print(sorted(new - {'trimtab', 'torch'}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500, "split it by concept"
