"""What is changed in sources of the room: honest variants, and planted defects with what shows them.

A defect is one of the mistakes that a kernel of this kind is prone to.
"""

from __future__ import annotations

from dataclasses import dataclass

from emulated import Patches

__all__ = ["HONEST", "MUTANTS", "Mutant"]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One planted defect. `case` and `run` (tactic and machine, as door.py reads them, without the defect's name): where it must
    be caught. `shows`: a pattern for how: "bits" for wrong outputs, else the machine's complaint."""

    patches: Patches
    case: str
    run: str
    shows: str


_FOLDED = "gemm_w4a8_fp8/folded/m40n200k2560g128/bf16.bias/normal/s1"
_EXACT = "gemm_w4a8_fp8/exact/m40n200k1280g64/f16/normal/s1"
_FAST = "gemm_w8a8_fp8/scaled/m140n392k2064/bf16/normal/s1"
_SHORT = "gemm_w8a8_fp8/scaled/m140n392k272/bf16/normal/s1"
_BLOCK = "gemm_w8a8_fp8/block/m70n264k640/f16/normal/s1"
_W4, _TILES, _W8 = "gemm_w4a8.cu", "gemm_w4a8_tiles.cuh", "gemm_w8a8.cu"
_PTX, _F, _E = "sm90.cuh", "fp8.cuh", "encodings.cu"

_TWO_STAGES = ("#ifndef EXACT\n", "#undef STAGES\n#define STAGES 2\n#ifndef EXACT\n")

HONEST: dict[str, Patches] = {"two_stages": {_W4: (_TWO_STAGES,)}}
"""Variants that must give the same bits: the shortest ring of stages, in which every stage is filled again at once."""

MUTANTS: dict[str, Mutant] = {
    "released_early": Mutant(
        {_W4: (
            (
                "    wgmma_wait<1>();  // the whole block before is done\n    if (left < blocks) release(empty, held, thread);\n",
                "    if (left < blocks) release(empty, held, thread);\n    wgmma_wait<1>();\n",
            ),
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2", "bits",
    ),
    "released_early_exact": Mutant(
        {_W4: (
            (
                "    wgmma_wait<0>();\n    release(empty, done, thread);\n",
                "    release(empty, done, thread);\n    wgmma_wait<0>();\n",
            ),
        )},
        _EXACT, "128x16_k1x1@early-late-s1-p2", "bits",
    ),
    "no_wait_for_data": Mutant(
        {_W4: (
            ("      if (left > 2) wait(full + 8 * ahead.stage, ahead.phase);\n    } else", "    } else"),
        )},
        _FOLDED, "128x16_k1x1@late-early-s1-p2", "bits|more than",
    ),
    "one_arrival_too_many": Mutant(
        {_W4: (
            ("4 * WARPGROUPS * CLUSTER);", "4 * WARPGROUPS * CLUSTER + 1);"),
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2", "deadlock.*lacks 1 of 9 arrivals",
    ),
    "one_arrival_too_few": Mutant(
        {_W4: (
            ("4 * WARPGROUPS * CLUSTER);", "4 * WARPGROUPS * CLUSTER - 1);"),
            _TWO_STAGES,
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2", "bits|deadlock",
    ),
    "fragment_overwritten": Mutant(
        {_W4: (
            ("    wgmma_wait<1>();  // the first half of the block before is done: its registers are free\n", ""),
        )},
        _FOLDED, "128x32_k1x1@early-late-s2-p2", "bits",
    ),
    "no_fence_before_products": Mutant(
        {_W4: (
            (
                "  sm90::wgmma_fence();\n  sm90::Wgmma<TOKENS>::registers(sums, a, b, accumulate);\n",
                "  sm90::Wgmma<TOKENS>::registers(sums, a, b, accumulate);\n",
            ),
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2", r"no wgmma\.fence",
    ),
    "sums_read_early": Mutant(
        {_W4: (
            (
                "  wgmma_wait<0>();\n  pin(sums);\n  release(empty, held, thread);\n",
                "  pin(sums);\n  release(empty, held, thread);\n",
            ),
        )},
        _FOLDED, "128x16_k1x1@early-early-s1-p2", "bits|written while products|in flight|on their way",
    ),
    "order_of_k": Mutant(
        {_W4: (
            (
                "registers(sums, a, b, accumulate);\n  sm90::Wgmma<TOKENS>::registers(sums, a + 4, b + 2, 1);\n",
                "registers(sums, a + 4, b + 2, accumulate);\n  sm90::Wgmma<TOKENS>::registers(sums, a, b, 1);\n",
            ),
        )},
        _FOLDED, "128x64_k1x1@early-late-s1-p3", "bits",
    ),
    "sums_not_taken": Mutant(
        {_W4: (
            ("  wait(taken, phase ^ 1);  // what was sent for the tile before is read\n", ""),
        )},
        _FOLDED, "128x16_k2x1@late-early-s1-p2", "bits",
    ),
    "sums_not_awaited": Mutant(
        {_W4: (
            ("  wait(ready, phase);\n", ""),
        )},
        _FOLDED, "128x16_k1x2@late-early-s1-p2", "bits|more than|deadlock",
    ),
    "swizzle_of_staging": Mutant(
        {_TILES: (
            ("((2 * warp + matrix % 2) ^ (lane % 8)) << 4", "(2 * warp + matrix % 2) << 4"),
        )},
        _FOLDED, "128x32_k1x1@late-early-s1-p2", "bits",
    ),
    "swizzle_of_tokens": Mutant(
        {_PTX: (
            (
                "CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,",
                "CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,",
            ),
        )},
        _FOLDED, "128x32_k1x1@late-early-s1-p2", "bits",
    ),
    "staging_not_awaited": Mutant(
        {_TILES: (
            ("words[2], words[3]);\n    }\n    sync_threads(1 + band, 128);\n", "words[2], words[3]);\n    }\n"),
        )},
        _FOLDED, "128x32_k1x1@early-late-s1-p2", "bits",
    ),
    "staging_used_again": Mutant(
        {_TILES: (
            ("      }\n    }\n    sync_threads(1 + band, 128);\n  }\n}\n", "      }\n    }\n  }\n}\n"),
        )},
        _FOLDED, "128x64_k1x1@early-late-s1-p2", "bits",
    ),
    "table_not_awaited": Mutant(
        {_W4: (
            ("    sync_threads(1 + BANDS, THREADS - 128);\n", ""),
        )},
        _FOLDED, "128x16_k1x1@early-early-s8-p2", "bits",
    ),
    "barriers_not_fenced": Mutant(
        {_W4: (
            ("    barrier_init_fence();\n", ""),
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2", "without a fence",
    ),
    "cluster_not_met": Mutant(
        {_W4: (
            (
                "  __syncthreads();\n  if (BLOCKS > 1) {\n    cluster_arrive();\n    cluster_wait();\n  }\n",
                "  __syncthreads();\n",
            ),
        )},
        _FOLDED, "128x16_k2x1@early-early-s4-p2", "initialised|st.async",
    ),
    "cluster_left": Mutant(
        {_W4: (
            ("    __syncwarp();\n    cluster_arrive();\n    cluster_wait();\n", "    __syncwarp();\n"),
        )},
        _FOLDED, "128x16_k2x1@late-early-s1-p2", "has ended|on their way",
    ),
    "phase_kept": Mutant(
        {_W4: (
            ("        phase ^= 1;\n", ""),
        )},
        _FOLDED, "128x16_k1x2@early-late-s1-p2", "bits|deadlock|more",
    ),
    "copies_not_awaited": Mutant(
        {_W4: (
            ("      launch_wait();\n      copy_tiles<false>", "      copy_tiles<false>"),
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2-ahead", "bits",
    ),
    "both_launches_not_awaited": Mutant(
        {_W4: (
            ("memory + AT_EPILOGUE};\n    launch_wait();\n", "memory + AT_EPILOGUE};\n"),
            ("      launch_wait();\n      copy_tiles<true>", "      copy_tiles<true>"),
            ("      launch_wait();\n      copy_tiles<false>", "      copy_tiles<false>"),
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2-ahead", "bits",
    ),
    "bytes_expected": Mutant(
        {_W4: (
            (
                "filled * (WEIGHTS ? BANDS * BLOCK_BYTES : TILE_BYTES)",
                "filled * (WEIGHTS ? BANDS * BLOCK_BYTES : TILE_BYTES) + 16",
            ),
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2", "deadlock.*lacks 0 of 2 arrivals, 32 bytes",
    ),
    "registers_beyond": Mutant(
        {_W4: (
            ("WARPGROUPS == 2 ? 224 :", "WARPGROUPS == 2 ? 232 :"),
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2", r"wait for setmaxnreg\.inc, \d+ registers are free",
    ),
    "row_beyond": Mutant(
        {_TILES: (
            ("n < p.n && (chunk + token)", "n <= p.n && (chunk + token)"),
        )},
        _FOLDED, "128x16_k1x1@early-late-s1-p2", "bits|written|access",
    ),
    "w8_released_early": Mutant(
        {_W8: (
            (
                "          sm90::wgmma_wait<1>();\n          if (step > 0) release(last);\n",
                "          release(slot);\n          sm90::wgmma_wait<1>();\n",
            ),
            ("        sm90::pin(d);\n        release(last);\n", "        sm90::pin(d);\n"),
        )},
        _FAST, "fast_m128n128w2@early-late-s1-p2", "bits|deadlock",
    ),
    "w8_no_wait_for_data": Mutant(
        {_W8: (
            (
                "          sm90::wait(barriers + 8 * slot, phase);\n          multiply(d, step == 0);\n",
                "          multiply(d, step == 0);\n",
            ),
        )},
        _FAST, "fast_m64n96@late-early-s1-p2", "bits|more than",
    ),
    "w8_cluster_left": Mutant(
        {_W8: (
            (
                "  if (CLUSTER > 1) {  // a block's memory stays until the others have written to it and signalled\n"
                "    sm90::cluster_arrive();\n    sm90::cluster_wait();\n  }\n",
                "",
            ),
        )},
        _FAST, "fast_m128n128w2@late-early-s1-p4", "has ended|on their way",
    ),
    "w8_part_of_multicast": Mutant(
        {_W8: (
            ("to + rank * (TN / CLUSTER) * TK, &map_w", "to, &map_w"),
        )},
        _FAST, "fast_m128n128w2@early-late-s1-p4", "bits",
    ),
    "w8_empty_of_one_block": Mutant(
        {_W8: (
            ("4 * GROUPS * CLUSTER);", "4 * GROUPS);"),
            ("if (lane < CLUSTER) arrive_at(empty, lane);", "if (lane == 0) sm90::arrive(empty);"),
        )},
        _FAST, "fast_m128n128w2@early-late-s1-p2", "bits|bytes more|more than",
    ),
    "w8_factors_not_awaited": Mutant(
        {_W8: (
            ("      sm90::sync_threads(1 + group, 128);\n      const int rows", "      const int rows"),
        )},
        _FAST, "fast_m64n96@early-late-s1-p2", "bits",
    ),
    "w8_factors_used_again": Mutant(
        {_W8: (
            ("      sm90::sync_threads(1 + group, 128);  // nobody reads those of the tile before any more\n", ""),
        )},
        _SHORT, "fast_m64n96@early-early-s3-p2", "bits",
    ),
    "w8_factors_of_the_tile_before": Mutant(
        {_W8: (
            ("        f = factors_of(g, following.m + within, following.n);\n", ""),
        )},
        _FAST, "fast_m64n96@early-late-s1-p2", "bits",
    ),
    "w8_warp_not_met": Mutant(
        {_W8: (
            ("    }\n    __syncwarp();\n#pragma unroll\n", "    }\n#pragma unroll\n"),
        )},
        _FAST, "fast_m64n96@early-late-s1-p2", "bits",
    ),
    "w8_scale_of_the_next_block": Mutant(
        {_W8: (
            (
                "if (SUMS == 2) {\n"
                "            const float w0 = __ldg(g.w_scale + (long long)min(block, (g.n + 127) / 128 - 1) * steps + step);",
                "if (SUMS == 2) {\n            const float w0 = __ldg(g.w_scale + (long long)other * steps + step);",
            ),
        )},
        _BLOCK, "block_m64n96@early-late-s1-p2", "bits",
    ),
    "w8_launch_not_awaited": Mutant(
        {_W8: (
            ("    sm90::launch_wait();\n    const int group", "    const int group"),
        )},
        _FAST, "fast_m64n96@early-late-s1-p2-ahead", "bits",
    ),
    "warps_not_met": Mutant(
        {_F: (
            (
                "    if (lane == 0) room[threadIdx.x / 32] = bits;\n    __syncthreads();\n",
                "    if (lane == 0) room[threadIdx.x / 32] = bits;\n",
            ),
        )},
        "fp8_quantize/token/m8k4096p0/bf16/lognormal/s0", "registers@early-late-s1-p4", "bits",
    ),
    "stage_not_awaited": Mutant(
        {_E: (
            (
                "make_uint4(words[4], words[5], words[6], words[7]);\n        __syncwarp();\n",
                "make_uint4(words[4], words[5], words[6], words[7]);\n",
            ),
        )},
        "int4_encode/dense/e1n48k384/plain/normal/s0", "default@early-late-s1-p4", "bits",
    ),
}
"""Defects by name."""
