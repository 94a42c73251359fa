"""Chats: what of them is learnt, however they are packed; and that it is learnt."""

import json
import unicodedata
from datetime import datetime

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxdp.common.errors import ConfigError
from jaxdp.data import encoding, special_tokens
from jaxdp.data.cache import open_cache
from jaxdp.data.chat import Template, encode_chats, source_of
from jaxdp.data.example import Example
from jaxdp.data.feed import Feed
from jaxdp.data.layout import BEGINS, LEARNT
from jaxdp.data.sources import get_source
from jaxdp.data.tokenizer import get_tokenizer
from jaxdp.run import loop
from jaxdp.run.evaluation import evaluate_checkpoint
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


# As Llama 2's and Mistral's, TinyLlama's, Llama 3's; and one that asks with a space at the end.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LINES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BREAKS = (
    "{% for m in messages %}<s>{{ m.role }}\n\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n\n{% endif %}"
)
SPACES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SAID = chat(
    "hi  there", "Hello", "caf\u00e9 \U0001f600?", "\U0001f600 yes", "bye", "\u00e9h\u00e9, bye"
)


def mergeable(alphabet: list[str], merged: list[str], **options) -> models.BPE:
    """A BPE model of characters, which are merged to certain pieces from left to right."""
    vocab, merges = {c: i for i, c in enumerate(alphabet)}, []
    for piece in merged:
        for cut in range(1, len(piece)):
            if (pair := (piece[:cut], piece[cut])) not in merges:
                merges.append(pair)
            vocab.setdefault(piece[: cut + 1], len(vocab))
    return models.BPE(vocab, merges, **options)


def finished(words: Tokenizer) -> Tokenizer:
    words.add_special_tokens(["<s>", "</s>"])
    begin = ("<s>", words.token_to_id("<s>"))
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    special_tokens.choose(words, {"eos_token": "</s>"}, "auto", "auto")
    return words


def prefixing(normalizer=None, pre_tokenizer=None) -> Tokenizer:
    """Puts a space before every text, as Llama 2's; with bytes for unknown characters."""
    alphabet = [f"<0x{b:02X}>" for b in range(256)] + [chr(c) for c in range(33, 127)] + ["\u2581"]
    merged = ["\u2581Hello", "\u2581[INST]", "\u2581[/INST]", "\u2581hi", "\u2581bye", "\u2581yes"]
    words = Tokenizer(mergeable(alphabet, merged, byte_fallback=True))
    if normalizer:
        words.normalizer = normalizers.Sequence(
            [normalizer, normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    if pre_tokenizer:
        words.pre_tokenizer = pre_tokenizer
    words.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return finished(words)


def of_bytes() -> Tokenizer:
    """A byte-level BPE as GPT-2's, whose post-processor leaves spaces out of the places."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["Hello", "\u0120yes", "\u0120hi", "bye", "\u0120bye", "\u010a\u010a", "\u0120Hello"]
    words = Tokenizer(mergeable(alphabet, merged))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words = finished(words)
    words.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), words.post_processor]
    )
    return words


TOKENIZERS = {
    "prepend": lambda: prefixing(normalizers.NFC()),
    "another length": lambda: prefixing(normalizers.NFD()),
    "metaspace": lambda: prefixing(None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "byte-level": of_bytes,
    "byte": lambda: get_tokenizer("byte", "causal", lambda all: []),
}


@pytest.mark.parametrize("template", [INST, LINES, BREAKS, SPACES])
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_chat_has_the_tokens_of_its_whole_text_and_its_answers_are_learnt(make, template):
    words = make()
    written = Template(template, words)
    [(ids, marks)] = encode_chats(written, [Example("", "", messages=SAID)])
    whole = written.render(SAID, False)
    assert ids.tolist() == words.encode(whole, add_special_tokens=False).ids
    end = words.id_to_token(special_tokens.end_id(words))
    runs = np.split(ids, np.flatnonzero(np.diff(marks & LEARNT)) + 1)[1::2]
    said = [words.decode(run.tolist(), skip_special_tokens=False) for run in runs]
    said = [unicodedata.normalize("NFC", text) for text in said]
    answers = [m["content"] + end for m in SAID if m["role"] == "assistant"]
    assert [text.strip() for text in said] == answers
    begin = special_tokens.begin_id(words)
    assert (ids == begin).sum() == whole.count("<s>") if begin is not None else True


@pytest.mark.parametrize("template", [INST, LINES, BREAKS, SPACES])
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_an_answer_is_asked_for_with_the_tokens_of_training(make, template):
    written = Template(template, make())
    [(ids, _)] = encode_chats(written, [Example("", "", messages=SAID)])
    for turn in (1, 3, 5):
        prompt, space = written.prompt(SAID[:turn])
        assert prompt.tolist() == ids[: len(prompt)].tolist()
        text = written.tokenizer.decode(prompt.tolist(), skip_special_tokens=False) + space
        assert text.endswith(("assistant\n\n", "<|assistant|>\n", "[/INST]", "assistant: "))


def test_a_token_on_the_border_of_a_turn_is_where_its_word_begins():
    words = of_bytes()
    [found] = learnt(words, SPACES, chat("hi", "yes"))
    assert found.endswith("t : [\u0120yes] [</s>] [\u010a]")
    # One of line breaks only is where the first of them is.
    [found] = learnt(words, LINES, chat("hi", "\n\nyes"))
    assert found.endswith("| > \u010a\u010a [\u010a] [y] [e] [s] [</s>] [\u010a]")


def test_places_are_those_in_the_text_whatever_the_post_processor_leaves_out():
    words, text = of_bytes(), "a  yes \u00e9\n"
    before = words.post_processor.__getstate__()
    [(ids, places)] = encoding.encode_placed(words, [text])
    assert words.post_processor.__getstate__() == before
    assert ids.tolist() == encoding.encode(words, [text])[0].tolist()
    assert places.tolist() == [[0, 1], [1, 2], [2, 6], [6, 7], [7, 8], [7, 8], [8, 9]]


def test_a_tokenizer_that_does_not_tell_places_is_refused():
    class Forgetful:
        def normalize(self, normalized):
            text = str(normalized)
            normalized.clear()
            normalized.append(text)

    words = of_bytes()
    words.normalizer = normalizers.Normalizer.custom(Forgetful())
    with pytest.raises(ConfigError, match="doesn't tell which characters of") as refused:
        list(encode_chats(Template(INST, words), [Example("", "", messages=SAID)]))
    assert "\n" not in str(refused.value)


def test_a_template_writes_the_settings_bos_though_documents_do_not_begin_with_it(chats, tmp_path):
    template = "{{ bos_token }} " + TEMPLATE.replace("<s> ", "")
    settings = {"add_bos_token": False, "eos_token": "<end>", "chat_template": template}
    for name in ("<s>", {"content": "<s>"}):
        text = json.dumps(settings | {"bos_token": name})
        (tmp_path / "tokenizer_config.json").write_text(text)
        cache = open_cache(chats)
        words = cache.tokenizer
        assert special_tokens.begin_id(words) is None
        # What a run keeps of the tokenizer says the same.
        for source in (source_of(chats), cache.chat_template):
            text = Template(source, words).render(TWO_TURNS, False)
            assert text == "<s> " + Template(template, words).render(TWO_TURNS, False).lstrip()
        begins = cache.marks["train"] & BEGINS > 0
        assert ((cache.train == words.token_to_id("<s>")) == begins).all()
    chats.data.bos = ""
    assert source_of(chats) == template


def test_other_chats_are_evaluated_as_the_runs_own_with_the_template_of_training(chats, tmp_path):
    """As an eval set, and afterwards; whatever has become of the file of the template."""
    template = "{{ bos_token }} " + TEMPLATE.replace("<s> ", "")
    settings = {"add_bos_token": False, "bos_token": "<s>", "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    file, copy = tmp_path / "own.jinja", tmp_path / "copy.jsonl"
    file.write_text(template)
    lines = (tmp_path / "chats.jsonl").read_text().splitlines()
    copy.write_text("\n".join(lines[-6:]))  # The validation split.
    chats.data.update({"chat_template": str(file), "packing": "documents"})
    chats.update({"seq_len": 24, "eval_sets": f"copy={copy}"})
    found = loop.train(chats, tmp_path / "run").evaluations
    assert found["copy"] == found[""]

    def evaluated(**changes):
        told: list[str] = []
        flat = {key.replace("__", "."): value for key, value in changes.items()}
        _, result = evaluate_checkpoint(tmp_path / "run", "newest", flat, say=told.append)
        return result, told

    for change in (lambda: None, lambda: file.write_text("# " + template), file.unlink):
        change()
        assert evaluated() == (found, [])  # From the run's own token cache.
        assert evaluated(data__path=str(copy))[0] == found
    (tmp_path / "words.txt").write_text("sky blue " * 50)
    other = evaluated(data__path=str(tmp_path / "words.txt"))[0]  # Text is no chat.
    assert other[""].tokens == 100 and other["copy"] == found["copy"]
    (tmp_path / "other.jinja").write_text("! " + template)
    changes = {"data__path": str(copy), "data__chat_template": str(tmp_path / "other.jinja")}
    assert evaluated(**changes)[0] != found


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
    lines = []
    again = Conversation(tmp_path / "run", temperature=0.0, num_tokens=1, report=lines.append)
    assert "".join(again.answer("grass")) == "green" and not lines
    for _ in range(9):  # A conversation beyond the context is told, once.
        assert list(again.answer("grass"))
    assert len(lines) == 1 and "the model's context of 24 tokens" in lines[0]
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
        Template("{{ messages | length }}", words).chats(TWO_TURNS)


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
