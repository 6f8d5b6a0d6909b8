"""One training of two ranks, hit again and again, that nobody starts again but torchrun and a scheduler: it ends as if undisturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch.distributed.checkpoint import FileSystemReader

from benchmarks.machine import facts
from escm2rec.folder import MANIFEST, sha256_of
from escm2rec.training.run import last_record
from tests.encoded import config, write_dataset
from tests.small_disks import small_disk

ROOT = Path(__file__).resolve().parents[1]
FAULTS = int(os.environ.get("ESCM2REC_SOAK", "4"))  # of each kind in turn, and "damaged checkpoint" kills ranks too; `make prove`: 30
PROOF = os.environ.get("ESCM2REC_SOAK_PROOF")  # where to write what was shown
RANKS, ROWS, BATCH = 2, 20 * 256 - 37, 256
STEPS_AN_EPOCH = 20
EPOCHS = FAULTS + 2  # a fault comes some 20 steps after the one before at the most, of which some are trained again
PAUSE_S = 0.1  # a step, so that few are done while a fault is on its way
PATIENCE_S = 300  # for a start and a few steps on a busy machine


@dataclass(frozen=True)
class Start:
    """What one start of the training did: the step it went on from, and what each rank trained in each step after it."""

    token: str
    began: float
    first_step: int
    rows: dict[int, tuple[str, ...]]


def starts(folder: Path) -> list[Start]:
    """What `recording_train` wrote down, in order; steps that all ranks did."""
    found = []
    for token in {path.name.rpartition("-")[0] for path in folder.iterdir()}:
        files = [path.read_text().splitlines() for path in sorted(folder.glob(f"{token}-*"))]
        if len(files) == RANKS and all(files):
            (began, first_step), *_ = (json.loads(lines[0]) for lines in files)
            ranks = [dict(json.loads(line) for line in lines[1:] if line.endswith("]")) for lines in files]
            rows = {step: tuple(rank[step] for rank in ranks) for step in ranks[0] if all(step in rank for rank in ranks)}
            found.append(Start(token, began, first_step, rows))
    return sorted(found, key=lambda start: start.began)


def history(folder: Path) -> dict[int, tuple[str, ...]]:
    """What the final model was trained on, step by step: of each start the steps up to the one that the next went on from."""
    kept: dict[int, tuple[str, ...]] = {}
    for start in starts(folder):
        kept = {step: rows for step, rows in kept.items() if step <= start.first_step}
        assert len(kept) == start.first_step, "it goes on from steps that were trained"
        kept |= start.rows
    return kept


def ids_of_rows(data: Path) -> dict[bytes, int]:
    """The number of each row of the training split, by its numbers."""
    table = pq.read_table(data / "train", columns=["price", "age", "kept.row_id"])
    numbers = np.column_stack([table["price"].to_numpy(), table["age"].to_numpy()])
    ids = {row.tobytes(): int(number) for row, number in zip(numbers, table["kept.row_id"].to_numpy(), strict=True)}
    assert len(ids) == ROWS, "no two rows have the same numbers"
    return ids


class Job:
    """One training in a folder, and the scheduler that starts it again whenever it has ended unfinished."""

    def __init__(self, data: Path, out: Path, folder: Path, pause_s: float) -> None:
        self.out, self.folder, self.rows = out, folder, folder / "rows"
        self.rows.mkdir(parents=True)
        settings = config("training.checkpoint_every_steps=8", f"training.epochs={EPOCHS}")
        (folder / "config.json").write_text(settings.model_dump_json())
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=1", "--monitor-interval=0.2"]
        program = ["-m", "tests.recording_train", str(self.rows), str(pause_s)]
        options = ["--config", str(folder / "config.json"), "--data", str(data), "--out", str(out), "--resume"]
        self._command = [sys.executable, *start, *program, *options]
        self.orphans: list[int] = []
        self.launches = 0
        self.agent = self._launch()

    def _launch(self) -> subprocess.Popen[bytes]:
        self.launches += 1
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self._log().open("wb") as log:
            return subprocess.Popen(self._command, env=environment, stdout=log, stderr=log)

    def _log(self) -> Path:
        return self.folder / f"log-{self.launches}"

    def said(self) -> str:
        """What the latest launch said."""
        return self._log().read_text()

    def until(self, what: Callable[[], bool]) -> None:
        """Wait until it is so, and start the training whenever it is not there."""
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline, self.said()[-4000:]
            assert not (self.out / MANIFEST).exists(), "the training was over before its last fault"
            if self.agent.poll() is not None:
                self.agent = self._launch()
            time.sleep(0.02)

    def until_trained(self, records: int, but: str = "") -> tuple[str, int]:
        """Wait until a start (`but` not this one) has left so many records; its token, and the step it went on from."""
        token, first_step = "", 0

        def has_trained() -> bool:
            nonlocal token, first_step
            with suppress(OSError, IndexError):  # where a start has not come so far
                token = json.loads((self.out / ".owner").read_text())["token"]
                told = (self.rows / f"{token}-0").read_text().splitlines()
                first_step = json.loads(told[0])[1]
                return token != but and len(told) > records and last_record(self.out).get("step", 0) >= first_step + records
            return False

        self.until(has_trained)
        return token, first_step

    def finish(self) -> None:
        """Let it train to its end."""
        while self.agent.wait(PATIENCE_S + EPOCHS * STEPS_AN_EPOCH):
            assert not (self.out / MANIFEST).exists(), self.said()[-4000:]
            self.agent = self._launch()

    def ranks(self) -> dict[int, int]:
        """The processes of the ranks that the agent started."""
        found = {}
        for pid in map(int, Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()):
            told = dict(each.partition("=")[::2] for each in Path(f"/proc/{pid}/environ").read_text().split("\0"))
            found[int(told["RANK"])] = pid
        assert sorted(found) == list(range(RANKS))
        return found

    def checkpoints(self) -> list[int]:
        """The steps of the complete checkpoints."""
        return sorted(int(path.parent.name.removeprefix("step-")) for path in self.out.glob("checkpoints/step-*/manifest.json"))


def kill_rank(job: Job, chance: random.Random) -> None:
    """kill -9 of one: torchrun starts both again, or is itself started again when it has done so before."""
    os.kill(job.ranks()[chance.randrange(RANKS)], signal.SIGKILL)


def kill_agent(job: Job, chance: random.Random) -> None:
    """kill -9 of torchrun: its ranks train on until they meet that another start has the run."""
    job.orphans += job.ranks().values()
    job.agent.kill()
    job.agent.wait()


def terminate(job: Job, chance: random.Random) -> None:
    """What a scheduler sends before it takes a node: all ranks save the step that they are at, and end."""
    job.agent.terminate()
    job.agent.wait(PATIENCE_S)
    assert "stopped by SIGTERM after step" in job.said()


def fill_disk(job: Job, chance: random.Random) -> None:
    """Until the training has ended, whatever it frees."""
    filler = job.out.with_name("filler")
    with filler.open("wb", buffering=0) as file:
        while job.agent.poll() is None:
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
            time.sleep(0.02)
    filler.unlink()


def damage_checkpoint(job: Job, chance: random.Random) -> int:
    """Change, cut or remove a file of the newest one of at least two, and kill the ranks before they write another; its step."""
    job.until(lambda: len(job.checkpoints()) >= 2)  # with one alone it would take a person
    ranks = job.ranks().values()
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    newest = job.out / "checkpoints" / f"step-{job.checkpoints()[-1]}"
    path = newest / chance.choice(sorted(json.loads((newest / MANIFEST).read_text())["files"]))
    whole, place = path.read_bytes(), chance.randrange(path.stat().st_size)
    damaged = chance.choice([whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], whole[:place], None])
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    return int(newest.name.removeprefix("step-"))


HITS: dict[str, Callable[[Job, random.Random], int | None]] = {
    "newest checkpoint damaged": damage_checkpoint,
    "kill -9 of torchrun": kill_agent,
    "SIGTERM": terminate,
    "full disk": fill_disk,
    "kill -9 of a rank": kill_rank,
}


def hit(job: Job, kind: str, chance: random.Random) -> None:
    """One fault, some records and a moment after a start; the next start goes on from the last good checkpoint."""
    token, _ = job.until_trained(chance.randint(1, 10))
    time.sleep(chance.uniform(0, 3 * PAUSE_S))  # into a step, or the writing of a checkpoint
    damaged = HITS[kind](job, chance)
    saved = max((step for step in job.checkpoints() if step != damaged), default=0)
    _, first_step = job.until_trained(1, but=token)
    assert first_step >= saved, kind
    if damaged is not None:
        assert first_step == saved < damaged
        assert f"step-{damaged} is damaged and passed over" in job.said()
    job.until(lambda: not any(map(lives, job.orphans)))


def lives(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextmanager
def ending(job: Job) -> Iterator[Job]:
    """Leave no process behind."""
    try:
        yield job
    finally:
        job.agent.terminate()
        job.agent.wait(60)
        for pid in filter(lives, job.orphans):
            os.kill(pid, signal.SIGKILL)


def content(run: Path) -> dict[str, Any]:
    """What training has made: the last checkpoint by the SHA-256 of its files and by its index, and all losses."""
    checkpoint = run / "checkpoints" / f"step-{EPOCHS * STEPS_AN_EPOCH}"
    index = FileSystemReader(checkpoint).read_metadata()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "files": {path.name: sha256_of(path) for path in checkpoint.glob("*.distcp")},
        "index": (index.state_dict_metadata, index.storage_data),
        "losses": [{name: each[name] for name in each if name == "step" or name.startswith("loss_")} for each in records],
    }


@pytest.mark.timeout(PATIENCE_S * (FAULTS + 2))
def test_a_training_that_is_hit_again_and_again_ends_as_if_undisturbed(tmp_path: Path) -> None:
    """The same model and losses, and each row once an epoch in what the model was made of."""
    data = write_dataset(tmp_path / "data", {"train": ROWS})
    chance, began, steps = random.Random(0), time.monotonic(), EPOCHS * STEPS_AN_EPOCH
    kinds = [list(HITS)[number % len(HITS)] for number in range(FAULTS)]
    chance.shuffle(kinds)
    with ending(Job(data, tmp_path / "run", tmp_path / "undisturbed", 0.0)) as undisturbed:
        undisturbed.finish()
    with small_disk(tmp_path / "disk", "16m") as disk, ending(Job(data, disk / "run", tmp_path / "disturbed", PAUSE_S)) as job:
        for kind in kinds:
            hit(job, kind, chance)
        job.finish()
        assert content(job.out) == content(undisturbed.out)
        assert len(content(job.out)["files"]) == RANKS
        assert [record["step"] for record in content(job.out)["losses"]] == list(range(1, steps + 1))
        assert sorted(path.name for path in job.out.iterdir()) == sorted(path.name for path in undisturbed.out.iterdir())
    made = starts(job.rows)
    assert len(made) == 1 + FAULTS, "no fault took more than one start that trains"
    trained, ids = history(job.rows), ids_of_rows(data)
    assert trained == history(undisturbed.rows)
    assert sorted(trained) == list(range(1, steps + 1))
    for epoch in range(EPOCHS):
        rows = [bytes.fromhex(row) for step in range(epoch * STEPS_AN_EPOCH, (epoch + 1) * STEPS_AN_EPOCH) for row in trained[step + 1]]
        numbers = [ids[each[start : start + 8]] for each in rows for start in range(0, len(each), 8)]
        assert sorted(numbers) == list(range(ROWS)), f"each row once in epoch {epoch}"
    if PROOF:
        record = {
            "machine": facts(),
            "faults": dict(Counter(kinds)),
            "ranks": RANKS,
            "launches": job.launches,
            "starts": len(made),
            "epochs": EPOCHS,
            "rows_an_epoch": ROWS,
            "steps": steps,
            "steps_done": sum(len(start.rows) for start in made),
            "seconds": round(time.monotonic() - began),
            "equal": True,
        }
        Path(PROOF).write_text(json.dumps(record, indent=1) + "\n")
