"""The AscendC host emulation: every rule is raised by a planted program and kept by its clean counterpart; layouts, casts and
vector arithmetic are compared with numbers derived here, in integers or by order; the sanitizers find nothing in it."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.kernels.ascend_room.build import EMULATION, cache_folder, source_digest
from lowbit.kernels.ascend_room.rules import ASSUMPTIONS, EMULATION_VERSION, RULES

PROGRAMS = Path(__file__).parent / "ascend_programs"
BASE = ("g++", "-std=c++17", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread")
READ, WRITE, FILLED = 1, 2, 4

FAULTS = {
    "flags": {
        "NO_MTE2_V": "SYNC-READ", "NO_BARRIER": "SYNC-SAME-PIPE", "NO_V_MTE2": "SYNC-WRITE", "EVENT_EIGHT": "FLAG-ID",
        "SET_TWICE": "FLAG-SET-TWICE", "WAIT_UNSET": "FLAG-UNSET", "SET_LEFT": "FLAG-LEFTOVER",
        "SCALAR_BARRIER": "BARRIER-SCALAR", "CUBE_PIPE": "CORE-PIPE", "NINE_EVENTS": "EVENT-EXHAUSTED",
        "SET_TOO_EARLY": "SYNC-READ", "SECOND_PIPE": "TPIPE-SECOND",
    },
    "queues": {
        "THIRD_TENSOR": "QUEUE-ALLOC", "ENQUE_TWICE": "QUEUE-DEPTH", "DEQUE_EMPTY": "QUEUE-EMPTY", "FREE_TWICE": "QUEUE-TENSOR",
        "NEVER_FREED": "QUEUE-LEFTOVER", "STILL_QUEUED": "QUEUE-LEFTOVER", "TOO_MANY_BYTES": "MEMORY-OVERFLOW",
        "TOO_MANY_BUFFERS": "BUFFER-COUNT", "CUBE_BUFFER": "CORE-MEMORY", "PAST_BUFFER": "LOCAL-RANGE",
        "NO_BUFFER": "TENSOR-EMPTY", "NEVER_WRITTEN": "UNINIT-LOCAL",
    },
    "copies": {
        "PAST_ARGUMENT": "GM-RANGE", "PAST_TENSOR": "GM-RANGE", "OUTSIDE": "GM-RANGE", "READ_OUTPUT": "GM-READ",
        "WRITE_INPUT": "GM-WRITE", "READ_UNWRITTEN": "UNINIT-GM", "PART_BLOCK": "COPY-LENGTH", "PART_ELEMENT": "COPY-LENGTH",
        "MISALIGNED": "ALIGN", "NO_ROWS": "PARAM-RANGE", "WIDE_FIELD": "FIELD-RANGE", "NEGATIVE_FIELD": "FIELD-RANGE",
        "DUMMY_BYTES": "UNINIT-LOCAL", "SHORT_PADDING": "UNINIT-LOCAL", "SCALAR_TOO_EARLY": "SYNC-READ",
    },
    "vectors": {
        "SHIFTED_IN_PLACE": "VECTOR-OVERLAP", "ONE_BLOCK_TWICE": "VECTOR-OVERLAP", "FLOAT_AND": "VECTOR-TYPES",
        "BYTE_ADD": "VECTOR-TYPES", "CAST_FLOOR_UP": "CAST-MODE", "INT_WRAPS": "INT-OVERFLOW", "MASK_WIDE": "MASK-RANGE",
        "MASK_NONE": "MASK-RANGE", "MASK_KEPT_BY_NOBODY": "MASK-STALE", "MASK_OVERWRITTEN": "MASK-STALE",
        "MASK_LEFT": "MASK-LEFTOVER", "COUNTER_LEFT": "MASK-LEFTOVER", "REPEAT_WIDE": "FIELD-RANGE",
        "COUNT_NEGATIVE": "PARAM-RANGE", "SHIFT_WIDE": "PARAM-RANGE", "WITH_INDEX": "NOT-MODELLED",
        "MASK_FILLED_BY_BRCB": "MASK-STALE", "REDUCED_UNALIGNED": "ALIGN",
    },
    "cube": {
        "ROWS_OVERLAP": "COPY-OVERLAP", "OUTPUT_OVERLAP": "COPY-OVERLAP", "NO_MTE2_MTE1": "SYNC-READ",
        "NO_M_BARRIER": "SYNC-SAME-PIPE", "NO_M_FIX": "SYNC-READ", "WRONG_TYPES": "MMAD-TYPES", "WRONG_OUTPUT": "FIXPIPE-TYPES",
        "VECTOR_ROW": "NOT-MODELLED", "FRAMEWORK_EVENT": "TPIPE-EVENT", "FRAMEWORK_EVENT_SET": "FLAG-SET-TWICE",
        "L1_RESULT": "TENSOR-PLACE", "L0A_UNALIGNED": "ALIGN", "ROWS_UNWRITTEN": "UNINIT-LOCAL",
        "ACCUMULATES_NOTHING": "UNINIT-LOCAL", "INT_OVERFLOWS": "INT-OVERFLOW", "VECTOR_PIPE": "CORE-PIPE",
        "L0A_FULL": "MEMORY-OVERFLOW", "BYTES_CLEARED": "INIT-TYPES", "STORES_PAST_N": "UNINIT-LOCAL",
        "CLEARS_UNORDERED": "SYNC-SAME-PIPE", "NO_MATRIX_STRIDE": "PARAM-RANGE",
    },
    "cross": {
        "NO_FULL_WAIT": "SYNC-CROSS-CORE", "NO_FREE_WAIT": "SYNC-SAME-PIPE", "DRAIN_TOO_MANY": "SYNC-DEADLOCK",
        "SIXTEEN_SETS": "CROSS-COUNT", "FLAG_ELEVEN": "CROSS-ID", "MODE_FOUR": "CROSS-MODE", "SET_LEFT": "CROSS-LEFTOVER",
        "ONE_SIDED_SET": "CROSS-LEFTOVER", "FREE_TOO_EARLY": "SYNC-CROSS-CORE", "WRONG_PIPE": "SYNC-CROSS-CORE",
    },
}
LAUNCH_RULES = {"LAUNCH-ARGUMENTS", "LAUNCH-MODE", "LAUNCH-FAILED"}
PLANTED = [(program, fault, rule) for program, faults in FAULTS.items() for fault, rule in faults.items()]

Array = npt.NDArray[Any]


class Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("reserved", ctypes.c_uint32))


@cache
def build(name: str, *flags: str) -> Path:
    """The driver with all programs, compiled with `flags`; named by sources, flags and kind of machine, so never built twice."""
    named = (source_digest(EMULATION, PROGRAMS), BASE, flags, platform.machine())
    digest = hashlib.sha256(repr(named).encode()).hexdigest()[:24]
    path: Path = cache_folder() / f"emulation_{name}_{digest}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "made"
        command = [*BASE, *flags, f"-I{PROGRAMS}", f"-I{EMULATION}", str(PROGRAMS / "driver.cpp"), "-o", str(made), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        os.replace(made, path)
    return path


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build("library", "-O0", "-fPIC", "-shared")))
    loaded.lowbit_program.restype = ctypes.c_int
    loaded.lowbit_program.argtypes = (
        ctypes.c_char_p, ctypes.c_int32, ctypes.c_uint32, ctypes.POINTER(Buffer), ctypes.c_size_t, ctypes.c_char_p,
        ctypes.c_size_t,
    )
    return loaded


@cache
def fault_number(program: str, fault: str) -> int:
    source = (PROGRAMS / f"{program}.cpp").read_text(encoding="utf-8")
    found = re.search(r"enum : uint32_t \{(.*?)\}", source, re.S)
    assert found is not None
    return [name.strip() for name in found[1].split(",")].index(fault)


def launch(
    program: str, given: Array, result: Array, fault: int = 0, words: Sequence[int] = (), blocks: int = 1, mode: int = -1,
    count: int = 4,
) -> tuple[int, str]:
    """Status and message of one launch: `given` is read, `result` written, tiling is the fault number and `words`."""
    space = np.zeros(1 << 16, np.uint8)
    tiling = np.array([fault, *words, *[0] * (4 - len(words))], np.uint32)
    flags = ((given, READ | FILLED), (result, WRITE), (space, READ | WRITE), (tiling, READ | FILLED))
    buffers = (Buffer * 4)(*[Buffer(array.ctypes.data, array.nbytes, flag, 0) for array, flag in flags])
    message = ctypes.create_string_buffer(1024)
    status = library().lowbit_program(program.encode(), mode, blocks, buffers, count, message, len(message))
    return status, message.value.decode()


def planted(program: str, fault: str) -> tuple[int, str]:
    """The default launch of a program: enough data for it, and a fault of it."""
    words = {"cube": (20, 24, 256, 1 if fault == "INT_OVERFLOWS" else 2), "copies": (3,)}.get(program, ())
    given = np.full(1 << 16, 0x80 if fault == "INT_OVERFLOWS" else 0, np.uint8)
    return launch(program, given, np.zeros(1 << 16, np.uint8), fault_number(program, fault), words)


def run(program: str, given: Array, result: Array, words: Sequence[int] = (), blocks: int = 1) -> None:
    status, message = launch(program, given, result, 0, words, blocks)
    assert (status, message) == (0, "")


# ---- the table of rules


def test_table_and_headers_name_the_same_rules() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(EMULATION.glob("*.h")))
    raised = set(re.findall(r'Fail\(\s*"([A-Z0-9-]+)"', text)) | set(re.findall(r'"([A-Z]+-[A-Z]+): got', text))
    assert raised == {rule.id for rule in RULES}
    assert len(RULES) == len({rule.id for rule in RULES})
    assert EMULATION_VERSION


def test_every_rule_is_planted() -> None:
    assert {rule for _, _, rule in PLANTED} | LAUNCH_RULES == {rule.id for rule in RULES}
    for program, faults in FAULTS.items():  # and every fault of every program is in the table
        assert [fault_number(program, fault) for fault in faults] == list(range(1, len(faults) + 1))


def test_every_rule_has_a_source() -> None:
    for rule in (*RULES, *ASSUMPTIONS):
        named = all(re.fullmatch(r"[\w.-]+/[\w.-]+ \S+\.(md|h|hpp)", part) for part in rule.source.split("; "))
        assert named or (rule.source.startswith("none: ") and rule.id in LAUNCH_RULES and rule.assumed), rule
        assert rule.sentence.endswith(".")
    assert all(rule.assumed for rule in ASSUMPTIONS)
    assert not {rule.id for rule in ASSUMPTIONS} & {rule.id for rule in RULES}


@pytest.mark.parametrize(("program", "fault", "rule"), PLANTED)
def test_planted_fault(program: str, fault: str, rule: str) -> None:
    status, message = planted(program, fault)
    assert status == 1
    assert message.startswith(f"{rule}: got "), message
    assert ", expected " in message
    assert f"(kernel {program}" in message


@pytest.mark.parametrize("program", list(FAULTS))
def test_clean_program(program: str) -> None:
    assert planted(program, "NONE") == (0, "")


def test_planted_faults_are_deterministic() -> None:
    seen = {planted("cross", fault) for fault in ("NO_FULL_WAIT",) for _ in range(5)}
    assert len(seen) == 1


# ---- launches


def test_wrong_number_of_buffers_or_blocks() -> None:
    space = np.zeros(64, np.uint8)
    for blocks, count in ((1, 3), (0, 4)):
        status, message = launch("flags", space, space, blocks=blocks, count=count)
        assert status == 1
        assert message.startswith("LAUNCH-ARGUMENTS: got ")


def test_overlapping_buffers() -> None:
    space = np.zeros(4096, np.uint8)
    for result, status in ((space, 1), (space[2048:], 1), (np.zeros(4096, np.uint8), 0)):
        assert launch("queues", space, result)[0] == status
    assert launch("queues", space, space)[1].startswith("LAUNCH-ARGUMENTS: got 4 buffers that overlap")


def test_wrong_cores() -> None:
    status, message = launch("queues", np.zeros(4096, np.uint8), np.zeros(4096, np.uint8), mode=2)
    assert status == 1
    assert message.startswith("LAUNCH-MODE: got ")


def test_impossible_buffer() -> None:
    huge = (Buffer * 4)(Buffer(None, 1 << 62, WRITE, 0), *[Buffer(None, 0, READ, 0)] * 3)
    message = ctypes.create_string_buffer(512)
    assert library().lowbit_program(b"flags", -1, 1, huge, 4, message, len(message)) == 1
    assert message.value.startswith(b"LAUNCH-FAILED: got ")


def test_message_names_where() -> None:
    _, message = planted("cross", "DRAIN_TOO_MANY")
    assert "block 0, AIC waits for cross-core flag 1" in message
    _, message = planted("flags", "NO_MTE2_V")
    for part in ("Muls on pipe V", "MTE2_V", "UB byte 0", "block 0, AIV"):
        assert part in message


def test_short_message_buffer_is_respected() -> None:
    message = ctypes.create_string_buffer(b"x" * 12, 12)
    assert library().lowbit_program(b"flags", -1, 0, None, 0, message, 8) == 1
    assert message.raw == b"LAUNCH-\0xxxx"


def test_launches_at_once_do_not_meet() -> None:
    def one(number: int) -> bool:
        given = np.full(1024, number, np.float32)
        result = np.zeros(1024, np.float32)
        run("queues", given, result)
        return bool((result == 2 * number).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(24)))


@pytest.mark.parametrize("blocks", [1, 3])
def test_cores_of_a_block_hand_over(blocks: int) -> None:
    given = np.ones(512, np.float16)  # 16 products of ones, plus 1
    result = np.zeros(blocks * 6 * 256, np.float32)
    run("cross", given, result, blocks=blocks)
    assert (result == 17).all()


@pytest.mark.parametrize("flags", [("-fsanitize=address,undefined",), ("-fsanitize=thread",)])
def test_sanitizers_find_nothing(flags: tuple[str, ...]) -> None:
    program = build("sanitized", "-O0", "-DLOWBIT_MAIN", "-fno-sanitize-recover=all", *flags)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    seen = {(name, int(fault)): rule for name, fault, rule in re.findall(r"^(\w+) (\d+) \d ?([A-Z0-9-]*)", done.stdout, re.M)}
    wanted = {(name, fault_number(name, fault)): rule for name, fault, rule in PLANTED if fault != "INT_OVERFLOWS"}
    assert {key: seen[key] for key in wanted} == wanted
    assert all(seen[name, 0] == "" for name in (*FAULTS, "casts"))


# ---- copies and layouts


def test_padded_rows() -> None:
    given = np.arange(1, 16).astype(np.float16)  # 3 rows of 5
    result = np.zeros(64, np.float16)
    run("copies", given, result, (3,))
    # 2 halves of padding, the row, padding: 7 halves of each padded row go out, 3 apart
    for row in range(3):
        assert result[10 * row : 10 * row + 7].tolist() == [-1, -1, *range(1 + 5 * row, 6 + 5 * row)]
    assert (result[[7, 8, 9, 17, 18, 19, *range(27, 64)]] == 0).all()


def nibbles(values: Array) -> Array:
    codes = values.astype(np.uint8) & 15
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def bfloat16(values: Array) -> Array:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


CUBE: dict[int, tuple[int, int, int, Callable[[Array], Array]]] = {  # d: lowest, highest value, elements of 32 bytes, storage
    0: (-8, 7, 64, nibbles),
    1: (-128, 127, 32, lambda values: values.astype(np.int8)),
    2: (-16, 16, 16, lambda values: values.astype(np.float16)),
    3: (-16, 16, 16, bfloat16),
}


@pytest.mark.parametrize("kind", CUBE)
@pytest.mark.parametrize(("m", "n", "blocks"), [(16, 16, 1), (37, 50, 3), (128, 16, 8), (2, 128, 2), (17, 1, 4)])
def test_matrix_product(kind: int, m: int, n: int, blocks: int) -> None:
    """Integers of all types, so that every order of summation gives the same: C = 2 A B^T in int64."""
    low, high, wide, store = CUBE[kind]
    generator = np.random.default_rng(100 * m + n)
    a, b = (generator.integers(low, high + 1, (rows, blocks * wide)) for rows in (m, n))
    a[0, :], b[0, 0] = low, low
    given = np.concatenate([store(a).ravel(), store(b).ravel()]).view(np.uint8)
    result = np.zeros((m, n), np.int32 if kind < 2 else np.float32)
    run("cube", given, result, (m, n, 32 * blocks, kind))
    assert (result.astype(np.int64) == 2 * (a @ b.T)).all()


def test_half_products_are_added_one_after_the_other() -> None:
    """What MODEL-CUBE-FLOAT takes for true. 2^24 + 1 is a tie that falls: ones after 2^24 are lost one by one, ones before it
    make 2^24 + 15, a tie that rises to 2^24 + 16. The second product starts from the first: 2^25 and 2^25 + 16."""
    a = np.ones((2, 16), np.float16)
    a[0, 0], a[1, 15] = 4096, 4096
    result = np.zeros((2, 2), np.float32)
    run("cube", np.concatenate([a, a]).view(np.uint8).ravel(), result, (2, 2, 32, 2))
    assert result.tolist() == [[2.0**25, 16412.0], [16412.0, 2.0**25 + 16]]  # 2 (4096 + 14 + 4096) beside the diagonal


def test_long_products_need_no_barrier() -> None:
    for m, n, status in ((64, 48, 0), (48, 48, 1)):  # 12 and 9 fractals of C
        words = (m, n, 32, 2)
        got = launch("cube", np.zeros(8192, np.uint8), np.zeros(m * n, np.float32), fault_number("cube", "NO_M_BARRIER"), words)
        assert got[0] == status


# ---- vector instructions


def test_strides_masks_reduction_broadcast() -> None:
    given = np.random.default_rng(3).integers(-1000, 1000, 256).astype(np.float32)
    result = np.zeros(648, np.float32)
    run("vectors", given, result)
    number = [int(value) for value in given]
    for i in range(256):
        assert result[i] == (number[i] ** 2 if i % 64 < 40 else 7)
        assert result[256 + i] == number[i] * number[i // 8]
    assert result[512:516].tolist() == [max(number[64 * r : 64 * r + 50]) for r in range(4)]
    for i in range(64):
        assert result[520 + i] == (3 * number[i] if 0xF0F0F0F0F0F0F0F0 >> i & 1 else 7)
        assert result[584 + i] == (2 * number[i] if i < 33 else 7)


NONE, RINT, FLOOR, CEIL, ROUND, TRUNC, ODD = range(7)


def rounded(value: float, mode: int) -> int:
    """A finite number to an integer; binary64 holds every value and half of these tests exactly."""
    if mode == FLOOR:
        return math.floor(value)
    if mode == CEIL:
        return math.ceil(value)
    if mode == TRUNC:
        return math.trunc(value)
    if mode == ROUND:
        return math.floor(abs(value) + 0.5) * (1 if value > 0 else -1)
    return round(value)


def apply(which: int, given: Array, result: Array, amount: int) -> None:
    run("casts", given, result, (which, amount, given.size if which not in BINARY else given.size // 2))


BINARY = frozenset(range(8, 19)) | {20}


@cache
def all_halves() -> tuple[Array, list[float]]:
    bits = np.arange(1 << 16, dtype=np.uint16)
    return bits, [struct.unpack("<e", struct.pack("<H", code))[0] for code in range(1 << 16)]


@pytest.mark.parametrize("mode", [NONE, RINT, FLOOR, CEIL, ROUND, TRUNC])
@pytest.mark.parametrize(("which", "low", "high"), [(2, -8, 7), (3, 0, 255)])
def test_half_to_integers(which: int, low: int, high: int, mode: int) -> None:
    bits, values = all_halves()
    for part in (slice(0, 32768), slice(32768, 65536)):
        packed = np.zeros(32768 // (2 if which == 2 else 1), np.uint8)
        apply(which, bits[part], packed, mode)
        got = np.stack([packed & 15, packed >> 4], 1).ravel().astype(np.int64) if which == 2 else packed.astype(np.int64)
        clamped = [
            0 if math.isnan(value) else low if value == -math.inf else high if value == math.inf
            else min(max(rounded(value, RINT if mode == NONE else mode), low), high)
            for value in values[part]
        ]
        assert (got == np.array(clamped) % 16 if which == 2 else got == np.array(clamped)).all()


def test_half_to_float_is_exact() -> None:
    bits, values = all_halves()
    result = np.zeros(16384, np.float32)
    for start in range(0, 65536, 16384):
        apply(0, bits[start : start + 16384], result, NONE)
        wanted = np.array(values[start : start + 16384], np.float64).astype(np.float32)  # 11 bits fit 24
        number = ~np.isnan(wanted)
        assert (np.isnan(result) == ~number).all()
        assert (result.view(np.uint32)[number] == wanted.view(np.uint32)[number]).all()


def near_halves() -> Array:
    """Floats at, halfway between and one step around every pair of neighbouring halves, and far outside."""
    _, values = all_halves()
    finite = np.array(sorted({value for value in values if math.isfinite(value)}))
    middles = (finite[1:] + finite[:-1]) / 2  # exact: 12 significant bits
    far = [65519.996, 65520, 65536, 1e30, 3.4e38, 2.0**-26, 2.0**-25, 2.0**-140]
    floats = np.concatenate([finite, middles, far]).astype(np.float32)
    around = [floats, np.nextafter(floats, np.float32(np.inf)), np.nextafter(floats, np.float32(-np.inf))]
    return np.unique(np.concatenate([*around, *[-part for part in around]]))


@pytest.mark.parametrize("mode", [NONE, RINT, FLOOR, CEIL, ROUND, TRUNC, ODD])
def test_float_to_half(mode: int) -> None:
    """Against the order of the halves: the neighbours of a float are found by search, the mode picks one of them."""
    given = near_halves()
    result = np.zeros(given.size, np.uint16)
    step = 16384
    for start in range(0, given.size, step):
        part = given[start : start + step]
        padded = np.zeros(-(-part.size // 16) * 16, np.float32)
        padded[: part.size] = part
        out = np.zeros(padded.size, np.uint16)
        apply(1, padded, out, mode)
        result[start : start + step] = out[: part.size]
    # magnitudes in units of 2^-24 are integers; 65536 stands in for infinity, as rounding treats it
    grid = np.array([math.ldexp(struct.unpack("<e", struct.pack("<H", code))[0], 24) for code in range(0x7C00)] + [2.0**40])
    size = np.abs(given.astype(np.float64)) * 2.0**24
    below = np.minimum(np.searchsorted(grid, size, side="right") - 1, 0x7C00)
    exact = grid[below] == size
    above = np.minimum(below + 1, 0x7C00)
    low, high = size - grid[below], grid[above] - size
    away = {
        NONE: (low > high) | ((low == high) & (below % 2 == 1)), RINT: (low > high) | ((low == high) & (below % 2 == 1)),
        FLOOR: given < 0, CEIL: given > 0, ROUND: low >= high, TRUNC: np.zeros(given.size, bool), ODD: below % 2 == 0,
    }[mode]
    code = np.where(exact | ~away, below, above)
    beyond = size >= grid[0x7C00]
    outwards = {FLOOR: given < 0, CEIL: given > 0}.get(mode, np.full(given.size, mode in (NONE, RINT, ROUND)))
    code = np.where(beyond, np.where(outwards, 0x7C00, 0x7BFF), code)
    assert (result == (code | np.where(np.signbit(given), 0x8000, 0))).all()


@pytest.mark.parametrize("mode", [RINT, FLOOR, CEIL, ROUND, TRUNC])
def test_float_to_integer_valued_float_and_int32(mode: int) -> None:
    small = [0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 1e-40, -1e-40, 7.25, -7.75]
    given = np.array([*small, 8388607.5, 8388609.0, -8388607.5, 2147483520.0], np.float32)
    result, number = np.zeros(16, np.float32), np.zeros(16, np.int32)
    apply(5, given, result, mode)
    apply(7, given, number, mode)
    wanted = [rounded(float(value), mode) for value in given]
    assert result.tolist() == wanted
    assert number.tolist() == wanted
    assert (np.signbit(result) == np.signbit(given)).all()
    apply(7, np.array([np.inf, -np.inf, np.nan, 3e9, -3e9, 2.0**31, -(2.0**31), 0] * 2, np.float32), number, mode)
    assert number.tolist() == [2**31 - 1, -(2**31), 0, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0] * 2


def test_integers_to_floats() -> None:
    wide = np.array([0, 1, -1, 2**24, 2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, -(2**31), 16777219, 3136, -4096], np.int32)
    given = np.resize(wide, 16)
    result = np.zeros(16, np.float32)
    apply(6, given, result, RINT)  # ties to even: 2^24 + 1 falls, 2^24 + 3 rises
    named = {2**24 + 1: 2.0**24, 2**24 + 3: 2.0**24 + 4, -(2**24) - 1: -(2.0**24), 2**31 - 1: 2.0**31}
    assert result.tolist() == [named.get(int(value), float(value)) for value in given]
    narrow = np.array([0, 255, -1, 2047, 2049, 2051, -2049, 32767] * 2, np.int16)
    half = np.zeros(16, np.float16)
    apply(4, narrow, half, RINT)
    assert half.tolist() == [0, 255, -1, 2047, 2048, 2052, -2048, 32768] * 2
    upper = np.zeros(16, np.float32)
    apply(19, np.array([0x3F80, 0xC040, 0x0001, 0x7F80] * 4, np.uint16), upper, NONE)  # 1, -3, 2^-133, infinity
    assert upper.tolist() == [1.0, -3.0, 2.0**-133, math.inf] * 4


def pairs(left: Sequence[float], right: Sequence[float], dtype: Any) -> Array:
    return np.array([*left, *right], dtype)


def test_float_arithmetic_rounds_once() -> None:
    one, tiny = 2.0**0, 2.0**-149
    left = [one, one, 3.0, 1.0, tiny, 2.0**-126, 1.0, -1.0]
    right = [2.0**-24, 2.0**-24 * 3, 7.0, 3.0, tiny, 0.5, 0.0, 0.0]
    given = pairs(left * 2, right * 2, np.float32)
    result = np.zeros(16, np.float32)
    apply(8, given, result, 0)
    assert result[:6].tolist() == [1.0, 1.0 + 2.0**-22, 10.0, 4.0, 2 * tiny, 0.5]  # both ties go to the even neighbour
    apply(9, given, result, 0)
    assert result[2:5].tolist() == [-4.0, -2.0, 0.0]
    apply(10, given, result, 0)
    assert result[2:6].tolist() == [21.0, 3.0, 0.0, 2.0**-127]
    apply(11, given, result, 0)
    third = 11184811 * 2.0**-25  # 1/3 to 24 bits: 2^25 / 3 = 11184810.67
    assert [result[3], result[4], result[6], result[7]] == [third, 1.0, math.inf, -math.inf]
    half = np.zeros(16, np.float16)
    apply(12, pairs([2049 / 2048, 300.0] * 8, [1.0, 300.0] * 8, np.float16), half, 0)
    assert half[1] == math.inf


def test_bits_shifts_and_limits() -> None:
    words = pairs([0x1234, 0xFFFF, 0x8000, 0] * 4, [0x0FF0, 0x00F0, 0xFFFF, 1] * 4, np.uint16)
    result = np.zeros(16, np.uint16)
    apply(13, words, result, 0)
    assert result[:4].tolist() == [0x0230, 0x00F0, 0x8000, 0]
    apply(14, words, result, 0)
    assert result[:4].tolist() == [0x1FF4, 0xFFFF, 0xFFFF, 1]
    apply(15, words, result, 4)
    assert result[:4].tolist() == [0x0123, 0x0FFF, 0x0800, 0]
    signed = np.zeros(16, np.int16)
    apply(16, words.view(np.int16), signed, 4)
    assert signed[:4].tolist() == [0x0123, -1, -2048, 0]
    limits = np.zeros(16, np.float32)
    given = pairs([-9.0, -1.5, 0.0, math.nan] * 4, [0.0] * 16, np.float32)
    apply(17, given, limits, 0)
    assert limits[:3].tolist() == [-1.5, -1.5, 0.0]
    assert math.isnan(limits[3])
    apply(18, pairs([9.0, 2.5, -3.0, math.nan] * 4, [0.0] * 16, np.float32), limits, 0)
    assert limits[:3].tolist() == [2.5, 2.5, -3.0]
    assert math.isnan(limits[3])
    differences = np.zeros(16, np.int32)
    apply(20, pairs([5, -7] * 8, [9, -9] * 8, np.int32), differences, 0)
    assert differences[:2].tolist() == [-4, 2]
