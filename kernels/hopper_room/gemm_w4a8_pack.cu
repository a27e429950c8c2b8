// Weights and group scales of gemm_w4a8_fp8 in the order in which gemm_w4a8.cu reads them, in one pass.
//
// Decides: the layout that the head of gemm_w4a8.cu describes. Rows beyond N and codes beyond K stand for zero, with a scale of
// zero. Refuses nothing: gemm_w4a8.py does. Both forms of the weights hold two's complement codes: one per byte (low four bits),
// or eight along K in a word, bits 4 i to 4 i + 3 holding k = 8 j + i. `flip` is XORed into every word (0x88888888: codes are
// value + 8).
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int THREADS = 256;

// Sixteen bytes of a row of packed codes: k = 32 piece to 32 piece + 31.
template <bool WORDS>
__device__ __forceinline__ uint4 sixteen(const uint8_t* row, long long k, long long limit, bool whole) {
  uint32_t words[4] = {0, 0, 0, 0};
  if (WORDS) {
    if (whole && k + 32 <= limit) return __ldcs(reinterpret_cast<const uint4*>(row + k / 2));
    for (int i = 0; i < 4; ++i) {
      if (k + 8 * i < limit) words[i] = *reinterpret_cast<const uint32_t*>(row + k / 2 + 4 * i);
    }
  } else {
    for (int i = 0; i < 32; ++i) {
      if (k + i < limit) words[i / 8] |= (uint32_t)(row[k + i] & 0xF) << (4 * (i % 8));
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One block of 64 rows by 128 k per 128 threads; grid-stride over all blocks of all experts.
template <bool WORDS>
__global__ void __launch_bounds__(THREADS) pack(const uint8_t* weights, const uint8_t* scales, uint8_t* out, long long n,
                                                long long k, long long experts, int group, uint32_t flip, int whole) {
  __shared__ uint32_t rows[THREADS / 128][64][17];
  const int half = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, per_block = 128 / group;
  const long long n_blocks = (n + 63) / 64, k_blocks = (k + 127) / 128, groups = k / group, total = experts * n_blocks * k_blocks;
  const long long row_bytes = WORDS ? k / 2 : k;
  const int block_bytes = 4096 + 64 * per_block;
  const long long stride = (long long)gridDim.x * (THREADS / 128);
  for (long long first = (long long)blockIdx.x * (THREADS / 128); first < total; first += stride) {
    const long long index = first + half;
    const bool live = index < total;
    const long long k_block = index % k_blocks, expert = index / k_blocks / n_blocks, n_block = index / k_blocks % n_blocks;
    if (live) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = thread / 4 + 32 * i, piece = thread % 4;
        const long long at = n_block * 64 + row;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (at < n) {
          value = sixteen<WORDS>(weights + (expert * n + at) * row_bytes, k_block * 128 + 32 * piece, k, whole);
          const long long left = k - (k_block * 128 + 32 * piece);  // codes beyond K stay zeros: K is a multiple of 64
          if (left > 0) value.x ^= flip, value.y ^= flip, value.z ^= flip, value.w ^= flip;
        }
        uint32_t* to = &rows[half][row][4 * piece];
        to[0] = value.x, to[1] = value.y, to[2] = value.z, to[3] = value.w;
      }
    }
    __syncthreads();
    if (live) {
      uint8_t* block = out + index * block_bytes;
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int step = 2 * run + i / 2, row = 16 * warp + lane / 4 + 8 * (i % 2), four = lane % 4;
          const uint32_t near = rows[half][row][4 * step + four / 2] >> (16 * (four % 2)) & 0xFFFF;
          const uint32_t far = rows[half][row][4 * step + 2 + four / 2] >> (16 * (four % 2));
          words[i] = (near | far << 16) ^ 0x88888888u;  // two's complement to value + 8
        }
        *reinterpret_cast<uint4*>(block + 2048 * run + 16 * thread) = make_uint4(words[0], words[1], words[2], words[3]);
      }
      if (thread < 64 * per_block) {
        const int pair = thread / 2 / per_block, part = thread / 2 % per_block;
        const long long row = n_block * 64 + pair / 8 * 16 + pair % 8 + 8 * (thread % 2), at = k_block * per_block + part;
        block[4096 + thread] = row < n && at < groups ? scales[(expert * n + row) * groups + at] : 0;
      }
    }
    __syncthreads();
  }
}

}  // namespace

// weights: codes [experts, n, k], a byte each, or words [experts, n, k / 8]; scales: e4m3 [experts, n, k / group]; out: experts x
// ceil(n / 64) x ceil(k / 128) blocks. group is 64 or 128 and divides k. Returns a cudaError_t; never waits.
extern "C" int lowbit_pack_w4a8(const void* weights, const void* scales, void* out, long long n, long long k, long long experts,
                                int group, int words, unsigned flip, void* stream) {
  const long long pairs = (experts * ((n + 63) / 64) * ((k + 127) / 128) + 1) / 2;
  const unsigned grid = (unsigned)(pairs < 132 * 64 ? pairs : 132 * 64);
  const int whole = (uintptr_t)weights % 16 == 0 && (k / 2) % 16 == 0;
  const auto kernel = words ? pack<true> : pack<false>;
  (void)cudaGetLastError();  // what failed before is not this launch's
  kernel<<<grid, THREADS, 0, (cudaStream_t)stream>>>((const uint8_t*)weights, (const uint8_t*)scales, (uint8_t*)out, n, k,
                                                    experts, group, flip, whole);
  return cudaGetLastError();
}
