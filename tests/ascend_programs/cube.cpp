// C = A * B^T on one cube core, A [m, k] then B [n, k] in `in`, both contiguous along k; C [m, n] in `out`, rows n apart.
// a: m, b: n, c: bytes of a row of k (a multiple of 32, at most 256), d: 0 int4b_t, 1 int8_t, 2 half, 3 bfloat16_t. m, n at most
// 128. The product is taken twice, the second time added to the first: C = 2 * A * B^T.
#include "program.h"

namespace cube_fault {
enum : uint32_t {
    NONE,
    ROWS_OVERLAP,
    OUTPUT_OVERLAP,
    NO_MTE2_MTE1,
    NO_M_BARRIER,
    NO_M_FIX,
    WRONG_TYPES,
    WRONG_OUTPUT,
    VECTOR_ROW,
    FRAMEWORK_EVENT,
    FRAMEWORK_EVENT_SET,
    L1_RESULT,
    L0A_UNALIGNED,
    ROWS_UNWRITTEN,
    ACCUMULATES_NOTHING,
    INT_OVERFLOWS,
    VECTOR_PIPE,
    L0A_FULL,
    BYTES_CLEARED,
    STORES_PAST_N,
    CLEARS_UNORDERED,
    NO_MATRIX_STRIDE
};
}

namespace {

template <class T, class Code, class Element>
__aicore__ inline void Multiply(GM_ADDR in, GM_ADDR out, const __gm__ Tiling* tiling)
{
    using namespace cube_fault;
    const uint32_t fault = tiling->fault, m = tiling->a, n = tiling->b, bytes = tiling->c;
    const uint32_t mBlocks = (m + 15) / 16, nBlocks = (n + 15) / 16, kBlocks = bytes / 32;
    const uint32_t row = bytes / sizeof(Code), fractal = 512 / sizeof(Code),
                   k = bytes * 8 /
                       (sizeof(Code) == 2 ? 16
                        : tiling->d == 0  ? 4
                                          : 8);
    TPipe pipe;
    TBuf<TPosition::A1> l1;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::B2> l0b;
    TBuf<TPosition::CO1> l0c;
    pipe.InitBuffer(l1, 2 * 128 * 256);
    pipe.InitBuffer(l0a, fault == L0A_FULL ? 65 * 1024 : 128 * 256);
    pipe.InitBuffer(l0b, 128 * 256);
    pipe.InitBuffer(l0c, 128 * 128 * 4);
    const LocalTensor<Code> a1 = l1.GetWithOffset<Code>(32768 / sizeof(Code), 0),
                            b1 = l1.GetWithOffset<Code>(32768 / sizeof(Code), 32768);
    const LocalTensor<Code> a2 = l0a.Get<Code>(), b2 = l0b.Get<Code>();
    const LocalTensor<T> c = l0c.Get<T>();

    if (fault == BYTES_CLEARED) InitConstValue(l1.Get<int8_t>(), InitConstValueParams<int8_t>(1, 1, 0, 0));
    InitConstValue(b1.template ReinterpretCast<half>(), InitConstValueParams<half>(1, nBlocks * 16 * kBlocks, 0, half(0.0f)));
    if (fault != CLEARS_UNORDERED) PipeBarrier<PIPE_MTE2>();
    const Nd2NzParams left(1, fault == ROWS_UNWRITTEN ? m - 1 : m, row, 0, row, fault == ROWS_OVERLAP ? m - 1 : mBlocks * 16, 1,
                           1);
    const Nd2NzParams right(1, n, row, 0, row, nBlocks * 16, 1, fault == NO_MATRIX_STRIDE ? 0 : 1);
    DataCopy(a1, Global<Code>(in), left);
    DataCopy(b1, Global<Code>(in)[m * row], right);
    if (fault != NO_MTE2_MTE1) {
        SetFlag<HardEvent::MTE2_MTE1>(EVENT_ID0);
        WaitFlag<HardEvent::MTE2_MTE1>(EVENT_ID0);
    }
    // L1 has fractal (i, c) at c * blocks + i; L0A wants it at i * kBlocks + c, L0B as L1 has it.
    for (uint32_t i = 0; i < mBlocks; ++i) {
        const uint32_t shift = fault == L0A_UNALIGNED ? 32 / sizeof(Code) : 0;
        LoadData(a2[i * kBlocks * fractal + shift], a1, LoadData2DParams(i, kBlocks, mBlocks, 0, 0, false, 0));
    }
    for (uint32_t block = 0; block < kBlocks; ++block) {
        LoadData(b2[block * nBlocks * fractal], b1[block * nBlocks * fractal], LoadData2DParams(0, nBlocks, 1, 0, 0, false, 0));
    }
    SetFlag<HardEvent::MTE1_M>(EVENT_ID0);
    WaitFlag<HardEvent::MTE1_M>(EVENT_ID0);
    const LocalTensor<Element> a = a2.template ReinterpretCast<Element>(), b = b2.template ReinterpretCast<Element>();
    if (fault == WRONG_TYPES) Mmad(c.template ReinterpretCast<uint32_t>(), a, b, MmadParams(m, n, k, 0, false, true));
    Mmad(c, a, b, MmadParams(fault == VECTOR_ROW ? 1 : m, n, k, 0, false, fault != ACCUMULATES_NOTHING));
    if (fault != NO_M_BARRIER) PipeBarrier<PIPE_M>();
    const uint32_t again = fault == INT_OVERFLOWS ? 1024 : 1;
    for (uint32_t i = 0; i < again; ++i) {
        Mmad(c, a, b, MmadParams(m, n, k, 0, false, false));
        PipeBarrier<PIPE_M>();
    }
    if (fault != NO_M_FIX) {
        SetFlag<HardEvent::M_FIX>(EVENT_ID0);
        WaitFlag<HardEvent::M_FIX>(EVENT_ID0);
    }
    const uint32_t columns = fault == STORES_PAST_N ? nBlocks * 16 : n, pitch = fault == OUTPUT_OVERLAP ? n - 1 : n;
    FixpipeParamsV220 store(columns, m, mBlocks * 16, pitch, false);
    if (fault == WRONG_OUTPUT) Fixpipe<half, T>(Global<half>(out), c, store);
    if (fault == L1_RESULT) Fixpipe<T, T, CFG_ROW_MAJOR>(Global<T>(out), a1.template ReinterpretCast<T>(), store);
    Fixpipe<T, T, CFG_ROW_MAJOR>(Global<T>(out), c, store);

    if (fault == FRAMEWORK_EVENT) WaitFlag<HardEvent::M_MTE1>(EVENT_ID0);
    if (fault == FRAMEWORK_EVENT_SET) SetFlag<HardEvent::M_MTE1>(EVENT_ID2);
    if (fault == VECTOR_PIPE) PipeBarrier<PIPE_V>();
}

}  // namespace

extern "C" __global__ __aicore__ void cube(GM_ADDR in, GM_ADDR out, GM_ADDR, GM_ADDR tiling)
{
    const __gm__ Tiling* given = TilingOf(tiling);
    if (given->d == 0) return Multiply<int32_t, int8_t, int4b_t>(in, out, given);
    if (given->d == 1) return Multiply<int32_t, int8_t, int8_t>(in, out, given);
    if (given->d == 2) return Multiply<float, half, half>(in, out, given);
    Multiply<float, bfloat16_t, bfloat16_t>(in, out, given);
}
