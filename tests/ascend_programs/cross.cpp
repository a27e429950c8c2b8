// Every cube core copies a constant matrix of ones (through Mmad) into the workspace; the two vector cores of its block take
// a half each, add 1 and write it to out. 6 rounds through 2 slots of 256 floats, so that slots are reused.
#include "program.h"

namespace cross_fault {
enum : uint32_t {
    NONE,
    NO_FULL_WAIT,
    NO_FREE_WAIT,
    DRAIN_TOO_MANY,
    SIXTEEN_SETS,
    FLAG_ELEVEN,
    MODE_FOUR,
    SET_LEFT,
    ONE_SIDED_SET,
    FREE_TOO_EARLY,
    WRONG_PIPE
};
constexpr uint16_t FULL = 0, FREE = 1, EXTRA = 2;
constexpr uint32_t ROUNDS = 6, SLOTS = 2;
}  // namespace cross_fault

extern "C" __global__ __aicore__ void cross(GM_ADDR in, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling)
{
    using namespace cross_fault;
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
    const uint32_t fault = TilingOf(tiling)->fault;
    const int64_t block = ASCEND_IS_AIC ? GetBlockIdx() : GetBlockIdx() / GetSubBlockNum();
    const GlobalTensor<float> ring = Global<float>(workspace)[static_cast<uint64_t>(block) * SLOTS * 256];
    if ASCEND_IS_AIC {
        TPipe pipe;
        TBuf<TPosition::A1> l1;
        TBuf<TPosition::A2> l0a;
        TBuf<TPosition::B2> l0b;
        TBuf<TPosition::CO1> l0c;
        pipe.InitBuffer(l1, 1024);
        pipe.InitBuffer(l0a, 512);
        pipe.InitBuffer(l0b, 512);
        pipe.InitBuffer(l0c, 1024);
        DataCopy(l1.Get<half>(), Global<half>(in), 512);
        SetFlag<HardEvent::MTE2_MTE1>(EVENT_ID0);
        WaitFlag<HardEvent::MTE2_MTE1>(EVENT_ID0);
        LoadData(l0a.Get<half>(), l1.Get<half>(), LoadData2DParams(0, 1, 1, 0, 0, false, 0));
        LoadData(l0b.Get<half>(), l1.Get<half>(), LoadData2DParams(1, 1, 1, 0, 0, false, 0));
        SetFlag<HardEvent::MTE1_M>(EVENT_ID0);
        WaitFlag<HardEvent::MTE1_M>(EVENT_ID0);
        Mmad(l0c.Get<float>(), l0a.Get<half>(), l0b.Get<half>(), MmadParams(16, 16, 16, 0, false, true));
        SetFlag<HardEvent::M_FIX>(EVENT_ID0);
        WaitFlag<HardEvent::M_FIX>(EVENT_ID0);
        for (uint32_t round = 0; round < ROUNDS; ++round) {
            if (round >= SLOTS && fault != NO_FREE_WAIT) CrossCoreWaitFlag(FREE);
            Fixpipe<float, float, CFG_ROW_MAJOR>(ring[round % SLOTS * 256], l0c.Get<float>(),
                                                 FixpipeParamsV220(16, 16, 16, 16, false));
            if (fault == WRONG_PIPE) {
                CrossCoreSetFlag<0x2, PIPE_MTE2>(FULL);
            } else {
                CrossCoreSetFlag<0x2, PIPE_FIX>(FULL);
            }
        }
        const uint32_t left = fault == DRAIN_TOO_MANY ? SLOTS + 1 : fault == NO_FREE_WAIT ? ROUNDS : SLOTS;
        for (uint32_t slot = 0; slot < left; ++slot) CrossCoreWaitFlag(FREE);
        for (uint32_t i = 0; fault == SIXTEEN_SETS && i < 16; ++i) CrossCoreSetFlag<0x2, PIPE_FIX>(EXTRA);
        if (fault == FLAG_ELEVEN) CrossCoreSetFlag<0x2, PIPE_FIX>(11);
        if (fault == MODE_FOUR) CrossCoreSetFlag<0x4, PIPE_FIX>(EXTRA);
        if (fault == SET_LEFT) CrossCoreSetFlag<0x2, PIPE_FIX>(EXTRA);
    }
    if ASCEND_IS_AIV {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, 1024);
        const LocalTensor<float> tile = buffer.Get<float>()[128 * GetSubBlockIdx()];
        for (uint32_t round = 0; round < ROUNDS; ++round) {
            if (fault != NO_FULL_WAIT) CrossCoreWaitFlag(FULL);
            if (fault == FREE_TOO_EARLY) CrossCoreSetFlag<0x2, PIPE_MTE2>(FREE);
            DataCopy(tile, ring[round % SLOTS * 256 + 128 * GetSubBlockIdx()], 128);
            SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
            WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
            if (fault != FREE_TOO_EARLY) CrossCoreSetFlag<0x2, PIPE_MTE2>(FREE);
            Adds(tile, tile, 1.0f, 128);
            SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
            WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
            DataCopy(Global<float>(out)[block * ROUNDS * 256 + round * 256 + 128 * GetSubBlockIdx()], tile, 128);
            SetFlag<HardEvent::MTE3_MTE2>(EVENT_ID0);
            WaitFlag<HardEvent::MTE3_MTE2>(EVENT_ID0);
        }
        if (fault == ONE_SIDED_SET && GetSubBlockIdx() == 0) CrossCoreSetFlag<0x1, PIPE_MTE3>(EXTRA);
        if (fault == NONE) {
            CrossCoreSetFlag<0x1, PIPE_MTE3>(EXTRA);
            CrossCoreWaitFlag(EXTRA);
            CrossCoreSetFlag<0x0, PIPE_MTE3>(EXTRA);
            CrossCoreWaitFlag(EXTRA);
        }
    }
}
