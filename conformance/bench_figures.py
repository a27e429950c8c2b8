"""What the figures of `lowbit bench` say: rows, ratios with their spread, a dispatch table, a table and a plot.

Decides: the fields of a row, how rounds become one ratio (`interval`), which rows belong to one class, and what a person sees.
Refuses: to measure, and to judge results; a row is what a run measured, and peers of other arithmetic are named, not sorted out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "SCHEMA", "Class", "Row", "best_of", "classes_of", "dispatch_of", "interval", "left_out_text", "like_of", "roof_text",
    "table_text", "to_data", "to_plot", "to_table",
]

SCHEMA = "lowbit.bench/2"


@dataclass(frozen=True, slots=True)
class Row:
    """One tactic on one problem. Times in microseconds: `us` and `peers` are medians over rounds, `rounds` and `peer_rounds` the
    figures of each round, `roof_us` the time that the larger of memory traffic and arithmetic takes at the measured rates, `roof`
    which of them. `chosen`: the tactic that the backend dispatches. `differences`: of each peer's output from ours, as
    bench_device.py measures it. `graph`, and `peer_graphs` of each peer: launches came from a graph, not from the host.
    `peer_errors`: what a peer said that raised; it has no figures."""

    op: str
    variant: str
    options: str
    m: int
    n: int
    k: int
    dims: str
    tactic: str
    chosen: bool
    kernel: str
    us: float
    roof_us: float
    roof: str
    tflops: float
    gbs: float
    rounds: tuple[float, ...]
    graph: bool
    peers: Mapping[str, float] = field(default_factory=dict)
    peer_rounds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    peer_graphs: Mapping[str, bool] = field(default_factory=dict)
    differences: Mapping[str, float] = field(default_factory=dict)
    peer_errors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Class:
    """Geometric means over the shapes of one M: peer time / ours, per round, then the median, the lowest and the highest round.
    `peer` "best" is the fastest peer of each shape, "roof" the share of the roof, its interval without the spread of the roof's
    own rates. `failed` and `unlike` name the peers that raised, or were launched by another method than ours, on any of the
    shapes: there they are not among those that "best" is the fastest of."""

    op: str
    variant: str
    options: str
    m: int
    peer: str
    shapes: int
    ratio: float
    low: float
    high: float
    failed: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()


def like_of(row: Row) -> tuple[str, ...]:
    """The peers of a row whose times may be set against ours: both from a graph, or both from the host. A launch from the host
    takes microseconds of the host, which would be counted for one of the two only."""
    return tuple(name for name in row.peers if row.peer_graphs[name] == row.graph)


def best_of(row: Row) -> str | None:
    """The fastest peer of `like_of`, None where there is none."""
    return min(like_of(row), key=lambda name: row.peers[name], default=None)


def interval(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float, float]:
    """(median, lowest, highest) over rounds of the geometric mean of theirs / ours. `pairs`: per shape the figures of each round,
    ours first. The range from the lowest to the highest of n independent rounds holds the true median with probability
    1 - 2^(1 - n), whatever the distribution: 0.94 for 5 rounds, 0.98 for 7."""
    count = min(len(ours) for ours, _ in pairs)
    means = [
        math.exp(statistics.fmean(math.log(theirs[number] / ours[number]) for ours, theirs in pairs)) for number in range(count)
    ]
    return statistics.median(means), min(means), max(means)


def classes_of(rows: Sequence[Row]) -> tuple[Class, ...]:
    """The classes of the rows of dispatched tactics: per op, variant, options and M, one for the roof, one for each peer that is
    there for all shapes, and one for the fastest peer of each shape where each shape has one; peers of `like_of` only."""
    gathered: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        if row.chosen:
            gathered.setdefault((row.op, row.variant, row.options, row.m), []).append(row)
    found: list[Class] = []
    for key, shapes in gathered.items():
        against: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = {
            "roof": [(row.rounds, (row.roof_us,) * len(row.rounds)) for row in shapes]
        }
        best = [(row, name) for row in shapes if (name := best_of(row)) is not None]
        if len(best) == len(shapes):
            against["best"] = [(row.rounds, row.peer_rounds[name]) for row, name in best]
        for name in sorted(set.intersection(*(set(like_of(row)) for row in shapes))):
            against[name] = [(row.rounds, row.peer_rounds[name]) for row in shapes]
        failed = tuple(sorted({name for row in shapes for name in row.peer_errors}))
        unlike = tuple(sorted({name for row in shapes for name in set(row.peers) - set(like_of(row))}))
        found += [Class(*key, name, len(shapes), *interval(pairs), failed, unlike) for name, pairs in against.items()]
    return tuple(found)


def dispatch_of(rows: Sequence[Row]) -> dict[str, list[list[Any]]]:
    """The fastest tactic of each problem, as a dispatch table: op/variant/options -> [[dims, tactic, us], ...]."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = f"{row.op}/{row.variant}/{row.options}", row.dims
        if key not in best or row.us < best[key].us:
            best[key] = row
    table: dict[str, list[list[Any]]] = {}
    for (name, dims), row in best.items():
        table.setdefault(name, []).append([dims, row.tactic, round(row.us, 3)])
    return table


def left_out_text(item: Class) -> str:
    """Which peers do not stand behind "best" on every shape, and why; empty where all do."""
    parts = (("raised", item.failed), ("launched by another method than ours", item.unlike))
    return "; ".join(f"{why}: {', '.join(names)}" for why, names in parts if names)


def roof_text(rates: Mapping[str, float]) -> str:
    """How the roof came about, and what it is not."""
    matrix = ", ".join(f"{kind} {rate / 1e12:.0f} TFLOP/s" for kind, rate in rates.items() if kind not in ("read", "write"))
    return (
        f"roof_us is the larger of bytes read / {rates['read'] / 1e12:.2f} TB/s + written / {rates['write'] / 1e12:.2f} TB/s "
        f"and operations / the matrix rate ({matrix or 'none needed'}). These rates were reached by torch in this run: its amax, "
        "fill and matrix product, once, at the start. They are not the most that the device can reach: a share above 100 % is "
        'possible, and the interval of "roof" leaves out the spread of the rates'
    )


def to_data(header: Mapping[str, Any], rates: Mapping[str, float], rows: Sequence[Row]) -> dict[str, Any]:
    """The figures as JSON data: the given header (suite, date, backend, against, environment, method), the roof, rows, classes,
    and a dispatch table where more than one tactic was timed."""
    data = {
        "schema": SCHEMA, **header, "roof": {"how": roof_text(rates), "per_second": dict(rates)},
        "rows": [asdict(row) for row in rows], "classes": [asdict(item) for item in classes_of(rows)],
    }
    return data | ({} if all(row.chosen for row in rows) else {"dispatch": dispatch_of(rows)})


# what a person sees -----------------------------------------------------------------------------------------------------


def to_table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(heads, cells): one line per row; a peer's column holds its time / ours. "h" marks what was launched from the host."""
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    tuned = any(not row.chosen for row in rows)
    heads = ("problem", *(("tactic",) if tuned else ()), "us", "TFLOP/s", "GB/s", "roof", "best", *peers)
    cells = []
    for row in rows:
        fastest = best_of(row)
        best = "" if fastest is None else f"{row.peers[fastest] / row.us:.2f}"
        ratios = {name: f"{us / row.us:.2f}" + ("" if row.peer_graphs[name] else " h") for name, us in row.peers.items()}
        cells.append((
            f"{row.op}/{row.variant}/{row.dims}/{row.options}", *((row.tactic + (" *" if row.chosen else ""),) if tuned else ()),
            f"{row.us:.2f}" + ("" if row.graph else " h"), f"{row.tflops:.0f}" if row.tflops else "", f"{row.gbs:.0f}",
            f"{row.roof_us / row.us:.0%}", best,
            *(ratios.get(name, "") for name in peers),
        ))
    return heads, cells


def table_text(rows: Sequence[Row]) -> str:
    """The table as lines, columns as wide as what they hold, figures to the right."""
    heads, cells = to_table(rows)
    lines = [heads, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    left = ("problem", "tactic")
    return "\n".join(
        "  ".join(
            cell.ljust(width) if head in left else cell.rjust(width)
            for head, cell, width in zip(heads, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


_WIDTH = 50  # characters that stand for the whole roof


def to_plot(rows: Sequence[Row]) -> str:
    """A bar per dispatched row: the share of the roof reached, with a mark where the fastest peer stands."""
    lines = [f"{'share of the roof (| fastest peer)':<48} 0%{'':{_WIDTH - 6}}100%"]
    for row in (row for row in rows if row.chosen):
        ours = min(_WIDTH, round(_WIDTH * row.roof_us / row.us))
        bar = list("█" * ours + "·" * (_WIDTH - ours))
        fastest = best_of(row)
        if fastest is not None:
            bar[min(_WIDTH - 1, round(_WIDTH * row.roof_us / row.peers[fastest]))] = "|"
        lines.append(f"{f'{row.op}/{row.variant} {row.dims}':<48} {''.join(bar)} {row.roof_us / row.us:.0%}")
    return "\n".join(lines)
