"""Waivers: what a file may say, which failures they excuse, and which of them fail a run themselves."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest

from lowbit.conformance.verdict import Status, Verdict
from lowbit.conformance.waivers import Waiver, WaiverError, apply, findings, parse, read, waived_by

CASE = "gemm_nvfp4/plain/m16n64k256/bf16/outlier/s0"
OTHER = "gemm_nvfp4/plain/m16n64k256/bf16/outlier/s1"
TODAY = date(2026, 11, 20)
DRIFT = Verdict(CASE, "acme", "default", "bounded", 2, Status.DRIFT, "off by one", "GEMM-7", wrong=1, judged=4, total=4)
PASSING = replace(DRIFT, case=OTHER, status=Status.WITHIN, reason="", wrong=0)
WAIVER = Waiver("gemm_nvfp4/*/outlier/s0", "GEMM-7", "https://example.org/issues/12", date(2026, 11, 20))

FILE = """
[[waiver]]
case = "gemm_nvfp4/*/outlier/s0"
clause = "GEMM-7"
issue = "https://example.org/issues/12"
expires = 2026-11-20

[[waiver]]
case = "int4_pack/*"
clause = "PACK-1"
issue = "http://tracker.example.org/x?id=3"
expires = 2027-02-28
backend = "acme*"
tactic = "split?"
"""


def test_a_file_says_what_it_means() -> None:
    second = Waiver("int4_pack/*", "PACK-1", "http://tracker.example.org/x?id=3", date(2027, 2, 28), "acme*", "split?")
    assert parse(FILE) == (WAIVER, second)
    assert parse("") == ()


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(FILE, encoding="utf-8")
    assert read(path) == parse(FILE)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(WaiverError, match=r"waivers\.toml cannot be read"):
        read(path)
    with pytest.raises(WaiverError, match=r"absent\.toml cannot be read"):
        read(tmp_path / "absent.toml")


ENTRY = {"case": '"int4_pack/*"', "clause": '"C"', "issue": '"https://e.org/1"', "expires": "2027-01-01"}


@pytest.mark.parametrize(("changed", "message"), [
    ({"issue": None}, "waiver 1 lacks issue"),
    ({"case": None, "expires": None}, "lacks case, expires"),
    ({"owner": '"me"'}, "unknown key owner"),
    ({"expires": '"2027-01-01"'}, "expires is '2027-01-01', expected a TOML date"),
    ({"expires": "2027-01-01T00:00:00Z"}, "expected a TOML date"),
    ({"clause": '" "'}, "clause is ' ', expected a string that is not empty"),
    ({"backend": "3"}, "backend is 3"),
    ({"case": '"*"'}, "must begin with the name of one op"),
    ({"case": '"*/plain/*"'}, "must begin with the name of one op"),
    ({"case": '"gemm_*/x"'}, "must begin with the name of one op"),
    ({"issue": '"#12"'}, "http or https address"),
    ({"issue": '"javascript:alert(1)"'}, "http or https address"),
])
def test_a_malformed_waiver_is_refused(changed: dict[str, str | None], message: str) -> None:
    entry = {key: value for key, value in {**ENTRY, **changed}.items() if value is not None}
    with pytest.raises(WaiverError, match=message.replace("*", r"\*")):
        parse("[[waiver]]\n" + "\n".join(f"{key} = {value}" for key, value in entry.items()), "w.toml")


@pytest.mark.parametrize(("text", "message"), [
    ("[[waiver]", r"w\.toml is not TOML"),
    ("[waiver]\ncase = 'x/y'", r"a single \[waiver\]"),
    ("waiver = [1]", "waiver 1 is not a table"),
    ("[[waivers]]\ncase = 'x/y'", "holds waivers"),
    (FILE + FILE, "waives the same thing twice"),
])
def test_a_malformed_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(WaiverError, match=message):
        parse(text, "w.toml")


def test_a_failure_is_waived_and_keeps_its_status_in_words() -> None:
    (first, second), (waiver,) = apply([DRIFT, PASSING], [WAIVER], TODAY)
    assert first.status is Status.WAIVED
    assert first.reason == f"waived by {WAIVER.id} (https://example.org/issues/12): DRIFT: off by one"
    assert waived_by(first) == WAIVER.id
    assert (second, waived_by(second), waiver.hits) == (PASSING, "", 1)
    assert findings([first, second], [waiver], [CASE, OTHER], TODAY) == ()


@pytest.mark.parametrize("verdict", [
    replace(DRIFT, clause="GEMM-8"),
    replace(DRIFT, case=OTHER),
    replace(DRIFT, status=Status.UNTRUSTED),
    replace(DRIFT, status=Status.UNSUPPORTED),
    PASSING,
])
def test_what_a_waiver_does_not_name_stays(verdict: Verdict) -> None:
    assert apply([verdict], [WAIVER], TODAY) == ((verdict,), (WAIVER,))


@pytest.mark.parametrize(("field", "glob", "held"), [
    ("backend", "acme*", True), ("backend", "other", False), ("tactic", "default", True), ("tactic", "split*", False),
])
def test_backend_and_tactic_narrow_a_waiver(field: str, glob: str, held: bool) -> None:
    (verdict,), _ = apply([DRIFT], [replace(WAIVER, backend=glob) if field == "backend" else replace(WAIVER, tactic=glob)], TODAY)
    assert (verdict.status is Status.WAIVED) == held


def test_a_waiver_holds_through_its_last_day() -> None:
    tomorrow = TODAY + timedelta(days=1)
    assert apply([DRIFT], [WAIVER], TODAY)[0][0].status is Status.WAIVED
    late, waivers = apply([DRIFT], [WAIVER], tomorrow)
    assert late == (DRIFT,)
    assert findings(late, waivers, [CASE], tomorrow) == (
        f"waiver {WAIVER.id} (gemm_nvfp4/*/outlier/s0, GEMM-7) expired on 2026-11-20: mend the failure or renew it at "
        "https://example.org/issues/12",
    )


def test_a_waived_case_that_passes_is_a_finding() -> None:
    wide = replace(WAIVER, case="gemm_nvfp4/*")
    verdicts, waivers = apply([DRIFT, PASSING], [wide], TODAY)
    (found,) = findings(verdicts, waivers, [CASE, OTHER], TODAY)
    assert "matches 1 passing verdict" in found
    assert OTHER in found


def test_a_waiver_that_matches_nothing_is_a_finding() -> None:
    (found,) = findings([PASSING], [WAIVER], [OTHER], TODAY)
    assert "matches none of the 1 selected cases" in found


def test_a_case_of_another_shard_is_matched() -> None:
    assert findings([PASSING], [WAIVER], [CASE, OTHER], TODAY) == ()


def test_a_waiver_under_the_wrong_clause_is_a_finding() -> None:
    other = replace(DRIFT, clause="GEMM-8")
    (found,) = findings([other], [WAIVER], [CASE], TODAY)
    assert "waives nothing: its cases end in DRIFT" in found


def test_hits_and_names_must_agree() -> None:
    (waived,), (counted,) = apply([DRIFT], [WAIVER], TODAY)
    assert findings([waived], [counted], [CASE], TODAY) == ()
    assert "counts 5 hits, but 1 verdicts" in findings([waived], [replace(counted, hits=5)], [CASE], TODAY)[0]
    assert "names no waiver of the report" in findings([waived], [], [CASE], TODAY)[0]
    assert "names no waiver of the report" in findings([replace(waived, reason="because")], [], [CASE], TODAY)[0]


def test_waivers_of_other_backends_are_not_looked_at() -> None:
    assert findings([PASSING], [replace(WAIVER, backend="other")], [OTHER], TODAY + timedelta(days=400)) == ()


def test_the_id_is_of_what_a_waiver_matches() -> None:
    assert WAIVER.id == replace(WAIVER, issue="https://e.org/2", expires=date(2030, 1, 1), hits=9).id
    assert len({WAIVER.id, replace(WAIVER, case="a/b").id, replace(WAIVER, clause="X").id, replace(WAIVER, tactic="t").id}) == 4
