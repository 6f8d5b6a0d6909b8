"""Data sets by URL: what lies in an fsspec file system is read as what lies on disk."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from escm2rec.errors import ConfigError, DataError
from escm2rec.inspection.held import held_by
from escm2rec.paths import DataPath, RemotePath, copy_folder, data_path, store_path
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from tests.encoded import write_dataset
from tests.s3_server import s3_server

ROWS = 900


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_dataset(tmp_path_factory.mktemp("paths") / "data", {"train": ROWS, "test": 10})
    (made / "vocabulary" / "user.parquet").write_bytes(b"a vocabulary")
    return made


@pytest.fixture
def url(local: Path) -> Iterator[str]:
    """The same data set in fsspec's memory."""
    memory, folder = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for file in local.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"{folder}/set/{file.relative_to(local)}", file.read_bytes())
    yield f"memory://{folder}/set"
    memory.rm(folder, recursive=True)


@pytest.fixture(scope="module")
def bucket(local: Path) -> Iterator[str]:
    """The same data set in a bucket of a server that speaks S3."""
    with s3_server("logs"):
        fsspec.filesystem("s3").put(str(local), "logs/set", recursive=True)
        yield "s3://logs/set"


def _read(data: str | DataPath, threads: int = 1) -> list[tuple[list[int], list[int]]]:
    reader = Reader(Dataset.open(data), "train", 128, decode_threads=threads, extra_columns=("kept.row_id",))
    batches = [(batch.features, extra["kept.row_id"].to_pylist()) for batch, extra in reader.read_ahead(1)]
    return [(features.values().tolist(), rows) for features, rows in batches if features is not None]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_data_set_is_read_alike_wherever_it_lies(local: Path, url: str, threads: int) -> None:
    expected = _read(local)
    assert sorted(row for _, rows in expected for row in rows) == list(range(ROWS))
    for place in (str(local), local.as_uri(), url, data_path(url)):
        assert _read(place, threads) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_a_data_set_is_read_from_s3(local: Path, bucket: str, threads: int, tmp_path: Path) -> None:
    assert _read(bucket, threads) == _read(local)
    copy_folder(data_path(bucket) / "vocabulary", tmp_path / "copied")
    assert (tmp_path / "copied" / "user.parquet").read_bytes() == b"a vocabulary"
    with pytest.raises(DataError, match="no data set at s3://logs/sets") as absent:
        Dataset.open("s3://logs/sets")
    assert absent.value.hint == "did you mean s3://logs/set?"


def test_a_store_that_gives_nothing_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is known: what a bucket holds may be remembered."""
    nowhere = fsspec.filesystem("s3", endpoint_url="http://127.0.0.1:9", skip_instance_cache=True)
    with pytest.raises(DataError, match="cannot read s3://logs/set: EndpointConnectionError: Could not connect to the endpoint") as silent:
        Dataset.open(RemotePath(nowhere, "logs/set"))
    assert silent.value.hint.startswith("check its address, and the credentials and endpoint")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nobody = fsspec.filesystem("s3", skip_instance_cache=True)
    with pytest.raises(DataError, match="cannot read s3://logs/set: NoCredentialsError"):
        Dataset.open(RemotePath(nobody, "logs/set"))


class EndpointConnectionError(Exception):
    """As botocore has it: no OSError."""


STORE_ERRORS = [
    PermissionError("The provided token has expired."),
    OSError("Forbidden: /set"),
    EndpointConnectionError("Could not connect to the endpoint"),
]


@contextmanager
def broken(monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, ending: str = ".parquet") -> Iterator[None]:
    """fsspec's memory, whose files of this ending raise the error when this is called."""

    def breaks(self: Any, *given: Any, **named: Any) -> Any:
        if str(getattr(self, "path", given and given[0])).endswith(ending):
            raise error
        return real(self, *given, **named)

    owner: Any = MemoryFile if method == "read" else MemoryFileSystem
    real = getattr(owner, method)
    with monkeypatch.context() as patched:
        patched.setattr(owner, method, breaks)
        yield


@pytest.mark.parametrize("method", ["_open", "read"])
@pytest.mark.parametrize("error", STORE_ERRORS)
def test_a_store_that_ends_to_answer_is_not_told_as_damage(
    url: str, tmp_path: Path, error: Exception, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials end while parts are read."""
    dataset = Dataset.open(url)
    reader = Reader(dataset, "train", 128)
    told = rf"^cannot read {url}/.*\.parquet: {type(error).__name__}: {error}\nhint: check its address, and the credentials and endpoint"
    uses: list[Callable[[], Any]] = [
        lambda: next(reader.batches(0)),
        lambda: dataset.row_groups("train"),
        lambda: held_by(dataset),
        lambda: copy_folder(data_path(url) / "vocabulary", tmp_path / "copied"),
    ]
    for use in uses:
        with broken(monkeypatch, method, error), pytest.raises(DataError, match=told):
            use()


def test_a_store_that_ends_to_answer_before_the_schema_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for method, ending in (("cat_file", "schema.json"), ("isfile", "manifest.json")):
        with broken(monkeypatch, method, STORE_ERRORS[0], ending), pytest.raises(DataError, match=rf"^cannot read {url}/.*{ending}: Perm"):
            Dataset.open(url)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("left", [0, 4])
def test_a_damaged_part_is_told_as_such_wherever_it_lies(local: Path, url: str, tmp_path: Path, left: int, remote: bool) -> None:
    place = data_path(url) if remote else Path(shutil.copytree(local, tmp_path / "set"))
    dataset = Dataset.open(place)
    reader = Reader(dataset, "train", 128)
    whole = (local / "train" / "part-00000.parquet").read_bytes()
    damaged = whole[:left] + bytes(len(whole) // 2) + whole[left + len(whole) // 2 :] if left else b""
    part = place / "train" / "part-00000.parquet"
    if isinstance(part, Path):
        part.write_bytes(damaged)
    else:
        part.fs.pipe_file(part.path, damaged)
    for use in (lambda: list(reader.batches(0)), lambda: held_by(dataset)):
        with pytest.raises(DataError, match="damaged: preprocess again"):
            use()


@pytest.mark.parametrize(("number", "said"), [(errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error")])
def test_a_local_part_that_may_not_be_read_is_not_told_as_damage(
    local: Path, number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.open(local)
    reader = Reader(dataset, "train", 128)

    def refuses(path: Path, **_: Any) -> None:
        raise OSError(number, f"Failed to open local file '{path}'. Detail: [errno {number}] {said}")

    monkeypatch.setattr(pq, "ParquetFile", refuses)
    told = rf"^{local}/train/part-00000.parquet(, row group \d)? cannot be read: {said}\nhint: check who may read it"
    for use in (lambda: next(reader.batches(0)), lambda: dataset.row_groups("train"), lambda: held_by(dataset)):
        with pytest.raises(DataError, match=told):
            use()


def test_a_file_url_is_a_local_path(local: Path) -> None:
    assert Dataset.open(local.as_uri()).path == local
    assert data_path("data/set") == Path("data/set")


def test_errors_name_the_url(url: str) -> None:
    memory = fsspec.filesystem("memory")
    with pytest.raises(DataError, match=f"no data set at {url}-absent") as absent:
        Dataset.open(f"{url}-absent")
    assert absent.value.hint == f"did you mean {url}?"
    part = data_path(url) / "train" / "part-00000.parquet"
    assert isinstance(part, RemotePath)
    memory.pipe_file(part.path, b"click,conversion")
    with pytest.raises(DataError, match=f"{url}/train/part-00000.parquet is not a Parquet file"):
        Dataset.open(url).row_groups("train")
    memory.rm(part.path)
    with pytest.raises(DataError, match=f"{url}/train/part-00000.parquet is missing, the manifest names it"):
        Dataset.open(url).row_groups("train")
    memory.rm((data_path(url) / "schema.json").path)  # type: ignore[union-attr]
    with pytest.raises(DataError, match=f"no schema at {url}/schema.json"):
        Dataset.open(url)
    memory.rm((data_path(url) / "manifest.json").path)  # type: ignore[union-attr]
    with pytest.raises(DataError, match=f"the data set at {url} is incomplete"):
        Dataset.open(url)


def test_a_vocabulary_is_copied_from_anywhere(local: Path, url: str, tmp_path: Path) -> None:
    places: list[str | DataPath] = [local, url]
    for number, place in enumerate(places):
        copy_folder(data_path(place) / "vocabulary", tmp_path / str(number))
        assert (tmp_path / str(number) / "user.parquet").read_bytes() == b"a vocabulary"


def test_a_protocol_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot open nosuch://bucket/set: Protocol not known: nosuch") as refused:
        Dataset.open("nosuch://bucket/set")
    assert "install the fsspec package of that protocol" in refused.value.hint


@pytest.mark.parametrize("kind", ["file", "memory", "s3"])
def test_what_is_put_on_a_store_is_listed_fetched_and_removed(kind: str, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"a checkpoint")
    memory = f"memory://{uuid.uuid4().hex}"
    place = store_path({"file": str(tmp_path / "store"), "memory": memory, "s3": "s3://written"}[kind])
    if kind == "s3":
        place.fs.mkdir("written")
    assert place.sizes() == {}
    names = ["step-2/.index", "step-20/part", "plain"]
    for name in names:
        (place / name).put(tmp_path / "source")
    assert place.sizes() == dict.fromkeys(names, 12)
    if kind == "s3":  # by another process, which this one's listings do not know of
        type(place.fs)(skip_instance_cache=True).pipe_file("written/step-2/theirs", b"1")
        names.append("step-2/theirs")
    assert place.sizes().keys() == set(names)
    (place / "step-2/.index").fetch(tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"a checkpoint"
    (place / "step-2").remove()
    (place / "plain").remove()
    assert place.sizes() == {"step-20/part": 12}
    (place / "step-20").remove()
    assert place.sizes() == {}
    assert kind != "s3" or place.exists(), "the bucket stays"
    with pytest.raises(DataError, match=rf"^cannot read {place}/plain: FileNotFoundError"):
        (place / "plain").fetch(tmp_path / "fetched")


def test_a_store_that_takes_nothing_is_told(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"a checkpoint")
    with pytest.raises(DataError, match=r"^cannot write s3://nowhere/at/all: FileNotFoundError: The specified bucket does not exist"):
        (store_path("s3://nowhere/at") / "all").put(tmp_path / "source")
    with pytest.raises(DataError, match=rf"^cannot write file://{tmp_path}/source/all: "):
        (store_path(str(tmp_path / "source")) / "all").put(tmp_path / "source")
