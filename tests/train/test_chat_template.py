"""Conversations written by chat templates: masks against transformers' own and against what was said."""

import json
import random

import numpy as np
import pytest

from tests.train.test_chat import talk
from trimtab.train.chat import ChatConfig, chat_encoder
from trimtab.train.chat_template import TemplateChat
from trimtab.train.conversations import Conversation
from trimtab.train.data import DataConfig
from trimtab.train.tokenizer import TokenizerConfig

HEADER = "'<|im_start|>' + message['role'] + '\n'"
CHATML = (
    "{% for message in messages %}{{ " + HEADER + " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ " + HEADER + " }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The last turn opens with an empty thought, which is dropped once the user speaks again.
THOUGHTFUL = CHATML.replace(
    " + message['content']",
    " + ('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content']",
)
TURNS = (
    ("system", "Be brief."),
    ("user", "Wer?"),
    ("assistant", "Ich."),
    ("user", "Wo?"),
    ("assistant", "Hier."),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer with merges across words, and the ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["assistant\n\nHier und dort.\nuser\nWo? Wer? Hier. Ich."] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return str(path)


def encoder(folder, template=None, tmp_path=None):
    config = ChatConfig(enable=True)
    if template is not None:
        path = tmp_path / "template.jinja"
        path.write_text(template)
        config = ChatConfig(enable=True, template=str(path))
    found = chat_encoder(config, TokenizerConfig(name=folder))
    assert isinstance(found, TemplateChat)
    return found


def predicted_text(chat, conversation):
    ids, predicted = chat.encode(conversation)
    return chat._tokenizer.decode(ids[predicted].tolist())


def test_turns_are_found_without_marks(folder):
    chat = encoder(folder)
    conversation = talk(*TURNS)
    ids, _ = chat.encode(conversation)
    whole = chat._tokenizer.apply_chat_template(list(conversation.messages), return_dict=True)["input_ids"]
    assert ids.tolist() == whole
    assert predicted_text(chat, conversation) == "Ich.<|im_end|>Hier.<|im_end|>"


def test_marks_of_a_template_are_those_of_transformers(folder, tmp_path):
    chat = encoder(folder, MARKED, tmp_path)
    conversation = talk(*TURNS)
    ids, predicted = chat.encode(conversation)
    expected = chat._tokenizer.apply_chat_template(
        list(conversation.messages),
        chat_template=MARKED,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert ids.tolist() == expected["input_ids"]
    assert predicted.astype(int).tolist() == expected["assistant_masks"]
    unmarked_ids, unmarked = encoder(folder).encode(conversation)
    assert unmarked_ids.tolist() == ids.tolist()
    assert unmarked.tolist() == predicted.tolist()


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_what_is_predicted_is_what_was_said(folder, tmp_path, template):
    """Whatever is said, merged into whatever tokens: spaces, line breaks, other alphabets, nothing at all."""
    chat = encoder(folder, template, tmp_path)
    draw = random.Random(0)
    pieces = ["a", " ", "\n", "Hier", "ü", "日本", "🙂", "<", "im_end", "  ", "1"]
    for _ in range(150):
        turns, said = [], []
        for _ in range(draw.randint(1, 4)):
            question, answer = ("".join(draw.choices(pieces, k=draw.randint(0, 6))) for _ in range(2))
            turns += [("user", question), ("assistant", answer)]
            said.append(answer)
        ids, predicted = chat.encode(talk(*turns))
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(predicted)) + 1)
        runs = [ids[run].tolist() for run in runs if predicted[run[0]]]
        for run, answer in zip(runs, said, strict=True):
            text = chat._tokenizer.decode(run)
            assert text.endswith(f"{answer}<|im_end|>")
            # Merges across words let a token begin in the header: it is counted with what it ends in.
            begun = len(text) - len(f"{answer}<|im_end|>")
            assert "assistant\n".endswith(text[:begun])
            assert begun == 0 or begun < len(chat._tokenizer.decode(run[:1]))


def test_a_mark_that_leaves_the_end_out_gets_it(folder, tmp_path):
    outside = MARKED.replace(
        "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    assert outside != MARKED
    assert predicted_text(encoder(folder, outside, tmp_path), talk(*TURNS)) == "Ich.<|im_end|>Hier.<|im_end|>"


def test_a_last_turn_that_is_written_otherwise_is_understood(folder, tmp_path):
    chat = encoder(folder, THOUGHTFUL, tmp_path)
    found = predicted_text(chat, talk(*TURNS))
    assert found == "Ich.<|im_end|><think></think>Hier.<|im_end|>"


def test_a_template_that_rewrites_the_past_is_an_error(folder, tmp_path):
    counted = CHATML.replace("{% for", "{{ messages|length }}{% for", 1)
    with pytest.raises(
        ValueError,
        match=r"line 1, message 3: the chat template writes what comes before this turn .*"
        r"'2<\|im_start\|>.* becomes '5<\|im_start\|>.*mark the assistant's turns",
    ):
        encoder(folder, counted, tmp_path).encode(talk(*TURNS))
    shortened = CHATML.replace(
        "message['content'] +", "(message['content'] if loop.last else message['content'][:2]) +"
    )
    with pytest.raises(
        ValueError, match=r"line 1, message 2: the chat template writes this turn differently once"
    ):
        encoder(folder, shortened, tmp_path).encode(talk(("user", "q"), ("assistant", "long"), ("user", "")))
    with pytest.raises(ValueError, match=r"line 1: the conversation begins with an assistant turn"):
        encoder(folder).encode(talk(("assistant", "hello"), ("user", "q")))


def test_what_a_template_refuses_is_told_with_its_line(folder, tmp_path):
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    with pytest.raises(
        ValueError, match=r"line 1: the chat template refuses this conversation: no system role"
    ):
        encoder(folder, strict, tmp_path).encode(talk(*TURNS))


def test_a_template_without_an_end_of_turn_warns(folder, tmp_path):
    chat = encoder(folder, CHATML.replace("<|im_end|>", ""), tmp_path)
    with pytest.warns(
        UserWarning, match=r"ends assistant turns without a special token: the model will not learn"
    ):
        chat.encode(talk(("user", "q"), ("assistant", "a")))


def test_tools_reach_the_template(folder, tmp_path):
    with_tools = "{% if tools %}{{ tools|tojson }}{% endif %}" + CHATML
    chat = encoder(folder, with_tools, tmp_path)
    conversation = Conversation(
        messages=talk(("user", "q"), ("assistant", "a")).messages,
        tools=[{"name": "add"}],
        domain="d",
        name="n",
        place="p",
    )
    ids, _ = chat.encode(conversation)
    assert chat._tokenizer.decode(ids.tolist()).startswith('[{"name": "add"}]<|im_start|>user')


def test_a_tokenizer_without_a_template_says_what_to_give(folder, tmp_path):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(folder)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(
        ValueError, match=r"has no chat template; give one with data.chat.template, a Jinja file"
    ):
        encoder(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"is a file, which holds no chat template; give the directory"):
        encoder(f"{folder}/tokenizer.json")
    (tmp_path / "t.jinja").write_text(CHATML)
    with pytest.raises(ValueError, match=r"data.chat.template has no meaning for the byte tokenizer"):
        chat_encoder(ChatConfig(enable=True, template=str(tmp_path / "t.jinja")), TokenizerConfig())


def test_the_loader_reads_conversations_with_a_template(folder, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(
        "\n".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in TURNS]}) for _ in range(3))
    )
    config = DataConfig(
        seq_len=64,
        microbatch_size=1,
        source=str(path),
        chat=ChatConfig(enable=True),
        tokenizer=TokenizerConfig(name=folder),
        validation_fraction=0.0,
    )
    data = config.build()
    batch = next(data)
    labels = batch.labels_BS[batch.labels_BS >= 0]
    answers = data.tokenizer.decode(labels.tolist())
    assert answers == "Ich.Hier." * batch.num_sequences
    assert batch.num_label_tokens == len(labels)
