"""Encodings in Triton: nibbles packed and spread, int4 repacked, scales swizzled, fp8 renamed and requantised.

Decides: addresses and integer maps of each op, on matrices whose rows may be apart. Refuses: problems outside the contract's
domain, and the packings that no kernel here has (`unsupported`). Word j of a packed axis holds elements 8j to 8j + 7, element 8j
+ i in bits 4i to 4i + 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView
from lowbit.kernels.triton_room.blocks import offset
from lowbit.kernels.triton_room.codes8 import OPTIONS, e4m3_code, e4m3_value
from lowbit.kernels.triton_room.codes16 import rounded
from lowbit.kernels.triton_room.division import reciprocal
from lowbit.kernels.triton_room.machine import Machine
from lowbit.kernels.triton_room.memory import rows_of, tensor

__all__ = [
    "MUTANTS", "OPS", "convert_fnuz", "declaration", "pack_nibbles", "prepare", "repack_int4", "requantize_fp8", "run", "stage",
    "swizzle_scales", "tactics", "unpack_nibbles", "unsupported", "workspace",
]

OPS = ("int4_pack", "int4_repack", "scale_swizzle", "fp8_convert_fnuz", "fp8_requantize")
MUTANTS = ("offsets_wrap", "padding_not_written")



# Nibbles -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "half"])
def unpack_nibbles_kernel(  # type: ignore[no-untyped-def]
    packed, codes, rows, half, packed_stride, code_stride, ROWS: tl.constexpr, HALF: tl.constexpr,
):
    """codes[i, 2j], codes[i, 2j + 1]: low and high nibble of packed[i, j]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * HALF + tl.arange(0, HALF)
    inside = (row < rows)[:, None] & (column < half)[None, :]
    byte = tl.load(packed + offset(row, packed_stride, 0)[:, None] + column[None, :], mask=inside, other=0)
    both = tl.reshape(tl.join(byte & 15, byte >> 4), (ROWS, 2 * HALF))
    place = tl.program_id(1) * (2 * HALF) + tl.arange(0, 2 * HALF)
    inside = (row < rows)[:, None] & (place < 2 * half)[None, :]
    tl.store(codes + offset(row, code_stride, 0)[:, None] + place[None, :], both, mask=inside)


def unpack_nibbles(packed: torch.Tensor, codes: torch.Tensor, *, wide: bool = False) -> None:
    """uint8 [rows, K / 2] -> uint8 [rows, K], one code per byte. `wide`: tiles for the interpreter."""
    rows, half = packed.shape
    if rows == 0:
        return
    tile = (256, 2048) if wide else (16, 256)
    unpack_nibbles_kernel[(triton.cdiv(rows, tile[0]), triton.cdiv(half, tile[1]))](
        packed, codes, rows, half, packed.stride(0), codes.stride(0), ROWS=tile[0], HALF=tile[1],
    )


@triton.jit(do_not_specialize=["rows", "words", "count"])
def pack_nibbles_kernel(  # type: ignore[no-untyped-def]
    codes, packed, rows, words, count, code_row, code_column, packed_row, packed_column, LANES: tl.constexpr,
    OFFSET: tl.constexpr, AWQ: tl.constexpr, WRAP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):
    """packed[i, j]: LANES (2 or 8) nibbles of row i from element LANES j on, each plus OFFSET modulo 16, in ascending places;
    AWQ: place l holds element (0, 2, 4, 6, 1, 3, 5, 7)[l]. Elements from `count` on are absent: their nibble is 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    total = tl.zeros((ROWS, WORDS), tl.int32)
    for lane in tl.static_range(LANES):
        element = word * LANES + ((lane % 4) * 2 + lane // 4 if AWQ else lane)
        inside = (row < rows)[:, None] & (element < count)[None, :]
        place = offset(row, code_row, WRAP)[:, None] + offset(element, code_column, 0)[None, :]
        nibble = tl.load(codes + place, mask=inside, other=0).to(tl.int32) & 15
        # Not (nibble + OFFSET) & 15: where OFFSET is 15 Triton 3.6 made 0 of 0 in the second place of every word; its ptxas is
        # suspected.
        nibble = tl.where(nibble + OFFSET > 15, nibble + OFFSET - 16, nibble + OFFSET)
        total |= tl.where(inside, nibble, 0) << (4 * lane)
    place = offset(row, packed_row, 0)[:, None] + offset(word, packed_column, 0)[None, :]
    tl.store(packed + place, total.to(packed.dtype.element_ty), mask=(row < rows)[:, None] & (word < words)[None, :])


def pack_nibbles(
    codes: torch.Tensor, packed: torch.Tensor, *, lanes: int = 8, shift: int = 0, awq: bool = False, wide: bool = False,
    wrap: bool = False,
) -> None:
    """uint8 codes [rows, count], any strides -> int32 [rows, ceil(count / 8)] or uint8 [rows, count / 2] (`lanes` = 2), any
    strides. `shift` is added to each code modulo 16. `wrap`: a planted fault."""
    rows, count = codes.shape
    tile = (256, 256) if wide else (32, 32)
    pack_nibbles_kernel[(triton.cdiv(rows, tile[0]), triton.cdiv(packed.shape[1], tile[1]))](
        codes, packed, rows, packed.shape[1], count, *codes.stride(), *packed.stride(), LANES=lanes, OFFSET=shift, AWQ=int(awq),
        WRAP=int(wrap), ROWS=tile[0], WORDS=tile[1],
    )


@triton.jit(do_not_specialize=["rows", "columns"])
def flip_offsets_kernel(words, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bit 3 of every nibble is inverted in place."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = words + offset(row, stride, 0)[:, None] + column[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0) ^ -0x77777778, mask=inside)


@triton.jit(do_not_specialize=["words_n", "words_k"])
def repack_int4_kernel(  # type: ignore[no-untyped-def]
    packed, repacked, words_n, words_k, packed_stride, repacked_stride, WRAP: tl.constexpr, WORDS_N: tl.constexpr,
    WORDS_K: tl.constexpr,
):
    """Words along K [N, K / 8] to words along N [K, N / 8]: each program transposes WORDS_N x WORDS_K squares of 8 x 8
    nibbles."""
    down = tl.program_id(0) * WORDS_N + tl.arange(0, WORDS_N)
    across = tl.program_id(1) * WORDS_K + tl.arange(0, WORDS_K)
    inside = (down < words_n)[:, None] & (across < words_k)[None, :]
    lane = tl.arange(0, 8)
    turned = tl.zeros((WORDS_N, WORDS_K, 8), tl.int32)  # [.., j]: word of row 8 k + j
    for i in tl.static_range(8):
        start = offset(down * 8 + i, packed_stride, WRAP)
        word = tl.load(packed + start[:, None] + across[None, :], mask=inside, other=0)
        turned |= ((word[:, :, None] >> (4 * lane)[None, None, :]) & 15) << (4 * i)
    start = offset(across[:, None] * 8 + lane[None, :], repacked_stride, 0)
    tl.store(repacked + start[None, :, :] + down[:, None, None], turned, mask=inside[:, :, None])


def repack_int4(packed: torch.Tensor, repacked: torch.Tensor, *, wide: bool = False, wrap: bool = False) -> None:
    """int32 [N, K / 8] packed along K -> int32 [K, N / 8] packed along N; last axes contiguous."""
    words_n, words_k = repacked.shape[1], packed.shape[1]
    tile = (64, 64) if wide else (16, 8)
    repack_int4_kernel[(triton.cdiv(words_n, tile[0]), triton.cdiv(words_k, tile[1]))](
        packed, repacked, words_n, words_k, packed.stride(0), repacked.stride(0), WRAP=int(wrap), WORDS_N=tile[0],
        WORDS_K=tile[1],
    )


@triton.jit(do_not_specialize=["rows", "columns"])
def transpose_words_kernel(  # type: ignore[no-untyped-def]
    words, turned, rows, columns, stride, turned_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """turned[j, i] = words[i, j], int32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    found = tl.load(words + offset(row, stride, 0)[:, None] + column[None, :], mask=inside, other=0)
    tl.store(turned + offset(column, turned_stride, 0)[None, :] + row[:, None], found, mask=inside)


# Scales --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["m", "g", "rows", "columns"])
def swizzle_scales_kernel(  # type: ignore[no-untyped-def]
    scales, swizzled, m, g, rows, columns, stride, swizzled_stride, WRAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Byte (m, g) to ((m / 128) T + g / 4) 512 + (m % 32) 16 + (m / 32 % 4) 4 + g % 4, T = columns / 4; absent ones are 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = (row < m)[:, None] & (column < g)[None, :]
    byte = tl.load(scales + offset(row, stride, WRAP)[:, None] + column[None, :], mask=present, other=0)
    down, across = row.to(tl.int64)[:, None], column[None, :]
    place = (down // 128 * (columns // 4) + across // 4) * 512 + down % 32 * 16 + down // 32 % 4 * 4 + across % 4
    place = place // columns * swizzled_stride + place % columns
    tl.store(swizzled + place, byte, mask=(row < rows)[:, None] & (column < columns)[None, :])


def swizzle_scales(
    scales: torch.Tensor, swizzled: torch.Tensor, *, rows: int = -1, wide: bool = False, wrap: bool = False,
) -> None:
    """uint8 [M, G] -> uint8 [128 ceil(M / 128), 4 ceil(G / 4)] in tiles of 128 x 4, every byte written. `rows`: fewer rows, a
    planted fault."""
    m, g = scales.shape
    height, columns = swizzled.shape
    height = height if rows < 0 else rows
    tile = (512, 512) if wide else (128, 32)
    swizzle_scales_kernel[(triton.cdiv(height, tile[0]), triton.cdiv(columns, tile[1]))](
        scales, swizzled, m, g, height, columns, scales.stride(0), swizzled.stride(0), WRAP=int(wrap), ROWS=tile[0],
        COLUMNS=tile[1],
    )


# fp8 -----------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "columns"])
def convert_fnuz_kernel(  # type: ignore[no-untyped-def]
    w, out, rows, columns, stride, out_stride, FNUZ: tl.constexpr, WRAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """FNUZ: byte 0x80 becomes 0, others stay; otherwise all stay."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    byte = tl.load(w + offset(row, stride, WRAP)[:, None] + column[None, :], mask=inside, other=0)
    if FNUZ:
        byte = tl.where(byte == 0x80, 0, byte).to(tl.uint8)
    tl.store(out + offset(row, out_stride, 0)[:, None] + column[None, :], byte, mask=inside)


@triton.jit(do_not_specialize=["count"])
def double_scales_kernel(scales, out, count, stride, out_stride, TWICE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i]: int32 binary32 code of 2 scales[i] (TWICE), or of scales[i]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(scales + offset(place, stride, 0), mask=place < count, other=0)
    if TWICE:
        found = bits.to(tl.float32, bitcast=True)
        bits = (found + found).to(tl.int32, bitcast=True)
    tl.store(out + offset(place, out_stride, 0), bits, mask=place < count)


def convert_fnuz(
    w: torch.Tensor, out: torch.Tensor, scales: tuple[tuple[torch.Tensor, torch.Tensor], ...], *, fnuz: bool, wide: bool = False,
    wrap: bool = False,
) -> None:
    """uint8 w [N, K] and int32 scales [n] or [n, 1] (from, to) of e4m3fn as a unit of `fnuz` reads them: 0x80 to 0, scales
    doubled."""
    tile = (256, 4096) if wide else (16, 512)
    convert_fnuz_kernel[(triton.cdiv(w.shape[0], tile[0]), triton.cdiv(w.shape[1], tile[1]))](
        w, out, *w.shape, w.stride(0), out.stride(0), FNUZ=int(fnuz), WRAP=int(wrap), ROWS=tile[0], COLUMNS=tile[1],
    )
    for found, target in scales:
        double_scales_kernel[(triton.cdiv(found.numel(), 1024),)](
            found, target, found.numel(), found.stride(0), target.stride(0), TWICE=int(fnuz), BLOCK=1024, **OPTIONS,
        )


@triton.jit
def shard_of(row, widths, shards):  # type: ignore[no-untyped-def]
    """Number of the shard of each row: shards lie one after the other, `widths` rows each (int32)."""
    shard, end = tl.zeros(row.shape, tl.int32), 0
    for s in range(shards):
        end += tl.load(widths + s)
        shard += (row >= end).to(tl.int32)
    return shard


@triton.jit
def largest_scale(scales, shards, SHARDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(largest of the binary32 scales, 1 where the last was never filled)."""
    place = tl.arange(0, SHARDS)
    found = tl.load(scales + place, mask=place < shards, other=-0x800001).to(tl.float32, bitcast=True)  # least finite value
    last = tl.load(scales + shards - 1).to(tl.float32, bitcast=True)
    return tl.max(found, axis=0), last <= -3.4028234663852886e38


@triton.jit(do_not_specialize=["rows", "columns", "shards"])
def requantize_fp8_kernel(  # type: ignore[no-untyped-def]
    w, scales, widths, out, scale, rows, columns, shards, stride, out_stride, FNUZ: tl.constexpr, VIA_F16: tl.constexpr,
    WRAP: tl.constexpr, SHARDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """w [rows, columns] from the scale of each shard to the largest; unfilled: bytes stay. scale[0]: the largest, int32 code."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    most, unfilled = largest_scale(scales, shards, SHARDS)
    byte = tl.load(w + offset(row, stride, WRAP)[:, None] + column[None, :], mask=inside, other=0)
    own = tl.load(scales + shard_of(row, widths, shards), mask=row < rows, other=0).to(tl.float32, bitcast=True)
    decoded = e4m3_value(byte, FNUZ) * own[:, None]
    if VIA_F16:
        decoded = rounded(decoded, 1)
    top: tl.constexpr = 224.0 if FNUZ else 448.0
    quotient = decoded * reciprocal(tl.zeros((1, 1), tl.float32) + most)
    code = e4m3_code(tl.where(quotient == quotient, quotient, top), FNUZ, top)  # NaN gives the largest code
    tl.store(out + offset(row, out_stride, 0)[:, None] + column[None, :], tl.where(unfilled, byte, code), mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale + tl.arange(0, 1), (tl.zeros((1,), tl.float32) + most).to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["rows", "shards"])
def channel_scales_kernel(scales, widths, out, rows, shards, out_stride, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[n]: the scale of the shard of row n."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.load(scales + shard_of(row, widths, shards), mask=row < rows, other=0)
    tl.store(out + offset(row, out_stride, 0), own, mask=row < rows)


def requantize_fp8(
    w: torch.Tensor, scales: torch.Tensor, widths: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, *, fnuz: bool,
    via_f16: bool = False, wide: bool = False, wrap: bool = False,
) -> None:
    """uint8 w [N, K] in shards of `widths` rows (int32 [S]) with int32 binary32 codes `scales` [S] -> uint8 `out` under the
    largest, whose code goes to `scale` [1]. A last scale never filled leaves the bytes. `via_f16`: products pass through
    binary16."""
    tile = (256, 2048) if wide else (16, 256)
    shards = scales.numel()
    requantize_fp8_kernel[(triton.cdiv(w.shape[0], tile[0]), triton.cdiv(w.shape[1], tile[1]))](
        w, scales, widths, out, scale, *w.shape, shards, w.stride(0), out.stride(0), FNUZ=int(fnuz), VIA_F16=int(via_f16),
        WRAP=int(wrap), SHARDS=triton.next_power_of_2(shards), ROWS=tile[0], COLUMNS=tile[1], **OPTIONS,
    )


# Door ----------------------------------------------------------------------------------------------------------------

_ALONG_K = {"gptq": (8, 0), "k_major": (8, 0), "nibble": (2, 0), "compressed_tensors": (8, 8)}
_ALONG_N = {"along_n": (8, 0), "awq": (8, 0), "zeros_v1": (8, 15), "zeros_v2": (8, 0)}
"""Packings by axis: (codes per word, what is added to a code)."""


def _rules(problem: Problem) -> tuple[tuple[bool, str], ...]:
    """What the contract asks of a problem (ENC-2 to ENC-11, 17, 22, 25), each with the sentence for a problem that breaks it."""
    op, variant = problem.op, problem.variant
    if op == "scale_swizzle":
        return ((problem.dim("m") > 0 and problem.dim("g") > 0, "M and G must be positive"),)
    n, k = problem.dim("n"), problem.dim("k")
    positive = (n > 0 and k > 0, "N and K must be positive")
    if op == "fp8_convert_fnuz":
        return (positive,)
    if op == "int4_repack":
        return (positive, (n % 8 == 0, f"N must be a multiple of 8, got {n}"),
                (variant != "weight" or k % 8 == 0, f"K must be a multiple of 8, got {k}"))
    if op == "fp8_requantize":
        s, fused = problem.dim("s"), problem.option("checkpoint") == "fused"
        return (positive, (0 < s <= n, f"N rows cannot be cut into S shards, got N = {n}, S = {s}"),
                (not fused or (s > 1 and variant != "channel"), "a fused checkpoint has several shards"))
    uint4 = problem.option("codes") == "uint4"
    return (
        positive,
        (variant not in ("gptq", "k_major", "b8") or k % 8 == 0, f"{variant} needs K a multiple of 8, got {k}"),
        (variant not in _ALONG_N or n % 8 == 0, f"{variant} needs N a multiple of 8, got {n}"),
        (variant != "nibble" or k % 2 == 0, f"nibble needs an even K, got {k}"),
        (variant != "compressed_tensors" or not uint4, "compressed_tensors packs int8 values"),
        (variant not in ("zeros_v1", "zeros_v2", "b8") or uint4, f"{variant} packs uint4 codes"),
    )


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for every problem in the contract's domain, otherwise the rule that it breaks."""
    return next((f"{problem.op}: {sentence}" for good, sentence in _rules(problem) if not good), None)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """One kernel."""
    return ("default",)


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """The contract fixes every bit."""
    return EXACT_BITS


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """None."""
    return 0


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView], machine: Machine) -> Any:
    """The tensors as they are."""
    return constants


def stage(problem: Problem, tactic: str, activations: Mapping[str, TensorView], machine: Machine) -> Any:
    """The tensors as they are."""
    return activations


def _pack(problem: Problem, tensors: Mapping[str, TensorView], wide: bool, mutant: str) -> None:
    if problem.variant == "b8":
        words = tensor(tensors["words"])
        tile = (256, 1024) if wide else (16, 128)
        flip_offsets_kernel[(triton.cdiv(words.shape[0], tile[0]), triton.cdiv(words.shape[1], tile[1]))](
            words, *words.shape, words.stride(0), ROWS=tile[0], COLUMNS=tile[1],
        )
        return
    q, packed = tensor(tensors["q"]), tensor(tensors["packed"])
    lanes, shift = {**_ALONG_K, **_ALONG_N}[problem.variant]
    codes = q.t() if problem.variant in _ALONG_N else q
    target = packed.t() if problem.variant == "gptq" else packed
    pack_nibbles(codes, target, lanes=lanes, shift=shift, awq=problem.variant == "awq", wide=wide, wrap=mutant == "offsets_wrap")


def _repack(problem: Problem, tensors: Mapping[str, TensorView], wide: bool, mutant: str) -> None:
    packed, repacked = rows_of(tensors["packed"])[0], tensor(tensors["repacked"])
    if problem.variant == "weight":
        repack_int4(packed, repacked, wide=wide, wrap=mutant == "offsets_wrap")
        return
    tile = (256, 256) if wide else (32, 32)
    transpose_words_kernel[(triton.cdiv(packed.shape[0], tile[0]), triton.cdiv(packed.shape[1], tile[1]))](
        packed, repacked, *packed.shape, packed.stride(0), repacked.stride(0), ROWS=tile[0], COLUMNS=tile[1],
    )


def _swizzle(problem: Problem, tensors: Mapping[str, TensorView], wide: bool, mutant: str) -> None:
    scales = rows_of(tensors["scales"])[0]
    rows = scales.shape[0] if mutant == "padding_not_written" else -1
    swizzle_scales(scales, tensor(tensors["swizzled"]), rows=rows, wide=wide,
                   wrap=mutant == "offsets_wrap")


def _convert(problem: Problem, tensors: Mapping[str, TensorView], wide: bool, mutant: str) -> None:
    names = ("weight_scale", "input_scale") if problem.option("input_scale") == "static" else ("weight_scale",)
    scales = tuple((tensor(tensors[name]), tensor(tensors[f"{name}_out"])) for name in names)
    convert_fnuz(rows_of(tensors["w"])[0], tensor(tensors["w_out"]), scales, fnuz=problem.option("hardware") == "fnuz", wide=wide,
                 wrap=mutant == "offsets_wrap")


def _requantize(problem: Problem, tensors: Mapping[str, TensorView], wide: bool, mutant: str) -> None:
    scales, widths = tensor(tensors["scales"]), tensor(tensors["widths"])
    if problem.variant == "channel":
        out = tensor(tensors["channel_scale"])
        channel_scales_kernel[(triton.cdiv(out.shape[0], 1024),)](
            scales, widths, out, out.shape[0], scales.numel(), out.stride(0), ROWS=1024,
        )
        return
    requantize_fp8(
        rows_of(tensors["w"])[0], scales, widths, tensor(tensors["w_out"]), tensor(tensors["scale"]),
        fnuz=problem.option("format") == "fnuz", via_f16=problem.variant == "max_scale_f16", wide=wide,
        wrap=mutant == "offsets_wrap",
    )


_LAUNCH: Mapping[str, Callable[[Problem, Mapping[str, TensorView], bool, str], None]] = {
    "int4_pack": _pack, "int4_repack": _repack, "scale_swizzle": _swizzle, "fp8_convert_fnuz": _convert,
    "fp8_requantize": _requantize,
}


def run(
    problem: Problem, tactic: str, state: Mapping[str, TensorView], inputs: Mapping[str, TensorView],
    outputs: Mapping[str, TensorView], workspace: TensorView, stream: Any, machine: Machine, mutant: str = "",
) -> str:
    """Launch the op's kernel."""
    _LAUNCH[problem.op](problem, {**state, **inputs, **outputs}, not machine.native, mutant)
    return f"{problem.op}_{problem.variant}"
