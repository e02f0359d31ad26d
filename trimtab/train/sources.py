"""Documents from a user's files: `.txt`, `.jsonl`, `.parquet`, or directories of them.

Every file is read to its end when the loader is built, so that a broken line is reported then and not
in the middle of a run.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.train.corpus import Document

_EXTENSIONS = (".jsonl", ".parquet", ".txt")
_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file to read.

    Args:
        path: the file.
        domain: domain of its documents where they do not name their own.
        name: path relative to what the user gave; does not depend on where the data lie.
    """

    path: Path
    domain: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One object of a `.jsonl` file, or row of a `.parquet` file.

    Args:
        values: its fields.
        domain: what it belongs to: its own domain, or that of its file.
        name: identifies it within the sources; does not depend on where the data lie.
        place: file and line or row, for messages.
    """

    values: Mapping[str, Any]
    domain: str
    name: str
    place: str


def find_files(sources: Sequence[str]) -> list[SourceFile]:
    """Resolve what the user gave to files, in a fixed order.

    Each source is a file or a directory, or `domain=path`. Without a domain, a file's domain is its stem;
    in a directory it is the first subdirectory; directly in a directory, it is the directory's name for
    `.txt` (each is one document) and the stem for `.jsonl` and `.parquet` (each holds many), without a
    shard suffix such as `-00000-of-00004`.

    Args:
        sources: what the user gave, in order.

    Returns:
        The files: sources in the given order, each directory sorted by path.

    Raises:
        ValueError: a path that is missing or given twice, an unsupported extension, a directory without
            supported files.
    """
    found: list[SourceFile] = []
    seen: dict[Path, str] = {}
    for source in sources:
        files = _find(source)
        for file in files:
            resolved = file.path.resolve()
            if resolved in seen:
                raise ValueError(
                    f"{file.path} is in the sources twice ({seen[resolved]!r} and {source!r}); the copies "
                    f"would leak from training into validation: give each file once"
                )
            seen[resolved] = source
        found += files
    return found


def read_documents(
    sources: Sequence[str], *, text_field: str = "text", domain_field: str = "domain"
) -> Iterator[Document]:
    """Stream the documents of files and directories; see `find_files` for the order and the domains.

    Args:
        sources: files, directories or `domain=path`.
        text_field: field of a `.jsonl` object or column of a `.parquet` file that holds the text.
        domain_field: optional field or column that holds the document's domain.

    Yields:
        Documents with text; empty texts are left out.

    Raises:
        ValueError: a file can not be read, has no text, or a record is not what is expected; the message
            names the file and the line or row.
    """
    for file in find_files(sources):
        empty = True
        for document in _read(file, text_field, domain_field):
            if document.text:
                empty = False
                yield document
        if empty:
            raise ValueError(f"{file.path} is empty: expected at least one text; remove it from the sources")


def read_records(
    sources: Sequence[str], *, field: str, optional: Sequence[str] = (), domain_field: str = "domain"
) -> Iterator[Record]:
    """Stream the records of `.jsonl` and `.parquet` files; see `find_files` for the order and the domains.

    Args:
        sources: files, directories or `domain=path`.
        field: field or column that every record has.
        optional: further ones to read where they exist.
        domain_field: optional field or column that holds the record's domain.

    Yields:
        Records, each with ``field``.

    Raises:
        ValueError: a file can not be read, is empty or is `.txt`, or a record is not what is expected; the
            message names the file and the line or row.
    """
    for file in find_files(sources):
        if file.path.suffix == ".txt":
            raise ValueError(
                f"{file.path}: expected records with a field {field!r}, which .txt does not hold; give .jsonl or "
                ".parquet files"
            )
        empty = True
        for record in _records(file, field, domain_field, optional):
            empty = False
            yield record
        if empty:
            raise ValueError(
                f"{file.path} is empty: expected at least one record; remove it from the sources"
            )


def _find(source: str) -> list[SourceFile]:
    domain, separator, rest = source.partition("=")
    path = Path(source).expanduser()
    if separator and not path.exists():
        path = Path(rest).expanduser()
        if not domain or not rest:
            raise ValueError(f"source {source!r} must be a path or domain=path; fill in both sides")
    else:
        domain = ""
    if path.is_file():
        if path.suffix not in _EXTENSIONS:
            raise ValueError(
                f"{path}: unsupported extension {path.suffix!r}, expected one of {', '.join(_EXTENSIONS)}; "
                f"convert it to .jsonl, one object {{'text': ...}} per line"
            )
        return [SourceFile(path=path, domain=domain or _stem(path), name=path.name)]
    if path.is_dir():
        return _find_in_directory(path, domain)
    raise ValueError(
        f"source {source!r} does not exist (looked for {path.absolute()}); "
        f"give 'embedded', an existing file or directory, or domain=path"
    )


def _find_in_directory(root: Path, given_domain: str) -> list[SourceFile]:
    files, ignored = [], []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if path.suffix not in _EXTENSIONS:
            ignored.append(relative.as_posix())
            continue
        if len(relative.parts) > 1:
            domain = relative.parts[0]
        else:
            domain = root.resolve().name if path.suffix == ".txt" else _stem(path)
        files.append(SourceFile(path=path, domain=given_domain or domain, name=relative.as_posix()))
    if not files:
        raise ValueError(
            f"directory {root} holds no {', '.join(_EXTENSIONS)} file; convert its data to .jsonl, "
            f"one object {{'text': ...}} per line"
        )
    if ignored:
        warnings.warn(
            f"directory {root}: {len(ignored)} files ignored ({', '.join(ignored[:3])}, ...), "
            f"only {', '.join(_EXTENSIONS)} are read",
            stacklevel=2,
        )
    return files


def _stem(path: Path) -> str:
    return re.sub(r"-\d+-of-\d+$", "", path.stem)


def _read(file: SourceFile, text_field: str, domain_field: str) -> Iterator[Document]:
    if file.path.suffix == ".txt":
        with _readable(file.path):
            text = _decode(file.path.read_bytes(), file.path)
        yield Document(text=text, domain=file.domain, name=file.name)
        return
    for record in _records(file, text_field, domain_field):
        yield _document(record, text_field)


def _records(
    file: SourceFile, field: str, domain_field: str, optional: Sequence[str] = ()
) -> Iterator[Record]:
    with _readable(file.path):
        if file.path.suffix == ".jsonl":
            yield from _read_jsonl(file, field, domain_field)
        else:
            yield from _read_parquet(file, field, domain_field, optional)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} can not be read ({error}); check its permissions") from error


def _decode(encoded: bytes, place: object) -> str:
    try:
        return encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: byte 0x{encoded[error.start]:02x} at offset {error.start} is not UTF-8; convert the "
            f"file, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error


def _read_jsonl(file: SourceFile, field: str, domain_field: str) -> Iterator[Record]:
    with file.path.open("rb") as lines:
        for number, encoded in enumerate(lines, start=1):
            place = f"{file.path}, line {number}"
            line = _decode(encoded, place).strip()
            if not line:
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{place}: broken JSON ({error}), expected one object per line such as "
                    f"{_example(field)}; repair or delete the line"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{place}: expected one object per line such as "
                    f"{_example(field)}, got {type(record).__name__}; repair or delete the line"
                )
            yield _record(record, file, place, f"{file.name}:{number}", field, domain_field)


def _read_parquet(
    file: SourceFile, field: str, domain_field: str, optional: Sequence[str]
) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(
            f"{file.path} needs the package pyarrow; install it with: pip install 'trimtab[train]'"
        ) from error
    row = 0
    try:
        with pq.ParquetFile(file.path) as table:
            columns = table.schema_arrow.names
            _check_field(columns, field, file.path)
            wanted = [name for name in (field, domain_field, *optional) if name in columns]
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    place = f"{file.path}, row {row}"
                    yield _record(record, file, place, f"{file.name}:{row}", field, domain_field)
    except pa.ArrowException as error:
        raise ValueError(f"{file.path} is not a readable parquet file ({error}); write it again") from error


def _example(field: str) -> str:
    value = '[{"role": "user", "content": "..."}, ...]' if field == "messages" else '"..."'
    return f'{{"{field}": {value}}}'


def _check_field(fields: Sequence[str], field: str, place: object) -> None:
    if field not in fields:
        raise ValueError(
            f"{place}: no field {field!r}, it has {sorted(fields)}; set text_field (for conversations "
            "chat.messages_field) to the one that is meant"
        )


def _record(
    values: dict[str, Any], file: SourceFile, place: str, name: str, field: str, domain_field: str
) -> Record:
    _check_field(list(values), field, place)
    domain = values.get(domain_field)
    if domain is not None and (not isinstance(domain, str) or not domain):
        raise ValueError(
            f"{place}: field {domain_field!r} must be a string that is not empty, got {domain!r}; "
            f"repair it or leave it out"
        )
    return Record(values=values, domain=domain or file.domain, name=name, place=place)


def _document(record: Record, text_field: str) -> Document:
    text, place = record.values[text_field], record.place
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: field {text_field!r} must be a string, got {type(text).__name__}; repair or "
            f"delete the record"
        )
    check_text(text, f"{place}: field {text_field!r}")
    return Document(text=text, domain=record.domain, name=record.name)


def check_text(text: str, place: str) -> None:
    """Check that a string is text.

    Raises:
        ValueError: it holds half of a surrogate pair, which JSON can write.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} holds half of a surrogate pair (\\ud800 to \\udfff), which is "
            f"no text; repair or delete the record"
        ) from error
