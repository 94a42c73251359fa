import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer
from jaxdp.parallel.replicas import Replicas
from jaxdp.step import losses
from jaxdp.step.program import pmapped_evaluation
from jaxdp.step.setup import make_setup
from support.models import apply
from support.steps import ROWS, VOCAB, assert_same_run, batches, start, train


def test_evaluation_sums_over_devices_and_chunks(config):
    params = jax.device_get(start(config, 1)[2].params)
    batch = next(batches(1)) | {"number": np.zeros(ROWS, np.int32)}
    model = Transformer(ModelConfig.from_config(config, VOCAB))
    logits = apply(model, params, batch["inputs"])
    expected = losses.cross_entropy(logits, batch["targets"], batch["weights"])
    for devices, chunks, rows in ((1, 1, 8), (4, 1, 1), (2, 4, 4), (1, 1, 3)):
        replicas = Replicas(jax.local_devices()[:devices])
        config.loss_chunks = chunks
        p_step = pmapped_evaluation(make_setup(config, VOCAB, devices), replicas, rows)
        sums = p_step(replicas.replicate(params), replicas.shard(batch))
        np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_a_loss_in_chunks_is_the_same_run(config):
    """Also with dropout, a layer before the head, and masked-LM."""
    config.model.update({"dropout": 0.3, "head_transform": True, "bias": True})
    config.objective = "masked"
    mask = functools.partial(losses.mask_tokens, mask_id=VOCAB - 1, vocab_size=VOCAB)
    whole = train(config, 1, transform=mask)
    config.loss_chunks = 4
    assert_same_run(whole, train(config, 2, transform=mask))


def test_no_more_than_a_chunk_of_logits_is_made_at_once(config):
    """Neither the forward nor the backward pass holds the logits of all chunks in one array."""
    vocab, chunks = 4096, 4
    model = Transformer(ModelConfig.from_config(config, vocab))
    inputs = jnp.zeros((ROWS, config.seq_len), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]

    def loss(params, chunks):
        of_model = functools.partial(model.apply, {"params": params})
        hidden = of_model(inputs, method="hidden")
        to_logits = functools.partial(of_model, method="logits")
        ones = jnp.ones(inputs.shape)
        return losses.chunked_cross_entropy(to_logits, hidden, inputs, ones, chunks)[0]

    sizes = []
    for count in (1, chunks):
        text = str(jax.make_jaxpr(jax.grad(functools.partial(loss, chunks=count)))(params))
        whole = f"f32[{ROWS},{config.seq_len},{vocab}]"
        part = f"f32[{ROWS},{config.seq_len // chunks},{vocab}]"
        sizes.append((whole in text, part in text))
    assert sizes == [(True, False), (False, True)]
