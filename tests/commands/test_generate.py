"""The command `generate`: prompts from flags and from stdin, and several samples of each."""

import pytest

LINE = "\n" + "-" * 40 + "\n"


def test_each_prompt_is_continued_as_often_as_asked(trained, command):
    flags = (f"--workdir={trained}", "--prompt=1 is", "--prompt=2", "--num_tokens=9")
    texts = command("generate", *flags, "--num_samples=2").stdout.removesuffix("\n").split(LINE)
    assert [text[:4] for text in texts[:2]] == ["1 is"] * 2 and len(texts) == 4
    assert [text[:1] for text in texts[2:]] == ["2"] * 2
    assert len(set(texts)) == 4  # The model has hardly learnt anything, so each is another.


@pytest.mark.parametrize("end", ["", "\n"])  # Without, or as a shell and an editor leave it.
def test_a_prompt_is_read_from_stdin(trained, command, end):
    flags = (f"--workdir={trained}", "--prompt=-", "--prompt=7", "--num_tokens=1")
    first, second = command("generate", *flags, stdin=f"1 is\n2{end}").stdout.split(LINE)
    assert first.startswith("1 is\n2") and len(first) == len("1 is\n2") + 1
    assert second.startswith("7")


def test_what_does_not_go_together_is_refused(trained, command):
    workdir = f"--workdir={trained}"
    for flags, message in (
        (["--chat", "--prompt=1"], "--chat does not go with --prompt or --num_samples"),
        (["--chat", "--num_samples=2"], "--chat does not go with --prompt or --num_samples"),
        (["--chat"], "--chat needs a chat template"),
    ):
        process = command("generate", workdir, *flags, check=2, stdin="1 is\n")
        assert message in process.stderr and process.stderr.count("\n") == 1, process.stderr
        assert process.stdout == ""
