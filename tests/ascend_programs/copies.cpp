// Rows of 5 halves from in, padded to 16 in UB with -1 on the right and 2 on the left, to out; a pass through the workspace;
// scalar reads. One vector core. a: rows.
#include "program.h"

namespace copies_fault {
enum : uint32_t {
    NONE,
    PAST_ARGUMENT,
    PAST_TENSOR,
    OUTSIDE,
    READ_OUTPUT,
    WRITE_INPUT,
    READ_UNWRITTEN,
    PART_BLOCK,
    PART_ELEMENT,
    MISALIGNED,
    NO_ROWS,
    WIDE_FIELD,
    NEGATIVE_FIELD,
    DUMMY_BYTES,
    SHORT_PADDING,
    SCALAR_TOO_EARLY
};
}

extern "C" __global__ __aicore__ void copies(GM_ADDR in, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling)
{
    using namespace copies_fault;
    const uint32_t fault = TilingOf(tiling)->fault, rows = TilingOf(tiling)->a;
    TPipe pipe;
    TBuf<TPosition::VECIN> buffer;
    pipe.InitBuffer(buffer, 4096);
    const LocalTensor<half> tensor = buffer.Get<half>();
    const GlobalTensor<half> input = Global<half>(in), output = Global<half>(out), space = Global<half>(workspace);

    const int32_t count = fault == NO_ROWS          ? 0
                          : fault == WIDE_FIELD     ? 70000
                          : fault == NEGATIVE_FIELD ? -1
                                                    : static_cast<int32_t>(rows);
    const uint32_t bytes = fault == PART_ELEMENT ? 9 : 10;
    const DataCopyExtParams rowsOfFive(count, bytes, 0, 0, 0);
    const DataCopyPadExtParams<half> padding(fault != DUMMY_BYTES, 2, fault == SHORT_PADDING ? 8 : 9, half(-1.0f));
    DataCopyPad(fault == MISALIGNED ? tensor[1] : tensor, input, rowsOfFive, padding);
    SetFlag<HardEvent::MTE2_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_MTE3>(EVENT_ID0);
    const uint32_t whole = rows * 16;
    if (fault == READ_UNWRITTEN) {
        DataCopy(tensor[1024], space, 16);
        return;
    }
    DataCopy(space, tensor, whole);
    SetFlag<HardEvent::MTE3_MTE2>(EVENT_ID0);
    WaitFlag<HardEvent::MTE3_MTE2>(EVENT_ID0);
    DataCopy(tensor[1024], space, DataCopyParams(rows, 1, 0, 1));  // a row is one data block; one free after each
    SetFlag<HardEvent::MTE2_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_MTE3>(EVENT_ID0);
    // Back to rows of 7, in out 3 halves apart.
    DataCopyPad(output, tensor[1024], DataCopyExtParams(rows, 14, 1, 6, 0));

    if (fault != SCALAR_TOO_EARLY) {
        SetFlag<HardEvent::MTE2_S>(EVENT_ID0);
        WaitFlag<HardEvent::MTE2_S>(EVENT_ID0);
    }
    if (static_cast<float>(tensor.GetValue(1)) != -1.0f ||
        static_cast<float>(input.GetValue(0)) != static_cast<float>(tensor.GetValue(2)))
        return;

    if (fault == PAST_ARGUMENT) DataCopy(tensor, input[32768 - 8], 16);
    if (fault == PAST_TENSOR) {
        GlobalTensor<half> narrow;
        narrow.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(in), 8);
        DataCopy(tensor, narrow, 16);
    }
    uint8_t stack[64] = {};
    if (fault == OUTSIDE) DataCopy(tensor, Global<half>(stack), 16);
    if (fault == READ_OUTPUT) DataCopy(tensor, output, 16);
    if (fault == WRITE_INPUT) DataCopy(input, tensor, 16);
    if (fault == PART_BLOCK) DataCopy(tensor, input, 17);
}
