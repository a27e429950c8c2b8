"""What the judged cases reached: codes, residues of the dims, patterns, tactics and kernels.

Decides: which codes of narrow operands count as seen (`Coverage`, while a run goes on), and what the judged verdicts of a report
covered (`coverage_of`).
Refuses: cases whose output was not read back: they cover nothing.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from .case import Case, Operands
from .report_levels import computed, op_of
from .report_records import JUDGED, CodeCoverage, CoverageRecord
from .selection import FIXED_GROUPS
from .verdict import Verdict

__all__ = ["Coverage", "coverage_of"]

_CHUNK = 1 << 20  # elements counted at a time: NumPy widens an index array to eight bytes per element
_RESIDUES = (("m", 16), ("n", 8), ("n", 16), ("k", 64))


class Coverage:
    """Counts, while a run goes on, the codes that operands held. `add` once per judged case; `merge` joins two counts."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str, int], npt.NDArray[np.bool_]] = {}
        self._elements: Counter[tuple[str, str, str, int]] = Counter()

    def add(self, case: Case, operands: Operands) -> None:
        """Count the codes of all tensors of `operands` whose format has at most 8 bits."""
        for name, tensor in operands.items():
            if tensor.format.bits > 8:
                continue
            key = (case.problem.op, name, tensor.format.name, tensor.format.bits)
            seen = self._seen.setdefault(key, np.zeros(1 << tensor.format.bits, dtype=np.bool_))
            flat = tensor.codes.reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                seen[flat[start : start + _CHUNK]] = True
            self._elements[key] += int(flat.size)

    def merge(self, codes: Iterable[CodeCoverage]) -> None:
        """Add what another count, or a shard's report, saw."""
        for row in codes:
            key = (row.op, row.tensor, row.format, row.bits)
            bits = int(row.bitmap, 16)
            other = np.array([bits >> code & 1 for code in range(1 << row.bits)], dtype=np.bool_)
            self._seen[key] = self._seen.get(key, np.zeros_like(other)) | other
            self._elements[key] += row.elements

    def codes(self) -> tuple[CodeCoverage, ...]:
        """The count so far, sorted by op, tensor and format."""
        rows = []
        for key in sorted(self._seen):
            op, tensor, fmt, bits = key
            number = sum(1 << int(code) for code in np.flatnonzero(self._seen[key]))
            bitmap = f"{number:0{max((1 << bits) // 4, 1)}x}"
            rows.append(CodeCoverage(op, tensor, fmt, bits, self._elements[key], bitmap))
        return tuple(rows)


def _tally(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    counts = Counter(pairs)
    table: dict[str, dict[str, int]] = {}
    for outer, inner in sorted(counts):
        table.setdefault(outer, {})[inner] = counts[outer, inner]
    return table


def coverage_of(verdicts: Sequence[Verdict], codes: tuple[CodeCoverage, ...]) -> CoverageRecord:
    """What the judged verdicts reached, beside the `codes` that a run counted."""
    judged = [verdict for verdict in computed(verdicts) if verdict.status in JUDGED]
    residues: dict[str, dict[str, list[int]]] = {}
    patterns, problems, long_k, ks = [], set(), Counter[str](), []
    for text in sorted({verdict.case for verdict in judged}):
        op, variant, dims, options, pattern, _ = Case.split(text)
        problems.add((op, text.rsplit("/", 2)[0]))
        patterns.append((f"{op}/{variant}/{options[0]}", pattern))
        for letter, modulus in _RESIDUES:
            if letter in dims:
                row = residues.setdefault(op, {}).setdefault(f"{letter} mod {modulus}", [0] * modulus)
                row[dims[letter] % modulus] += 1
        if op.startswith("gemm_"):
            ks += [dims["k"]] if "k" in dims else []
            group = dims.get("g", 0 if (op, variant) == ("gemm_w8a8_fp8", "scaled") else FIXED_GROUPS.get(op, 0))
            long_k[op] += bool(group) and dims.get("k", 0) > group**2
    return CoverageRecord(
        codes,
        {op: {name: tuple(row) for name, row in sorted(rows.items())} for op, rows in sorted(residues.items())},
        _tally(patterns),
        dict(sorted(Counter(op for op, _ in problems).items())),
        dict(sorted(long_k.items())),
        float(statistics.median(ks)) if ks else None,
        _tally((op_of(verdict), verdict.tactic) for verdict in judged),
        _tally((op_of(verdict), f"{verdict.kernel} ({verdict.kernel_source})") for verdict in judged if verdict.kernel),
        sum(verdict.products for verdict in judged),
    )
