// Sizes that the host hands to quantize_int4, project_lora, pack_int4 and convert_b8, each as one block of little-endian
// 32-bit words.
#ifndef LOWBIT_QUANTIZE_TILING_H
#define LOWBIT_QUANTIZE_TILING_H

#include <cstdint>

struct QuantizeTiling {
    uint32_t m;       // rows of x
    uint32_t k;       // columns of x, a multiple of 64
    uint32_t rows;    // rows of the outputs, a multiple of 16, at least m; those from m on become zero
    uint32_t r;       // columns of lora_act whose rows from m on become zero; 0: there is no lora_act
    uint32_t smooth;  // 1: x is divided by smooth[k] first
    uint32_t bf16;    // 1: x and smooth are bfloat16, 0: binary16
};

struct ProjectTiling {
    uint32_t m;     // rows of x and of the result
    uint32_t k;     // a multiple of 64
    uint32_t r;     // columns of the result, a multiple of 16
    uint32_t bf16;  // 1: both operands are bfloat16, 0: binary16
};

struct PackTiling {
    uint32_t count;   // codes, even; for convert_b8 a multiple of 8
    uint32_t offset;  // pack_int4, 1: codes are stored as value + 8, so that bit 3 is inverted
};

#endif
