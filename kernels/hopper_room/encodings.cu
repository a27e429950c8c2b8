// The encodings of the W4A8 and W8A8 operands: 4-bit codes packed, renamed and reordered, scales multiplied out, folded and made
// one; clauses ENC-2 to ENC-9, ENC-12 to ENC-16 and ENC-19 to ENC-28 of docs/contract.md. Everything runs on the caller's stream;
// nothing allocates, waits, or loops on the host, and places are counted in 64 bits. Compile with -fmad=false.
#include "fp8.cuh"

using namespace lowbit;

namespace {

constexpr int THREADS = 256, UNROLL = 4;

// ENC-12 on eight nibbles at once: v in 1..7 becomes 8 - v. 8 - v never borrows from the next nibble.
__device__ __forceinline__ uint32_t unified(uint32_t w)
{
    const uint32_t sign = w & 0x88888888u, low = w & 0x77777777u, negative = sign - (sign >> 3);
    return sign | (low & negative) | ((0x88888888u - low) & ~negative & 0x77777777u);
}

enum Map : int { UNIFIED = 0, OFFSET = 1, FNUZ = 2, COPY = 3 };  // ENC-12, ENC-9, ENC-22, no change

template <int MAP>
__device__ __forceinline__ uint32_t mapped(uint32_t w)
{
    if (MAP == UNIFIED) return unified(w);
    if (MAP == OFFSET) return w ^ 0x88888888u;
    if (MAP == FNUZ) {  // bytes 0x80 become 0: their top bit is alone
        const uint32_t rest = w & 0x7F7F7F7Fu, some = (rest + 0x7F7F7F7Fu) & 0x80808080u;
        return (w & 0x7F7F7F7Fu) | (w & some);
    }
    return w;
}

// Bytes of rows ld apart, each by itself: 16 at a time (V = 16) or one (V = 1).
template <int MAP, int V>
__global__ void __launch_bounds__(THREADS) map_codes(
    const uint8_t* from, long long ld_from, uint8_t* to, long long ld_to, long long rows, long long row_bytes, long long per_row)
{
    const long long pieces = rows * per_row;
    for (long long piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        const long long row = piece / per_row, start = (piece - row * per_row) * (THREADS * UNROLL * V) + threadIdx.x * V;
        const uint8_t* x = from + row * ld_from;
        uint8_t* y = to + row * ld_to;
        if constexpr (V == 1) {
            for (int i = 0; i < UNROLL; ++i) {
                const long long place = start + i * THREADS;
                if (place < row_bytes) y[place] = static_cast<uint8_t>(mapped<MAP>(x[place]));
            }
        } else {
            uint4 v[UNROLL];
#pragma unroll
            for (int i = 0; i < UNROLL; ++i)
                v[i] = start + (i * THREADS + 1) * V <= row_bytes ? load_once(x + start + i * THREADS * V) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) {
                const long long place = start + i * THREADS * V;
                if (place + V <= row_bytes)
                    *reinterpret_cast<uint4*>(y + place)
                        = make_uint4(mapped<MAP>(v[i].x), mapped<MAP>(v[i].y), mapped<MAP>(v[i].z), mapped<MAP>(v[i].w));
                else
#pragma unroll 1
                    for (long long j = place; j < row_bytes; ++j) y[j] = static_cast<uint8_t>(mapped<MAP>(x[j]));
            }
        }
    }
}

template <int MAP>
cudaError_t launch_map(
    const uint8_t* from, long long ld_from, uint8_t* to, long long ld_to, long long rows, long long row_bytes, cudaStream_t stream)
{
    (void)cudaGetLastError();  // what failed before is not this launch's
    if (ld_from == row_bytes && ld_to == row_bytes) row_bytes *= rows, rows = 1, ld_from = ld_to = 0;
    const auto start = [&](auto width) {
        constexpr int V = width();
        const long long size = 1ll * THREADS * UNROLL * V, per_row = (row_bytes + size - 1) / size;
        map_codes<MAP, V><<<blocks_for(rows * per_row), THREADS, 0, stream>>>(from, ld_from, to, ld_to, rows, row_bytes, per_row);
    };
    if (aligned(from, ld_from, 16) && aligned(to, ld_to, 16)) start(std::integral_constant<int, 16>{});
    else start(std::integral_constant<int, 1>{});
    return cudaGetLastError();
}

// ENC-13: words [n, k / 8] packed along K to the register order, 8 words (32 bytes) for rows r and r + 8 of a tile of 16 x 32.
// A warp takes 16 rows x 128 k, a block two such along K and four along N, so that lines are read and kilobytes written whole;
// what follows along K, and the next expert, come from the grid's second axis.
template <bool VECTORS>
__global__ void __launch_bounds__(THREADS) int4_reorder(
    const uint32_t* q, long long ld_q, long long expert_q, uint32_t* out, long long ld_out, long long expert_out, long long experts,
    long long n, long long k)
{
    __shared__ uint4 stage[THREADS / 32][64];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block_k = lane % 4, r = lane / 4;
    const long long tile_n = blockIdx.x * 4ll + warp / 2, groups = tile_n < n / 16 ? k / 128 : 0, all = groups * experts;
    for (long long work = blockIdx.y * 2ll + warp % 2; work < all; work += gridDim.y * 2ll) {
        const long long expert = experts == 1 ? 0 : work / groups, group_k = work - expert * groups;
        const uint32_t* low = q + expert * expert_q + (tile_n * 16 + r) * ld_q + group_k * 16 + block_k * 4;
        const uint32_t* high = low + 8 * ld_q;
        uint32_t a[4], b[4], words[8];
        if (VECTORS) {
            const uint4 first = load_once(low), second = load_once(high);
            a[0] = first.x, a[1] = first.y, a[2] = first.z, a[3] = first.w;
            b[0] = second.x, b[1] = second.y, b[2] = second.z, b[3] = second.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = low[i], b[i] = high[i];
        }
#pragma unroll
        for (int quad = 0; quad < 4; ++quad)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int from = 2 * half + quad / 2;
                words[2 * quad + half] = unified(__byte_perm(a[from], b[from], quad % 2 ? 0x7632 : 0x5410));
            }
        stage[warp][block_k * 16 + r * 2] = make_uint4(words[0], words[1], words[2], words[3]);
        stage[warp][block_k * 16 + r * 2 + 1] = make_uint4(words[4], words[5], words[6], words[7]);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int part = i * 32 + lane;
            const uint4 v = stage[warp][part];
            // the place in a matrix of n words per row: a tile of 32 k is four rows
            const long long place = tile_n * 64 + part % 16 * 4;
            const int below = (place >= n) + (place >= 2 * n) + (place >= 3 * n);
            uint32_t* to = out + expert * expert_out + ((group_k * 4 + part / 16) * 4 + below) * ld_out + place - below * n;
            if (VECTORS) *reinterpret_cast<uint4*>(to) = v;
            else to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
        __syncwarp();
    }
}

enum Layout : int { K_WORDS = 0, K_WORDS_TURNED = 1, N_WORDS = 2, N_WORDS_AWQ = 3, K_BYTES = 4 };

constexpr int SIDE = 64;

// ENC-2 to ENC-8: codes [n, k], one per byte, to the storage of a layout; `offset` is added to each modulo 16. ld_out: words, or
// bytes for K_BYTES. A block turns SIDE x SIDE codes at a time.
template <int LAYOUT>
__global__ void __launch_bounds__(THREADS) int4_pack(
    const uint8_t* q, long long ld_q, void* out, long long ld_out, long long n, long long k, uint32_t offset)
{
    __shared__ uint8_t codes[SIDE][SIDE + 4];
    const long long k0 = 1ll * blockIdx.x * SIDE;
    for (long long n0 = 1ll * blockIdx.y * SIDE; n0 < n; n0 += 1ll * gridDim.y * SIDE) {
        for (int i = threadIdx.x; i < SIDE * SIDE; i += THREADS) {
            const int row = i / SIDE, column = i % SIDE;
            const bool inside = n0 + row < n && k0 + column < k;
            codes[row][column] = inside ? (q[(n0 + row) * ld_q + k0 + column] + offset) & 15 : 0;
        }
        __syncthreads();
        if constexpr (LAYOUT == K_BYTES) {
            for (int i = threadIdx.x; i < SIDE * SIDE / 2; i += THREADS) {
                const int row = i / (SIDE / 2), column = i % (SIDE / 2);
                if (n0 + row < n && k0 + 2 * column < k)
                    static_cast<uint8_t*>(out)[(n0 + row) * ld_out + k0 / 2 + column]
                        = codes[row][2 * column] | codes[row][2 * column + 1] << 4;
            }
        } else {
            for (int i = threadIdx.x; i < SIDE * SIDE / 8; i += THREADS) {
                // neighbouring threads write neighbouring words
                const int fast = LAYOUT == K_WORDS_TURNED ? SIDE : SIDE / 8, f = i % fast, s = i / fast;
                const int word = LAYOUT == K_WORDS_TURNED ? s : f, other = LAYOUT == K_WORDS_TURNED ? f : s;
                const bool along_k = LAYOUT == K_WORDS || LAYOUT == K_WORDS_TURNED;
                uint32_t packed = 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const int place = 8 * word + (LAYOUT == N_WORDS_AWQ ? j % 4 * 2 + j / 4 : j);
                    packed |= uint32_t(along_k ? codes[other][place] : codes[place][other]) << (4 * j);
                }
                const long long at_n = along_k ? n0 + other : n0 + 8 * word, at_k = along_k ? k0 + 8 * word : k0 + other;
                if (at_n >= n || at_k >= k) continue;
                const long long row = LAYOUT == K_WORDS ? at_n : LAYOUT == K_WORDS_TURNED ? at_k / 8 : at_k;
                const long long column = LAYOUT == K_WORDS ? at_k / 8 : LAYOUT == K_WORDS_TURNED ? at_n : at_n / 8;
                static_cast<uint32_t*>(out)[row * ld_out + column] = packed;
            }
        }
        __syncthreads();
    }
}

// ENC-15, ENC-16: eight products of each scale; PAIRS: two scales per thread and 16 bytes per store.
template <bool PAIRS>
__global__ void __launch_bounds__(THREADS) scale_pack_e4m3(
    const uint8_t* scales, long long ld, uint8_t* out, long long ld_out, long long n)
{
    constexpr int PER = PAIRS ? 2 : 1;
    const long long step = 1ll * gridDim.x * THREADS * PER;
    for (long long i = (1ll * blockIdx.x * THREADS + threadIdx.x) * PER; i < n; i += step) {
        const bool second = PAIRS && i + 1 < n;
        const float2 s = e4m3fn_values(scales[i * ld] | (second ? scales[(i + 1) * ld] << 8 : 0));
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float f = j < 2 ? s.x : s.y, first = static_cast<float>(4 * (j % 2) - 8);
            words[j] = e4m3fn_pair(__fmul_rn(f, first), __fmul_rn(f, first + 1.0f))
                | e4m3fn_pair(__fmul_rn(f, first + 2.0f), __fmul_rn(f, first + 3.0f)) << 16;
        }
        if (second) *reinterpret_cast<uint4*>(out + i * 8) = make_uint4(words[0], words[1], words[2], words[3]);
        else for (int j = 0; j < 8; ++j) out[i * ld_out + j] = static_cast<uint8_t>(words[j / 4] >> (8 * (j % 4)));
    }
}

// ENC-19 to ENC-21: one warp per row of bf16 scales. NATIVE: recipe vllm_native, otherwise vllm.
template <bool NATIVE>
__global__ void __launch_bounds__(THREADS) scale_fold(
    const uint16_t* scales, long long ld, uint8_t* group, long long ld_group, float* channel, long long ld_channel, long long n,
    long long groups)
{
    const int lane = threadIdx.x % 32;
    const Target t = {448.0f, 0};
    for (long long row = (1ll * blockIdx.x * THREADS + threadIdx.x) / 32; row < n; row += 1ll * gridDim.x * THREADS / 32) {
        const uint16_t* s = scales + row * ld;
        uint32_t bits = 0;
        for (long long i = lane; i < groups; i += 32) bits = larger<NATIVE>(bits, value_at<BF16>(s, i));
        const float ratio = __fdiv_rn(__uint_as_float(__reduce_max_sync(0xFFFFFFFFu, bits)), 448.0f);
        const float least = __fdiv_rn(1.0f, 448.0f * 512.0f), c = ratio < least ? least : ratio, inverse = __frcp_rn(c);
        for (long long i = lane; i < groups; i += 32) {
            const float f = value_at<BF16>(s, i);
            const uint32_t code = NATIVE ? code_pair<Nan::KEEP>(__fmul_rn(f, inverse), 0.0f, t)
                                         : code_pair<Nan::HIGH>(__fdiv_rn(f, c), 0.0f, t);
            group[row * ld_group + i] = static_cast<uint8_t>(e4m3fn_pair(__fmul_rn(e4m3fn_values(code).x, 0.125f), 0.0f));
        }
        if (lane == 0) channel[row * ld_channel] = __fmul_rn(8.0f, c);
    }
}

// Shard of a row: widths of the shards before it add up to at most `row`.
__device__ __forceinline__ int shard_of(long long row, const int* widths, int shards)
{
    long long end = 0;
    int shard = 0;
    while (shard < shards - 1 && (end += widths[shard]) <= row) ++shard;
    return shard;
}

__device__ __forceinline__ float e4m3fnuz_value(uint32_t code)
{
    const float sign = code & 0x80u ? -1.0f : 1.0f;
    if (code == 0x80u) return __uint_as_float(0x7FC00000u);
    return (code & 0x7Fu) == 0x7Fu ? sign * 240.0f : 0.5f * e4m3fn_values(code).x;
}

// ENC-26 on one code.
template <bool HALF>
__device__ __forceinline__ uint32_t requantized(uint32_t code, float scale, float inverse, Target t)
{
    float v = __fmul_rn(t.fnuz ? e4m3fnuz_value(code) : e4m3fn_values(code).x, scale);
    if (HALF) {
        uint16_t half;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(v));
        asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(half));
    }
    return code_pair<Nan::HIGH>(__fmul_rn(v, inverse), 0.0f, t) & 0xFFu;
}

// ENC-25 to ENC-27: a block takes pieces of rows in turn; V codes at a time.
template <bool HALF, int V>
__global__ void __launch_bounds__(THREADS) fp8_requantize(
    const uint8_t* w, long long ld, uint8_t* out, long long ld_out, const float* scales, const int* widths, float* scale_out,
    long long n, long long k, int shards, long long per_row, Target t)
{
    float largest = scales[0];
    for (int i = 1; i < shards; ++i) largest = scales[i] > largest || isnan(scales[i]) ? scales[i] : largest;
    const bool keep = !(scales[shards - 1] > -3.402823466e+38f);
    const float inverse = __frcp_rn(largest);
    if (blockIdx.x == 0 && threadIdx.x == 0) *scale_out = largest;
    for (long long piece = blockIdx.x; piece < n * per_row; piece += gridDim.x) {
        const long long row = piece / per_row, place = (piece - row * per_row) * (THREADS * V) + threadIdx.x * V;
        const float scale = scales[shard_of(row, widths, shards)];
        const uint8_t* x = w + row * ld;
        uint8_t* y = out + row * ld_out;
        if (V == 16 && place + V <= k) {
            const uint4 v = load_once(x + place);
            uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t made = 0;
#pragma unroll
                for (int j = 0; j < 4; ++j) made |= requantized<HALF>(words[i] >> (8 * j) & 0xFFu, scale, inverse, t) << (8 * j);
                if (!keep) words[i] = made;
            }
            *reinterpret_cast<uint4*>(y + place) = make_uint4(words[0], words[1], words[2], words[3]);
        } else {
            for (long long j = place; j < place + V && j < k; ++j)
                y[j] = keep ? x[j] : static_cast<uint8_t>(requantized<HALF>(x[j], scale, inverse, t));
        }
    }
}

// ENC-28.
__global__ void __launch_bounds__(THREADS) expand_scales(
    const float* scales, const int* widths, float* out, long long ld_out, long long n, int shards)
{
    for (long long row = 1ll * blockIdx.x * THREADS + threadIdx.x; row < n; row += 1ll * gridDim.x * THREADS)
        out[row * ld_out] = scales[shard_of(row, widths, shards)];
}

// ENC-23: scales doubled, or as they are.
__global__ void __launch_bounds__(THREADS) convert_scales(
    const float* from, long long ld_from, float* to, long long ld_to, long long count, int twice)
{
    for (long long i = 1ll * blockIdx.x * THREADS + threadIdx.x; i < count; i += 1ll * gridDim.x * THREADS) {
        const uint32_t bits = reinterpret_cast<const uint32_t*>(from)[i * ld_from];
        reinterpret_cast<uint32_t*>(to)[i * ld_to] = twice ? __float_as_uint(__fmul_rn(2.0f, __uint_as_float(bits))) : bits;
    }
}

unsigned blocks_of(long long items) { return blocks_for((items + THREADS - 1) / THREADS); }

}  // namespace

// Leading dimensions (ld) count elements of the pointer from row to row. Each returns a cudaError_t.

// Bytes [rows, row_bytes] to bytes, or in place where from == to; `map` is one of Map.
extern "C" int lowbit_map_codes(
    const uint8_t* from, long long ld_from, uint8_t* to, long long ld_to, long long rows, long long row_bytes, int map,
    cudaStream_t stream)
{
    if (map == UNIFIED) return launch_map<UNIFIED>(from, ld_from, to, ld_to, rows, row_bytes, stream);
    if (map == OFFSET) return launch_map<OFFSET>(from, ld_from, to, ld_to, rows, row_bytes, stream);
    if (map == FNUZ) return launch_map<FNUZ>(from, ld_from, to, ld_to, rows, row_bytes, stream);
    if (map == COPY) return launch_map<COPY>(from, ld_from, to, ld_to, rows, row_bytes, stream);
    return cudaErrorInvalidValue;
}

// Words [experts, n, k / 8] to words [experts, k / 8, n]; n a multiple of 16, k of 128.
extern "C" int lowbit_int4_reorder(
    const uint32_t* q, long long ld_q, long long expert_q, uint32_t* out, long long ld_out, long long expert_out, long long experts,
    long long n, long long k, cudaStream_t stream)
{
    (void)cudaGetLastError();  // what failed before is not this launch's
    const dim3 grid(static_cast<unsigned>((n / 16 + 3) / 4), blocks_for((k / 128 * experts + 1) / 2, 65535));
    const bool vectors = aligned(q, ld_q * 4, 16) && aligned(out, ld_out * 4, 16) && expert_q % 4 == 0 && expert_out % 4 == 0;
    if (vectors) int4_reorder<true><<<grid, THREADS, 0, stream>>>(q, ld_q, expert_q, out, ld_out, expert_out, experts, n, k);
    else int4_reorder<false><<<grid, THREADS, 0, stream>>>(q, ld_q, expert_q, out, ld_out, expert_out, experts, n, k);
    return cudaGetLastError();
}

extern "C" int lowbit_int4_pack(
    const uint8_t* q, long long ld_q, void* out, long long ld_out, long long n, long long k, int layout, int offset,
    cudaStream_t stream)
{
    (void)cudaGetLastError();  // what failed before is not this launch's
    const dim3 grid(static_cast<unsigned>((k + SIDE - 1) / SIDE), blocks_for((n + SIDE - 1) / SIDE, 65535));
    if (layout == K_WORDS) int4_pack<K_WORDS><<<grid, THREADS, 0, stream>>>(q, ld_q, out, ld_out, n, k, offset);
    else if (layout == K_WORDS_TURNED) int4_pack<K_WORDS_TURNED><<<grid, THREADS, 0, stream>>>(q, ld_q, out, ld_out, n, k, offset);
    else if (layout == N_WORDS) int4_pack<N_WORDS><<<grid, THREADS, 0, stream>>>(q, ld_q, out, ld_out, n, k, offset);
    else if (layout == N_WORDS_AWQ) int4_pack<N_WORDS_AWQ><<<grid, THREADS, 0, stream>>>(q, ld_q, out, ld_out, n, k, offset);
    else if (layout == K_BYTES) int4_pack<K_BYTES><<<grid, THREADS, 0, stream>>>(q, ld_q, out, ld_out, n, k, offset);
    else return cudaErrorInvalidValue;
    return cudaGetLastError();
}

extern "C" int lowbit_scale_pack_e4m3(
    const uint8_t* scales, long long ld, uint8_t* out, long long ld_out, long long n, cudaStream_t stream)
{
    (void)cudaGetLastError();  // what failed before is not this launch's
    const bool pairs = ld_out == 8 && aligned(out, 0, 16);
    if (pairs) scale_pack_e4m3<true><<<blocks_of((n + 1) / 2), THREADS, 0, stream>>>(scales, ld, out, ld_out, n);
    else scale_pack_e4m3<false><<<blocks_of(n), THREADS, 0, stream>>>(scales, ld, out, ld_out, n);
    return cudaGetLastError();
}

extern "C" int lowbit_scale_fold(
    const uint16_t* scales, long long ld, uint8_t* group, long long ld_group, float* channel, long long ld_channel, long long n,
    long long groups, int native, cudaStream_t stream)
{
    (void)cudaGetLastError();  // what failed before is not this launch's
    const unsigned grid = blocks_of(n * 32);
    if (native) scale_fold<true><<<grid, THREADS, 0, stream>>>(scales, ld, group, ld_group, channel, ld_channel, n, groups);
    else scale_fold<false><<<grid, THREADS, 0, stream>>>(scales, ld, group, ld_group, channel, ld_channel, n, groups);
    return cudaGetLastError();
}

// half: the product passes through binary16.
extern "C" int lowbit_fp8_requantize(
    const uint8_t* w, long long ld, uint8_t* out, long long ld_out, const float* scales, const int* widths, float* scale_out,
    long long n, long long k, int shards, int half, int fnuz, cudaStream_t stream)
{
    (void)cudaGetLastError();  // what failed before is not this launch's
    const Target t = {fnuz ? 224.0f : 448.0f, fnuz};
    const auto start = [&](auto through_half, auto width) {
        constexpr int V = width();
        const long long per_row = (k + THREADS * V - 1) / (THREADS * V);
        fp8_requantize<through_half(), V><<<blocks_for(n * per_row), THREADS, 0, stream>>>(
            w, ld, out, ld_out, scales, widths, scale_out, n, k, shards, per_row, t);
    };
    const bool vectors = aligned(w, ld, 16) && aligned(out, ld_out, 16);
    using One = std::integral_constant<int, 1>;
    using Sixteen = std::integral_constant<int, 16>;
    if (half && vectors) start(std::true_type{}, Sixteen{});
    else if (half) start(std::true_type{}, One{});
    else if (vectors) start(std::false_type{}, Sixteen{});
    else start(std::false_type{}, One{});
    return cudaGetLastError();
}

extern "C" int lowbit_expand_scales(
    const float* scales, const int* widths, float* out, long long ld_out, long long n, int shards, cudaStream_t stream)
{
    (void)cudaGetLastError();  // what failed before is not this launch's
    expand_scales<<<blocks_of(n), THREADS, 0, stream>>>(scales, widths, out, ld_out, n, shards);
    return cudaGetLastError();
}

extern "C" int lowbit_convert_scales(
    const float* from, long long ld_from, float* to, long long ld_to, long long count, int twice, cudaStream_t stream)
{
    (void)cudaGetLastError();  // what failed before is not this launch's
    convert_scales<<<blocks_of(count), THREADS, 0, stream>>>(from, ld_from, to, ld_to, count, twice);
    return cudaGetLastError();
}
