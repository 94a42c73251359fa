import math

import jax

from jaxdp.estimate import timing


def test_a_step_is_timed_in_as_many_parts_as_it_takes_to_fit(config, monkeypatch):
    monkeypatch.setattr(timing, "MEASURE_SECONDS", 0)
    config.global_batch_size = 16
    devices, said = jax.local_devices()[:2], []
    fits, rate = timing.timed(config, 4096, devices, 2**40, said.append)
    assert fits.grad_accum_steps == 1 and 0 < rate < math.inf
    assert said == ["Timing 1 layers x 16, 16 sequences ..."]
    assert timing.timed(config, 4096, devices, 1, said.append)[0].grad_accum_steps == 8
