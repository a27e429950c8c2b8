// The cube: fractals from L1 to L0A and L0B (pipe MTE1), Mmad (pipe M) and the result to global memory (pipe FIX).
//
// A fractal is 512 bytes, 16 rows of 32 bytes. L0A holds A as [m/16][k/C0] fractals of 16 m by 32 bytes of k, L0B holds B as
// [k/C0][n/16] fractals of 16 n by 32 bytes of k, L0C holds C as [n/16][m/16] fractals of 16 by 16 elements, row-major inside.
// C0 is the elements of 32 bytes: 64 int4, 32 int8, 16 half.
#pragma once

#include "copy.h"

namespace AscendC {

// Strides in fractals: srcStride from start to start, dstGap from end to start.
struct LoadData2DParams {
    LoadData2DParams() = default;
    LoadData2DParams(lowbit::Bits<16> start, lowbit::Bits<8> repeats, lowbit::Bits<16> source, lowbit::Bits<8> id,
                     lowbit::Bits<16> gap, bool transposes, lowbit::Bits<8> mode)
        : startIndex(start),
          dstGap(gap),
          srcStride(source),
          ifTranspose(transposes),
          repeatTimes(repeats),
          sid(id),
          addrMode(mode) {}

    lowbit::Bits<16> startIndex = 0, dstGap = 0, srcStride = 0;
    bool ifTranspose = false;
    lowbit::Bits<8> repeatTimes = 0, sid = 0, addrMode = 0;
};
using LoadData2dParams = LoadData2DParams;

struct MmadParams {
    MmadParams() = default;
    MmadParams(lowbit::Bits<16> rows, lowbit::Bits<16> columns, lowbit::Bits<16> depth, lowbit::Bits<8> unit, bool fromBias,
               bool fromZero)
        : m(rows), n(columns), k(depth), unitFlag(unit), cmatrixSource(fromBias), cmatrixInitVal(fromZero) {}

    lowbit::Bits<16> m = 0, n = 0, k = 0;
    bool isBias = false;
    int32_t fmOffset = 0;
    bool enSsparse = false, enWinogradA = false, enWinogradB = false;
    lowbit::Bits<8> unitFlag = 0;
    bool kDirectionAlign = false, cmatrixSource = false, cmatrixInitVal = true;
};

enum class CO2Layout : uint8_t { NZ, ROW_MAJOR };

struct FixpipeConfig {
    CO2Layout format;
};
constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

}  // namespace AscendC

enum QuantMode_t : uint8_t { NoQuant, F322F16 };

namespace AscendC {

// srcStride in units of 16 source elements (the rows of L0C from one column of fractals to the next), dstStride in elements.
struct FixpipeParamsV220 {
    FixpipeParamsV220() = default;
    FixpipeParamsV220(lowbit::Bits<16> columns, lowbit::Bits<16> rows, lowbit::Bits<16> source, lowbit::Bits<32> destination,
                      bool relu)
        : nSize(columns), mSize(rows), srcStride(source), dstStride(destination), reluEn(relu) {}

    lowbit::Bits<16> nSize = 0, mSize = 0, srcStride = 0;
    lowbit::Bits<32> dstStride = 0;
    QuantMode_t quantPre = QuantMode_t::NoQuant;
    uint64_t deqScalar = 0;
    lowbit::Bits<16> ndNum = 1, srcNdStride = 0, dstNdStride = 0;
    bool reluEn = false;
    lowbit::Bits<8> unitFlag = 0;
    bool isChannelSplit = false;
};

template <class T>
void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LoadData2DParams& p) {
    lowbit::RequireMemory(src.span, "L1", "LoadData", "src");
    lowbit::RequireAlignment(src.span, lowbit::BLOCK, "LoadData", "src");
    lowbit::RequireAlignment(dst.span, lowbit::FRACTAL, "LoadData", "dst");
    lowbit::Memory& target = *dst.span.memory;
    if (std::strcmp(target.name, "L0A") != 0 && std::strcmp(target.name, "L0B") != 0) {
        lowbit::Fail("TENSOR-PLACE", "got dst of LoadData in ", target.name, ", expected it in L0A or L0B");
    }
    lowbit::RequireRange(p.repeatTimes, 1, 255, "repeatTimes", "LoadData");
    if (p.ifTranspose || p.addrMode != 0 || p.sid != 0) {
        lowbit::Fail(
            "NOT-MODELLED",
            "got LoadData with ifTranspose, addrMode or sid set, expected their defaults; the emulation has no model of them");
    }
    lowbit::Access access = lowbit::Begin(PIPE_MTE1, "LoadData");
    lowbit::Memory& source = *src.span.memory;
    for (uint64_t i = 0; i < p.repeatTimes; ++i) {
        const uint64_t from = (p.startIndex + i * p.srcStride) * lowbit::FRACTAL, to = i * (1 + p.dstGap) * lowbit::FRACTAL;
        const uint32_t fromByte = lowbit::Inside(src.span, static_cast<int64_t>(from), lowbit::FRACTAL, "LoadData source");
        const uint32_t toByte = lowbit::Inside(dst.span, static_cast<int64_t>(to), lowbit::FRACTAL, "LoadData destination");
        lowbit::MarkRead(source, fromByte, lowbit::FRACTAL, access);
        lowbit::MarkWrite(target, toByte, lowbit::FRACTAL, access, true);
        // Rows past the matrix move with the rest of their fractal; whether they hold anything moves along.
        std::memcpy(target.data.data() + toByte, source.data.data() + fromByte, lowbit::FRACTAL);
        std::memcpy(target.valid.data() + toByte, source.valid.data() + fromByte, lowbit::FRACTAL);
    }
}

}  // namespace AscendC

namespace lowbit {

template <class T, class U, class S>
constexpr bool CUBE_TYPES = (std::is_same_v<T, int32_t> && std::is_same_v<U, int4b_t> && std::is_same_v<S, int4b_t>) ||
                            (std::is_same_v<T, int32_t> && std::is_same_v<U, int8_t> && std::is_same_v<S, int8_t>) ||
                            (std::is_same_v<T, float> && std::is_same_v<U, half> && std::is_same_v<S, half>) ||
                            (std::is_same_v<T, float> && std::is_same_v<U, bfloat16_t> && std::is_same_v<S, bfloat16_t>);

// 32 bytes of operand elements as numbers of the accumulator's kind.
template <class T, class U>
void Widen(const uint8_t* bytes, T* values) {
    if constexpr (std::is_same_v<U, int4b_t>) {
        for (uint32_t i = 0; i < BLOCK; ++i) {
            values[2 * i] = static_cast<T>((bytes[i] & 15) ^ 8) - 8;
            values[2 * i + 1] = static_cast<T>((bytes[i] >> 4) ^ 8) - 8;
        }
    } else if constexpr (std::is_same_v<U, int8_t>) {
        for (uint32_t i = 0; i < BLOCK; ++i) values[i] = static_cast<int8_t>(bytes[i]);
    } else {
        for (uint32_t i = 0; i < BLOCK / 2; ++i) values[i] = static_cast<float>(Load<U>(bytes + 2 * i));
    }
}

// Rows of one operand as a [rows, k] array. `fractal(row block, k block)` is the place of a fractal in the operand.
template <class T, class U, class Place>
std::vector<T> Gather(const Span& span, uint32_t rows, uint32_t k, Access& access, Place fractal) {
    constexpr uint32_t c0 = BLOCK * 8 / BITS<U>;
    std::vector<T> values(static_cast<size_t>(rows) * k);
    for (uint32_t r = 0; r < rows; ++r) {
        for (uint32_t c = 0; c < k / c0; ++c) {
            const uint64_t place = static_cast<uint64_t>(fractal(r / 16, c)) * FRACTAL + (r % 16) * BLOCK;
            const uint32_t at = Inside(span, static_cast<int64_t>(place), BLOCK, access.name);
            Widen<T, U>(ReadLocal(*span.memory, at, BLOCK, access), values.data() + static_cast<size_t>(r) * k + c * c0);
        }
    }
    return values;
}

}  // namespace lowbit

namespace AscendC {

// C = A * B (cmatrixInitVal) or C += A * B. Integers are exact; products of halves are exact in float and
// are added in float over ascending k, each sum rounded.
template <class T, class U, class S>
void Mmad(const LocalTensor<T>& dst, const LocalTensor<U>& fm, const LocalTensor<S>& filter, const MmadParams& p) {
    if constexpr (!lowbit::CUBE_TYPES<T, U, S>) {
        lowbit::Fail("MMAD-TYPES", "got Mmad of ", lowbit::TypeName<U>(), " and ", lowbit::TypeName<S>(), " into ",
                     lowbit::TypeName<T>(), ", expected int4b_t or int8_t into int32_t, or half or bfloat16_t into float");
    } else {
        lowbit::RequireMemory(fm.span, "L0A", "Mmad", "fm");
        lowbit::RequireMemory(filter.span, "L0B", "Mmad", "filter");
        lowbit::RequireMemory(dst.span, "L0C", "Mmad", "dst");
        lowbit::RequireAlignment(fm.span, lowbit::FRACTAL, "Mmad", "fm");
        lowbit::RequireAlignment(filter.span, lowbit::FRACTAL, "Mmad", "filter");
        lowbit::RequireAlignment(dst.span, 256 * sizeof(T), "Mmad", "dst");
        lowbit::RequireRange(p.m, 1, 4095, "m", "Mmad");
        lowbit::RequireRange(p.n, 1, 4095, "n", "Mmad");
        lowbit::RequireRange(p.k, 1, 4095, "k", "Mmad");
        constexpr uint32_t c0 = lowbit::BLOCK * 8 / lowbit::BITS<U>;
        const uint32_t m = static_cast<uint32_t>(p.m), n = static_cast<uint32_t>(p.n), k = static_cast<uint32_t>(p.k);
        if (m == 1 || k % c0 != 0 || p.unitFlag != 0 || p.cmatrixSource || p.isBias || p.kDirectionAlign) {
            lowbit::Fail("NOT-MODELLED", "got Mmad with m ", m, ", k ", k, " and unitFlag ", uint64_t{p.unitFlag},
                         ", expected m above 1 (1 reads L0A as a vector), k a multiple of ", c0,
                         ", no unit flag and no bias source");
        }
        lowbit::Access access = lowbit::Begin(PIPE_M, "Mmad");
        const uint32_t mBlocks = (m + 15) / 16, nBlocks = (n + 15) / 16, kBlocks = k / c0;
        const std::vector<T> a =
            lowbit::Gather<T, U>(fm.span, m, k, access, [=](uint32_t r, uint32_t c) { return r * kBlocks + c; });
        const std::vector<T> b =
            lowbit::Gather<T, S>(filter.span, n, k, access, [=](uint32_t r, uint32_t c) { return c * nBlocks + r; });
        // An Mmad of ten fractals of C or more is complete before the next one reaches what it wrote; a shorter one is not.
        lowbit::Core& core = *lowbit::self;
        if (core.filled) core.clocks[PIPE_M][lowbit::Lane(core, PIPE_M)] = core.issued[PIPE_M] - 1;
        core.filled = (m / 16) * (n / 16) >= 10;
        lowbit::Memory& l0c = *dst.span.memory;
        const uint32_t bytes = static_cast<uint32_t>(16 * sizeof(T));
        for (uint32_t j = 0; j < nBlocks; ++j) {
            for (uint32_t r = 0; r < mBlocks * 16; ++r) {
                const uint64_t place = (static_cast<uint64_t>(j * mBlocks + r / 16) * 256 + (r % 16) * 16) * sizeof(T);
                const uint32_t at = lowbit::Inside(dst.span, static_cast<int64_t>(place), bytes, access.name);
                const uint32_t columns = r < m ? std::min<uint32_t>(16, n - j * 16) : 0;
                if (!p.cmatrixInitVal && columns != 0)
                    lowbit::ReadLocal(l0c, at, static_cast<uint32_t>(columns * sizeof(T)), access);
                T row[16];
                std::memcpy(row, l0c.data.data() + at, bytes);
                const T* left = a.data() + static_cast<size_t>(r) * k;
                for (uint32_t c = 0; c < columns; ++c) {
                    const T* right = b.data() + static_cast<size_t>(j * 16 + c) * k;
                    T sum = p.cmatrixInitVal || std::is_integral_v<T> ? T(0) : row[c];
                    for (uint32_t i = 0; i < k; ++i) sum += left[i] * right[i];
                    if constexpr (std::is_integral_v<T>)
                        sum = lowbit::Exact<T>(int64_t{sum} + (p.cmatrixInitVal ? 0 : row[c]), "Mmad");
                    row[c] = sum;
                }
                std::memcpy(lowbit::WriteLocal(l0c, at, bytes, access, false), row, bytes);
                const uint32_t known = static_cast<uint32_t>(columns * sizeof(T));
                lowbit::Invalidate(l0c, at + known, bytes - known);
            }
        }
    }
}

template <class T, class U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src, const FixpipeParamsV220& p) {
    static_assert(config.format == CO2Layout::ROW_MAJOR, "the emulation models the row-major output only");
    constexpr bool same = std::is_same_v<T, U> && (std::is_same_v<U, float> || std::is_same_v<U, int32_t>);
    constexpr bool narrows = std::is_same_v<T, half> && std::is_same_v<U, float>;
    if (!(same && p.quantPre == QuantMode_t::NoQuant) && !(narrows && p.quantPre == QuantMode_t::F322F16)) {
        lowbit::Fail("FIXPIPE-TYPES", "got Fixpipe of ", lowbit::TypeName<U>(), " to ", lowbit::TypeName<T>(), " with quantPre ",
                     static_cast<uint32_t>(p.quantPre),
                     ", expected int32_t or float unchanged with NoQuant, or float to half with F322F16");
    }
    lowbit::RequireMemory(src.span, "L0C", "Fixpipe", "src");
    lowbit::RequireAlignment(src.span, 64, "Fixpipe", "src");
    lowbit::RequireRange(p.nSize, 1, 4095, "nSize", "Fixpipe");
    lowbit::RequireRange(p.mSize, 1, 8192, "mSize", "Fixpipe");
    lowbit::RequireRange(p.dstStride, 1, 0xFFFFFFFFu, "dstStride", "Fixpipe");
    if (p.ndNum != 1 || p.reluEn || p.unitFlag != 0 || p.isChannelSplit) {
        lowbit::Fail("NOT-MODELLED",
                     "got Fixpipe with several matrices, relu, unit flag or channel split, expected one plain matrix");
    }
    if constexpr (same || narrows) {
        lowbit::Access access = lowbit::Begin(PIPE_FIX, "Fixpipe");
        const uint32_t m = static_cast<uint32_t>(p.mSize), n = static_cast<uint32_t>(p.nSize);
        for (uint32_t r = 0; r < m; ++r) {
            uint8_t* target = dst.Write(static_cast<int64_t>(r * p.dstStride * sizeof(T)), n * sizeof(T), access);
            for (uint32_t first = 0; first < n; first += 16) {
                const uint32_t columns = std::min<uint32_t>(16, n - first);
                const uint64_t place = (first / 16 * p.srcStride * 16 + r * 16) * sizeof(U);
                const uint32_t at = lowbit::Inside(src.span, static_cast<int64_t>(place), columns * sizeof(U), access.name);
                const uint8_t* source =
                    lowbit::ReadLocal(*src.span.memory, at, static_cast<uint32_t>(columns * sizeof(U)), access);
                if constexpr (same) {
                    std::memcpy(target + first * sizeof(T), source, columns * sizeof(T));
                } else {
                    for (uint32_t c = 0; c < columns; ++c) {
                        lowbit::Store(target + (first + c) * sizeof(T), half(lowbit::Load<float>(source + c * sizeof(U))));
                    }
                }
            }
        }
    }
}

}  // namespace AscendC
