// out = in * 2 + 1 on one vector core, ordered by explicit flags. 256 floats.
#include "program.h"

namespace flags_fault {
enum : uint32_t {
    NONE,
    NO_MTE2_V,
    NO_BARRIER,
    NO_V_MTE2,
    EVENT_EIGHT,
    SET_TWICE,
    WAIT_UNSET,
    SET_LEFT,
    SCALAR_BARRIER,
    CUBE_PIPE,
    NINE_EVENTS,
    SET_TOO_EARLY,
    SECOND_PIPE
};
}

extern "C" __global__ __aicore__ void flags(GM_ADDR in, GM_ADDR out, GM_ADDR, GM_ADDR tiling)
{
    using namespace flags_fault;
    const uint32_t fault = TilingOf(tiling)->fault;
    TPipe pipe;
    TBuf<TPosition::VECCALC> sourceBuffer, resultBuffer;
    pipe.InitBuffer(sourceBuffer, 1024);
    pipe.InitBuffer(resultBuffer, 1024);
    const LocalTensor<float> source = sourceBuffer.Get<float>(), result = resultBuffer.Get<float>();

    if (fault == SET_TOO_EARLY) SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
    DataCopy(source, Global<float>(in), 256);
    if (fault != NO_MTE2_V) {
        if (fault != SET_TOO_EARLY) SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
        WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
    }
    Muls(result, source, 2.0f, 256);
    if (fault != NO_BARRIER) PipeBarrier<PIPE_V>();
    Adds(result, result, 1.0f, 256);
    if (fault != NO_V_MTE2) {
        SetFlag<HardEvent::V_MTE2>(EVENT_ID0);
        WaitFlag<HardEvent::V_MTE2>(EVENT_ID0);
    }
    DataCopy(source, Global<float>(in)[256], 256);
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    DataCopy(Global<float>(out), result, 256);

    if (fault == EVENT_EIGHT) SetFlag<HardEvent::MTE2_V>(8);
    if (fault == SET_TWICE) {
        SetFlag<HardEvent::MTE2_V>(EVENT_ID1);
        SetFlag<HardEvent::MTE2_V>(EVENT_ID1);
    }
    if (fault == WAIT_UNSET) WaitFlag<HardEvent::MTE2_V>(EVENT_ID2);
    if (fault == SET_LEFT) SetFlag<HardEvent::MTE3_V>(EVENT_ID3);
    if (fault == SCALAR_BARRIER) PipeBarrier<PIPE_S>();
    if (fault == CUBE_PIPE) PipeBarrier<PIPE_M>();
    if (fault == SECOND_PIPE) TPipe second;
    const uint32_t events = fault == NINE_EVENTS ? 9 : 8;
    for (uint32_t i = 0; i < events; ++i) GetTPipePtr()->AllocEventID<HardEvent::S_V>();
    for (uint32_t i = 0; i < events; ++i) GetTPipePtr()->ReleaseEventID<HardEvent::S_V>(static_cast<int32_t>(i));
}
