"""Layouts: every expected byte here is written by hand, derived from a register map, or printed by CUTLASS itself."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.references.formats import BF16, E4M3FN, F64, INT4
from lowbit.references.layouts import (
    AWQ,
    COMPRESSED_TENSORS,
    COMPRESSED_TENSORS_ZEROS,
    GPTQ,
    INT32_K,
    INT32_N,
    LAYOUTS,
    NIBBLE_HIGH_FIRST,
    NIBBLE_LOW_FIRST,
    REORDER_E4M3,
    SCALE_SWIZZLE,
    SCALE_TRANSPOSED_256,
    UNIFIED_INT4,
    ZEROS_N,
    Axis,
    Digit,
    Layout,
    NibbleOrder,
    Padding,
    canonical,
    column_major,
    nbytes,
    offset,
    pack,
    padding_mask,
    row_major,
    storage_shape,
    unpack,
)

Matrix = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

PLAIN_SHAPES = ((1, 1), (3, 5), (7, 2), (1, 9))
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "nibble_low_first": ((1, 2), (3, 10), (7, 6), (5, 14)),
    "nibble_high_first": ((1, 2), (3, 10), (7, 6), (5, 14)),
    "int32_k": ((1, 8), (3, 24), (7, 40), (40, 8)),
    "gptq": ((1, 8), (3, 24), (7, 40), (40, 8)),
    "int32_n": ((8, 1), (24, 3), (40, 7), (8, 40)),
    "awq": ((8, 1), (24, 3), (40, 7), (8, 40)),
    "compressed_tensors": ((1, 1), (3, 13), (7, 24), (2, 7), (5, 9)),
    "zeros_n": ((8, 1), (24, 3), (40, 7)),
    "compressed_tensors_zeros": ((1, 1), (13, 3), (24, 7), (7, 2), (9, 5)),
    "scale_swizzle": ((1, 1), (33, 5), (129, 3), (300, 9), (128, 4), (90, 12)),
    "scale_transposed_256": ((1, 1), (3, 5), (257, 2), (256, 3)),
    "reorder_e4m3": ((16, 32), (48, 32), (16, 96), (48, 160), (80, 64)),
    **{f"{order}_{bits}": PLAIN_SHAPES for order in ("row_major", "column_major") for bits in (8, 16, 32)},
}
CASES = [
    pytest.param(LAYOUTS[name], *shape, id=f"{name}-{shape[0]}x{shape[1]}") for name, shapes in SHAPES.items() for shape in shapes
]
NARROW_CASES = [
    pytest.param(layout, *shape, id=f"{layout.name}-{shape[0]}x{shape[1]}")
    for layout in LAYOUTS.values() if layout.bits <= 8 for shape in SHAPES[layout.name]
]
INT4_LAYOUTS = [layout for layout in LAYOUTS.values() if layout.bits == 4]


def scatter(bits: int, rows: int, cols: int) -> Matrix:
    """Codes without a short period: the top bits of a multiplicative hash of the element number."""
    return (np.arange(1, rows * cols + 1, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(32 - bits)).reshape(rows, cols)


def pack_scalar(codes: Matrix, layout: Layout) -> Bytes:
    """`pack` by the scalar definition, in Python integers."""
    rows, cols = codes.shape
    value = 0
    for row in range(rows):
        for col in range(cols):
            byte, shift = offset(layout, row, col, rows, cols)
            value |= int(codes[row, col]) << (8 * byte + shift)
    return np.frombuffer(value.to_bytes(nbytes(layout, rows, cols), "little"), dtype=np.uint8)


def unpack_scalar(buffer: Bytes, layout: Layout, rows: int, cols: int) -> Matrix:
    """`unpack` by the scalar definition, in Python integers."""
    value = int.from_bytes(buffer.tobytes(), "little")
    places = [[offset(layout, row, col, rows, cols) for col in range(cols)] for row in range(rows)]
    codes = [[value >> (8 * byte + shift) & ((1 << layout.bits) - 1) for byte, shift in line] for line in places]
    return np.array(codes, dtype=np.uint64).reshape(rows, cols)


def slots_of(packer: Callable[[Matrix, Layout], Bytes], layout: Layout, rows: int, cols: int) -> Matrix:
    """Slot of every element, read back from what `packer` writes: element numbers from 1 go through it in code-sized pieces."""
    numbers = np.arange(1, rows * cols + 1, dtype=np.uint64).reshape(rows, cols)
    per_slot = np.zeros(8 * nbytes(layout, rows, cols) // layout.bits, dtype=np.uint64)
    for low in range(0, (rows * cols).bit_length(), layout.bits):
        pieces = (numbers >> np.uint64(low) & np.uint64((1 << layout.bits) - 1)).astype(np.uint32)
        data = packer(pieces, layout)
        if layout.bits == 4:
            data = np.array([half for byte in data.tolist() for half in (byte % 16, byte // 16)], dtype=np.uint8)
        else:
            data = data.view(f"<u{layout.bits // 8}")
        per_slot |= data.astype(np.uint64) << np.uint64(low)
    slots = np.full(rows * cols, -1, dtype=np.int64)
    used = np.flatnonzero(per_slot)
    slots[per_slot[used].astype(np.int64) - 1] = used
    return slots.reshape(rows, cols)


# ---- any layout


def test_every_layout_has_shapes() -> None:
    assert set(SHAPES) == set(LAYOUTS)
    assert all(layout.source for layout in LAYOUTS.values())


@pytest.mark.parametrize(("layout", "rows", "cols"), CASES)
def test_offset_is_an_injection_and_the_rest_is_padding(layout: Layout, rows: int, cols: int) -> None:
    places = [offset(layout, row, col, rows, cols) for row in range(rows) for col in range(cols)]
    slots = [(8 * byte + shift) // layout.bits for byte, shift in places]
    assert all((8 * byte + shift) % layout.bits == 0 and 0 <= shift < 8 for byte, shift in places)
    mask = padding_mask(layout, rows, cols)
    assert mask.shape == (8 * nbytes(layout, rows, cols) // layout.bits,)
    assert len(set(slots)) == rows * cols
    assert set(slots) == set(np.flatnonzero(~mask).tolist())
    (lead, last), word = storage_shape(layout, rows, cols)
    assert lead * last * word.itemsize == nbytes(layout, rows, cols)


@pytest.mark.parametrize(("layout", "rows", "cols"), CASES)
def test_array_twins_move_every_element_where_offset_says(layout: Layout, rows: int, cols: int) -> None:
    places = [[offset(layout, row, col, rows, cols) for col in range(cols)] for row in range(rows)]
    slots = np.array([[(8 * byte + shift) // layout.bits for byte, shift in line] for line in places])
    assert np.array_equal(slots_of(pack, layout, rows, cols), slots)
    codes = scatter(layout.bits, rows, cols)
    packed = pack(codes, layout)
    assert packed.dtype == np.uint8
    assert np.array_equal(packed, pack_scalar(codes, layout))
    assert np.array_equal(unpack(packed, layout, rows, cols), codes)
    assert np.array_equal(unpack_scalar(packed, layout, rows, cols), codes)


@pytest.mark.parametrize(("layout", "rows", "cols"), NARROW_CASES)
def test_every_code_survives_in_every_place(layout: Layout, rows: int, cols: int) -> None:
    ramp = np.arange(rows * cols, dtype=np.uint16).reshape(rows, cols)
    for turn in range(1 << layout.bits):
        codes = ((ramp + turn) % (1 << layout.bits)).astype(np.uint8)
        assert np.array_equal(unpack(pack(codes, layout), layout, rows, cols), codes)


@pytest.mark.parametrize("layout", INT4_LAYOUTS, ids=repr)
def test_neighbours_do_not_leak_into_each_other(layout: Layout) -> None:
    rows, cols = SHAPES[layout.name][1]
    for row in range(rows):
        for col in range(cols):
            codes = np.zeros((rows, cols), dtype=np.uint8)
            codes[row, col] = 15
            byte, shift = offset(layout, row, col, rows, cols)
            packed = pack(codes, layout)
            assert np.flatnonzero(packed).tolist() == [byte]
            assert packed[byte] == 15 << shift


@pytest.mark.parametrize(("layout", "rows", "cols"), CASES)
def test_padding_is_written_as_zero_and_read_by_nobody(layout: Layout, rows: int, cols: int) -> None:
    codes = np.full((rows, cols), (1 << layout.bits) - 1, dtype=np.uint32)
    mask = np.repeat(padding_mask(layout, rows, cols), layout.bits)
    bits = np.unpackbits(pack(codes, layout), bitorder="little").astype(np.bool_)
    assert np.array_equal(bits, ~mask)
    poisoned = np.packbits(mask, bitorder="little")
    assert not unpack(poisoned, layout, rows, cols).any()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=repr)
def test_results_never_share_memory_with_arguments(layout: Layout) -> None:
    rows, cols = SHAPES[layout.name][1]
    codes = np.ones((rows, cols), dtype=f"u{max(layout.bits // 8, 1)}")
    packed = pack(codes, layout)
    assert not np.shares_memory(packed, codes)
    assert not np.shares_memory(unpack(packed, layout, rows, cols), packed)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=repr)
def test_strided_arguments(layout: Layout) -> None:
    rows, cols = SHAPES[layout.name][1]
    wide = (np.arange(4 * rows * cols, dtype=np.uint32) % 16).reshape(2 * cols, 2 * rows)
    view = wide[::2, ::-2].T
    packed = pack(view, layout)
    assert np.array_equal(packed, pack(np.array(view), layout))
    assert np.array_equal(unpack(np.repeat(packed, 2)[::2], layout, rows, cols), view)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=repr)
def test_empty_matrices(layout: Layout) -> None:
    rows, cols = SHAPES[layout.name][0]
    for shape in ((0, cols), (rows, 0), (0, 0)):
        assert nbytes(layout, *shape) == 0
        assert pack(np.zeros(shape, dtype=np.uint8), layout).shape == (0,)
        assert unpack(np.zeros(0, dtype=np.uint8), layout, *shape).shape == shape
        assert padding_mask(layout, *shape).shape == (0,)


@pytest.mark.parametrize("layout", INT4_LAYOUTS, ids=repr)
def test_large_weights_take_less_than_a_second_of_processor_time(layout: Layout) -> None:
    size = 4096
    codes = scatter(4, size, size).astype(np.uint8)
    start = time.process_time()
    packed = pack(codes, layout)
    middle = time.process_time()
    back = unpack(packed, layout, size, size)
    assert max(middle - start, time.process_time() - middle) < 1.0
    assert np.array_equal(back, codes)
    for row, col in ((0, 0), (4095, 4095), (4095, 0), (1234, 2345), (2345, 1234)):
        byte, shift = offset(layout, row, col, size, size)
        assert packed[byte] >> shift & 15 == codes[row, col]


# ---- bytes written by hand

UP = list(range(16))
DOWN = UP[::-1]
COUNT = [[n + 16 * k for k in range(4)] for n in range(2)]

LITERALS: list[tuple[Layout, list[list[int]], tuple[int, int], str]] = [
    (NIBBLE_LOW_FIRST, [[0x1, 0x2, 0x3, 0x4], [0xF, 0x8, 0x0, 0x7]], (2, 2), "21 43 8F 70"),
    (NIBBLE_LOW_FIRST, [[0x6, 0xA]], (1, 1), "A6"),
    (NIBBLE_HIGH_FIRST, [[0x1, 0x2, 0x3, 0x4], [0xF, 0x8, 0x0, 0x7]], (2, 2), "12 34 F8 07"),
    # words 76543210 89ABCDEF
    (INT32_K, [UP[:8], DOWN[:8]], (2, 1), "10 32 54 76  EF CD AB 89"),
    # n0: 76543210 FEDCBA98; n1: 89ABCDEF 01234567
    (INT32_K, [UP, DOWN], (2, 2), "10 32 54 76  98 BA DC FE  EF CD AB 89  67 45 23 01"),
    # k0-7: n0 76543210, n1 89ABCDEF; k8-15: n0 FEDCBA98, n1 01234567
    (GPTQ, [UP, DOWN], (2, 2), "10 32 54 76  EF CD AB 89  98 BA DC FE  67 45 23 01"),
    # k0: 76543210 FEDCBA98; k1: 89ABCDEF 01234567; k2: 55555555 55555555
    (INT32_N, [[n, 15 - n, 5] for n in range(16)], (3, 2),
     "10 32 54 76  98 BA DC FE  EF CD AB 89  67 45 23 01  55 55 55 55  55 55 55 55"),
    # nibbles from the low end hold n = 0 2 4 6 1 3 5 7. k0: 75316420 FDB9ECA8; k1 (15 - n): 8ACE9BDF 02461357
    (AWQ, [[n, 15 - n] for n in range(16)], (2, 2), "20 64 31 75  A8 EC B9 FD  DF 9B CE 8A  57 13 46 02"),
    # n0: 87654321 000000A9; n1: FFFFFFFF 000000FF
    (COMPRESSED_TENSORS, [list(range(1, 11)), [15] * 10], (2, 2), "21 43 65 87  A9 00 00 00  FF FF FF FF  FF 00 00 00"),
    (COMPRESSED_TENSORS, [[0xC]], (1, 1), "0C 00 00 00"),
    # group 0: 76543210; group 1: FEDCBA98; group 2: 55555555
    (ZEROS_N, [[n, 8 + n, 5] for n in range(8)], (3, 1), "10 32 54 76  98 BA DC FE  55 55 55 55"),
    # n0-7: 76543210 (group 0), 89ABCDEF (group 1); n8-9: 00000098, 00000067
    (COMPRESSED_TENSORS_ZEROS, [[n, 15 - n] for n in range(10)], (2, 2), "10 32 54 76  EF CD AB 89  98 00 00 00  67 00 00 00"),
    # group 0 of 256 rows, group 1 of 256 rows
    (SCALE_TRANSPOSED_256, [[0x38, 0x7E], [0x39, 0x01]], (2, 256), "38 39" + " 00" * 254 + "7E 01" + " 00" * 254),
    # rows 0 and 1 are 16 bytes apart, row 32 follows the four columns of row 0; columns 4 and up open the next 512 bytes
    (SCALE_SWIZZLE, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], *[[0] * 5] * 30, [11, 12, 13, 14, 15]], (128, 8),
     "01 02 03 04 0B 0C 0D 0E" + " 00" * 8 + "06 07 08 09" + " 00" * 492
     + "05 00 00 00 0F 00 00 00" + " 00" * 8 + "0A 00 00 00" + " 00" * 492),
    (row_major(8), COUNT, (2, 4), "00 10 20 30  01 11 21 31"),
    (column_major(8), COUNT, (4, 2), "00 01  10 11  20 21  30 31"),
    (row_major(16), [[0x3C00, 0x1234], [0x8001, 0xFFFE], [0, 1]], (3, 2), "00 3C 34 12  01 80 FE FF  00 00 01 00"),
    (column_major(16), [[0x3C00, 0x1234], [0x8001, 0xFFFE], [0, 1]], (2, 3), "00 3C 01 80 00 00  34 12 FE FF 01 00"),
    (row_major(32), [[0x3F800000, 0x01020304]], (1, 2), "00 00 80 3F 04 03 02 01"),
    (column_major(32), [[0x3F800000, 0x01020304], [5, 6]], (2, 2), "00 00 80 3F 05 00 00 00  04 03 02 01 06 00 00 00"),
]


@pytest.mark.parametrize("packer", [pack_scalar, pack], ids=["scalar", "array"])
@pytest.mark.parametrize(("layout", "codes", "shape", "text"), LITERALS, ids=lambda v: repr(v) if isinstance(v, Layout) else "")
def test_literal_bytes(packer: Callable[[Matrix, Layout], Bytes], layout: Layout, codes: list[list[int]],
                       shape: tuple[int, int], text: str) -> None:
    matrix = np.array(codes, dtype=np.uint32)
    assert packer(matrix, layout).tobytes() == bytes.fromhex(text)
    got, word = storage_shape(layout, *matrix.shape)
    assert got == shape
    assert word.itemsize == layout.word_bytes
    assert np.array_equal(unpack(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), layout, *matrix.shape), matrix)


def test_every_layout_has_literal_bytes_or_anchors() -> None:
    assert {layout.name for layout, *_ in LITERALS} | {REORDER_E4M3.name} == set(LAYOUTS)


def test_words_read_as_integers() -> None:
    packed = pack(np.array([UP, DOWN], dtype=np.uint8), INT32_K)
    shape, word = storage_shape(INT32_K, 2, 16)
    assert packed.view(word).reshape(shape).tolist() == [[0x76543210, 0xFEDCBA98], [0x89ABCDEF, 0x01234567]]


@pytest.mark.parametrize(("shape", "expected"), [
    ((1, 1), (128, 4)), ((128, 4), (128, 4)), ((129, 4), (256, 4)), ((128, 5), (128, 8)), ((90, 3), (128, 4)),
    ((150, 80), (256, 80)),
])
def test_swizzle_storage(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert storage_shape(SCALE_SWIZZLE, *shape) == (expected, np.dtype(np.uint8))
    assert int(padding_mask(SCALE_SWIZZLE, *shape).sum()) == expected[0] * expected[1] - shape[0] * shape[1]


SWIZZLE_ROWS = [  # (m, k, byte) in a [300, 7] matrix: two column tiles, three row tiles of 1,024 bytes
    (0, 0, 0), (0, 1, 1), (0, 3, 3), (1, 0, 16), (31, 0, 496), (32, 0, 4), (64, 0, 8), (96, 0, 12), (127, 3, 511), (0, 4, 512),
    (33, 6, 534), (127, 6, 1022), (128, 0, 1024), (128, 4, 1536), (161, 6, 1558), (255, 3, 1535), (256, 0, 2048), (299, 6, 2742),
]


@pytest.mark.parametrize(("row", "col", "byte"), SWIZZLE_ROWS)
def test_swizzle_by_hand(row: int, col: int, byte: int) -> None:
    assert offset(SCALE_SWIZZLE, row, col, 300, 7) == (byte, 0)


def test_swizzle_is_not_the_one_with_32_and_4_exchanged() -> None:
    rows, cols = 300, 9
    codes = scatter(8, rows, cols).astype(np.uint8)
    padded = np.zeros((384, 12), dtype=np.uint8)
    padded[:rows, :cols] = codes
    good = padded.reshape(3, 4, 32, 3, 4).transpose(0, 3, 2, 1, 4).reshape(-1)
    bad = padded.reshape(3, 32, 4, 3, 4).transpose(0, 3, 1, 2, 4).reshape(-1)
    assert np.array_equal(pack(codes, SCALE_SWIZZLE), good)
    assert not np.array_equal(pack(codes, SCALE_SWIZZLE), bad)
    exchanged = replace(SCALE_SWIZZLE, digits=(*SCALE_SWIZZLE.digits[:2], Digit(Axis.ROW, 4, 32), Digit(Axis.ROW, 1, 4),
                                               SCALE_SWIZZLE.digits[4]))
    assert np.array_equal(pack(codes, exchanged), bad)
    misplaced = [m for m, k, byte in SWIZZLE_ROWS if offset(exchanged, m, k, 300, 7) != (byte, 0)]
    assert misplaced == [1, 31, 32, 64, 96, 33, 161, 299]  # only rows 0 and 127 of a tile stay


def test_repack_between_layouts_needs_no_transpose() -> None:
    weights = np.array([[(3 * n + 5 * k) % 16 for k in range(24)] for n in range(16)], dtype=np.uint8)
    checkpoint = pack(weights, INT32_K).view(np.uint32).reshape(16, 3)
    expected = np.zeros((24, 2), dtype=np.uint32)
    for n in range(16):
        for k in range(24):
            code = int(checkpoint[n, k // 8]) >> 4 * (k % 8) & 15
            expected[k, n // 8] |= np.uint32(code << 4 * (n % 8))
    repacked = pack(unpack(checkpoint.reshape(-1).view(np.uint8), INT32_K, 16, 24), INT32_N)
    assert np.array_equal(repacked.view(np.uint32).reshape(24, 2), expected)
    zeros = np.array([[(n + 7 * g) % 16 for g in range(3)] for n in range(16)], dtype=np.uint8)
    assert np.array_equal(pack(zeros, ZEROS_N).view(np.uint32).reshape(3, 2),
                          pack(zeros, COMPRESSED_TENSORS_ZEROS).view(np.uint32).reshape(2, 3).T)


# ---- the Hopper register reorder

# Printed by a host program compiled against the public headers of the PyPI package nvidia-cutlass 4.2.0.0: the CuTe layout
# tile_to_shape(compute_memory_reordering_atom<float_e4m3_t>(), (N, K, 1)) evaluated at every (n, k, 0). The digests are SHA-256
# of those indices as little-endian int32, n slowest.
CUTLASS_DIGESTS = {
    (16, 32): "730b1e632bc839c0a83c136da58c3a066cc06cba730f3f34e567ba387b237049",
    (16, 64): "01e5ddcf0fa5a65899904a7057b55e181b4f62e72a834b86832fe68db8888b4a",
    (16, 128): "87ab6ad57d9a81eda80c592eb69a6578446426360a2bfb77b73e69c438e29336",
    (48, 96): "3de6d1e49dd9de2482db40041b6ba9b051b69a37913e852e502ca6b79f5fe616",
    (64, 128): "ee25133c984a5c5b26ab0489d392086eb78d620cd2ed7cdeedbbf9bc098e081d",
    (128, 128): "21cd9c3d8a2a440f9edb8024529ff7f9db32d6bbdbe62f9cadc3280e4690cfba",
    (64, 384): "d47fee55643357bc6728c09282a07b7e1911fa899b56c756b8b9faeb56871c86",
    (128, 256): "ed3ccd445200f459cc6517f8912707ed68df14e196cee29542ae3d418b81c523",
    (384, 256): "e26d41a0fb61f934061203e8e9a04bffb212e7a8010d151878d1fa418fa092c6",
    (80, 1024): "5c768ef3ca0e40ca21985121cffb2b0311aac526328e423a9ac32dd856fba54c",
    (256, 512): "19d39b3ff6af65d7df440eb203cd9925c596777ec1e3913f2163c6ed7c714ce7",
}
# (n, k, index) rows of the same print-out.
CUTLASS_ROWS = {
    (64, 384): [
        (0, 0, 0), (0, 1, 1), (0, 4, 16), (0, 16, 8), (0, 32, 2048), (1, 0, 64), (8, 0, 4), (16, 0, 512), (63, 383, 24575),
        (60, 63, 3903), (51, 274, 18122), (2, 104, 6304), (34, 360, 23712), (25, 357, 23125), (18, 40, 2720), (53, 225, 16193),
        (25, 369, 23117),
    ],
    (48, 96): [
        (0, 0, 0), (0, 1, 1), (0, 4, 16), (0, 16, 8), (0, 32, 1536), (1, 0, 64), (8, 0, 4), (16, 0, 512), (47, 95, 4607),
        (35, 40, 2784), (8, 71, 3095), (45, 68, 4436), (19, 64, 3776), (12, 91, 3375), (27, 21, 733), (9, 84, 3164),
        (6, 63, 1979),
    ],
    (256, 512): [
        (0, 0, 0), (0, 1, 1), (0, 4, 16), (0, 16, 8), (0, 32, 8192), (1, 0, 64), (8, 0, 4), (16, 0, 512), (255, 511, 131071),
        (250, 317, 81597), (221, 374, 97118), (192, 40, 14368), (234, 442, 113838), (124, 177, 44813), (147, 326, 86738),
        (165, 336, 87368), (41, 294, 74838),
    ],
}


def fragment_slots(rows: int, cols: int) -> Matrix:
    """The order from the register map of the PTX ISA (wgmma m64nNk32, 8-bit A in registers), one warp's 16x32 part of it:

    lane t holds, in its registers 0..3, columns 4*(t%4) .. +3 (registers 0 and 1) or those plus 16 (2 and 3) of row t/4
    (registers 0 and 2) or t/4 + 8 (1 and 3). Lane after lane, register after register; tiles follow each other down the rows.
    """
    slots = np.full((rows, cols), -1, dtype=np.int64)
    slot = 0
    for col in range(0, cols, 32):
        for row in range(0, rows, 16):
            for lane in range(32):
                for down, right in ((0, 0), (8, 0), (0, 16), (8, 16)):
                    for value in range(4):
                        slots[row + down + lane // 4, col + right + 4 * (lane % 4) + value] = slot
                        slot += 1
    return slots


@pytest.mark.parametrize("shape", CUTLASS_DIGESTS)
def test_reorder_is_the_permutation_of_cutlass(shape: tuple[int, int]) -> None:
    slots = slots_of(pack, REORDER_E4M3, *shape)
    assert sorted(slots.reshape(-1).tolist()) == list(range(shape[0] * shape[1]))
    assert np.array_equal(slots, fragment_slots(*shape))
    assert hashlib.sha256(slots.astype("<i4").tobytes()).hexdigest() == CUTLASS_DIGESTS[shape]


@pytest.mark.parametrize("shape", CUTLASS_ROWS)
def test_reorder_rows_of_cutlass(shape: tuple[int, int]) -> None:
    for n, k, index in CUTLASS_ROWS[shape]:
        assert offset(REORDER_E4M3, n, k, *shape) == (index // 2, 4 * (index % 2))


def test_reorder_places_rows_and_columns_differently() -> None:
    rows, cols = slots_of(pack, REORDER_E4M3, 96, 64), slots_of(pack, REORDER_E4M3, 64, 96)
    assert rows[16, 0] == cols[16, 0] == 512
    assert (rows[0, 32], cols[0, 32]) == (96 * 32, 64 * 32)
    assert not np.array_equal(rows[:64], cols[:, :64])


def test_unified_int4() -> None:
    assert UNIFIED_INT4 == (0, 7, 6, 5, 4, 3, 2, 1, 8, 9, 10, 11, 12, 13, 14, 15)
    assert [UNIFIED_INT4[code] for code in UNIFIED_INT4] == list(range(16))
    for value in range(1, 8):
        assert UNIFIED_INT4[value] == (-value & 7)
        assert UNIFIED_INT4[value] | 8 == UNIFIED_INT4[-value & 15]


# ---- what is refused

TAILS = [
    (NIBBLE_LOW_FIRST, (3, 5), "COL extent of the logical matrix must be a multiple of 2, got 5"),
    (NIBBLE_HIGH_FIRST, (3, 1), "COL extent of the logical matrix must be a multiple of 2, got 1"),
    (INT32_K, (8, 12), "COL extent of the logical matrix must be a multiple of 8, got 12"),
    (GPTQ, (8, 9), "COL extent of the logical matrix must be a multiple of 8, got 9"),
    (INT32_N, (12, 8), "ROW extent of the logical matrix must be a multiple of 8, got 12"),
    (AWQ, (4, 8), "ROW extent of the logical matrix must be a multiple of 8, got 4"),
    (ZEROS_N, (7, 8), "ROW extent of the logical matrix must be a multiple of 8, got 7"),
    (REORDER_E4M3, (8, 32), "ROW extent of the logical matrix must be a multiple of 16, got 8"),
    (REORDER_E4M3, (24, 256), "ROW extent of the logical matrix must be a multiple of 16, got 24"),
    (REORDER_E4M3, (16, 16), "COL extent of the logical matrix must be a multiple of 32, got 16"),
    (REORDER_E4M3, (32, 48), "COL extent of the logical matrix must be a multiple of 32, got 48"),
    (COMPRESSED_TENSORS, (-1, 8), "ROW extent of the logical matrix must be a multiple of 1, got -1"),
    (row_major(8), (2, -2), "COL extent of the logical matrix must be a multiple of 1, got -2"),
]


@pytest.mark.parametrize(("layout", "shape", "message"), TAILS)
def test_shapes_that_a_layout_cannot_hold(layout: Layout, shape: tuple[int, int], message: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: offset(layout, 0, 0, *shape), lambda: storage_shape(layout, *shape), lambda: nbytes(layout, *shape),
        lambda: unpack(np.zeros(1, dtype=np.uint8), layout, *shape),
    ]
    if min(shape) >= 0:
        calls += [lambda: pack(np.zeros(shape, dtype=np.uint8), layout), lambda: padding_mask(layout, *shape)]
    for call in calls:
        with pytest.raises(ValueError, match=f"^{layout.name}: {message} in "):
            call()


@pytest.mark.parametrize("place", [(-1, 0), (0, -1), (3, 0), (0, 10), (1, 15)])
def test_elements_outside_the_matrix(place: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"is outside the \[3, 10\] matrix"):
        offset(COMPRESSED_TENSORS, *place, 3, 10)


@pytest.mark.parametrize(("codes", "message"), [
    (np.full((2, 8), -1, dtype=np.int8), "unsigned [rows, cols] matrix, got int8 (2, 8); mask signed values"),
    (np.zeros((2, 8), dtype=np.float32), "unsigned [rows, cols] matrix, got float32 (2, 8)"),
    (np.zeros(16, dtype=np.uint8), "unsigned [rows, cols] matrix, got uint8 (16,)"),
    (np.zeros((1, 2, 8), dtype=np.uint8), "unsigned [rows, cols] matrix, got uint8 (1, 2, 8)"),
    (np.full((2, 8), 16, dtype=np.uint8), "code 0x10 does not fit in 4 bits"),
    (np.full((2, 8), 0x100, dtype=np.uint32), "code 0x100 does not fit in 4 bits"),
])
def test_codes_that_cannot_be_packed(codes: Matrix, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pack(codes, INT32_K)


def test_wide_codes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="code 0x100 does not fit in 8 bits"):
        pack(np.full((2, 8), 0x100, dtype=np.uint16), SCALE_SWIZZLE)


@pytest.mark.parametrize("buffer", [np.zeros(7, dtype=np.uint8), np.zeros(9, dtype=np.uint8), np.zeros((2, 4), dtype=np.uint8),
                                    np.zeros(2, dtype=np.uint32), np.zeros(8, dtype=np.int8)])
def test_buffers_that_cannot_be_unpacked(buffer: Matrix) -> None:
    with pytest.raises(ValueError, match=r"a \[2, 8\] matrix lies in uint8 \(8,\), got"):
        unpack(buffer, INT32_K, 2, 8)


_ROW, _COL = Digit(Axis.ROW, 1, 0), Digit(Axis.COL, 1, 0)


@pytest.mark.parametrize(("change", "message"), [
    ({"digits": (_ROW,)}, "does not fill whole tiles"),
    ({"digits": (_ROW, _COL, Digit(Axis.COL, 2, 2))}, "COL digits must chain"),
    ({"digits": (_ROW, Digit(Axis.COL, 4, 0), Digit(Axis.COL, 1, 2))}, "COL digits must chain"),
    ({"digits": (_ROW, Digit(Axis.COL, 1, 8))}, "does not fill whole tiles"),
    ({"digits": (Digit(Axis.ROW, 2, 0), _COL)}, "ROW digits must chain"),
    ({"multiple": (1, 4)}, "does not fill whole tiles"),
    ({"digits": (Digit(Axis.ROW, 4, 0), Digit(Axis.ROW, 1, 4), _COL)}, "does not fill whole tiles"),
    ({"digits": (_COL, _ROW)}, "does not fill whole tiles"),
    ({"bits": 6}, "do not fill words"),
    ({"bits": 16, "word_bytes": 1}, "do not fill words"),
    ({"bits": 8, "nibble": NibbleOrder.HIGH_FIRST}, "do not fill words"),
])
def test_records_that_are_no_layout(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(INT32_K, **change)


@pytest.mark.parametrize("change", [
    {"bits": 8}, {"nibble": NibbleOrder.HIGH_FIRST}, {"digits": GPTQ.digits}, {"pad": (5, 1)}, {"pad": (1, 64)},
])
def test_every_field_moves_bits(change: dict[str, Any]) -> None:
    codes = scatter(4, 3, 24)
    assert pack(codes, replace(INT32_K, **change)).tobytes() != pack(codes, INT32_K).tobytes()


def test_word_and_multiple_shape_the_storage() -> None:
    assert storage_shape(replace(INT32_K, word_bytes=2), 3, 24)[0] == (3, 6)
    with pytest.raises(ValueError, match="must be a multiple of 16"):
        storage_shape(replace(INT32_K, multiple=(1, 16)), 3, 24)


def test_padding_that_must_be_zero() -> None:
    assert [p.name for p in Padding] == ["ZERO", "UNTOUCHED", "FREE"]
    padded = {layout.name: layout.padding for layout in LAYOUTS.values() if max(layout.pad) > 1}
    assert padded == dict.fromkeys(
        ("compressed_tensors", "compressed_tensors_zeros", "scale_swizzle", "scale_transposed_256"), Padding.ZERO)


@pytest.mark.parametrize("bits", [0, 4, 12, 64])
def test_plain_layouts_of_other_widths(bits: int) -> None:
    for plain in (row_major, column_major):
        with pytest.raises(ValueError, match=f"8, 16 or 32 bits, got {bits}"):
            plain(bits)


def test_canonical() -> None:
    assert canonical(INT4) == canonical(E4M3FN) == row_major(8)
    assert canonical(BF16) == row_major(16)
    with pytest.raises(ValueError, match="got 64"):
        canonical(F64)
