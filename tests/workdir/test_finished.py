import numpy as np
import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.model.transformer import parameter_shapes
from jaxdp.workdir import finished
from support.models import apply


def test_a_workdir_has_all_that_a_model_needs(workdir):
    run = finished.open_workdir(workdir)
    params, step = run.params("newest", print)
    assert step == 4
    [ids] = run.words.encode_batch(["1 is odd"])
    logits = apply(run.model, params, np.array([ids.ids]))
    assert logits.shape == (1, 8, run.model.config.vocab_size)
    assert parameter_shapes(run.model)["embed"]["embedding"].shape == (26, 8)


def test_the_tokenizer_must_be_that_of_the_checkpoint(workdir):
    path = workdir / "tokenizer.json"
    path.write_text(path.read_text().replace('"1"', '"~"', 1))
    with pytest.raises(ConfigError, match=r"the tokenizer is not the one that checkpoint 4 was"):
        finished.open_workdir(workdir).params("newest", print)
