"""Which cases a level asks for: one deterministic list per op, the same for every backend and on every machine.

Decides: the list. It holds each op's named edges; every variant x output format x pattern; every residue of M modulo 16 and
of N and K modulo the tiles in use; K beyond G^2 where groups exist; the golden vectors; the properties; the rejects. No two
cases of a list differ only in the seed. A backend that claims less than the list covers gets a continuation of it
(`claim_cases`), drawn over what it claims. Refuses: filters inside tests. What is not run is listed as not run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from .audit_probes import battery, problems
from .case import Case, Problem, Stream
from .op import DomainError, Op, make_problem, parse_case, possible_options
from .patterns import lane_of, level_of

__all__ = [
    "CONTRACT", "DRAWN_LANES", "FIXED_GROUPS", "LEAST", "PER_OP", "REPEATS", "Class", "Listed", "Refused", "audit_list",
    "case_list", "claim_cases", "class_lanes", "class_of", "is_claim", "manifest", "shard",
]

CONTRACT = "1.4"
"""Version of the contract. The lanes of each level are frozen per version."""

PER_OP, REPEATS = 170, 100
"""LVL-7: drawn cases per op, and repeats of a stability case. A run with fewer is a shortened one and is granted no level."""

LEAST = 44
"""LVL-8: judged drawn cases of an op below which no level is granted: the least n with 0.9^n < 0.01."""

DRAWN_LANES = ("encoding", "quantiser", "exact", "onehot", "scale", "bounded")
"""Lanes of drawn cases: all but stored vectors, probes, relations, rejects, weights from files and repeats."""

_DRAWN = "1.0"
"""Version of the contract whose number keys the drawn problems; a later one that only adds lanes keeps them."""

_CLAIMED = "1.3"
"""The same for claim cases."""

_SEEDLESS = ("golden", "tensors")
_M = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 257)
_K_BLOCKS = (64, 128, 192, 256, 384, 512, 576, 640, 768, 896, 1024, 1152, 1280, 1536, 2048, 2304, 3072, 4096)
FIXED_GROUPS = {"gemm_int4": 64, "gemm_nvfp4": 16, "gemm_w8a8_fp8": 128}
"""Group along K of the ops whose group is not a dim (gemm_w8a8_fp8: of its variant `block`)."""

_GROUPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a case list: the case, the lane and the level it counts for."""

    case: Case
    lane: str
    level: int


def _pick(stream: Stream, items: Sequence[int]) -> int:
    return items[int(stream.integers(0, len(items) - 1, (1,))[0])]


def _size(op: Op, letter: str, stream: Stream) -> int:
    """A size from the op's range, small ones as likely as large ones, in steps of the range's multiple."""
    low, high, multiple = op.ranges[letter]
    first, last = -(-max(low, 1) // multiple), max(1, high // multiple)
    exponent = float(stream.uniform((1,))[0])
    steps = int(first * (last / first) ** exponent) if first else int(last**exponent)
    return max(first, min(last, steps)) * multiple


def _gemm_dims(op: Op, options: Mapping[str, str], stream: Stream, index: int) -> dict[str, int]:
    """Sizes of a GEMM case: M walks a list with all residues modulo 16; K is large as a rule; odd tails are common."""
    dims: dict[str, int] = {}
    dims["m"] = _M[index % len(_M)] if index % 3 else 1 + index // 3 % 33
    multiple = op.ranges["n"][2]
    dims["n"] = multiple * int(stream.integers(1, 24, (1,))[0])
    dims["k"] = _pick(stream, _K_BLOCKS)
    if index % 4 == 0:
        dims["k"] += op.ranges["k"][2] * int(stream.integers(1, 7, (1,))[0])
    if "g" in op.dims:
        legal = [g for g in _GROUPS if op.ranges["g"][0] <= g <= op.ranges["g"][1]]
        dims["g"] = _pick(stream, legal)
        if index % 11 == 5:
            dims["g"] = dims["k"]
        else:
            dims["k"] = -(-dims["k"] // dims["g"]) * dims["g"]
    if "r" in op.dims:
        dims["r"] = 16 * _pick(stream, (1, 2, 3, 4, 8, 16)) if options.get("lora") == "lora" else 0
    if "e" in op.dims:
        dims["e"] = int(stream.integers(1, 9, (1,))[0])
    return {letter: dims[letter] for letter in op.dims}


def _other_dims(op: Op, stream: Stream) -> dict[str, int]:
    dims = {letter: _size(op, letter, stream) for letter in op.dims}
    if "g" in dims and "k" in dims and dims["g"]:
        dims["k"] = max(1, dims["k"] // dims["g"]) * dims["g"]
    return dims


_LIMIT = 1 << 18  # elements of the largest tensor of a drawn encoding case


def _problem(op: Op, variant: str, options: Mapping[str, str], stream: Stream, index: int) -> Problem | None:
    """A drawn problem of this variant with these options, or None where the domain has none among 60 draws."""
    if not possible_options(op, variant, options):
        return None
    for attempt in range(60):
        dims = _gemm_dims(op, options, stream, index + attempt) if op.is_gemm else _other_dims(op, stream)
        if not op.is_gemm and np.prod([float(max(1, d)) for letter, d in dims.items() if letter != "g"]) > _LIMIT:
            continue
        try:
            return make_problem(op, variant, dims, options)
        except DomainError:
            continue
    return None


def _option_sets(op: Op, stream: Stream, fixed: Mapping[str, str]) -> dict[str, str]:
    chosen = dict(fixed)
    for option in op.options:
        if option.name not in chosen:
            chosen[option.name] = option.tokens[int(stream.integers(0, len(option.tokens) - 1, (1,))[0])]
    return chosen


def _found(op: Op, missed: Sequence[tuple[str, dict[str, str], str]]) -> Iterator[Case]:
    """Cases for what plain draws rarely hit: options drawn until some are possible, sizes rounded up to whole tiles of 128."""
    for number, (variant, fixed, pattern) in enumerate(missed):
        stream = Stream("case list", _DRAWN, op.name, "missed", number)
        for attempt in range(400):
            options = _option_sets(op, stream, fixed)
            if not possible_options(op, variant, options):
                continue
            dims = _gemm_dims(op, options, stream, attempt) if op.is_gemm else _other_dims(op, stream)
            tiled = "" if op.is_gemm else "mk"
            whole = {letter: -(-size // 128) * 128 if letter in tiled else size for letter, size in dims.items()}
            try:
                yield Case(make_problem(op, variant, whole, options), pattern, 2000 + number)
                break
            except DomainError:
                continue


def _beyond_group_squared(op: Op) -> Iterator[Problem]:
    """Problems whose K exceeds the square of the group: five per op that has groups along K."""
    group = FIXED_GROUPS.get(op.name)
    for index in range(6):
        size = group or (16, 32, 64, 64, 64, 32)[index]
        for variant in reversed(op.variants):
            dims = {"m": (1, 3, 4, 2, 5, 7)[index], "n": op.ranges["n"][2] * (1 + index), "k": size * size + size * (1 + index)}
            if "g" in op.dims:
                dims["g"] = size
            if "r" in op.dims:
                dims["r"] = 0
            if "e" in op.dims:
                dims["e"] = 2
            try:
                yield make_problem(op, variant, {letter: dims[letter] for letter in op.dims})
                break
            except (DomainError, KeyError):
                continue


def _grid(op: Op) -> Iterator[tuple[str, dict[str, str], str]]:
    """Every variant x token of the first option x pattern."""
    first = op.options[0] if op.options else None
    for variant in op.variants:
        for token in first.tokens if first else ("",):
            for pattern in op.patterns:
                if pattern not in _SEEDLESS:
                    yield variant, ({first.name: token} if first else {}), pattern


def _drawn(op: Op, per_op: int) -> Iterator[Case]:
    stream = Stream("case list", _DRAWN, op.name)
    index = 0
    missed: list[tuple[str, dict[str, str], str]] = []
    for variant, fixed, pattern in _grid(op):
        for _ in range(24):
            problem = _problem(op, variant, _option_sets(op, stream, fixed), stream, index)
            if problem is not None:
                index += 1
                yield Case(problem, pattern, index)
                break
        else:
            missed.append((variant, fixed, pattern))
    yield from _found(op, missed)
    if op.is_gemm:
        for number, problem in enumerate(_beyond_group_squared(op)):
            for pattern in ("exactw11", "normal", "onehot" if "onehot" in op.patterns and number == 0 else "lognormal"):
                if not (pattern == "onehot" and problem.dim("k") > 2048):
                    yield Case(problem, pattern, 1000 + number)
    patterns = [pattern for pattern in op.patterns if pattern not in _SEEDLESS]
    tries = 0
    while index < per_op and tries < 20 * per_op:
        tries += 1
        variant = op.variants[(tries + index // len(patterns)) % len(op.variants)]  # each pattern meets every variant
        problem = _problem(op, variant, _option_sets(op, stream, {}), stream, index)
        if problem is not None:
            index += 1
            yield Case(problem, patterns[index % len(patterns)], index)


def case_list(op: Op, *, per_op: int = PER_OP) -> list[Listed]:
    """The cases of one op, drawn and named, without golden, property, reject and stability lanes (run.py adds those from
    their own rooms). Distinct in more than the seed."""
    found: dict[tuple[Problem, str], Case] = {}
    cheap = {"onehot", "scaleprobe"}
    for text in op.edges:
        case = parse_case(text, {op.name: op})
        found.setdefault((case.problem, case.pattern), case)
    for case in _drawn(op, per_op):
        if case.pattern in cheap and op.is_gemm:
            case = _probe_sized(op, case)
        found.setdefault((case.problem, case.pattern), case)
    return [Listed(case, lane, level_of(lane)) for case in found.values() for lane in [lane_of(op, case.pattern)]]


# Claim cases ---------------------------------------------------------------------------------------------------------

Class = tuple[str, tuple[tuple[str, str], ...]]
"""(variant, options) of one op."""

Refused = Callable[[Sequence[Problem]], Sequence[bool]]
"""Which problems a backend refuses; asked in batches."""

_PROBES = ("onehot", "scaleprobe")
_TELLING = ("exactw8", "exactw11", "normal", "lognormal", "positive", "shifted")  # even a loose declaration tells them from zeros
_LARGE_M = (129, 200, 257)
_CLAIM_M = (129, 1, 257, 16, 5, 200, 64, 2, 33, 128, 7, 257, 17, 3, 129, 48, 9, 100, 200, 4, 65, 31, 13)
_PLAIN_M = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TILES = (1, 64, 128, 256)
_CANDIDATES = 12  # problems drawn for one wanted case: two runs through _TILES and two of the kin
_ROUNDS = 3  # times that an absent lane of a claimed class is drawn
_MOST_WANTED = 8  # wanted cases per case that is still missing, before the draws end
_MOST_PRODUCTS = 1 << 27  # every element is judged (ADM-7)
_SEEDS = 3000  # claim cases count from here, beyond every number of the list
_MOST_RUNS = 64  # of one probe: rows that light one k, over M


def class_of(problem: Problem) -> Class:
    """The class of a problem within its op."""
    return problem.variant, problem.options


def is_claim(case: Case) -> bool:
    """Whether a listed case is a claim case."""
    return case.seed > _SEEDS and case.pattern not in _SEEDLESS


def class_lanes(name: str) -> tuple[str, ...]:
    """Lanes in which each claimed class of the op `name` needs a judged case (LVL-8)."""
    if name.startswith("gemm_"):
        return "exact", "onehot", "bounded"
    return ("quantiser" if name.endswith("_quantize") else "encoding",)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A case that is still to be drawn. `m`: its rows, where the backend takes them."""

    number: int
    group: Class
    pattern: str
    m: int


@dataclass(slots=True)
class _Claims:
    """What is known of a backend's claims of one op while cases are drawn. `kin`: supported problems by class, in the order of
    the list. `taken`: what no further case may repeat. `found`: the claim cases."""

    op: Op
    refused: Refused
    kin: dict[Class, list[Problem]]
    taken: set[tuple[Problem, str]]
    found: list[Case] = field(default_factory=list)

    def draw(self, wanted: Sequence[_Wanted]) -> list[_Wanted]:
        """Add the first supported problem of each wanted case; returns those of which none is supported. A backend is asked for
        one candidate of each at a time: `supports` may be slow."""
        pending = [(want, _candidates(self.op, want, tuple(self.kin.get(want.group, ())))) for want in wanted]
        failed: list[_Wanted] = []
        while pending:
            offered = [(want, candidates, next(candidates, None)) for want, candidates in pending]
            failed += [want for want, _, problem in offered if problem is None]
            asked = list(dict.fromkeys(problem for _, _, problem in offered if problem is not None))
            refused = dict(zip(asked, self.refused(asked), strict=True))
            pending = []
            for want, candidates, problem in offered:
                if problem is None:
                    continue
                if refused[problem] or (problem, want.pattern) in self.taken:
                    pending.append((want, candidates))
                    continue
                self.taken.add((problem, want.pattern))
                self.found.append(Case(problem, want.pattern, _SEEDS + want.number))
                if problem not in self.kin.setdefault(want.group, []):
                    self.kin[want.group].append(problem)
        return failed


def _candidates(op: Op, want: _Wanted, kin: Sequence[Problem]) -> Iterator[Problem]:
    """Problems for a wanted case, the preferred first: sizes of any kind, in whole tiles, and those of its kin."""
    variant, options = want.group
    stream = Stream("claim cases", _CLAIMED, op.name, want.number, want.pattern)
    for attempt in range(_CANDIDATES):
        plain, place = divmod(attempt, _CANDIDATES // 2)
        m = _pick(stream, _PLAIN_M) if plain else want.m
        near = kin[int(stream.integers(0, len(kin) - 1, (1,))[0])] if kin else None
        if place < len(_TILES):
            dims = _claimed_dims(op, dict(options), stream, m, _TILES[place], want.pattern in _PROBES and not plain)
        elif near is None:
            continue
        else:
            dims = dict(near.dims) | ({"m": m} if "m" in op.dims and place == len(_TILES) else {})
        if not _affordable(op, dims, want.pattern):
            continue
        try:
            yield make_problem(op, variant, dims, dict(options))
        except DomainError:
            continue


def _claimed_dims(op: Op, options: Mapping[str, str], stream: Stream, m: int, tile: int, probe: bool) -> dict[str, int]:
    """Sizes of a claim case, N and K (other ops: every matrix dim) in whole tiles. `probe`: with rows enough to light every k."""
    if not op.is_gemm:
        dims = _other_dims(op, stream)
        return {letter: -(-size // tile) * tile if letter in "mnk" else size for letter, size in dims.items()}
    dims = _gemm_dims(op, options, stream, int(stream.integers(0, (1 << 16) - 1, (1,))[0])) | {"m": max(m, 64) if probe else m}
    channelwise = dims.get("g") == dims["k"]
    step = math.lcm(tile, 1 if channelwise else dims.get("g") or op.ranges["k"][2])
    dims["k"] = -(-dims["k"] // step) * step
    dims["n"] = -(-dims["n"] // tile) * tile
    if probe:
        dims["k"] = min(dims["k"], max(step, 1536 // step * step))
        dims["n"] = min(dims["n"], max(tile, 64))
    if math.prod((dims["m"], dims["n"], dims["k"])) > _MOST_PRODUCTS:
        dims["n"] = math.lcm(tile, op.ranges["n"][2])
    return dims | ({"g": dims["k"]} if channelwise else {})


def _affordable(op: Op, dims: Mapping[str, int], pattern: str) -> bool:
    if not op.is_gemm:
        return math.prod(max(1, size) for letter, size in dims.items() if letter != "g") <= _LIMIT
    products = math.prod((dims["m"], dims["n"], dims["k"]))
    return products <= _MOST_PRODUCTS and not (pattern in _PROBES and dims["k"] > _MOST_RUNS * dims["m"])


def _lane_patterns(op: Op, lane: str) -> list[str]:
    """Patterns of a lane, of `exact` and `bounded` those that tell most."""
    found = [pattern for pattern in op.patterns if pattern not in _SEEDLESS and lane_of(op, pattern) == lane]
    return [pattern for pattern in found if pattern in _TELLING] or found


def claim_cases(op: Op, listed: Sequence[Listed], refused: Refused, *, per_op: int = PER_OP) -> list[Listed]:
    """The continuation of an op's list over what a backend claims (LVL-8): the same for every shard, machine and process.

    `listed`: the op's drawn cases, stored vectors and probes. A class is claimed where one of their problems is supported; a
    class of which they have none, where one drawn here is. First each claimed class gets a case in each of its lanes
    (`class_lanes`); then draws go round over claimed classes and patterns until `per_op` drawn cases are supported, or
    `_MOST_WANTED` times as many were wanted as were missing, or no class and no pattern gives another."""
    known = list(dict.fromkeys(item.case.problem for item in listed))
    kin: dict[Class, list[Problem]] = {}
    for problem, no in zip(known, refused(known), strict=True):
        if not no:
            kin.setdefault(class_of(problem), []).append(problem)
    standing = [
        item for item in listed if item.lane in DRAWN_LANES and item.case.problem in kin.get(class_of(item.case.problem), ())
    ]
    taken = {(item.case.problem, item.case.pattern) for item in listed}
    claims = _Claims(op, refused, kin, taken)
    held = {(class_of(item.case.problem), item.lane) for item in standing}
    listed_classes = {class_of(problem) for problem in known}
    unlisted = [group for group in _classes(op) if group not in listed_classes]
    absent = [
        (group, lane) for group in (*kin, *unlisted) for lane in class_lanes(op.name)
        if (group, lane) not in held and _lane_patterns(op, lane)
    ]
    number = 0
    for turn in range(_ROUNDS):
        wanted = []
        for place, (group, lane) in enumerate(absent):
            number += 1
            patterns, rows = _lane_patterns(op, lane), _LARGE_M if lane == "bounded" else _CLAIM_M
            pattern, m = patterns[(place + turn) % len(patterns)], rows[(place // 3 + turn) % len(rows)]
            wanted.append(_Wanted(number, group, pattern, m))
        failed = {want.number for want in claims.draw(wanted)}
        absent = [entry for entry, want in zip(absent, wanted, strict=True) if want.number in failed and entry[0] in kin]
    groups, patterns = list(kin), [pattern for pattern in op.patterns if pattern not in _SEEDLESS]
    missing = per_op - len(standing) - len(claims.found)
    most, barren, turn = number + _MOST_WANTED * missing, 0, 0
    while groups and missing > 0 and number < most and barren < len(groups) * len(patterns):
        wanted = []
        for _ in range(missing):
            number += 1
            lap, place = divmod(turn, len(groups))
            pattern, m = patterns[(lap + place) % len(patterns)], _CLAIM_M[(lap + place) % len(_CLAIM_M)]
            wanted.append(_Wanted(number, groups[place], pattern, m))
            turn += 1
        added = len(wanted) - len(claims.draw(wanted))
        barren = 0 if added else barren + len(wanted)
        missing -= added
    return [Listed(case, lane, level_of(lane)) for case in claims.found for lane in [lane_of(op, case.pattern)]]


def _classes(op: Op) -> Iterator[Class]:
    """Every class that the constraints on variant and options admit."""
    names = [option.name for option in op.options]
    for variant in op.variants:
        for tokens in product(*(option.tokens for option in op.options)):
            if possible_options(op, variant, dict(zip(names, tokens, strict=True))):
                yield variant, tuple(zip(names, tokens, strict=True))


def audit_list(op: Op) -> list[Listed]:
    """The probes of an op's accumulator: a battery per variant and choice of formats. Empty for ops that sum nothing."""
    return [
        Listed(case, lane, level_of(lane)) for problem in problems(op) for case in battery(op, problem)
        for lane in [lane_of(op, case.pattern)]
    ]


def _probe_sized(op: Op, case: Case) -> Case:
    """A probe lights one k per row: give it rows enough that few batches cover K, and a K of at most 1,536."""
    dims = dict(case.problem.dims)
    group = dims.get("g", 16) or 16
    if dims["k"] > 1536:
        dims["k"] = max(group, 1536 // group * group) if dims.get("g") != dims["k"] else dims["k"]
    dims["m"] = max(dims["m"], 64)
    dims["n"] = min(dims["n"], 64)
    try:
        return Case(make_problem(op, case.problem.variant, dims, dict(case.problem.options)), case.pattern, case.seed)
    except DomainError:
        return case


def manifest(listed: Sequence[Listed]) -> str:
    """Digest of a case list; shards of one run must agree on it."""
    return hashlib.sha256("\n".join(str(item.case) for item in listed).encode()).hexdigest()


def shard(listed: Sequence[Listed], index: int, count: int) -> list[Listed]:
    """Part `index` (1-based) of `count` of a list: by digest of the case id, so that a part does not depend on the others. The
    probes of one audit stay together: a fingerprint takes all of them."""
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count} does not exist: the first number runs from 1 to the second")

    def part(item: Listed) -> int:
        problem = item.case.problem
        kept = f"{problem.op}/{problem.variant}/{problem.options}" if item.lane == "audit" else str(item.case)
        return int.from_bytes(hashlib.sha256(kept.encode()).digest()[:8], "big") % count

    return [item for item in listed if part(item) == index - 1]


