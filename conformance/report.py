"""The report of a run: one record, one JSON text, one digest; how levels are granted; merge, diff and verify.

Decides: the names by which the rest of the suite speaks of reports; all of it is imported from here. report_records holds the
parts and the ladder of levels, report_levels and report_coverage what follows from verdicts, report_schema the whole with its
JSON text, report_files what is on disk, report_comparison several reports.
Refuses: a part of a report that does not follow from its verdicts.
"""

from __future__ import annotations

from .report_comparison import Change, diff, merge, verify
from .report_coverage import Coverage
from .report_files import (
    append_verdict,
    begin_partial,
    check_partial,
    load,
    load_partial,
    prepare_folder,
    write_atomically,
    write_bytes_atomically,
)
from .report_levels import granted, op_of, power_of, sentence, shortened, where_executed
from .report_records import (
    AS_CONTRACT,
    CONSISTENT,
    FINER,
    JUDGED,
    LEVELS,
    REFUTED,
    SCHEMA,
    Audited,
    Claim,
    CodeCoverage,
    CoverageRecord,
    Declared,
    Failure,
    Host,
    Level,
    LevelResult,
    Manifest,
    MergeError,
    OpCounts,
    OutputError,
    ReportError,
    Run,
    Strength,
    Subject,
    Totals,
)
from .report_schema import (
    Report,
    build,
    canonical,
    digest_of,
    from_json,
    host,
    manifest_of,
    schema_json,
    suite_version,
    to_json,
    unexecuted,
    verdict_json,
)

__all__ = [
    "AS_CONTRACT", "CONSISTENT", "FINER", "JUDGED", "LEVELS", "REFUTED", "SCHEMA", "Audited", "Change", "Claim",
    "CodeCoverage", "Coverage", "CoverageRecord", "Declared", "Failure", "Host", "Level", "LevelResult", "Manifest",
    "MergeError", "OpCounts", "OutputError", "Report", "ReportError", "Run", "Strength", "Subject", "Totals",
    "append_verdict", "begin_partial", "build", "canonical", "check_partial", "digest_of", "diff", "from_json", "granted", "host",
    "load", "load_partial", "manifest_of", "merge", "op_of", "power_of", "prepare_folder", "schema_json", "sentence",
    "shortened", "suite_version", "to_json", "unexecuted", "verdict_json", "verify", "where_executed", "write_atomically",
    "write_bytes_atomically",
]
