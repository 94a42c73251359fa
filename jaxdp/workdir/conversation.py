"""A conversation with a model that was trained on chats."""

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxdp.common.choices import check_options
from jaxdp.common.errors import ConfigError
from jaxdp.data import tokenizer
from jaxdp.data.chat import Messages, Template
from jaxdp.model import sampling
from jaxdp.workdir.generation import open_causal

AT_ONCE = 8  # Tokens that are drawn before they are shown.


class Conversation:
    """The messages of a conversation so far, and the model that answers them.

    Attributes:
      messages: [{"role": "user" or "assistant", "content": text}].
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        which: str = "newest",
        num_tokens: int = 200,
        report: Callable[[str], None] = print,
        **options: Any,
    ):
        """Opens a checkpoint of a run.

        Args:
          workdir: the folder of the run.
          which: the checkpoint, as for `generation.generate`.
          num_tokens: the most tokens in an answer.
          report: called with a line of text about a damaged checkpoint, and once when the
            conversation is longer than the context.
          **options: temperature, top_k, top_p and seed of `sampling.stream`.

        Raises:
          ConfigError: there is no trained causal model or no such checkpoint, or the model was not
            trained on chats.
          RunError: the checkpoint, or all of them, are damaged.
        """
        check_options(num_tokens=num_tokens, **options)
        self._run = open_causal(workdir)
        source = self._run.chat_template
        if not source:
            raise ConfigError(
                f"--chat needs a chat template, and --workdir={workdir} has none: train on chats, "
                "with data.messages_key"
            )
        self._template = Template(source, self._run.words, datetime.now())
        self._params, _ = self._run.params(which, report)
        self._stop = self._template.stop_ids()
        self._num_tokens, self._options, self._report = num_tokens, options, report
        self._cut = False  # Whether it has been said that the model doesn't see the beginning.
        self.messages: Messages = []

    def answer(self, text: str) -> Iterator[str]:
        """Adds a message of the user's, and yields the answer bit by bit; then adds that, too."""
        self.messages.append({"role": "user", "content": text})
        words = self._run.words
        prompt, space = self._template.prompt(self.messages)
        context = self._run.model.config.seq_len
        if len(prompt) >= context and not self._cut:
            self._cut = True
            self._report(
                f"the conversation is longer than the model's context of {context} tokens: from "
                "here on it doesn't see the beginning, nor a system message"
            )
        drawn: list[int] = []
        said = ""
        for [ids] in sampling.stream(
            self._run.model,
            self._params,
            [prompt],
            vocab_size=tokenizer.vocab_size(words),
            num_tokens=self._num_tokens,
            at_once=AT_ONCE,
            **self._options,
        ):
            new = ids.tolist()
            end = next((i for i, token in enumerate(new) if token in self._stop), None)
            drawn += new[:end]
            whole = words.decode(drawn, skip_special_tokens=False).removeprefix(space)
            if end is not None or not whole.endswith("\ufffd"):  # Half a character.
                yield whole[len(said) :]
                said = whole
            if end is not None:
                break
        self.messages.append({"role": "assistant", "content": said})
