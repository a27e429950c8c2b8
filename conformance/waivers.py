"""Waivers: failures that are known, linked to an issue, and owed until a date.

A waiver file is TOML, one table per waiver, every key a string but the date:

    [[waiver]]
    case = "gemm_nvfp4/*/k4096*/*"                  # glob over case ids; its op is written out
    clause = "GEMM-7"                               # the clause that the verdict breaks
    issue = "https://example.org/issues/12"         # where the debt is tracked
    expires = 2027-01-31                            # last day on which it holds
    backend = "acme*"                               # optional glob over backend names, default all
    tactic = "splitk*"                              # optional glob over tactics, default all

Decides: which failing verdicts become WAIVED, and what is wrong with the waivers themselves. Refuses: a waiver without an
issue or an end, a glob over every op, a failure of another clause than the waiver names, UNTRUSTED verdicts (they say
something of the suite, nothing of the backend), and, strictly, waivers that are expired, match nothing, or match a case
that passes: each of these fails the run.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from .verdict import FAILING, PASSING, Status, Verdict

__all__ = ["Waiver", "WaiverError", "apply", "findings", "parse", "read", "waivable", "waived_by"]

_REQUIRED = ("case", "clause", "issue", "expires")
_OPTIONAL = ("backend", "tactic")
_GLOB = re.compile(r"[a-z][a-z0-9_]*/.+")
_ISSUE = re.compile(r"https?://[^\s/]+/\S+")
_PREFIX = re.compile(r"waived by (w-[0-9a-f]{8}) ")

waivable = FAILING - {Status.UNTRUSTED}
"""Statuses that a waiver may excuse."""


class WaiverError(ValueError):
    """A waiver file that cannot be read or does not say what a waiver must; the message names the file and the entry."""


@dataclass(frozen=True, slots=True)
class Waiver:
    """One waiver. `case`, `backend`, `tactic`: globs (`*`, `?`, `[...]`, case sensitive). `expires`: the last day on which
    it holds. `hits`: verdicts that it turned into WAIVED in the report that holds it, 0 in a file."""

    case: str
    clause: str
    issue: str
    expires: date
    backend: str = "*"
    tactic: str = "*"
    hits: int = 0

    @property
    def id(self) -> str:
        """Name of the waiver: `w-` and 8 hex digits of the sha256 of what it matches, the same wherever it stands."""
        text = "\n".join((self.case, self.clause, self.backend, self.tactic))
        return f"w-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def covers(self, verdict: Verdict) -> bool:
        """Whether the verdict is of a case, tactic and backend that the waiver speaks of, whatever its status and clause."""
        return (fnmatchcase(verdict.case, self.case) and fnmatchcase(verdict.backend, self.backend)
                and fnmatchcase(verdict.tactic, self.tactic))


def _waiver(entry: object, where: str) -> Waiver:
    if not isinstance(entry, dict):
        raise WaiverError(f"{where} is not a table: write [[waiver]] followed by {', '.join(_REQUIRED)}")
    missing = [key for key in _REQUIRED if key not in entry]
    unknown = sorted(set(entry) - {*_REQUIRED, *_OPTIONAL})
    if missing or unknown:
        fault = f"lacks {', '.join(missing)}" if missing else f"has the unknown key {', '.join(unknown)}"
        raise WaiverError(f"{where} {fault}: it needs {', '.join(_REQUIRED)} and may have {', '.join(_OPTIONAL)}")
    expires = entry["expires"]
    if not isinstance(expires, date) or isinstance(expires, datetime):
        raise WaiverError(f"{where}: expires is {expires!r}, expected a TOML date without quotes, for example 2027-01-31")
    texts = {key: entry[key] for key in (*_REQUIRED[:3], *_OPTIONAL) if key in entry}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise WaiverError(f"{where}: {key} is {value!r}, expected a string that is not empty")
    if not _GLOB.fullmatch(texts["case"]):
        raise WaiverError(f"{where}: case {texts['case']!r} must begin with the name of one op and a slash, for example "
                          "gemm_nvfp4/*; a waiver over every op is none")
    if not _ISSUE.fullmatch(texts["issue"]):
        raise WaiverError(f"{where}: issue {texts['issue']!r} must be the http or https address of the issue")
    return Waiver(expires=expires, **texts)


def parse(text: str, where: str = "waivers") -> tuple[Waiver, ...]:
    """The waivers of a TOML text, in its order. `where` names the source in messages. Raises WaiverError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WaiverError(f"{where} is not TOML: {error}") from error
    unknown = sorted(set(data) - {"waiver"})
    entries = data.get("waiver", [])
    if unknown or not isinstance(entries, list):
        raise WaiverError(f"{where} holds {', '.join(unknown) or 'a single [waiver]'}: expected [[waiver]] tables alone")
    waivers = tuple(_waiver(entry, f"{where}: waiver {number}") for number, entry in enumerate(entries, 1))
    twice = {waiver.id: waiver.case for waiver in waivers if sum(other.id == waiver.id for other in waivers) > 1}
    if twice:
        raise WaiverError(f"{where} waives the same thing twice: {', '.join(sorted(twice.values()))}; keep one of them")
    return waivers


def read(path: Path) -> tuple[Waiver, ...]:
    """The waivers of a file. Raises WaiverError where it is absent, unreadable, not UTF-8 or malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WaiverError(f"waiver file {path} cannot be read: {error}") from error
    return parse(text, str(path))


def waived_by(verdict: Verdict) -> str:
    """Id of the waiver that a WAIVED verdict names, empty for every other verdict."""
    found = _PREFIX.match(verdict.reason) if verdict.status is Status.WAIVED else None
    return found.group(1) if found else ""


def apply(verdicts: Iterable[Verdict], waivers: Sequence[Waiver], today: date) -> tuple[tuple[Verdict, ...], tuple[Waiver, ...]]:
    """The verdicts with failures turned into WAIVED where a waiver in force covers them and names the broken clause, and
    the waivers with their hits counted. The first waiver that fits counts the hit. The old status stays in the reason:
    `waived by w-0123abcd (https://...): DRIFT: ...`."""
    judged, hits = [], dict.fromkeys((waiver.id for waiver in waivers), 0)
    in_force = [waiver for waiver in waivers if today <= waiver.expires]
    for verdict in verdicts:
        fits = (waiver for waiver in in_force if waiver.covers(verdict) and waiver.clause == verdict.clause)
        waiver = next(fits, None) if verdict.status in waivable else None
        if waiver is not None:
            hits[waiver.id] += 1
            reason = f"waived by {waiver.id} ({waiver.issue}): {verdict.status}: {verdict.reason}"
            verdict = replace(verdict, status=Status.WAIVED, reason=reason)
        judged.append(verdict)
    return tuple(judged), tuple(replace(waiver, hits=hits[waiver.id]) for waiver in waivers)


def findings(
    verdicts: Iterable[Verdict], waivers: Sequence[Waiver], cases: Collection[str], today: date,
) -> tuple[str, ...]:
    """What is wrong with the waivers after `apply`, one sentence each; empty means that every waiver is owed and in date.

    `cases`: ids of all selected cases, of all shards. `verdicts`: of this report, whose backend the waivers are held
    against; a waiver for another backend is not looked at."""
    verdicts = tuple(verdicts)
    backends = {verdict.backend for verdict in verdicts}
    ids = {waiver.id for waiver in waivers}
    found = [f"{verdict.case} is WAIVED but names no waiver of the report: {verdict.reason or 'no reason given'}"
             for verdict in verdicts if verdict.status is Status.WAIVED and waived_by(verdict) not in ids]
    for waiver in waivers:
        name = f"waiver {waiver.id} ({waiver.case}, {waiver.clause})"
        if not any(fnmatchcase(backend, waiver.backend) for backend in backends):
            continue
        if today > waiver.expires:
            found.append(f"{name} expired on {waiver.expires.isoformat()}: mend the failure or renew it at {waiver.issue}")
        if not any(fnmatchcase(case, waiver.case) for case in cases):
            found.append(f"{name} matches none of the {len(cases)} selected cases: correct its glob or delete it")
        covered = [verdict for verdict in verdicts if waiver.covers(verdict)]
        passing = [verdict for verdict in covered if verdict.status in PASSING]
        if passing:
            found.append(f"{name} matches {len(passing)} passing verdict{'s' * (len(passing) > 1)}, the first {passing[0].case} "
                         f"[{passing[0].tactic}]: narrow its glob or delete it")
        hits = sum(waived_by(verdict) == waiver.id for verdict in covered)
        if hits != waiver.hits:
            found.append(f"{name} counts {waiver.hits} hits, but {hits} verdicts name it")
        if covered and not passing and not hits and today <= waiver.expires:
            statuses = ", ".join(sorted({str(verdict.status) for verdict in covered}))
            found.append(f"{name} waives nothing: its cases end in {statuses} under another clause or waiver")
    return tuple(found)
