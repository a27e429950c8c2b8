"""What the kernel reads and writes, in CuTe: instructions, shared-memory layouts, tensor maps.

Decides: the tiled MMAs of both products, the layout of every ring and the tensor map of every operand, from the record
`Config` alone. Global layouts: codes of A [m, k] and W [n, k] row-major, two codes a byte, the low nibble the even k; scales in
128 x 4 tiles (schedule.scale_offset); lora_act [m, r], lora_up [n, r] and D [m, n] row-major in the output format.
Runs only while CuTe DSL traces. Annotations are evaluated here, because CuTe DSL reads them: no postponed evaluation.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as sm100
import cutlass.utils.blockscaled_layout as blockscaled
from cutlass.cute.nvgpu import cpasync, tcgen05

from .schedule import CTA_ROWS, K_BLOCK, LORA_BLOCK, SCALE_GROUP, STORE_COLUMNS, Config, ceil_div, scale_offset

__all__ = [
    "CODES", "SCALES", "Products", "Rings", "cta_group", "loads", "lora_tiler", "main_tiler", "number_type", "out_store",
    "products", "rings", "scale_layout",
]

CODES = cutlass.Float4E2M1FN
"""Type of the operands' codes."""
SCALES = cutlass.Float8E4M3FN
"""Type of their scales; the sign bit is not read."""
_K_MAJOR = tcgen05.OperandMajorMode.K


def number_type(config: Config) -> Any:
    """CuTe type of the output format."""
    return cutlass.Float16 if config.out == "f16" else cutlass.BFloat16


def cta_group(config: Config) -> Any:
    """CTAs that one instruction spans."""
    return tcgen05.CtaGroup.TWO if config.tile.ctas == 2 else tcgen05.CtaGroup.ONE


@dataclass(frozen=True)
class Products:
    """The tiled MMAs: `main` block-scaled e2m1, `scales_w` the one-CTA view by which a CTA loads all scales of W, `lora` the
    16-bit product, which accumulates into the same tensor memory."""

    main: cute.TiledMma
    scales_w: cute.TiledMma
    lora: cute.TiledMma


def products(config: Config) -> Products:
    """The tiled MMAs of an instance. Built anew in each role, since accumulate and scale fields are set on the object."""
    tile = config.tile

    def scaled(group: Any, m: int) -> cute.TiledMma:
        return sm100.make_blockscaled_trivial_tiled_mma(CODES, _K_MAJOR, _K_MAJOR, SCALES, SCALE_GROUP, group, (m, tile.n))

    lora = sm100.make_trivial_tiled_mma(
        number_type(config), _K_MAJOR, _K_MAJOR, cutlass.Float32, cta_group(config), (tile.m, tile.n)
    )
    return Products(scaled(cta_group(config), tile.m), scaled(tcgen05.CtaGroup.ONE, CTA_ROWS), lora)


@dataclass(frozen=True)
class Rings:
    """Layouts of the rings in shared memory, last mode the stage: codes, scales, low-rank operands, output staging."""

    a: cute.ComposedLayout
    w: cute.ComposedLayout
    scale_a: cute.Layout
    scale_w: cute.Layout
    lora_act: cute.ComposedLayout | None
    lora_up: cute.ComposedLayout | None
    out: cute.ComposedLayout


def main_tiler(config: Config) -> tuple[int, int, int]:
    """m, n, k of one stage of the main ring."""
    return config.tile.m, config.tile.n, K_BLOCK


def lora_tiler(config: Config) -> tuple[int, int, int]:
    """m, n, r of one stage of the low-rank ring."""
    return config.tile.m, config.tile.n, LORA_BLOCK


def rings(config: Config, mma: Products) -> Rings:
    """The layouts of an instance."""
    main, lora, number = main_tiler(config), lora_tiler(config), number_type(config)
    stages, lora_stages = config.main_stages, config.lora_stages
    return Rings(
        a=sm100.make_smem_layout_a(mma.main, main, CODES, stages),
        w=sm100.make_smem_layout_b(mma.main, main, CODES, stages),
        scale_a=blockscaled.make_smem_layout_sfa(mma.main, main, SCALE_GROUP, stages),
        scale_w=blockscaled.make_smem_layout_sfb(mma.main, main, SCALE_GROUP, stages),
        lora_act=sm100.make_smem_layout_a(mma.lora, lora, number, lora_stages) if config.lora else None,
        lora_up=sm100.make_smem_layout_b(mma.lora, lora, number, lora_stages) if config.lora else None,
        out=sm100.make_smem_layout_epi(
            number, cutlass.utils.LayoutEnum.ROW_MAJOR, (CTA_ROWS, STORE_COLUMNS), config.store_stages
        ),
    )


def scale_layout(rows: Any, k: Any) -> cute.Layout:
    """Global layout (((32, 4), row tiles), ((16, 4), group tiles)) of scales, each stride the offset of one unit of its digit.

    Rows beyond `rows` and groups beyond `k` up to the tile are padding and zero (conformance ENC-17)."""
    groups = k // SCALE_GROUP
    row_tile = cute.assume(scale_offset(128, 0, groups), divby=512)
    shape = (((32, 4), ceil_div(rows, 128)), ((SCALE_GROUP, 4), ceil_div(groups, 4)))
    strides = (
        ((scale_offset(1, 0, 1), scale_offset(32, 0, 1)), row_tile), ((0, scale_offset(0, 1, 1)), scale_offset(0, 4, 1)),
    )
    return cute.make_layout(shape, stride=strides)


def _row_major(pointer: Any, rows: Any, columns: Any, unit: int) -> cute.Tensor:
    """Row-major matrix whose row length is a multiple of `unit` elements, so that rows start on 16 bytes."""
    columns = cute.assume(columns, divby=unit)
    return cute.make_tensor(pointer, cute.make_layout((rows, columns), stride=(columns, 1)))


def _load_op(config: Config, shared: bool) -> Any:
    """Tensor-map load, to one CTA or to several."""
    return (cpasync.CopyBulkTensorTileG2SMulticastOp if shared else cpasync.CopyBulkTensorTileG2SOp)(cta_group(config))


def _stage(layout: Any) -> Any:
    return cute.slice_(layout, (None, None, None, 0))


def loads(config: Config, mma: Products, ring: Rings, pointers: dict[str, Any], m: Any, n: Any, k: Any, r: Any) -> list[Any]:
    """(copy atom, tensor of coordinates) of A, W, scales of A, scales of W and, with a low-rank term, lora_act, lora_up."""
    tile = config.tile
    cluster = (tile.ctas, config.cluster_m // tile.ctas, config.cluster_n, 1)
    cluster_scales_w = (1, config.cluster_m, config.cluster_n, 1)
    op_a = _load_op(config, config.cluster_n > 1)
    op_w = _load_op(config, config.cluster_m > tile.ctas)
    op_scales_w = _load_op(config, config.cluster_m > 1)
    scales_a = cute.make_tensor(pointers["a_scale"], scale_layout(m, k))
    scales_w = cute.make_tensor(pointers["w_scale"], scale_layout(n, k))
    main, lora = main_tiler(config), lora_tiler(config)
    make_a, make_b = cute.nvgpu.make_tiled_tma_atom_A, cute.nvgpu.make_tiled_tma_atom_B
    found = [
        make_a(op_a, _row_major(pointers["a"], m, k, 32), _stage(ring.a), main, mma.main, cluster),
        make_b(op_w, _row_major(pointers["w"], n, k, 32), _stage(ring.w), main, mma.main, cluster),
        make_a(op_a, scales_a, _stage(ring.scale_a), main, mma.main, cluster, internal_type=cutlass.Int16),
        make_b(
            op_scales_w, scales_w, _stage(ring.scale_w), (CTA_ROWS, tile.n, K_BLOCK), mma.scales_w, cluster_scales_w,
            internal_type=cutlass.Int16,
        ),
    ]
    if config.lora:
        found += [
            make_a(op_a, _row_major(pointers["lora_act"], m, r, 16), _stage(ring.lora_act), lora, mma.lora, cluster),
            make_b(op_w, _row_major(pointers["lora_up"], n, r, 16), _stage(ring.lora_up), lora, mma.lora, cluster),
        ]
    return found


def out_store(ring: Rings, pointer: Any, m: Any, n: Any) -> Any:
    """(copy atom, tensor of coordinates) by which blocks of 128 x STORE_COLUMNS of D are stored; rows and columns outside D
    are left out by the tensor map."""
    return cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileS2GOp(), _row_major(pointer, m, n, 8), cute.slice_(ring.out, (None, None, 0)),
        (CTA_ROWS, STORE_COLUMNS),
    )
