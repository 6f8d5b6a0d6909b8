"""The steps of preprocess on processes and on Ray, killed and taken up, two at once: always the same data set."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.machine import facts
from escm2rec.config import SimulationConfig
from escm2rec.engine import _told
from escm2rec.errors import ConfigError, DataError
from escm2rec.folder import resumable_folder
from escm2rec.simulate import simulate
from tests.small_disks import resize, small_disk

ROOT = Path(__file__).resolve().parents[1]
IMPRESSIONS = 6_000
KILLS = int(os.environ.get("ESCM2REC_KILLS", "3"))  # `make prove`: 30
PROOF = os.environ.get("ESCM2REC_KILLS_PROOF")  # where to write what was shown
TIMEOUT_S = 150
# A job so small runs in one process and one portion; as many portions, spills, merges, buckets and parts as a large one has, and two
# processes:
WORKER = """
import sys
from pathlib import Path
from escm2rec import workers
from escm2rec.preprocess import merge, pipeline, portions, read
portions.PORTION_BYTES, read.SPILL_BYTES, pipeline.BUCKET_ROWS, workers.SMALL_BYTES = 200_000, 1_000_000, 500, int(sys.argv[4])
merge.MERGED = 3 if workers.SMALL_BYTES <= 1 else 256
from escm2rec.config import load_config
from escm2rec.preprocess import preprocess
if __name__ == "__main__":
    if sys.argv[4] == "0" and len(sys.argv) == 5:
        workers.ready_workers("escm2rec.preprocess")  # as the command does
    config = load_config(Path(sys.argv[1])).data
    preprocess(config, Path(sys.argv[2]), Path(sys.argv[3]), ray_address=sys.argv[5] if len(sys.argv) > 5 else None)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command up to its output folder: Ali-CCP text, split by user, bad rows counted."""
    folder = tmp_path_factory.mktemp("job")
    for seed in (1, 2):
        simulate(folder / str(seed), IMPRESSIONS // 2, seed, SimulationConfig(users=300, items=400))
    (folder / "logs").mkdir()
    for path in (*(folder / "1").glob("*_00000.csv"), *(folder / "2").glob("*_00000.csv")):
        path.rename(folder / "logs" / path.name.replace("00000", f"0000{path.parent.name}"))
    with (folder / "logs" / "sample_skeleton_00001.csv").open("a") as text:
        text.write("no impression\n")
    config = yaml.safe_load((ROOT / "data" / "aliccp.yaml").read_text())
    config["data"]["source"].pop("truth", None)
    split = {"by": "hash", "column": "common_feature_index", "train": 0.8, "test": 0.2}
    config["data"] |= {"split": split, "bad_rows": "count", "rows_per_file": 1_500, "rows_per_group": 400}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "worker.py").write_text(WORKER)
    return [sys.executable, str(folder / "worker.py"), str(folder / "config.yaml"), str(folder / "logs")]


def start(job: list[str], out: Path, few_bytes: int = 0, address: str | None = None, **variables: str) -> subprocess.Popen[str]:
    """With less than `few_bytes` of input it is one process; with 0 it forks its workers."""
    command = [*job, str(out), str(few_bytes), *([address] if address else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(job: list[str], out: Path, **options: Any) -> None:
    with start(job, out, **options) as process:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said[-3000:]


def content(out: Path) -> dict[str, Any]:
    """Every file by its name: its bytes, of the manifest all but times."""
    files: dict[str, Any] = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return files | {"manifest.json": {**json.loads(files["manifest.json"]), "seconds": 0}}


@pytest.fixture(scope="module")
def undisturbed(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(job, out, few_bytes=1 << 30)
    made = content(out)
    assert made["manifest.json"]["rejected"]["malformed line"]["rows"] == 1
    assert len([name for name in made if name.startswith("train/")]) > 2
    return made


@pytest.mark.parametrize("forked", [True, False])
def test_processes_make_what_one_process_makes(job: list[str], undisturbed: dict[str, Any], tmp_path: Path, forked: bool) -> None:
    """Forked by the command, or started afresh in a program that calls."""
    run(job, tmp_path / "out", few_bytes=0 if forked else 1)
    assert content(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.timeout(240 + 30 * KILLS)
def test_a_killed_job_is_taken_up(job: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 at random moments of one job, again and again, until it ends: the same bytes, nothing beside them, no process left."""
    moments, killed, out = random.Random(0), 0, tmp_path / "out"
    lived: list[float] = []
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    while killed < KILLS:
        process = start(job, out, TMPDIR=str(temporary))
        lived.append(moments.uniform(0.3, 4.0))
        time.sleep(lived[-1])
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=TIMEOUT_S)
        killed += process.returncode == -signal.SIGKILL
        if out.exists():  # it came first, or was killed on its last step: another one
            assert content(out) == undisturbed
            shutil.rmtree(out)
    shutil.rmtree(out, ignore_errors=True)  # made by the last one that was killed
    run(job, out, TMPDIR=str(temporary))
    assert content(out) == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "temporary"]
    assert not list(temporary.iterdir()), "nor is one left among temporary files"
    if PROOF:
        seconds = [round(each, 2) for each in lived]
        record = {"machine": facts(), "kills": killed, "seconds_lived": seconds, "files_compared": len(undisturbed)}
        Path(PROOF).write_text(json.dumps(record, indent=1) + "\n")


def children(pid: int) -> list[int]:
    """Worker processes of a job, as far as they have started: children of its fork server."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    servers = [child for child in found if "forkserver" in Path(f"/proc/{child}/cmdline").read_text()]
    return [int(child) for server in servers for child in Path(f"/proc/{server}/task/{server}/children").read_text().split()]


def test_a_killed_worker_is_told_and_its_job_taken_up(job: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """What the first job spilled and did not tell of, in smaller spills, does not count."""
    process, out = start(job, tmp_path / "out"), tmp_path / "out"
    began = time.monotonic()
    while not (workers := children(process.pid)):
        assert time.monotonic() - began < TIMEOUT_S
        time.sleep(0.02)
    os.kill(workers[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    told = "a worker process was killed, perhaps for its memory\n"
    hint = "if memory ran out give preprocess a smaller --memory-gib, score fewer --processes"
    assert said.endswith(f"{told}hint: the same command goes on where it stopped; {hint}\n")
    work = tmp_path / ".out.partial" / "work"
    for name in ("rows-00000-7.arrow", "times-00000-7.npy"):
        (work / name).write_bytes(b"not told of")
    run(job, out)
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_program_on_stdin_has_workers_too(job: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """It has no file that workers could run once more: they do without, and it needs no guard either."""
    program = WORKER.replace('if __name__ == "__main__":', "if True:")
    command, environment = [job[0], "-", *job[2:], str(tmp_path / "out"), "1"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, input=program, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-3000:]
    assert content(tmp_path / "out") == undisturbed


def test_a_program_without_a_guard_is_told_of_it(job: list[str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WORKER.replace('if __name__ == "__main__":', "if True:"))
    with start([job[0], str(program), *job[2:]], tmp_path / "out", few_bytes=1) as process:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert said.endswith(
        "RunError: a worker process ended before its work was done\n"
        "hint: call preprocess() or score() under `if __name__ == '__main__':`, because every worker runs the program's file once more; if "
        "it does already, memory may have run out: pass a smaller memory_gib, or fewer processes, the same call goes on where it stopped\n"
    )


@pytest.mark.parametrize("few_bytes", [0, 1 << 30])
def test_a_full_disk_is_told_and_the_job_taken_up(job: list[str], undisturbed: dict[str, Any], tmp_path: Path, few_bytes: int) -> None:
    """On processes and in one: the same command again and again, with more room each time."""
    reason = r"(No space left on device|a write was cut short \(\d+ requested and \d+ written\))"
    needs = (
        "in all a job takes some 1.3 to 3.5 times the bytes of text logs there, some 2 to 4 times those of Parquet, 6 where all ids differ"
    )
    limit = r"(, or raise the limit on the size of a file \(ulimit -f\))?"
    with small_disk(tmp_path / "disk", "100k") as disk:
        out, told = disk / "out", 0
        for size in ("100k", "800k", "32m"):
            resize(disk, size)
            with start(job, out, few_bytes) as process:
                said, _ = process.communicate(timeout=TIMEOUT_S)
            if not process.returncode:
                break
            free = r"\d.\d MB of \d.\d MB are free there"
            error = rf"\nescm2rec.errors.RunError: cannot write {disk}/.out.partial(/\S+)?: {reason}; {free}; {needs}\n"
            hint = rf"hint: make room there{limit}, then run the same command again: it goes on where it stopped\n$"
            assert re.search(error + hint, said), said[-3000:]
            told += 1
        assert told == 2
        assert content(out) == undisturbed
        assert [path.name for path in disk.iterdir()] == ["out"]


def test_of_two_jobs_on_one_folder_one_wins(job: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [start(job, out) for _ in range(2)]
    said = [process.communicate(timeout=TIMEOUT_S)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    loser = next(text for text, process in zip(said, both, strict=True) if process.returncode)
    assert f"another job is writing {out}" in loser or f"the output folder {out} exists" in loser
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupted(out: Path, identity: str, found: list[str]) -> None:
    """A job that another one meets, and that is interrupted; `found` is what it finds."""
    with resumable_folder(out, "data set", False, identity) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["job", *found]
        (folder / "work").write_text("done")
        with pytest.raises(ConfigError, match=r"another job is writing .*out\nhint: wait for it") as met:
            resumable_folder(out, "data set", False, identity).__enter__()
        raise KeyboardInterrupt from met.value


def failed(out: Path) -> None:
    with resumable_folder(out, "data set", False, "one"):
        raise ConfigError("no")


def test_a_folder_is_held_by_one_and_taken_up_by_its_own(tmp_path: Path) -> None:
    for identity, found in (("one", []), ("one", ["work"]), ("another", [])):
        with pytest.raises(KeyboardInterrupt):
            interrupted(tmp_path / "out", identity, list(found))
    with pytest.raises(ConfigError, match="no"):
        failed(tmp_path / "out")
    assert not list(tmp_path.iterdir()), "what failed leaves nothing"


def test_a_task_on_ray_gives_errors_as_values() -> None:
    """Ray wraps one that is raised: what is said of it then would not be its own words. Other errors are for Ray."""

    def fail(error: Exception) -> None:
        raise error

    for error in (DataError("this one"), PermissionError(errno.EACCES, "denied", "here")):
        assert _told(fail, error) == (None, error)
    assert _told(len, "abc") == (3, None)
    with pytest.raises(ZeroDivisionError):
        _told(fail, ZeroDivisionError())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of a head without processors, to which a test adds nodes."""
    utils = pytest.importorskip("ray.cluster_utils")
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield made
    finally:
        made.shutdown()


def ray_workers() -> list[int]:
    """Processes of Ray that run a task of preprocess."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if each.read_bytes().startswith(b"ray::_told"):
                found.append(int(each.parent.name))
    return found


def until(there: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Wait for something to be there while the job runs."""
    waited = time.monotonic()
    while not (found := there()):
        assert process.poll() is None, "the job ended before"
        assert time.monotonic() - waited < TIMEOUT_S
        time.sleep(0.01)
    return found


def test_a_worker_and_a_node_lost_on_ray_change_nothing(job: list[str], undisturbed: dict[str, Any], tmp_path: Path, cluster: Any) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    out, work = tmp_path / "out", tmp_path / ".out.partial" / "work"
    process = start(job, out, address=cluster.address)
    pid, *_ = until(lambda: (work / "read-00000.json").exists() and ray_workers(), process)
    os.kill(pid, signal.SIGKILL)
    until(lambda: (work / "read-00003.json").exists(), process)
    assert process.poll() is None
    cluster.remove_node(nodes[1], allow_graceful=False)
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said[-3000:]
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_works_on_ray(job: list[str], tmp_path: Path, cluster: Any) -> None:
    cluster.add_node(num_cpus=1)
    made: list[dict[str, Any]] = []
    for engine in ([], ["--engine", "ray", "--address", cluster.address]):
        out = tmp_path / f"out-{len(made)}"
        command = [sys.executable, "-m", "escm2rec", "preprocess", "--config", job[2], "--input", job[3], "--out", str(out), *engine]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        made.append(content(out))
    assert made[0] == made[1]
    assert "train/part-00000.parquet" in made[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0", "out-1"]
