"""`inspect --verify`: a data set whose files are not those that were written is refused, wherever it lies."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from escm2rec.cli import main
from escm2rec.config import parse_config
from escm2rec.errors import DataError
from escm2rec.inspection.inspect import inspect
from escm2rec.inspection.verify import verify
from escm2rec.paths import data_path
from escm2rec.preprocess import preprocess
from escm2rec.reader.dataset import Dataset
from tests.raw_tables import FEATURES, raw_table

PARTS, VOCABULARIES = 4, 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified")
    (folder / "logs").mkdir()
    pq.write_table(raw_table(2_000, 1, labels=True), folder / "logs" / "a.parquet")
    pq.write_table(raw_table(400, 2, labels=True), folder / "logs" / "b.parquet")
    split = {"by": "file", "train": "a*.parquet", "test": "b*.parquet"}
    tree = {"source": {"kind": "table"}, "features": FEATURES, "split": split, "rows_per_file": 700}
    preprocess(parse_config({"data": tree}).data, folder / "logs", folder / "data")
    return folder / "data"


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


@pytest.fixture
def url(whole: Path) -> Iterator[str]:
    memory, folder = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for file in whole.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"{folder}/set/{file.relative_to(whole)}", file.read_bytes())
    yield f"memory://{folder}/set"
    memory.rm(folder, recursive=True)


def flipped(content: bytes) -> bytes:
    """With one bit changed, in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def flip(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes()))


def test_a_whole_data_set_is_told_as_such(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [path for path in whole.rglob("*.parquet") if path.is_file()]
    assert len(files) == PARTS + VOCABULARIES
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(whole), "--verify", "--html", str(tmp_path / "page.html")])
    seen = capsys.readouterr()
    size = sum(path.stat().st_size for path in files)
    record = json.loads(seen.out)
    assert record["verified"] == {"files": len(files), "bytes": size}
    sentence = f"{len(files)} files of {size / 1e6:.1f} MB are as they were written"
    assert f"Verified: {sentence}." in " ".join(seen.err.split())
    assert f"<dt>verified</dt><dd>{sentence}</dd>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    without = inspect(whole)
    assert {name: value for name, value in record.items() if name not in ("verified", "html")} == json.loads(json.dumps(without))
    assert "erified" not in capsys.readouterr().err


def test_one_changed_bit_is_found_with_verify_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "train" / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:  # in the page of a number, which any value is valid of
        chunk = file.metadata.row_group(0).column(file.schema_arrow.names.index("price"))
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    inspect(data)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(data), "--verify"])
    seen = capsys.readouterr()
    assert seen.out == ""
    message, hint = seen.err.strip().splitlines()
    assert message.startswith(f"error: {path} has the SHA-256 ")
    assert message.endswith("; 1 of 8 files is damaged")
    assert hint == "hint: copy the data set again from where it is whole, or preprocess again"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


FAULTS: list[tuple[str, Any, str]] = [
    ("train/part-00000.parquet", flip, r"has the SHA-256 [0-9a-f]{12}\.\.\., the manifest says [0-9a-f]{12}\.\.\."),
    ("train/part-00000.parquet", cut, r"has [\d,]+ bytes, the manifest says [\d,]+"),
    ("test/part-00000.parquet", Path.unlink, "is missing"),
    ("vocabulary/shop.parquet", flip, r"has the SHA-256 [0-9a-f]{12}\.\.\., the schema says [0-9a-f]{12}\.\.\."),
    ("vocabulary/shop.parquet", cut, r"has the SHA-256 [0-9a-f]{12}\.\.\., the schema says [0-9a-f]{12}\.\.\."),
]


@pytest.mark.parametrize(("name", "damage", "said"), FAULTS)
def test_the_first_damaged_file_is_named_and_how_many_there_are(data: Path, name: str, damage: Any, said: str) -> None:
    damage(data / name)
    with pytest.raises(DataError, match=rf"^{data / name} {said}; 1 of 8 files is damaged\n"):
        inspect(data, verify=True)
    flip(data / "vocabulary" / "user.parquet")
    with pytest.raises(DataError, match=rf"{said}; 2 of 8 files are damaged\n"):
        inspect(data, verify=True)


def test_a_file_that_cannot_be_read_is_damaged(data: Path) -> None:
    path = data / "train" / "part-00002.parquet"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=rf"^{path} cannot be read: Is a directory; 1 of 8 files is damaged\n"):
        verify(Dataset.open(data))


def test_a_data_set_in_a_store_is_verified_there(url: str, whole: Path) -> None:
    assert inspect(data_path(url), verify=True)["verified"]["files"] == 8
    memory, name = fsspec.filesystem("memory"), "train/part-00001.parquet"
    memory.pipe_file(f"{url}/{name}", flipped((whole / name).read_bytes()))
    with pytest.raises(DataError, match=rf"^{url}/{name} has the SHA-256 .*; 1 of 8 files is damaged\n"):
        inspect(data_path(url), verify=True)
    memory.rm(f"{url}/test/part-00000.parquet")
    memory.pipe_file(f"{url}/train/part-00000.parquet", b"PAR1")
    with pytest.raises(DataError, match=r"part-00000.parquet has 4 bytes, the manifest says [\d,]+; 3 of 8 files are damaged\n"):
        inspect(data_path(url), verify=True)


def test_a_store_that_does_not_answer_is_told_as_such_not_as_damage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.open(url)

    def silent(*_: Any, **__: Any) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(fsspec.filesystem("memory"), "open", silent)
    with pytest.raises(DataError, match=r"^cannot read memory://.*part-00000.parquet: TimeoutError: no answer\n"):
        verify(dataset)
