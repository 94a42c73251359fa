"""Datasets of the Hugging Face hub, or in local folders, streamed by the library `datasets`."""

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from jaxdp.common import paths
from jaxdp.common.errors import ConfigError, shown
from jaxdp.data.example import Example
from jaxdp.data.fields import Fields
from jaxdp.data.records import no_key


class HfSource:
    """A dataset that `datasets.load_dataset` opens, read as a stream: nothing else is stored.

    The validation split is the dataset's own, or with data.eval_split="" documents at equal
    distances in the training split, data.eval_fraction of them.
    """

    def __init__(self, name: str, config: ConfigDict, report: Callable[[str], None]):
        """Finds the dataset; raises ConfigError where it can't, or `datasets` is missing."""
        self.path, self._report = config.data.path, report
        self.splits = {"train": config.data.train_split, "validation": config.data.eval_split}
        self.eval_fraction, self.fields = config.data.eval_fraction, Fields(config)
        try:
            import datasets
        except ImportError:
            raise ConfigError(
                f"data.path={shown(self.path)} needs the package datasets: pip install "
                "'jaxdp[datasets]', or give its files, as in parquet:GLOB"
            ) from None
        paths.check_hub(f"data.path={shown(self.path)}")
        name, _, self.config_name = name.partition(":")
        try:
            self.builder: Any = datasets.load_dataset_builder(name, self.config_name or None)
            # Only what is streamed knows the splits of every kind of dataset.
            self._streams: Any = self.builder.as_streaming_dataset()
        except Exception as error:  # Of many types, of the network and of the files.
            raise ConfigError(
                f"data.path={shown(self.path)} can't be opened by the library datasets "
                f"({shown(error, as_text=str)}): check name and config, written hf:NAME:CONFIG"
            ) from None

    def identity(self) -> dict:
        """Returns the dataset's name, its files with their versions, the splits and the keys."""
        files = self.builder.config.data_files or {}
        # Versions: a commit of the hub, or the times at which local files were changed.
        versions = {
            str(k): [list(v), [list(m) for m in v.origin_metadata]] for k, v in files.items()
        }
        found = {"hf": self.path, "files": versions, "splits": self.splits}
        fraction = {} if self.splits["validation"] else {"eval_fraction": self.eval_fraction}
        return found | fraction | self.fields.identity()

    def examples(self, split: str) -> Iterator[Example | None]:
        """Yields the prompt, if any, and the text of each record."""
        stream, key = self._stream(split), f"{self.path}, {split}"
        columns = stream.column_names or self.fields.keys
        if missing := [name for name in self.fields.keys if name not in columns]:
            raise no_key(self.path, missing[0], columns, some_have=False)
        shared, count = not self.splits["validation"], 0
        for number, record in enumerate(stream.select_columns(self.fields.keys), 1):
            # Of the first n documents floor(n * eval_fraction) are validation text.
            taken, count = count, int(number * self.eval_fraction)
            if not shared or (count > taken) == (split == "validation"):
                yield self.fields.example(f"{key} record {number}", record)

    def _stream(self, split: str) -> Any:
        name = self.splits[split] or self.splits["train"]
        if name not in self._streams:
            key = "data.train_split" if split == "train" else "data.eval_split"
            more = "" if split == "train" else "; '' takes data.eval_fraction of data.train_split"
            raise ConfigError(
                f"{key}={shown(name)} is no split of {self.path}: it has "
                f"{', '.join(self._streams)}{more}"
            )
        return self._streams[name]
