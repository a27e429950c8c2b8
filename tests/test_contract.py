"""The contract's text and the code that interprets it name the same clauses."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lowbit.conformance import properties
from lowbit.conformance.ops import NAMES, ops

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
DEFINED = re.findall(r"^- \*\*([A-Z0-9]+-\d+)\*\* ", TEXT, flags=re.MULTILINE)
CITED = re.compile(r"\b(?:ENC|QNT|GEM|W8A8|W4A8|W4A16|W4I8|NVF|INT|DEC|MEM|BCK|PRP|STA|PWR|ADM|LAN|LVL|CAS|AUD|EVA)-\d+\b")


def _cited(folder: str, pattern: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / folder).rglob(pattern)):
        for clause in CITED.findall(path.read_text(encoding="utf-8")):
            found.setdefault(clause, set()).add(path.name)
    return found


def test_no_clause_number_is_used_twice() -> None:
    assert [clause for clause, count in Counter(DEFINED).items() if count > 1] == []


@pytest.mark.parametrize(
    ("folder", "pattern"), [("conformance", "*.py"), ("kernels", "*.py"), ("golden", "*.json"), ("tests", "*.py")]
)
def test_every_clause_that_is_cited_exists(folder: str, pattern: str) -> None:
    unknown = {clause: files for clause, files in _cited(folder, pattern).items() if clause not in DEFINED}
    assert unknown == {}


def test_every_clause_of_an_op_belongs_to_that_op() -> None:
    cited = {clause for op in ops().values() for clause in op.clauses}
    areas = ("ENC", "QNT", "W8A8", "W4A8", "W4A16", "W4I8", "NVF", "INT", "GEM")
    of_ops = {clause for clause in DEFINED if clause.split("-")[0] in areas}
    assert of_ops - cited == set(), "clauses that no op claims to keep"


def test_every_property_has_a_clause_and_every_clause_a_property() -> None:
    assert {clause for _, clause in properties.PROPERTIES.values()} == {c for c in DEFINED if c.startswith("PRP-")}


def test_every_clause_on_audits_is_cited_by_a_test() -> None:
    cited = _cited("tests", "*.py")
    assert [clause for clause in DEFINED if clause.startswith("AUD-") and clause not in cited] == []


def test_every_op_is_a_heading_or_named_in_the_text() -> None:
    assert [name for name in NAMES if name not in TEXT] == []


@pytest.mark.parametrize("name", NAMES)
def test_constraints_rejects_and_golden_families_cite_clauses(name: str) -> None:
    op = ops()[name]
    cited = [constraint.clause for constraint in op.constraints] + [clause for _, clause in op.rejects]
    vectors = json.loads((ROOT / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    cited += [family["clause"] for family in vectors["families"].values()]
    assert cited
    assert [clause for clause in cited if clause not in DEFINED] == []


def test_the_sixteen_disagreements_are_all_in_the_table() -> None:
    rows = re.findall(r"^\| (\d+) \|", TEXT, flags=re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 17))


@pytest.mark.parametrize("name", NAMES)
def test_each_variant_names_the_clause_that_a_drift_breaks(name: str) -> None:
    op = ops()[name]
    assert set(op.judged) == set(op.variants)
    assert set(op.judged.values()) <= set(op.clauses)
