import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdp.common import cli, pictures
from jaxdp.common.choices import MAX_INT32
from jaxdp.common.errors import ConfigError
from jaxdp.workdir import curves as plot
from jaxdp.workdir.curve_figure import draw
from jaxdp.workdir.metrics import MetricsWriter
from support.bad_input import HARM, JSON, NUMBERS, TRIED, assert_clear, harm, only_flags_of, tries

FIGURES = [name for _, _, names in plot.PANELS for name in names]


def log(workdir, *records):
    workdir.mkdir(exist_ok=True)
    text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in records)
    (workdir / "metrics.jsonl").write_text(text)
    return str(workdir)


def run(capsys, *arguments):
    """Runs the command; returns its status, and what it says."""
    with pytest.MonkeyPatch.context() as patch, only_flags_of("jaxdp.plot") as module:
        patch.setattr(sys, "argv", ["plot", *arguments])
        return cli.run(module.main, operands=True), capsys.readouterr()


def points(curve):
    return list(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))


def test_what_a_run_has_logged_is_what_is_drawn(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        for step in range(1, 5):
            values = {"train/loss": 4.0 / step, "tokens_per_second": None if step == 1 else 100.0}
            writer.write(step, values | {"train/learning_rate": 0.1 * step})
        writer.write(4, {"eval/loss": 1.5})
    run = plot.curves(str(tmp_path))
    assert set(run) == set(FIGURES)
    assert points(run["eval/loss"]) == [(4, 1.5)]
    assert points(run["tokens_per_second"]) == [(2, 100.0), (3, 100.0), (4, 100.0)]
    loss, speed, rate = draw({"a": [run]}).axes
    for axes, name in ((loss, "train/loss"), (speed, "tokens_per_second")):
        assert [tuple(x) for x in axes.lines[0].get_xydata()] == points(run[name])
    assert [tuple(x) for x in loss.lines[1].get_xydata()] == [(4, 1.5)]
    assert len(rate.lines) == 1


def test_the_command_as_a_user_starts_it(tmp_path, fresh_command):
    workdir, picture = log(tmp_path / "run", {"step": 1, "train/loss": 2.0}), tmp_path / "a.png"
    out = fresh_command("plot", workdir, f"--output={picture}").stdout
    assert out == f"{picture}\n" and picture.read_bytes().startswith(b"\x89PNG")


def test_the_name_of_the_file_says_which_kind_it_is(tmp_path, capsys):
    workdir = log(tmp_path / "run", {"step": 1, "train/loss": 2.0})
    for name, beginning in (("a.svg", b"<?xml"), ("a.PDF", b"%PDF"), ("b.svg", b"<?xml")):
        assert run(capsys, workdir, f"--output={tmp_path / name}")[0] == 0
        assert (tmp_path / name).read_bytes().startswith(beginning)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_last_value_of_a_step_counts(tmp_path):
    workdir = log(
        tmp_path,
        {"step": 2, "train/loss": 9.0},
        {"step": 3, "train/loss": 8.0, "eval/loss": 7.0},
        {"step": 2, "train/loss": 6.0},
        {"step": 3, "train/loss": 5.0},
        '{"step": 4, "train/l',  # Killed while it wrote.
    )
    run = plot.curves(workdir)
    assert points(run["train/loss"]) == [(2, 6.0), (3, 5.0)]
    assert points(run["eval/loss"]) == [(3, 7.0)]


def test_each_run_has_a_colour_and_a_name_in_the_legend(tmp_path):
    line = {"train/loss": 2.0, "eval/loss": 2.0, "train/learning_rate": 0.1}
    for count in (3, 12):
        given = [log(tmp_path / str(i), {"step": 1, **line}) for i in range(count)]
        figure = draw(dict(zip(plot.names(given), ([plot.curves(x)] for x in given), strict=True)))
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [str(i) for i in range(count)]
        shown = [x.get_color() for x in legend.get_lines()]
        assert len(set(shown)) == count
        for axes, each in zip(figure.axes, (2, 0, 1), strict=True):
            drawn = [line.get_color() for line in axes.lines]
            assert drawn == [colour for colour in shown for _ in range(each)]


def seed(folder, number, **config):
    """A run that has a config and two losses, which tell its seed."""
    losses = [{"step": step, "train/loss": step + number, "eval/loss": 1.0} for step in (1, 2)]
    workdir = log(folder, *losses)
    (folder / "config.json").write_text(json.dumps({"seed": number, "width": 8} | config))
    return workdir


def test_runs_that_differ_only_in_their_seed_are_their_mean_in_a_band(tmp_path):
    runs = {name: seed(tmp_path / name, i) for i, name in enumerate("abc")}
    runs["d"] = seed(tmp_path / "d", 0, width=16)
    groups = plot.seeds(runs)
    assert groups == {"a ... c (3 seeds)": ["a", "b", "c"], "d": ["d"]}
    drawn = {label: [plot.curves(runs[x]) for x in names] for label, names in groups.items()}
    figure = draw(drawn)
    mean, _, other, _ = figure.axes[0].lines
    assert mean.get_xydata().tolist() == [[1, 2], [2, 3]]  # Of 1, 2, 3 and of 2, 3, 4.
    assert other.get_xydata().tolist() == [[1, 1], [2, 2]]
    [training, _] = figure.axes[0].collections  # The bands of both losses.
    low, high = training.get_datalim(figure.axes[0].transData).intervaly
    assert (low, high) == (1, 4)
    said = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert said[-1] == "of seeds: mean, lowest to highest"


def test_seeds_are_grouped_only_where_that_says_something(tmp_path):
    twice = {name: seed(tmp_path / name, 0) for name in "ab"}  # As a copy of a workdir would be.
    assert plot.seeds(twice) == {"a": ["a"], "b": ["b"]}
    for name, text in (("c", "{"), ("d", "[1]"), ("e", None)):
        twice[name] = seed(tmp_path / name, 1)
        if text is None:
            (tmp_path / name / "config.json").unlink()
        else:
            (tmp_path / name / "config.json").write_text(text)
    assert plot.seeds(twice) == {name: [name] for name in "abcde"}


def test_a_band_spans_the_steps_that_all_have():
    curve = [
        plot.Curve(np.array(steps), np.array(steps) / 2, np.array(steps) * factor)
        for steps, factor in (([1, 2, 4], 1.0), ([2, 3, 4, 5], 3.0))
    ]
    x, mean, low, high = (part.tolist() for part in plot.band(curve))
    assert (x, mean, low, high) == ([1, 2], [4, 8], [2, 4], [6, 12])


def test_a_folder_stands_for_the_runs_in_it(tmp_path, capsys):
    for name in ("x/b", "x/a", "y"):
        (tmp_path / name).mkdir(parents=True)
        log(tmp_path / name, {"step": 1, "train/loss": 2.0})
    (tmp_path / "y" / "copy").mkdir()  # What is in a workdir is no run.
    log(tmp_path / "y" / "copy", {"step": 1, "train/loss": 2.0})
    found = [str(tmp_path / name) for name in ("x/a", "x/b", "y")]
    assert plot.workdirs([str(tmp_path)]) == found
    assert plot.workdirs([found[2], str(tmp_path / "x")]) == [found[2], *found[:2]]
    log(tmp_path / "x" / "new")
    status, said = run(capsys, str(tmp_path), f"--output={tmp_path / 'plot.svg'}")
    assert status == 0 and "left out: " in said.err and "has no figures yet" in said.err


def test_hours_and_tokens_are_those_of_training_alone(tmp_path):
    workdir = log(
        tmp_path,
        {"step": 10, "train/loss": 3.0, "step_time_ms": None, "tokens_per_second": None},
        {"step": 20, "train/loss": 2.0, "step_time_ms": 3600.0, "tokens_per_second": 100.0},
        {"step": 25, "eval/loss": 2.0},  # However long it took, and the pause after it.
        {"step": 40, "train/loss": 1.0, "step_time_ms": 1800.0, "tokens_per_second": 200.0},
        {"step": 50, "eval/loss": 1.0},
    )
    hours, tokens = plot.curves(workdir, "hours"), plot.curves(workdir, "tokens")
    # 3.6 s are a thousandth of an hour; each step has 360 tokens.
    assert hours["train/loss"].x == pytest.approx([0.010, 0.020, 0.030])
    assert hours["eval/loss"].x == pytest.approx([0.0225, 0.035])
    for name, curve in tokens.items():
        assert curve.x == pytest.approx(360 * curve.steps), name
    for x, run in (("hours", hours), ("tokens", tokens)):
        assert plot.AXES[x] == draw({"a": [run]}, x).axes[-1].get_xlabel()


def test_names_are_as_long_as_they_must_be():
    assert plot.names(["/r/a/x", "/r/b/y/"]) == ["x", "y"]
    assert plot.names(["/r/a/x", "/r/b/x"]) == ["a/x", "b/x"]
    assert plot.names(["/x", "/r/x"]) == ["//x", "r/x"]
    for twice in (["/r/x", "/r/x/"], ["/r/x", "/r/y/../x"]):
        with pytest.raises(ConfigError, match="given twice: give each once"):
            plot.names(twice)


def test_a_smooth_curve_is_the_mean_of_a_window_that_the_ends_cut():
    values = np.random.default_rng(0).normal(size=12)
    got = plot.smooth(values, 3)
    for i in range(12):
        left = min(i, 3)
        assert got[i] == pytest.approx(values[i - left : i + left + 1].mean())
    line = np.arange(12.0)
    np.testing.assert_allclose(plot.smooth(line, 3)[:9], line[:9])  # No bias at a steep beginning.


def test_many_points_are_drawn_behind_their_mean(tmp_path):
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.1, 300)
    run = plot.curves(log(tmp_path, *({"step": i, "train/loss": x} for i, x in enumerate(losses))))
    raw, mean = draw({"a": [run]}).axes[0].lines
    assert raw.get_ydata().tolist() == losses.tolist() and raw.get_alpha() < 1
    assert mean.get_ydata().std() < raw.get_ydata().std() / 2


@pytest.mark.parametrize("value", [0.0, -plot.MOST_FLOAT, plot.MOST_FLOAT, 5e-324, MAX_INT32])
def test_every_number_can_be_drawn(tmp_path, value):
    records = [{"step": step, **dict.fromkeys(FIGURES, value)} for step in (0, MAX_INT32)]
    figure = draw({"$x_{$": [plot.curves(log(tmp_path, *records))]})
    pictures.save(figure, "output", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@tries(60)
@given(
    lines=st.lists(
        st.one_of(
            st.dictionaries(st.sampled_from(["step", *FIGURES]), st.one_of(NUMBERS, JSON)),
            st.fixed_dictionaries({"step": st.integers(0, 9), "eval/loss": NUMBERS}),
        ),
        max_size=6,
    ),
    **HARM,
)
def test_harmed_metrics_are_drawn_as_far_as_they_go_or_refused(
    lines, how, where, noise, tmp_path_factory
):
    TRIED["plots"] += 1
    workdir = tmp_path_factory.mktemp("run")
    try:
        log(workdir, *lines)
    except ValueError:  # An int of too many digits can't be written.
        return
    harm(workdir / "metrics.jsonl", how, where, noise)
    try:
        run = plot.curves(str(workdir))
    except ConfigError as error:
        assert_clear(str(error))
    else:
        for steps, x, values in run.values():
            assert len(steps) == len(x) == len(values) > 0
            assert (np.diff(steps) > 0).all() and all(map(math.isfinite, values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "WORKDIR is missing"),
        (["/no/such/run"], "'/no/such/run' is no folder"),
        (["{tmp}/none"], "holds no metrics.jsonl, nor do its folders"),
        (["{tmp}/empty"], "metrics.jsonl has no figures yet"),
        (["{tmp}/run", "{tmp}/run"], "WORKDIR is given twice"),
        (["{tmp}/run", "--output=/no/such/plot.png"], "--output='/no/such/plot.png' can't be"),
        (["{tmp}/run", "--output={tmp}/folder.png"], "can't be written (Is a directory)"),
        (["{tmp}/run", "--output=a.jpg"], "--output='a.jpg' names no kind of picture"),
        (["{tmp}/run", "--x=days"], "value should be one of <steps|tokens|hours>"),
        (["{tmp}/run", "--x=hours"], "has no speeds yet, as --x=hours needs: use --x=steps"),
        (["{tmp}/run", "--output=a\0b"], "--output='a\\x00b' holds a NUL"),
        (["a\0b"], "holds a NUL character"),
        (["{tmp}/run", "--smooth=3"], "'smooth'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, capsys, arguments, message):
    log(tmp_path / "run", {"step": 1, "train/loss": 2.0})
    log(tmp_path / "empty")
    (tmp_path / "none").mkdir()
    (tmp_path / "folder.png").mkdir()
    status, said = run(capsys, *(x.replace("{tmp}", str(tmp_path)) for x in arguments))
    assert (status, said.out) == (2, "")
    assert message in said.err and said.err.count("\n") == 1
    assert_clear(said.err.strip())


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the package matplotlib: pip install 'jaxdp\[plot\]"
    ):
        pictures.check("output", "plot.png")


def test_the_command_writes_the_plot(tmp_path, capsys):
    workdir = log(tmp_path / "run", {"step": 1, "train/loss": 2.0})
    path = tmp_path / "plot.png"
    status, said = run(capsys, workdir, f"--output={path}")
    assert (status, said.out, said.err) == (0, f"{path}\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")
