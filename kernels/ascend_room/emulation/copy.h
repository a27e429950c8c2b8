// Transfers between global memory and UB or L1 (pipes MTE2 and MTE3).
#pragma once

#include "queue.h"

namespace AscendC {

// Counts of blocks, lengths and gaps in units of 32 bytes; a gap runs from the end of a block to the start of the next.
struct DataCopyParams {
    DataCopyParams() = default;
    DataCopyParams(lowbit::Bits<16> count, lowbit::Bits<16> length, lowbit::Bits<16> source, lowbit::Bits<16> destination)
        : blockCount(count), blockLen(length), srcStride(source), dstStride(destination) {}

    lowbit::Bits<16> blockCount = 1, blockLen = 0, srcStride = 0, dstStride = 0;
};

// blockLen in bytes; a stride in bytes on the side of global memory and in units of 32 bytes on the local side, end to start.
struct DataCopyExtParams {
    DataCopyExtParams() = default;
    DataCopyExtParams(lowbit::Bits<16> count, lowbit::Bits<32> length, lowbit::Bits<32> source, lowbit::Bits<32> destination,
                      lowbit::Bits<32> reserved)
        : blockCount(count), blockLen(length), srcStride(source), dstStride(destination), rsv(reserved) {}

    lowbit::Bits<16> blockCount = 1;
    lowbit::Bits<32> blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
};

// Paddings in elements.
template <class T>
struct DataCopyPadExtParams {
    DataCopyPadExtParams() = default;
    DataCopyPadExtParams(bool pads, lowbit::Bits<8> left, lowbit::Bits<8> right, T value)
        : isPad(pads), leftPadding(left), rightPadding(right), paddingValue(value) {}

    bool isPad = false;
    lowbit::Bits<8> leftPadding = 0, rightPadding = 0;
    T paddingValue = T(0);
};

// Source strides in elements, C0 and N strides of the destination in units of 32 bytes, its matrix stride in elements.
struct Nd2NzParams {
    Nd2NzParams() = default;
    Nd2NzParams(lowbit::Bits<16> matrices, lowbit::Bits<16> rows, lowbit::Bits<16> columns, lowbit::Bits<16> sourceMatrix,
                lowbit::Bits<16> sourceRow, lowbit::Bits<16> c0, lowbit::Bits<16> n, lowbit::Bits<16> matrix)
        : ndNum(matrices),
          nValue(rows),
          dValue(columns),
          srcNdMatrixStride(sourceMatrix),
          srcDValue(sourceRow),
          dstNzC0Stride(c0),
          dstNzNStride(n),
          dstNzMatrixStride(matrix) {}

    lowbit::Bits<16> ndNum = 0, nValue = 0, dValue = 0, srcNdMatrixStride = 0, srcDValue = 0, dstNzC0Stride = 0, dstNzNStride = 0,
                     dstNzMatrixStride = 0;
};

// repeatTimes runs of blockNum data blocks, dstGap data blocks between them.
template <class T>
struct InitConstValueParams {
    InitConstValueParams() = default;
    InitConstValueParams(lowbit::Bits<16> repeats, lowbit::Bits<16> blocks, lowbit::Bits<16> gap, T value)
        : repeatTimes(repeats), blockNum(blocks), dstGap(gap), initValue(value) {}

    lowbit::Bits<16> repeatTimes = 0, blockNum = 0, dstGap = 0;
    T initValue = T(0);
};

}  // namespace AscendC

namespace lowbit {

// A value of an instruction outside the range its documentation gives.
inline void RequireRange(uint64_t value, uint64_t low, uint64_t high, const char* what, const char* name) {
    if (value < low || value > high) {
        Fail("PARAM-RANGE", "got ", what, " ", value, " of ", name, ", expected ", low, " to ", high);
    }
}

inline bool InUb(const Span& span) { return std::strcmp(span.memory->name, "UB") == 0; }

// The pipe that brings data into a local memory from outside the core.
inline void RequireLanding(const Span& span, const char* name) {
    RequireAlignment(span, BLOCK, name, "dst");
    if (std::strcmp(span.memory->name, "UB") != 0 && std::strcmp(span.memory->name, "L1") != 0) {
        Fail("TENSOR-PLACE", "got dst of ", name, " in ", span.memory->name, ", expected it in UB or L1");
    }
}

}  // namespace lowbit

namespace AscendC {

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& p) {
    lowbit::RequireLanding(dst.span, "DataCopy");
    lowbit::RequireRange(p.blockCount, 1, 4095, "blockCount", "DataCopy");
    lowbit::RequireRange(p.blockLen, 1, 65535, "blockLen", "DataCopy");
    lowbit::Access access = lowbit::Begin(PIPE_MTE2, "DataCopy GM to local");
    const uint64_t bytes = p.blockLen * lowbit::BLOCK;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const uint8_t* source = src.Read(static_cast<int64_t>(i * (bytes + p.srcStride * lowbit::BLOCK)), bytes, access);
        const uint32_t at =
            lowbit::Inside(dst.span, static_cast<int64_t>(i * (bytes + p.dstStride * lowbit::BLOCK)), bytes, access.name);
        std::memcpy(lowbit::WriteLocal(*dst.span.memory, at, static_cast<uint32_t>(bytes), access, true), source, bytes);
    }
}

template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p) {
    lowbit::RequireMemory(src.span, "UB", "DataCopy", "src");
    lowbit::RequireAlignment(src.span, lowbit::BLOCK, "DataCopy", "src");
    lowbit::RequireRange(p.blockCount, 1, 4095, "blockCount", "DataCopy");
    lowbit::RequireRange(p.blockLen, 1, 65535, "blockLen", "DataCopy");
    lowbit::Access access = lowbit::Begin(PIPE_MTE3, "DataCopy UB to GM");
    const uint64_t bytes = p.blockLen * lowbit::BLOCK;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const uint32_t at =
            lowbit::Inside(src.span, static_cast<int64_t>(i * (bytes + p.srcStride * lowbit::BLOCK)), bytes, access.name);
        const uint8_t* source = lowbit::ReadLocal(*src.span.memory, at, static_cast<uint32_t>(bytes), access);
        std::memcpy(dst.Write(static_cast<int64_t>(i * (bytes + p.dstStride * lowbit::BLOCK)), bytes, access), source, bytes);
    }
}

// `count` elements in one block; whole data blocks only.
template <class T>
DataCopyParams WholeBlocks(uint32_t count) {
    const uint64_t bytes = lowbit::BytesOf<T>(count);
    if (bytes == 0 || bytes % lowbit::BLOCK != 0) {
        lowbit::Fail("COPY-LENGTH", "got DataCopy of ", bytes, " bytes, expected a multiple of 32; use DataCopyPad for the rest");
    }
    return DataCopyParams(1, bytes / lowbit::BLOCK, 0, 0);
}

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count) {
    DataCopy(dst, src, WholeBlocks<T>(count));
}

template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
    DataCopy(dst, src, WholeBlocks<T>(count));
}

// Rows of any length into UB. Bytes of the last data block that neither data nor padding reach stay undefined.
template <class T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& p,
                 const DataCopyPadExtParams<T>& pad) {
    lowbit::RequireMemory(dst.span, "UB", "DataCopyPad", "dst");
    lowbit::RequireAlignment(dst.span, lowbit::BLOCK, "DataCopyPad", "dst");
    lowbit::RequireRange(p.blockCount, 1, 4095, "blockCount", "DataCopyPad");
    lowbit::RequireRange(p.blockLen, 1, 2097151, "blockLen", "DataCopyPad");
    lowbit::RequireRange(pad.leftPadding * sizeof(T), 0, lowbit::BLOCK, "bytes of leftPadding", "DataCopyPad");
    lowbit::RequireRange(pad.rightPadding * sizeof(T), 0, lowbit::BLOCK, "bytes of rightPadding", "DataCopyPad");
    if (p.blockLen % sizeof(T) != 0) {
        lowbit::Fail("COPY-LENGTH", "got DataCopyPad of ", uint64_t{p.blockLen}, " bytes, expected whole elements of ",
                     sizeof(T));
    }
    lowbit::Access access = lowbit::Begin(PIPE_MTE2, "DataCopyPad GM to UB");
    const uint32_t left = static_cast<uint32_t>(pad.leftPadding * sizeof(T)),
                   right = static_cast<uint32_t>(pad.rightPadding * sizeof(T));
    const uint32_t length = static_cast<uint32_t>(p.blockLen);
    const uint32_t row = (left + length + right + lowbit::BLOCK - 1) / lowbit::BLOCK * lowbit::BLOCK;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const uint8_t* source = src.Read(static_cast<int64_t>(i * (length + p.srcStride)), length, access);
        const uint32_t at =
            lowbit::Inside(dst.span, static_cast<int64_t>(i * (row + p.dstStride * lowbit::BLOCK)), row, access.name);
        lowbit::Memory& memory = *dst.span.memory;
        uint8_t* target = lowbit::WriteLocal(memory, at, row, access, true);
        std::memcpy(target + left, source, length);
        const uint32_t known = pad.isPad ? left + length + right : left + length;
        if (pad.isPad) {
            for (uint32_t b = 0; b < left; b += sizeof(T)) lowbit::Store(target + b, pad.paddingValue);
            for (uint32_t b = left + length; b < known; b += sizeof(T)) lowbit::Store(target + b, pad.paddingValue);
        } else {
            lowbit::Invalidate(memory, at, left);
        }
        lowbit::Invalidate(memory, at + known, row - known);
    }
}

template <class T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& p) {
    lowbit::RequireMemory(src.span, "UB", "DataCopyPad", "src");
    lowbit::RequireAlignment(src.span, lowbit::BLOCK, "DataCopyPad", "src");
    lowbit::RequireRange(p.blockCount, 1, 4095, "blockCount", "DataCopyPad");
    lowbit::RequireRange(p.blockLen, 1, 2097151, "blockLen", "DataCopyPad");
    lowbit::Access access = lowbit::Begin(PIPE_MTE3, "DataCopyPad UB to GM");
    const uint32_t length = static_cast<uint32_t>(p.blockLen);
    const uint32_t row = (length + lowbit::BLOCK - 1) / lowbit::BLOCK * lowbit::BLOCK;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const uint32_t at =
            lowbit::Inside(src.span, static_cast<int64_t>(i * (row + p.srcStride * lowbit::BLOCK)), length, access.name);
        const uint8_t* source = lowbit::ReadLocal(*src.span.memory, at, length, access);
        std::memcpy(dst.Write(static_cast<int64_t>(i * (length + p.dstStride)), length, access), source, length);
    }
}

// Rows of ndNum matrices into NZ fractals of L1: 32 bytes of a row side by side, the next 32 bytes dstNzC0Stride blocks on.
// The end of a row that is no multiple of 32 bytes is filled with zero.
template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& p) {
    lowbit::RequireMemory(dst.span, "L1", "DataCopy ND to NZ", "dst");
    lowbit::RequireAlignment(dst.span, lowbit::BLOCK, "DataCopy ND to NZ", "dst");
    lowbit::RequireRange(p.ndNum, 1, 4095, "ndNum", "DataCopy ND to NZ");
    lowbit::RequireRange(p.nValue, 1, 16384, "nValue", "DataCopy ND to NZ");
    lowbit::RequireRange(p.dValue, 1, 65535, "dValue", "DataCopy ND to NZ");
    lowbit::RequireRange(p.srcDValue, 1, 65535, "srcDValue", "DataCopy ND to NZ");
    lowbit::RequireRange(p.dstNzC0Stride, 1, 16384, "dstNzC0Stride", "DataCopy ND to NZ");
    lowbit::RequireRange(p.dstNzNStride, 1, 16384, "dstNzNStride", "DataCopy ND to NZ");
    lowbit::RequireRange(p.dstNzMatrixStride, 1, 65535, "dstNzMatrixStride", "DataCopy ND to NZ");
    lowbit::Access access = lowbit::Begin(PIPE_MTE2, "DataCopy ND to NZ");
    const uint64_t bytes = p.dValue * sizeof(T);
    for (uint64_t matrix = 0; matrix < p.ndNum; ++matrix) {
        for (uint64_t n = 0; n < p.nValue; ++n) {
            const uint64_t from = (matrix * p.srcNdMatrixStride + n * p.srcDValue) * sizeof(T);
            const uint8_t* source = src.Read(static_cast<int64_t>(from), bytes, access);
            for (uint64_t c0 = 0; c0 * lowbit::BLOCK < bytes; ++c0) {
                const uint64_t to =
                    matrix * p.dstNzMatrixStride * sizeof(T) + (c0 * p.dstNzC0Stride + n * p.dstNzNStride) * lowbit::BLOCK;
                const uint32_t at = lowbit::Inside(dst.span, static_cast<int64_t>(to), lowbit::BLOCK, access.name);
                const uint64_t filled = std::min<uint64_t>(lowbit::BLOCK, bytes - c0 * lowbit::BLOCK);
                uint8_t* target = lowbit::WriteLocal(*dst.span.memory, at, lowbit::BLOCK, access, true);
                std::memset(target, 0, lowbit::BLOCK);
                std::memcpy(target, source + c0 * lowbit::BLOCK, filled);
            }
        }
    }
}

template <class T>
void InitConstValue(const LocalTensor<T>& dst, const InitConstValueParams<T>& p) {
    if (sizeof(T) < 2)
        lowbit::Fail("INIT-TYPES", "got InitConstValue of ", lowbit::TypeName<T>(), ", expected a type of 16 or 32 bits");
    lowbit::RequireMemory(dst.span, "L1", "InitConstValue", "dst");
    lowbit::RequireAlignment(dst.span, lowbit::BLOCK, "InitConstValue", "dst");
    lowbit::RequireRange(p.repeatTimes, 1, 32767, "repeatTimes", "InitConstValue");
    lowbit::RequireRange(p.blockNum, 1, 32767, "blockNum", "InitConstValue");
    lowbit::RequireRange(p.dstGap, 0, 32767, "dstGap", "InitConstValue");
    lowbit::Access access = lowbit::Begin(PIPE_MTE2, "InitConstValue");
    const uint32_t bytes = static_cast<uint32_t>(p.blockNum * lowbit::BLOCK);
    for (uint64_t i = 0; i < p.repeatTimes; ++i) {
        const uint32_t at =
            lowbit::Inside(dst.span, static_cast<int64_t>(i * (bytes + p.dstGap * lowbit::BLOCK)), bytes, access.name);
        uint8_t* target = lowbit::WriteLocal(*dst.span.memory, at, bytes, access, true);
        for (uint32_t b = 0; b < bytes; b += sizeof(T)) lowbit::Store(target + b, p.initValue);
    }
}

}  // namespace AscendC
