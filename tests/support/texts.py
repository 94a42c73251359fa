"""The repository, and texts that the tests train on."""

from pathlib import Path

from hypothesis import settings

REPOSITORY = Path(__file__).parent.parent.parent
TEXT = "".join(
    f"{i} is {'even' if i % 2 == 0 else 'odd'}, its square is {i * i}.\n" for i in range(800)
)
# No deadline: a shared machine may pause.
FEW = settings(deadline=None, max_examples=50)


def unused(with_validation: bool):
    raise AssertionError("this tokenizer asks for no text")
