// One instruction over c elements of in to out on one vector core. a: which, b: round mode or amount.
#include "program.h"

namespace {

template <class To, class From>
__aicore__ inline void Convert(GM_ADDR in, GM_ADDR out, uint32_t inBytes, uint32_t outBytes, RoundMode mode, uint32_t count)
{
    TPipe pipe;
    TBuf<TPosition::VECCALC> sourceBuffer, resultBuffer;
    pipe.InitBuffer(sourceBuffer, inBytes);
    pipe.InitBuffer(resultBuffer, outBytes);
    DataCopy(sourceBuffer.Get<uint8_t>(), Global<uint8_t>(in), inBytes);
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
    Cast(resultBuffer.Get<To>(), sourceBuffer.Get<From>(), mode, count);
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    DataCopy(Global<uint8_t>(out), resultBuffer.Get<uint8_t>(), outBytes);
}

template <class T, class Operation>
__aicore__ inline void Combine(GM_ADDR in, GM_ADDR out, uint32_t count, Operation operation)
{
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    const uint32_t bytes = count * sizeof(T);
    pipe.InitBuffer(buffer, 2 * bytes);
    const LocalTensor<T> left = buffer.Get<T>(), right = buffer.Get<T>()[count];
    DataCopy(left, Global<T>(in), 2 * count);
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
    operation(left, right);
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    DataCopy(Global<T>(out), left, count);
}

}  // namespace

extern "C" __global__ __aicore__ void casts(GM_ADDR in, GM_ADDR out, GM_ADDR, GM_ADDR tiling)
{
    const uint32_t which = TilingOf(tiling)->a, amount = TilingOf(tiling)->b, n = TilingOf(tiling)->c;
    const RoundMode mode = static_cast<RoundMode>(amount);
    const int32_t count = static_cast<int32_t>(n);
    switch (which) {
        case 0: return Convert<float, half>(in, out, 2 * n, 4 * n, mode, n);
        case 1: return Convert<half, float>(in, out, 4 * n, 2 * n, mode, n);
        case 2: return Convert<int4b_t, half>(in, out, 2 * n, n / 2, mode, n);
        case 3: return Convert<uint8_t, half>(in, out, 2 * n, n, mode, n);
        case 4: return Convert<half, int16_t>(in, out, 2 * n, 2 * n, mode, n);
        case 5: return Convert<float, float>(in, out, 4 * n, 4 * n, mode, n);
        case 6: return Convert<float, int32_t>(in, out, 4 * n, 4 * n, mode, n);
        case 7: return Convert<int32_t, float>(in, out, 4 * n, 4 * n, mode, n);
        case 8: return Combine<float>(in, out, n, [count](const auto& x, const auto& y) { Add(x, x, y, count); });
        case 9: return Combine<float>(in, out, n, [count](const auto& x, const auto& y) { Sub(x, x, y, count); });
        case 10: return Combine<float>(in, out, n, [count](const auto& x, const auto& y) { Mul(x, x, y, count); });
        case 11: return Combine<float>(in, out, n, [count](const auto& x, const auto& y) { Div(x, x, y, count); });
        case 12: return Combine<half>(in, out, n, [count](const auto& x, const auto& y) { Mul(x, x, y, count); });
        case 13: return Combine<uint16_t>(in, out, n, [count](const auto& x, const auto& y) { And(x, x, y, count); });
        case 14: return Combine<uint16_t>(in, out, n, [count](const auto& x, const auto& y) { Or(x, x, y, count); });
        case 15:
            return Combine<uint16_t>(in, out, n, [count, amount](const auto& x, const auto&) {
                ShiftRight(x, x, static_cast<uint16_t>(amount), count);
            });
        case 16:
            return Combine<int16_t>(in, out, n, [count, amount](const auto& x, const auto&) {
                ShiftRight(x, x, static_cast<int16_t>(amount), count);
            });
        case 17: return Combine<float>(in, out, n, [count](const auto& x, const auto&) { Maxs(x, x, -1.5f, count); });
        case 18: return Combine<float>(in, out, n, [count](const auto& x, const auto&) { Mins(x, x, 2.5f, count); });
        case 19: return Convert<float, bfloat16_t>(in, out, 2 * n, 4 * n, mode, n);
        default: return Combine<int32_t>(in, out, n, [count](const auto& x, const auto& y) { Sub(x, x, y, count); });
    }
}
