import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.model.architecture import ModelConfig
from jaxdp.model.sampling import fill, filter_logits, sample
from jaxdp.model.transformer import Transformer, parameter_shapes
from jaxdp.run import loop
from support.models import apply
from support.runs import logged

VOCAB, CONTEXT = 13, 16


@pytest.fixture
def model(config):
    config.model.vocab_multiple = 8  # So the model has three ids that are padding.
    model = Transformer(ModelConfig.from_config(config, VOCAB))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))["params"]
    return model, jax.tree.map(lambda p: 20 * p if p.ndim > 1 else p, params)


def draw(model, prompts, **options):
    options = {"vocab_size": VOCAB, "num_tokens": 8} | options
    return sample(*model, [np.array(p) for p in prompts], **options)


def test_greedy_is_the_argmax_without_a_cache(model):
    transformer, params = model
    tokens = [3, 1, 4]
    [drawn] = draw(model, [tokens], temperature=0)
    for token in drawn:
        padded = jnp.array([tokens + [0] * (CONTEXT - len(tokens))])
        logits = apply(transformer, params, padded)[0, len(tokens) - 1, :VOCAB]
        assert token == logits.argmax()
        tokens.append(int(token))


def test_a_batch_is_what_each_prompt_gives_alone(model):
    """Random draws depend on a prompt's number, so they are compared for the first only."""
    prompts = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]
    together = draw(model, prompts, temperature=0)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert (draw(model, [prompt], temperature=0)[0] == tokens).all()
    assert (draw(model, prompts)[0] == draw(model, prompts[:1])[0]).all()


def test_each_prompt_is_cut_where_it_would_be_alone(model):
    """Some fill the context at other times than others, some more often, and one from the start."""
    lengths = (1, CONTEXT - 1, 5, CONTEXT + 3, CONTEXT)
    prompts = [np.arange(length) % VOCAB for length in lengths]
    together = draw(model, prompts, num_tokens=CONTEXT + 3, temperature=0)
    for prompt, tokens in zip(prompts, together, strict=True):
        [alone] = draw(model, [prompt], num_tokens=CONTEXT + 3, temperature=0)
        assert (alone == tokens).all(), len(prompt)


def test_reading_the_prompts_makes_only_the_logits_that_are_used(config):
    """With a vocabulary so large that those of all positions would be most of its memory."""
    model = Transformer(ModelConfig.from_config(config, 4096))
    rows = jax.ShapeDtypeStruct((3,), np.int32)
    tokens = jax.ShapeDtypeStruct((3, CONTEXT), np.int32)
    arguments = (tokens, rows, rows, 5, 1.0, 10, 1.0, 0)
    lowered = fill.lower(model, parameter_shapes(model), *arguments, vocab_size=4096)
    assert "tensor<3x4096x" in lowered.as_text()
    assert f"3x{CONTEXT}x4096x" not in lowered.as_text()


def test_texts_longer_than_the_context(model):
    [drawn] = draw(model, [[1, 2]], num_tokens=50)
    assert drawn.shape == (50,)
    assert (drawn[: CONTEXT - 2] == draw(model, [[1, 2]], num_tokens=CONTEXT - 2)[0]).all()
    assert draw(model, [list(range(13)) * 3], num_tokens=5)[0].shape == (5,)


def test_after_the_context_the_newer_half_is_read(model):
    [long] = draw(model, [[1, 2]], num_tokens=CONTEXT + 3, temperature=0)
    history = [1, 2, *long.tolist()]
    [again] = draw(model, [history[CONTEXT - CONTEXT // 2 : CONTEXT]], num_tokens=5, temperature=0)
    assert (long[CONTEXT - 2 : CONTEXT + 3] == again).all()


def test_seeds_and_padding(model):
    one, same, other = (draw(model, [[1]], num_tokens=200, seed=s)[0] for s in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    # 200 draws at a high temperature would draw one of three padding ids of 16.
    [hot] = draw(model, [[1]], num_tokens=200, temperature=100.0)
    assert hot.max() < VOCAB
    assert len(set(hot.tolist())) == VOCAB


LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((4, 1.0, 1.0), 4),
        ((2, 1.0, 1.0), 2),
        ((4, 0.5, 1.0), 1),
        ((4, 0.51, 1.0), 2),
        ((4, 0.9, 1.0), 3),
        ((2, 0.9, 1.0), 2),
        ((4, 1.0, 0.0), 1),
        # At half the temperature the likeliest has probability 0.25 / 0.365 = 0.68.
        ((4, 0.6, 0.5), 1),
    ],
)
def test_filter_keeps_the_likeliest(options, kept):
    filtered = filter_logits(LOGITS, *options)[0]
    assert (jnp.isfinite(filtered) == (jnp.arange(4) < kept)).all()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((4, 1.0, 0.0), [1]),
        ((1, 1.0, 1.0), [1]),
        ((2, 1.0, 1.0), [1, 3]),
        ((3, 1.0, 1.0), [0, 1, 3]),
        ((4, 0.4, 1.0), [1, 3]),
        ((4, 0.3, 1.0), [1]),
        ((4, 1.0, 1.0), [0, 1, 2, 3]),
    ],
)
def test_of_equally_likely_tokens_the_first_are_kept(options, kept):
    """Their probabilities are 0.13 and 0.37."""
    filtered = filter_logits(jnp.array([[1.0, 2.0, 1.0, 2.0]]), *options)[0]
    assert jnp.flatnonzero(jnp.isfinite(filtered)).tolist() == kept


@pytest.mark.parametrize(("at_eval", "steps"), [(True, [3, 6]), (False, [6])])
def test_a_run_samples_where_it_is_asked_to(config, tmp_path, at_eval, steps):
    config.sample.update({"at_eval": at_eval, "num_tokens": 8})
    loop.train(config, tmp_path, devices=jax.local_devices()[:2])
    found = [step for step, tag in logged(tmp_path) if tag.startswith("sample")]
    assert found == steps
