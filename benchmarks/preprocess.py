"""Speed of preprocess on simulated Ali-CCP text beside loops over rows in Python, and of four parsers of that text. Prints one JSON object.

    python -m benchmarks.preprocess --impressions 1000000

whole: raw text to data set, with data/aliccp.yaml, each time in processes of their own, whose peak memory together is told; also at a
quarter and at four times the impressions, to see whether memory grows with them. scattered: the same impressions with the lines of each
skeleton file permuted, so that those of a common record lie anywhere, and how many times as long it took. rowwise: a quarter of the
impressions by benchmarks/rowwise.py, which makes the same rows, and how many times as long it took. parse: every feature of every line
to flat columns (line, field, id, value), best of `--repeats`. MB are 10^6 bytes of raw text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks import rowwise
from benchmarks.machine import facts, run_and_watch
from escm2rec.config import SimulationConfig, load_config
from escm2rec.parallel import default_workers, ordered_map
from escm2rec.preprocess.aliccp_text import BLOCK_BYTES, FieldCodes, Lines, Needs, TextBlock, text_blocks
from escm2rec.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
HEADER = {"sample_skeleton": 5, "common_features": 2}
SPLIT = "data.split={by: hash, column: common_feature_index, train: 0.8, validation: 0.1, test: 0.1}"


def parse_with_numpy(path: Path, header: int, fields: list[str]) -> int:
    """The parser of escm2rec: the number of features read."""
    codes, needs = FieldCodes(fields), dict.fromkeys(fields, Needs(ids=True, values=True))

    def task(block: TextBlock) -> Callable[[], int]:
        return lambda: sum(len(column.values) for column in Lines(block, header).fields(codes, needs).values())

    return sum(ordered_map((task(block) for block in text_blocks(path, BLOCK_BYTES)), default_workers()))


def parse_with_polars(path: Path, header: int, fields: list[str]) -> int:
    """The same by polars string operations."""
    lines = pl.read_csv(path, separator="\n", has_header=False, quote_char=None, new_columns=["line"])
    parts = lines["line"].str.splitn(",", header + 1).struct.field(f"field_{header}").str.split("\x01")
    features = pl.DataFrame({"line": range(len(parts)), "feature": parts}).explode("feature")
    split = features.select("line", pl.col("feature").str.replace("\x03", "\x02", literal=True).str.split_exact("\x02", 2).alias("part"))
    flat = split.select(
        "line",
        pl.col("part").struct.field("field_0").cast(pl.Categorical),
        pl.col("part").struct.field("field_1").cast(pl.Int64),
        pl.col("part").struct.field("field_2").cast(pl.Float64),
    )
    return len(flat.filter(pl.col("field_0").cast(pl.String).is_in(fields)))


def parse_with_duckdb(path: Path, header: int, fields: list[str]) -> int:
    """The same by duckdb's SQL."""
    import duckdb

    columns = {f"column{number}": "VARCHAR" for number in range(header + 1)}
    connection = duckdb.connect()
    connection.execute(f"SET threads = {default_workers()}")
    table = connection.sql(
        f"""
        WITH lines AS (
            SELECT row_number() OVER () AS line, string_split(column{header}, chr(1)) AS features
            FROM read_csv('{path}', delim = ',', header = false, quote = '', escape = '', columns = {columns}, auto_detect = false,
                          max_line_size = 10000000)),
        features AS (SELECT line, string_split(replace(unnest(features), chr(3), chr(2)), chr(2)) AS part FROM lines)
        SELECT line, part[1] AS field, part[2]::BIGINT AS id, part[3]::DOUBLE AS value FROM features WHERE part[1] IN {tuple(fields)}
        """
    ).to_arrow_table()
    return int(table.num_rows)


def parse_rate(parser: Callable[[Path, int, list[str]], int], files: list[Path], fields: list[str], repeats: int) -> dict[str, Any]:
    """Best rate of a parser over all files."""
    best, features = float("inf"), 0
    for _ in range(repeats):
        began = time.perf_counter()
        features = sum(parser(file, HEADER[file.name.rsplit("_", 1)[0]], fields) for file in files)
        best = min(best, time.perf_counter() - began)
    size = sum(file.stat().st_size for file in files)
    return {"features": features, "seconds": round(best, 3), "mb_per_s": round(size / best / 1e6, 1)}


def whole_rate(logs: Path, out: Path, repeats: int) -> dict[str, Any]:
    """Rate and peak memory of the whole job, raw text to data set."""
    size = sum(file.stat().st_size for file in logs.glob("*.csv"))
    results = [in_own_process(logs, out) for _ in range(repeats)]
    seconds = statistics.median(result["seconds"] for result in results)
    rows = sum(split["rows"] for split in results[0]["splits"].values())
    written = sum(file.stat().st_size for file in out.rglob("part-*.parquet"))
    return {
        "impressions": rows,
        "raw_mb": round(size / 1e6, 1),
        "seconds": [result["seconds"] for result in results],
        "mb_per_s": round(size / seconds / 1e6, 1),
        "rows_per_s": round(rows / seconds),
        "written_mb": round(written / 1e6, 1),
        "peak_own_mb": [round(result["own_mb"]) for result in results],
        "peak_mapped_mb": [round(result["mapped_mb"]) for result in results],
    }


def scattered_rate(logs: Path, out: Path, repeats: int, whole: dict[str, Any]) -> dict[str, Any]:
    """The whole job on the same logs, each skeleton file's lines permuted in place; and how many times the seconds of `whole` it took."""
    for number, path in enumerate(sorted(logs.glob("sample_skeleton_*.csv"))):
        lines = pl.read_csv(path, separator="\n", has_header=False, quote_char=None, new_columns=["line"])
        lines.sample(fraction=1, shuffle=True, seed=number).write_csv(path, include_header=False, quote_style="never")
    found = whole_rate(logs, out, repeats)
    assert found["impressions"] == whole["impressions"]
    return {**found, "times": round(statistics.median(found["seconds"]) / statistics.median(whole["seconds"]), 2)}


def in_own_process(logs: Path, out: Path) -> dict[str, Any]:
    """What `escm2rec preprocess` prints, and the most memory that it had: its own, and pages of files that it maps."""
    command = [sys.executable, "-m", "escm2rec", "preprocess", "--config", str(ROOT / "data" / "aliccp.yaml"), "--set", SPLIT]
    command += ["--input", str(logs), "--out", str(out), "--overwrite"]
    printed, peaks = run_and_watch(command)
    result: dict[str, Any] = json.loads(printed)
    return {**result, **peaks}


def rowwise_rate(logs: Path, out: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """Loops over rows on the same logs, once; and how many times the seconds of preprocess (`whole`) they took."""
    config = load_config(ROOT / "data" / "aliccp.yaml", ["data.split={by: file, train: '*'}"]).data
    began = time.perf_counter()
    rows = rowwise.run(config, logs, out)
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in logs.glob("*.csv"))
    times = seconds / statistics.median(whole["seconds"])
    return {"impressions": rows, "seconds": round(seconds, 2), "mb_per_s": round(size / seconds / 1e6, 1), "times": round(times, 1)}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--impressions", type=int, default=1_000_000)
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    whole: dict[int, Any] = {}
    parse: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs, out = Path(folder) / "logs", Path(folder) / "out"
        for impressions in (arguments.impressions // 4, arguments.impressions * 4, arguments.impressions):
            simulate(logs, impressions, 1, SimulationConfig(), overwrite=True)
            whole[impressions] = whole_rate(logs, out, arguments.repeats)
            shutil.rmtree(out)
            if impressions < arguments.impressions:
                loops = rowwise_rate(logs, out, whole[impressions])
                shutil.rmtree(out)
        scattered = scattered_rate(logs, out, arguments.repeats, whole[impressions])
        files = sorted(logs.glob("*.csv"))
        fields = sorted({feature.column for feature in load_config(ROOT / "data" / "aliccp.yaml").data.features})
        parsers = {"numpy": parse_with_numpy, "polars": parse_with_polars, "duckdb": parse_with_duckdb, "python": rowwise.parse_with_python}
        for name, parser in parsers.items():
            try:
                parse[name] = parse_rate(parser, files, fields, arguments.repeats)
            except ImportError:
                parse[name] = None
    sizes = [whole[size] for size in sorted(whole)]
    record = {"machine": facts(), "processes": default_workers(), "whole": sizes, "scattered": scattered, "rowwise": loops, "parse": parse}
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
