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


def test_it_takes_the_checkpoint_that_is_asked_for(workdir, command):
    """The run has checkpoints 2 and 4. Only 4 has a validation loss, so it is the best one."""

    def generate(*step, check=0):
        flags = (f"--workdir={workdir}", "--prompt=1 is", "--num_tokens=9")
        return command("generate", *flags, *step, check=check)

    assert generate("--step=best").stdout == generate("--step=4").stdout == generate().stdout
    (workdir / "checkpoints" / "4" / "extra" / "metadata").unlink()
    for which in ("best", "4"):
        assert "Checkpoint 4 is damaged" in generate(f"--step={which}", check=1).stderr
    assert "Checkpoint 2 is used instead" in generate().stderr
    second = generate("--step=2")
    assert second.stdout == generate().stdout and "damaged" not in second.stderr
    assert "--step=3 is no checkpoint" in generate("--step=3", check=2).stderr


def test_what_does_not_go_together_is_refused(trained, command):
    workdir = f"--workdir={trained}"
    for flags, message in (
        (["--chat", "--prompt=1"], "--chat does not go with --prompt or --num_samples"),
        (["--chat", "--num_samples=2"], "--chat does not go with --prompt or --num_samples"),
        (["--chat"], "--chat needs a chat template"),
        (["--prompt=1", "--step=last"], "--step='last' names no checkpoint"),
    ):
        process = command("generate", workdir, *flags, check=2, stdin="1 is\n")
        assert message in process.stderr and process.stderr.count("\n") == 1, process.stderr
        assert process.stdout == ""
