import dataclasses
import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdp.common.errors import ConfigError
from jaxdp.data import mixture, pipeline
from jaxdp.data.cache import open_cache
from jaxdp.data.sequences import Examples, Windows
from jaxdp.run import loop
from support.sequences import FEW, assert_equal, examples, joined

L, G = 8, 4
# Three sources of 100, 60 and 203 tokens 0, 1, 2, ...: a token tells its position.
BORDERS, SHARES = (100, 160, 363), (5, 2, 3)
WINDOWS = Windows(np.arange(363), L, "causal", borders=BORDERS, shares=SHARES)


def train(sequences=WINDOWS, steps=range(30), **changes) -> list[dict]:
    options = {"seed": 0, "start_step": steps.start, "num_steps": steps.stop}
    options |= {"global_batch_size": G, "process_index": 0, "process_count": 1}
    return list(pipeline.train_batches(sequences, **options | changes))


def starts(steps=400) -> np.ndarray:
    return np.concatenate([batch["inputs"][:, 0] for batch in train(steps=range(steps))])


@pytest.mark.parametrize("before", [3, 37])
@pytest.mark.parametrize("shares", [SHARES, (1, 7, 2)])
def test_changed_weights_go_on_with_each_sources_next_sequence(shares, before):
    """None twice and none left out of any source."""

    def begin(numbers, sequences, *origin):
        return pipeline.start_positions(
            np.asarray(numbers, np.int64), sequences, 0, *origin
        ).numpy()

    origin = pipeline.Position(9, tuple(mixture.cycle(SHARES).taken(before).tolist()))
    changed = dataclasses.replace(WINDOWS, shares=shares)
    old, new = begin(range(before), WINDOWS), begin(range(before, 300), changed, origin)
    found, whole = np.concatenate([old, new]), begin(range(1500), WINDOWS)
    for first, end in itertools.pairwise((0, *BORDERS)):
        of_source, expected = (x[(first <= x) & (x < end)] for x in (found, whole))
        assert of_source.tolist() == expected[: len(of_source)].tolist()


@FEW
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_each_source_is_within_one_of_its_share_after_any_number_of_turns(shares):
    turns = mixture.cycle(shares)
    counts = np.cumsum(turns.turns[:, None] == np.arange(len(shares)), axis=0)
    assert counts[-1].tolist() == shares  # So that the cycles after it are within one, too.
    for now, row in enumerate(counts.tolist(), 1):
        for count, share in zip(row, shares, strict=True):
            assert abs(count * sum(shares) - share * now) < sum(shares)
    for source, share in enumerate(shares):
        assert turns.earlier_turns[turns.turns == source].tolist() == list(range(share))


@pytest.mark.parametrize(
    ("path", "shares"),
    [
        ("0.7*tfds:lm1b+0.3*text:a/*.txt", {"tfds:lm1b": 7, "text:a/*.txt": 3}),
        ("2*text:a+b.txt+1*jsonl:c*+d", {"text:a+b.txt": 2, "jsonl:c*+d": 1}),
        ("50*text:a+25*text:b+25.0*text:c", {"text:a": 2, "text:b": 1, "text:c": 1}),
        ("3*tfds:a/b:1.0.0", {"tfds:a/b:1.0.0": 1}),
        ("2*.txt", {"2*.txt": 1}),
        ("text:0.5*text:a", {"text:0.5*text:a": 1}),
        ("a+0.5*b.txt", {"a+0.5*b.txt": 1}),
        ("", {"": 1}),
    ],
)
def test_paths_and_their_weights(path, shares):
    assert mixture.parse(path) == shares


@pytest.mark.parametrize("weight", ["0", "-1", "x", "", "1e3", "0.0", "nan", "1" * 5000, " 1"])
def test_a_weight_that_is_none_is_refused(weight):
    for path in (f"1*text:a+{weight}*text:b", f"{weight}*text:b+1*text:a"):
        with pytest.raises(ConfigError, match=r"\Adata\.path=.* gives 'text:b' the weight .*: w"):
            mixture.parse(path)


@pytest.mark.parametrize("path", ["1*text:a+2*text:a", "0.123456789*text:a+1*text:b"])
def test_a_mixture_that_can_not_be_is_refused(path):
    with pytest.raises(ConfigError, match=r"data\.path=.*(twice: add|exact: give them)"):
        mixture.parse(path)


def test_sources_take_their_turns_in_every_prefix():
    first = starts()
    source = np.searchsorted(BORDERS, first, side="right")
    for now in (1, 4, 7, 100, 1599, 1600):
        counts = np.bincount(source[:now], minlength=3)
        for count, share in zip(counts.tolist(), SHARES, strict=True):
            assert abs(count - Fraction(share * now, 10)) < 1


def test_windows_stay_within_a_source_and_each_of_its_epochs_is_a_permutation():
    first = starts()
    source = np.searchsorted(BORDERS, first, side="right")
    for number, part in enumerate(WINDOWS.parts):
        own = first[source == number]
        epochs = own[: len(own) // part.count * part.count].reshape(-1, part.count)
        assert len(epochs) > 5
        for epoch in epochs:
            np.testing.assert_array_equal(np.diff(np.sort(epoch)), L)
        assert len({tuple(epoch - epoch.min()) for epoch in epochs}) > 5
        end = BORDERS[number]
        assert (own >= part.first).all() and (own + L < end).all()


def test_a_mixed_batch_is_a_function_of_seed_and_step_for_any_number_of_processes():
    whole = train()
    assert_equal(train(steps=range(17, 30)), whole[17:])
    assert_equal(joined([train(process_index=i, process_count=4) for i in range(4)]), whole)
    [far] = train(steps=range(2**31 - 2, 2**31 - 1))
    np.testing.assert_array_equal(far["targets"], far["inputs"] + 1)
    with pytest.raises(AssertionError):
        assert_equal(train(seed=1), whole)


def test_one_source_is_what_it_is_without_weights():
    alone = Windows(np.arange(363), L, "causal")
    mixed = Windows(np.arange(363), L, "causal", borders=(363,), shares=(1,))
    assert_equal(train(alone), train(mixed))


def test_examples_are_mixed_too():
    """With one of them left out, as nothing of it remains to predict."""
    pairs = [([1], [1]), ([1] * 20, [1]), ([1], [1, 1]), ([2], [2]), ([2], [2, 2]), ([2], [2] * 3)]
    one = examples(pairs)
    border = int(one.index[3, 0])
    mixed = Examples(
        one.tokens, one.index, L, "causal", borders=(border, len(one.tokens)), shares=(1, 2)
    )
    assert [(part.first, part.count) for part in mixed.parts] == [(0, 2), (2, 3)]
    kinds = np.concatenate([batch["inputs"][:, 0] for batch in train(mixed)])
    assert np.bincount(kinds[:60]).tolist() == [0, 20, 40]


@pytest.fixture
def mixed(config, tmp_path):
    for name, word, size in (("a", "apple ", 50), ("b", "banana ", 100), ("c", "cherry ", 200)):
        (tmp_path / f"{name}.txt").write_text(word * size)
    config.data.path = f"0.5*text:{tmp_path}/a.txt+0.5*text:{tmp_path}/[bc].txt"
    config.data.cache_dir, config.sample.num_tokens = str(tmp_path / "cache"), 0
    return config


def test_weights_do_not_make_another_cache(mixed, tmp_path):
    cache = open_cache(mixed)
    assert cache.train_borders == (270, 270 + int(2100 * 0.9))
    text = cache.tokenizer.decode(cache.train[:270].tolist())
    assert text == ("apple " * 50)[:270]
    mixed.data.path = mixed.data.path.replace("0.5*", "3*", 1)
    assert open_cache(mixed).folder == cache.folder


def test_a_mixed_run_on_two_devices_is_that_on_one(mixed, tmp_path, capsys):
    one, two = (
        loop.train(mixed, tmp_path / str(n), devices=jax.local_devices()[:n]) for n in (1, 2)
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "a.txt, 270 tokens, 1.60 epochs" in out and "[bc].txt, 1.89k tokens" in out
    # Two losses whose sums are in another order.
    np.testing.assert_allclose(one.evaluation.loss, two.evaluation.loss, rtol=2e-5)


def test_a_source_that_is_too_small_and_epochs_of_a_mixture_are_refused(mixed, tmp_path):
    mixed.num_epochs = 1
    with pytest.raises(ConfigError, match=r"num_epochs=1 has no meaning with several sources"):
        loop.train(mixed, tmp_path / "run")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"data\.path='text:.*a\.txt' gives 0 training tokens"):
        loop.train(mixed, tmp_path / "run")
