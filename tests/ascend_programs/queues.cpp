// out = in + in on one vector core, ordered by queues with two buffers each. 4 tiles of 256 floats.
#include "program.h"

namespace queues_fault {
enum : uint32_t {
    NONE,
    THIRD_TENSOR,
    ENQUE_TWICE,
    DEQUE_EMPTY,
    FREE_TWICE,
    NEVER_FREED,
    STILL_QUEUED,
    TOO_MANY_BYTES,
    TOO_MANY_BUFFERS,
    CUBE_BUFFER,
    PAST_BUFFER,
    NO_BUFFER,
    NEVER_WRITTEN
};
}

extern "C" __global__ __aicore__ void queues(GM_ADDR in, GM_ADDR out, GM_ADDR, GM_ADDR tiling)
{
    using namespace queues_fault;
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    const uint32_t fault = TilingOf(tiling)->fault;
    TPipe pipe;
    TQue<TPosition::VECIN, 1> sources;
    TQue<TPosition::VECOUT, 1> results;
    TBuf<TPosition::VECCALC> scratch;
    pipe.InitBuffer(sources, 2, 1024);
    pipe.InitBuffer(results, 2, 1024);
    pipe.InitBuffer(scratch, fault == TOO_MANY_BYTES ? 193 * 1024 - 4096 : 1024);
    for (uint32_t i = 0; fault == TOO_MANY_BUFFERS && i < 60; ++i) {
        TBuf<TPosition::VECCALC> extra;
        pipe.InitBuffer(extra, 32);
    }
    if (fault == CUBE_BUFFER) {
        TBuf<TPosition::A1> matrix;
        pipe.InitBuffer(matrix, 32);
    }
    for (uint32_t tile = 0; tile < 4; ++tile) {
        LocalTensor<float> source = sources.AllocTensor<float>();
        DataCopy(source, Global<float>(in)[tile * 256], 256);
        sources.EnQue(source);
        source = sources.DeQue<float>();
        LocalTensor<float> result = results.AllocTensor<float>();
        Add(result, source, fault == NEVER_WRITTEN ? scratch.Get<float>() : source, 256);
        results.EnQue(result);
        if (fault != NEVER_FREED) sources.FreeTensor(source);
        result = results.DeQue<float>();
        DataCopy(Global<float>(out)[tile * 256], result, 256);
        results.FreeTensor(result);
        if (fault == FREE_TWICE) results.FreeTensor(result);
        if (fault == NEVER_FREED) break;
    }
    if (fault == THIRD_TENSOR) {
        for (uint32_t i = 0; i < 3; ++i) sources.AllocTensor<float>();
    }
    if (fault == ENQUE_TWICE) {
        const LocalTensor<float> first = sources.AllocTensor<float>(), second = sources.AllocTensor<float>();
        sources.EnQue(first);
        sources.EnQue(second);
    }
    if (fault == DEQUE_EMPTY) sources.DeQue<float>();
    if (fault == STILL_QUEUED) sources.EnQue(sources.AllocTensor<float>());
    if (fault == PAST_BUFFER) Duplicate(scratch.Get<float>()[8], 0.0f, 256);
    if (fault == NO_BUFFER) Duplicate(LocalTensor<float>(), 0.0f, 8);
}
