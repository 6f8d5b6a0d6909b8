"""Calibration on a real funnel: Hillstrom's campaign through preprocess, train and evaluate over several stable-hash splits.

    python -m benchmarks.hillstrom --input FOLDER --splits 5

Prints one JSON object: per split the calibration (predicted over observed) of CTR, CVR of the clicked and CTCVR on the test split with its
95% interval, the means over all splits, and the intervals that do not hold 1. No split is picked. With 15 intervals of 95%, one is
expected outside even for a perfect model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from escm2rec.config import load_config
from escm2rec.evaluation.evaluate import evaluate
from escm2rec.preprocess import preprocess
from escm2rec.training.train import train

CONFIG = Path(__file__).resolve().parents[1] / "data" / "hillstrom.yaml"
SECTIONS = ("ctr", "cvr_clicked", "ctcvr")


def one_split(logs: Path, folder: Path, number: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train and test on split `number`, leaving data set and run in `folder`; the calibration of each section with its interval."""
    config = load_config(CONFIG, [f"data.split.salt=hillstrom-{number}", *overrides])
    preprocess(config.data, logs, folder / "data")
    train(config, folder / "data", folder / "run")
    evaluate(folder / "run", folder / "data", "test")
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    return {
        section: {
            "calibration": round(report[section]["calibration"], 4),
            "interval": [round(end, 4) for end in report[section]["calibration_interval"]],
            "impressions": report[section]["impressions"],
            "positives": report[section]["positives"],
            "auc": round(report[section]["auc"], 4),
        }
        for section in SECTIONS
    }


def over_splits(logs: Path, folder: Path, splits: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """All splits, the mean calibration of each section, and what is outside its interval."""
    found = []
    for number in range(splits):
        place = folder / f"split-{number}"
        place.mkdir()
        found.append(one_split(logs, place, number, overrides))
    means = {section: round(statistics.mean(split[section]["calibration"] for split in found), 4) for section in SECTIONS}
    outside = [
        {"split": number, "section": section, **split[section]}
        for number, split in enumerate(found)
        for section in SECTIONS
        if not split[section]["interval"][0] <= 1 <= split[section]["interval"][1]
    ]
    return {"objective": load_config(CONFIG, overrides).objective.kind, "mean_calibration": means, "outside": outside, "splits": found}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--input", type=Path, required=True, help="folder with hillstrom.csv")
    options.add_argument("--splits", type=int, default=5)
    options.add_argument("--set", action="append", default=[], dest="overrides", help="config override, as a.b=value")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(over_splits(arguments.input, Path(folder), arguments.splits, arguments.overrides), indent=1))


if __name__ == "__main__":
    main()
