// D[M, N] = cast(scale * sum_k A[m, k] W[n, k] + bias): e4m3 by e4m3 on wgmma with both operands in shared memory.
//
// One library per instance of the macros: W8A8_TM (8, 32, 64 or 128) by W8A8_TN is the tile of a block, W8A8_SUMS how it sums (0
// the whole of K in the unit, 1 every 128 of K from zero into an f32 total, 2 as 1 with a scale of A per 1 x 128 and of W per 128
// x 128). W8A8_CLUSTER blocks work on neighbouring tiles along M and share the rows of W: each fetches its part of them, and the
// copy engine writes it to all. A block is one warpgroup that fetches and one per 64 rows of the tile that multiplies; blocks are
// persistent. The unit always takes 64 rows: those from W8A8_TM on are whatever lies behind, rows of W, and no row of D comes of
// them. Every rounding of the epilogue is written out: nothing is left to contraction. A launch with `overlap` fetches weights
// before the kernel ahead on the stream has ended: W must be complete before that kernel starts. Activations, scales, bias and D
// wait for it.
#include "sm90.cuh"

#ifndef KERNEL  // the name of the instance, which profilers show
#define KERNEL gemm_w8a8_fp8
#endif

namespace {

constexpr int TM = W8A8_TM, TN = W8A8_TN, SUMS = W8A8_SUMS, CLUSTER = W8A8_CLUSTER;
constexpr int TK = 128;                      // bytes of k in a stage: one swizzled row
constexpr int GROUPS = TM == 128 ? 2 : 1;      // warpgroups that multiply
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int STAGE = (TM + TN) * TK;
constexpr int PITCH = 144;                   // bytes between rows of the staged output: 128 and a shift of four banks
constexpr int STAGED = GROUPS * 64 * PITCH;
constexpr int MOST = 232448 - 1024 - 512;    // shared memory of a block, less alignment and barriers
constexpr int FACTORS = GROUPS * 2 * TN * 4;  // channel scales and bias of a tile, in f32
constexpr int FIT = (MOST - STAGED - FACTORS) / STAGE;
constexpr int STAGES = FIT < 16 ? FIT : 16;
constexpr int SHARED = 1024 + 512 + STAGED + FACTORS + STAGES * STAGE;
constexpr int BAND = 16 / CLUSTER;           // units of rows that are walked before the next columns
static_assert(STAGES >= 3 && TM % 8 == 0 && TN % (8 * CLUSTER) == 0 && TM + TN >= 64, "tile");

enum Out { BF16 = 0, F16 = 1, F32 = 2 };
enum Bias { NONE = 0, BEFORE = 1, AFTER = 2 };

struct Arguments {
  const float *token, *channel;    // token[m * token_step], channel[n * channel_step]
  const float *a_scale, *w_scale;  // [M, K / 128] and [N / 128 rounded up, K / 128]
  const void* bias;                // [N] in the output's format
  void* d;
  long long stride;                // elements between rows of D
  int token_step, channel_step, bias_form, out, m, n, k;
};

struct Place {
  int m, n;
};

// Where unit `unit` of the walk puts the tile of block `rank`: bands of rows, in a band column by column.
__device__ __forceinline__ Place place_of(int unit, int rank, int units_m, int units_n) {
  const int band = unit / (BAND * units_n), first = band * BAND;
  const int width = min(BAND, units_m - first), rest = unit - first * units_n;
  const int um = first + rest % width, un = rest / width;
  return {(um * CLUSTER + rank) * TM, un * TN};
}

template <int OUT>
struct Format;
template <>
struct Format<BF16> {
  typedef __nv_bfloat16 T;
  static __device__ T of(float x) { return __float2bfloat16_rn(x); }
  static __device__ float value(T x) { return __bfloat162float(x); }
};
template <>
struct Format<F16> {
  typedef __half T;
  static __device__ T of(float x) { return __float2half_rn(x); }
  static __device__ float value(T x) { return __half2float(x); }
};
template <>
struct Format<F32> {
  typedef float T;
  static __device__ T of(float x) { return x; }
  static __device__ float value(T x) { return x; }
};

// One element: channel, token and bias with one rounding each (the last two joined), then the cast. AFTER rounds twice, as
// declared.
template <int OUT, int FORM>
__device__ __forceinline__ typename Format<OUT>::T finished(float sum, float channel, float token, float bias) {
  typedef Format<OUT> F;
  const float scaled = SUMS == 2 ? sum : __fmul_rn(sum, channel);
  if (FORM == BEFORE) return F::of(SUMS == 2 ? __fadd_rn(scaled, bias) : __fmaf_rn(scaled, token, bias));
  const typename F::T plain = F::of(SUMS == 2 ? scaled : __fmul_rn(scaled, token));
  return FORM == AFTER ? F::of(__fadd_rn(F::value(plain), bias)) : plain;
}

template <int OUT>
__device__ __forceinline__ float bias_at(const Arguments& g, int n) {
  return Format<OUT>::value(((const typename Format<OUT>::T*)g.bias)[n]);
}

// What the epilogue of a tile multiplies by and adds: asked for a tile ahead, so that nothing waits for it.
struct Factors {
  float channel[(TN + 127) / 128], bias[(TN + 127) / 128], token[2];
};

__device__ __forceinline__ Factors factors_of(const Arguments& g, int m0, int n0) {
  Factors f;
#pragma unroll
  for (int i = 0; i < (TN + 127) / 128; ++i) {
    const int column = threadIdx.x % 128 + 128 * i, n = n0 + column;
    const bool inside = column < TN && n < g.n;
    f.channel[i] = SUMS != 2 && inside ? __ldg(g.channel + (long long)n * g.channel_step) : 0.0f;
    f.bias[i] = 0.0f;
    if (g.bias_form != NONE && inside)
      f.bias[i] = g.out == BF16 ? bias_at<BF16>(g, n) : g.out == F16 ? bias_at<F16>(g, n) : bias_at<F32>(g, n);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = m0 + threadIdx.x % 32 / 4 + 8 * half;
    f.token[half] = SUMS != 2 && m < g.m ? g.token[(long long)m * g.token_step] : 0.0f;
  }
  return f;
}

// The 16 rows of a warp, those below `rows`, 128 bytes of columns at a time through shared memory, so that stores are 16 bytes
// and whole lines. `factors`: channel scales of the tile, then its bias.
template <int OUT, int FORM>
__device__ __forceinline__ void store_rows(const Arguments& g, const float (&d)[TN / 2], const float (&token)[2],
                                           const float* factors, char* staged, int m0, int n0, int rows) {
  typedef typename Format<OUT>::T T;
  constexpr int WIDE = 128 / sizeof(T), PART = 16 / sizeof(T);
  const int lane = threadIdx.x % 32, row = lane / 4, pair = 2 * (lane % 4);
  const bool whole = g.stride % PART == 0;
#pragma unroll
  for (int from = 0; from < TN; from += WIDE) {
    uint4 found[4];
#pragma unroll
    for (int j = 0; j < WIDE / 8; ++j) {
      const int column = from + 8 * j;
      if (column >= TN) break;
      const float2 channel = SUMS == 2 ? float2() : *(const float2*)(factors + column + pair);
      const float2 bias = FORM == NONE ? float2() : *(const float2*)(factors + TN + column + pair);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* sum = d + (column / 8) * 4 + 2 * half;
        T both[2] = {finished<OUT, FORM>(sum[0], channel.x, token[half], bias.x),
                     finished<OUT, FORM>(sum[1], channel.y, token[half], bias.y)};
        char* to = staged + (row + 8 * half) * PITCH + (8 * j + pair) * sizeof(T);
        if (sizeof(T) == 4)
          *(float2*)to = *(const float2*)both;
        else
          *(uint32_t*)to = *(const uint32_t*)both;
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) found[i] = *(const uint4*)(staged + (lane / 8 + 4 * i) * PITCH + lane % 8 * 16);
    const int column = from + lane % 8 * PART, n = n0 + column, m = m0 + lane / 8;
    const bool inside = column < TN && n < g.n;
    T* to = (T*)g.d + (long long)m * g.stride + n;
    if (whole) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (inside && m + 4 * i < rows) *(uint4*)(to + 4 * i * g.stride) = found[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < PART; ++e) {
          if (inside && m + 4 * i < rows) to[4 * i * g.stride + e] = ((const T*)&found[i])[e];
        }
      }
    }
    __syncwarp();
  }
}

// One decision for a tile, none per element.
template <int OUT>
__device__ __forceinline__ void store_tile(const Arguments& g, const float (&d)[TN / 2], const float (&token)[2],
                                           const float* factors, char* staged, int m0, int n0, int rows) {
  if (g.bias_form == NONE)
    store_rows<OUT, NONE>(g, d, token, factors, staged, m0, n0, rows);
  else if (g.bias_form == BEFORE)
    store_rows<OUT, BEFORE>(g, d, token, factors, staged, m0, n0, rows);
  else
    store_rows<OUT, AFTER>(g, d, token, factors, staged, m0, n0, rows);
}

// An arrival without an order of its own: what was read before it, the unit read, and that has ended.
__device__ __forceinline__ void arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void next(int& slot, uint32_t& phase) {
  if (++slot == STAGES) slot = 0, phase ^= 1;
}

__global__ void __launch_bounds__(THREADS, 1)
KERNEL(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_w, const Arguments g) {
  extern __shared__ char memory[];
  const uint32_t raw = sm90::address(memory), base = (raw + 1023) & ~1023u;  // swizzling repeats every 1024 bytes
  const uint32_t barriers = base + STAGES * STAGE;  // full, then empty
  char* staged = memory + (barriers - raw) + 512;
  const int warp = threadIdx.x / 32, rank = CLUSTER > 1 ? (int)sm90::cluster_rank() : 0;
  const int tiles_m = (g.m + TM - 1) / TM, tiles_n = (g.n + TN - 1) / TN, steps = (g.k + TK - 1) / TK;
  const int units_m = (tiles_m + CLUSTER - 1) / CLUSTER, units = units_m * tiles_n, stride = gridDim.x / CLUSTER;
  if (threadIdx.x == 0) {
    sm90::prefetch(&map_a);
    sm90::prefetch(&map_w);
    for (int i = 0; i < STAGES; ++i) {
      sm90::barrier_init(barriers + 8 * i, 1);
      sm90::barrier_init(barriers + 8 * (STAGES + i), 4 * GROUPS * CLUSTER);
    }
    sm90::barrier_init_fence();
  }
  if (CLUSTER > 1) {
    sm90::cluster_arrive();
    sm90::cluster_wait();
  } else {
    __syncthreads();
  }

  if (warp < 4) {
    if (GROUPS > 1) sm90::registers_down<40>();
    if (threadIdx.x == 0) {
      const uint16_t all = (1 << CLUSTER) - 1;
      auto fetch_a = [&](int slot, int step, int m) {
        sm90::copy_box(base + slot * STAGE, &map_a, step * TK, m, barriers + 8 * slot);
      };
      auto fetch_w = [&](int slot, int step, int n) {
        const uint32_t full = barriers + 8 * slot, to = base + slot * STAGE + TM * TK;
        if (CLUSTER > 1)
          sm90::copy_box_to(to + rank * (TN / CLUSTER) * TK, &map_w, step * TK, n + rank * (TN / CLUSTER), full, all);
        else
          sm90::copy_box(to, &map_w, step * TK, n, full);
      };
      const int ahead = min(STAGES, steps);
      const Place start = place_of(blockIdx.x / CLUSTER, rank, units_m, tiles_n);
      for (int i = 0; i < ahead; ++i) {
        sm90::arrive_expect(barriers + 8 * i, STAGE);
        fetch_w(i, i, start.n);
      }
      sm90::launch_wait();
      sm90::launch_next();
      for (int i = 0; i < ahead; ++i) fetch_a(i, i, start.m);
      int slot = ahead % STAGES, done = ahead;
      uint32_t phase = ahead == STAGES ? 1 : 0;
      for (int unit = blockIdx.x / CLUSTER; unit < units; unit += stride) {
        const Place at = place_of(unit, rank, units_m, tiles_n);
        for (int step = done; step < steps; ++step) {
          sm90::wait(barriers + 8 * (STAGES + slot), phase ^ 1);
          sm90::arrive_expect(barriers + 8 * slot, STAGE);
          fetch_w(slot, step, at.n);
          fetch_a(slot, step, at.m);
          next(slot, phase);
        }
        done = 0;
      }
    }
    __syncwarp();
  } else {
    if (GROUPS > 1) sm90::registers_up<232>();
    sm90::launch_wait();
    const int group = warp / 4 - 1, lane = threadIdx.x % 32;
    char* own = staged + (group * 64 + warp % 4 * 16) * PITCH;
    float* factors = (float*)(staged + STAGED) + group * 2 * TN;
    int slot = 0;
    uint32_t phase = 0;
    auto release = [&](int which) {
      const uint32_t empty = barriers + 8 * (STAGES + which);
      if (CLUSTER > 1) {
        if (lane < CLUSTER) arrive_at(empty, lane);
      } else if (lane == 0) {
        sm90::arrive(empty);
      }
    };
    auto multiply = [&](float(&d)[TN / 2], bool fresh) {
      const uint64_t a = sm90::descriptor_128(base + slot * STAGE + group * 64 * TK);
      const uint64_t w = sm90::descriptor_128(base + slot * STAGE + TM * TK);
      sm90::wgmma_fence();
#pragma unroll
      for (int i = 0; i < TK / 32; ++i) sm90::Wgmma<TN>::shared(d, a + 2 * i, w + 2 * i, !fresh || i > 0);
      sm90::wgmma_commit();
    };
    const int within = group * 64 + warp % 4 * 16;
    Place following = place_of(blockIdx.x / CLUSTER, rank, units_m, tiles_n);
    Factors f = factors_of(g, following.m + within, following.n);
    for (int unit = blockIdx.x / CLUSTER; unit < units; unit += stride) {
      const Place at = following;
      const int m0 = at.m + within;
      float d[TN / 2];
      if (SUMS == 0) {
        int last = 0;
        for (int step = 0; step < steps; ++step) {
          sm90::wait(barriers + 8 * slot, phase);
          multiply(d, step == 0);
          sm90::wgmma_wait<1>();
          if (step > 0) release(last);
          last = slot;
          next(slot, phase);
        }
        sm90::wgmma_wait<0>();
        sm90::pin(d);
        release(last);
      } else {
        float part[TN / 2];
        const int r0 = min(m0 + lane / 4, g.m - 1), r1 = min(m0 + lane / 4 + 8, g.m - 1);
        const int block = at.n / 128, edge = (block + 1) * 128 - at.n;  // columns from `edge` on are in the next block of W
        const int other = min(block + 1, (g.n + 127) / 128 - 1);
#pragma unroll
        for (int i = 0; i < TN / 2; ++i) d[i] = 0.0f;
        for (int step = 0; step < steps; ++step) {
          float near[2] = {}, far[2] = {};  // scales of the two rows, in the block of W where the tile starts and in the next
          if (SUMS == 2) {
            const float w0 = __ldg(g.w_scale + (long long)min(block, (g.n + 127) / 128 - 1) * steps + step);
            const float w1 = __ldg(g.w_scale + (long long)other * steps + step);
            const float a0 = g.a_scale[(long long)r0 * steps + step], a1 = g.a_scale[(long long)r1 * steps + step];
            near[0] = __fmul_rn(a0, w0), far[0] = __fmul_rn(a0, w1), near[1] = __fmul_rn(a1, w0), far[1] = __fmul_rn(a1, w1);
          }
          sm90::wait(barriers + 8 * slot, phase);
          multiply(part, true);
          sm90::wgmma_wait<0>();
          sm90::pin(part);
          release(slot);
          next(slot, phase);
#pragma unroll
          for (int i = 0; i < TN / 2; ++i) {
            const bool after = 128 % TN != 0 && 8 * (i / 4) >= edge;
            const float scale = after ? far[i / 2 % 2] : near[i / 2 % 2];
            d[i] = SUMS == 2 ? __fmaf_rn(part[i], scale, d[i]) : __fadd_rn(d[i], part[i]);
          }
        }
      }
      sm90::sync_threads(1 + group, 128);  // nobody reads those of the tile before any more
#pragma unroll
      for (int i = 0; i < (TN + 127) / 128; ++i) {
        const int column = threadIdx.x % 128 + 128 * i;
        if (column < TN) factors[column] = f.channel[i], factors[TN + column] = f.bias[i];
      }
      sm90::sync_threads(1 + group, 128);
      const int rows = min(g.m, at.m + TM);
      const float token[2] = {f.token[0], f.token[1]};
      if (unit + stride < units) {
        following = place_of(unit + stride, rank, units_m, tiles_n);
        f = factors_of(g, following.m + within, following.n);
      }
      if (g.out == BF16)
        store_tile<BF16>(g, d, token, factors, own, m0, at.n, rows);
      else if (g.out == F16)
        store_tile<F16>(g, d, token, factors, own, m0, at.n, rows);
      else
        store_tile<F32>(g, d, token, factors, own, m0, at.n, rows);
    }
  }
  if (CLUSTER > 1) {  // a block's memory stays until the others have written to it and signalled
    sm90::cluster_arrive();
    sm90::cluster_wait();
  }
}

}  // namespace

// a [m, k], w [n, k]: bytes, k a multiple of 16, rows a_stride and w_stride bytes apart (multiples of 16), bases too. d [m, n] in
// `out` (0 bf16, 1 f16, 2 f32), base at 16 bytes, n a multiple of 8. bias_form: 0 none, 1 in f32 before the cast, 2 in the output
// format after it. Blocks: at most `most`, 0 for one per multiprocessor. overlap: 1 for a launch that may begin, and read W,
// while the kernel ahead on the stream still runs.
extern "C" int lowbit_gemm_w8a8_fp8(const void* a, long long a_stride, const void* w, long long w_stride, const float* token,
                                    int token_step, const float* channel, int channel_step, const float* a_scale,
                                    const float* w_scale, const void* bias, int bias_form, void* d, long long stride, int out,
                                    int m, int n, int k, int most, int overlap, void* stream) {
  if (m == 0 || n == 0) return cudaSuccess;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  CUtensorMap map_a, map_w;
  if (error == cudaSuccess) error = lowbit_map_bytes(&map_a, a, m, k, a_stride, TM);
  if (error == cudaSuccess) error = lowbit_map_bytes(&map_w, w, n, k, w_stride, TN / CLUSTER);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
  if (error != cudaSuccess) return error;
  const Arguments g = {token, channel, a_scale, w_scale, bias, d, stride, token_step, channel_step, bias_form, out, m, n, k};
  const long long tiles_m = (m + TM - 1) / TM, tiles_n = (n + TN - 1) / TN;
  const long long units = (tiles_m + CLUSTER - 1) / CLUSTER * tiles_n;
  if (units > 0x3fffffff) return cudaErrorInvalidValue;
  long long clusters = (most > 0 && most < processors ? most : processors) / CLUSTER;
  if (clusters < 1) clusters = 1;
  if (clusters > units) clusters = units;
  cudaLaunchConfig_t how = {};
  how.gridDim = dim3((unsigned)(clusters * CLUSTER));
  how.blockDim = dim3(THREADS);
  how.dynamicSmemBytes = SHARED;
  how.stream = (cudaStream_t)stream;
  cudaLaunchAttribute with[2];
  how.attrs = with;
  if (overlap) {
    with[how.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    with[how.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (CLUSTER > 1) {
    with[how.numAttrs].id = cudaLaunchAttributeClusterDimension;
    with[how.numAttrs++].val.clusterDim = {CLUSTER, 1, 1};
  }
  return cudaLaunchKernelEx(&how, KERNEL, map_a, map_w, g);
}
