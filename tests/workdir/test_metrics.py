import json
import math
import time

from jaxdp.workdir.metrics import MetricsWriter, last_loss, read_jsonl
from support.runs import logged


def written(workdir):
    """The lines, without the time."""
    return [{k: v for k, v in r.items() if k != "wall_time"} for r in read_jsonl(workdir)]


def test_one_line_per_step(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(1, {"train/loss": 2.0})
        writer.write(2, {"train/loss": 1.5, "mfu": None})
        writer.write(2, {"eval/loss": 1.25})
    assert written(tmp_path) == [
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": 1.5, "mfu": None, "eval/loss": 1.25},
    ]


def test_every_line_is_strict_json(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(1, {"train/loss": math.nan, "eval/perplexity": math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["eval/perplexity"] is None


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        for step in range(1, 6):
            writer.write(step, {"train/loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/l')  # Killed while it wrote.
    with MetricsWriter(tmp_path, config, 3) as writer:
        writer.write(4, {"train/loss": 40.0})
    assert [r["train/loss"] for r in read_jsonl(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


def test_a_line_that_a_checkpoint_holds_is_continued(tmp_path, config):
    """Also when it was written already: each step has one line, and its events are not doubled."""
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(1, {"train/loss": 2.0})
        assert writer.line(2) == {}
        assert written(tmp_path) == [{"step": 1, "train/loss": 2.0}]
        writer.write(2, {"train/loss": math.nan, "mfu": 0.5})
        line = writer.line(2)
        writer.write(2, {"eval/loss": 1.0})
    assert line == {"wall_time": line["wall_time"], "train/loss": None, "mfu": 0.5}
    with MetricsWriter(tmp_path, config, 2, line=line) as writer:
        writer.write(2, {"eval/loss": 1.25})
    assert written(tmp_path) == [
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": None, "mfu": 0.5, "eval/loss": 1.25},
    ]
    assert read_jsonl(tmp_path)[1]["wall_time"] == line["wall_time"]
    with MetricsWriter(tmp_path, config, 2, line={}):
        pass
    assert written(tmp_path) == [{"step": 1, "train/loss": 2.0}]


def test_each_line_has_the_time_at_which_its_step_was_logged(tmp_path, config):
    before = time.time()
    with MetricsWriter(tmp_path, config, 0) as writer:
        for step in (1, 2, 2):
            writer.write(step, {"train/loss": 2.0})
    times = [r["wall_time"] for r in read_jsonl(tmp_path)]
    assert len(times) == 2 and sorted(times) == times
    # Milliseconds are kept.
    assert before - 1e-3 <= times[0] and times[1] <= time.time() + 1e-3
    assert {tag for _, tag in logged(tmp_path)} == {"train/loss"}


def test_the_last_loss_is_that_of_the_last_evaluation(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(1, {"eval/loss": 3.0})
        writer.write(2, {"eval/loss": 2.0})
        writer.write(3, {"train/loss": 1.0, "eval/set/loss": 4.0})
    assert last_loss(tmp_path) == 2.0


def test_a_flushed_step_is_on_disk(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(1, {"train/loss": 2.0})
        writer.flush()
        assert written(tmp_path) == [{"step": 1, "train/loss": 2.0}]


def test_tensorboard_gets_the_scalars(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(3, {"train/loss": 2.0})
        writer.write_text(3, "sample", "Once upon a time")
    tags = logged(tmp_path)
    assert (3, "train/loss") in tags
    assert any(tag.startswith("sample") for _, tag in tags)


def test_an_inactive_writer_writes_nothing(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0, active=False) as writer:
        writer.write(1, {"train/loss": 2.0})
        writer.write_text(1, "sample", "text")
    assert list(tmp_path.iterdir()) == []


def test_damaged_lines_are_told(tmp_path, config, capsys):
    """But a last line that is cut off may be in the making."""
    path, lines = tmp_path / "metrics.jsonl", []
    good = b'{"step": 1}\n'
    path.write_bytes(good + b"\x00\x00\n" + good + b'[1]\n\n{"loss": 1}\n' + good + b'{"step')
    assert len(read_jsonl(tmp_path, lines.append)) == 3
    assert lines == [f"{path}: lines 2, 4, 6 are damaged, and left out."]
    read_jsonl(tmp_path)
    assert capsys.readouterr().err == f"jaxdp: {lines[0]}\n"
    with MetricsWriter(tmp_path, config, 5, say=lines.append):
        pass
    assert lines[1:] == lines[:1]
    assert path.read_bytes() == 3 * good
    read_jsonl(tmp_path, lines.append)
    assert len(lines) == 2


def test_metrics_that_are_removed_are_begun_again(tmp_path, config):
    lines = []
    with MetricsWriter(tmp_path, config, 0, say=lines.append) as writer:
        writer.write(1, {"train/loss": 2.0})
        writer.flush()
        (tmp_path / "metrics.jsonl").unlink()
        writer.write(2, {"train/loss": 1.0})
    assert written(tmp_path) == [{"step": 2, "train/loss": 1.0}]
    assert lines == ["metrics.jsonl was removed under the run; it is begun again."]
