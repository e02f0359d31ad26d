"""Text with labelled domains that every machine already holds, so that a first run needs no download.

Two corpora, both lists of `Document`:

- the *embedded* corpus is read from files that come with Python and PyTorch; its text varies with their
  versions, its domains and sizes do not;
- the *fixed* corpus is one file shipped with trimtab, the same bytes everywhere, for tests that compare a
  loss with a stored value.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_FIXED_CORPUS = Path(__file__).with_name("fixed_corpus.txt")
_FIXED_HEADER = "@@ "
_YAML_DOCUMENT_BYTES = 8192
# Directories of the standard library that are not prose a person would call "Python": tests, generated
# tables, other people's packages, and the topics that are already the domain "prose".
_NOT_PYTHON = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idle_test",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
# The CUDA, XPU and Metal headers are absent from some builds; these two are in every wheel.
_CPP_DIRS = ("c10/core", "c10/util")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text with the domain it belongs to.

    Args:
        text: the text; never empty.
        domain: label of the kind of text, e.g. "python".
        name: identifies the document within its source (a relative path, or path and line); decides
            whether the document is held out for validation.
    """

    text: str
    domain: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedCorpusConfig:
    """Corpus read from the installed Python and PyTorch.

    Args:
        domains: which domains, of "cpp" (headers of PyTorch), "prose" (English manual pages of pydoc),
            "python" (standard library without tests), "yaml" (operator declarations of PyTorch).
        bytes_per_domain: UTF-8 bytes of each domain at most; the last document is cut at a line end.
        max_document_bytes: longer documents are cut at a line end, so that no single file dominates
            its domain.

    Raises:
        ValueError: an unknown or repeated domain, no domain, or a size below 1024 bytes.
    """

    domains: tuple[str, ...] = ("cpp", "prose", "python", "yaml")
    bytes_per_domain: int = 400_000
    max_document_bytes: int = 32_768

    def __post_init__(self) -> None:
        """Check names and sizes."""
        if not self.domains:
            raise ValueError(f"domains=() names no domain; give at least one of {sorted(_READERS)}")
        for domain in self.domains:
            if domain not in _READERS:
                raise ValueError(
                    f"domains={self.domains!r} contains {domain!r}, which the embedded corpus does not have; "
                    f"choose from {sorted(_READERS)}, or give your own files as the source"
                )
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domains={self.domains!r} names a domain twice; name each once")
        for field in ("bytes_per_domain", "max_document_bytes"):
            if getattr(self, field) < 1024:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1024 bytes; raise {field}")

    def build(self) -> list[Document]:
        """Read the corpus: documents by domain (sorted), then by name.

        Raises:
            ValueError: the files of a domain are not on this machine.
        """
        return [document for domain in sorted(self.domains) for document in self._domain(domain)]

    def _domain(self, domain: str) -> list[Document]:
        documents = []
        remaining = self.bytes_per_domain
        for name, text in _READERS[domain]():
            text = _cut_at_line(text, min(remaining, self.max_document_bytes))
            if text.strip():
                documents.append(Document(text=text, domain=domain, name=f"{domain}/{name}"))
                remaining -= len(text.encode())
            if remaining < 1024:
                break
        if not documents:
            raise _missing(domain, "files with text", "the installation")
        return documents


def load_fixed_corpus() -> list[Document]:
    """Read the corpus shipped with trimtab: four domains, the same bytes on every machine and version."""
    sections = ("\n" + _FIXED_CORPUS.read_text(encoding="utf-8")).split("\n" + _FIXED_HEADER)[1:]
    documents = []
    for section in sections:
        header, _, text = section.partition("\n")
        domain, name = header.split()
        documents.append(Document(text=text.strip("\n") + "\n", domain=domain, name=f"{domain}/{name}"))
    return documents


def _cut_at_line(text: str, max_bytes: int) -> str:
    """Longest prefix of `text` of at most `max_bytes` UTF-8 bytes that ends at a line end, if any does."""
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    prefix = encoded[:max_bytes]
    end = prefix.rfind(b"\n") + 1
    return prefix[: end or max_bytes].decode(errors="ignore")


def _missing(domain: str, expected: str, place: object) -> ValueError:
    return ValueError(
        f"embedded corpus: domain {domain!r} expects {expected} in {place}, and there are none; "
        f"leave {domain!r} out of `domains`, or give your own files as the source"
    )


def _sorted_files(root: Path, suffix: str, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, Path]]:
    # os.walk rather than rglob: pruning keeps it out of site-packages, which may hold 100,000 files.
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        files += [Path(folder, name) for name in names if name.endswith(suffix)]
    yield from sorted((path.relative_to(root).as_posix(), path) for path in files)


def _read_or_none(path: Path) -> str | None:
    """Text of a file, or None where it is not UTF-8 (the standard library has such files on purpose)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _read_cpp() -> Iterator[tuple[str, str]]:
    folder = _package_folder("torch")
    include = (folder or Path("torch")) / "include"
    found = False
    for part in _CPP_DIRS:
        for name, path in _sorted_files(include / part, ".h"):
            text = _read_or_none(path)
            if text is not None:
                found = True
                yield f"{part}/{name}", text
    if not found:
        raise _missing("cpp", "the C++ headers that PyTorch's wheels carry (c10/core/*.h)", include)


def _read_prose() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise _missing("prose", "the module pydoc_data.topics", "the standard library") from error
    yield from sorted(topics.items())


def _read_python() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = False
    for name, path in _sorted_files(root, ".py", _NOT_PYTHON):
        # Build settings of this machine: paths and flags, different everywhere.
        if name.startswith("_sysconfigdata"):
            continue
        text = _read_or_none(path)
        if text is not None:
            found = True
            yield name, text
    if not found:
        raise _missing("python", "the sources of the standard library (*.py)", root)


def _read_yaml() -> Iterator[tuple[str, str]]:
    folder = _package_folder("torchgen")
    root = (folder or Path("torchgen")) / "packaged"
    found = False
    for name, path in _sorted_files(root, ".yaml"):
        group: list[str] = []
        size = number = 0
        for entry in path.read_text(encoding="utf-8").split("\n\n"):
            group.append(entry)
            size += len(entry)
            if size >= _YAML_DOCUMENT_BYTES:
                yield f"{name}#{number:03d}", "\n\n".join(group) + "\n"
                found, group, size, number = True, [], 0, number + 1
        if group:
            found = True
            yield f"{name}#{number:03d}", "\n\n".join(group)
    if not found:
        raise _missing("yaml", "the operator declarations that PyTorch's wheels carry (*.yaml)", root)


_READERS: MappingProxyType[str, Callable[[], Iterator[tuple[str, str]]]] = MappingProxyType(
    {"cpp": _read_cpp, "prose": _read_prose, "python": _read_python, "yaml": _read_yaml}
)
