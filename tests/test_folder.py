"""Folders that are complete or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from escm2rec.errors import ConfigError, DataError, RunError
from escm2rec.folder import layout_of, new_folder, read_manifest, refuse_existing, refuse_overlap, write_manifest
from tests.small_disks import small_disk


def made(path: Path, text: str = "whole", overwrite: bool = False) -> Path:
    with new_folder(path, "data set", overwrite) as folder:
        (folder / "part").write_text(text)
        write_manifest(folder, "data set", {"rows": 1})
    return path


def fail_half_way(path: Path, overwrite: bool) -> None:
    with new_folder(path, "data set", overwrite) as folder:
        (folder / "part").write_text("half")
        raise ZeroDivisionError


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        fail_half_way(out, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    made(out)
    assert read_manifest(out, "data set") == {"kind": "data set", "version": layout_of("data set"), "rows": 1}
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_killed_job_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old part").write_text("half")
    assert sorted(path.name for path in made(tmp_path / "out").iterdir()) == ["manifest.json", "part"]


def test_an_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"the output folder .*out exists\nhint: choose another --out, or pass --overwrite"):
        made(out, "other")
    assert (out / "part").read_text() == "whole"
    made(out, "other", overwrite=True)
    assert (out / "part").read_text() == "other"


def test_a_failed_overwrite_keeps_what_was_there(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        fail_half_way(out, overwrite=True)
    assert (out / "part").read_text() == "whole"


def test_an_overwrite_that_is_killed_leaves_the_old_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made(tmp_path / "out")
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target) == out:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            made(out, "other", overwrite=True)
    assert (tmp_path / ".out.old" / "part").read_text() == "whole"
    made(out, "other", overwrite=True)
    assert (out / "part").read_text() == "other"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_of_somebody_else_is_never_overwritten(tmp_path: Path) -> None:
    theirs = tmp_path / "home"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("ten years")
    with pytest.raises(ConfigError, match=r"will not overwrite .*home: it holds no run that escm2rec made"):
        refuse_existing(theirs, "run", overwrite=True)
    file = tmp_path / "file"
    file.write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(
            ConfigError, match=rf"^the output folder {file} is a file\nhint: choose another --out, or remove the file by hand$"
        ):
            refuse_existing(file, "run", overwrite)
    assert file.read_text() == "a file"
    assert (theirs / "thesis.tex").exists()


def test_only_a_folder_of_its_kind_is_overwritten(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    with pytest.raises(ConfigError, match="it holds no predictions that escm2rec made"):
        refuse_existing(out, "predictions", overwrite=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    refuse_existing(tmp_path / "run", "run", overwrite=True)


def test_an_output_that_is_or_holds_an_input_is_refused(tmp_path: Path) -> None:
    refuse_overlap(tmp_path / "out", [tmp_path / "in", tmp_path / "out-2"])
    refuse_overlap(tmp_path / "in" / "out", [tmp_path / "in"])
    for out in (tmp_path / "in", tmp_path, tmp_path / "in" / ".." / "in"):
        with pytest.raises(ConfigError, match=r"the output folder .* is or holds the input .*in"):
            refuse_overlap(out, [tmp_path / "in"])


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (made(tmp_path / "out") / "part").is_file()


def test_the_working_folder_is_a_place_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made(Path("."))
    assert (tmp_path / "here" / "part").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot write to"):
        made(tmp_path / "out")


def test_a_place_under_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*file: .*\nhint: choose another --out or mend its permissions"):
        made(tmp_path / "file" / "out")


@pytest.mark.timeout(30)
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_a_place_where_no_folder_can_be_made_is_named() -> None:
    """There mkdir says that there is no such file, as another job's finishing does: it must not be waited for."""
    with pytest.raises(ConfigError, match=r"cannot write to /proc/self: No such file or directory\nhint: choose another --out"):
        made(Path("/proc/self/out"))


MANIFESTS: dict[str, tuple[str | None, str]] = {
    "incomplete": (None, "the data set at .* is incomplete: it has no manifest"),
    "somebody else's": (
        "",
        "is no data set: it has neither manifest.json nor schema.json\nhint: give the folder that preprocess made as its --out",
    ),
    "not JSON": ("{", "is not readable JSON"),
    "another kind": (json.dumps({"kind": "run", "version": 1}), "is no data set: its manifest.json says 'run'"),
    "a list": ("[]", "is no data set: its manifest.json says 'list'"),
    "without splits": (json.dumps({"kind": "data set", "version": 1}), "lacks splits: it was changed after it was written"),
    "without a version": (json.dumps({"kind": "data set", "version": "x", "splits": 1}), "lacks a version"),
    "newer": (
        json.dumps({"kind": "data set", "version": 99, "splits": {}}),
        f"has layout version 99, this escm2rec reads up to {layout_of('data set')}",
    ),
    "older": (
        json.dumps({"kind": "data set", "version": 1, "splits": {}}),
        r"has layout version 1, this escm2rec reads 2\nhint: preprocess again",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    text, message = MANIFESTS[case]
    if text is None:
        (tmp_path / "schema.json").write_text("{}")
    elif text:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path, "data set", frozenset({"splits"}))


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set at .*absent\nhint: give the folder that preprocess made as its --out"):
        read_manifest(tmp_path / "absent", "data set")
    with pytest.raises(DataError, match=r"no checkpoint at .*absent\nhint: check the path"):
        read_manifest(tmp_path / "absent", "checkpoint")


def test_a_folder_of_the_kind_nearby_is_named(tmp_path: Path) -> None:
    """A parent was given, a data set, or a folder beside it: the runs that are there are told."""
    for name in ("esmm", "ips"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, "run", {})
    near = rf"hint: did you mean {tmp_path / 'esmm'} or {tmp_path / 'ips'}\?$"
    with pytest.raises(DataError, match=rf"is no run: it has neither manifest.json nor config.json\n{near}"):
        read_manifest(tmp_path, "run")
    with pytest.raises(DataError, match=rf"no run at .*esm\n{near}"):
        read_manifest(tmp_path / "esm", "run")
    write_manifest(tmp_path, "data set", {})
    with pytest.raises(DataError, match=rf"is no run: its manifest.json says 'data set'\n{near}"):
        read_manifest(tmp_path, "run")
    (tmp_path / "ips" / "manifest.json").unlink()
    (tmp_path / "ips" / "config.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"the run at .*ips is incomplete: it has no manifest\.json\nhint: train with --resume goes on with it"
    ):
        read_manifest(tmp_path / "ips", "run")


def test_a_mount_cannot_be_replaced(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        told = rf"^the empty folder {disk} cannot be replaced by a data set: Device or resource busy\n"
        with pytest.raises(ConfigError, match=told + rf"hint: pass a folder that is not there yet, such as --out {disk}/data-set$"):
            made(disk)
        assert (made(disk / "data-set") / "part").is_file()


def test_a_full_disk_is_told_and_nothing_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        told = rf"^cannot write {disk}/.out.partial: No space left on device; 0.0 MB of 1.0 MB are free there\n"
        with pytest.raises(RunError, match=told + "hint: make room there, then run the same command again, or choose another --out$"):
            made(disk / "out", "x" * 2_000_000)
        assert list(disk.iterdir()) == []


def test_a_disk_where_no_folder_can_be_made_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m,nr_inodes=1") as disk:
        free = r"1.0 MB of 1.0 MB are free there, and no number for another file \(inode\)"
        told = rf"^cannot write to {disk}: No space left on device; {free}\nhint: make room there, or choose another --out$"
        with pytest.raises(ConfigError, match=told):
            made(disk / "out")
