// What the kernels of gemm_w4a8_fp8 have in common: tiles of D and their order, sums that several workers share, scales, bias,
// cast and the way to D.
//
// Decides: sums of a tile whose K is dealt out go through slots of the workspace; whoever comes last adds all of them in
// ascending order of k and stores. Whoever that is, the order of additions is the same: for one shape, tactic and number of
// workers the bits are. Nobody waits for anybody, so blocks need not run at the same time. The counters have to be zeros before
// a block that counts has passed `launch_wait`.
// Refuses nothing: gemm_w4a8.py does.
//
// Macros of the including source: GROUP, TOKENS, BANDS (of 64 rows of W in a block), SPLITS (blocks that share the sums of a tile
// over a cluster; each stores some tokens), CLUSTER (blocks with neighbouring bands that work as one worker), STREAM (K of tiles
// may be dealt out; there are no experts).
#pragma once
#include "gemm_w4a8_schedule.cuh"
#include "sm90.cuh"

namespace {

constexpr int BLOCK_BYTES = 4096 + 64 * (128 / GROUP);  // packed: 64 rows by 128 k
constexpr int SUMS = TOKENS / 2;                        // per thread of the warpgroup of a band
constexpr int CHUNK = TOKENS < 32 ? TOKENS : 32;        // tokens that pass through shared memory at a time
constexpr int CHUNK_BYTES = (CHUNK < 16 ? 16 : CHUNK) * 128;
constexpr int RASTER = 4;         // token tiles that are neighbours in time
constexpr int MOST_BLOCKS = 144;  // of threads that work at once: no device of compute capability 9.0 has more multiprocessors
constexpr int SLOT = 64 * TOKENS;  // sums of a band in a slot
constexpr int PIECES = TOKENS < 32 ? TOKENS / 8 : 4;                 // float4 of a slot that a thread asks for at a time,
constexpr int AT_ONCE = TOKENS <= 16 ? 4 : TOKENS <= 32 ? 2 : 1;  // and of how many slots

struct Problem {
  const uint8_t* weights;
  const float* token_scale;
  const float* channel_scale;
  const uint16_t* bias;  // or null
  uint16_t* d;
  const int* counts;   // or null: one expert has all rows
  float* slots;        // [2 workers, CLUSTER, BANDS, TOKENS / 8, 128 threads, 4]
  unsigned* counters;  // [cut tiles, CLUSTER, BANDS]
  long long stride;    // of D, in elements
  schedule::Deal deal;
  uint32_t half_word;  // 2^16: a factor that the compiler cannot see, for `expand` of gemm_w4a8.cu
  int m, n, k_blocks, n_blocks, experts, half, aligned;
};

// Tiles ----------------------------------------------------------------------------------------------------------------------

struct Tile {
  long long row;  // first row of A of the expert
  int expert, count, token, block;  // first token within the expert, first block of 64 weight rows
};

// Tiles in order: expert, then RASTER token tiles at a time, then blocks of N, tokens fastest. Asked for in ascending order.
// There are fewer than 2^31: each has a row of A of its own and, where N is beyond 128, no less than 64 columns of D on average,
// so that so many would need a D of 256 GiB. `rank`: of the block in its cluster.
struct Tiles {
  const Problem& p;
  long long row = 0;
  int first = 0, expert = 0, rank, count, across;
  DEVICE Tiles(const Problem& problem, int rank_here) : p(problem), rank(rank_here) {
    count = p.counts == nullptr ? p.m : p.counts[0];
    across = (p.n_blocks + BANDS * CLUSTER - 1) / (BANDS * CLUSTER);
  }
  DEVICE bool find(int index, Tile& tile) {
    int down = (count + TOKENS - 1) / TOKENS;
    while (index >= first + across * down) {
      if (STREAM) return false;  // there is one expert
      first += across * down;
      row += count;
      if (++expert >= p.experts) return false;
      count = p.counts[expert];
      down = (count + TOKENS - 1) / TOKENS;
    }
    const int rest = index - first, band = rest / (across * RASTER), within = rest - band * across * RASTER;
    const int width = min(RASTER, down - band * RASTER), column = within / width;
    tile.row = row, tile.expert = expert, tile.count = count;
    tile.token = (band * RASTER + within - column * width) * TOKENS;
    tile.block = (column * CLUSTER + rank) * BANDS;
    return true;
  }
};

// The packed weights of a band of a tile, from block `k` of 128 k on.
DEVICE const uint8_t* packed(const Problem& p, const Tile& tile, int band, int k) {
  const int block = min(tile.block + band, p.n_blocks - 1);  // beyond N: any, nothing is stored
  return p.weights + (((long long)tile.expert * p.n_blocks + block) * p.k_blocks + k) * BLOCK_BYTES;
}

// The first `left` blocks of 128 k that a worker multiplies, of one band, into the L2 cache. It is no read: what is written
// meanwhile is written there, too. There are no experts.
DEVICE void prefetch_weights(const Problem& p, int worker, int rank, int band, int left) {
  Tiles tiles(p, rank);
  Tile tile;
  for (schedule::Walk walk(p.deal, worker); left > 0 && tiles.find(walk.tile, tile); walk.next()) {
    const schedule::Segment segment = walk.segment();
    const int blocks = min(left, segment.end - segment.begin);
    sm90::prefetch_bulk(packed(p, tile, band, segment.begin), blocks * BLOCK_BYTES);
    left -= blocks;
  }
}

// Shared memory of the epilogue ----------------------------------------------------------------------------------------------

constexpr int AT_SCALES = BANDS * CHUNK_BYTES;
constexpr int AT_LAST = AT_SCALES + BANDS * TOKENS * 4;
constexpr int EPILOGUE_BYTES = (AT_LAST + BANDS * 4 + 127) / 128 * 128;

struct Area {  // EPILOGUE_BYTES at a multiple of 128
  uint32_t shared;
  uint8_t* memory;
};

// Sums of several workers ------------------------------------------------------------------------------------------------------

// One more. What the threads stored that met at a barrier before is there for whoever counts later, and what those stored that
// counted earlier is there for the threads that meet at a barrier behind it: both through `store_device` and `load_device`.
DEVICE unsigned count_up(unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(1u) : "memory");
  return before;
}

// The sums of a thread in the slots of a tile that is cut. `tile`: its index; place: of a band among those of a worker.
struct Slots {
  const Problem& p;
  float4* start;
  int tile, place, first, last;
  DEVICE Slots(const Problem& problem, int tile_here, int rank, int band, int thread) : p(problem), tile(tile_here) {
    place = rank * BANDS + band, first = p.deal.first(tile), last = p.deal.last(tile);
    start = reinterpret_cast<float4*>(p.slots) + (long long)place * (SLOT / 4) + thread;
  }
  DEVICE float4* of(int worker) const {
    return start + (long long)p.deal.slot(worker, worker == first) * (CLUSTER * BANDS * (SLOT / 4));
  }
  DEVICE void store(int worker, const float (&sums)[SUMS]) const {
    float4* const mine = of(worker);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
      sm90::store_device(mine + 128 * j, make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]));
    }
  }
  // One thread calls it, after all of the band stored. True for the last to come.
  DEVICE bool count() const { return count_up(p.counters + tile * (CLUSTER * BANDS) + place) == (unsigned)(last - first); }
  // The sums of the whole tile, added in ascending order of k.
  DEVICE void add(float (&sums)[SUMS]) const {
    const float4* const there = of(first);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
      const float4 part = sm90::load_device(there + 128 * j);
      sums[4 * j] = part.x, sums[4 * j + 1] = part.y, sums[4 * j + 2] = part.z, sums[4 * j + 3] = part.w;
    }
#pragma unroll 1
    for (int next = first + 1; next <= last; next += AT_ONCE) {
#pragma unroll
      for (int piece = 0; piece < TOKENS / 8; piece += PIECES) {
        float4 parts[AT_ONCE][PIECES];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          const float4* const from = of(next + i);
#pragma unroll
          for (int j = 0; j < PIECES; ++j) {
            if (next + i <= last) parts[i][j] = sm90::load_device(from + 128 * (piece + j));
          }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          if (next + i > last) continue;
#pragma unroll
          for (int j = 0; j < PIECES; ++j) {
            const float4& part = parts[i][j];
            float* const sum = sums + 4 * (piece + j);
            sum[0] = __fadd_rn(sum[0], part.x), sum[1] = __fadd_rn(sum[1], part.y);
            sum[2] = __fadd_rn(sum[2], part.z), sum[3] = __fadd_rn(sum[3], part.w);
          }
        }
      }
    }
  }
};

// Hands in a warpgroup's sums over a segment of a tile that is cut. True for the last to come: its sums are then those of the
// whole tile. All 128 threads of a band call it; it uses barrier 1 + band.
DEVICE bool settle(const Problem& p, const schedule::Segment& segment, const Area& area, int worker, int rank, int band,
                   int thread, float (&sums)[SUMS]) {
  using namespace sm90;
  const Slots slots(p, segment.tile, rank, band, thread);
  slots.store(worker, sums);
  sync_threads(1 + band, 128);
  volatile unsigned* const came = reinterpret_cast<volatile unsigned*>(area.memory + AT_LAST) + band;
  if (thread == 0) *came = slots.count();
  sync_threads(1 + band, 128);
  if (*came == 0) return false;
  slots.add(sums);
  return true;
}

// Scales, bias, cast ------------------------------------------------------------------------------------------------------------

DEVICE uint32_t narrow(float first, float second, int half) {
  if (half) {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

DEVICE float widen(uint16_t code, int half) {
  return half ? __half2float(__ushort_as_half(code)) : __uint_as_float((uint32_t)code << 16);
}

// Scales and bias of a tile, before its products, into the L2 cache: a thread asks for those that it will load.
DEVICE void prefetch_factors(const Problem& p, const Tile& tile, int band, int thread) {
  const int n = (tile.block + band) * 64 + thread % 64;
  const long long at = (long long)tile.expert * p.n + n;
  for (int i = thread; i < min(TOKENS, tile.count - tile.token); i += 128) {
    sm90::prefetch_line(p.token_scale + tile.row + tile.token + i);
  }
  if (n < p.n) sm90::prefetch_line(p.channel_scale + at);
  if (n < p.n && p.bias != nullptr) sm90::prefetch_line(p.bias + at);
}

// Of the two rows of W of a thread; the tokens' scales lie in shared memory, for the band.
struct Factors {
  float channel[2], bias[2];
};

// Ahead of `settle`, so that they are on their way meanwhile. All 128 threads of a band call it; what `store` did last is a
// barrier of theirs, and it waits at one before it reads.
DEVICE Factors load_factors(const Problem& p, const Tile& tile, const Area& area, int band, int thread) {
  float* scales = reinterpret_cast<float*>(area.memory + AT_SCALES) + band * TOKENS;
  const int valid = min(TOKENS, tile.count - tile.token);
  Factors factors;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = (tile.block + band) * 64 + 16 * (thread / 32) + thread % 32 / 4 + 8 * h;
    const long long at = (long long)tile.expert * p.n + n;
    factors.channel[h] = n < p.n ? p.channel_scale[at] : 0.0f;
    factors.bias[h] = n < p.n && p.bias != nullptr ? widen(p.bias[at], p.half) : 0.0f;
  }
  for (int i = thread; i < TOKENS; i += 128) scales[i] = i < valid ? p.token_scale[tile.row + tile.token + i] : 0.0f;
  return factors;
}

// Scales, bias and cast, then rows of D through shared memory, 16 bytes at a time where D allows it. All 128 threads of a band
// call it; it uses barrier 1 + band. `split`: of SPLITS, whose groups of eight tokens are stored.
DEVICE void store(const Problem& p, const Tile& tile, const Area& area, int split, int band, int thread, const Factors& factors,
                  const float (&sums)[SUMS]) {
  using namespace sm90;
  const float* scales = reinterpret_cast<const float*>(area.memory + AT_SCALES) + band * TOKENS;
  const int warp = thread / 32, lane = thread % 32;
  const int base = (tile.block + band) * 64;
  const long long row = tile.row + tile.token;
  const int valid = min(TOKENS, tile.count - tile.token);
  const uint32_t out = area.shared + band * CHUNK_BYTES;
  const uint8_t* staged = area.memory + band * CHUNK_BYTES;
  const int matrix = lane / 8, to_token = matrix / 2 * 8 + lane % 8;
  const uint32_t to = out + to_token * 128 + (((2 * warp + matrix % 2) ^ (lane % 8)) << 4);
  sync_threads(1 + band, 128);
#pragma unroll
  for (int chunk = 0; chunk < TOKENS; chunk += CHUNK) {
    if (chunk > 0 && chunk >= valid) break;
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j += 2) {
      uint32_t words[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int eight = chunk / 8 + j + e / 2, h = e % 2;
        if (8 * eight >= TOKENS) {
          words[e] = 0;
          continue;
        }
        const float2 token = *reinterpret_cast<const float2*>(scales + 8 * eight + 2 * (lane % 4));
        const int at = (4 * eight + 2 * h) % SUMS;
        float x = __fmul_rn(sums[at], token.x), y = __fmul_rn(sums[at + 1], token.y);
        if (p.bias != nullptr) {
          x = __fmaf_rn(x, factors.channel[h], factors.bias[h]), y = __fmaf_rn(y, factors.channel[h], factors.bias[h]);
        } else {
          x = __fmul_rn(x, factors.channel[h]), y = __fmul_rn(y, factors.channel[h]);
        }
        words[e] = narrow(x, y, p.half);
      }
      store_transposed(to + j * 8 * 128, words[0], words[1], words[2], words[3]);
    }
    sync_threads(1 + band, 128);
#pragma unroll
    for (int i = 0; i < (CHUNK * 8 + 127) / 128; ++i) {
      const int piece = thread + 128 * i, token = piece / 8, n = base + piece % 8 * 8;
      if (token < CHUNK && chunk + token < valid && n < p.n && (chunk + token) / 8 % SPLITS == split) {
        const uint4 value = *reinterpret_cast<const uint4*>(staged + token * 128 + ((piece % 8 ^ token % 8) << 4));
        uint16_t* d = p.d + (row + chunk + token) * p.stride + n;
        if (p.aligned) {
          *reinterpret_cast<uint4*>(d) = value;
        } else {
          const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
          for (int e = 0; e < 8; ++e) d[e] = (uint16_t)(words[e / 2] >> (16 * (e % 2)));
        }
      }
    }
    sync_threads(1 + band, 128);
  }
}

// The same where factors are not on their way yet.
DEVICE void store(const Problem& p, const Tile& tile, const Area& area, int split, int band, int thread,
                  const float (&sums)[SUMS]) {
  store(p, tile, area, split, band, thread, load_factors(p, tile, area, band, thread), sums);
}

// Host -------------------------------------------------------------------------------------------------------------------------

// The parts of `Problem` that say what is where; `deal`, `slots` and `counters` are for `plan`.
inline Problem problem_of(const void* weights, const void* token_scale, const void* channel_scale, const void* bias, void* d,
                          long long d_stride, const void* counts, long long m, long long n, long long k, long long experts,
                          int half) {
  Problem p = {};
  p.weights = (const uint8_t*)weights, p.token_scale = (const float*)token_scale, p.channel_scale = (const float*)channel_scale;
  p.bias = (const uint16_t*)bias, p.d = (uint16_t*)d, p.counts = (const int*)counts, p.stride = d_stride;
  p.m = (int)m, p.n = (int)n, p.k_blocks = (int)((k + 127) / 128), p.n_blocks = (int)((n + 63) / 64), p.experts = (int)experts;
  p.half_word = 1u << 16, p.half = half, p.aligned = (uintptr_t)d % 16 == 0 && d_stride % 8 == 0;
  return p;
}

// Clusters of `size` blocks that the device holds at once, at most MOST_BLOCKS blocks; asked once for a device and its number of
// multiprocessors. `config` has block, shared memory and attributes.
template <class Kernel>
inline cudaError_t resident(int* clusters, Kernel kernel, cudaLaunchConfig_t config, int size) {
  static int known[64];  // multiprocessors, then 10 bits of clusters: every thread that asks finds the same
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int found = device < 64 ? known[device] : 0;
  if (found >> 10 == processors) {
    *clusters = found & 1023;
    return cudaSuccess;
  }
  config.gridDim = dim3(processors / size * size);
  error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  if (error != cudaSuccess) return error;
  if (*clusters == 0) return cudaErrorLaunchOutOfResources;
  if (*clusters > MOST_BLOCKS / size) *clusters = MOST_BLOCKS / size;
  if (device < 64) known[device] = processors << 10 | *clusters;
  return cudaSuccess;
}

// Lets blocks of a small kernel run beside blocks that have nearly all of the shared memory of a multiprocessor: what is left for
// the first-level cache is the same for both, otherwise one would wait until the others are gone.
template <class Kernel>
inline cudaError_t beside(Kernel kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// Who multiplies what: at most `most` workers. Returns the number of counters to set to zero, 0 where no tile is cut, -1 where the
// workspace is too small.
inline int plan(Problem& p, int most, void* workspace, long long workspace_bytes) {
  const long long across = (p.n_blocks + BANDS * CLUSTER - 1) / (BANDS * CLUSTER), down = (p.m + TOKENS - 1) / TOKENS;
  const long long tiles = across * down;
  p.deal = schedule::deal(p.k_blocks, p.counts == nullptr && tiles < most ? (int)tiles : most, 0);
  if (!STREAM) return 0;
  const int workers = schedule::workers_for(tiles, p.k_blocks, most), cut = schedule::cut_tiles(tiles, p.k_blocks, workers);
  if (cut == 0) return 0;
  p.deal = schedule::deal(p.k_blocks, workers, cut);
  const long long slot_bytes = 2LL * workers * (CLUSTER * BANDS) * SLOT * 4, counters = (long long)cut * CLUSTER * BANDS;
  if (workspace == nullptr || workspace_bytes < slot_bytes + 4 * counters) return -1;
  p.slots = (float*)workspace, p.counters = (unsigned*)((uint8_t*)workspace + slot_bytes);
  return (int)counters;
}

}  // namespace
