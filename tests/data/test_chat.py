"""Chats: what of them is learnt, however they are packed; and that it is learnt."""

import json
from datetime import datetime

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxdp.common.errors import ConfigError
from jaxdp.data.cache import open_cache
from jaxdp.data.chat import Template, encode_chats
from jaxdp.data.example import Example
from jaxdp.data.feed import Feed
from jaxdp.data.layout import BEGINS, LEARNT
from jaxdp.data.sources import get_source
from jaxdp.step.setup import validate
from jaxdp.workdir.conversation import Conversation
from support.bad_input import train

SPECIAL = ["<s>", "<end>"]
WORDS = ["?", "user", "assistant", "system", "sky", "grass", "blue", "green"]
TEMPLATE = (
    "{% for m in messages %}\n<s> {{ m.role }} {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}\n<s> assistant {% endif %}"
)
# Leaves out of a turn what was thought, once others follow.
FORGETFUL = (
    "{% for m in messages %}\n<s> {{ m.role }} {% if loop.last and m.role == 'assistant' %}? "
    "{% endif %}{{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}\n<s> assistant {% endif %}"
)


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


TWO_TURNS = chat("sky", "blue", "grass", "green")


def save(folder, template: str | None = TEMPLATE) -> Tokenizer:
    """Writes a tokenizer as transformers does, and returns it."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    words.add_special_tokens(SPECIAL)
    words.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return words


@pytest.fixture
def chats(config, tmp_path):
    """A config of chats about the colours of things."""
    save(tmp_path)
    lines = [chat("sky", "blue"), chat("grass", "green"), TWO_TURNS] * 20
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in lines))
    config.data.update({"path": f"{tmp_path}/chats.jsonl", "messages_key": "messages"})
    config.data.cache_dir, config.tokenizer = str(tmp_path / "cache"), f"hf:{tmp_path}"
    return config


def learnt(words: Tokenizer, template: str, messages) -> list[str]:
    """The text of each example, what is learnt of it in brackets."""
    found = []
    examples = [Example("", "", messages=messages)]
    for ids, marks in encode_chats(Template(template, words), examples):
        names = [words.id_to_token(int(i)) for i in ids]
        assert (marks & BEGINS).nonzero()[0].tolist() == [0]
        found.append(
            " ".join(f"[{n}]" if m & LEARNT else n for n, m in zip(names, marks, strict=True))
        )
    return found


def test_only_the_answers_are_learnt_each_with_its_end(tmp_path):
    words = save(tmp_path)
    system = [{"role": "system", "content": "blue"}]
    assert learnt(words, TEMPLATE, system + TWO_TURNS) == [
        "<s> system blue <end> <s> user sky <end> <s> assistant [blue] [<end>] "
        "<s> user grass <end> <s> assistant [green] [<end>]"
    ]
    assert learnt(words, TEMPLATE, chat("sky", "blue", "grass"))[0].endswith("<s> user grass <end>")


def test_turns_that_are_written_in_another_way_later_are_learnt_apart(tmp_path):
    words = save(tmp_path)
    assert learnt(words, FORGETFUL, TWO_TURNS) == [
        "<s> user sky <end> <s> assistant [?] [blue] [<end>]",
        "<s> user sky <end> <s> assistant blue <end> <s> user grass <end> "
        "<s> assistant [?] [green] [<end>]",
    ]


def test_texts_to_train_on_do_not_depend_on_the_day(tmp_path):
    words, source = save(tmp_path), TEMPLATE + "{{ strftime_now('%d %b %Y') }}"
    assert Template(source, words).render(TWO_TURNS, False).endswith("26 Jul 2024")
    now = Template(source, words, datetime(2030, 1, 2))
    assert now.render(TWO_TURNS, False).endswith("02 Jan 2030")


def test_an_answer_ends_with_the_turn_or_the_document(tmp_path):
    words = save(tmp_path)
    assert Template(TEMPLATE, words).stop_ids() == {words.token_to_id("<end>")}
    assert Template(TEMPLATE.replace("<end>", "sky"), words).stop_ids() == set()


@pytest.mark.parametrize("packing", ["stream", "documents", "padded"])
def test_however_chats_are_packed_the_same_is_learnt(packing, chats):
    chats.data.packing, chats.seq_len = packing, 24
    cache = open_cache(chats)
    sequences = Feed(chats, cache).validation
    batch = sequences.take(np.arange(sequences.total) * sequences.stride)
    targets = batch["targets"][batch["weights"] > 0]
    names = [cache.tokenizer.id_to_token(int(i)) for i in targets]
    # Of 60 chats the last 6, two of each.
    assert sorted(names) == sorted(["blue", "<end>"] * 4 + ["green", "<end>"] * 4)
    if packing == "documents":  # A chat of two turns is one.
        first = batch["positions"] == 0
        assert (batch["inputs"][first][1:] == cache.tokenizer.token_to_id("<s>")).all()
        assert first.sum() - len(first) <= 6
    assert cache.tokens_per_byte is None


def test_a_chat_model_answers_its_training_question(chats, tmp_path, command):
    chats.data.packing, chats.seq_len, chats.num_train_steps = "documents", 24, 100
    chats.update({"eval_every": 100, "log_every": 100})
    chats.checkpoint.every, chats.optimizer.learning_rate = 100, 0.05
    train(chats, tmp_path / "run")
    conversation = Conversation(tmp_path / "run", temperature=0.0, num_tokens=9)
    for question, answer in (("sky", "blue"), ("grass", "green")):
        assert "".join(conversation.answer(question)) == answer
    assert conversation.messages == TWO_TURNS
    # Another text keeps the run's tokenizer and template.
    again = Conversation(tmp_path / "run", temperature=0.0, num_tokens=1)
    assert "".join(again.answer("grass")) == "green"
    # The command answers line by line, up to an empty one.
    flags = (f"--workdir={tmp_path / 'run'}", "--chat", "--temperature=0", "--num_tokens=9")
    lines = "sky\ngrass\n\nsky\n"
    assert command("generate", *flags, stdin=lines).stdout == "blue\ngreen\n"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "has no 'messages' but nothing"),
        ("sky", "holds no chat in 'messages': write a list"),
        ([], "holds no chat"),
        (chat("sky"), 'at least one of the role "assistant"'),
        ([{"role": "assistant", "content": 3}], "holds no chat"),
    ],
)
def test_what_is_no_chat_is_refused(messages, said, chats, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(ConfigError, match=said):
        list(get_source(chats).examples("validation"))


def test_a_template_that_is_missing_or_wrong_is_refused(chats, tmp_path):
    words = save(tmp_path, template=None)
    with pytest.raises(ConfigError, match=r"has none: give one as a file, data\.chat_template="):
        open_cache(chats)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    chats.data.chat_template = str(tmp_path / "own.jinja")
    assert len(open_cache(chats).train)
    with pytest.raises(ConfigError, match=r"data\.chat_template can't be read"):
        Template("{% for", words)
    for refusing in ("{{ raise_exception('no') }}", "{{ messages.nothing() }}"):
        with pytest.raises(ConfigError, match="the chat template refuses"):
            Template(refusing, words).render(TWO_TURNS, False)
    with pytest.raises(ConfigError, match="can't be told apart"):
        Template("{{ messages | length }}", words).parts(TWO_TURNS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.messages_key": "", "data.chat_template": "x"}, "has no meaning without"),
        ({"data.prompt_key": "q", "data.packing": "padded"}, "does not go with data.prompt_key"),
        ({"objective": "masked"}, "needs objective='causal'"),
    ],
)
def test_keys_that_do_not_go_with_chats(changes, said, chats):
    chats.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=said):
        validate(chats)


def test_text_files_hold_no_chats(chats, text_file):
    chats.data.path = str(text_file)
    with pytest.raises(ConfigError, match="messages_key='messages' does not work with data"):
        get_source(chats)
