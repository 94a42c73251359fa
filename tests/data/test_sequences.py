import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdp.common.errors import ConfigError
from jaxdp.data import pipeline
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.data.pipeline import eval_batches
from jaxdp.data.sequences import Windows
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer
from jaxdp.run.preflight import check_data
from jaxdp.step import losses
from jaxdp.step.setup import validate
from support.models import LLAMA, SMALL, VARIANTS, apply, initialised
from support.runs import after
from support.sequences import (
    END,
    FEW,
    L,
    assert_equal,
    evaluation,
    examples,
    in_a_row,
    joined,
    train,
)
from support.steps import assert_same_run
from support.steps import train as train_steps
from support.texts import TEXT

DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=20), min_size=2, max_size=20)


def corpus(seed=0, documents=60) -> np.ndarray:
    """Documents of 0 to 14 tokens and their ends, many of them cut by windows of 8 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 15, documents)
    return in_a_row([rng.integers(1, 10, length) for length in lengths])


@FEW
@given(DOCUMENTS, st.sampled_from(["causal", "masked"]))
def test_packed_documents_are_the_stream_and_no_token_is_lost(texts, objective):
    """Segment by segment, the targets that count are all tokens, in order."""
    tokens = in_a_row(texts)
    if len(tokens) < 2:
        return
    batches = evaluation(tokens, objective, END)
    plain = evaluation(tokens, objective)
    seen = []
    for batch, stream in zip(batches, plain, strict=True):
        assert (batch["inputs"] == stream["inputs"]).all()
        assert (batch["targets"] == stream["targets"]).all()
        assert (batch["weights"] <= stream["weights"]).all()
        seen += batch["targets"][batch["weights"] == 1].tolist()
    first = set(np.flatnonzero(tokens[:-1] == END) + 1) if objective == "causal" else set()
    assert seen == [int(t) for i, t in enumerate(tokens) if i > 0 and i not in first]


@FEW
@given(DOCUMENTS, st.integers(0, 50))
def test_segments_are_documents_and_positions_count_in_them(texts, start):
    tokens = in_a_row([*texts, range(1, 60)])
    batch = Windows(tokens, L, "causal", END).take(np.array([start % len(tokens)]))
    inputs, targets, weights, segments, positions = (
        batch[key][0] for key in ("inputs", "targets", "weights", "segments", "positions")
    )
    segment, position = 0, 0
    for i in range(L):
        assert (segments[i], positions[i]) == (segment, position)
        inside = start % len(tokens) + i + 1 < len(tokens)
        assert weights[i] == (inputs[i] != END and inside)
        if i + 1 < L and weights[i]:
            assert targets[i] == inputs[i + 1]
        segment, position = (segment + 1, 0) if inputs[i] == END else (segment, position + 1)


def test_packed_batches_are_a_function_of_seed_and_step_for_any_number_of_processes():
    tokens = corpus()
    whole = train(tokens, end=END)
    assert {key: value.dtype for key, value in whole[0].items()} == {
        "inputs": np.int32,
        "targets": np.int32,
        "weights": np.float32,
        "segments": np.int32,
        "positions": np.int32,
    }
    assert_equal(train(tokens, range(13, 30), end=END), whole[13:])
    parts = [train(tokens, end=END, process_index=i, process_count=2) for i in range(2)]
    assert_equal(joined(parts), whole)
    with pytest.raises(AssertionError):
        assert_equal(train(tokens, end=END, seed=1), whole)


VARIANTS = VARIANTS | {
    "bert": dataclasses.replace(SMALL, causal=False),
    "rotary bert": dataclasses.replace(LLAMA, causal=False),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_of_packed_documents_are_those_of_each_alone(config):
    model, params = initialised(config)
    documents = [[1, 2, 0], [3, 0], [0], [4, 5]]
    inputs = np.concatenate(documents)[None]
    batch = Windows(np.append(inputs, 1), 8, "causal", END).take(np.array([0]))
    packing = {key: batch[key] for key in ("segments", "positions")}
    packed = apply(model, params, inputs, **packing)[0]
    alone = [apply(model, params, np.array([document]))[0] for document in documents]
    # Sums of up to 32 float32 terms in another order, of logits of size 1 to 10.
    np.testing.assert_allclose(packed, np.concatenate(alone), rtol=1e-4, atol=1e-5)
    # Without them the documents see each other.
    assert not np.allclose(apply(model, params, inputs)[0], packed, rtol=1e-2, atol=1e-2)


def test_no_gradient_crosses_a_documents_border():
    model, params = initialised(LLAMA)
    segments = jnp.array([[0, 0, 0, 1, 1, 2, 2, 2]])

    @jax.jit
    @jax.jacobian
    def influence(rows):
        embedding = params["embed"]["embedding"].at[jnp.arange(8)].set(rows)
        changed = params | {"embed": {"embedding": embedding}}
        return model.apply({"params": changed}, jnp.arange(8)[None], segments=segments)[0].sum(-1)

    reaches = jnp.abs(influence(params["embed"]["embedding"][:8])).sum(-1) > 0
    same = segments[0][:, None] == segments[0]
    assert (reaches == (jnp.tril(jnp.ones((8, 8), bool)) & same)).all()


def packed_batches(objective, steps=4):
    rows = {"busy": np.zeros(8, np.float32)}
    tokens, windows = corpus(1, 200), {}
    windows = Windows(tokens, 16, objective, END)
    for step in range(steps):
        yield windows.take(np.arange(8) * 16 + 128 * step) | rows


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_packed_documents_are_the_same_run_on_any_number_of_devices(config, objective, monkeypatch):
    """Also with accumulation, dropout, and the masks of masked-LM."""
    config.objective, config.model.dropout = objective, 0.3
    mask = functools.partial(losses.mask_tokens, mask_id=19, vocab_size=20)
    options = {"transform": mask} if objective == "masked" else {}
    monkeypatch.setattr("support.steps.batches", lambda steps: packed_batches(objective, steps))
    one = train_steps(config, 1, **options)
    assert_same_run(one, train_steps(config, 4, **options))
    assert_same_run(one, train_steps(config, 2, accum=2, **options))

    def without(steps):
        for batch in packed_batches(objective, steps):
            yield {k: v for k, v in batch.items() if k not in ("segments", "positions")}

    monkeypatch.setattr("support.steps.batches", without)
    with pytest.raises(AssertionError):
        assert_same_run(one, train_steps(config, 1, **options))


def test_documents_need_a_tokenizer_that_ends_them(config):
    config.data.packing = "documents"
    with pytest.raises(ConfigError, match=r"data\.packing='documents' needs .*tokenizer='char'"):
        check_data(Feed(config, open_cache(config)))


def test_a_run_with_packed_documents_trains_evaluates_and_resumes(config, tmp_path):
    """On text files, of which each is a document."""
    from jaxdp.run import loop

    for number, start in enumerate(range(0, len(TEXT), 40)):
        (tmp_path / f"{number:04}.txt").write_text(TEXT[start : start + 40])
    config.data.path, config.data.packing = f"text:{tmp_path}/*.txt", "documents"
    config.tokenizer, config.data.cache_dir = "byte", str(tmp_path / "cache")
    options = {"devices": jax.local_devices()[:2]}
    whole = loop.train(config, tmp_path / "whole", **options)
    part = loop.train(config, tmp_path / "parts", stop_requested=after(6), **options)
    assert part.step < 6
    parts = loop.train(config, tmp_path / "parts", **options)
    for a, b in zip(*(jax.tree.leaves(run.state.params) for run in (whole, parts)), strict=True):
        assert (a == b).all()
    # The exact pass, written down directly.
    cache = open_cache(config)
    model = Transformer(ModelConfig.from_config(config, cache.vocab_size))
    params, sums = jax.device_get(whole.state.params), np.zeros(2)
    for batch in Feed(config, cache).evaluation():
        assert len(batch["inputs"]) == config.global_batch_size
        more = {key: batch[key] for key in ("segments", "positions")}
        logits = apply(model, params, batch["inputs"], **more)
        sums += np.array(losses.cross_entropy(logits, batch["targets"], batch["weights"]))
    assert whole.evaluation.tokens == sums[1]
    np.testing.assert_allclose(whole.evaluation.loss, sums[0] / sums[1], rtol=1e-5)


# Prompts, texts and the lengths of sequences.
PAIRS = st.lists(
    st.tuples(st.lists(st.integers(1, 9), max_size=9), st.lists(st.integers(1, 9), max_size=9)),
    min_size=1,
    max_size=12,
)


@settings(FEW, max_examples=20)  # Each of them makes pipelines, which takes most of its time.
@given(PAIRS, st.sampled_from(["causal", "masked"]), st.integers(2, 12))
def test_padded_examples_are_one_to_a_sequence_with_loss_on_the_text_only(
    pairs, objective, seq_len
):
    found, ahead = examples(pairs, objective, seq_len), int(objective == "causal")
    expected, cut = [], 0
    for prompt, text in pairs:
        tokens = [*prompt, *text, END]
        counts = [0] * len(prompt) + [1] * (len(text) + 1)
        cut += len(tokens) > seq_len + ahead
        inputs = tokens[:seq_len]
        targets, weights = (x[ahead : seq_len + ahead] for x in (tokens, counts))
        if sum(weights):
            rows = (inputs, targets, weights)
            expected.append([x + [0] * (seq_len - len(x)) for x in rows])
    assert (found.total, found.parts[0].count, found.cut) == (len(expected), len(expected), cut)
    if not expected:
        return
    options = {"max_batches": 0, "global_batch_size": 4, "process_index": 0, "process_count": 1}
    batches = list(eval_batches(found, **options))
    rows = [np.concatenate([b[k] for b in batches]) for k in ("inputs", "targets", "weights")]
    for values, wanted in zip(rows, zip(*expected, strict=True), strict=True):
        assert values[: len(expected)].tolist() == list(wanted)
    assert not rows[2][len(expected) :].any()
    assert ("segments" in batches[0]) == (objective == "masked")
    options.pop("max_batches")
    steps = pipeline.steps_in(2, found, 4)
    options |= {"seed": 0, "start_step": 0, "num_steps": steps, "num_epochs": 2}
    batches = list(pipeline.train_batches(found, **options))
    rows = np.concatenate([np.stack([b["inputs"], b["targets"]], 1) for b in batches])
    for epoch in range(2):  # Each is a permutation.
        part = rows[epoch * len(expected) : (epoch + 1) * len(expected)].tolist()
        assert sorted(part) == sorted([i, t] for i, t, _ in expected)
    assert not np.concatenate([b["weights"] for b in batches])[2 * len(expected) :].any()


def test_padding_is_not_seen():
    """The logits of an example are those of it alone, also where every token sees all."""
    for base in (SMALL, LLAMA):
        for objective in ("causal", "masked"):
            config = dataclasses.replace(base, causal=objective == "causal")
            model, params = initialised(config)
            batch = examples([([1, 2], [3]), ([4], [])], objective).take(np.array([0, 1]))
            packing = {k: batch[k] for k in ("segments",) if k in batch}
            logits = apply(model, params, batch["inputs"], **packing)
            for row, tokens in enumerate(([1, 2, 3, END], [4, END])):
                alone = apply(model, params, np.array([tokens]))[0]
                # Sums of up to 32 float32 terms in another order.
                np.testing.assert_allclose(logits[row][: len(tokens)], alone, rtol=1e-4, atol=1e-5)


@pytest.fixture
def fine_tuning(config, tmp_path):
    """A config of padded JSON lines; the first of them is longer than a sequence."""
    lines = [{"question": f"{i} squared?", "answer": str(i * i)} for i in range(40)]
    lines = [
        {"question": "x" * 5, "answer": "y" * 50},
        {"question": "z" * 50, "answer": ""},
        *lines,
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    config.data.update({"path": f"jsonl:{tmp_path}/*.jsonl", "packing": "padded"})
    config.data.update({"prompt_key": "question", "text_key": "answer"})
    config.data.cache_dir, config.tokenizer, config.seq_len = str(tmp_path / "cache"), "byte", 20
    return config


def test_fine_tuning_on_json_lines(fine_tuning, tmp_path, capsys):
    """The cut ones are counted, and the last evaluation is the pass, written down directly."""
    from jaxdp.run import loop

    result = loop.train(fine_tuning, tmp_path / "run", devices=jax.local_devices()[:2])
    out = " ".join(capsys.readouterr().out.split())
    assert "37, of which 2 are cut to seq_len=20, and 1 left out as nothing remains" in out
    cache = open_cache(fine_tuning)
    model = Transformer(ModelConfig.from_config(fine_tuning, cache.vocab_size))
    params, total, count = jax.device_get(result.state.params), 0.0, 0
    for i in range(35, 40):
        prompt, text = f"{i} squared?".encode(), [*str(i * i).encode(), 256]
        ids = np.array([*prompt, *text])
        log_p = jax.nn.log_softmax(apply(model, params, ids[None, :-1])[0])
        total -= log_p[np.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :].sum()
        count += len(text)
    assert result.evaluation.tokens == count
    np.testing.assert_allclose(result.evaluation.loss, total / count, rtol=1e-5)
    assert cache.validation_bytes == count - 5
    np.testing.assert_allclose(cache.tokens_per_byte, count / (count - 5))


def test_a_cache_of_examples_that_is_harmed_is_made_anew(fine_tuning):
    whole = open_cache(fine_tuning)
    before = whole.examples["train"].tolist()
    path, reports = whole.folder / "train.examples.bin", []
    for harm in (lambda data: data[:-16], lambda data: b"\1" + data[1:]):
        path.write_bytes(harm(path.read_bytes()))
        assert open_cache(fine_tuning, reports.append).examples["train"].tolist() == before
    assert sum("is damaged" in line for line in reports) == 2


def test_examples_of_which_nothing_is_left_are_refused(fine_tuning):
    fine_tuning.seq_len = 2
    with pytest.raises(ConfigError, match=r"no training example in which seq_len=2 leaves"):
        check_data(Feed(fine_tuning, open_cache(fine_tuning)))


def test_prompts_need_padding(fine_tuning):
    fine_tuning.data.packing = "documents"
    with pytest.raises(ConfigError, match=r"data\.prompt_key='question' .*use 'padded'"):
        validate(fine_tuning)
