import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdp.common.choices import CHOICES
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer
from jaxdp.step import muon
from jaxdp.step.optimizer import decay_mask, describe, get_optimizer, get_schedule

INPUTS = jnp.zeros((1, 16), jnp.int32)
# float32 rounds the squares of singular values in the Gram matrix by 1e-7 of the largest, so one of
# 0.01 by 5e-6, which grows with it, 78 times.
TOLERANCE = 4e-4


def params_of(config):
    model = Transformer(ModelConfig.from_config(config, 20))
    return model.init(jax.random.key(0), INPUTS)["params"]


def names(tree):
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Steps 0, 4, 9 (the warm-up's last), 10, 55 (half way from there), 100 (the last).
        ("cosine", [1 / 11, 5 / 11, 10 / 11, 1, 0.55, 0.1]),
        ("linear", [1 / 11, 5 / 11, 10 / 11, 1, 0.55, 0.1]),
        ("wsd", [1 / 11, 5 / 11, 10 / 11, 1, 1, 0.1]),
        ("constant", [1 / 11, 5 / 11, 10 / 11, 1, 1, 1]),
    ],
)
def test_schedules(config, schedule, expected):
    config.num_train_steps = 101
    config.optimizer.update({"warmup_steps": 10, "schedule": schedule, "learning_rate": 1.0})
    rates = [float(get_schedule(config)(step)) for step in (0, 4, 9, 10, 55, 100)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_wsd_decays_over_the_last_fraction(config):
    config.num_train_steps = 100
    config.optimizer.update({"warmup_steps": 10, "schedule": "wsd", "learning_rate": 1.0})
    rates = [float(get_schedule(config)(step)) for step in (79, 80, 89, 99)]
    np.testing.assert_allclose(rates, [1, 1 - 0.9 / 20, 0.55, 0.1], rtol=1e-5)


def test_without_warmup_the_first_rate_is_the_highest(config):
    config.optimizer.warmup_steps = 0
    assert get_schedule(config)(0) == config.optimizer.learning_rate


@pytest.mark.parametrize("scan_layers", [False, True])
def test_decay_is_for_matrices(config, scan_layers):
    config.model.update({"bias": True, "scan_layers": scan_layers})
    for name, decayed in names(decay_mask(params_of(config))).items():
        assert decayed == name.endswith(("kernel", "embedding")), name


def few(scan_layers=False):
    """Parameters of each kind, of which hidden matrices are wide, tall, and of three axes."""
    front = (2,) if scan_layers else ()
    hidden = {"up": (4, 6), "down": (6, 4), "query": (4, 2, 2), "key": (4, 1, 2), "out": (2, 2, 4)}
    block = {name: {"kernel": np.ones(front + shape)} for name, shape in hidden.items()}
    block["norm"] = {"scale": np.ones((*front, 4)), "bias": np.ones((*front, 4))}
    ends = {"embed": {"embedding": np.ones((5, 4))}, "head": {"kernel": np.ones((4, 5))}}
    params = {"layers" if scan_layers else "layer_0": block} | ends
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_every_optimizer_decays_the_same_parameters(config, name):
    """Without gradient an update is the decay alone, which is decoupled."""
    config.optimizer.update({"name": name, "weight_decay": 0.5})
    params, optimizer = few(), get_optimizer(config, optax.constant_schedule(0.1))
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
    before = names(params)
    for path, update in names(updates).items():
        rate = 0.05 if path.endswith(("kernel", "embedding")) else 0.0
        np.testing.assert_allclose(update, -rate * before[path], rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_muon_is_optaxs(config, scan_layers):
    """But for the decay of embedding and head, and for how well it orthogonalises."""
    config.optimizer.update({"name": "muon", "weight_decay": 0.0})
    schedule, beta = optax.linear_schedule(0.1, 0.2, 5), config.optimizer.b1
    theirs = optax.contrib.muon(
        schedule,
        beta=beta,
        adam_b1=beta,
        adam_b2=config.optimizer.b2,
        weight_decay_mask=decay_mask,
        muon_weight_dimension_numbers=muon.dimensions,
        consistent_rms=0.2,
    )
    optimizers, params = (get_optimizer(config, schedule), theirs), few(scan_layers)
    states = [optimizer.init(params) for optimizer in optimizers]
    steps = [jax.jit(optimizer.update) for optimizer in optimizers]
    axes, momentum = names(muon.dimensions(params)), names(jax.tree.map(np.zeros_like, params))
    for number in range(3):
        grads = jax.tree.map(lambda p, n=number: p**2 - n, params)
        found = [step(grads, state, params) for step, state in zip(steps, states, strict=True)]
        states = [state for _, state in found]
        # Fails also where structures differ: checkpoints of either resume with the other.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *states)
        ours, optaxs = (names(updates) for updates, _ in found)
        for name, g in names(grads).items():
            momentum[name] = beta * momentum[name] + (1 - beta) * g
            if axes[name] is None:
                np.testing.assert_allclose(ours[name], optaxs[name], atol=1e-6)
                continue
            fans = [
                np.prod([g.shape[i] for i in one])
                for one in (axes[name].reduction_axis, axes[name].output_axis)
            ]
            ahead = beta * momentum[name] / (1 - beta ** (number + 2))
            nesterov = ahead + (1 - beta) * g / (1 - beta ** (number + 1))
            expected = reference(nesterov.reshape(-1, *fans)).reshape(g.shape)
            scale = schedule(number) * 0.2 * np.sqrt(max(fans))
            np.testing.assert_allclose(ours[name], -scale * expected, atol=TOLERANCE * scale)


def reference(matrices):
    """`muon.orthogonalise` by its definition, with a singular value decomposition in float64."""
    left, values, right = np.linalg.svd(np.asarray(matrices, np.float64), full_matrices=False)
    values /= (values**8).sum(-1, keepdims=True) ** (1 / 8)
    for a, b, c in muon.POLYNOMIALS:
        values = a * values + b * values**3 + c * values**5
    return left * values[:, None] @ right


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 40), (2, 40, 16), (1, 1, 5)])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_orthogonalise_is_its_definition(shape, size):
    matrices = size * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(muon.orthogonalise(matrices), reference(matrices), atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (128, 64)])
def test_singular_values_are_near_one(shape):
    """However they were spread: between 1 and 0.02 of the largest, equally, or most are small."""
    rng, count = np.random.default_rng(0), min(shape)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    few_large = np.where(np.arange(count) < 3, 1, 0.02)
    spread = np.stack([np.geomspace(1, 0.02, count), np.ones(count), few_large])
    found = muon.orthogonalise(jnp.asarray(left * spread[:, None] @ right, jnp.float32))
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.73 - 1e-3  # Rounding.
    assert values.max() < 1.27 + 1e-3


def test_orthogonalise_keeps_zeros():
    assert not np.any(muon.orthogonalise(jnp.zeros((2, 4, 6))))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_muon_is_for_hidden_matrices(config, scan_layers):
    config.model.update({"bias": True, "scan_layers": scan_layers, "tied_head": False})
    params = names(params_of(config))
    dimensions = names(muon.dimensions(params_of(config)))
    assert dimensions.keys() == params.keys()
    for name, numbers in dimensions.items():
        hidden = name.endswith("kernel") and not name.startswith("head")
        assert (numbers is not None) == hidden, name
        if numbers is not None:
            axes = (*numbers.reduction_axis, *numbers.output_axis)
            layers = int(scan_layers)
            assert sorted(axes) == list(range(layers, params[name].ndim)), name
            inputs = np.prod([params[name].shape[i] for i in numbers.reduction_axis])
            width, mlp = config.model.embed_dim, 4 * config.model.embed_dim
            assert inputs == (mlp if "down" in name else width), name


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_descends(config, name):
    config.optimizer.update({"name": name})
    params = params_of(config)
    optimizer = get_optimizer(config, optax.constant_schedule(0.01))
    target = jax.tree.map(lambda p: p + 0.1, params)

    def loss(params):
        return sum(
            jnp.sum((p - t) ** 2)
            for p, t in zip(*map(jax.tree.leaves, (params, target)), strict=True)
        )

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state = loss(params), optimizer.init(params)
    for _ in range(10):
        params, state = step(params, state)
    assert loss(params) < 0.95 * before


@pytest.mark.parametrize("schedule", CHOICES["optimizer.schedule"])
def test_every_schedule_is_described_with_the_rates_that_it_has(schedule, config):
    c = config.optimizer
    c.update({"schedule": schedule, "learning_rate": 0.002, "warmup_steps": 0, "clip_norm": 0.0})
    rates = [float(get_schedule(config)(step)) for step in (0, config.num_train_steps - 1)]
    first, last = (f"{rate:.3g}" for rate in rates)
    text = describe(config)
    assert text.startswith(f"adamw, {first}, ") and text.endswith("weight decay 0.1, not clipped")
    assert "warm-up" not in text and (schedule == "constant" or f" to {last}" in text)
    c.warmup_steps, c.weight_decay = 2, 0.0
    assert "0.002 after 2 steps of warm-up, " in describe(config)
    assert "no weight decay" in describe(config)
