"""The whole way once, on this machine: simulate, preprocess, train, evaluate and score, by the commands that a person would type.

    python apps/demo.py --out .demo

Three models learn from the same simulated log, whose true CVR is known for every impression, clicked or not. Every command is shown on
stderr; the table at the end compares the models with the truth, from the reports just made.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

APPS = Path(os.path.relpath(Path(__file__).resolve().parent))  # as a person would type it
CONFIG = Path(os.path.normpath(APPS / ".." / "data" / "demo.yaml"))
OBJECTIVES = {"esmm": "ESMM", "escm2-ips": "ESCM2-IPS", "escm2-dr": "ESCM2-DR"}
RANKS = 2
EXPLANATION = """
/ truth: mean prediction over mean true CVR, 1 is right. RMSE and KL: distance from the true CVR, 0 is right. The ids of this log are
sparse: every model shrinks towards the mean, and a propensity that has learned a part of what draws clicks corrects a part.
docs/method.md says what a correction needs; `--set objective.kind=...` tries another."""
# Of the test split's report: where the true CVR of impressions is known.
COLUMNS = (
    ("mean CVR", "cvr_mean_predicted_entire", ".4f"),
    ("/ truth", "cvr_bias_ratio_entire", ".3f"),
    ("mean CVR", "cvr_mean_predicted_unclicked", ".4f"),
    ("/ truth", "cvr_bias_ratio_unclicked", ".3f"),
    ("RMSE", "cvr_rmse_unclicked", ".4f"),
    ("KL", "cvr_kl_unclicked", ".5f"),
    ("CTR", "ctr_auc", ".4f"),
    ("CTCVR", "ctcvr_auc", ".4f"),
)


def main() -> None:
    """Run every verb, then print the table and where things are."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path(".demo"), help="folder for everything that is made; what it holds is replaced")
    options.add_argument("--impressions", type=int, default=1_000_000, help="how many impressions to simulate")
    arguments = options.parse_args()
    out: Path = arguments.out
    began = time.monotonic()
    logs, data, predictions = out / "logs", out / "data", out / "predictions"
    run("simulate", "--config", CONFIG, "--out", logs, "--impressions", arguments.impressions, "--overwrite")
    run("preprocess", "--config", CONFIG, "--input", logs, "--out", data, "--overwrite")
    metrics: dict[str, dict[str, float]] = {}
    for kind in OBJECTIVES:
        folder = out / f"run-{kind}"
        run("train", "--config", CONFIG, "--set", f"objective.kind={kind}", "--data", data, "--out", folder, "--overwrite", ranks=RANKS)
        result = run("evaluate", "--run", folder, "--data", data, "--split", "test", "--user", "101", ranks=RANKS)
        metrics[kind] = result["metrics"]
    scored = run("score", "--run", folder, "--input", logs, "--out", predictions, "--keep", "sample_id", "--overwrite", ranks=RANKS)
    print(table(metrics))
    print(EXPLANATION)
    print(f"\nreports      {', '.join(str(out / f'run-{kind}' / 'report.html') for kind in OBJECTIVES)}")
    print(f"predictions  {predictions} ({scored['rows']:,} rows of {OBJECTIVES[kind]})")
    print(f"done in {time.monotonic() - began:.0f} s")


def run(verb: str, *options: object, ranks: int = 1) -> dict[str, Any]:
    """One verb, on one process or under torchrun; its result. Its failure ends the demo, with the verb's own error on stderr."""
    arguments = [str(APPS / f"{verb}.py"), *map(str, options)]
    torchrun = ["--standalone", "--nproc-per-node", str(ranks), "--"] if ranks > 1 else []
    print(f"\n$ {shlex.join(['torchrun' if ranks > 1 else 'python', *torchrun, *arguments])}", file=sys.stderr, flush=True)
    command = [sys.executable, *(["-m", "torch.distributed.run"] if ranks > 1 else []), *torchrun, *arguments]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": threads}, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def table(metrics: dict[str, dict[str, float]]) -> str:
    """The models beside the truth, on the test split."""
    first = next(iter(metrics.values()))
    impressions, unclicked = int(first["cvr_impressions_entire"]), int(first["cvr_impressions_unclicked"])
    truth = {"cvr_mean_predicted_entire": first["cvr_mean_truth_entire"], "cvr_mean_predicted_unclicked": first["cvr_mean_truth_unclicked"]}
    rows = [("truth", truth), *((OBJECTIVES[kind], found) for kind, found in metrics.items())]
    groups = f"{'':12}{'all ' + format(impressions, ','):^22}{'unclicked ' + format(unclicked, ','):^44}{'AUC':^22}"
    lines = ["\nCVR against the known truth, on the impressions of the test split", "", groups]
    lines.append(f"{'':12}" + "".join(f"{name:>11}" for name, _, _ in COLUMNS))
    for name, found in rows:
        lines.append(f"{name:12}" + "".join(f"{format(found[key], style) if key in found else '':>11}" for _, key, style in COLUMNS))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
