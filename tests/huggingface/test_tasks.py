"""Tasks of lm-evaluation-harness, with tasks and data of the tests' own: no network is needed."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.huggingface import tasks
from jaxdp.workdir import finished

needs_lm_eval = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in tasks.NEEDED),
    reason="lm_eval, with the extra 'tasks', is not installed",
)
TEXTS = ("2 is even", "7 is odd\n")
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
{rest}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: ["even", "odd"]
doc_to_target: right
target_delimiter: " "
metric_list: [{metric: acc}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two tasks: the likelihood of texts, and a choice between two continuations."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "own"
    place.mkdir()
    texts = [{"text": text} for text in TEXTS]
    choices = [{"start": f"{i} is", "right": i % 2} for i in range(8)]
    for name, rest, docs in (("own_texts", ROLLING, texts), ("own_choice", CHOICE, choices)):
        file = place / f"{name}.jsonl"
        file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (place / f"{name}.yaml").write_text(YAML.format(name=name, file=file, rest=rest))
    return place


def nats(workdir, prefix, text):
    """The negative log-likelihood of a text after another, by the model itself."""
    run = finished.open_workdir(workdir)
    params, _ = run.params("newest", print)
    first, rest = (run.words.encode(x, add_special_tokens=False).ids for x in (prefix, text))
    logits = run.model.apply({"params": params}, jnp.array([first + rest]))
    logs = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))
    place = len(first) - 1
    return -sum(logs[place + i, token] for i, token in enumerate(rest))


@needs_lm_eval
def test_scores_are_what_the_model_itself_computes(workdir, folder):
    """To rounding, in float32 by two libraries."""
    line = tasks.evaluate_tasks(workdir, ["own_texts", "own_choice"], folder=folder)
    # Each text is scored after the token that texts begin with: here a line break.
    total = sum(nats(workdir, "\n", text) for text in TEXTS)
    bits = total / math.log(2) / sum(map(len, TEXTS))
    assert line["own_texts/bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    right = [
        (nats(workdir, f"{i} is", " odd") < nats(workdir, f"{i} is", " even")) == i % 2
        for i in range(8)
    ]
    assert line["own_choice/acc"] == np.mean(right)
    assert line["step"] == 4
    assert [json.loads(x) for x in (workdir / tasks.NAME).read_text().splitlines()] == [line]
    assert set(tasks.rows(line)) == {"own_texts/bits_per_byte", "own_choice/acc"}


@needs_lm_eval
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["no_such_task"]}, "--tasks='no_such_task' is no task of lm_eval"),
        ({"names": ["own_choice"], "folder": "/nowhere"}, "--tasks_folder='/nowhere' is no folder"),
    ],
)
def test_tasks_that_there_are_not_are_refused(workdir, options, message):
    with pytest.raises(ConfigError, match=message):
        tasks.evaluate_tasks(workdir, **options)


def test_a_missing_package_is_named(workdir, monkeypatch):
    monkeypatch.setattr(tasks, "NEEDED", ("lm_eval", "no_such_package"))
    with pytest.raises(ConfigError, match=r"no_such_package: pip install 'jaxdp\[tasks\]'"):
        tasks.evaluate_tasks(workdir, ["hellaswag"])


def test_rows_have_standard_errors_beside_the_values():
    results = {"copa": {"alias": "copa", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1.0}}
    line = {"step": 3, "lm_eval": "0.4"} | tasks.scores(results)
    assert tasks.rows(line) == {"copa/acc": "0.5000 ± 0.1000", "copa/f1,strict": "1.0000"}
    assert tasks.scores({"copa": {"acc,none": math.nan}}) == {"copa/acc": None}
