// Eight-bit floats and their inputs as the quantisers and encodings of this folder use them: loads and stores of 16 bytes, wide
// values, largest magnitudes, exact quotients, codes. Everything rounds as written: each operation is one binary32 rounding.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace lowbit {

enum Real : int { BF16 = 0, F16 = 1, F32 = 2 };       // formats of unquantised values
enum class Nan { KEEP, HIGH, LOW };                   // what a NaN becomes: a NaN code, the upper bound, the lower bound

template <int X>
constexpr int LANES = X == F32 ? 4 : 8;               // values in 16 bytes

template <int X>
constexpr int BYTES = X == F32 ? 4 : 2;

// Read once and not wanted again: neither level of cache has to keep it.
__device__ __forceinline__ uint4 load_once(const void* address)
{
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ uint4 load(const void* address) { return *static_cast<const uint4*>(address); }

// One value of format X at index i of an array, in binary32.
template <int X>
__device__ __forceinline__ float value_at(const void* base, long long i)
{
    if constexpr (X == F32) return static_cast<const float*>(base)[i];
    const uint16_t code = static_cast<const uint16_t*>(base)[i];
    if constexpr (X == BF16) return __uint_as_float(uint32_t(code) << 16);
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(code));
    return wide;
}

// The values of one 16-byte word, lowest address first.
template <int X>
__device__ __forceinline__ void widen(uint4 v, float (&f)[LANES<X>])
{
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (X == F32) {
            f[i] = __uint_as_float(words[i]);
        } else if constexpr (X == BF16) {
            f[2 * i] = __uint_as_float(words[i] << 16);
            f[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
        } else {
            asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
                : "=f"(f[2 * i]), "=f"(f[2 * i + 1]) : "r"(words[i]));
        }
    }
}

// Largest magnitude as the bits of a binary32, which order as the magnitudes do, NaN above all. COUNTS: whether a NaN counts.
template <bool COUNTS>
__device__ __forceinline__ uint32_t larger(uint32_t most, float f)
{
    const uint32_t bits = __float_as_uint(f) & 0x7FFFFFFFu;
    if constexpr (COUNTS) return max(most, bits);
    return __float_as_uint(fmaxf(__uint_as_float(most), __uint_as_float(bits)));
}

// The same over words of two 16-bit values each (`most` holds two maxima) or of one binary32.
template <int X, bool COUNTS>
__device__ __forceinline__ uint32_t larger_word(uint32_t most, uint32_t word)
{
    if constexpr (X == F32) return larger<COUNTS>(most, __uint_as_float(word));
    const uint32_t bits = word & 0x7FFF7FFFu;
    uint32_t found = 0;
    if constexpr (X == BF16 && COUNTS) asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(most), "r"(bits));
    if constexpr (X == BF16 && !COUNTS) asm("max.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(most), "r"(bits));
    if constexpr (X == F16 && COUNTS) asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(found) : "r"(most), "r"(bits));
    if constexpr (X == F16 && !COUNTS) asm("max.f16x2 %0, %1, %2;" : "=r"(found) : "r"(most), "r"(bits));
    return found;
}

template <int X, bool COUNTS>
__device__ __forceinline__ uint32_t larger_vector(uint32_t most, uint4 v)
{
    most = larger_word<X, COUNTS>(most, v.x);
    most = larger_word<X, COUNTS>(most, v.y);
    most = larger_word<X, COUNTS>(most, v.z);
    return larger_word<X, COUNTS>(most, v.w);
}

// From the maxima of words to the bits of one binary32.
template <int X, bool COUNTS>
__device__ __forceinline__ uint32_t single(uint32_t most)
{
    if constexpr (X == F32) return most;
    float f[LANES<X>];
    widen<X>(make_uint4(most, 0, 0, 0), f);
    return larger<COUNTS>(larger<COUNTS>(0u, f[0]), f[1]);
}

// Largest of all threads of a block of at most 1,024; every thread gets it. `room`: 32 words of shared memory.
__device__ __forceinline__ uint32_t block_max(uint32_t bits, uint32_t* room)
{
    bits = __reduce_max_sync(0xFFFFFFFFu, bits);
    if (blockDim.x <= 32) return bits;
    const int lane = threadIdx.x & 31, warps = (blockDim.x + 31) / 32;
    if (lane == 0) room[threadIdx.x / 32] = bits;
    __syncthreads();
    return __reduce_max_sync(0xFFFFFFFFu, lane < warps ? room[lane] : 0u);
}

// What values are divided by. `plain`: scale and quotients are so far inside the range of binary32 that nothing overflows, and
// nothing is lost below where a code depends on it.
struct Divisor {
    float scale, inverse;
    bool plain;
};

constexpr float PLAIN = 1.2676506e30f;                // 2^100

// fl(x / scale) where `plain`, of which codes of eight bits cannot tell another value: with inverse = fl(1 / scale), the first
// correction leaves less than an ulp, and the second then rounds correctly (Markstein 1990). The signs are such that -0 stays -0.
__device__ __forceinline__ float quotient(float x, Divisor d)
{
    float q = __fmul_rn(x, d.inverse);
    q = __fmaf_rn(-__fmaf_rn(q, d.scale, -x), d.inverse, q);
    return __fmaf_rn(-__fmaf_rn(q, d.scale, -x), d.inverse, q);
}

// The format of the codes: e4m3fn, or e4m3fnuz. `top`: what the largest magnitude is brought to, and the bound of quotients.
struct Target {
    float top;
    int fnuz;
};

__device__ __forceinline__ uint32_t e4m3fn_pair(float low, float high)
{
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

// Up to 224 in magnitude, beyond which no quotient goes, the code of v is that of 2 v in e4m3fn, but for NaN and the missing -0.
__device__ __forceinline__ uint32_t e4m3fnuz(float v)
{
    if (isnan(v)) return 0x80u;
    const uint32_t code = e4m3fn_pair(2.0f * v, 0.0f) & 0xFFu;
    return code == 0x80u ? 0u : code;
}

template <Nan N>
__device__ __forceinline__ float bounded(float v, Target t)
{
    if constexpr (N == Nan::HIGH) return fminf(v, t.top);  // the other bound is the conversion's own: 448, or half of it
    if constexpr (N == Nan::LOW) return fmaxf(v, -t.top);
    return v;
}

template <Nan N>
__device__ __forceinline__ uint32_t code_pair(float low, float high, Target t)
{
    low = bounded<N>(low, t), high = bounded<N>(high, t);
    if (!t.fnuz) return e4m3fn_pair(low, high);
    return e4m3fnuz(low) | e4m3fnuz(high) << 8;
}

// e4m3fn codes in the low two bytes as binary32 values, exact.
__device__ __forceinline__ float2 e4m3fn_values(uint32_t pair)
{
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(pair)));
    float2 f;
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(f.x), "=f"(f.y) : "r"(halves));
    return f;
}

inline bool aligned(const void* p, long long row_bytes, int to)
{
    return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(row_bytes)) % to == 0;
}

inline unsigned blocks_for(long long work, long long most = 1 << 30)
{
    return static_cast<unsigned>(work < most ? work : most);
}

}  // namespace lowbit
