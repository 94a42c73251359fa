"""TensorFlow datasets as a source of documents, prepared on first use."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from jaxdp.common import paths
from jaxdp.common.errors import ConfigError, shown
from jaxdp.common.files import first_line
from jaxdp.data.example import Example

# Markup to remove from TFDS datasets: {dataset: (pattern, replacement) pairs}.
CLEANED = {
    "wiki40b": (
        (r"\A\n?_START_ARTICLE_\n", ""),
        (r"\n_START_(ARTICLE|SECTION|PARAGRAPH)_\n", "\n\n"),
        (r"_NEWLINE_", "\n"),
    )
}


class TfdsSource:
    """A TensorFlow dataset with a text feature, prepared on first use."""

    def __init__(self, name: str, config: ConfigDict, report: Callable[[str], None]):
        """Finds the builder; raises ConfigError where TFDS has none, or can't be imported."""
        if not config.data.data_dir:
            paths.check_home(f"data.path={shown(config.data.path)}", "TFDS_DATA_DIR")
        from jaxdp.data import python_stdlib
        from jaxdp.data.tensorflow import tf
        from jaxdp.data.tfds import tfds

        self._tf, self._tfds, self._report = tf, tfds, report
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        self.splits = {"train": config.data.train_split, "validation": config.data.eval_split}
        self.keys = {"prompt_key": config.data.prompt_key, "text_key": config.data.text_key}
        self.keys = {key: name for key, name in self.keys.items() if name or key == "text_key"}
        self.path = config.data.path
        data_dir = config.data.data_dir or None
        if data_dir and "://" not in data_dir:  # TFDS knows what gs:// is.
            data_dir = str(paths.local("data.data_dir", data_dir))
        try:
            if name == "python_stdlib":
                self.builder = python_stdlib.PythonStdlib(data_dir=data_dir)
            else:
                self.builder = tfds.builder(name, data_dir=data_dir)
        except Exception as error:  # TFDS raises many types for a wrong name, version or option.
            raise ConfigError(
                f"data.path={shown(self.path)} is not known to TFDS ({first_line(error)}): see "
                "tensorflow.org/datasets/catalog for names, or check data.data_dir"
            ) from None

    @property
    def prepared(self) -> bool:
        """Whether the dataset's files are there."""
        return self.builder.data_path.exists()

    def identity(self) -> dict:
        """Returns the dataset's full name with its version, the splits, the features, its files.

        Of the files, paths, sizes and modification times; there are none before `prepare`.
        """
        name, folder = self.builder.info.full_name, self.builder.data_path
        cleaned = {"cleaned": CLEANED[self.builder.name]} if self.builder.name in CLEANED else {}
        try:
            paths = sorted(map(str, folder.iterdir())) if self.prepared else []
            stats = [(path, self._tf.io.gfile.stat(path)) for path in paths]
        except Exception as error:  # TensorFlow's own types, or Python's.
            raise ConfigError(
                f"data.path={shown(self.path)}: its files in {folder} can't be read "
                f"({first_line(error)}): check data.data_dir"
            ) from None
        files = [[path, stat.length, stat.mtime_nsec] for path, stat in stats]
        return {"tfds": name, "splits": self.splits, "files": files} | self.keys | cleaned

    def examples(self, split: str) -> Iterator[Example]:
        """Prepares the dataset if needed; yields each example's prompt ("" if none) and text."""
        self.prepare()
        spec = self.splits[split]
        # Its cache would warn of each reader that stops early.
        config = self._tfds.ReadConfig(try_autocache=False)
        try:
            dataset = self.builder.as_dataset(split=spec, read_config=config)
        except (ValueError, KeyError) as error:
            key = "data.train_split" if split == "train" else "data.eval_split"
            raise ConfigError(
                f"{key}={shown(spec)} is no split of {self.path} ({first_line(error)}): "
                f"it has {', '.join(self.builder.info.splits)}"
            ) from None
        text = self._tf.TensorSpec((), self._tf.string)
        texts = [name for name, feature in dataset.element_spec.items() if feature == text]
        for key, name in self.keys.items():
            if name not in texts:
                raise ConfigError(
                    f"data.{key}={shown(name)} is no text feature of {self.path}: choose one of "
                    f"{', '.join(texts)}"
                )
        chosen = dataset.map(lambda example: [example[name] for name in self.keys.values()])
        for values in self._tfds.as_numpy(chosen):
            *prompt, text = [
                self._decoded(key, value, spec)
                for key, value in zip(self.keys, values, strict=True)
            ]
            yield Example("".join(prompt), text)

    def _decoded(self, key: str, value: bytes, spec: str) -> str:
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError(
                f"data.{key}={shown(self.keys[key])} of {self.path} is not UTF-8 text in split "
                f"{spec!r}: choose another feature or dataset"
            ) from None
        for pattern, replacement in CLEANED.get(self.builder.name, ()):
            text = re.sub(pattern, replacement, text)
        return text

    def prepare(self) -> None:
        """Makes the dataset's files, if need be; raises ConfigError where that can't be done."""
        if not self.prepared:
            size = self.builder.info.download_size  # 0 also where it is unknown.
            self._report(f"Preparing {self.path}{f' (a download of {size})' if size else ''} ...")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints "Unknown size".
                self.builder.download_and_prepare()
            if self.prepared and not self.builder.info.splits:  # By another process, a moment ago.
                self.builder.info.read_from_directory(self.builder.data_path)
        except Exception as error:  # Downloads fail in as many ways as there are servers.
            raise ConfigError(
                f"data.path={shown(self.path)} can't be prepared ({first_line(error)}): "
                "download it where there is a network and point data.data_dir there"
            ) from error
