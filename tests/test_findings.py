"""Several kinds of problems in one report."""

from __future__ import annotations

import pytest

from hf_finetune.errors import DataError, Findings, ModelError, OutOfMemoryError, Problem, RecipeError


def test_the_lowest_exit_code_wins_and_every_problem_is_raised() -> None:
    findings = Findings()
    findings.add(ModelError(Problem("no weights", key="model.name")))
    findings.add(DataError([Problem("row 1", file="a.csv"), Problem("row 2", file="a.csv")]))
    assert findings.exit_code == 3
    with pytest.raises(DataError) as caught:
        findings.raise_errors()
    assert [p.message for p in caught.value.problems] == ["row 1", "row 2", "no weights"]


def test_collecting_keeps_what_a_check_raises_and_nothing_else() -> None:
    findings = Findings()
    with findings.collect():
        raise RecipeError("wrong")
    assert [finding.level for finding in findings] == ["error"]
    with pytest.raises(OutOfMemoryError), findings.collect():
        raise OutOfMemoryError("full")


def test_the_same_problem_is_told_once() -> None:
    findings, others = Findings(), Findings()
    findings.add(RecipeError(Problem("wrong", key="a")))
    others.add(RecipeError(Problem("wrong", key="a")))
    findings.merge(others)
    assert len(list(findings)) == 1


def test_warnings_stop_nothing_and_come_last() -> None:
    findings = Findings()
    findings.warn([Problem("odd")])
    findings.raise_errors()
    assert (findings.exit_code, len(findings.errors)) == (0, 0)
    findings.add(RecipeError("wrong"))
    assert [finding.level for finding in findings] == ["error", "warning"]


def test_located_findings_are_in_the_order_of_their_lines() -> None:
    findings = Findings()
    findings.add(RecipeError([Problem("b", file="x.yaml", line=12), Problem("no place"), Problem("a", key="k")]))
    found = findings.located(lambda p: Problem("a", "k", "x.yaml", 3) if p.key else p)
    assert [problem.line for problem in found.errors] == [3, 12, None]
    assert [finding.as_json()["exit_code"] for finding in found] == [2, 2, 2]
