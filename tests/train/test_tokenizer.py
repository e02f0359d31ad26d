import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.train.corpus import load_fixed_corpus
from trimtab.train.tokenizer import ByteTokenizer, TokenizerConfig


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE of 400 tokens with the special tokens <s>, </s>."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([document.text for document in load_fixed_corpus()], trainer)
    # As saved by a run that truncated: must not cut documents here.
    tokenizer.enable_truncation(max_length=4)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer_directory(tokenizer_file, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("pretrained")
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


def test_byte_tokenizer_literal_ids():
    tokenizer = TokenizerConfig().build()
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode("aé\n").tolist() == [97, 195, 169, 10]
    assert tokenizer.encode("").tolist() == []
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        259,
        256,
        257,
        258,
    )
    assert tokenizer.decode([256, 97, 195, 169, 257, 258]) == "aé"
    assert tokenizer.decode([0xFF, 97]) == "\ufffda"


@given(st.text(st.characters(exclude_categories=())))
def test_byte_tokenizer_is_lossless_even_for_surrogates(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.size == 0 or ids.max() < 256
    np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], ids)


@pytest.mark.parametrize("wrong", [259, -1])
def test_byte_tokenizer_refuses_foreign_ids(wrong):
    with pytest.raises(ValueError, match=rf"id {wrong} is outside the byte vocabulary \[0, 259\)"):
        ByteTokenizer().decode([97, wrong])


def test_tokenizer_json(tokenizer_file):
    tokenizer = TokenizerConfig(name=str(tokenizer_file), eos_token="</s>").build()
    text = load_fixed_corpus()[0].text
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 100 < len(ids) < len(text) * 0.8
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (400, 1, 1, None)
    assert tokenizer.decode([*ids, 1]) == text
    for one, many in zip(["a", "", text], tokenizer.encode_batch(["a", "", text]), strict=True):
        np.testing.assert_array_equal(tokenizer.encode(one), many)


def test_tokenizer_json_reads_the_special_tokens_declared_beside_it(tokenizer_file, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_file.read_bytes())
    settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = TokenizerConfig(name=str(path)).build()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        TokenizerConfig(name=str(path)).build()


def test_directory_gives_the_ids_of_transformers(tokenizer_directory, tokenizer_file):
    transformers = pytest.importorskip("transformers")
    tokenizer = TokenizerConfig(name=str(tokenizer_directory)).build()
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer_directory)
    text = load_fixed_corpus()[2].text
    assert tokenizer.encode(text).tolist() == reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, len(reference))


def test_fingerprints_tell_tokenizers_apart(tokenizer_file, tmp_path):
    def fingerprint(path, eos_token="</s>"):
        return TokenizerConfig(name=str(path), eos_token=eos_token).build().fingerprint

    content = json.loads(tokenizer_file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    changed = tmp_path / "tokenizer.json"
    changed.write_text(json.dumps(content))
    copy = tmp_path / "copy.json"
    copy.write_bytes(tokenizer_file.read_bytes())
    assert fingerprint(tokenizer_file) == fingerprint(copy)
    found = {fingerprint(tokenizer_file), fingerprint(changed), fingerprint(tokenizer_file, "<s>")}
    assert len(found | {ByteTokenizer().fingerprint}) == 4


def test_missing_eos_names_the_choices(tokenizer_file):
    with pytest.raises(ValueError, match=r"declares no end-of-document token.*\['</s>', '<s>'\]"):
        TokenizerConfig(name=str(tokenizer_file)).build()
    with pytest.raises(ValueError, match=r"has no token '<end>'.*set eos_token"):
        TokenizerConfig(name=str(tokenizer_file), eos_token="<end>").build()


def test_unknown_eos_of_a_directory(tokenizer_directory):
    with pytest.raises(ValueError, match=r"has no token '<end>'"):
        TokenizerConfig(name=str(tokenizer_directory), eos_token="<end>").build()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, r"names no tokenizer; give 'byte', a path or a hub id"),
        ({"eos_token": "x"}, r"eos_token='x' has no meaning for the byte tokenizer"),
        ({"revision": "main"}, r"revision='main' has no meaning for the byte tokenizer"),
        ({"name": "/", "revision": "main"}, r"no meaning for the local path '/'"),
    ],
)
def test_config_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**arguments)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/tokenizer", "tokenizer.json", "a/b/c"])
def test_a_mistyped_path_does_not_ask_the_network(name, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("network")
    )
    with pytest.raises(ValueError, match=r"is a path that does not exist; give 'byte'"):
        TokenizerConfig(name=name).build()


def test_broken_tokenizers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a readable tokenizer.json"):
        TokenizerConfig(name=str(path)).build()

    def unreachable(name, **options):
        assert (name, options) == ("org/model", {"revision": "abc"})
        raise OSError("no connection")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"name='org/model' could not be loaded: no connection; give 'byte'"):
        TokenizerConfig(name="org/model", revision="abc").build()


def test_a_tokenizer_without_rust_backend(monkeypatch):
    transformers = pytest.importorskip("transformers")

    class Slow:
        eos_token_id, bos_token_id, pad_token_id, all_special_tokens = 26, None, 27, ("<end>",)

        def get_vocab(self):
            return {chr(97 + i): i for i in range(26)} | {"<end>": 26, "<pad>": 27}

        def encode(self, text, *, add_special_tokens):
            return [ord(c) - 97 for c in text] + [26] * add_special_tokens

        def decode(self, ids, *, skip_special_tokens):
            return "".join(chr(97 + i) for i in ids if i < 26 or not skip_special_tokens)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Slow())
    tokenizer = TokenizerConfig(name="org/model").build()
    assert [ids.tolist() for ids in tokenizer.encode_batch(["abz", ""])] == [[0, 1, 25], []]
    assert tokenizer.decode([0, 1, 26, 27]) == "ab"
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (28, 26, 27, None)
