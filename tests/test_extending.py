"""The page on adding an objective: its code is taken out, put in place for the test, and does what the page says."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from escm2rec import config
from escm2rec.objectives.objective import Objective
from escm2rec.training.build import build_objective
from tests.objectives_world import close, make_batch, take_step
from tests.test_objectives_reduction import step_over_ranks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILE, TEST = "escm2rec/objectives/estimators/overlap.py", "tests/test_objectives_overlap.py"


def code_of(path: str) -> str:
    """The code that the page has for a file."""
    (code,) = re.findall(rf"^```python\n# {re.escape(path)}\n(.*?)^```$", PAGE, re.S | re.M)
    assert isinstance(code, str)
    return code


def put_in_place(monkeypatch: pytest.MonkeyPatch, path: str, code: str) -> ModuleType:
    """A module of this code, to be imported under its name while the test runs."""
    name = path.removesuffix(".py").replace("/", ".")
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, path, "exec"), module.__dict__)
    return module


def config_with_the_line() -> str:
    """The source of the config with the one line that the page adds."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.S | re.M)
    before, after = ("".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in f" {sign}") for sign in "-+")
    assert len(after.splitlines()) == len(before.splitlines()) + 1, "one line"
    head, place = before.split("\n", 1)
    source = Path(config.__file__).read_text(encoding="utf-8")
    start = source.index(head)
    assert source.count(place, start) >= 1
    at = source.index(place, start)
    return source[:at] + after.split("\n", 1)[1] + source[at + len(place) :]


@pytest.fixture
def overlap(monkeypatch: pytest.MonkeyPatch) -> Objective:
    """The page's objective, from the page's config."""
    assert not (ROOT / FILE).exists()
    put_in_place(monkeypatch, FILE, code_of(FILE))
    longer: Any = put_in_place(monkeypatch, "config_with_the_line.py", config_with_the_line())
    with pytest.raises(ValueError, match="kind"):
        config.ObjectiveConfig.model_validate({"kind": "overlap"})
    return build_objective(longer.ObjectiveConfig.model_validate({"kind": "overlap"}), base_ctr=0.3)


def test_the_file_and_the_line_are_an_objective(overlap: Objective) -> None:
    batch = make_batch()
    a, z, *_ = (logit.detach() for logit in batch.logits())
    weights = batch.weight * batch.click * torch.sigmoid(-a.clamp(min=torch.logit(torch.tensor(overlap.floor)).item()))
    step = take_step(overlap, batch, only="cvr")
    assert close(step.cvr_grad, weights * (torch.sigmoid(z) - batch.conversion) / weights.sum(), tolerance=1e-7)
    assert step.ctr_grad is None
    assert list(take_step(overlap, batch).values) == ["ctr", "cvr", "ctcvr"]
    none = take_step(overlap, batch.with_labels(click=torch.zeros(12)), only="cvr")
    assert none.loss == 0


def test_any_cut_into_ranks_makes_the_same_step(overlap: Objective) -> None:
    batch, whole = make_batch(), torch.arange(12)
    expected_loss, expected_grads = step_over_ranks(overlap, batch, [whole], "cvr")
    for cut in ([3, 9], [1, 0, 11], [5, 4, 3]):
        loss, grads = step_over_ranks(overlap, batch, [rank for rank in torch.split(whole, cut)], "cvr")
        assert close(loss, expected_loss, tolerance=1e-10)
        assert close(grads, expected_grads, tolerance=1e-10)


def test_the_proof_of_the_page_holds(overlap: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    module = put_in_place(monkeypatch, TEST, code_of(TEST))
    proofs: list[Callable[[], None]] = [proof for name, proof in vars(module).items() if name.startswith("test_")]
    assert len(proofs) == 1
    for proof in proofs:
        proof()


def test_what_the_page_names_is_there() -> None:
    assert [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link and not (ROOT / "docs" / link).exists()] == []
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    names = re.findall(r"`(test_\w+|[A-Z_]{4,}|cvr_parts)`", PAGE)
    assert len(names) == 5
    assert [name for name in names if not re.search(rf"^(def )?{name}\b", tests, re.M)] == []
