import sys

import pytest

from jaxdp.common import cli
from jaxdp.common.errors import ConfigError, RunError


@pytest.mark.parametrize(("error", "status"), [(ConfigError, 2), (RunError, 1)])
def test_an_error_with_a_message_for_the_user_is_one_line(monkeypatch, capsys, error, status):
    def main():
        raise error("x=1 is\nwrong: use 2")

    monkeypatch.setattr(sys, "argv", ["jaxdp"])
    assert cli.run(main) == status
    assert capsys.readouterr().err == "jaxdp: x=1 is wrong: use 2\n"


def test_ctrl_c_is_no_fault(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["jaxdp"])
    assert cli.run(main) == 130
    assert capsys.readouterr().err == "jaxdp: interrupted\n"


def test_any_other_error_is_a_traceback(monkeypatch, capsys):
    def main():
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["jaxdp"])
    assert cli.run(main) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "ZeroDivisionError"
