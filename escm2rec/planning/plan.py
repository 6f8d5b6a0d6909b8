"""`escm2rec plan`: a plan for a cluster that need not be there."""

from __future__ import annotations

from pathlib import Path

from escm2rec.folder import new_folder, write_json, write_manifest
from escm2rec.planning.advice import does_not_fit
from escm2rec.planning.planner import Request, find_plan
from escm2rec.planning.record import Record, record_of


def make_plan(request: Request) -> Record:
    """A plan; RunError where none fits, with what would make one fit."""
    planned = find_plan(request)
    if planned.chosen is None:
        raise does_not_fit(planned)
    return record_of(planned)


def write_plan(record: Record, out: Path, overwrite: bool) -> None:
    """Write `out/plan.json`, which `train --plan` follows, and `out/plan.html`; ConfigError where `out` may not be replaced."""
    from escm2rec.planning.html import write_plans

    with new_folder(out, "plan", overwrite) as folder:
        write_json(folder / "plan.json", record)
        write_plans([record], folder / "plan.html")
        write_manifest(folder, "plan", {"world_size": record["world_size"], "tables": len(record["tables"])})
