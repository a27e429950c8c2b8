// gemm_w4a8_fp8, `exact`, for few tokens: products in binary16 on wgmma; one instance per library.
//
//   D[m, n] = cast(channel[n] (token[m] sum_g scale[n, g] sum_(k in g) A[m, k] q[n, k]) + bias[n])
//
// Decides: int4 becomes binary16 in registers by one logical and one floating-point instruction per two weights, both exact,
// without a table. The sum of a group is multiplied by its scale and added to a running f32 total by one FMA, rounded to
// nearest: sums that stay in the unit over all of K would be cut toward zero after every 16 products. e4m3 activations become
// binary16, exactly, by a first kernel, in the order of k that the packed words have (below). K is dealt out to all
// multiprocessors (gemm_w4a8_schedule.cuh). The first kernel waits beside the product that is ahead on the stream; a block of the
// product asks the L2 cache for its first weights while it waits. A few threads copy. BANDS warpgroups multiply, each 64 rows of
// W. CLUSTER blocks with neighbouring rows of W work as one: each copies its share of the activations to all of them.
// Refuses nothing: gemm_w4a8_f16.py does.
//
// An A fragment of m64nNk16 has, at lane c of four, k = 2 c and 2 c + 1 of the row and of the row eight down, then the same
// eight k on. A packed word (gemm_w4a8_pack.cu) has k = 4 c + j of its 32 in nibble j and k = 16 + 4 c + j in nibble 4 + j, for j
// from 0 to 3: two nibbles sixteen bits apart make one word of the fragment. So, for W and A alike, place 8 j + 2 c of 32 k holds
// k = 4 c + j, and place 8 j + 2 c + 1 holds k = 16 + 4 c + j. Groups are of 64 or 128 k: none loses a product to another.
#include "gemm_w4a8_tiles.cuh"
#include "wgmma_half.cuh"

#ifndef KERNEL  // the name of the instance, which profilers show
#define KERNEL gemm_w4a8_f16
#endif

namespace {

constexpr int THREADS = (BANDS + 1) * 128;
constexpr int REGISTERS = 112;            // of a thread that multiplies; 32 of one that does not: 96 each, at the launch
constexpr int MOST_BYTES = 231424;        // 227 KB less the kilobyte that a block of the next first kernel has
constexpr int TILE_BYTES = TOKENS * 256;  // 128 k of the activations: two matrices of 64 k
constexpr int SHARE = TILE_BYTES / CLUSTER;
constexpr int WEIGHT_BYTES = BANDS * BLOCK_BYTES;
constexpr int STAGES = (MOST_BYTES - EPILOGUE_BYTES - 24 * BANDS) / (TILE_BYTES + WEIGHT_BYTES + 16);
constexpr int AT_A = 0;
constexpr int AT_AREA = STAGES * TILE_BYTES;
constexpr int AT_W = AT_AREA + EPILOGUE_BYTES;
constexpr int AT_BARRIERS = AT_W + STAGES * WEIGHT_BYTES;
constexpr int AT_COUNTS = AT_BARRIERS + 16 * STAGES;  // for each band: two barriers, and what was found
constexpr int SHARED_BYTES = AT_COUNTS + 24 * BANDS;
static_assert(SHARED_BYTES <= MOST_BYTES, "a block of each kernel fits a multiprocessor");
static_assert(AT_AREA % 128 == 0 && AT_BARRIERS % 8 == 0, "places of the epilogue and of barriers");

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// Activations ------------------------------------------------------------------------------------------------------------------

constexpr int CONVERTING = 128;  // threads of a block: with 32 registers each, what a block of `gemm` leaves

// Sixteen bytes of the image per thread and turn: tiles of 128 k as the products read them, each two matrices of TOKENS rows by
// 64 k with 128-byte swizzling. Rows beyond m and k beyond K are zeros. `a`: rows at multiples of 16 bytes. Zeroes the counters,
// too. One block for each of `gemm`.
__global__ void __launch_bounds__(CONVERTING, 16) convert(const __grid_constant__ Problem p, const uint8_t* a, long long stride,
                                                          int k, uint4* image, long long chunks, int counters) {
  sm90::launch_next();
  sm90::launch_wait();  // what the kernel before wrote or still reads
  const int first = blockIdx.x * CONVERTING + threadIdx.x, step = gridDim.x * CONVERTING;
  for (int i = first; i < counters; i += step) p.counters[i] = 0;
  for (long long index = first; index < chunks; index += step) {
    const int token = (int)(index / 8 % TOKENS), chunk = (int)(index % 8) ^ token % 8, j = chunk % 4;
    const int from = (int)(index / (8 * TOKENS)) * 64 + chunk / 4 * 32;
    uint32_t words[4] = {0, 0, 0, 0};
    if (token < p.m && from < k) {  // K is a multiple of 64
      const uint4* source = reinterpret_cast<const uint4*>(a + token * stride + from);
      const uint4 near = source[0], far = source[1];
      const uint32_t low[4] = {near.x, near.y, near.z, near.w}, high[4] = {far.x, far.y, far.z, far.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint32_t codes = (low[c] >> (8 * j) & 0xFF) | (high[c] >> (8 * j) & 0xFF) << 8;
        const __half2_raw both = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)codes, __NV_E4M3);
        words[c] = (uint32_t)both.x | (uint32_t)both.y << 16;
      }
    }
    image[index] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Weights ----------------------------------------------------------------------------------------------------------------------

DEVICE uint32_t bits(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

// Two nibbles, `mask` of a word, as the low bits of two binary16: 1024 + u for bits 0 to 3, 1024 + 16 u for bits 4 to 7.
DEVICE __half2 join(uint32_t word, uint32_t mask) {
  uint32_t joined;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(joined) : "r"(word), "r"(mask), "r"(0x64006400u));  // (word & mask) | 1024, 1024
  return *reinterpret_cast<const __half2*>(&joined);
}

// The eight weights of a word, u = q + 8 in each nibble, as one row's words of two fragments, exactly: (1024 + u) - 1032 and
// (1024 + 16 u) / 16 - 72. a: the first fragment's word of the row; the others are 2, 4 and 6 further.
DEVICE void expand(uint32_t word, uint32_t* a) {
  const __half2 offset = __float2half2_rn(-1032.0f), sixteenth = __float2half2_rn(0.0625f), small = __float2half2_rn(-72.0f);
  const uint32_t upper = word >> 8;
  a[0] = bits(__hadd2(join(word, 0x000F000Fu), offset));
  a[2] = bits(__hfma2(join(word, 0x00F000F0u), sixteenth, small));
  a[4] = bits(__hadd2(join(upper, 0x000F000Fu), offset));
  a[6] = bits(__hfma2(join(upper, 0x00F000F0u), sixteenth, small));
}

// 64 k of a warpgroup as A fragments of four instructions.
DEVICE void expand(const uint4& words, uint32_t (&a)[16]) {
  expand(words.x, a);
  expand(words.y, a + 1);
  expand(words.z, a + 8);
  expand(words.w, a + 9);
  sm90::pin(a);
}

// Sums -------------------------------------------------------------------------------------------------------------------------

// What a thread reads at a stage: places in shared memory, and what they start from. Values pass through a shuffle: the
// compiler then keeps them, where it would work out all of them again for each 128 k.
struct Reader {
  const uint8_t* memory;
  uint64_t tokens;  // descriptor of the first stage
  uint32_t barriers;
  int words, scales, lane;
  DEVICE Reader(uint8_t* start, int band, int thread) : memory(start) {
    lane = thread % 32;
    const int pair = thread / 32 * 8 + lane / 4;
    const uint32_t shared = __shfl_sync(0xFFFFFFFFu, sm90::address(start), 0);
    tokens = sm90::descriptor_128(shared + AT_A);
    barriers = shared + AT_BARRIERS;
    words = __shfl_sync(0xFFFFFFFFu, AT_W + band * BLOCK_BYTES + 16 * thread, lane);
    scales = __shfl_sync(0xFFFFFFFFu, AT_W + band * BLOCK_BYTES + 4096 + 128 / GROUP * 2 * pair, lane);
  }
};

// Half of what a thread takes of 64 rows by 128 k: a run of words; and the scales of its two rows, group by group.
DEVICE uint4 run(const Reader& reader, int stage, int half) {
  return *reinterpret_cast<const uint4*>(reader.memory + (reader.words + stage * WEIGHT_BYTES) + 2048 * half);
}
DEVICE uint32_t codes(const Reader& reader, int stage) {
  const uint8_t* at = reader.memory + (reader.scales + stage * WEIGHT_BYTES);
  return GROUP == 128 ? *reinterpret_cast<const uint16_t*>(at) : *reinterpret_cast<const uint32_t*>(at);
}

// Four instructions, 64 k, from `b` on.
DEVICE void issue(float (&sums)[SUMS], const uint32_t (&a)[16], uint64_t b, int accumulate) {
  sm90::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) sm90::WgmmaHalf<TOKENS>::registers(sums, a + 4 * i, b + 2 * i, i > 0 || accumulate);
  sm90::wgmma_commit();
}

// Each warp, once it is done with the stage, says so to all blocks whose copies go there.
DEVICE void release(const Reader& reader, int stage) {
  const uint32_t empty = reader.barriers + 8 * (STAGES + stage);
  if (CLUSTER == 1) {
    if (reader.lane == 0) sm90::arrive(empty);
  } else if (reader.lane < CLUSTER) {
    sm90::arrive_remote(empty, reader.lane);
  }
}

// The sum of a group into the total. `scales`: codes of the thread's two rows.
DEVICE void promote(float (&sums)[SUMS], float (&part)[SUMS], uint32_t scales) {
  sm90::pin(part);
  const float2 factor = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)scales, __NV_E4M3)));
#pragma unroll
  for (int j = 0; j < SUMS; ++j) sums[j] = __fmaf_rn(part[j], j / 2 % 2 ? factor.y : factor.x, sums[j]);
  sm90::pin(part);
}

// One warpgroup's 64 rows by TOKENS over `blocks` (at least one) of 128 k. While products of one half of 128 k run, the other
// half is expanded.
DEVICE void multiply(const Reader& reader, int blocks, Ring& ring, float (&sums)[SUMS]) {
  using namespace sm90;
  float part[SUMS];
  uint32_t first[16], second[16];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
  wait(reader.barriers + 8 * ring.stage, ring.phase);
  expand(run(reader, ring.stage, 0), first);
  while (true) {
    const int stage = ring.stage;
    const uint64_t b = reader.tokens + (uint32_t)(stage * (TILE_BYTES / 16));
    const uint32_t scales = codes(reader, stage);
    issue(part, first, b, 0);
    expand(run(reader, stage, 1), second);
    if (GROUP == 64) {
      wgmma_wait<0>();
      promote(sums, part, scales & 0xFFFF);
    }
    issue(part, second, b + TILE_BYTES / 32, GROUP == 128);
    ring.next();
    if (--blocks > 0) {
      wait(reader.barriers + 8 * ring.stage, ring.phase);
      const uint4 words = run(reader, ring.stage, 0);
      wgmma_wait<1>();
      expand(words, first);
    }
    wgmma_wait<0>();
    release(reader, stage);
    promote(sums, part, GROUP == 64 ? scales >> 16 : scales);
    if (blocks == 0) break;
  }
}

// Copies -----------------------------------------------------------------------------------------------------------------------

// The part of tile `index` of D that the block `rank` of a cluster has: all tokens, 64 BANDS rows of W.
DEVICE Tile tile_of(const Problem& p, int index, int rank) { return Tile{0, 0, p.m, 0, (index * CLUSTER + rank) * BANDS}; }
DEVICE bool exists(const Problem& p, int index) { return index * (CLUSTER * BANDS) < p.n_blocks; }

// The blocks of 128 k of a worker, one after the other.
struct Blocks {
  const Problem& p;
  schedule::Walk walk;
  Tile tile;
  int rank, k, end;
  bool left;
  DEVICE Blocks(const Problem& problem, int worker, int rank_here) : p(problem), walk(problem.deal, worker), rank(rank_here) {
    find();
  }
  DEVICE void find() {
    const schedule::Segment segment = walk.segment();
    tile = tile_of(p, segment.tile, rank), k = segment.begin, end = segment.end;
    left = exists(p, segment.tile);
  }
  DEVICE void next() {
    if (++k == end) {
      walk.next();
      find();
    }
  }
};

constexpr bool DEFERS = TOKENS <= 16;    // with more tokens, products take the time, and it was slower
constexpr int COPYING = DEFERS ? 2 : 4;  // threads that copy, one of a warp: every so many bands, the first of them A as well

DEVICE void copy_weights(const Blocks& blocks, uint32_t shared, int stage, int copier, uint64_t policy) {
  const uint32_t full = shared + AT_BARRIERS + 8 * stage;
  const int bands = (BANDS - copier + COPYING - 1) / COPYING;
  sm90::arrive_expect(full, bands * BLOCK_BYTES + (copier == 0 ? TILE_BYTES : 0));
#pragma unroll 1
  for (int band = copier; band < BANDS; band += COPYING) {
    sm90::copy_bulk(shared + AT_W + stage * WEIGHT_BYTES + band * BLOCK_BYTES, packed(blocks.p, blocks.tile, band, blocks.k),
                    BLOCK_BYTES, full, policy);
  }
}

// Where the other block of a cluster has not said yet how many bytes it waits for, they count all the same: its stage is empty.
DEVICE void copy_tokens(const Blocks& blocks, const uint8_t* image, uint32_t shared, int stage, uint64_t policy) {
  const uint32_t to = shared + AT_A + stage * TILE_BYTES + blocks.rank * SHARE, full = shared + AT_BARRIERS + 8 * stage;
  const uint8_t* from = image + (long long)blocks.k * TILE_BYTES + blocks.rank * SHARE;
  if (CLUSTER == 1) {
    sm90::copy_bulk(to, from, SHARE, full, policy);
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
        :
        : "r"(to), "l"(from), "r"(SHARE), "r"(full), "h"((uint16_t)((1 << CLUSTER) - 1))
        : "memory");
  }
}

DEVICE void copy(const Problem& p, const uint8_t* image, uint32_t shared, int worker, int rank, int copier) {
  using namespace sm90;
  const uint64_t once = evict_first(), again = evict_normal();
  for (int band = copier; band < BANDS; band += COPYING) prefetch_weights(p, worker, rank, band, STAGES);
  Ring ring;
  launch_wait();
  for (Blocks blocks(p, worker, rank); blocks.left; blocks.next(), ring.next()) {
    wait(shared + AT_BARRIERS + 8 * (STAGES + ring.stage), ring.phase ^ 1);
    copy_weights(blocks, shared, ring.stage, copier, once);
    if (copier == 0) copy_tokens(blocks, image, shared, ring.stage, again);
  }
}

// Of a tile that a worker takes over and others begin: who comes last is found out while the next tile is multiplied, which would
// otherwise wait for memory. Then the sums are handed in, a thread of a warp that does not multiply counts, and the band looks
// at what it found behind its last tile. Nearly always somebody else comes later.
struct Deferred {
  uint32_t handed, counted;  // barriers
  volatile uint32_t* last;
  DEVICE Deferred(uint32_t shared, uint8_t* memory, int band) {
    handed = shared + AT_COUNTS + 24 * band, counted = handed + 8;
    last = reinterpret_cast<volatile uint32_t*>(memory + AT_COUNTS + 24 * band + 16);
  }
};

// Whether a worker's first segment is of that kind.
DEVICE bool deferred(const Problem& p, int worker) {
  if (!DEFERS) return false;
  schedule::Walk walk(p.deal, worker);
  if (!exists(p, walk.tile) || walk.segment().begin == 0) return false;
  walk.next();
  return exists(p, walk.tile);
}

DEVICE void count(const Problem& p, uint32_t shared, uint8_t* memory, int worker, int rank, int counter) {
  if (!deferred(p, worker)) return;
  const schedule::Walk walk(p.deal, worker);
  for (int band = counter; band < BANDS; band += 2) {
    const Deferred there(shared, memory, band);
    sm90::wait(there.handed, 0);
    *there.last = Slots(p, walk.tile, rank, band, 0).count();
    sm90::arrive(there.counted);
  }
}

__global__ void __launch_bounds__(THREADS, 1) KERNEL(const __grid_constant__ Problem p, const uint8_t* image) {
  using namespace sm90;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = address(memory);
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // the same in a warp, and known to be
  const int worker = blockIdx.x / CLUSTER, rank = CLUSTER > 1 ? (int)cluster_rank() : 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared + AT_BARRIERS + 8 * i, COPYING);
      barrier_init(shared + AT_BARRIERS + 8 * (STAGES + i), 4 * BANDS * CLUSTER);
    }
    for (int i = 0; i < BANDS; ++i) {
      barrier_init(shared + AT_COUNTS + 24 * i, 128);
      barrier_init(shared + AT_COUNTS + 24 * i + 8, 1);
    }
    barrier_init_fence();
    launch_next();
  }
  __syncthreads();
  if (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  }
  if (warpgroup == 0) {
    registers_down<32>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0 && warp < COPYING) copy(p, image, shared, worker, rank, warp);
    if (DEFERS && threadIdx.x % 32 == 0 && warp >= COPYING) {
      launch_wait();
      count(p, shared, memory, worker, rank, warp - COPYING);
    }
  } else {
    registers_up<REGISTERS>();
    const int thread = threadIdx.x % 128, band = warpgroup - 1;
    const Area area = {shared + AT_AREA, memory + AT_AREA};
    const Reader reader(memory, band, thread);
    const Deferred later(shared, memory, band);
    const bool defers = deferred(p, worker);
    launch_wait();
    Ring ring;
    float sums[SUMS];
    schedule::Walk walk(p.deal, worker);
    const int taken = walk.tile;
    for (; exists(p, walk.tile); walk.next()) {
      const schedule::Segment segment = walk.segment();
      const Tile tile = tile_of(p, segment.tile, rank);
      prefetch_factors(p, tile, band, thread);
      multiply(reader, segment.end - segment.begin, ring, sums);
      if (defers && segment.tile == taken) {
        Slots(p, taken, rank, band, thread).store(worker, sums);
        arrive(later.handed);
        continue;
      }
      const Factors factors = load_factors(p, tile, area, band, thread);
      if (segment.whole(p.k_blocks) || settle(p, segment, area, worker, rank, band, thread, sums)) {
        store(p, tile, area, 0, band, thread, factors, sums);
      }
    }
    if (defers) {
      wait(later.counted, 0);
      if (*later.last != 0) {
        const Tile tile = tile_of(p, taken, rank);
        const Factors factors = load_factors(p, tile, area, band, thread);
        Slots(p, taken, rank, band, thread).add(sums);
        store(p, tile, area, 0, band, thread, factors, sums);
      }
    }
  }
  if (CLUSTER > 1) {  // nothing is under way to a block that is gone
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace

// a: e4m3 [m, k], a_stride bytes between rows, both multiples of 16. weights: packed. token_scale f32 [m], channel_scale f32
// [n], bias [n] in the output format or null, d [m, n] with d_stride elements between rows. workspace: at a multiple of 16, the
// image of A first (256 TOKENS bytes for each 128 k begun), then what the tiles' header asks for. half: 0 for bf16, 1 for f16.
// m from 1 to TOKENS. Returns a cudaError_t; never waits.
extern "C" int lowbit_gemm_w4a8_f16(const void* a, long long a_stride, const void* weights, const void* token_scale,
                                    const void* channel_scale, const void* bias, void* d, long long d_stride, void* workspace,
                                    long long workspace_bytes, long long m, long long n, long long k, int half, void* stream) {
  Problem p = problem_of(weights, token_scale, channel_scale, bias, d, d_stride, nullptr, m, n, k, 1, half);
  const long long image_bytes = (long long)p.k_blocks * TILE_BYTES;
  if (workspace == nullptr || workspace_bytes < image_bytes) return cudaErrorInvalidValue;
  uint8_t* image = (uint8_t*)workspace;
  cudaError_t error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {CLUSTER, 1, 1};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(THREADS), config.dynamicSmemBytes = SHARED_BYTES, config.stream = (cudaStream_t)stream;
  config.attrs = attributes, config.numAttrs = 2;
  int workers = 0;
  error = resident(&workers, KERNEL, config, CLUSTER);
  if (error != cudaSuccess) return error;
  const int counters = plan(p, workers, image + image_bytes, workspace_bytes - image_bytes);
  if (counters < 0) return cudaErrorInvalidValue;
  config.gridDim = dim3(p.deal.workers * CLUSTER);
  cudaLaunchConfig_t first = config;
  first.blockDim = dim3(CONVERTING), first.dynamicSmemBytes = 0, first.numAttrs = 1;
  error = beside(convert);
  if (error != cudaSuccess) return error;
  error = cudaLaunchKernelEx(&first, convert, p, (const uint8_t*)a, a_stride, (int)k, (uint4*)image, image_bytes / 16,
                             counters);
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, KERNEL, p, (const uint8_t*)image);
}
