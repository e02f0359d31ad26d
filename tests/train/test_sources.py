from pathlib import Path

import pytest

from trimtab.train.data import DataConfig
from trimtab.train.sources import find_files, read_documents

EOS = 257


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_parquet(path, columns):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_all_formats_and_domains(tmp_path):
    write(tmp_path / "news" / "a.txt", "first\nnews")
    write(tmp_path / "news" / "deep" / "b.txt", "second")
    write(tmp_path / "top.txt", "\ufefftop")
    write(tmp_path / "wiki-00000-of-00002.jsonl", '{"text": "w0"}\n\n{"text": "w1", "domain": "special"}\n')
    write_parquet(tmp_path / "code.parquet", {"text": ["p0", "", "p1"], "domain": [None, "x", "special"]})
    write(tmp_path / ".hidden" / "c.txt", "hidden")
    found = list(read_documents([str(tmp_path)]))
    assert [(d.text, d.domain, d.name) for d in found] == [
        ("p0", "code", "code.parquet:1"),
        ("p1", "special", "code.parquet:3"),
        ("first\nnews", "news", "news/a.txt"),
        ("second", "news", "news/deep/b.txt"),
        ("top", tmp_path.name, "top.txt"),
        ("w0", "wiki", "wiki-00000-of-00002.jsonl:1"),
        ("w1", "special", "wiki-00000-of-00002.jsonl:3"),
    ]


def test_given_domains_and_files(tmp_path):
    one = write(tmp_path / "one.txt", "1")
    two = write(tmp_path / "a=b.txt", "2")
    three = write(tmp_path / "more" / "sub" / "three.txt", "3")
    sources = [one, two, f"mine={tmp_path / 'more'}"]
    found = [(d.text, d.domain) for d in read_documents(sources)]
    assert found == [("1", "one"), ("2", "a=b"), ("3", "mine")]
    with pytest.raises(
        ValueError, match=r"three.txt is in the sources twice \('mine=.*' and '.*three.txt'\)"
    ):
        find_files([*sources, three])
    with pytest.raises(ValueError, match=r"is in the sources twice"):
        find_files([one, one])


def test_other_fields(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"content": "x", "kind": "k"}')
    config = DataConfig(
        seq_len=2,
        microbatch_size=1,
        source=path,
        text_field="content",
        domain_field="kind",
        validation_fraction=0,
    )
    data = config.build()
    assert data.domains == ("k",)
    assert next(data).input_ids_BS.tolist() == [[120, EOS]]


def test_several_paths_build_a_loader(tmp_path):
    first = write(tmp_path / "first.txt", "first text " * 50)
    second = write_parquet(tmp_path / "second.parquet", {"text": ["second text "] * 50})
    data = DataConfig(seq_len=16, microbatch_size=2, source=(first, second), domain_pure=True).build()
    assert data.domains == ("first", "second")
    assert data.num_tokens_per_domain["first"] + data.num_validation_tokens_per_domain["first"] == 551


def test_ignored_files_are_reported(tmp_path):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "table.csv", "a,b")
    with pytest.warns(UserWarning, match=r"1 files ignored \(table.csv"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', r'a.jsonl, line 2: broken JSON .* such as {"text": "..."}'),
        ("a.jsonl", '["x"]', r"a.jsonl, line 1: expected one object per line .* got list"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"body": "y"}',
            r"line 2: no field 'text', it has \['body'\]; set text_field",
        ),
        ("a.jsonl", '{"text": 3}', r"line 1: field 'text' must be a string, got int"),
        ("a.jsonl", '{"text": null}', r"line 1: field 'text' must be a string, got NoneType"),
        ("a.jsonl", '{"text": "\\ud800"}', r"line 1: field 'text' holds half of a surrogate pair"),
        ("a.jsonl", '{"text": "x", "domain": 3}', r"line 1: field 'domain' must be a string .* got 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"line 2: byte 0xff at offset 10 is not UTF-8"),
        ("a.jsonl", "\n\n", r"a.jsonl is empty: expected at least one text"),
        ("a.jsonl", '{"text": ""}', r"a.jsonl is empty"),
        ("a.txt", "", r"a.txt is empty"),
        ("a.txt", b"ab\xe9", r"a.txt: byte 0xe9 at offset 2 is not UTF-8; convert the file"),
        ("a.parquet", "no parquet", r"a.parquet is not a readable parquet file"),
        ("a.csv", "text", r"a.csv: unsupported extension '.csv', expected one of .jsonl, .parquet, .txt"),
    ],
)
def test_broken_files_are_found_when_the_loader_is_built(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        DataConfig(seq_len=8, microbatch_size=1, source=path).build()


def test_a_broken_line_late_in_the_file_is_found(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n' * 2000 + "{")
    with pytest.raises(ValueError, match=r"a.jsonl, line 2001: broken JSON"):
        DataConfig(seq_len=8, microbatch_size=1, source=path).build()


def test_parquet_without_text(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"]})
    with pytest.raises(ValueError, match=r"a.parquet: no field 'text', it has \['body'\]; set text_field"):
        list(read_documents([path]))
    path = write_parquet(tmp_path / "b.parquet", {"text": ["x", None]})
    with pytest.raises(ValueError, match=r"b.parquet, row 2: field 'text' must be a string, got NoneType"):
        list(read_documents([path]))


def test_missing_paths(tmp_path):
    with pytest.raises(
        ValueError, match=r"nowhere.txt' does not exist .*; give 'embedded', an existing file"
    ):
        find_files([str(tmp_path / "nowhere.txt")])
    with pytest.raises(ValueError, match=r"'=x' must be a path or domain=path"):
        find_files(["=x"])
    with pytest.raises(ValueError, match=r"holds no .jsonl, .parquet, .txt file"):
        find_files([str(tmp_path)])


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "secret")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    # Not chmod: root, which runs many test machines, reads every file.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        ValueError, match=r"a.txt can not be read .*Permission denied.*; check its permissions"
    ):
        list(read_documents([path]))
