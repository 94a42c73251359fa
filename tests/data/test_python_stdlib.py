import pytest

from jaxdp.configs import default
from jaxdp.data import python_stdlib
from jaxdp.data.example import texts
from jaxdp.data.python_stdlib import LEFT_OUT, TABLES, is_validation, stdlib_files
from jaxdp.data.sources import get_source


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return dict(stdlib_files())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[list[str], list[str]]:
    """The documents of both splits as TFDS gives them, from a folder of the test's own."""
    config = default.get_config()
    config.data.path = "tfds:python_stdlib"
    config.data.data_dir = str(tmp_path_factory.mktemp("tfds"))
    source = get_source(config)
    return tuple(list(texts(source.examples(split))) for split in ("train", "validation"))


def test_preparing_it_is_said_once_and_tfds_prints_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(python_stdlib, "stdlib_files", lambda: [("ast.py", "a"), ("sched.py", "b")])
    config, lines = default.get_config(), []
    config.data.path, config.data.data_dir = "tfds:python_stdlib", str(tmp_path)
    for _ in range(2):
        assert list(texts(get_source(config, lines.append).examples("train"))) == ["a"]
    assert lines == ["Preparing tfds:python_stdlib ..."]
    assert capfd.readouterr() == ("", "")


def test_it_is_some_megabytes_of_python(files):
    assert 5e6 < sum(map(len, files.values())) < 50e6
    assert {"argparse.py", "json/decoder.py"} <= set(files)
    assert all(name.endswith(".py") and text for name, text in files.items())


def test_files_come_once_and_in_the_same_order(files):
    assert [name for name, _ in stdlib_files()] == list(files)


def test_no_tests_and_no_installed_packages(files):
    for name in files:
        assert not set(LEFT_OUT).intersection(name.split("/"))
    assert not [name for name in files if name.startswith(("test/", "numpy/", "jax/"))]


def test_what_was_prepared_from_other_files_is_not_taken_for_it(tmp_path):
    builder = python_stdlib.PythonStdlib(data_dir=str(tmp_path))
    assert builder.info.full_name.startswith("python_stdlib/code/")


def test_the_splits_share_nothing_and_are_all_files_in_order(prepared, files):
    train, validation = prepared
    assert train == [text for name, text in files.items() if not is_validation(name)]
    assert validation == [text for name, text in files.items() if is_validation(name)]


def test_validation_is_about_its_share(files):
    # A count of n draws has a standard deviation of sqrt(n p (1 - p)); this allows five.
    n, p = len(files), python_stdlib.VALIDATION_SHARE
    count = sum(map(is_validation, files))
    assert abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    assert count > 0


@pytest.mark.parametrize(
    ("name", "validation"),
    [("copyreg.py", True), ("sched.py", True), ("ast.py", False), ("json/decoder.py", False)],
)
def test_the_split_of_a_file_is_for_ever(name, validation):
    assert is_validation(name) == validation


def test_the_split_of_a_file_does_not_depend_on_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(python_stdlib.sysconfig, "get_path", lambda _: str(tmp_path))
    left_out = ("test/ast.py", "x/tests/sched.py", "site-packages/a.py", "encodings/cp037.py")
    for name in ("ast.py", "sched.py", *left_out, *TABLES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "empty.py").touch()
    (tmp_path / "notes.txt").write_text("no Python")
    assert list(stdlib_files()) == [("ast.py", "ast.py"), ("sched.py", "sched.py")]
    assert [is_validation(name) for name, _ in stdlib_files()] == [False, True]
