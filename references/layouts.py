"""Where the bits of a code matrix lie in memory.

Decides: for every layout that the operations name, the byte and the bit of each logical element, the shape and word of the
storage, which storage belongs to no element, and what that padding must hold.
Refuses: arithmetic. Offsets (+8), zero points and the scale products are encodings; here codes only move. Shapes that a layout
cannot hold raise ValueError; nothing is rounded up unless the layout itself pads.

Logical matrices keep one axis order everywhere, whatever the storage does: weights are [N, K] (row n, column k), activations
[M, K], block scales and zero points [N or M, K/G]. A repack from layout a to layout b is `pack(unpack(x, a, n, k), b)`.

A layout is a mixed-radix number. Row and column are split into digits, and `digits` lists them from the slowest in memory to
the fastest, so that the slot of an element is read off as in a positional number system. Slot s holds bits [s*bits,
(s+1)*bits) of the buffer, bit 0 of a byte being its least significant, bytes in little-endian order within a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import lcm
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import Codes, Format, container

__all__ = [
    "AWQ", "COMPRESSED_TENSORS", "COMPRESSED_TENSORS_ZEROS", "GPTQ", "INT32_K", "INT32_N", "LAYOUTS", "NIBBLE_HIGH_FIRST",
    "NIBBLE_LOW_FIRST", "REORDER_E4M3", "SCALE_SWIZZLE", "SCALE_TRANSPOSED_256", "UNIFIED_INT4", "ZEROS_N", "Axis", "Digit",
    "Layout", "NibbleOrder", "Padding", "canonical", "column_major", "nbytes", "offset", "pack", "padding_mask", "row_major",
    "storage_shape", "unpack",
]

Buffer = npt.NDArray[np.uint8]
"""Flat bytes as they lie in memory."""


class Padding(IntEnum):
    """What storage that belongs to no element must hold after a kernel has written the rest."""

    ZERO = 0  # must be zero
    UNTOUCHED = 1  # must keep what was there
    FREE = 2  # may hold anything


class Axis(IntEnum):
    """Axis of the logical matrix."""

    ROW = 0  # n or m
    COL = 1  # k, or the group of k


class NibbleOrder(IntEnum):
    """Which of two neighbouring 4-bit slots sits in the low half of the byte."""

    LOW_FIRST = 0  # the even slot in bits 3..0
    HIGH_FIRST = 1  # the even slot in bits 7..4


class Digit(NamedTuple):
    """One digit of an index: `index[axis] // divisor % radix`; radix 0 leaves out the modulo (the topmost digit of its axis)."""

    axis: Axis
    divisor: int
    radix: int


@dataclass(frozen=True, slots=True)
class Layout:
    """An injection from the elements of a [rows, cols] matrix to the bits of a buffer.

    bits: width of an element. word_bytes: width of the storage word, which gives the storage tensor its type and its shape.
    nibble: order of two 4-bit slots in a byte; LOW_FIRST for wider elements. digits: slowest in memory first.
    multiple: (rows, cols) must be multiples of it. pad: (rows, cols) are rounded up to multiples of it in storage.
    padding: rule for what the rounding up adds (says nothing where it adds nothing). source: who stores data this way.
    Raises ValueError where the digits do not enumerate both axes, or where a legal shape would not fill whole words.
    """

    name: str
    bits: int
    word_bytes: int
    nibble: NibbleOrder
    digits: tuple[Digit, ...]
    multiple: tuple[int, int]
    pad: tuple[int, int]
    padding: Padding
    source: str

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16, 32) or 8 * self.word_bytes % self.bits or (self.nibble and self.bits != 4):
            raise ValueError(f"{self.name}: {self.bits}-bit elements, {self.nibble.name}, do not fill words of {self.word_bytes} "
                             "bytes; elements have 4, 8, 16 or 32 bits, and only 4-bit ones a nibble order")
        for axis in Axis:
            top = divisor = 1
            for digit in sorted((d for d in self.digits if d.axis is axis), key=lambda d: d.divisor):
                if digit.divisor != divisor:
                    raise ValueError(f"{self.name}: {axis.name} digits must chain from divisor 1 to radix 0, got {self.digits}")
                top, divisor = digit.divisor, digit.divisor * digit.radix
            extent = lcm(self.multiple[axis], self.pad[axis])
            per_word = self.per_word if axis is self.packed_axis else 1
            if divisor != 0 or extent % lcm(top, per_word):
                raise ValueError(f"{self.name}: {axis.name} extents are multiples of {extent}, which does not fill whole tiles")

    @property
    def packed_axis(self) -> Axis:
        """Axis along which the elements of one word follow each other: the axis of the fastest digit."""
        return self.digits[-1].axis

    @property
    def per_word(self) -> int:
        """Elements per storage word."""
        return 8 * self.word_bytes // self.bits

    def __repr__(self) -> str:
        return self.name


_R, _C = Axis.ROW, Axis.COL
_LOW = NibbleOrder.LOW_FIRST
_BY_ROW = (Digit(_R, 1, 0), Digit(_C, 1, 0))
_BY_COL = (Digit(_C, 1, 0), Digit(_R, 1, 0))

_QUANT_UTILS = "vLLM quant_utils"
_CT = "compressed-tensors pack_to_int32"

NIBBLE_LOW_FIRST = Layout(
    "nibble_low_first", 4, 1, _LOW, _BY_ROW, (1, 2), (1, 1), Padding.ZERO,
    "NVFP4 and int4 uint8 [rows, K/2], even k low: PTX e2m1x2, vLLM scaled_fp4_quant, compressed-tensors nvfp4-pack-quantized",
)
NIBBLE_HIGH_FIRST = Layout(
    "nibble_high_first", 4, 1, NibbleOrder.HIGH_FIRST, _BY_ROW, (1, 2), (1, 1), Padding.ZERO,
    "uint8 [rows, K/2], even k high: the opposite convention, kept so that a mix-up has a name",
)
INT32_K = Layout(
    "int32_k", 4, 4, _LOW, _BY_ROW, (1, 8), (1, 1), Padding.ZERO,
    "int32 [N, K/8], k = 8j + i in bits 4i: input of cutlass_encode_and_reorder_int4b, weight_packed of W4A16 checkpoints",
)
GPTQ = Layout(
    "gptq", 4, 4, _LOW, (Digit(_C, 8, 0), Digit(_R, 1, 0), Digit(_C, 1, 8)), (1, 8), (1, 1), Padding.ZERO,
    f"int32 [K/8, N], k = 8j + i in bits 4i: {_QUANT_UTILS} gptq_pack (= pack_rows)",
)
INT32_N = Layout(
    "int32_n", 4, 4, _LOW, _BY_COL, (8, 1), (1, 1), Padding.ZERO,
    f"int32 [K, N/8], n = 8j + i in bits 4i: {_QUANT_UTILS} pack_cols, triton_w4a16 qweight",
)
AWQ = Layout(
    "awq", 4, 4, _LOW, (Digit(_C, 1, 0), Digit(_R, 8, 0), Digit(_R, 1, 2), Digit(_R, 2, 4)), (8, 1), (1, 1), Padding.ZERO,
    f"int32 [K, N/8], bits 4i hold n = 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i]: {_QUANT_UTILS} awq_pack; zero points alike",
)
COMPRESSED_TENSORS = Layout(
    "compressed_tensors", 4, 4, _LOW, _BY_ROW, (1, 1), (1, 8), Padding.ZERO,
    f"int32 [N, ceil(K/8)], k = 8j + i in bits 4i, missing k hold code 0 (after the +8 offset): {_CT}",
)
ZEROS_N = Layout(
    "zeros_n", 4, 4, _LOW, _BY_COL, (8, 1), (1, 1), Padding.ZERO,
    "zero points int32 [K/G, N/8], n = 8j + i in bits 4i: GPTQ qzeros, triton_w4a16 qzeros",
)
COMPRESSED_TENSORS_ZEROS = Layout(
    "compressed_tensors_zeros", 4, 4, _LOW, (Digit(_R, 8, 0), Digit(_C, 1, 0), Digit(_R, 1, 8)), (1, 1), (8, 1), Padding.ZERO,
    f"zero points int32 [ceil(N/8), K/G], n = 8j + i in bits 4i: {_CT}, packed_dim 0",
)
SCALE_SWIZZLE = Layout(
    "scale_swizzle", 8, 1, _LOW, (Digit(_R, 128, 0), Digit(_C, 4, 0), Digit(_R, 1, 32), Digit(_R, 32, 4), Digit(_C, 1, 4)),
    (1, 1), (128, 4), Padding.ZERO,
    "128x4 block scales, byte ((m/128)*KT + k/4)*512 + (m%32)*16 + (m/32%4)*4 + k%4, KT = ceil(cols/4): PTX tcgen05 "
    "scale_vec 4X, CUTLASS Sm1xxBlockScaledConfig, vLLM swizzle_blockscale",
)
SCALE_TRANSPOSED_256 = Layout(
    "scale_transposed_256", 8, 1, _LOW, _BY_COL, (1, 1), (256, 1), Padding.ZERO,
    "block scales uint8 [K/16, M_pad], M_pad = 256*ceil(M/256): svdquant-kernels quantize_nvfp4_rows",
)
REORDER_E4M3 = Layout(
    "reorder_e4m3", 4, 4, _LOW,
    (Digit(_C, 32, 0), Digit(_R, 16, 0), Digit(_R, 1, 8), Digit(_C, 4, 4), Digit(_C, 16, 2), Digit(_R, 8, 2), Digit(_C, 1, 4)),
    (16, 32), (1, 1), Padding.ZERO,
    "CUTLASS 4.2.0 mixed_dtype_utils.hpp: compute_memory_reordering_atom<float_e4m3_t>() is "
    "((8,2),(4,4,2)):((64,4),(1,16,8)), tiled over (N, K) by tile_to_shape, N tiles fastest",
)
"""Register-fragment order of the Hopper e4m3 MMA: nibble (n, k) of an [N, K] int4 weight lands in slot

    32*N*(k//32) + 512*(n//16) + 64*(n%8) + 16*(k//4%4) + 8*(k//16%2) + 4*(n//8%2) + k%4

(slot s: byte s//2, low half where s is even). In a 16x32 tile each lane of a warp owns 16 neighbouring slots: its four registers
of the A fragment, four values each. N % 16 and K % 32 make it a bijection; other shapes leave holes and outgrow N*K/2 bytes.
The copy kernel of the same header walks K in steps of 256 with no bounds check. Where K is no multiple of 256 it still places
every element as above, but then also writes the N*(256*ceil(K/256) - K) slots that follow the buffer (K tiles are the slowest
digit): N*K/2 bytes too many where K = 128. So K % 256 is a bound of that kernel, K % 32 the one of the order.
The storage shape [K/8, N] only sizes the buffer: its words mix rows. `cutlass_encode_and_reorder_int4b` maps every nibble
by UNIFIED_INT4, then reorders; a grouped weight is one such matrix per expert.
"""

UNIFIED_INT4 = (0, 7, 6, 5, 4, 3, 2, 1, 8, 9, 10, 11, 12, 13, 14, 15)
"""Code of the unified int4 encoding by two's-complement code: v -> 8 - v for 1..7, others unchanged; its own inverse.

Source: CUTLASS 4.2.0 mixed_dtype_utils.hpp, unified_encode_int4b: +v then shares its low three bits with -v.
"""


def row_major(bits: int) -> Layout:
    """Elements of 8, 16 or 32 bits, storage [rows, cols], no padding. Raises ValueError for other widths."""
    return _plain("row_major", bits, _BY_ROW)


def column_major(bits: int) -> Layout:
    """Elements of 8, 16 or 32 bits, storage [cols, rows] (a transposed tensor), no padding. Raises ValueError otherwise."""
    return _plain("column_major", bits, _BY_COL)


def canonical(fmt: Format) -> Layout:
    """How operands are born: one code per container of the format, row-major. Raises ValueError for 64-bit formats."""
    return row_major(8 * container(fmt).itemsize)


def _plain(name: str, bits: int, digits: tuple[Digit, ...]) -> Layout:
    if bits not in (8, 16, 32):
        raise ValueError(f"{name}: elements have 8, 16 or 32 bits, got {bits}; narrower codes need a packed layout")
    return Layout(f"{name}_{bits}", bits, bits // 8, _LOW, digits, (1, 1), (1, 1), Padding.ZERO, "plain dense tensor")


LAYOUTS = {
    layout.name: layout
    for layout in (
        NIBBLE_LOW_FIRST, NIBBLE_HIGH_FIRST, INT32_K, GPTQ, INT32_N, AWQ, COMPRESSED_TENSORS, ZEROS_N,
        COMPRESSED_TENSORS_ZEROS, SCALE_SWIZZLE, SCALE_TRANSPOSED_256, REORDER_E4M3,
        *(plain(bits) for plain in (row_major, column_major) for bits in (8, 16, 32)),
    )
}


def _extents(layout: Layout, rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns in storage, padding counted."""
    for axis, size in zip(Axis, (rows, cols), strict=True):
        if size < 0 or size % layout.multiple[axis]:
            raise ValueError(
                f"{layout.name}: {axis.name} extent of the logical matrix must be a multiple of {layout.multiple[axis]}, "
                f"got {size} in [{rows}, {cols}]; pad the matrix first or choose a layout that pads"
            )
    return -(-rows // layout.pad[0]) * layout.pad[0], -(-cols // layout.pad[1]) * layout.pad[1]


def _radices(layout: Layout, extents: tuple[int, int]) -> tuple[int, ...]:
    """Radix of each digit, topmost ones filled in."""
    return tuple(d.radix or extents[d.axis] // d.divisor for d in layout.digits)


def _logical_order(layout: Layout) -> list[int]:
    """Places of the digits in `layout.digits`, sorted as a row-major matrix has them: row before column, high digit first."""
    return sorted(range(len(layout.digits)), key=lambda i: (layout.digits[i].axis, -layout.digits[i].divisor))


def offset(layout: Layout, row: int, col: int, rows: int, cols: int) -> tuple[int, int]:
    """The definition: (byte index, shift of bit 0 within that byte) of element (row, col) of a [rows, cols] matrix.

    Elements wider than a byte start at that byte, little-endian. Raises ValueError for a shape that the layout cannot hold and
    for an element outside the matrix.
    """
    extents = _extents(layout, rows, cols)
    if not (0 <= row < rows and 0 <= col < cols):
        raise ValueError(f"{layout.name}: element ({row}, {col}) is outside the [{rows}, {cols}] matrix")
    index, slot = (row, col), 0
    for digit, radix in zip(layout.digits, _radices(layout, extents), strict=True):
        slot = slot * radix + index[digit.axis] // digit.divisor % radix
    return divmod((slot ^ layout.nibble) * layout.bits, 8)


def storage_shape(layout: Layout, rows: int, cols: int) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Shape of the storage tensor and its word (unsigned, little-endian; systems that say int32 view the same bits).

    The axis of the slowest digit leads; the packed axis is counted in words. Raises ValueError as `offset` does.
    """
    extents = list(_extents(layout, rows, cols))
    extents[layout.packed_axis] //= layout.per_word
    lead = layout.digits[0].axis
    return (extents[lead], extents[1 - lead]), np.dtype(f"<u{layout.word_bytes}")


def nbytes(layout: Layout, rows: int, cols: int) -> int:
    """Bytes of the storage, padding counted. Raises ValueError as `offset` does."""
    (lead, last), word = storage_shape(layout, rows, cols)
    return lead * last * word.itemsize


def _arrange(matrix: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """Flat slots of a [rows, cols] matrix in address order; slots of no element are 0."""
    extents = _extents(layout, *matrix.shape)
    if extents != matrix.shape:
        matrix = np.pad(matrix, [(0, extents[axis] - matrix.shape[axis]) for axis in Axis])
    order, radices = _logical_order(layout), _radices(layout, extents)
    slots = matrix.reshape([radices[i] for i in order]).transpose(np.argsort(order)).reshape(-1)
    return slots.reshape(-1, 2)[:, ::-1].reshape(-1) if layout.nibble is NibbleOrder.HIGH_FIRST else slots


def pack(codes: Codes, layout: Layout) -> Buffer:
    """Array twin of `offset`: the bytes [nbytes] that hold `codes` ([rows, cols], unsigned), padding filled with 0.

    Raises ValueError where the codes are not an unsigned matrix, where a code does not fit in `layout.bits`, and for a shape that
    the layout cannot hold.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.dtype.kind != "u":
        raise ValueError(f"{layout.name}: codes must be an unsigned [rows, cols] matrix, got {codes.dtype} {codes.shape}; "
                         "mask signed values to their width first")
    if codes.size and int(codes.max()) >> layout.bits:
        raise ValueError(f"{layout.name}: code {int(codes.max()):#x} does not fit in {layout.bits} bits")
    slots = _arrange(codes.astype(f"<u{max(layout.bits // 8, 1)}", copy=False), layout)
    if layout.bits == 4:
        packed: Buffer = slots[0::2] | slots[1::2] << np.uint8(4)
        return packed
    return np.array(slots).view(np.uint8)


def unpack(buffer: Buffer, layout: Layout, rows: int, cols: int) -> Codes:
    """Inverse of `pack`: codes [rows, cols] in the smallest unsigned dtype, padding dropped whatever it holds.

    Raises ValueError where the buffer is not flat uint8 of `nbytes(layout, rows, cols)`, and as `offset` does.
    """
    buffer = np.asarray(buffer)
    expected = nbytes(layout, rows, cols)
    if buffer.dtype != np.uint8 or buffer.shape != (expected,):
        raise ValueError(f"{layout.name}: a [{rows}, {cols}] matrix lies in uint8 ({expected},), got {buffer.dtype} "
                         f"{buffer.shape}; view the storage tensor as flat bytes")
    if layout.bits == 4:
        slots: Codes = np.stack((buffer & np.uint8(15), buffer >> np.uint8(4)), axis=1)
        slots = slots[:, ::-1] if layout.nibble is NibbleOrder.HIGH_FIRST else slots
    else:
        slots = np.ascontiguousarray(buffer).view(f"<u{layout.bits // 8}")
    extents = _extents(layout, rows, cols)
    split = slots.reshape(_radices(layout, extents)).transpose(_logical_order(layout))
    return np.array(split.reshape(extents)[:rows, :cols])


def padding_mask(layout: Layout, rows: int, cols: int) -> npt.NDArray[np.bool_]:
    """Flat [slots]: True where the slot (bits s*bits .. s*bits + bits - 1 of the buffer) belongs to no element.

    Raises ValueError as `offset` does.
    """
    return ~_arrange(np.ones((rows, cols), dtype=np.bool_), layout)
