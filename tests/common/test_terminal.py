from jaxdp.common.terminal import Display


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Display() as screen:
        screen.table("Title", {"name": "value [not markup]", "longer name": "x"})
        screen.start(0, 100)
        screen.step(5)
        screen.figures(10, 2.5, 1234.6)
        screen.figures(20, 2.25, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["Title", "  name         value [not markup]", "  longer name  x"]
    assert lines[3].startswith("step     10/100  loss 2.5000  1,235 tokens/s")
    assert lines[4].startswith("step     20/100  loss 2.2500  0:00 left")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Display() as screen:
        screen.start(0, 100)
        screen.figures(50, 2.5, 1000.0)
        screen.line("evaluation")
    out = capsys.readouterr().out
    assert "50/100" in out
    assert "evaluation" in out


def test_other_processes_are_quiet(capsys):
    with Display(quiet=True) as screen:
        screen.line("text")
        screen.table("Title", {"name": "value"})
        screen.start(0, 10)
        screen.figures(1, 1.0, 1.0)
    assert capsys.readouterr().out == ""
