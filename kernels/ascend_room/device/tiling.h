// Plain records that the host fills and a kernel reads through its last argument, and the sizes both sides must agree on.
//
// Every field is a fixed-width little-endian integer, without padding: a host writes the record as its fields in order.
// A host allocates workspace as blocks x GEMM_INT4_WORKSPACE_PER_BLOCK bytes; its contents on entry do not matter.

#ifndef LOWBIT_ASCEND_TILING_H
#define LOWBIT_ASCEND_TILING_H

#include <cstdint>

// One output tile of gemm_int4, and the ring in global memory through which the cube core hands 32-bit tiles to the two
// vector cores of its block.
constexpr uint32_t GEMM_INT4_TILE_M = 128;
constexpr uint32_t GEMM_INT4_TILE_N = 128;
constexpr uint32_t GEMM_INT4_GROUP = 64;
constexpr uint32_t GEMM_INT4_RING_SLOTS = 4;
constexpr uint32_t GEMM_INT4_SLOT_BYTES = GEMM_INT4_TILE_M * GEMM_INT4_TILE_N * 4;
constexpr uint32_t GEMM_INT4_WORKSPACE_PER_BLOCK = GEMM_INT4_RING_SLOTS * GEMM_INT4_SLOT_BYTES;

// m >= 0, n a multiple of 8, k a multiple of 64 and at most 131008 (a row of codes is k/2 bytes and the copy engine's row
// pitch is 16 bits), r 0 or a multiple of 16. A flag of 0 means that its operand is absent and its address never read.
struct GemmInt4Tiling {
    uint32_t m;
    uint32_t n;
    uint32_t k;
    uint32_t r;
    uint32_t hasChannelScale;
    uint32_t hasBias;
};

#endif
