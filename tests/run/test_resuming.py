"""What a run goes on from, and what it says has changed."""

import json

import pytest

from jaxdp.common import config as configs
from jaxdp.common.errors import ConfigError
from jaxdp.data.pipeline import Position
from jaxdp.run import resuming
from jaxdp.workdir import integrity
from support.configs import changed

MIXTURE = "0.75*text:a.txt+0.25*text:b.txt"


@pytest.fixture
def told(config, tmp_path):
    """What is told of some changes, from step 3 on."""

    def of(extra=None, **changes):
        configs.save(config, tmp_path / "config.json")
        extra = {"sequences": [24]} if extra is None else extra
        new = changed(config, **changes)
        return resuming.changes(tmp_path, new, Position(3, (24,)), extra)

    return of


def test_what_has_changed_is_told_with_both_values(told):
    assert told() == ""
    assert told(log_every=5, model__dropout=0.25) == (
        "changed: log_every 1 -> 5, model.dropout 0 -> 0.25"
    )
    assert told(global_batch_size=4) == (
        "changed: global_batch_size 8 -> 4; the data go on with sequence 25"
    )


def test_where_the_learning_rate_goes_is_told(told):
    up = "the learning rate goes up at step 3, from 0.00775 to 0.0775"
    assert told(optimizer__learning_rate=0.1) == (
        f"changed: optimizer.learning_rate 0.01 -> 0.1; {up}"
    )
    assert "goes down at step 3, from 0.00775 to 0.007" in told(optimizer__schedule="linear")
    assert "goes up at step 3, from 0.00775 to 0.00999" in told(num_train_steps=60)
    constant = told(optimizer__warmup_steps=3, optimizer__schedule="constant")
    assert "goes up at step 3, from 0.00775 to 0.01" in constant


def test_a_rate_that_only_changes_later_is_told(config, tmp_path):
    config.optimizer.schedule = "wsd"
    configs.save(config, tmp_path / "config.json")
    longer = changed(config, optimizer__final_fraction=0.5)
    assert resuming.changes(tmp_path, longer, Position(3, (24,)), {"sequences": [24]}) == (
        "changed: optimizer.final_fraction 0.1 -> 0.5; the learning rate goes on as before, but "
        "ends at 0.005 instead of 0.001"
    )


def test_an_older_versions_checkpoint_and_config_are_told(told, config, tmp_path):
    assert told(extra={}).startswith("checkpoint 3 is of an older version, and doesn't hold its")
    assert "after 24 sequences, by config.json's batch size" in told(extra={})
    saved = json.loads(config.to_json())
    del saved["optimizer"]["schedule"], saved["log_every"]
    saved["optimizer"]["learning_rate"] = "much"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    line = resuming.changes(tmp_path, config, Position(3, (24,)), {"sequences": [24]})
    assert "log_every 10 -> 1" in line and "optimizer.learning_rate much -> 0.01" in line
    assert "the former learning rates aren't known" in line
    (tmp_path / "config.json").unlink()
    line = resuming.changes(tmp_path, config, Position(3, (24,)), {"sequences": [24]})
    assert line == "config.json is missing, so what has changed isn't known"


def save_extra(workdir, step, extra):
    folder = workdir / "checkpoints" / str(step) / "extra"
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps(extra))
    return folder / "metadata"


def test_the_position_is_the_newest_checkpoints(config, tmp_path):
    assert resuming.newest_position(tmp_path, config) == Position()
    save_extra(tmp_path, 3, integrity.sealed({"sequences": [24], "shuffle": 2}))
    path = save_extra(tmp_path, 12, integrity.sealed({"sequences": [99], "shuffle": 1}))
    assert resuming.newest_position(tmp_path, config) == Position(12, (99,), 1)
    path.write_text(path.read_text().replace("99", "98"))  # Damaged: restoring will say so.
    assert resuming.newest_position(tmp_path, config) == Position(3, (24,), 2)


def test_an_older_versions_checkpoint_had_the_batch_size_of_its_config(config, tmp_path):
    configs.save(config, tmp_path / "config.json")
    config.global_batch_size = 64
    assert resuming.position_of(tmp_path, config, 5, {}) == Position(5, (40,), 1)
    config.data.path = MIXTURE
    config.global_batch_size = 8
    configs.save(config, tmp_path / "config.json")
    config.data.path = "0.5*text:a.txt+0.5*text:b.txt"
    assert resuming.position_of(tmp_path, config, 5, {}) == Position(5, (30, 10), 1)


def test_another_number_of_sources_is_refused(config, tmp_path):
    config.data.path = MIXTURE
    with pytest.raises(ConfigError, match="has 2 sources, and checkpoint 5 was trained on 1: use"):
        resuming.position_of(tmp_path, config, 5, {"sequences": [40]})
