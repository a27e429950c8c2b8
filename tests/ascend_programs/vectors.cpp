// Strided and masked instructions, reduction and broadcast over 256 floats of in, results one after the other in out:
//   [0, 256)   in * in, lanes 0 to 39 of each of the 4 repeats; the rest 7
//   [256, 512) the rows of 8 lanes of in, each times the 8 lanes that Brcb made of in[0], in[1], ... in[31]
//   [512, 516) the largest of the first 50 of each repeat
//   [520, 584) in * 3 under a kept mask of the bits 0xF0F0..., the rest 7
//   [584, 648) in + in in counter mode, 33 elements, the rest 7
#include "program.h"

namespace vectors_fault {
enum : uint32_t {
    NONE,
    SHIFTED_IN_PLACE,
    ONE_BLOCK_TWICE,
    FLOAT_AND,
    BYTE_ADD,
    CAST_FLOOR_UP,
    INT_WRAPS,
    MASK_WIDE,
    MASK_NONE,
    MASK_KEPT_BY_NOBODY,
    MASK_OVERWRITTEN,
    MASK_LEFT,
    COUNTER_LEFT,
    REPEAT_WIDE,
    COUNT_NEGATIVE,
    SHIFT_WIDE,
    WITH_INDEX,
    MASK_FILLED_BY_BRCB,
    REDUCED_UNALIGNED
};
}

extern "C" __global__ __aicore__ void vectors(GM_ADDR in, GM_ADDR out, GM_ADDR, GM_ADDR tiling)
{
    using namespace vectors_fault;
    const uint32_t fault = TilingOf(tiling)->fault;
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 16384);
    const LocalTensor<float> source = buffer.GetWithOffset<float>(256, 0), spread = buffer.GetWithOffset<float>(256, 1024);
    const LocalTensor<float> result = buffer.GetWithOffset<float>(648, 2048);
    const LocalTensor<int32_t> integers = buffer.GetWithOffset<int32_t>(16, 8192);
    DataCopy(source, Global<float>(in), 256);
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
    Duplicate(result, 7.0f, 648);
    Duplicate(integers, fault == INT_WRAPS ? 0x7FFFFFFF : 5, 16);
    PipeBarrier<PIPE_V>();
    Adds(integers, integers, 1, 16);
    const uint64_t lanes = fault == MASK_WIDE ? 65 : fault == MASK_NONE ? 0 : 40;
    const uint32_t repeats = fault == REPEAT_WIDE ? 300 : 4;
    Mul(result, source, source, lanes, repeats, BinaryRepeatParams(1, 1, 1, 8, 8, 8));
    Brcb(spread, source, 4, BrcbRepeatParams(1, 8));
    PipeBarrier<PIPE_V>();
    Mul(result[256], source, spread, 64, 4, BinaryRepeatParams(fault == ONE_BLOCK_TWICE ? 0 : 1, 1, 1, 8, 8, 8));
    WholeReduceMax(result[fault == REDUCED_UNALIGNED ? 513 : 512], source, 50, 4, 1, 1, 8,
                   fault == WITH_INDEX ? ReduceOrder::ORDER_VALUE_INDEX : ReduceOrder::ORDER_ONLY_VALUE);
    Muls(spread, spread, 0.0f, 256);
    PipeBarrier<PIPE_V>();
    Adds(spread, spread, 3.0f, 256);
    PipeBarrier<PIPE_V>();

    if (fault != MASK_KEPT_BY_NOBODY) SetVectorMask<float, MaskMode::NORMAL>(0, 0xF0F0F0F0F0F0F0F0);
    if (fault == MASK_OVERWRITTEN) Adds(spread, spread, 0.0f, 256);
    if (fault == MASK_FILLED_BY_BRCB) Brcb(spread, source, 4, BrcbRepeatParams(1, 8));
    Mul<float, false>(result[520], source, spread, MASK_PLACEHOLDER, 1, BinaryRepeatParams(1, 1, 1, 8, 8, 8));
    SetMaskCount();
    SetVectorMask<float, MaskMode::COUNTER>(33);
    Add<float, false>(result[584], source, source, MASK_PLACEHOLDER, 1, BinaryRepeatParams(1, 1, 1, 8, 8, 8));
    if (fault != COUNTER_LEFT) SetMaskNorm();
    if (fault != MASK_LEFT) ResetMask();

    PipeBarrier<PIPE_ALL>();
    DataCopy(Global<float>(out), result, 648);

    if (fault == SHIFTED_IN_PLACE) {
        PipeBarrier<PIPE_V>();
        Adds(spread[8], spread, 1.0f, 64);
    }
    if (fault == FLOAT_AND) And(spread, spread, spread, 64);
    if (fault == BYTE_ADD) {
        const LocalTensor<uint8_t> bytes = spread.ReinterpretCast<uint8_t>();
        Add(bytes, bytes, bytes, 64);
    }
    if (fault == CAST_FLOOR_UP) Cast(spread, source.ReinterpretCast<half>(), RoundMode::CAST_FLOOR, 64);
    if (fault == COUNT_NEGATIVE) Adds(integers, integers, 1, -1);
    if (fault == SHIFT_WIDE) {
        ShiftRight(integers, integers, 33, 16);
    }
}
