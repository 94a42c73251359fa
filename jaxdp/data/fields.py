"""Makes examples of records, such as `data.records` reads: which of their keys hold the text."""

from typing import Any

from ml_collections import ConfigDict

from jaxdp.common.errors import ConfigError
from jaxdp.data.example import Example
from jaxdp.data.records import no_json, no_key


class Fields:
    """The keys of records that hold prompt and text."""

    def __init__(self, config: ConfigDict):
        """Takes data.text_key, data.prompt_key and data.skip_missing."""
        self.keys = [key for key in (config.data.prompt_key, config.data.text_key) if key]
        self.chats = bool(config.data.messages_key)
        if self.chats:
            self.keys = [config.data.messages_key]
        self.skip_missing = config.data.skip_missing

    def identity(self) -> dict:
        """Returns what the examples depend on, as JSON."""
        chats = {"chats": True} if self.chats else {}
        return {"keys": self.keys} | chats | ({"skip_missing": True} if self.skip_missing else {})

    def example(self, place: str, value: Any) -> Example | None:
        """Returns the example that a record holds, or None for one to skip.

        Args:
          place: where it is, for the message.
          value: a dictionary, or whatever is in its place.

        Raises:
          ConfigError: it is no dictionary, or holds no text.
        """
        if not isinstance(value, dict):
            raise no_json(place, TypeError(f"it is of type {type(value).__name__}"))
        found = [value.get(key) for key in self.keys]
        for key, text in zip(self.keys, found, strict=True):
            if text is None:
                if self.skip_missing:
                    return None
                raise no_key(place, key, [name for name, v in value.items() if v is not None])
            if self.chats:
                return _chat(place, key, text)
            if not isinstance(text, str) or text != text.encode(errors="ignore").decode():
                reason = f"{key!r} is of type {type(text).__name__}"
                if isinstance(text, str):  # JSON can hold half a surrogate pair.
                    reason = f"{key!r} is no valid Unicode"
                raise ConfigError(
                    f"data.path: {place} holds no text ({reason}): correct it, or change "
                    "data.text_key and data.prompt_key"
                )
        return Example("".join(map(str, found[:-1])), str(found[-1]))


def _chat(place: str, key: str, messages: Any) -> Example:
    fits = isinstance(messages, list) and all(
        isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
        for m in messages
    )
    if not fits or not any(m["role"] == "assistant" for m in messages):
        raise ConfigError(
            f"data.path: {place} holds no chat in {key!r}: write a list of "
            '{"role": "user", "content": TEXT}, with at least one of the role "assistant"'
        )
    return Example("", "\n".join(m["content"] for m in messages), messages=messages)
