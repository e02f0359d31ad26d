import hashlib
import sysconfig

import pytest

from trimtab.train import corpus
from trimtab.train.corpus import Document, EmbeddedCorpusConfig, load_fixed_corpus


def test_embedded_corpus_has_every_domain_with_its_full_share():
    documents = EmbeddedCorpusConfig().build()
    sizes = dict.fromkeys(("cpp", "prose", "python", "yaml"), 0)
    for document in documents:
        sizes[document.domain] += len(document.text.encode())
    for domain, size in sizes.items():
        assert 350_000 <= size <= 400_000, (domain, size)
    assert max(len(document.text.encode()) for document in documents) <= 32_768
    assert len({document.name for document in documents}) == len(documents)


def test_embedded_domains_are_what_their_names_say():
    def text(domain):
        return "".join(d.text for d in EmbeddedCorpusConfig(domains=(domain,)).build())

    marks = {"cpp": "#include <", "python": "\n    def ", "yaml": "\n- func: ", "prose": " statement is "}
    for domain, mark in marks.items():
        assert text(domain).count(mark) > 20, domain
        for other in marks.keys() - {domain}:
            assert text(other).count(mark) < text(domain).count(mark) / 3, (mark, other)


def test_embedded_corpus_is_the_same_at_every_call_and_sorted():
    config = EmbeddedCorpusConfig(bytes_per_domain=50_000)
    documents = config.build()
    assert documents == config.build()
    keys = [(document.domain, document.name) for document in documents]
    assert keys == sorted(keys)


def test_embedded_corpus_leaves_out_tests_and_other_packages():
    names = [d.name for d in EmbeddedCorpusConfig(domains=("python",), bytes_per_domain=10**9).build()]
    assert "python/argparse.py" in names
    assert not [n for n in names if {"test", "tests", "site-packages", "pydoc_data"} & set(n.split("/"))]
    assert not [n for n in names if "_sysconfigdata" in n]


def test_a_smaller_cap_gives_a_prefix():
    small = EmbeddedCorpusConfig(domains=("yaml",), bytes_per_domain=20_000).build()
    large = EmbeddedCorpusConfig(domains=("yaml",), bytes_per_domain=60_000).build()
    assert [d.name for d in small] == [d.name for d in large][: len(small)]
    assert small[:-1] == large[: len(small) - 1]
    assert large[len(small) - 1].text.startswith(small[-1].text)
    assert small[-1].text.endswith("\n")


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [("ab\ncd\n", 6, "ab\ncd\n"), ("ab\ncd\n", 5, "ab\n"), ("abcdef", 4, "abcd"), ("aé", 2, "a")],
)
def test_cut_at_line(text, limit, expected):
    assert corpus._cut_at_line(text, limit) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domains": ()}, r"names no domain; give at least one of \['cpp', 'prose', 'python', 'yaml'\]"),
        ({"domains": ("latin",)}, r"'latin', which the embedded corpus does not have; choose from"),
        ({"domains": ("cpp", "cpp")}, r"names a domain twice"),
        ({"bytes_per_domain": 10}, r"bytes_per_domain=10 must be at least 1024"),
        ({"max_document_bytes": 0}, r"max_document_bytes=0 must be at least 1024"),
    ],
)
def test_config_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmbeddedCorpusConfig(**arguments)


def test_missing_domain_is_named(monkeypatch, tmp_path):
    paths = sysconfig.get_paths() | {"stdlib": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(corpus, "_package_folder", lambda package: tmp_path)
    for domain in ("python", "cpp", "yaml"):
        message = rf"domain '{domain}' expects .* in .*{tmp_path.name}.*; leave '{domain}' out of `domains`"
        with pytest.raises(ValueError, match=message):
            EmbeddedCorpusConfig(domains=(domain,)).build()


def test_missing_prose_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"domain 'prose' expects the module pydoc_data.topics"):
        EmbeddedCorpusConfig(domains=("prose",)).build()


def test_fixed_corpus_never_changes():
    # Stored losses elsewhere depend on these bytes.
    documents = load_fixed_corpus()
    assert [(d.domain, d.name) for d in documents] == [
        ("prose", "prose/trim-tabs"),
        ("prose", "prose/harbour"),
        ("python", "python/counting"),
        ("cpp", "cpp/ring-buffer"),
        ("yaml", "yaml/quays"),
    ]
    assert all(isinstance(d, Document) and d.text.endswith("\n") and "@@ " not in d.text for d in documents)
    digest = hashlib.sha256("".join(d.text for d in documents).encode()).hexdigest()
    assert digest == "0ee63d9c3d87caa762d50d3761f06ab74d008d8ea0f06304c913d8f664e94edb"
