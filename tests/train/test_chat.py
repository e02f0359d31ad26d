"""Conversations as documents: which tokens are there, and which of them are predicted."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.train.chat import ByteChat, ChatConfig, encode_conversations
from trimtab.train.conversations import Conversation, read_conversations, read_fixed_conversations
from trimtab.train.data import DataConfig, TokenLoader
from trimtab.train.packing import in_order
from trimtab.train.token_store import split_validation
from trimtab.train.tokenizer import ByteTokenizer
from trimtab.train.whole_rows import WholeRows, place_documents

BOS, EOS, PAD = 256, 257, 258


def talk(*turns, name="t", **rest):
    """A conversation of (role, content)."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return Conversation(
        messages=messages, tools=None, domain="d", name=name, place="chat.jsonl, line 1", **rest
    )


def store_of(*conversations, seq_len=64, **options):
    return encode_conversations(conversations, ByteChat(), ByteTokenizer(), seq_len=seq_len, **options)


def ask(n, question="q", answer="a"):
    return talk(("user", question), ("assistant", answer), name=str(n))


def loader(store, *, validation_fraction=0.0, rank=0, world_size=1, **options):
    options = {"seq_len": 64, "microbatch_size": 2, "chat": ChatConfig(enable=True), **options}
    config = DataConfig(source="unused", validation_fraction=validation_fraction, **options)
    train, validation = split_validation(store, validation_fraction)
    return TokenLoader(
        config,
        tokenizer=ByteTokenizer(),
        train=train,
        validation=validation,
        rank=rank,
        world_size=world_size,
    )


# ------------------------------------------------------------------ tokens and labels


def test_the_byte_template_is_literal():
    conversation = talk(("system", "s"), ("user", "?"), ("assistant", "ab"), ("user", "!"), ("assistant", ""))
    ids, predicted = ByteChat().encode(conversation)
    expected = [BOS, *b"system\ns", EOS, BOS, *b"user\n?", EOS, BOS, *b"assistant\nab", EOS]
    expected += [BOS, *b"user\n!", EOS, BOS, *b"assistant\n", EOS]
    assert ids.tolist() == expected
    assert np.flatnonzero(predicted).tolist() == [
        *range(10 + 8 + 11, 10 + 8 + 11 + 3),
        len(expected) - 1,
    ]
    assert ids[predicted].tolist() == [*b"ab", EOS, EOS]


def test_labels_are_what_an_assistant_says_and_the_end_of_its_turn():
    store = store_of(ask(0, "why", "so"), ask(1, "who", "me"), seq_len=64)
    packed = next(loader(store, microbatch_size=1, shuffle=False))
    document = 1 + 5 + 3 + 1 + 1 + 10 + 2 + 1
    expected = torch.full((1, 64), -100)
    for start, answer in ((0, b"so"), (document, b"me")):
        expected[0, start + document - 3 : start + document] = torch.tensor([*answer, EOS])
    assert torch.equal(packed.labels_BS, expected)
    assert packed.num_label_tokens == 6
    assert packed.num_tokens == 2 * document
    assert packed.num_sequences == 2
    assert packed.cu_seqlens_G.tolist() == [0, document, 64]
    assert packed.position_ids_BS[0, document] == 0
    padded = next(loader(store, microbatch_size=2, shuffle=False, packing=False))
    assert torch.equal(padded.labels_BS[:, :document], expected[0, : 2 * document].view(2, document))
    assert (padded.input_ids_BS[:, document:] == PAD).all()
    assert padded.num_label_tokens == 6


def test_text_is_predicted_everywhere_as_before():
    text = DataConfig(seq_len=32, microbatch_size=2, source="fixed").build()
    batch = next(text)
    first = batch.position_ids_BS == 0
    assert torch.equal(batch.labels_BS >= 0, ~first)


def test_tool_calls_and_tools_are_written():
    tools = [{"name": "add"}]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    conversation = Conversation(messages=messages, tools=tools, domain="d", name="t", place="p")
    ids, predicted = ByteChat().encode(conversation)
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(ids[predicted].tolist()) == json.dumps(call) + "2"
    assert tokenizer.decode(ids.tolist()).startswith('tools\n[{"name": "add"}]user\n1+1assistant\n')


# ------------------------------------------------------------------ rows of whole documents


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_every_document_is_placed_once_and_whole(lengths):
    rows = place_documents(np.array(lengths), 32)
    assert sorted(d for row in rows for d in row) == list(range(len(lengths)))
    used = [sum(lengths[d] for d in row) for row in rows]
    assert max(used) <= 32
    # What opened a row had no room in any row before it.
    assert all(used[i] + lengths[row[0]] > 32 for j, row in enumerate(rows) for i in range(j))


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"a document of 33 tokens does not fit into a row of seq_len=32"):
        place_documents(np.array([3, 33]), 32)


def test_an_epoch_of_rows_holds_each_conversation_once():
    store = store_of(*[ask(n, "q" * (n % 7), str(n)) for n in range(40)])
    rows = WholeRows(store, 64, in_order)
    read = rows.read_once(0, int(rows.rows_per_epoch) + 2)
    assert (read.domain_ids_BS[-2:] == -1).all()
    texts = []
    for b in range(len(read.ids_BS)):
        starts = np.flatnonzero(read.starts_BS[b])
        ends = np.append(starts, (read.domain_ids_BS[b] >= 0).sum())[1:]
        texts += [tuple(read.ids_BS[b, s:e]) for s, e in zip(starts, ends, strict=True)]
    offsets = store.offsets_D
    assert sorted(texts) == sorted(tuple(store.tokens_N[offsets[d] : offsets[d + 1]]) for d in range(40))
    assert (read.domain_ids_BS[:-2] >= 0).mean() > 0.8
    again = rows.read(int(rows.rows_per_epoch) - 1, 2)
    assert np.array_equal(again.ids_BS[1], read.ids_BS[0])


@pytest.mark.parametrize("packing", [True, False])
def test_resume_is_bitwise_on_other_ranks(packing):
    store = store_of(*[ask(n, "q" * (n % 9), str(n)) for n in range(30)])
    alone = loader(store, packing=packing)
    for _ in range(10):
        next(alone)
    state = json.loads(json.dumps(alone.state_dict()))
    ranks = [loader(store, packing=packing, rank=r, world_size=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(30):
        for rank in ranks:
            expected, found = next(alone), next(rank)
            assert torch.equal(expected.labels_BS, found.labels_BS)
            assert torch.equal(expected.input_ids_BS, found.input_ids_BS)


def test_a_state_of_another_mask_is_refused():
    store = store_of(ask(0, "abc", "defg"), ask(1, "abc", "defg"))
    state = loader(store, microbatch_size=1).state_dict()
    other = store.predicted_N.copy()
    other[-1] = False
    changed = type(store)(**{f: getattr(store, f) for f in store.__slots__} | {"predicted_N": other})
    with pytest.raises(ValueError, match=r"the data differ from those of the checkpoint: text \(saved"):
        loader(changed, microbatch_size=1).load_state_dict(state)


def test_validation_holds_out_whole_conversations():
    store = store_of(*[ask(n, "q" * (3 + n), str(n)) for n in range(6)])
    train, held_out = split_validation(store, 0.1)
    assert held_out.num_documents >= 1
    assert train.num_documents + held_out.num_documents == 6
    whole = {tuple(store.tokens_N[a:b]) for a, b in zip(store.offsets_D, store.offsets_D[1:], strict=False)}
    for part in (train, held_out):
        pieces = zip(part.offsets_D, part.offsets_D[1:], strict=False)
        assert {tuple(part.tokens_N[a:b]) for a, b in pieces} <= whole
    # Two documents, either of them far more than the share: one goes, whole.
    train, held_out = split_validation(store_of(ask(0), ask(1, "q" * 20)), 0.05)
    assert (train.num_documents, held_out.num_documents) == (1, 1)
    assert held_out.lengths_D.tolist() == [21]
    with pytest.raises(ValueError, match=r"domain 'd' has 1 documents, too few to hold one out"):
        split_validation(store_of(ask(0)), 0.05)


# ------------------------------------------------------------------ long ones


def test_long_conversations_are_cut_left_out_or_refused():
    short, long_answer, long_question = ask(0), ask(1, "q", "a" * 100), ask(2, "q" * 100, "a")
    with pytest.warns(UserWarning, match=r"2 of 3 conversations are longer .* tokens: 1 were cut"):
        store = store_of(short, long_answer, long_question)
    assert store.lengths_D.tolist() == [21, 64]
    assert store.predicted_N[21:].sum() == 64 - 19
    with pytest.warns(UserWarning, match=r"0 were cut and 2 left out; raise data.seq_len"):
        store = store_of(short, long_answer, long_question, too_long="drop")
    assert store.num_documents == 1
    with pytest.raises(
        ValueError, match=r"chat.jsonl, line 1: 120 tokens are more than data.seq_len=64; raise it"
    ):
        store_of(short, long_answer, too_long="refuse")
    with pytest.raises(ValueError, match=r"none of 1 conversations fits into data.seq_len=64 tokens"):
        store_of(long_question)
    with pytest.raises(ValueError, match=r"the source holds no conversations"):
        store_of()


# ------------------------------------------------------------------ files


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def test_conversations_are_read_as_services_write_them(tmp_path):
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {"role": "assistant", "content": "c", "weight": 1, "name": None},
        ],
        "tools": '[{"name": "f"}]',
        "domain": "x",
    }
    first, second = read_conversations([write(tmp_path / "a.jsonl", record, "", GOOD)])
    assert [m["content"] for m in first.messages] == ["ab", "", "1", "c"]
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert first.messages[3] == {"role": "assistant", "content": "c"}
    assert first.tools == [{"name": "f"}]
    assert (first.domain, first.name) == ("x", "a.jsonl:1")
    assert (second.domain, second.tools) == ("a", None)
    assert second.place.endswith("a.jsonl, line 3")


def test_tables_hold_conversations_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    # A struct of all fields of any message, as tables have it: most of them null.
    messages = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": "a", "tool_calls": None},
    ]
    pq.write_table(pa.table({"messages": [messages], "other": [1]}), path)
    (found,) = read_conversations([str(path)])
    assert found.messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert found.place.endswith("a.parquet, row 1")


def messages(*entries):
    return {"messages": list(entries)}


USER, ASSISTANT = GOOD["messages"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: broken JSON .* such as \{\"messages\": \[\{\"role\": \"user\""),
        (
            {"text": "x"},
            r"line 2: no field 'messages', it has \['text'\]; set text_field \(for conversations chat",
        ),
        ({"messages": "hi"}, r"line 2: field 'messages' must be a list of messages such as .*, got 'hi'"),
        ({"messages": []}, r"line 2: field 'messages' must be a list of messages such as .*, got \[\]"),
        (messages(USER), r"line 2: no message has the role 'assistant', so there is nothing to learn"),
        (
            messages(USER, {"from": "gpt", "value": "x"}),
            r"line 2, message 2: 'role' must be one of system, .* got None; .* this one has \['from', 'value'\]",
        ),
        (messages({"role": "bot", "content": "x"}), r"line 2, message 1: 'role' must be one of .* got 'bot'"),
        (messages(USER, {"role": "assistant"}), r"line 2, message 2: 'content' must be text, got None"),
        (
            messages(USER, {"role": "assistant", "content": 3}),
            r"line 2, message 2: 'content' must be text, got 3",
        ),
        (messages(USER, {**ASSISTANT, "weight": 0}), r"line 2, message 2: weight=0 is not supported"),
        (
            messages({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT),
            r"line 2, message 1: 'content' has a part of type 'image_url', and conversations are of text",
        ),
        (
            messages({"role": "user", "content": "\ud800"}, ASSISTANT),
            r"line 2, message 1: 'content' holds half of a surrogate",
        ),
        (
            messages(USER, {"role": "assistant", "tool_calls": "f()"}),
            r"line 2, message 2: 'tool_calls' must be a list",
        ),
        (
            messages(USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{x"}}]}),
            r"line 2, message 2: 'arguments' of a tool call must be JSON .* '\{x'",
        ),
        (
            {**GOOD, "tools": {"name": "f"}},
            r"line 2: field 'tools' must be a list of functions, got \{'name'",
        ),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "chat.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=r"chat\.jsonl, " + message):
        list(read_conversations([path]))


def test_text_files_and_empty_files_hold_no_conversations(tmp_path):
    with pytest.raises(ValueError, match=r"a.txt: expected records with a field 'messages'"):
        list(read_conversations([write(tmp_path / "a.txt", "hello")]))
    with pytest.raises(ValueError, match=r"b.jsonl is empty: expected at least one record"):
        list(read_conversations([write(tmp_path / "b.jsonl", "")]))


def test_settings_that_contradict_each_other_are_refused():
    chat = ChatConfig(enable=True)
    with pytest.raises(ValueError, match=r"source='embedded' holds no conversations; give data.source files"):
        DataConfig(seq_len=8, microbatch_size=1, chat=chat)
    with pytest.raises(ValueError, match=r"add_bos=True puts a token before what the chat template writes"):
        DataConfig(seq_len=8, microbatch_size=1, source="fixed", chat=chat, add_bos=True)
    with pytest.raises(ValueError, match=r"messages_field='' names no field; set data.chat.messages_field"):
        ChatConfig(enable=True, messages_field="")
    with pytest.raises(ValueError, match=r"template='no.jinja' is no file"):
        ChatConfig(enable=True, template="no.jinja")
    with pytest.warns(UserWarning, match=r"data.chat.too_long has no effect without data.chat.enable"):
        ChatConfig(too_long="drop")
    with pytest.warns(UserWarning, match=r"data.text_field has no effect with data.chat.enable"):
        DataConfig(seq_len=8, microbatch_size=1, source="x.jsonl", chat=chat, text_field="body")


def test_the_shipped_conversations_are_of_two_domains_and_all_learnable():
    conversations = list(read_fixed_conversations())
    assert {c.domain for c in conversations} == {"sums", "capitals"}
    assert any(c.tools for c in conversations)
    config = DataConfig(
        seq_len=512, microbatch_size=2, source="fixed", chat=ChatConfig(enable=True), validation_fraction=0.15
    )
    data = config.build()
    assert set(data.num_validation_tokens_per_domain) == {"sums", "capitals"}
    assert all(count > 0 for count in data.num_validation_tokens_per_domain.values())
    batch = next(data)
    assert 0 < batch.num_label_tokens < batch.num_tokens / 2
