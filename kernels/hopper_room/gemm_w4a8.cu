// gemm_w4a8_fp8 and gemm_w4a8_fp8_grouped: e4m3 activations by int4 weights with e4m3 group scales, one instance per library.
//
//   D[m, n] = cast(channel[n] (token[m] sum_k A[m, k] W[n, k]) + bias[n])
//
// Decides: 64 weight rows are the M side of wgmma, TOKENS rows of A its N side; weights go from int4 to e4m3 in registers
// through a table of sixteen bytes, activations stay as they are in shared memory. EXACT = 0: the table holds RNE(q s) of the
// row's group, one sum over K. EXACT = 1: the table holds q, the sum of each group is multiplied into a running f32 total.
// The SPLITS blocks of a cluster cut K; each cuts its part among HALVES warpgroups per 64 rows. The sums of all parts are added
// in ascending order. Blocks stay and take tiles in turn; a thread copies, WARPGROUPS warpgroups multiply.
// Refuses nothing: gemm_w4a8.py does.
//
// Packed weights (gemm_w4a8_pack.cu): blocks of 64 rows by 128 k, along k first. Bytes 0 to 4095: two runs of 16 bytes per
// thread of a warpgroup, a word for each 32 k and row (lane / 4, then 8 down): in nibble p the low three bits of the code at k =
// 4 (lane % 4) + p (p < 4) or 12 + 4 (lane % 4) + p; in bit 8 p + 7 or 8 (p - 4) + 3 its sign. Then the scales of the rows,
// pairs of rows together.
#include "sm90.cuh"

#ifndef EXACT
#error "EXACT, GROUP, TOKENS, WARPGROUPS, HALVES, SPLITS, DEPTH and STAGES come from the command line"
#endif

namespace {

constexpr int SCALE_BYTES = 64 * (128 / GROUP);
constexpr int BLOCK_BYTES = 4096 + SCALE_BYTES;
constexpr int TILE_BYTES = TOKENS * 128;     // 128 k of the activations
constexpr int SUMS = TOKENS / 2;             // per thread
constexpr int BANDS = WARPGROUPS / HALVES;   // of 64 rows; each has HALVES warpgroups with a part of K each
constexpr int PARTS = SPLITS * HALVES;       // of K
constexpr int CHUNK = TOKENS < 32 ? TOKENS : 32;
constexpr int CHUNK_BYTES = (CHUNK < 16 ? 16 : CHUNK) * 128;
constexpr int THREADS = (WARPGROUPS + 1) * 128;
constexpr int REGISTERS = WARPGROUPS == 2 ? 224 : WARPGROUPS == 3 ? 152 : 104;
constexpr int OVERLAP = TOKENS < 256;                       // a launch may begin while the one before on the stream ends
constexpr int RASTER = 4;                                   // token tiles that are neighbours in time
constexpr int EIGHTS = (TOKENS / 8 + SPLITS - 1) / SPLITS;  // groups of eight tokens that a block adds up and stores
constexpr int SENT = PARTS > 1 ? EIGHTS * 2048 : 0;         // bytes of sums that a warpgroup sends to one block

constexpr int AT_A = 0;
constexpr int AT_W = AT_A + STAGES * HALVES * DEPTH * TILE_BYTES;
constexpr int AT_TABLE = AT_W + STAGES * HALVES * BANDS * DEPTH * BLOCK_BYTES;
constexpr int AT_SCALE = AT_TABLE + (EXACT ? 0 : 4096);
constexpr int AT_OUT = (AT_SCALE + BANDS * TOKENS * 4 + 127) / 128 * 128;
constexpr int AT_SUMS = AT_OUT + BANDS * CHUNK_BYTES;
constexpr int AT_BARRIERS = AT_SUMS + BANDS * (PARTS - 1) * SENT;
constexpr int SHARED_BYTES = AT_BARRIERS + 8 * (2 * STAGES + 2 * BANDS);
static_assert(SHARED_BYTES <= 232448, "a block has 227 KB");
static_assert(WARPGROUPS % HALVES == 0, "every band of rows has as many warpgroups");

struct Problem {
  const uint8_t* weights;
  const float* token_scale;
  const float* channel_scale;
  const uint16_t* bias;  // or null
  uint16_t* d;
  const int* counts;  // or null: one expert has all rows
  long long stride;   // of D, in elements
  int m, n, k_blocks, n_blocks, experts, half, aligned;
};

struct Tile {
  long long row;  // first row of A of the expert
  int expert, count, token, block;  // first token within the expert, first block of 64 weight rows
};

// Tiles in order: expert, then RASTER token tiles at a time, then blocks of N, tokens fastest. Asked for in ascending order.
// There are fewer than 2^31: each has a row of A of its own and, where N is beyond 128, no less than 64 columns of D on average,
// so that so many would need a D of 256 GiB.
struct Tiles {
  const Problem& p;
  long long row = 0;
  int first = 0, expert = 0, count, across;
  DEVICE explicit Tiles(const Problem& problem) : p(problem) {
    count = p.counts == nullptr ? p.m : p.counts[0];
    across = (p.n_blocks + BANDS - 1) / BANDS;
  }
  DEVICE bool find(int index, Tile& tile) {
    int down = (count + TOKENS - 1) / TOKENS;
    while (index >= first + across * down) {
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
    tile.block = column * BANDS;
    return true;
  }
};

// Eight weights of a word to e4m3: low holds k = 0 to 3 of the thread, high those 16 further. table: bytes of 0 to 7, of -8 to
// -1.
DEVICE void expand(uint32_t word, const uint4& table, uint32_t& low, uint32_t& high) {
  const uint32_t places = word & 0x77777777u, shifted = word << 4;
  uint32_t mask, next;
  asm("prmt.b32 %0, %1, %1, 0xba98;" : "=r"(mask) : "r"(word));  // signs to whole bytes
  asm("prmt.b32 %0, %1, %1, 0xba98;" : "=r"(next) : "r"(shifted));
  uint32_t positive, negative;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(positive) : "r"(table.x), "r"(table.y), "r"(places));
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(negative) : "r"(table.z), "r"(table.w), "r"(places));
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(low) : "r"(mask), "r"(negative), "r"(positive));
  const uint32_t second = places >> 16;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(positive) : "r"(table.x), "r"(table.y), "r"(second));
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(negative) : "r"(table.z), "r"(table.w), "r"(second));
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(high) : "r"(next), "r"(negative), "r"(positive));
}

#if EXACT
// e4m3 codes of 0 to 7 and of -8 to -1
constexpr uint4 INTEGERS = {0x44403800u, 0x4E4C4A48u, 0xCACCCED0u, 0xB8C0C4C8u};

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

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

struct Place {  // of this block in its cluster
  int split, part;  // `part`: blocks of 128 k in one part of K; the last part has what is left
};

// Blocks of 128 k that part `index` of K has left after `done` of them, at most `most`.
DEVICE int left(const Problem& p, const Place& here, int index, int done, int most) {
  return max(0, min(most, min(p.k_blocks, (index + 1) * here.part) - index * here.part - done));
}

DEVICE const uint8_t* packed(const Problem& p, const Tile& tile, int band, int k) {
  const int block = min(tile.block + band, p.n_blocks - 1);  // beyond N: any, nothing is stored
  return p.weights + (((long long)tile.expert * p.n_blocks + block) * p.k_blocks + k) * BLOCK_BYTES;
}

DEVICE void copy_tiles(const Problem& p, const CUtensorMap* map, uint32_t shared, const Place& here) {
  using namespace sm90;
  const uint32_t full = shared + AT_BARRIERS, empty = full + 8 * STAGES;
  const uint64_t policy = p.m <= TOKENS ? evict_first() : evict_normal();
  Ring ring;
  Tiles tiles(p);
  Tile tile;
  for (int index = blockIdx.x / SPLITS; tiles.find(index, tile); index += gridDim.x / SPLITS) {
    const int y = (int)(tile.row + tile.token);
    for (int done = 0; done < here.part; done += DEPTH) {
      const uint32_t barrier = full + 8 * ring.stage;
      wait(empty + 8 * ring.stage, ring.phase ^ 1);
      int whole = 0;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) whole += left(p, here, here.split * HALVES + h, done, DEPTH);
      if (whole == 0) break;
      arrive_expect(barrier, whole * (BANDS * BLOCK_BYTES + TILE_BYTES));
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        const int part = here.split * HALVES + h, depth = left(p, here, part, done, DEPTH), k = part * here.part + done;
        if (depth == 0) continue;
#pragma unroll
        for (int band = 0; band < BANDS; ++band) {
          copy_bulk(shared + AT_W + ((ring.stage * HALVES + h) * BANDS + band) * DEPTH * BLOCK_BYTES, packed(p, tile, band, k),
                    depth * BLOCK_BYTES, barrier, policy);
        }
        for (int i = 0; i < depth; ++i) {
          copy_box(shared + AT_A + ((ring.stage * HALVES + h) * DEPTH + i) * TILE_BYTES, map, (k + i) * 128, y, barrier);
        }
      }
      ring.next();
    }
  }
}

// The weights that the first stages need, into L2 while the kernel before on the stream still runs.
DEVICE void prefetch_weights(const Problem& p, const Place& here) {
  if (p.counts != nullptr) return;  // which expert comes first is not known yet
  Tiles tiles(p);
  Tile tile;
  if (!tiles.find(blockIdx.x / SPLITS, tile)) return;
  for (int h = 0; h < HALVES; ++h) {
    const int part = here.split * HALVES + h, depth = left(p, here, part, 0, STAGES * DEPTH);
    for (int band = 0; band < BANDS && depth > 0; ++band) {
      sm90::prefetch_bulk(packed(p, tile, band, part * here.part), depth * BLOCK_BYTES);
    }
  }
}

// A stage may be filled again once every warp has arrived.
DEVICE void release(uint32_t empty, int stage, int thread) {
  if (thread % 32 == 0) sm90::arrive(empty + 8 * stage);
}

// What a thread takes of 64 rows by 128 k: two runs of words, and the scales of its two rows, group by group.
struct Words {
  uint4 front, back;
  uint32_t scales;
  DEVICE void load(const uint8_t* block, int thread) {
    const int pair = thread / 32 * 8 + thread % 32 / 4;
    front = *reinterpret_cast<const uint4*>(block + 16 * thread);
    back = *reinterpret_cast<const uint4*>(block + 2048 + 16 * thread);
    scales = GROUP == 128 ? *reinterpret_cast<const uint16_t*>(block + 4096 + 2 * pair)
                          : *reinterpret_cast<const uint32_t*>(block + 4096 + 4 * pair);
  }
};

// 64 k of a warpgroup as A fragments of two instructions.
DEVICE void expand(const uint4& words, const uint4& upper, const uint4& lower, uint32_t (&a)[8]) {
  expand(words.x, upper, a[0], a[2]);
  expand(words.y, lower, a[1], a[3]);
  expand(words.z, upper, a[4], a[6]);
  expand(words.w, lower, a[5], a[7]);
  sm90::pin(a);
}

// Two instructions, 64 k, from `b` on.
DEVICE void issue(float (&sums)[SUMS], const uint32_t (&a)[8], uint64_t b, int accumulate) {
  sm90::wgmma_fence();
  sm90::Wgmma<TOKENS>::registers(sums, a, b, accumulate);
  sm90::Wgmma<TOKENS>::registers(sums, a + 4, b + 2, 1);
  sm90::wgmma_commit();
}

struct Crew {  // a warpgroup: which rows of the tile, which part of K, how many blocks of 128 k
  int band, half, blocks;
  DEVICE const uint8_t* words(const uint8_t* memory, int stage) const {
    return memory + AT_W + ((stage * HALVES + half) * BANDS + band) * DEPTH * BLOCK_BYTES;
  }
  DEVICE uint64_t tokens(uint32_t shared, int stage) const {
    return sm90::descriptor_128(shared + AT_A + (stage * HALVES + half) * DEPTH * TILE_BYTES);
  }
};

// One warpgroup's 64 rows by TOKENS over this block's part of K; what `sums` holds is the sum of it. While products of one half
// of 128 k run, the other half is expanded.
#if EXACT
DEVICE void promote(float (&sums)[SUMS], float (&part)[SUMS], uint32_t scales) {
  sm90::pin(part);
  const float above = scale_value(scales & 0xFF), below = scale_value(scales >> 8 & 0xFF);
#pragma unroll
  for (int j = 0; j < SUMS; ++j) sums[j] = __fmaf_rn(part[j], j / 2 % 2 ? below : above, sums[j]);
  sm90::pin(part);
}

DEVICE void multiply(uint32_t shared, const uint8_t* memory, const Crew& crew, Ring& ring, int thread, float (&sums)[SUMS]) {
  using namespace sm90;
  const uint32_t full = shared + AT_BARRIERS, empty = full + 8 * STAGES;
  float part[SUMS];
  const uint4 table = INTEGERS;
  uint32_t first[8], second[8];
  Words words;
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
  wait(full + 8 * ring.stage, ring.phase);
  words.load(crew.words(memory, ring.stage), thread);
  expand(words.front, table, table, first);
  for (int k = 0; k < crew.blocks; k += DEPTH) {
    const int stage = ring.stage;
    const uint8_t* next = crew.words(memory, stage) + BLOCK_BYTES;
    const uint64_t b = crew.tokens(shared, stage);
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      if (i > 0 && k + i >= crew.blocks) break;
      const uint32_t scales = words.scales;
      issue(part, first, b + i * (TILE_BYTES / 16), 0);
      wgmma_wait<1>();
      expand(words.back, table, table, second);
      if (GROUP == 64) {
        wgmma_wait<0>();
        promote(sums, part, scales);
      }
      issue(part, second, b + i * (TILE_BYTES / 16) + 4, GROUP == 128);
      if (i + 1 < DEPTH) {
        words.load(next + i * BLOCK_BYTES, thread);  // beyond the part: read and not used
      } else {
        ring.next();
        if (k + DEPTH < crew.blocks) {
          wait(full + 8 * ring.stage, ring.phase);
          words.load(crew.words(memory, ring.stage), thread);
        }
      }
      wgmma_wait<1>();
      expand(words.front, table, table, first);
      wgmma_wait<0>();
      if (i + 1 == DEPTH || k + i + 1 >= crew.blocks) release(empty, stage, thread);
      promote(sums, part, GROUP == 64 ? scales >> 16 : scales);
    }
  }
  if (DEPTH > 1 && crew.blocks % DEPTH != 0) ring.next();
}
#else
DEVICE void multiply(uint32_t shared, const uint8_t* memory, const Crew& crew, Ring& ring, int thread, float (&sums)[SUMS]) {
  using namespace sm90;
  const uint32_t full = shared + AT_BARRIERS, empty = full + 8 * STAGES;
  const uint4* tables = reinterpret_cast<const uint4*>(memory + AT_TABLE);
  uint32_t first[8], second[8];
  Words words;
  wait(full + 8 * ring.stage, ring.phase);
  words.load(crew.words(memory, ring.stage), thread);
  uint4 upper = tables[words.scales & 0xFF], lower = tables[words.scales >> 8 & 0xFF];
  int held = -1;  // the stage before, which products in flight may still read
  for (int k = 0; k < crew.blocks; k += DEPTH) {
    const int stage = ring.stage;
    const uint8_t* next = crew.words(memory, stage) + BLOCK_BYTES;
    const uint64_t b = crew.tokens(shared, stage);
    ring.next();
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      if (i > 0 && k + i >= crew.blocks) break;
      wgmma_wait<1>();  // the first half of the block before is done: its registers are free
      expand(words.front, upper, lower, first);
      issue(sums, first, b + i * (TILE_BYTES / 16), k + i > 0);
      if (GROUP == 64) upper = tables[words.scales >> 16 & 0xFF], lower = tables[words.scales >> 24];
      wgmma_wait<1>();  // the whole block before is done
      if (i == 0 && k > 0) release(empty, held, thread);
      expand(words.back, upper, lower, second);
      issue(sums, second, b + i * (TILE_BYTES / 16) + 4, 1);
      if (i + 1 < DEPTH) {
        words.load(next + i * BLOCK_BYTES, thread);  // beyond the part: read and not used
      } else if (k + DEPTH < crew.blocks) {
        wait(full + 8 * ring.stage, ring.phase);
        words.load(crew.words(memory, ring.stage), thread);
      }
      upper = tables[words.scales & 0xFF], lower = tables[words.scales >> 8 & 0xFF];
    }
    held = stage;
  }
  wgmma_wait<0>();
  pin(sums);
  release(empty, held, thread);
}
#endif

// Every warpgroup sends its sums of eight tokens to the block that stores them; there the first half of the band adds up those
// of all parts of K in ascending order. Its own stay in `sums`, which gets the totals.
DEVICE void reduce(uint32_t shared, const uint8_t* memory, const Place& here, const Crew& crew, uint32_t phase, int thread,
                   float (&sums)[SUMS]) {
  using namespace sm90;
  const uint32_t ready = shared + AT_BARRIERS + 16 * STAGES + 16 * crew.band, taken = ready + 8;
  const int at = AT_SUMS + crew.band * (PARTS - 1) * SENT, mine = here.split * HALVES + crew.half;
  const int owned = (TOKENS / 8 - here.split + SPLITS - 1) / SPLITS;
  if (crew.half == 0 && thread == 0) arrive_expect(ready, (PARTS - 1) * owned * 2048);
  wait(taken, phase ^ 1);  // what was sent for the tile before is read
#pragma unroll
  for (int s = 0; s < SPLITS; ++s) {
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
  if (owned > 0 && thread < SPLITS) arrive_remote(taken, thread);
}

struct Factors {  // of the two rows of a thread
  float channel[2], bias[2];
};

// Scales and bias of a tile, fetched before its products: those of the tokens to shared memory.
DEVICE Factors factors(const Problem& p, const Tile& tile, uint8_t* memory, int band, int thread) {
  float* scales = reinterpret_cast<float*>(memory + AT_SCALE) + band * TOKENS;
  const int valid = min(TOKENS, tile.count - tile.token);
  for (int i = thread; i < TOKENS; i += 128) scales[i] = i < valid ? p.token_scale[tile.row + tile.token + i] : 0.0f;
  Factors found;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = (tile.block + band) * 64 + 16 * (thread / 32) + thread % 32 / 4 + 8 * h;
    const long long at = (long long)tile.expert * p.n + n;
    found.channel[h] = n < p.n ? p.channel_scale[at] : 0.0f;
    found.bias[h] = n < p.n && p.bias != nullptr ? widen(p.bias[at], p.half) : 0.0f;
  }
  return found;
}

// Scales, bias and cast, then rows of D through shared memory, 16 bytes at a time where D allows it.
DEVICE void store(const Problem& p, const Tile& tile, uint32_t shared, const uint8_t* memory, const Place& here, int band,
                  int thread, const Factors& factors, const float (&sums)[SUMS]) {
  using namespace sm90;
  const float* scales = reinterpret_cast<const float*>(memory + AT_SCALE) + band * TOKENS;
  const int warp = thread / 32, lane = thread % 32;
  const int base = (tile.block + band) * 64;
  const long long row = tile.row + tile.token;
  const int valid = min(TOKENS, tile.count - tile.token);
  const uint32_t out = shared + AT_OUT + band * CHUNK_BYTES;
  const uint8_t* staged = memory + AT_OUT + band * CHUNK_BYTES;
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
      if (token < CHUNK && chunk + token < valid && n < p.n && (chunk + token) / 8 % SPLITS == here.split) {
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

__global__ void __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ Problem p, const __grid_constant__ CUtensorMap map) {
  using namespace sm90;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = address(memory);
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // the same in a warp, and known to be
  Place here;
  here.split = SPLITS > 1 ? (int)cluster_rank() : 0, here.part = (p.k_blocks + PARTS - 1) / PARTS;
  if (threadIdx.x == 0) {
    prefetch(&map);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared + AT_BARRIERS + 8 * i, 1);
      barrier_init(shared + AT_BARRIERS + 8 * (STAGES + i), 4 * WARPGROUPS);
    }
    for (int i = 0; i < BANDS; ++i) {
      barrier_init(shared + AT_BARRIERS + 8 * (2 * STAGES + 2 * i), 1);
      barrier_init(shared + AT_BARRIERS + 8 * (2 * STAGES + 2 * i + 1), min(SPLITS, TOKENS / 8));
    }
    barrier_init_fence();
    if (OVERLAP) launch_next();
  }
  __syncthreads();
  if (SPLITS > 1) {
    cluster_arrive();
    cluster_wait();
  }
  if (warpgroup == 0) {
    registers_down<WARPGROUPS == 3 ? 40 : 56>();
    if (threadIdx.x == 0) {
      prefetch_weights(p, here);
      launch_wait();
      copy_tiles(p, &map, shared, here);
    }
  } else {
    registers_up<REGISTERS>();
    const int thread = threadIdx.x % 128;
#if !EXACT
    for (int i = threadIdx.x - 128; i < 256; i += THREADS - 128) reinterpret_cast<uint4*>(memory + AT_TABLE)[i] = table_of(i);
    sync_threads(1 + BANDS, THREADS - 128);
#endif
    Crew crew;
    crew.band = (warpgroup - 1) % BANDS, crew.half = HALVES == 1 ? 0 : (warpgroup - 1) / BANDS;
    crew.blocks = left(p, here, here.split * HALVES + crew.half, 0, here.part);
    const int rounds = left(p, here, here.split * HALVES, 0, here.part);  // the first half is never the shorter one
    launch_wait();
    Ring ring;
    Tiles tiles(p);
    Tile tile;
    uint32_t phase = 0;
    for (int index = blockIdx.x / SPLITS; tiles.find(index, tile); index += gridDim.x / SPLITS) {
      float sums[SUMS];
      Factors scales;
      if (crew.half == 0) scales = factors(p, tile, memory, crew.band, thread);
      multiply(shared, memory, crew, ring, thread, sums);
      // stages that hold nothing of this part
      for (int k = (crew.blocks + DEPTH - 1) / DEPTH * DEPTH; HALVES > 1 && k < rounds; k += DEPTH) {
        wait(shared + AT_BARRIERS + 8 * ring.stage, ring.phase);
        release(shared + AT_BARRIERS + 8 * STAGES, ring.stage, thread);
        ring.next();
      }
      if (PARTS > 1) {
        reduce(shared, memory, here, crew, phase, thread, sums);
        phase ^= 1;
      }
      if (crew.half == 0) {
        sync_threads(1 + crew.band, 128);
        if (8 * here.split < TOKENS) store(p, tile, shared, memory, here, crew.band, thread, scales, sums);
      }
    }
  }
  if (SPLITS > 1) {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace

// a: e4m3 [m, k], a_stride bytes between rows, both multiples of 16. weights: packed, experts one after the other. token_scale
// f32 [m], channel_scale f32 [experts, n], bias [experts, n] in the output format or null, d [m, n] with d_stride elements
// between rows; counts int32 [experts] or null for one expert. half: 0 for bf16, 1 for f16. m > 0. Returns a cudaError_t; never
// waits.
extern "C" int lowbit_gemm_w4a8(const void* a, long long a_stride, const void* weights, const void* token_scale,
                                const void* channel_scale, const void* bias, void* d, long long d_stride, const void* counts,
                                long long m, long long n, long long k, long long experts, int half, void* stream) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(gemm, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (error != cudaSuccess) return error;
  CUtensorMap map;
  error = lowbit_map_bytes(&map, a, m, k, a_stride, TOKENS);
  if (error != cudaSuccess) return error;
  Problem p;
  p.weights = (const uint8_t*)weights, p.token_scale = (const float*)token_scale, p.channel_scale = (const float*)channel_scale;
  p.bias = (const uint16_t*)bias, p.d = (uint16_t*)d, p.counts = (const int*)counts, p.stride = d_stride;
  p.m = (int)m, p.n = (int)n, p.k_blocks = (int)((k + 127) / 128), p.n_blocks = (int)((n + 63) / 64), p.experts = (int)experts;
  p.half = half, p.aligned = (uintptr_t)d % 16 == 0 && d_stride % 8 == 0;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {SPLITS, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(THREADS), config.dynamicSmemBytes = SHARED_BYTES, config.stream = (cudaStream_t)stream;
  config.attrs = attributes, config.numAttrs = 1 + OVERLAP;
  static int resident[64];  // clusters that a device holds at once; every thread that asks finds the same
  int clusters = device < 64 ? resident[device] : 0;
  if (clusters == 0) {
    config.gridDim = dim3(processors / SPLITS * SPLITS);
    error = cudaOccupancyMaxActiveClusters(&clusters, gemm, &config);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorLaunchOutOfResources;
    if (device < 64) resident[device] = clusters;
  }
  long long tiles = clusters;
  if (counts == nullptr) tiles = (p.n_blocks + BANDS - 1) / BANDS * ((m + TOKENS - 1) / TOKENS);
  config.gridDim = dim3((unsigned)(tiles < clusters ? tiles : clusters) * SPLITS);
  return cudaLaunchKernelEx(&config, gemm, p, map);
}
