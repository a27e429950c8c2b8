// gemm_w4a8_fp8 and gemm_w4a8_fp8_grouped: e4m3 activations by int4 weights with e4m3 group scales, one instance per library.
//
//   D[m, n] = cast(channel[n] (token[m] sum_k A[m, k] W[n, k]) + bias[n])
//
// Decides: 64 weight rows are the M side of wgmma, TOKENS rows of A its N side; weights go from int4 to e4m3 in registers
// through a table of sixteen bytes, activations stay as they are in shared memory. EXACT = 0: the table holds RNE(q s) of the
// row's group, one sum over K. EXACT = 1: the table holds q, the sum of each group is multiplied into a running f32 total.
// A block has BANDS bands of 64 rows and stays: it takes tiles in turn, or (STREAM) an equal share of the blocks of k of those
// tiles that do not come out even; sums of shared tiles meet in the workspace (gemm_w4a8_tiles.cuh). CLUSTER blocks with
// neighbouring bands load A once for all. Or the SPLITS blocks of a cluster cut K; each cuts its part among HALVES warpgroups per
// band. Sums of all parts are added in ascending order. Two threads copy, BANDS x HALVES warpgroups
// multiply.
// Refuses nothing: gemm_w4a8.py does.
//
// Packed weights (gemm_w4a8_pack.cu): blocks of 64 rows by 128 k, along k first. Bytes 0 to 4095: two runs of 16 bytes per
// thread of a warpgroup, a word for each 32 k and row (lane / 4, then 8 down): nibble p holds value + 8 at k = 4 (lane % 4) + p
// (p < 4) or 12 + 4 (lane % 4) + p. Then the scales of the rows, pairs of rows together.
#ifndef EXACT
#error "EXACT, GROUP, TOKENS, BANDS, HALVES, SPLITS, CLUSTER, STREAM and STAGES come from the command line"
#endif
#include "gemm_w4a8_tiles.cuh"

#ifndef KERNEL  // the name of the instance, which profilers show
#define KERNEL gemm_w4a8
#endif

namespace {

constexpr int TILE_BYTES = TOKENS * 128;  // 128 k of the activations
constexpr int PARTS = SPLITS * HALVES;    // of K
constexpr int BLOCKS = SPLITS * CLUSTER;  // of a cluster
constexpr int WARPGROUPS = BANDS * HALVES;
constexpr int THREADS = (WARPGROUPS + 1) * 128;
constexpr bool MANY = SUMS * (1 + EXACT) >= (EXACT ? 32 : 64);  // registers that hold sums
constexpr int REGISTERS = WARPGROUPS == 2 ? 224 : WARPGROUPS == 3 ? 152 : MANY ? 112 : 104;
constexpr int COPYING = WARPGROUPS == 2 ? 56 : WARPGROUPS == 3 ? 40 : MANY ? 32 : 56;  // registers of the copying warpgroup
constexpr int OVERLAP = TOKENS < 256;                       // a launch may begin while the one before on the stream ends
constexpr int EIGHTS = (TOKENS / 8 + SPLITS - 1) / SPLITS;  // groups of eight tokens that a block adds up and stores
constexpr int SENT = PARTS > 1 ? EIGHTS * 2048 : 0;         // bytes of sums that a warpgroup sends to one block
constexpr bool AHEAD = STAGES > 4;                           // a stage is waited for a block before it is read
constexpr int TABLES = EXACT ? 32 : 256;                    // one per lane, or one per scale

constexpr int AT_A = 0;
constexpr int AT_W = AT_A + STAGES * HALVES * TILE_BYTES;
constexpr int AT_TABLE = AT_W + STAGES * HALVES * BANDS * BLOCK_BYTES;
constexpr int AT_EPILOGUE = (AT_TABLE + 16 * TABLES + 127) / 128 * 128;
constexpr int AT_SUMS = AT_EPILOGUE + EPILOGUE_BYTES;
constexpr int AT_BARRIERS = AT_SUMS + BANDS * (PARTS - 1) * SENT;
constexpr int SHARED_BYTES = AT_BARRIERS + 8 * (2 * STAGES + 2 * BANDS);
static_assert(SHARED_BYTES <= 232448, "a block has 227 KB");
static_assert(CLUSTER == 1 || (PARTS == 1 && TOKENS % (8 * CLUSTER) == 0), "blocks share A or K, and copy whole groups of rows");
static_assert(!STREAM || PARTS == 1, "K is cut in one way");

// Eight weights of a word to e4m3: low holds k = 0 to 3 of the thread, high those 16 further. table: bytes of 0 to 7, of -8 to
// -1. half: 2^16, which the compiler does not know. From 64 tokens on words are shifted by rotations, which the compiler leaves
// what they are. Integer products, which it makes of shifts as well, hold up the matrix unit: on an H200, 128 k of a tile of
// 128 x 256 took 1191 clocks with them and take 1040 without, of which the unit needs 1024. Below, where weights come at the
// memory's pace, a shift would run where nearly all of this runs, and a product runs elsewhere.
DEVICE void expand(uint32_t word, const uint4& table, uint32_t half, uint32_t& low, uint32_t& high) {
  const uint32_t places = word & 0x77777777u;
  uint32_t shifted, second, mask, next, positive, negative;  // masks: bytes of ones where the value is not negative
  if (TOKENS >= 64) {
    asm("shf.r.wrap.b32 %0, %1, %1, 28;" : "=r"(shifted) : "r"(word));  // four to the left; nobody reads the lowest four
    asm("shf.r.wrap.b32 %0, %1, %1, 16;" : "=r"(second) : "r"(places));
  } else {
    uint64_t wide;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(wide) : "r"(places), "r"(half));
    shifted = word << 4, second = (uint32_t)(wide >> 32);
  }
  asm("prmt.b32 %0, %1, %2, 0xd9c8;" : "=r"(mask) : "r"(shifted), "r"(word));
  asm("prmt.b32 %0, %1, %2, 0xfbea;" : "=r"(next) : "r"(shifted), "r"(word));
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(positive) : "r"(table.x), "r"(table.y), "r"(places));
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(negative) : "r"(table.z), "r"(table.w), "r"(places));
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(low) : "r"(mask), "r"(positive), "r"(negative));
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(positive) : "r"(table.x), "r"(table.y), "r"(second));
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(negative) : "r"(table.z), "r"(table.w), "r"(second));
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(high) : "r"(next), "r"(positive), "r"(negative));
}

#if EXACT
// e4m3 codes of 0 to 7 and of -8 to -1
constexpr uint4 INTEGERS = {0x44403800u, 0x4E4C4A48u, 0xCACCCED0u, 0xB8C0C4C8u};

DEVICE uint4 table_of(uint32_t) { return INTEGERS; }

DEVICE float scale_value(uint32_t code) {
  const __half_raw raw = __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E4M3);
  return __half2float(__half(raw));
}
#else
// Bytes of q s, q from 0 to 7 and from -8 to -1: RNE, saturating; -0 for q = 0 whatever the scale. Products are exact in
// binary16. A NaN scale gives NaN for every other q.
DEVICE uint4 table_of(uint32_t code) {
  const __half scale = __half(__nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E4M3));
  uint32_t pairs[4];  // 1 2, 3 4, 5 6, 7 8
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 both = __hmul2(__half2half2(scale), __floats2half2_rn(2 * i + 1, 2 * i + 2));
    pairs[i] = __nv_cvt_halfraw2_to_fp8x2(both, __NV_SATFINITE, __NV_E4M3);
  }
  const uint32_t low = pairs[0] | pairs[1] << 16, high = pairs[2] | pairs[3] << 16;
  return make_uint4(low << 8 | 0x80, low >> 24 | high << 8, __byte_perm(high, 0, 0x0123) ^ 0x80808080u,
                    __byte_perm(low, 0, 0x0123) ^ 0x80808080u);
}
#endif

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

struct Span {
  int begin, blocks;  // of 128 k
};

// What part `index` of K has of a segment. Where K has several, segments are whole tiles, and the last part has what is left.
DEVICE Span span_of(const schedule::Segment& segment, int k_blocks, int index) {
  if (PARTS == 1) return Span{segment.begin, segment.end - segment.begin};
  const int each = (k_blocks + PARTS - 1) / PARTS, begin = index * each;
  return Span{begin, max(0, min(each, k_blocks - begin))};
}

struct Place {  // of this block
  int worker, rank, split;  // rank: among the bands of the cluster; split: of K
};

// Fills stage after stage with weights, or with activations: a thread of its own for each, in a warp of its own.
template <bool WEIGHTS>
DEVICE void copy_tiles(const Problem& p, const CUtensorMap* map, uint32_t shared, const Place& here) {
  using namespace sm90;
  const uint32_t full = shared + AT_BARRIERS, empty = full + 8 * STAGES;
  const uint64_t policy = !WEIGHTS ? 0 : p.m <= TOKENS ? evict_first() : evict_normal();
  Ring ring;
  Tiles tiles(p, here.rank);
  Tile tile;
  for (schedule::Walk walk(p.deal, here.worker); tiles.find(walk.tile, tile); walk.next()) {
    const schedule::Segment segment = walk.segment();
    const int y = (int)(tile.row + tile.token) + here.rank * (TOKENS / CLUSTER);
    const int rounds = span_of(segment, p.k_blocks, here.split * HALVES).blocks;  // the first half is never the shorter one
#pragma unroll 1
    for (int done = 0; done < rounds; ++done) {
      const uint32_t barrier = full + 8 * ring.stage;
      wait(empty + 8 * ring.stage, ring.phase ^ 1);
      int filled = 0;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) filled += done < span_of(segment, p.k_blocks, here.split * HALVES + h).blocks;
      arrive_expect(barrier, filled * (WEIGHTS ? BANDS * BLOCK_BYTES : TILE_BYTES));
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        const Span span = span_of(segment, p.k_blocks, here.split * HALVES + h);
        if (done >= span.blocks) continue;
        const int k = span.begin + done;
        if (WEIGHTS) {
          const uint8_t* from = packed(p, tile, 0, k);
#pragma unroll
          for (int band = 0; band < BANDS; ++band) {
            const uint32_t to = shared + AT_W + ((ring.stage * HALVES + h) * BANDS + band) * BLOCK_BYTES;
            copy_bulk(to, from, BLOCK_BYTES, barrier, policy);
            if (tile.block + band + 1 < p.n_blocks) from += (long long)p.k_blocks * BLOCK_BYTES;  // as `packed` does
          }
        } else {
          const uint32_t to = shared + AT_A + (ring.stage * HALVES + h) * TILE_BYTES;
          if (CLUSTER == 1) {
            copy_box(to, map, k * 128, y, barrier);
          } else {
            copy_box_to(to + here.rank * (TILE_BYTES / CLUSTER), map, k * 128, y, barrier, (1 << CLUSTER) - 1);
          }
        }
      }
      ring.next();
    }
  }
}

// The weights that the first stages need, into L2 while the kernel before on the stream still runs.
DEVICE void prefetch_weights(const Problem& p, const Place& here) {
  if (p.counts != nullptr) return;  // which expert comes first is not known yet
  Tiles tiles(p, here.rank);
  Tile tile;
  const schedule::Walk walk(p.deal, here.worker);
  if (!tiles.find(walk.tile, tile)) return;
  for (int h = 0; h < HALVES; ++h) {
    const Span span = span_of(walk.segment(), p.k_blocks, here.split * HALVES + h);
    const int depth = min(span.blocks, STAGES);
    for (int band = 0; band < BANDS && depth > 0; ++band) {
      sm90::prefetch_bulk(packed(p, tile, band, span.begin), depth * BLOCK_BYTES);
    }
  }
}

// A stage may be filled again once every warp of every block that reads what is copied has arrived.
DEVICE void release(uint32_t empty, int stage, int thread) {
  if (CLUSTER == 1) {
    if (thread % 32 == 0) sm90::arrive(empty + 8 * stage);
  } else if (thread % 32 < CLUSTER) {
    sm90::arrive_remote(empty + 8 * stage, thread % 32);
  }
}

// A value of the thread that the compiler cannot compute anew in every round.
DEVICE uint32_t kept(uint32_t value) { return __shfl_sync(0xFFFFFFFFu, value, threadIdx.x % 32); }

struct Crew {  // a warpgroup: its band of 64 rows, which part of K of those that the block has
  int band, half;
  uint32_t words, scales;  // where the thread's are in the first stage
  uint32_t half_word;      // for `expand`
  DEVICE Crew(int warpgroup, int thread, uint32_t half_word_given) : half_word(half_word_given) {
    band = warpgroup % BANDS, half = HALVES == 1 ? 0 : warpgroup / BANDS;
    const int block = AT_W + (half * BANDS + band) * BLOCK_BYTES, pair = thread / 32 * 8 + thread % 32 / 4;
    words = kept(block + 16 * thread), scales = kept(block + 4096 + 2 * (128 / GROUP) * pair);
  }
  DEVICE uint64_t tokens(uint32_t shared, int stage) const {
    return sm90::descriptor_128(shared + AT_A + (stage * HALVES + half) * TILE_BYTES);
  }
};

// What a thread takes of 64 rows by 128 k: two runs of words, and the scales of its two rows, group by group.
struct Words {
  uint4 front, back;
  uint32_t scales;
  DEVICE void load_front(const uint8_t* memory, const Crew& crew, int stage) {
    const uint8_t* const at = memory + stage * (HALVES * BANDS * BLOCK_BYTES);
    front = *reinterpret_cast<const uint4*>(at + crew.words);
    scales = GROUP == 128 ? *reinterpret_cast<const uint16_t*>(at + crew.scales)
                          : *reinterpret_cast<const uint32_t*>(at + crew.scales);
  }
  DEVICE void load_back(const uint8_t* memory, const Crew& crew, int stage) {
    back = *reinterpret_cast<const uint4*>(memory + stage * (HALVES * BANDS * BLOCK_BYTES) + crew.words + 2048);
  }
};

// 64 k of a warpgroup as A fragments of two instructions.
DEVICE void expand(const uint4& words, const uint4& upper, const uint4& lower, uint32_t half, uint32_t (&a)[8]) {
  expand(words.x, upper, half, a[0], a[2]);
  expand(words.y, lower, half, a[1], a[3]);
  expand(words.z, upper, half, a[4], a[6]);
  expand(words.w, lower, half, a[5], a[7]);
  sm90::pin(a);
}

// Two instructions, 64 k, from `b` on.
DEVICE void issue(float (&sums)[SUMS], const uint32_t (&a)[8], uint64_t b, int accumulate) {
  sm90::wgmma_fence();
  sm90::Wgmma<TOKENS>::registers(sums, a, b, accumulate);
  sm90::Wgmma<TOKENS>::registers(sums, a + 4, b + 2, 1);
  sm90::wgmma_commit();
}

// One warpgroup's 64 rows by TOKENS over `blocks` blocks of 128 k (at least one); `sums` gets the sum, `at` goes on by as many
// stages. While products of one half of 128 k run, the other half is expanded. Where stages suffice, the words of the next block
// are on their way meanwhile: its stage was waited for a block ahead, since the compiler keeps products in flight only where
// nothing branches between the two halves.
#if EXACT
DEVICE void promote(float (&sums)[SUMS], float (&part)[SUMS], uint32_t scales) {
  sm90::pin(part);
  const float above = scale_value(scales & 0xFF), below = scale_value(scales >> 8 & 0xFF);
#pragma unroll
  for (int j = 0; j < SUMS; ++j) sums[j] = __fmaf_rn(part[j], j / 2 % 2 ? below : above, sums[j]);
  sm90::pin(part);
}

DEVICE void multiply(uint32_t shared, const uint8_t* memory, const Crew& crew, int blocks, Ring& at, int thread,
                     float (&sums)[SUMS]) {
  using namespace sm90;
  const uint32_t full = shared + AT_BARRIERS, empty = full + 8 * STAGES;
  float part[SUMS];
  // from memory, where every lane may have another: what is known to be the same would be moved to registers for every use
  const uint4 table = reinterpret_cast<const uint4*>(memory + AT_TABLE)[thread % 32];
  uint32_t first[8], second[8];
  Words words;
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
  Ring ahead = at;
  ahead.next();
  wait(full + 8 * at.stage, at.phase);
  words.load_front(memory, crew, at.stage);
  words.load_back(memory, crew, at.stage);
  if (AHEAD && blocks > 1) wait(full + 8 * ahead.stage, ahead.phase);
  expand(words.front, table, table, crew.half_word, first);
  for (int left = blocks; left > 0; --left) {
    const uint64_t b = crew.tokens(shared, at.stage);
    const int next = left > 1 ? ahead.stage : at.stage;  // behind the last block its own again: the next may be being filled
    const uint32_t scales = words.scales;
    issue(part, first, b, 0);
    if (AHEAD) words.load_front(memory, crew, next);
    expand(words.back, table, table, crew.half_word, second);
    if (GROUP == 64) {
      wgmma_wait<0>();
      promote(sums, part, scales);
    }
    issue(part, second, b + 4, GROUP == 128);
    const int done = at.stage;
    at = ahead;
    ahead.next();
    if (!AHEAD) {
      if (left > 1) wait(full + 8 * at.stage, at.phase);
      words.load_front(memory, crew, next);
    }
    words.load_back(memory, crew, next);
    wgmma_wait<1>();
    expand(words.front, table, table, crew.half_word, first);
    if (AHEAD && left > 2) wait(full + 8 * ahead.stage, ahead.phase);  // and keeps what was expanded ahead of the next line
    wgmma_wait<0>();
    release(empty, done, thread);
    promote(sums, part, GROUP == 64 ? scales >> 16 : scales);
  }
}
#else
DEVICE void multiply(uint32_t shared, const uint8_t* memory, const Crew& crew, int blocks, Ring& at, int thread,
                     float (&sums)[SUMS]) {
  using namespace sm90;
  const uint32_t full = shared + AT_BARRIERS, empty = full + 8 * STAGES;
  const uint4* tables = reinterpret_cast<const uint4*>(memory + AT_TABLE);
  uint32_t first[8], second[8];
  Words words;
  Ring ahead = at;
  ahead.next();
  wait(full + 8 * at.stage, at.phase);
  words.load_front(memory, crew, at.stage);
  words.load_back(memory, crew, at.stage);
  uint4 upper = tables[words.scales & 0xFF], lower = tables[words.scales >> 8 & 0xFF];
  if (AHEAD && blocks > 1) wait(full + 8 * ahead.stage, ahead.phase);
  int held = 0;  // the stage before, which products in flight may still read
  for (int left = blocks; left > 0; --left) {
    const uint64_t b = crew.tokens(shared, at.stage);
    const int next = left > 1 ? ahead.stage : at.stage;  // behind the last block its own again: the next may be being filled
    wgmma_wait<1>();  // the first half of the block before is done: its registers are free
    expand(words.front, upper, lower, crew.half_word, first);
    issue(sums, first, b, left < blocks);
    if (GROUP == 64) upper = tables[words.scales >> 16 & 0xFF], lower = tables[words.scales >> 24];
    if (AHEAD) words.load_front(memory, crew, next);
    wgmma_wait<1>();  // the whole block before is done
    if (left < blocks) release(empty, held, thread);
    expand(words.back, upper, lower, crew.half_word, second);
    issue(sums, second, b + 4, 1);
    held = at.stage, at = ahead;
    ahead.next();
    if (AHEAD) {
      words.load_back(memory, crew, next);
      upper = tables[words.scales & 0xFF], lower = tables[words.scales >> 8 & 0xFF];
      if (left > 2) wait(full + 8 * ahead.stage, ahead.phase);
    } else {
      if (left > 1) wait(full + 8 * at.stage, at.phase);
      words.load_front(memory, crew, next);
      words.load_back(memory, crew, next);
      upper = tables[words.scales & 0xFF], lower = tables[words.scales >> 8 & 0xFF];
    }
  }
  wgmma_wait<0>();
  pin(sums);
  release(empty, held, thread);
}
#endif

// Every warpgroup sends its sums of eight tokens to the block that stores them; there the first half of the band adds up those
// of all parts of K in ascending order. Its own stay in `sums`, which gets the totals.
DEVICE void reduce(uint32_t shared, uint8_t* memory, const Place& here, const Crew& crew, uint32_t phase, int thread,
                   float (&sums)[SUMS]) {
  using namespace sm90;
  const uint32_t ready = shared + AT_BARRIERS + 16 * STAGES + 16 * crew.band, taken = ready + 8;
  const int at = AT_SUMS + crew.band * (PARTS - 1) * SENT, mine = here.split * HALVES + crew.half;
  const int owned = (TOKENS / 8 - here.split + SPLITS - 1) / SPLITS;
  if (SPLITS > 1 && crew.half == 0 && thread == 0) arrive_expect(ready, (PARTS - 1) * owned * 2048);
  wait(taken, phase ^ 1);  // what was sent for the tile before is read
  if (SPLITS == 1 && crew.half != 0) {  // within the block
    float4* const to = reinterpret_cast<float4*>(memory + at + (mine - 1) * SENT) + thread;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) to[128 * j] = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
    arrive(ready);
    return;
  }
#pragma unroll
  for (int s = 0; s < (SPLITS > 1 ? SPLITS : 0); ++s) {
    if (mine == s * HALVES) continue;
    const uint32_t barrier = place_in(ready, s);
    const uint32_t to = place_in(shared + at + (mine - (mine > s * HALVES)) * SENT + 16 * thread, s);
#pragma unroll
    for (int j = s; j < TOKENS / 8; j += SPLITS) {
      send(to + j / SPLITS * 2048, sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3], barrier);
    }
  }
  if (crew.half != 0) return;
  wait(ready, phase);
#pragma unroll
  for (int j = 0; j < TOKENS / 8; ++j) {
    if (j % SPLITS != here.split) continue;
    float4 total;
#pragma unroll
    for (int s = 0; s < PARTS; ++s) {
      float4 part = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
      if (s != mine) {
        part = *reinterpret_cast<const float4*>(memory + at + (s - (s > mine)) * SENT + j / SPLITS * 2048 + 16 * thread);
      }
      if (s == 0) {
        total = part;
      } else {
        total.x = __fadd_rn(total.x, part.x), total.y = __fadd_rn(total.y, part.y);
        total.z = __fadd_rn(total.z, part.z), total.w = __fadd_rn(total.w, part.w);
      }
    }
    sums[4 * j] = total.x, sums[4 * j + 1] = total.y, sums[4 * j + 2] = total.z, sums[4 * j + 3] = total.w;
  }
  sync_threads(1 + crew.band, 128);
  if (SPLITS == 1) {
    if (thread == 0) arrive(taken);
  } else if (owned > 0 && thread < SPLITS) {
    arrive_remote(taken, thread);
  }
}

__global__ void __launch_bounds__(THREADS, 1) KERNEL(const __grid_constant__ Problem p, const __grid_constant__ CUtensorMap map) {
  using namespace sm90;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = address(memory);
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // the same in a warp, and known to be
  const int member = blockIdx.x % BLOCKS;  // its rank in the cluster
  Place here;
  here.worker = blockIdx.x / BLOCKS, here.rank = CLUSTER > 1 ? member : 0, here.split = SPLITS > 1 ? member : 0;
  if (threadIdx.x == 0) {
    prefetch(&map);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared + AT_BARRIERS + 8 * i, 2);
      barrier_init(shared + AT_BARRIERS + 8 * (STAGES + i), 4 * WARPGROUPS * CLUSTER);
    }
    for (int i = 0; i < BANDS; ++i) {
      barrier_init(shared + AT_BARRIERS + 8 * (2 * STAGES + 2 * i), SPLITS > 1 || HALVES == 1 ? 1 : 128 * (HALVES - 1));
      barrier_init(shared + AT_BARRIERS + 8 * (2 * STAGES + 2 * i + 1), min(SPLITS, TOKENS / 8));
    }
    barrier_init_fence();
    if (OVERLAP) launch_next();
  }
  __syncthreads();
  if (BLOCKS > 1) {
    cluster_arrive();
    cluster_wait();
  }
  if (warpgroup == 0) {
    registers_down<COPYING>();
    if (threadIdx.x == 0) {
      launch_wait();
      copy_tiles<true>(p, &map, shared, here);
    } else if (threadIdx.x == 32) {
      launch_wait();
      copy_tiles<false>(p, &map, shared, here);
    } else if (threadIdx.x == 64) {
      prefetch_weights(p, here);
    }
  } else {
    registers_up<REGISTERS>();
    const int thread = threadIdx.x % 128;
    for (int i = threadIdx.x - 128; i < TABLES; i += THREADS - 128) reinterpret_cast<uint4*>(memory + AT_TABLE)[i] = table_of(i);
    sync_threads(1 + BANDS, THREADS - 128);
    const Crew crew(warpgroup - 1, thread, p.half_word);
    const Area area = {shared + AT_EPILOGUE, memory + AT_EPILOGUE};
    launch_wait();
    Ring at;
    Tiles tiles(p, here.rank);
    Tile tile;
    uint32_t phase = 0;
    for (schedule::Walk walk(p.deal, here.worker); tiles.find(walk.tile, tile); walk.next()) {
      const schedule::Segment segment = walk.segment();
      const int blocks = span_of(segment, p.k_blocks, here.split * HALVES + crew.half).blocks;
      float sums[SUMS];
      if (crew.half == 0) prefetch_factors(p, tile, crew.band, thread);
      multiply(shared, memory, crew, blocks, at, thread, sums);
      // stages that hold nothing of this part
      const int rounds = span_of(segment, p.k_blocks, here.split * HALVES).blocks;
      for (int k = blocks; HALVES > 1 && k < rounds; ++k) {
        wait(shared + AT_BARRIERS + 8 * at.stage, at.phase);
        release(shared + AT_BARRIERS + 8 * STAGES, at.stage, thread);
        at.next();
      }
      if (PARTS > 1) {
        reduce(shared, memory, here, crew, phase, thread, sums);
        phase ^= 1;
      }
      if (crew.half == 0) {
        if (STREAM && !segment.whole(p.k_blocks)) {
          if (!settle(p, segment, area, here.worker, here.rank, crew.band, thread, sums)) continue;
        }
        if (8 * here.split < TOKENS) store(p, tile, area, here.split, crew.band, thread, sums);
      }
    }
  }
  if (BLOCKS > 1) {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

#if STREAM
// The counters of tiles that are shared, before the first of them is counted: the product starts to read when this has ended, and
// this when what came before on the stream has.
__global__ void zero(unsigned* counters, int count) {
  sm90::launch_next();
  sm90::launch_wait();
  for (int i = threadIdx.x; i < count; i += blockDim.x) counters[i] = 0;
}
#endif

}  // namespace

// a: e4m3 [m, k], a_stride bytes between rows, both multiples of 16. weights: packed, experts one after the other. token_scale
// f32 [m], channel_scale f32 [experts, n], bias [experts, n] in the output format or null, d [m, n] with d_stride elements
// between rows; counts int32 [experts] or null for one expert. half: 0 for bf16, 1 for f16. m > 0. workspace: at a multiple of
// 16, or null where its bytes are 0; it may hold anything. Returns a cudaError_t; never waits.
extern "C" int lowbit_gemm_w4a8(const void* a, long long a_stride, const void* weights, const void* token_scale,
                                const void* channel_scale, const void* bias, void* d, long long d_stride, const void* counts,
                                long long m, long long n, long long k, long long experts, int half, void* workspace,
                                long long workspace_bytes, void* stream) {
  cudaError_t error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (error != cudaSuccess) return error;
  CUtensorMap map;
  error = lowbit_map_bytes(&map, a, m, k, a_stride, TOKENS / CLUSTER);
  if (error != cudaSuccess) return error;
  Problem p = problem_of(weights, token_scale, channel_scale, bias, d, d_stride, counts, m, n, k, experts, half);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {BLOCKS, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(THREADS), config.dynamicSmemBytes = SHARED_BYTES, config.stream = (cudaStream_t)stream;
  config.attrs = attributes, config.numAttrs = 1 + OVERLAP;
  int most = 0;
  error = resident(&most, KERNEL, config, BLOCKS);
  if (error != cudaSuccess) return error;
  if (STREAM && counts != nullptr) return cudaErrorInvalidValue;
  const int counters = plan(p, most, workspace, workspace_bytes);
  if (counters < 0) return cudaErrorInvalidValue;
#if STREAM
  if (counters > 0) {
    cudaLaunchConfig_t first = {};
    first.gridDim = dim3(1), first.blockDim = dim3(256), first.stream = config.stream;
    first.attrs = attributes + 1, first.numAttrs = OVERLAP;
    error = cudaLaunchKernelEx(&first, zero, p.counters, counters);
    if (error != cudaSuccess) return error;
  }
#endif
  config.gridDim = dim3((unsigned)(p.deal.workers * BLOCKS));
  return cudaLaunchKernelEx(&config, KERNEL, p, map);
}
