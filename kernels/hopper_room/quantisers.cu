// fp8_quantize: values of 16 or 32 bits to fp8 codes and binary32 scales. One scale per call, given (static) or found (tensor), per
// row (token), per 1 x 128 (block) or per 128 x 128 (tile); recipes and formats are those of docs/contract.md, QNT-10 to QNT-18.
// Every kernel reads 16 bytes at a time where rows allow it (V = 8 or 4 values) and single values where they do not (V = 1).
// Nothing here allocates or waits; scratch memory is the caller's. Compile with -fmad=false: a fused operation is written as one.
#include "fp8.cuh"

using namespace lowbit;

namespace {

struct Matrix {  // rows x k values or codes; ld: elements from row to row
    const void* x;
    long long ldx;
    uint8_t* q;
    long long ldq;
    long long rows, k;
};

// Which of the source systems' rules are followed (conformance/ops/fp8_quantize.py names the recipes).
enum Recipe : int { VLLM = 0, NATIVE = 1, SCALED = 2, DEEPGEMM = 3 };

__device__ __forceinline__ void store_codes(uint8_t* q, const uint32_t* words, int count)
{
    if (count == 2) __stcs(reinterpret_cast<uint2*>(q), make_uint2(words[0], words[1]));
    else __stcs(reinterpret_cast<uint32_t*>(q), words[0]);
}

// 16 bytes of values at `v` to LANES codes at q.
template <int X, Nan N, bool DIVIDE>
__device__ __forceinline__ void write_vector(uint8_t* q, uint4 v, Divisor d, Target t)
{
    float f[LANES<X>];
    widen<X>(v, f);
    if (!DIVIDE) {
#pragma unroll
        for (int i = 0; i < LANES<X>; ++i) f[i] = __fmul_rn(f[i], d.inverse);
    } else if (d.plain) {
#pragma unroll
        for (int i = 0; i < LANES<X>; ++i) f[i] = quotient(f[i], d);
    } else {
#pragma unroll
        for (int i = 0; i < LANES<X>; ++i) f[i] = __fdiv_rn(f[i], d.scale);
    }
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < LANES<X>; i += 4) words[i / 4] = code_pair<N>(f[i], f[i + 1], t) | code_pair<N>(f[i + 2], f[i + 3], t) << 16;
    store_codes(q, words, LANES<X> / 4);
}

template <int X, Nan N, bool DIVIDE>
__device__ __forceinline__ void write_value(uint8_t* q, float f, Divisor d, Target t)
{
    const float v = !DIVIDE ? __fmul_rn(f, d.inverse) : d.plain ? quotient(f, d) : __fdiv_rn(f, d.scale);
    *q = static_cast<uint8_t>(code_pair<N>(v, 0.0f, t));
}

// max(a, b) where a NaN of a stays.
__device__ __forceinline__ float floored(float a, float least) { return a < least ? least : a; }

__device__ __forceinline__ float least_scale(Target t) { return __fdiv_rn(1.0f, __fmul_rn(t.top, 512.0f)); }

// QNT-13: `amax` bounded by *bound where there is one, then divided, then floored.
__device__ __forceinline__ Divisor token_scale(uint32_t bits, const float* bound, Target t)
{
    float amax = __uint_as_float(bits);
    const bool finite = amax <= PLAIN;
    if (bound != nullptr) amax = *bound < amax ? *bound : amax;
    const float scale = floored(__fdiv_rn(amax, t.top), least_scale(t));
    return {scale, __frcp_rn(scale), finite};
}

// Rows past the last are padding: zeros (QNT-18).
__device__ __forceinline__ void zero_row(Matrix a, long long row)
{
    for (long long i = threadIdx.x; i < a.k; i += blockDim.x) a.q[row * a.ldq + i] = 0;
}

// One block per row; the row stays in registers between the two steps. NV vectors per thread, k <= blockDim * NV * LANES + tail.
template <int X, int R, int NV>
__global__ void __launch_bounds__(1024) fp8_quantize_token_registers(
    Matrix a, long long padded, float* scales, long long lds, const float* bound, Target t)
{
    constexpr bool COUNTS = R != VLLM, DIVIDE = R == VLLM;
    constexpr Nan N = R == VLLM ? Nan::HIGH : Nan::KEEP;
    __shared__ uint32_t room[32];
    for (long long row = blockIdx.x; row < padded; row += gridDim.x) {
        if (row >= a.rows) {
            zero_row(a, row);
            continue;
        }
        const char* x = static_cast<const char*>(a.x) + row * a.ldx * BYTES<X>;
        uint8_t* q = a.q + row * a.ldq;
        const int vectors = static_cast<int>(a.k / LANES<X>), rest = static_cast<int>(a.k % LANES<X>), me = threadIdx.x;
        uint4 v[NV];
#pragma unroll
        for (int i = 0; i < NV; ++i) {
            const int place = i * blockDim.x + me;
            v[i] = place < vectors ? load_once(x + 16ll * place) : make_uint4(0, 0, 0, 0);
        }
        const float last = me < rest ? value_at<X>(x, a.k - rest + me) : 0.0f;
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < NV; ++i) most = larger_vector<X, COUNTS>(most, v[i]);
        const Divisor d = token_scale(block_max(larger<COUNTS>(single<X, COUNTS>(most), last), room), bound, t);
        if (me == 0) scales[row * lds] = d.scale;
#pragma unroll
        for (int i = 0; i < NV; ++i) {
            const int place = i * blockDim.x + me;
            if (place < vectors) write_vector<X, N, DIVIDE>(q + LANES<X> * place, v[i], d, t);
        }
        if (me < rest) write_value<X, N, DIVIDE>(q + a.k - rest + me, last, d, t);
        __syncthreads();  // `room` is read again
    }
}

// One block per row, which is read twice: rows of any length and alignment.
template <int X, int R, int V>
__global__ void __launch_bounds__(512) fp8_quantize_token_two_pass(
    Matrix a, long long padded, float* scales, long long lds, const float* bound, Target t)
{
    constexpr bool COUNTS = R != VLLM, DIVIDE = R == VLLM;
    constexpr Nan N = R == VLLM ? Nan::HIGH : Nan::KEEP;
    __shared__ uint32_t room[32];
    for (long long row = blockIdx.x; row < padded; row += gridDim.x) {
        if (row >= a.rows) {
            zero_row(a, row);
            continue;
        }
        const char* x = static_cast<const char*>(a.x) + row * a.ldx * BYTES<X>;
        uint8_t* q = a.q + row * a.ldq;
        const long long vectors = V == 1 ? 0 : a.k / V;
        uint32_t most = 0, words = 0;
        for (long long i = threadIdx.x; i < vectors; i += blockDim.x) words = larger_vector<X, COUNTS>(words, load(x + 16 * i));
        most = single<X, COUNTS>(words);
        for (long long i = vectors * V + threadIdx.x; i < a.k; i += blockDim.x) most = larger<COUNTS>(most, value_at<X>(x, i));
        const Divisor d = token_scale(block_max(most, room), bound, t);
        if (threadIdx.x == 0) scales[row * lds] = d.scale;
        for (long long i = threadIdx.x; i < vectors; i += blockDim.x) write_vector<X, N, DIVIDE>(q + V * i, load(x + 16 * i), d, t);
        for (long long i = vectors * V + threadIdx.x; i < a.k; i += blockDim.x)
            write_value<X, N, DIVIDE>(q + i, value_at<X>(x, i), d, t);
        __syncthreads();
    }
}

constexpr int THREADS = 256, UNROLL = 4;

// Rows cut into pieces of THREADS * UNROLL accesses of V values; a block takes pieces in turn.
struct Pieces {
    long long per_row, count;
};

template <int V>
Pieces pieces_of(long long rows, long long k)
{
    const long long size = 1ll * THREADS * UNROLL * V, per_row = (k + size - 1) / size;
    return {per_row, per_row * rows};
}

// One scale for all: *given (static), or amax / top from the bits that fp8_quantize_amax left (tensor), which block 0 then writes.
template <int X, int R, int V>
__global__ void __launch_bounds__(THREADS) fp8_quantize_one_scale(
    Matrix a, long long padded, Pieces pieces, const float* given, const uint32_t* found, float* scale_out, Target t)
{
    constexpr Nan N = R == VLLM ? Nan::HIGH : Nan::KEEP;
    float scale;
    if (found == nullptr) {
        scale = *given;
    } else {
        scale = __fdiv_rn(__uint_as_float(*found), t.top);
        if (R == NATIVE) scale = floored(scale, least_scale(t));
        if (blockIdx.x == 0 && threadIdx.x == 0) *scale_out = scale;
    }
    const Divisor d = {scale, __frcp_rn(scale), true};
    for (long long turn = blockIdx.x; turn < pieces.count; turn += gridDim.x) {
        const long long piece = pieces.count - 1 - turn;  // what was read last is read first: it may still be in cache
        const long long row = piece / pieces.per_row, start = (piece - row * pieces.per_row) * (THREADS * UNROLL * V);
        uint8_t* q = a.q + row * a.ldq;
        if (row >= a.rows) {
            for (int i = threadIdx.x; i < THREADS * UNROLL * V && start + i < a.k; i += THREADS) q[start + i] = 0;
            continue;
        }
        const char* x = static_cast<const char*>(a.x) + row * a.ldx * BYTES<X>;
        if constexpr (V == 1) {
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) {
                const long long place = start + i * THREADS + threadIdx.x;
                if (place < a.k) write_value<X, N, false>(q + place, value_at<X>(x, place), d, t);
            }
        } else {
            uint4 v[UNROLL];
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) {
                const long long place = start + (i * THREADS + threadIdx.x) * V;
                v[i] = place + V <= a.k ? load_once(x + place * BYTES<X>) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) {
                const long long place = start + (i * THREADS + threadIdx.x) * V;
                if (place + V <= a.k) write_vector<X, N, false>(q + place, v[i], d, t);
                else for (long long j = place; j < a.k; ++j) write_value<X, N, false>(q + j, value_at<X>(x, j), d, t);
            }
        }
    }
}

// Bits of the largest magnitude of all rows into *most, which held 0.
template <int X, int R, int V>
__global__ void __launch_bounds__(THREADS) fp8_quantize_amax(Matrix a, Pieces pieces, uint32_t* most_out)
{
    constexpr bool COUNTS = R != VLLM;
    __shared__ uint32_t room[32];
    uint32_t words = 0, most = 0;
    for (long long piece = blockIdx.x; piece < pieces.count; piece += gridDim.x) {
        const long long row = piece / pieces.per_row, start = (piece - row * pieces.per_row) * (THREADS * UNROLL * V);
        const char* x = static_cast<const char*>(a.x) + row * a.ldx * BYTES<X>;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const long long place = start + (i * THREADS + threadIdx.x) * V;
            if (V > 1 && place + V <= a.k) words = larger_vector<X, COUNTS>(words, load(x + place * BYTES<X>));
            else for (long long j = place; j < place + V && j < a.k; ++j) most = larger<COUNTS>(most, value_at<X>(x, j));
        }
    }
    most = block_max(max(single<X, COUNTS>(words), most), room);
    if (threadIdx.x == 0) atomicMax(most_out, most);
}

// Scale of a block of 128 or of a tile from the bits of its largest magnitude (QNT-15 to QNT-17).
template <int R>
__device__ __forceinline__ Divisor block_scale(uint32_t bits, Target t)
{
    const float amax = __uint_as_float(bits);
    if (R == SCALED) {
        const float factor = __fdiv_rn(t.top, floored(amax, 1e-12f));
        return {__frcp_rn(factor), factor, true};
    }
    const float scale = __fdiv_rn(floored(amax, R == VLLM ? 1e-10f : 1e-4f), t.top);
    return {scale, __frcp_rn(scale), amax <= PLAIN};
}

// 1 x 128: 128 / PER neighbouring lanes share a block, each with PER values.
template <int X, int R, int V>
__global__ void __launch_bounds__(THREADS) fp8_quantize_block(Matrix a, float* scales, long long lds, Target t)
{
    constexpr bool COUNTS = R != VLLM, DIVIDE = R == VLLM;
    constexpr Nan N = R == VLLM ? Nan::LOW : Nan::KEEP;
    constexpr int PER = V == 1 ? 4 : V, SHARE = 128 / PER;
    const long long groups = a.k / 128, count = a.rows * groups;
    const long long step = 1ll * gridDim.x * (THREADS / SHARE);
    const int lane = threadIdx.x % SHARE;
    // every lane of a warp goes round as often, for the exchange below
    for (long long base = 1ll * blockIdx.x * (THREADS / SHARE); base < count; base += step) {
        const long long block = base + threadIdx.x / SHARE, row = block / groups, group = block - row * groups;
        const bool inside = block < count;
        const char* x = static_cast<const char*>(a.x) + (row * a.ldx + group * 128) * BYTES<X>;
        uint8_t* q = a.q + row * a.ldq + group * 128;
        uint32_t most = 0;
        uint4 v = make_uint4(0, 0, 0, 0);
        float f[PER] = {};
        if constexpr (V == 1) {
#pragma unroll
            for (int i = 0; i < PER; ++i) {
                if (inside) f[i] = value_at<X>(x, lane + i * SHARE);
                most = larger<COUNTS>(most, f[i]);
            }
        } else {
            if (inside) v = load_once(x + 16 * lane);
            most = single<X, COUNTS>(larger_vector<X, COUNTS>(0, v));
        }
#pragma unroll
        for (int apart = SHARE / 2; apart > 0; apart /= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, apart));
        if (!inside) continue;
        const Divisor d = block_scale<R>(most, t);
        if (lane == 0) scales[row * lds + group] = d.scale;
        if constexpr (V == 1) {
#pragma unroll
            for (int i = 0; i < PER; ++i) write_value<X, N, DIVIDE>(q + lane + i * SHARE, f[i], d, t);
        } else {
            write_vector<X, N, DIVIDE>(q + PER * lane, v, d, t);
        }
    }
}

// 128 x 128, one block of threads per tile, which is read twice.
template <int X, int V>
__global__ void __launch_bounds__(THREADS) fp8_quantize_tile(Matrix a, float* scales, long long lds, Target t)
{
    constexpr int PER_ROW = 128 / V;
    __shared__ uint32_t room[32];
    const long long across = a.k / 128, count = a.rows / 128 * across;
    for (long long tile = blockIdx.x; tile < count; tile += gridDim.x) {
        const long long down = tile / across, right = tile - down * across;
        const char* x = static_cast<const char*>(a.x) + (down * 128 * a.ldx + right * 128) * BYTES<X>;
        uint8_t* q = a.q + down * 128 * a.ldq + right * 128;
        uint32_t words = 0, most = 0;
#pragma unroll 4
        for (int i = threadIdx.x; i < 128 * PER_ROW; i += THREADS) {
            const long long place = i / PER_ROW * a.ldx + i % PER_ROW * V;
            if constexpr (V == 1) most = larger<true>(most, value_at<X>(x, place));
            else words = larger_vector<X, true>(words, load(x + place * BYTES<X>));
        }
        const Divisor d = block_scale<DEEPGEMM>(block_max(max(single<X, true>(words), most), room), t);
        if (threadIdx.x == 0) scales[down * lds + right] = d.scale;
#pragma unroll 1
        for (int i = threadIdx.x; i < 128 * PER_ROW; i += THREADS) {
            const long long place = i / PER_ROW * a.ldx + i % PER_ROW * V;
            uint8_t* to = q + i / PER_ROW * a.ldq + i % PER_ROW * V;
            if constexpr (V == 1) write_value<X, Nan::KEEP, false>(to, value_at<X>(x, place), d, t);
            else write_vector<X, Nan::KEEP, false>(to, load(x + place * BYTES<X>), d, t);
        }
        __syncthreads();
    }
}

// Calls f with X and R as constants; cudaErrorInvalidValue for others.
template <int... RECIPES, class F>
cudaError_t by_format(int x, int recipe, F f)
{
    (void)cudaGetLastError();  // what failed before is not this launch's
    bool known = false;
    const auto by_recipe = [&](auto format) {
        ((recipe == RECIPES ? (known = true, f(format, std::integral_constant<int, RECIPES>{})) : void()), ...);
    };
    if (x == BF16) by_recipe(std::integral_constant<int, BF16>{});
    if (x == F16) by_recipe(std::integral_constant<int, F16>{});
    if (x == F32) by_recipe(std::integral_constant<int, F32>{});
    return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

int bytes_of(int x) { return x == F32 ? 4 : 2; }

// Whether rows of x and q can be read and written by whole vectors.
bool by_vectors(const Matrix& a, int x)
{
    return aligned(a.x, a.ldx * bytes_of(x), 16) && aligned(a.q, a.ldq, 16 / bytes_of(x));
}

Target target(int fnuz) { return {fnuz ? 224.0f : 448.0f, fnuz}; }

}  // namespace

// x [m, k] of format `x_format` (Real), ldx elements from row to row; q [max(m, p), k] codes, ldq apart; scales as the variant has
// them, lds apart; recipe (Recipe); fnuz: 0 or 1. Each returns a cudaError_t.

// threads: of a block, a multiple of 32 up to 1,024; 0 takes the kernel that reads rows twice. Where rows do not fit
// threads * 8 vectors, or are not aligned, rows are read twice, too.
extern "C" int lowbit_fp8_quantize_token(
    const void* x, long long ldx, int x_format, uint8_t* q, long long ldq, float* scales, long long lds, const float* bound,
    long long m, long long k, long long p, int recipe, int fnuz, int threads, cudaStream_t stream)
{
    const Matrix a = {x, ldx, q, ldq, m, k};
    const Target t = target(fnuz);
    const long long rows = m > p ? m : p;
    if (rows == 0) return cudaSuccess;
    const bool vectors = by_vectors(a, x_format);
    return by_format<VLLM, NATIVE>(x_format, recipe, [&](auto format, auto rule) {
        constexpr int X = format(), R = rule();
        const long long count = k / LANES<X>;
        const long long each = threads > 0 ? (count + threads - 1) / threads : 0;
        const unsigned grid = blocks_for(rows);
        const auto start = [&](auto width) {
            fp8_quantize_token_registers<X, R, width()><<<grid, threads, 0, stream>>>(a, rows, scales, lds, bound, t);
        };
        if (!vectors)
            fp8_quantize_token_two_pass<X, R, 1><<<grid, 256, 0, stream>>>(a, rows, scales, lds, bound, t);
        else if (threads == 0 || each > 8)
            fp8_quantize_token_two_pass<X, R, LANES<X>><<<grid, 512, 0, stream>>>(a, rows, scales, lds, bound, t);
        else if (each <= 1) start(std::integral_constant<int, 1>{});
        else if (each <= 2) start(std::integral_constant<int, 2>{});
        else if (each <= 3) start(std::integral_constant<int, 3>{});
        else if (each <= 4) start(std::integral_constant<int, 4>{});
        else if (each <= 6) start(std::integral_constant<int, 6>{});
        else start(std::integral_constant<int, 8>{});
    });
}

// static: `given` is the scale, scale_out and scratch are null. tensor: `given` is null, scratch 4 bytes.
extern "C" int lowbit_fp8_quantize_one_scale(
    const void* x, long long ldx, int x_format, uint8_t* q, long long ldq, float* scale_out, const float* given, uint32_t* scratch,
    long long m, long long k, long long p, int recipe, int fnuz, cudaStream_t stream)
{
    const Target t = target(fnuz);
    Matrix a = {x, ldx, q, ldq, m, k};
    long long rows = m > p ? m : p;
    if (m == rows && ldx == k && ldq == k && m > 1) a.k *= m, rows = a.rows = 1;  // without gaps it is one row
    const bool vectors = by_vectors(a, x_format) || (rows == 1 && aligned(x, 0, 16) && aligned(q, 0, 16 / bytes_of(x_format)));
    if (scratch != nullptr)
        if (const cudaError_t error = cudaMemsetAsync(scratch, 0, 4, stream); error != cudaSuccess) return error;
    return by_format<VLLM, NATIVE>(x_format, recipe, [&](auto format, auto rule) {
        constexpr int X = format(), R = rule();
        const auto start = [&](auto width) {
            constexpr int V = width();
            const Pieces read = pieces_of<V>(a.rows, a.k), written = pieces_of<V>(rows, a.k);
            if (scratch != nullptr && read.count > 0)
                fp8_quantize_amax<X, R, V><<<blocks_for(read.count, 1056), THREADS, 0, stream>>>(a, read, scratch);
            if (scratch != nullptr || written.count > 0)
                fp8_quantize_one_scale<X, R, V><<<blocks_for(written.count > 0 ? written.count : 1), THREADS, 0, stream>>>(
                    a, rows, written, given, scratch, scale_out, t);
        };
        if (vectors) start(std::integral_constant<int, LANES<X>>{});
        else start(std::integral_constant<int, 1>{});
    });
}

extern "C" int lowbit_fp8_quantize_block(
    const void* x, long long ldx, int x_format, uint8_t* q, long long ldq, float* scales, long long lds, long long m, long long k,
    int recipe, int fnuz, cudaStream_t stream)
{
    const Matrix a = {x, ldx, q, ldq, m, k};
    const Target t = target(fnuz);
    if (m == 0) return cudaSuccess;
    const bool vectors = by_vectors(a, x_format);
    return by_format<VLLM, SCALED, DEEPGEMM>(x_format, recipe, [&](auto format, auto rule) {
        constexpr int X = format(), R = rule();
        const long long values = m * k;
        if (vectors)
            fp8_quantize_block<X, R, LANES<X>>
                <<<blocks_for((values / LANES<X> + THREADS - 1) / THREADS), THREADS, 0, stream>>>(a, scales, lds, t);
        else
            fp8_quantize_block<X, R, 1><<<blocks_for((values / 4 + THREADS - 1) / THREADS), THREADS, 0, stream>>>(a, scales, lds, t);
    });
}

extern "C" int lowbit_fp8_quantize_tile(
    const void* x, long long ldx, int x_format, uint8_t* q, long long ldq, float* scales, long long lds, long long m, long long k,
    int fnuz, cudaStream_t stream)
{
    const Matrix a = {x, ldx, q, ldq, m, k};
    const Target t = target(fnuz);
    if (m == 0) return cudaSuccess;
    const bool vectors = by_vectors(a, x_format);
    return by_format<DEEPGEMM>(x_format, DEEPGEMM, [&](auto format, auto) {
        constexpr int X = format();
        const unsigned grid = blocks_for(m / 128 * (k / 128));
        if (vectors) fp8_quantize_tile<X, LANES<X>><<<grid, THREADS, 0, stream>>>(a, scales, lds, t);
        else fp8_quantize_tile<X, 1><<<grid, THREADS, 0, stream>>>(a, scales, lds, t);
    });
}
