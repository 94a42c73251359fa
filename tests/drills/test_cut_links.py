"""Two processes whose network loses packets, is cut for a while, and then for good."""

import sys
import time

import pytest

from support.processes import Run
from support.runs import assert_close_losses, figures, flags
from support.texts import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))

from network import Network, missing


class Elsewhere(Run):
    """A process of a run in a network namespace of its own."""

    def __init__(self, network, number, *arguments):
        self._network, self._number = network, number
        super().__init__(*arguments, devices=1)

    def started(self, *arguments, **options):
        return self._network.start(self._number, *arguments, **options)


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_cut_link_costs_nothing_but_time(config, tmp_path, command):
    """Ten seconds: the run goes on. Longer: it ends with a line, and goes on where it is started.

    At 1 Mbit/s, as 100 steps would be over before the link is cut.
    """
    config.update({"num_train_steps": 100, "log_every": 5, "eval_every": 100})
    config.checkpoint.every = 10
    arguments = flags(config, tmp_path / "cut")
    with Network(2, mbit=1.0) as network:
        for i in range(2):
            network.drop(i, 0.01)  # Where there is iptables.
        runs = [Elsewhere(network, i, *arguments) for i in range(2)]
        try:
            assert runs[0].until_printed("\nstep     20/"), runs[0].printed
            network.connect(1, False)
            time.sleep(10)
            before = newest(tmp_path / "cut")
            network.connect(1, True)
            assert runs[0].until(lambda: newest(tmp_path / "cut") >= before + 10), runs[0].printed
            network.connect(1, False)
            statuses = [run.ended(60) for run in runs]
        finally:
            for run in runs:
                run.kill()
    for i, run in enumerate(runs):
        said = f"jaxdp: process {1 - i} has failed: its machine hasn't answered for 15 s"
        assert said in run.printed and "Traceback" not in run.printed, run.printed
    assert statuses == [1, 1]
    assert newest(tmp_path / "cut") < 100
    for name in ("cut", "whole"):
        command("train", *flags(config, tmp_path / name), devices=2)
    assert_close_losses(figures(tmp_path / "whole"), figures(tmp_path / "cut"))


def newest(workdir):
    """The last step that has been logged."""
    return max((record["step"] for record in figures(workdir)), default=0)
