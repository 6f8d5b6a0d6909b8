"""Raw logs to a data set: read, fit, encode, write, each step as tasks that can run anywhere and be taken up again."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from escm2rec import __version__
from escm2rec.config import SPLITS, AliccpSource, DataConfig, EventsSource, TableSource
from escm2rec.engine import Engine, HereEngine, local_engine, ray_engine
from escm2rec.errors import DataError
from escm2rec.folder import MANIFEST, layout_of, refuse_overlap, resumable_folder, write_manifest
from escm2rec.preprocess import doubts
from escm2rec.preprocess.aliccp import check_truth
from escm2rec.preprocess.block import Request
from escm2rec.preprocess.events import join_events
from escm2rec.preprocess.files import RawFile, named, pattern_of, raw_files
from escm2rec.preprocess.fit import add_times, fit
from escm2rec.preprocess.merge import index_rows, merge, merges
from escm2rec.preprocess.portions import (
    LEAST_BYTES,
    PORTION_BYTES,
    TURN,
    Range,
    count_lines,
    other_ranges,
    portion_bytes,
    portions_of,
    text_cuts,
    text_ranges,
)
from escm2rec.preprocess.read import check_kept_type, check_type, index_common, read, read_common
from escm2rec.preprocess.rejections import NO_SPLIT, Rejected
from escm2rec.preprocess.shares import Shares
from escm2rec.preprocess.splits import Seen, asked_splits, refuse_doubled_files, split_column
from escm2rec.preprocess.steps import WORK, WORK_LAYOUT, Job, once
from escm2rec.preprocess.write import COUNTS, Part, encode_common, parts_of, write
from escm2rec.progress import Progress
from escm2rec.schema import Feature, Schema
from escm2rec.workers import is_small

logger = logging.getLogger(__name__)
DEFAULT_MEMORY_GIB = 4.0
BUCKET_ROWS = 1 << 17
BUCKET_BYTES = 64 << 20  # of input


def preprocess(
    config: DataConfig,
    input: Path,
    out: Path,
    overwrite: bool = False,
    memory_gib: float = DEFAULT_MEMORY_GIB,
    ray_address: str | None = None,
) -> dict[str, Any]:
    """Make a data set folder `out` from the raw logs at `input` (a folder, or one file), and return what is in it.

    The folder holds `schema.json`, `manifest.json`, `vocabulary/<feature>.parquet` (value, count, row) and the Parquet parts of `train/`,
    `validation/` and `test/`; it is complete or absent. Everything that is fitted is fitted on the training split. The rows of each split
    come in the order of a stable hash of their place, those of one Ali-CCP common record together. The same input and config give the same
    bytes, with any memory and engine.

    A job that was killed is taken up by the same call where it stopped. Of two at once on one folder the second is a ConfigError.

    Work is done by a process a core, or by the Ray cluster at `ray_address`, to which input and `out` must be the same paths. What is
    counted, sorted and looked up takes `memory_gib` at most, beside some 300 MB a process, and lies on disk beyond; Ali-CCP's common
    records take 40 bytes each of the largest file.

    With `negative_keep_rate` below 1 every split has weights: those of `keep_negatives` in training; validation and test stay whole, so
    that what is measured there is of impressions as they come, without the variance of weights, and can be ranked.

    Returns out, schema_hash, rows, clicks and conversions by split, rejected rows by reason, negatives left out, what the join of an event
    log counted, and seconds.
    Raises DataError for bad input, ConfigError when `out` exists and may not be overwritten.
    """
    began = time.monotonic()
    refuse_overlap(out, [input])
    files = raw_files(config.source, input)
    refuse_doubled_files(config.split, files)
    made_from = _identity(config, files)
    with resumable_folder(out, "data set", overwrite, made_from) as folder:
        if not (folder / MANIFEST).is_file():
            with _engine(files, ray_address) as engine:
                manifest = _Maker(config, files, folder, memory_gib, engine).make()
            manifest |= {"made_from": made_from, "seconds": round(time.monotonic() - began, 2)}
            write_manifest(folder, "data set", manifest)
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return {
        "out": str(out),
        "schema_hash": manifest["schema_hash"],
        "splits": {
            split: {name: counts[name] for name in ("rows", "clicks", "conversions")} for split, counts in manifest["splits"].items()
        },
        "rejected": {reason: entry["rows"] for reason, entry in manifest["rejected"].items()},
        "conversion_without_click": manifest["conversion_without_click"]["rows"],
        "negatives_left_out": manifest["negatives_left_out"],
        **({"events": manifest["events"]} if "events" in manifest else {}),
        "seconds": manifest["seconds"],
    }


def _identity(config: DataConfig, files: list[RawFile]) -> str:
    """SHA-256 of all that a data set is made from: the versions, the config, and names, sizes and times of the files."""
    told = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for file in files for path in file.all_paths]
    made_from = [__version__, WORK_LAYOUT, layout_of("data set"), PORTION_BYTES, LEAST_BYTES, TURN, config.model_dump(mode="json"), told]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _engine(files: list[RawFile], ray_address: str | None) -> AbstractContextManager[Engine]:
    if ray_address is not None:
        return ray_engine(ray_address)
    paths = dict.fromkeys(path for file in files for path in file.all_paths)
    return nullcontext(HereEngine()) if is_small(paths) else local_engine()


class _Maker:
    """Makes one data set in an unfinished folder, step by step."""

    def __init__(self, config: DataConfig, files: list[RawFile], folder: Path, memory_gib: float, engine: Engine) -> None:
        self._config, self._files, self._folder, self._engine = config, files, folder, engine
        self._rejected = Rejected(refuse=False)  # a task refuses by itself
        self._seen = Seen()
        (folder / WORK).mkdir(exist_ok=True)
        for name in ("vocabulary", *SPLITS):
            (folder / name).mkdir(exist_ok=True)
        self._events = self._join_events(round(memory_gib * 2**30))
        self._job = self._plan(round(memory_gib * 2**30 / engine.workers))

    def make(self) -> dict[str, Any]:
        """All steps; the content of the manifest."""
        self._read_common()
        told = self._read()
        schema = self._fit(told)
        if isinstance(self._config.source, AliccpSource):
            self._run("encode", encode_common, range(len(schema.features)), "features")
        shares = Shares(schema)
        splits: dict[str, dict[str, Any]] = {split: {**dict.fromkeys(COUNTS, 0), "files": []} for split in SPLITS}
        for part, file in self._write(self._sort()):
            weights, held = file.pop("weights"), file.pop("held")
            shares.add(part.split, file["rows"], held)
            _add_file(splits[part.split], file, weights)
        for split in asked_splits(self._config.split):
            if not splits[split]["rows"] and splits["train"]["rows"]:
                logger.warning("data.split asks for a %s split, and no usable row belongs to it", split)
        if not splits["train"]["rows"]:
            raise DataError("no row belongs to the training split", "check data.split and data.conversion_without_click")
        _warn(self._doubts(told))
        kept = {name for each in told for name in each["kept_types"]}
        _warn(doubts.of_splits(splits))
        _warn(doubts.of_features(self._config.features, schema.features, shares.by_feature(), splits["train"]["rows"]))
        _warn(doubts.of_kept(self._config.keep, kept))
        return self._manifest(schema.hash(), splits, shares, told)

    def _join_events(self, memory_bytes: int) -> dict[str, Any] | None:
        """Join an event log, once: its files have their outcomes from here on. What the manifest says of it; None of other sources."""
        if not isinstance(self._config.source, EventsSource):
            return None
        work = self._folder / WORK

        def make(folder: Path) -> dict[str, Any]:
            rejected = Rejected(self._config.bad_rows == "refuse")
            counts = join_events(self._config.source, self._files, folder, memory_bytes, rejected)[1]
            return {"counts": counts, "rejected": rejected.reasons}

        told = once(work, "join", make)
        self._rejected.merge(told["rejected"])
        self._files = [replace(file, outcomes=work / f"{file.name}.outcomes") for file in self._files]
        counts: dict[str, Any] = told["counts"]
        return counts

    # --- plan ---------------------------------------------------------------------------------------

    def _plan(self, memory_bytes: int) -> Job:
        """What is read in which portions. Texts are cut at newlines, which are counted, so that each row is told by its number."""
        config, files = self._config, self._files
        limit = portion_bytes(files)
        common: list[Range] = []
        if isinstance(config.source, AliccpSource):
            ranges = self._text_ranges([(file, file.path) for file in files], limit)
            common = self._text_ranges([(file, file.common) for file in files if file.common is not None], limit)
            for file in files:
                if file.truth is not None:
                    check_truth(file, sum(each.rows for each in ranges if each.file == file))
        else:
            texts = {file for file in files if isinstance(config.source, TableSource) and file.path.suffix == ".csv"}
            cut = self._text_ranges([(file, file.path) for file in files if file in texts], limit)
            others = [each for file in files if file not in texts for each in other_ranges(config.source, file, limit)]
            place = {file: number for number, file in enumerate(files)}
            ranges = sorted([*cut, *others], key=lambda each: place[each.file])
        rows, size = sum(each.rows for each in ranges), sum(each.bytes for each in ranges)
        buckets = max(1, -(-rows // min(BUCKET_ROWS, config.rows_per_file)), -(-size // BUCKET_BYTES))
        self._total = rows
        column = split_column(config.split)
        extras = dict.fromkeys([*config.keep, *([column] if column is not None else [])])
        request = Request.of((Feature.of(feature) for feature in config.features), extras)
        portions = tuple(portions_of(ranges, limit))
        return Job(config, request, self._folder, memory_bytes, tuple(files), tuple(portions_of(common, limit)), portions, buckets)

    def _text_ranges(self, texts: list[tuple[RawFile, Path]], limit: int) -> list[Range]:
        cuts = [text_cuts(path, limit) for _, path in texts]
        every = [(path, *cut) for (_, path), of_file in zip(texts, cuts, strict=True) for cut in of_file]
        lines = iter(list(self._engine.map(count_lines, every)))
        return list(chain.from_iterable(text_ranges(file, of_file, lines) for (file, _), of_file in zip(texts, cuts, strict=True)))

    # --- steps --------------------------------------------------------------------------------------

    def _run(self, name: str, step: Callable[[Job, int], dict[str, Any]], numbers: Sequence[int], unit: str) -> Iterator[dict[str, Any]]:
        with Progress(name, len(numbers), unit=unit) as progress:
            results = []
            for result in self._engine.map(partial(step, self._job), numbers):
                results.append(result)
                progress.add(1)
        return iter(results)

    def _read_common(self) -> None:
        if self._job.common:
            for told in self._run("read common records", read_common, range(len(self._job.common)), "portions"):
                self._rejected.merge(told["rejected"])
            for told in self._run("index common records", index_common, range(len(self._files)), "files"):
                self._rejected.merge(told["rejected"])

    def _read(self) -> list[dict[str, Any]]:
        """Read every portion; what each told, types checked."""
        results: list[dict[str, Any]] = []
        types: dict[str, dict[str, str]] = {}
        kept: dict[str, dict[str, str]] = {}
        with Progress("read", self._total) as progress:
            for portion, told in zip(
                self._job.portions, self._engine.map(partial(read, self._job), range(len(self._job.portions))), strict=True
            ):
                self._rejected.merge(told["rejected"])
                for name, found in told["types"].items():
                    check_type(name, found, types)
                for name, found in told["kept_types"].items():
                    check_kept_type(name, found, kept)
                results.append(told)
                progress.add(sum(each.rows for each in portion), portion[0].file.name)
        self._seen = Seen.of_all(told["seen"] for told in results)
        self._seen.refuse_what_cannot_be_compared()
        return results

    def _sort(self) -> list[Part]:
        """Merge what was spilled, if it is in many files; the parts to write."""
        index_rows(self._job)
        if merges(self._job):
            self._run("merge", merge, merges(self._job), "merges")
        return parts_of(self._job)

    def _write(self, parts: list[Part]) -> list[tuple[Part, dict[str, Any]]]:
        """Write all parts, the largest first; what each told, in their order."""
        largest_first = sorted(parts, key=lambda part: part.first - part.last)
        told: dict[Part, dict[str, Any]] = {}
        with Progress("write", sum(part.last - part.first for part in parts)) as progress:
            for part, file in zip(largest_first, self._engine.map(partial(write, self._job), largest_first), strict=True):
                told[part] = file
                progress.add(file["rows"], file["path"])
        return [(part, told[part]) for part in parts]

    def _fit(self, told: list[dict[str, Any]]) -> Schema:
        """Fit every feature; the schema, written."""
        config, source = self._config, self._config.source
        if not sum(each["training_rows"] for each in told):
            _warn(self._doubts(told))
            raise self._no_training_rows(told)
        if isinstance(source, AliccpSource):
            add_times(self._job)
        order = self._largest_first(told)
        fitted = dict(zip(order, self._run("fit", fit, order, "features"), strict=True))
        features = tuple(Feature(**{**dict(Feature.of(feature)), **fitted[number]}) for number, feature in enumerate(config.features))
        for feature in features:
            vocabulary = self._job.work / f"{feature.name}.parquet"
            if feature.encoding == "vocabulary":
                shutil.copyfile(vocabulary, self._folder / "vocabulary" / vocabulary.name)
        has_weight = config.negative_keep_rate < 1
        has_truth = isinstance(source, AliccpSource) and source.truth is not None
        if isinstance(source, TableSource):
            has_truth = None not in (source.true_propensity, source.true_cvr)
        if isinstance(source, TableSource | EventsSource):
            has_weight = has_weight or source.weight is not None
        schema = Schema(source=source, features=features, keep=tuple(config.keep), has_weight=has_weight, has_truth=has_truth)
        schema.save(self._folder / "schema.json")
        return schema

    def _largest_first(self, told: list[dict[str, Any]]) -> list[int]:
        """Features by the bytes of their counts, so that no process is left with the largest alone."""
        runs = {feature.name: [run for each in told for run in each["runs"].get(feature.name, [])] for feature in self._config.features}
        sizes = [sum((self._job.work / run).stat().st_size for run in each) for each in runs.values()]
        return sorted(range(len(sizes)), key=lambda number: -sizes[number])

    def _no_training_rows(self, told: list[dict[str, Any]]) -> DataError:
        """What there was instead."""
        nothing = "no row belongs to the training split"
        others, negatives = (sum(each[name] for each in told) for name in ("rows", "negatives_left_out"))
        left_out = {reason: entry["rows"] for reason, entry in self._rejected.reasons.items()}
        left_out |= {"data.negative_keep_rate": negatives} if negatives else {}
        if not others and not left_out:
            key, pattern = pattern_of(self._config.source)
            files = named([str(file.path) for file in self._files])
            hint = f"was the export cut off? or are rows in files of other names? data.source.{key} is {pattern!r}"
            return DataError(f"{nothing}: there is none in {files}", hint)
        counts = ", ".join(f"{rows:,} for {reason}" for reason, rows in left_out.items()) or "none"
        seen = self._seen.told(self._config.split)
        return DataError(
            f"{nothing}: {others:,} belong to other splits; left out: {counts}{'; ' if seen else ''}{seen}",
            "check data.split, and the rows that are left out",
        )

    def _doubts(self, told: list[dict[str, Any]]) -> Iterator[str]:
        """What a person should look at, of what was read."""
        without_split = self._rejected.reasons.get(NO_SPLIT.name, {"rows": 0})["rows"]
        rows = without_split + sum(each["rows"] + each["negatives_left_out"] for each in told)
        yield from doubts.of_rows_without_split(self._config.split, self._seen, without_split, rows)
        if isinstance(self._config.source, EventsSource) and self._events is not None:
            yield from doubts.of_events(self._config.source, self._events)

    def _manifest(self, schema_hash: str, splits: dict[str, dict[str, Any]], shares: Shares, told: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = dict.fromkeys(path for file in self._files for path in file.all_paths)
        config = self._config
        return {
            "schema_hash": schema_hash,
            "splits": splits,
            "negative_keep_rate": config.negative_keep_rate,
            "negatives_left_out": sum(each["negatives_left_out"] for each in told),
            "input": [{"path": str(path), "bytes": path.stat().st_size} for path in inputs],
            "rejected": self._rejected.reasons,
            "conversion_without_click": {"rule": config.conversion_without_click, "rows": sum(each["without_click"] for each in told)},
            "features": shares.by_feature(),
            **({} if self._events is None else {"events": self._events}),
        }


def _warn(told: Iterable[str]) -> None:
    for doubt in told:
        logger.warning("%s", doubt)


def _add_file(split: dict[str, Any], file: dict[str, Any], weights: dict[str, float] | None) -> None:
    """Add a part to what the manifest says of its split."""
    split["files"].append(file)
    for name in COUNTS:
        split[name] += file[name]
    if weights is not None:
        known = split.setdefault("weights", dict.fromkeys(COUNTS, 0.0))
        for name in COUNTS:
            known[name] += weights[name]
