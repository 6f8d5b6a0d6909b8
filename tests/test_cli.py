"""The command line: what it hands to the library, what it prints where, and how it fails."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from escm2rec import cli
from escm2rec.config import Config, SimulationConfig, load_config
from escm2rec.errors import ConfigError, DataError, Escm2Error, InstallationError, RunError
from escm2rec.scoring.options import Layout, Options
from tests.preprocess_logs import write_parquet
from tests.small_disks import resize, small_disk

ROOT = Path(__file__).parents[1]
VERBS = ("simulate", "preprocess", "train", "evaluate", "score", "export")
HEAVY = ("torch", "torchrec", "polars", "pyarrow", "numpy", "pydantic", "matplotlib")
CONFIG = """
data:
  source: {kind: table}
  split: {by: hash, train: 0.8, validation: 0.1, test: 0.1}
  features:
    - {name: user, kind: categorical}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def run(*argv: str) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    return int(left.value.code or 0)


def replace_library(monkeypatch: pytest.MonkeyPatch, module: str, name: str, function: Callable[..., Any]) -> None:
    """Put `function` where a verb imports its library function from."""
    fake = types.ModuleType(module)
    setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module, fake)


def python(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False
    )


# --- help ---------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom escm2rec.cli import main\ntry:\n    main(['--help'])\n"
        f"except SystemExit:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = python("-c", program)
    assert done.stderr.strip() == "[]"
    assert all(f"  {verb} " in done.stdout for verb in (*VERBS, "inspect", "doctor", "config"))


def test_help_is_instant() -> None:
    """By the processor's time, which other work on the machine does not lengthen."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("-m", "escm2rec", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0 < min(seconds) < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_program_of_a_verb_is_its_command(verb: str) -> None:
    program = python(f"apps/{verb}.py", "--help")
    assert (program.returncode, program.stderr) == (0, "")
    assert program.stdout.startswith(f"Usage: escm2rec {verb} ")
    assert program.stdout == python("-m", "escm2rec", verb, "--help").stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == "escm2rec 0.1.0\n"


# --- what a verb hands to the library -----------------------------------------------------------

CALLS: list[tuple[str, str, list[str], Callable[[Config], list[Any]]]] = [
    (
        "simulate",
        "escm2rec.simulate",
        ["--out", "o", "--impressions", "7"],
        lambda _: [Path("o"), 7, 0, SimulationConfig(), "aliccp", False],
    ),
    (
        "simulate",
        "escm2rec.simulate",
        ["--out", "o", "--impressions", "7", "--seed", "3", "--format", "parquet", "--overwrite", "--set", "simulation.ctr=0.5"],
        lambda _: [Path("o"), 7, 3, SimulationConfig(ctr=0.5), "parquet", True],
    ),
    (
        "preprocess",
        "escm2rec.preprocess",
        ["--config", "CONFIG", "--input", "i", "--out", "o"],
        lambda config: [config.data, Path("i"), Path("o"), False, 4.0, None],
    ),
    (
        "train",
        "escm2rec.training.train",
        ["--config", "CONFIG", "--data", "d", "--out", "o", "--resume", "--profile"],
        lambda config: [config, Path("d"), Path("o"), True, False, True, None, None],
    ),
    (
        "train",
        "escm2rec.training.train",
        ["--config", "CONFIG", "--data", "d", "--out", "o", "--warm-start", "r", "--copy-to", "s3://b/r"],
        lambda config: [config, Path("d"), Path("o"), False, False, False, Path("r"), "s3://b/r"],
    ),
    (
        "evaluate",
        "escm2rec.evaluation.evaluate",
        ["--run", "r", "--data", "d"],
        lambda _: [Path("r"), Path("d"), "test", [], None, False],
    ),
    (
        "evaluate",
        "escm2rec.evaluation.evaluate",
        ["--run", "r", "--data", "d", "--split", "validation", "--by", "hour, page", "--by", "city", "--user", "user", "--overwrite"],
        lambda _: [Path("r"), Path("d"), "validation", ["hour", "page", "city"], "user", True],
    ),
    (
        "score",
        "escm2rec.scoring.score",
        ["--run", "r", "--input", "a", "--input", "b", "--out", "o", "--keep", "x,y", "--keep", "z"],
        lambda _: [Path("r"), ["a", "b"], Path("o"), Options(keep=["x", "y", "z"]), False, None],
    ),
    (
        "score",
        "escm2rec.scoring.score",
        ["--run", "r", "--input", "a", "--out", "o", "--overwrite"],
        lambda _: [Path("r"), ["a"], Path("o"), Options(), True, None],
    ),
    (
        "score",
        "escm2rec.scoring.score",
        [
            *("--run", "r", "--input", "s3://b/*.parquet", "--out", "o", "--columns", "user,ctr=p_ctr", "--where", "price > 5"),
            *("--top-k", "3", "--by", "user", "--score", "p_cvr", "--bad-rows", "count", "--on-error", "skip", "--row-group-rows", "9"),
            *("--compression", "none", "--rows-per-file", "7", "--tables", "shared", "--engine", "ray", "--warn-gap", "0.5"),
        ],
        lambda _: [
            Path("r"),
            ["s3://b/*.parquet"],
            Path("o"),
            Options(
                columns=["user", "ctr=p_ctr"],
                where="price > 5",
                top_k=3,
                by="user",
                score="p_cvr",
                bad_rows="count",
                on_error="skip",
                layout=Layout(9, "none", 7),
                tables="shared",
                ray_address="auto",
                warn_gap=0.5,
            ),
            False,
            None,
        ],
    ),
    (
        "score",
        "escm2rec.scoring.score",
        ["--model", "m", "--input", "a", "--out", "o"],
        lambda _: [None, ["a"], Path("o"), Options(), False, Path("m")],
    ),
    (
        "export",
        "escm2rec.serving.export",
        ["--run", "r", "--out", "o"],
        lambda _: [Path("r"), Path("o"), "torch-export", "fp32", None, "test", 100_000, False],
    ),
    (
        "export",
        "escm2rec.serving.export",
        [
            *("--run", "r", "--out", "o", "--format", "aoti", "--weights", "int4", "--data", "d", "--split", "train", "--rows", "9"),
            "--overwrite",
        ],
        lambda _: [Path("r"), Path("o"), "aoti", "int4", Path("d"), "train", 9, True],
    ),
    ("inspect", "escm2rec.inspection.inspect", ["d"], lambda _: [Path("d"), 10, None, False, False]),
    (
        "inspect",
        "escm2rec.inspection.inspect",
        ["d", "--top", "3", "--html", "p", "--overwrite", "--verify"],
        lambda _: [Path("d"), 3, Path("p"), True, True],
    ),
]


@pytest.mark.parametrize(("verb", "module", "options", "expected"), CALLS)
def test_verb_calls_its_library_function(
    verb: str,
    module: str,
    options: list[str],
    expected: Callable[[Config], list[Any]],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[list[Any]] = []

    def library(*args: Any) -> dict[str, Any]:
        calls.append(list(args))
        print("a library that talks on stdout")
        return {"rows": 3, "auc": float("nan"), "out": Path("o")}

    replace_library(monkeypatch, module, verb, library)
    assert run(verb, *[str(config) if option == "CONFIG" else option for option in options]) == 0
    assert calls == [expected(load_config(config))]
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"rows": 3, "auc": None, "out": "o"}
    assert captured.err == "a library that talks on stdout\n"


def test_overrides_reach_the_library(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []

    def library(config: Config, *_: Any) -> dict[str, Any]:
        seen.append(config)
        return {}

    replace_library(monkeypatch, "escm2rec.training.train", "train", library)
    options = ["--config", str(config), "--data", "d", "--out", "o", "--set", "training.epochs=3", "--set", "model.tower_hidden=[8, 4]"]
    assert run("train", *options) == 0
    assert (seen[0].training.epochs, seen[0].model.tower_hidden) == (3, [8, 4])


def test_only_rank_0_prints_the_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_library(monkeypatch, "escm2rec.simulate", "simulate", lambda *_: {"rows": 3})
    for rank, expected in (("0", {"rows": 3}), ("1", None)):
        monkeypatch.setenv("RANK", rank)
        assert run("simulate", "--out", "o", "--impressions", "1") == 0
        printed = capsys.readouterr().out
        assert (json.loads(printed) if printed else None) == expected


# --- config -------------------------------------------------------------------------------------


def test_config_check_prints_the_complete_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "check", str(config), "--set", "training.epochs=2") == 0
    printed = json.loads(capsys.readouterr().out)
    assert Config.model_validate(printed) == load_config(config, ["training.epochs=2"])


def test_config_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "schema") == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == {"data", "model", "objective", "choice", "training", "simulation"}


# --- errors -------------------------------------------------------------------------------------

ERRORS: list[tuple[BaseException, int, str]] = [
    (ConfigError("the key is wrong", "mend the key"), 2, "error: the key is wrong\nhint: mend the key\n"),
    (DataError("the file is wrong"), 2, "error: the file is wrong\n"),
    (InstallationError("the pair is wrong", "mend the pair"), 2, "error: the pair is wrong\nhint: mend the pair\n"),
    (RunError("the loss is not a number", "lower the rate"), 1, "error: the loss is not a number\nhint: lower the rate\n"),
    (ValueError("17"), 1, "error: ValueError: 17\nhint: run the same command with --debug to see where it happened\n"),
    (KeyboardInterrupt(), 130, ""),
]


@pytest.mark.parametrize(("error", "code", "told"), ERRORS, ids=[type(case[0]).__name__ for case in ERRORS])
def test_errors_are_told_without_a_traceback(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def library(*_: Any) -> dict[str, Any]:
        raise error

    replace_library(monkeypatch, "escm2rec.simulate", "simulate", library)
    assert run("simulate", "--out", "o", "--impressions", "1") == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", told)
    if isinstance(error, Exception):
        for position in (["--debug", "simulate"], ["simulate", "--debug"]):
            assert run(*position, "--out", "o", "--impressions", "1") == code
            debugged = capsys.readouterr().err
            assert debugged.startswith("Traceback (most recent call last):")
            assert told.splitlines()[0] in debugged


def test_another_rank_names_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def library(*_: Any) -> dict[str, Any]:
        raise Escm2Error("out of memory")

    replace_library(monkeypatch, "escm2rec.simulate", "simulate", library)
    monkeypatch.setenv("RANK", "3")
    assert run("simulate", "--out", "o", "--impressions", "1") == 1
    assert capsys.readouterr().err == "error (rank 3): out of memory\n"


def test_what_rank_0_told_is_not_told_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = DataError("the file is wrong")
    told.told_by_rank_0 = True
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3458.")
    reset = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:18312: Connection reset by peer. GLHF!")
    lost = "error (rank 1): another rank ended first\nhint: its error is the one to mend\n"
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 600000ms for send operation to complete")
    hangs = f"error (rank 1): another rank did not answer in time: {late}\nhint: it hangs: look at its log, at the disk of its --out and "
    hangs += "its --data, and at the store of --copy-to\n"
    monkeypatch.setenv("RANK", "1")
    for error, code, said in ((told, 2, ""), (closed, 1, lost), (reset, 1, lost), (late, 1, hangs)):

        def library(*_: Any, error: Exception = error) -> dict[str, Any]:
            raise error

        replace_library(monkeypatch, "escm2rec.simulate", "simulate", library)
        assert run("simulate", "--out", "o", "--impressions", "1") == code
        assert capsys.readouterr().err == said


USAGE: list[tuple[list[str], str, str]] = [
    ([], "Missing command", "escm2rec --help"),
    (["evalute"], "evalute", "escm2rec --help"),
    (["train", "--confg", "x"], "--confg", "escm2rec train --help"),
    (["train", "--config", "x"], "--data", "escm2rec train --help"),
    (["simulate", "--out", "o", "--impressions", "0"], "--impressions", "escm2rec simulate --help"),
    (["simulate", "--out", "o", "--impressions", "many"], "--impressions", "escm2rec simulate --help"),
    (["simulate", "--out", "o", "--impressions", "1", "--format", "orc"], "--format", "escm2rec simulate --help"),
    (["evaluate", "--run", "r", "--data", "d", "--split", "dev"], "--split", "escm2rec evaluate --help"),
    (["score", "--run", "r", "--out", "o"], "--input", "escm2rec score --help"),
]


@pytest.mark.parametrize(("argv", "named", "help_command"), USAGE, ids=[" ".join(case[0]) or "nothing" for case in USAGE])
def test_bad_usage_exits_2_and_names_the_help(argv: list[str], named: str, help_command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    captured = capsys.readouterr()
    message, hint = captured.err.strip().rsplit("\n", 1)
    assert captured.out == ""
    assert message.startswith("error: ")
    assert named in message
    assert hint == f"hint: {help_command} shows what it takes"


@pytest.mark.parametrize("argv", [["config", "check", "CONFIG"], ["config", "schema"], ["--version"]])
def test_a_reader_that_leaves_is_no_failure(argv: list[str], config: Path) -> None:
    """`| head`: the pipe is closed before anything is written."""
    command = [sys.executable, "-m", "escm2rec", *[str(config) if word == "CONFIG" else word for word in argv]]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (0, "")


def test_resume_excludes_overwrite(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--config", str(config), "--data", "d", "--out", "o", "--resume", "--overwrite") == 2
    assert capsys.readouterr().err == (
        "error: --resume and --overwrite exclude each other\nhint: --resume goes on with the run in --out, --overwrite drops it\n"
    )


@pytest.mark.parametrize("verb", ["train", "evaluate", "score"])
def test_packages_are_checked_before_torch_is_loaded(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise InstallationError("torchrec is not installed", "install it")

    monkeypatch.setattr("escm2rec.doctor.require_matching_packages", refuse)
    options = {
        "train": ["--config", "absent.yaml", "--data", "d", "--out", "o"],
        "evaluate": ["--run", "r", "--data", "d"],
        "score": ["--run", "r", "--input", "i", "--out", "o"],
    }
    assert run(verb, *options[verb]) == 2
    assert capsys.readouterr().err == "error: torchrec is not installed\nhint: install it\n"


@pytest.mark.timeout(60)
def test_a_cluster_that_nobody_answers_for_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray itself would try for many minutes."""
    pytest.importorskip("ray")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        write_parquet(tmp_path / "logs.parquet", {"c": [1, 2]})
        (tmp_path / "config.yaml").write_text(
            "data: {source: {kind: table}, split: {by: file, train: '*'}, features: [{name: c, kind: categorical}]}"
        )
        options = ["--config", str(tmp_path / "config.yaml"), "--input", str(tmp_path / "logs.parquet"), "--out", str(tmp_path / "out")]
        code = run("preprocess", *options, "--engine", "ray", "--address", address)
    assert code == 2
    said = capsys.readouterr().err
    assert f"error: no Ray cluster answers at '{address}': [Errno 111] Connection refused\nhint: start one with `ray start --head`" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "logs.parquet"]


def test_the_config_of_simulated_tables_reads_all_that_simulate_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, logs, data = ROOT / "data" / "simulated.yaml", tmp_path / "logs", tmp_path / "data"
    small = ["--set", "simulation.users=300", "--set", "simulation.items=400"]
    assert run("simulate", "--config", str(config), "--format", "parquet", "--out", str(logs), "--impressions", "3000", *small) == 0
    simulated = json.loads(capsys.readouterr().out)
    assert run("preprocess", "--config", str(config), "--input", str(logs), "--out", str(data)) == 0
    made = json.loads(capsys.readouterr().out)
    assert sum(split["rows"] for split in made["splits"].values()) == 3_000
    assert all(split["conversions"] for split in made["splits"].values())
    assert sum(split["clicks"] for split in made["splits"].values()) == simulated["clicks"]
    assert simulated["ctr"] == pytest.approx(0.2, abs=0.05)
    checked = load_config(config).data
    read = {name for feature in checked.features for name in (feature.column, feature.weights_column) if name is not None}
    read |= {checked.source.click, checked.source.conversion, "true_propensity", "true_cvr", *checked.keep}  # type: ignore[union-attr]
    assert read == set(pq.read_schema(next(logs.glob("*.parquet"))).names)
    assert {"true_propensity", "true_cvr"} <= set(pq.read_schema(next((data / "test").iterdir())).names)


def test_one_file_is_read_whatever_the_pattern_says(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.csv").write_text("user,click,conversion\nann,1,0\nbob,0,0\n")
    options = ["preprocess", "--config", str(config), "--input", str(tmp_path / "log.csv"), "--out", str(tmp_path / "out")]
    assert run(*options, "--set", "data.source.files=none-*.parquet", "--set", "data.split={by: hash, train: 1.0}") == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["rows"] == 2
    assert "Folder with the raw logs, or one file" in " ".join(python("-m", "escm2rec", "preprocess", "--help").stdout.split())


def test_an_address_without_ray_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(__file__).parents[1] / "data" / "aliexpress.yaml")
    code = run("preprocess", "--config", config, "--input", "i", "--out", "o", "--address", "a:1")
    assert code == 2
    assert "error: --address is of a Ray cluster\nhint: add --engine ray" in capsys.readouterr().err


def test_a_full_disk_ends_the_command_and_says_what_to_do(tmp_path: Path) -> None:
    """Here of a lookup of 16 MB, which has a slot for every id up to the greatest: written in place, it would end the process by SIGBUS."""
    write_parquet(tmp_path / "log.parquet", {"c": [0, 4_000_000], "click": [0, 1]})
    config = {"source": {"kind": "table"}, "features": [{"name": "c", "kind": "categorical"}], "split": {"by": "file", "train": "*"}}
    (tmp_path / "config.json").write_text(json.dumps({"data": config}))
    with small_disk(tmp_path / "disk", "8m") as disk:
        command = ["preprocess", "--config", f"{tmp_path}/config.json", "--input", f"{tmp_path}/log.parquet", "--out", f"{disk}/out"]
        done = python("-m", "escm2rec", *command)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(
            rf"error: cannot write {disk}/.out.partial/work: a write was cut short \(\d+ requested and \d+ written\); "
            r"0.0 MB of 8.4 MB are free there; "
            "in all a job takes some 1.3 to 3.5 times the bytes of text logs there, "
            "some 2 to 4 times those of Parquet, 6 where all ids differ\n"
            r"hint: make room there, or raise the limit on the size of a file \(ulimit -f\), "
            "then run the same command again: it goes on where it stopped\n",
            done.stderr,
        )
        resize(disk, "64m")
        assert json.loads(python("-m", "escm2rec", *command).stdout)["splits"]["train"] == {"rows": 2, "clicks": 1, "conversions": 0}
