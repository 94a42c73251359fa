import itertools
from pathlib import Path

import numpy as np
import pytest

from jaxdp.configs import default
from jaxdp.data.cache import TokenCache
from jaxdp.data.feed import Feed
from jaxdp.data.pipeline import Position, start_positions, steps_in
from jaxdp.data.sequences import Windows
from support.sequences import SLACK, TOKENS, G, L, W, assert_equal, evaluation, joined, train


def first_tokens(batches) -> list[int]:
    return np.concatenate([batch["inputs"][:, 0] for batch in batches]).tolist()


def starts(seed: int = 0, epochs: int = 1) -> np.ndarray:
    """[epochs, W] where the windows of each epoch start."""
    # The order is the same for every size of batch; a large one is faster.
    batches = train(seed=seed, steps=range(-(-epochs * W // 256)), global_batch_size=256)
    return np.reshape(first_tokens(batches)[: epochs * W], (epochs, W))


def test_a_batch_has_the_promised_shapes_and_types():
    for batch in train(steps=range(2)) + evaluation(TOKENS):
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "inputs": ((G, L), np.int32),
            "targets": ((G, L), np.int32),
            "weights": ((G, L), np.float32),
        }


def test_there_is_a_batch_per_step():
    assert [len(train(steps=range(a, b))) for a, b in ((0, 5), (3, 5), (5, 5))] == [5, 2, 0]


def test_causal_targets_are_the_next_tokens():
    for batch in train():
        np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
        np.testing.assert_array_equal(np.diff(batch["inputs"], axis=1), 1)
        assert (batch["weights"] == 1).all()


def test_masked_targets_are_the_inputs():
    for causal, masked in zip(train(), train(objective="masked"), strict=True):
        np.testing.assert_array_equal(masked["inputs"], masked["targets"])
        np.testing.assert_array_equal(masked["targets"], causal["targets"])


@pytest.mark.parametrize("start", [1, 7, 29])
def test_a_run_that_starts_at_a_step_goes_on_as_one_from_the_beginning(start):
    assert_equal(train(steps=range(start, 30)), train()[start:])


def test_the_total_number_of_steps_does_not_change_the_first_ones():
    assert_equal(train(steps=range(10)), train()[:10])


def test_a_step_in_the_far_future_has_its_batch_at_once():
    step = 2**31 - 2
    [batch] = train(steps=range(step, step + 1))
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(processes):
    parts = [train(process_index=i, process_count=processes) for i in range(processes)]
    assert_equal(joined(parts), train())


def test_the_sequences_do_not_depend_on_how_many_make_a_batch():
    large = train(steps=range(10), global_batch_size=12)
    assert first_tokens(large) == first_tokens(train(steps=range(30), global_batch_size=4))


def test_the_windows_of_an_epoch_lie_side_by_side_and_come_once():
    for epoch in starts(epochs=5):
        np.testing.assert_array_equal(np.diff(np.sort(epoch)), L)


def test_a_token_is_a_target_at_most_once_an_epoch():
    # Such a W that G divides an epoch, so that batches give whole epochs.
    tokens = np.arange((13 * G + 1) * L + 1 + 5)
    batches = train(tokens, steps=range(3 * 13))
    targets = np.reshape([batch["targets"] for batch in batches], (3, -1))
    for epoch in targets:
        assert len(np.unique(epoch)) == len(epoch) > len(tokens) - 1 - 2 * L


@pytest.mark.parametrize("length", [*range(L + 1, 5 * L), 1000])
def test_fewer_than_two_windows_of_tokens_are_left_out_of_an_epoch(length):
    [part] = Windows(np.arange(length), L, "causal").parts
    assert part.count >= 1
    assert 0 <= part.max_offset == length - 1 - part.count * L < 2 * L


def test_each_epoch_has_an_order_of_its_own():
    epochs = starts(epochs=20)
    orders = [tuple(np.argsort(epoch)) for epoch in epochs]
    assert len(set(orders)) == 20
    assert tuple(range(W)) not in orders


def test_the_offsets_take_turns_over_all_there_are():
    offsets = starts(epochs=2 * (SLACK + 1)).min(axis=1)
    first, second = offsets[: SLACK + 1], offsets[SLACK + 1 :]
    assert sorted(first) == sorted(second) == list(range(SLACK + 1))
    assert first.tolist() != second.tolist()


def test_seeds_give_orders_of_their_own():
    orders = [tuple(starts(seed)[0]) for seed in (0, 1, 2, 256, 2**31 - 1)]
    assert len(set(orders)) == len(orders)


def test_the_orders_of_epochs_and_seeds_have_nothing_to_do_with_each_other():
    windows = Windows(np.broadcast_to(np.uint16(0), 64 * 10**6), 64, "causal")
    [part] = windows.parts
    some = np.random.default_rng(0).integers(0, part.count, 2000)

    def order(seed, epoch):
        return start_positions(epoch * part.count + some, windows, seed).numpy()

    # The correlation of random numbers has a standard deviation of 2000 ** -0.5 = 0.022; this
    # allows six. `shuffle=1` gives 0.5.
    for orders in [order(0, epoch) for epoch in range(5)], [order(seed, 0) for seed in range(5)]:
        assert np.abs(np.corrcoef(orders)[np.triu_indices(5, 1)]).max() < 6 * 2000**-0.5


def test_a_run_that_an_older_version_began_goes_on_in_its_order():
    windows = Windows(np.zeros(200, np.uint16), 8, "causal")
    found = start_positions(np.arange(0, 60, 5), windows, 3, Position(shuffle=1))
    before = [59, 75, 139, 115, 155, 164, 148, 76, 140, 44, 109, 93]  # As that version had it.
    assert found.numpy().tolist() == before
    assert feed(Position(3, (15,), shuffle=1), 0).position(5) == Position(5, (25,), shuffle=1)


def test_the_order_is_about_uniform():
    # Each of the W windows comes first in N / W of N epochs, give or take; the sum of
    # (count - N / W)^2 / (N / W) is chi-square distributed with W - 1 degrees of freedom, so has
    # mean W - 1 and standard deviation sqrt(2 (W - 1)). Six of these allow for any sound shuffle,
    # and the seed is fixed. The identity, or one rotation for all epochs, gives more than N.
    n = 40 * W
    epochs = starts(epochs=n)
    first = (epochs[:, 0] - epochs.min(axis=1)) // L
    counts = np.bincount(first, minlength=W)
    chi_square = float(np.sum((counts - n / W) ** 2 / (n / W)))
    assert abs(chi_square - (W - 1)) < 6 * (2 * (W - 1)) ** 0.5


@pytest.mark.parametrize("length", [L + 1, L + 2, 2 * L, 2 * L + 1, 3 * L])
def test_a_tiny_corpus_is_a_window_over_and_over(length):
    tokens = np.arange(length, dtype=np.uint16)
    seen = set(first_tokens(train(tokens, steps=range(40))))
    assert seen == set(range(length - L))


def test_large_token_ids_stay_what_they_are():
    tokens = np.full(50, 2**16 - 1, np.uint16)
    assert (train(tokens, steps=range(1))[0]["inputs"] == 2**16 - 1).all()
    assert (evaluation(tokens)[0]["targets"][0] == 2**16 - 1).all()


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("length", [2, L, L + 1, L + 2, G * L, G * L + 1, G * L + 2, 203])
def test_an_evaluation_takes_each_token_but_the_first_as_target_once(objective, processes, length):
    parts = [
        evaluation(range(length), objective=objective, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = joined(parts)
    assert_equal(batches, evaluation(range(length), objective=objective))
    targets, inputs, weights = (
        np.concatenate([batch[key].ravel() for batch in batches])
        for key in ("targets", "inputs", "weights")
    )
    assert set(weights) <= {0, 1}
    counted = weights == 1
    assert targets[counted].tolist() == list(range(1, length))
    np.testing.assert_array_equal(
        inputs[counted], targets[counted] - (1 if objective == "causal" else 0)
    )
    # The padding holds ids of the vocabulary, and is less than a batch.
    assert targets.max() == length - 1
    assert len(targets) - counted.sum() < G * L


@pytest.mark.parametrize("max_batches", [1, 2, 6, 7, 100])
def test_an_evaluation_stops_after_max_batches(max_batches):
    whole = evaluation(TOKENS)
    assert len(whole) == 7
    assert_equal(evaluation(TOKENS, max_batches=max_batches), whole[:max_batches])


def test_an_evaluation_does_not_depend_on_the_batch_size():
    def counted(batches):
        return list(
            itertools.chain.from_iterable(b["targets"][b["weights"] == 1].tolist() for b in batches)
        )

    assert counted(evaluation(TOKENS, global_batch_size=3)) == counted(evaluation(TOKENS))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("batch", [4, 5, 16])
def test_epochs_give_each_window_once_each_and_then_nothing(epochs, batch):
    """The last batch has as many rows as the others; those beyond the end weigh nothing."""
    steps = steps_in(epochs, Windows(TOKENS, L, "causal"), batch)
    batches = train(steps=range(steps), global_batch_size=batch, num_epochs=epochs)
    weights = np.concatenate([b["weights"] for b in batches])
    assert len(weights) == steps * batch < epochs * W + batch
    assert (weights[: epochs * W] == 1).all() and (weights[epochs * W :] == 0).all()


def test_the_end_of_the_epochs_is_the_same_for_every_process_count():
    steps = steps_in(1, Windows(TOKENS, L, "causal"), 6)
    whole = train(steps=range(steps), global_batch_size=6, num_epochs=1)
    parts = [
        train(
            steps=range(steps),
            global_batch_size=6,
            num_epochs=1,
            process_index=i,
            process_count=3,
        )
        for i in range(3)
    ]
    assert_equal(joined(parts), whole)


CHANGES = [(0, 4), (3, 6), (5, 1), (14, 5)]  # From step ... on, sequences in a batch.


def test_a_changed_batch_size_goes_on_with_the_next_sequence():
    """None twice, none left out, whenever and to whatever it changes."""
    found, origin = [], Position()
    for (step, batch), (end, _) in itertools.pairwise([*CHANGES, (60, 0)]):
        found += train(steps=range(step, end), global_batch_size=batch, origin=origin)
        origin = Position(end, (origin.total + (end - step) * batch,))
    tokens = first_tokens(found)
    assert len(tokens) == origin.total > 5 * W
    assert tokens == starts(epochs=12).reshape(-1)[: len(tokens)].tolist()


@pytest.mark.parametrize(("batch", "processes"), [(6, 2), (16, 1)])
def test_epochs_end_at_the_same_sequence_with_a_changed_batch_size(batch, processes):
    windows, origin = Windows(TOKENS, L, "causal"), Position(3, (12,))
    steps = range(3, steps_in(2, windows, batch, origin))
    parts = [
        train(
            steps=steps,
            global_batch_size=batch,
            num_epochs=2,
            origin=origin,
            process_index=i,
            process_count=processes,
        )
        for i in range(processes)
    ]
    found = joined(parts)
    weights = np.concatenate([b["weights"][:, 0] for b in found])
    assert weights.sum() == 2 * W - 12 and (weights[: 2 * W - 12] == 1).all()
    assert len(weights) - weights.sum() < batch
    assert first_tokens(found)[: 2 * W - 12] == starts(epochs=2).reshape(-1)[12:].tolist()
    assert steps_in(1, windows, batch, Position(9, (2 * W,))) == 9


def feed(origin: Position, num_epochs: int) -> Feed:
    config = default.get_config()
    config.update({"seq_len": L, "global_batch_size": 5, "num_epochs": num_epochs})
    cache = TokenCache(Path(), TOKENS, TOKENS, None, 203, 1, "", (len(TOKENS),))
    return Feed(config, cache, origin)


def test_padding_at_the_end_of_the_epochs_is_not_taken():
    """So that a run that is given more epochs leaves no sequence out."""
    one = feed(Position(), 1)
    last = one.epoch_steps()
    assert last * 5 > W
    assert [one.position(step).total for step in (0, 2, last)] == [0, 10, W]
    more = feed(one.position(last), 2)
    assert more.epoch_steps() == last + -(-W // 5)
    assert more.first_tokens(last) == starts(epochs=2)[1, :5].tolist()
    fewer = feed(Position(7, (W + 3,)), 1)
    assert (fewer.epoch_steps(), fewer.position(7)) == (7, Position(7, (W + 3,)))
