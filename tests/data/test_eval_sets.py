import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdp.common.errors import ConfigError
from jaxdp.data import eval_sets
from jaxdp.data.cache import open_cache
from jaxdp.run import evaluation, loop, preflight
from jaxdp.workdir import curve_figure, curves
from support.bad_input import Reached, assert_clear, tries
from support.runs import after, figures

NAMES = ("loss", "perplexity", "bits_per_byte")


@pytest.fixture
def train(config, tmp_path):
    """Trains with texts beside the run's own: one easy, one of other statistics."""
    (tmp_path / "easy.txt").write_text("1 is odd, its square is 1.\n" * 40)
    (tmp_path / "hard.txt").write_text("qsaure, ,.is\n"[::-1] * 90)
    config.data.cache_dir = str(tmp_path / "cache")
    config.eval_sets = f"easy={tmp_path}/easy.txt,hard=text:{tmp_path}/ha*.txt"
    return functools.partial(loop.train, config, devices=jax.local_devices()[:2])


def losses(workdir, name):
    return {r["step"]: r[name] for r in figures(workdir) if name in r}


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ("", {}),
        ("a=x.txt", {"a": "x.txt"}),
        ("a=text:x,y=tfds:lm1b", {"a": "text:x", "y": "tfds:lm1b"}),
        ("a=text:x,y/*.txt,b-2=jsonl:z", {"a": "text:x,y/*.txt", "b-2": "jsonl:z"}),
        ("a=1*text:x+2*text:y,b=c=d", {"a": "1*text:x+2*text:y", "b": "c=d"}),
    ],
)
def test_names_and_paths(text, sets):
    assert eval_sets.parse(text) == sets


@pytest.mark.parametrize("text", ["x.txt", "=x", "a=", "a=,b=x", "a b=x", "é=x", "a=x,a=y", ","])
def test_what_is_no_set_is_refused(text):
    with pytest.raises(ConfigError, match=r"\Aeval_sets='.*' has .*: (write them as|give one)"):
        eval_sets.parse(text)


@tries(100)
@given(st.text(st.sampled_from("ab.=,:*\0é \n"), max_size=12))
def test_any_text_is_sets_or_refused_in_one_line(text):
    try:
        sets = eval_sets.parse(text)
    except ConfigError as error:
        assert_clear(str(error))
    else:
        assert ",".join(f"{name}={path}" for name, path in sets.items()) == text


def test_a_set_is_the_whole_text_in_the_runs_tokens(config, train, tmp_path):
    cache = open_cache(config)
    found = eval_sets.open_set(config, "easy", cache, print).cache
    assert found.tokenizer.to_str() == cache.tokenizer.to_str()
    assert found.tokenizer.decode(found.validation.tolist()) == (tmp_path / "easy.txt").read_text()
    assert len(found.train) == 0 and found.vocab_size == cache.vocab_size
    told: list[str] = []
    eval_sets.open_set(config, "easy", cache, told.append)
    assert not told  # It is tokenised once.


def test_sets_of_another_kind_than_the_runs_own_data(config, tmp_path):
    """Keys of the run's kind of data don't concern them."""
    (tmp_path / "set.jsonl").write_text('{"text": "1 is odd"}\n' * 40)
    (tmp_path / "set.txt").write_text("1 is odd " * 40)
    config.eval_sets = f"a={tmp_path}/set.jsonl,b={tmp_path}/set.txt"
    config.data.separator = "=="
    eval_sets.check(config)
    config.data.update({"separator": "", "prompt_key": "text", "packing": "padded"})
    config.data.path = f"{tmp_path}/set.jsonl"
    eval_sets.check(config)
    opened = eval_sets.open_set(config, "b", open_cache(config), print)  # All of its text.
    assert config.data.packing == "padded"
    assert opened.validation.total == -(-(len(opened.cache.validation) - 1) // config.seq_len)


def test_documents_of_a_padded_run_stay_documents(config):
    """Without a separator a file would be one sequence; with one it has as many as documents."""
    config.data.update({"packing": "padded", "separator": "<|end|>"})
    assert eval_sets.of_kind(config).data.packing == "padded"
    config.data.separator = ""
    assert eval_sets.of_kind(config).data.packing == "stream"


def test_a_set_that_is_trained_on_is_said(config, train, tmp_path):
    said: list[str] = []
    config.eval_sets += f",own={config.data.path}"
    preflight.say_of_trained_sets(config, said.append)
    [line] = said
    assert line.startswith("Evaluation set own may be trained on")


def test_they_are_logged_and_shown_and_change_nothing_else(config, train, tmp_path, capsys):
    """The run without them is the same to the bit; their losses are those of an exact pass."""
    config.stop.patience = 1
    result = train(tmp_path / "with")
    out = capsys.readouterr().out
    for name in ("easy", "hard"):
        assert f"eval set {name} " in out and f"evaluation of {name} at step 3: loss" in out
        assert list(losses(tmp_path / "with", f"eval/{name}/loss")) == [3, 6]
    easy, hard = (losses(tmp_path / "with", f"eval/{x}/loss")[6] for x in ("easy", "hard"))
    assert easy < result.evaluation.loss < hard
    given, config.eval_sets = config.eval_sets, ""
    train(tmp_path / "without")
    kept = [
        {k: v for k, v in r.items() if not k.startswith(("eval/easy", "eval/hard"))}
        for r in figures(tmp_path / "with")
    ]
    assert kept == figures(tmp_path / "without")

    changes = {"eval_sets": given}  # Of a checkpoint that had none; on the same devices.
    step, found = evaluation.evaluate_checkpoint(
        tmp_path / "without", "newest", changes, devices=jax.local_devices()[:2]
    )
    [last] = [r for r in figures(tmp_path / "with") if r["step"] == step]
    assert evaluation.figures(found) == {k: v for k, v in last.items() if k.startswith("eval/")}
    assert set(evaluation.figures(found)) == {
        f"eval/{of}{name}" for of in ("", "easy/", "hard/") for name in NAMES
    }


def test_a_run_may_go_on_with_other_sets(config, train, tmp_path):
    assert not train(tmp_path / "run", stop_requested=after(6)).finished
    config.eval_sets = config.eval_sets.replace("hard=", "other=")
    assert train(tmp_path / "run").finished
    assert list(losses(tmp_path / "run", "eval/other/loss"))[-1] == 6
    assert 6 not in losses(tmp_path / "run", "eval/hard/loss")


def test_the_plot_draws_them(train, tmp_path):
    train(tmp_path / "run")
    run = curves.curves(str(tmp_path / "run"))
    loss = curve_figure.draw({"run": [run]}).axes[0]
    drawn = [line.get_ydata().tolist() for line in loss.lines]
    for name in ("eval/loss", "eval/easy/loss", "eval/hard/loss"):
        assert list(losses(tmp_path / "run", name).values()) in drawn
    texts = [text.get_text() for text in loss.get_legend().get_texts()]
    assert texts == ["training", "validation", "on easy", "on hard"]


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ("easy", r"eval_sets='easy' has 'easy', which is no set: write"),
        ("a=/no/such/file", r"eval_sets: a='/no/such/file': data\.path=.* matches no file: "),
        ("a={}/empty.txt", r"eval_sets: a='.*': data\.path=.* gives 0 validation tokens, too few"),
        ("a={}/short.txt", r"eval_sets: a='.*': data\.path=.* gives 16 validation tokens"),
        ("a={}/odd.txt", r"eval_sets: a='.*': the character 'ß' is not among those of the"),
        ("a={}/latin.txt", r"eval_sets: a='.*': data\.path: .* is not UTF-8 text"),
        ("a=tfds:no_such_set", r"eval_sets: a='.*': data\.path=.* is not known to TFDS"),
    ],
)
def test_what_can_not_be_evaluated_is_refused_before_anything_is_compiled(
    sets, says, config, train, tmp_path, no_compiling
):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("1 is odd, its sq")
    (tmp_path / "odd.txt").write_text("ß" * 100)
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 100)
    config.eval_sets = sets.format(tmp_path)
    with pytest.raises(ConfigError, match=says) as error:
        train(tmp_path / "run")
    assert_clear(str(error.value))
    assert not (tmp_path / "run").exists()
    config.eval_sets = ""
    with pytest.raises(Reached):
        train(tmp_path / "run")


def test_a_wrong_set_is_found_before_the_data_are_tokenised(config, train, tmp_path):
    config.eval_sets = "a=/no/such/file"
    with pytest.raises(ConfigError, match="matches no file"):
        train(tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_examples_with_prompts(config, train, tmp_path):
    """A set is read as the run's data are: with its keys, and only the answers count."""
    lines = [f'{{"q": "{i} is ", "a": "{"odd" if i % 2 else "even"}"}}\n' for i in range(60)]
    for name, part in (("train", lines[:40]), ("set", lines[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    config.data.update({"path": f"jsonl:{tmp_path}/train.jsonl", "packing": "padded"})
    config.data.update({"prompt_key": "q", "text_key": "a"})
    config.tokenizer, config.sample.num_tokens = "byte", 0
    config.eval_sets = f"set=jsonl:{tmp_path}/set.jsonl"
    found = train(tmp_path / "run").evaluations["set"]
    assert found.tokens == sum(len("odd" if i % 2 else "even") + 1 for i in range(40, 60))
    assert np.isfinite(found.loss)
