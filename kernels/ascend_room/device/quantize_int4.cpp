// quantize_int4: rows of binary16 or bfloat16 to 4-bit codes with one binary16 scale per 64 along K (QNT-35), after a division
// by `smooth` (QNT-62). Vector cores only.
//
// x [m, k] and smooth [k] half or bfloat16_t, smooth possibly unused; q [rows, k / 2] bytes, low nibble = even k; scales
// [k / 64, rows] half; lora_act [rows, r] float, of which only the rows from m on are written, as zeros (QNT-64): project_lora
// writes the others.
//
// A work item is 16 rows by up to 8 groups: 16 scales of one group are then 32 bytes of the transposed scale matrix, the least
// that a copy moves. Row tails are zeros in local memory. A group of zeros has scale 0; its codes, which the contract leaves
// open, are 0.
#include "kernel_operator.h"
#include "quantize_tiling.h"

namespace {

constexpr uint32_t GROUP = 64;
constexpr uint32_t ROWS = 16;
constexpr uint32_t GROUPS = 8;  // per item
constexpr uint32_t WIDTH = GROUPS * GROUP;
constexpr uint32_t TILE = ROWS * WIDTH;
constexpr uint32_t SCALES = ROWS * GROUPS;
constexpr uint32_t BLOCK = 32;          // bytes that copies and vector blocks count in
constexpr int32_t INFINITY_BITS = 0x7F800000;
constexpr int32_t NAN_BITS = 0x7FC00000;
constexpr float RANGE = 7.0f;
constexpr float FLOOR = 1e-12f;         // zero in binary16: a group of zeros has scale 0
constexpr float LARGEST = 65504.0f;

template <typename T>
class QuantizeInt4 {
public:
    __aicore__ inline QuantizeInt4(GM_ADDR x, GM_ADDR smooth, GM_ADDR q, GM_ADDR scales, GM_ADDR loraAct,
                                   const QuantizeTiling& tiling, AscendC::TPipe* pipe)
        : tiling_(tiling)
    {
        x_.SetGlobalBuffer((__gm__ T*)x);
        smooth_.SetGlobalBuffer((__gm__ T*)smooth);
        q_.SetGlobalBuffer((__gm__ uint8_t*)q);
        scales_.SetGlobalBuffer((__gm__ half*)scales);
        loraAct_.SetGlobalBuffer((__gm__ float*)loraAct);
        pipe->InitBuffer(xQueue_, 2, TILE * sizeof(T));
        pipe->InitBuffer(smoothQueue_, 1, WIDTH * sizeof(T));
        pipe->InitBuffer(qQueue_, 2, TILE / 2);
        pipe->InitBuffer(scaleQueue_, 2, SCALES * sizeof(half));
        pipe->InitBuffer(valueBuffer_, TILE * sizeof(float));
        pipe->InitBuffer(finiteBuffer_, TILE * sizeof(float));
        pipe->InitBuffer(nanBuffer_, TILE * sizeof(float));
        pipe->InitBuffer(smoothBuffer_, WIDTH * sizeof(float));
        pipe->InitBuffer(maskBuffer_, 256);
        pipe->InitBuffer(sevenBuffer_, SCALES * sizeof(float));
        pipe->InitBuffer(amaxBuffer_, SCALES * sizeof(float));
        pipe->InitBuffer(nanAmaxBuffer_, SCALES * sizeof(float));
        pipe->InitBuffer(emptyBuffer_, SCALES * sizeof(float));
        pipe->InitBuffer(spreadBuffer_, SCALES * BLOCK);
        pipe->InitBuffer(zeroQueue_, 1, WIDTH * sizeof(float));
    }

    __aicore__ inline void Process()
    {
        AscendC::Duplicate<int32_t>(maskBuffer_.Get<int32_t>(), 0x7FFFFFFF, 64);
        AscendC::Duplicate<float>(sevenBuffer_.Get<float>(), RANGE, SCALES);
        const uint32_t groups = tiling_.k / GROUP;
        const uint32_t chunks = (groups + GROUPS - 1) / GROUPS;
        const uint32_t items = tiling_.rows / ROWS * chunks;
        for (uint32_t item = AscendC::GetBlockIdx(); item < items; item += AscendC::GetBlockNum()) {
            const uint32_t first = item % chunks * GROUPS;
            Quantize(item / chunks * ROWS, first, groups - first < GROUPS ? groups - first : GROUPS);
        }
        ClearPadding();
    }

private:
    // Rows row .. row + 15, groups first .. first + count - 1.
    __aicore__ inline void Quantize(uint32_t row, uint32_t first, uint32_t count)
    {
        const uint32_t width = count * GROUP;
        const uint32_t valid = row >= tiling_.m ? 0 : (tiling_.m - row < ROWS ? tiling_.m - row : ROWS);
        Load(row, first, width, valid);
        AscendC::LocalTensor<float> value = valueBuffer_.Get<float>();
        Widen(value, width, valid);
        if (tiling_.smooth != 0) {
            Smooth(value, count, width);
        }
        Reduce(value, count, width);
        AscendC::LocalTensor<half> scales = scaleQueue_.AllocTensor<half>();
        Scale(scales, count * ROWS);
        Encode(value, count, width);
        scaleQueue_.EnQue(scales);
        Store(row, first, count, width);
    }

    __aicore__ inline void Load(uint32_t row, uint32_t first, uint32_t width, uint32_t valid)
    {
        AscendC::LocalTensor<T> x = xQueue_.AllocTensor<T>();
        if (valid != 0) {
            AscendC::DataCopyParams rows;
            rows.blockCount = valid;
            rows.blockLen = width * sizeof(T) / BLOCK;
            rows.srcStride = (tiling_.k - width) * sizeof(T) / BLOCK;
            rows.dstStride = 0;
            AscendC::DataCopy(x, x_[uint64_t(row) * tiling_.k + first * GROUP], rows);
        }
        xQueue_.EnQue(x);
        if (tiling_.smooth != 0) {
            AscendC::LocalTensor<T> smooth = smoothQueue_.AllocTensor<T>();
            AscendC::DataCopyParams one;
            one.blockCount = 1;
            one.blockLen = width * sizeof(T) / BLOCK;
            one.srcStride = 0;
            one.dstStride = 0;
            AscendC::DataCopy(smooth, smooth_[first * GROUP], one);
            smoothQueue_.EnQue(smooth);
        }
    }

    // To binary32, exact; rows that x does not have are zeros.
    __aicore__ inline void Widen(AscendC::LocalTensor<float>& value, uint32_t width, uint32_t valid)
    {
        AscendC::LocalTensor<T> x = xQueue_.DeQue<T>();
        if (valid != ROWS) {
            AscendC::Duplicate<uint16_t>(x.template ReinterpretCast<uint16_t>()[valid * width], 0, (ROWS - valid) * width);
            AscendC::PipeBarrier<PIPE_V>();
        }
        AscendC::Cast(value, x, AscendC::RoundMode::CAST_NONE, ROWS * width);
        AscendC::PipeBarrier<PIPE_V>();
        xQueue_.FreeTensor(x);
    }

    __aicore__ inline void Smooth(AscendC::LocalTensor<float>& value, uint32_t count, uint32_t width)
    {
        AscendC::LocalTensor<T> smooth = smoothQueue_.DeQue<T>();
        AscendC::LocalTensor<float> divisor = smoothBuffer_.Get<float>();
        AscendC::Cast(divisor, smooth, AscendC::RoundMode::CAST_NONE, width);
        AscendC::PipeBarrier<PIPE_V>();
        smoothQueue_.FreeTensor(smooth);
        const uint8_t stride = width * sizeof(float) / BLOCK;
        const AscendC::BinaryRepeatParams sameRow(1, 1, 1, stride, stride, 0);
        for (uint32_t group = 0; group < count; ++group) {
            const uint32_t at = group * GROUP;
            AscendC::Div(value[at], value[at], divisor[at], uint64_t(GROUP), ROWS, sameRow);
        }
        AscendC::PipeBarrier<PIPE_V>();
    }

    // Per group the largest magnitude, a NaN counted as infinity, and 1 where there is a NaN, else 0. All on the bits, as
    // integers: no comparison of the vector unit meets a NaN.
    __aicore__ inline void Reduce(AscendC::LocalTensor<float>& value, uint32_t count, uint32_t width)
    {
        const uint32_t size = ROWS * width;
        AscendC::LocalTensor<int32_t> magnitude = nanBuffer_.Get<int32_t>();
        AscendC::LocalTensor<int32_t> finite = finiteBuffer_.Get<int32_t>();
        AscendC::LocalTensor<float> isNan = nanBuffer_.Get<float>();
        const AscendC::BinaryRepeatParams sameMask(1, 1, 1, 8, 8, 0);
        AscendC::LocalTensor<uint16_t> words = magnitude.ReinterpretCast<uint16_t>();
        AscendC::And(words, value.ReinterpretCast<uint16_t>(), maskBuffer_.Get<uint16_t>(), uint64_t(128),
                     uint8_t(size * sizeof(float) / 256), sameMask);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Mins(finite, magnitude, INFINITY_BITS, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Sub(magnitude, magnitude, finite, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Mins(magnitude, magnitude, int32_t(1), size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Cast(isNan, magnitude, AscendC::RoundMode::CAST_NONE, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::LocalTensor<float> amax = amaxBuffer_.Get<float>();
        AscendC::LocalTensor<float> nanAmax = nanAmaxBuffer_.Get<float>();
        AscendC::LocalTensor<float> bounded = finite.ReinterpretCast<float>();
        const int32_t stride = width * sizeof(float) / BLOCK;
        for (uint32_t group = 0; group < count; ++group) {
            AscendC::WholeReduceMax(amax[group * ROWS], bounded[group * GROUP], int32_t(GROUP), int32_t(ROWS), 1, 1, stride,
                                    AscendC::ReduceOrder::ORDER_ONLY_VALUE);
            AscendC::WholeReduceMax(nanAmax[group * ROWS], isNan[group * GROUP], int32_t(GROUP), int32_t(ROWS), 1, 1, stride,
                                    AscendC::ReduceOrder::ORDER_ONLY_VALUE);
        }
        AscendC::PipeBarrier<PIPE_V>();
    }

    // scales = RNE_f16(clamp(amax / 7, 1e-12, 65504)), NaN where the group has one; then, spread over a block each, what
    // elements are divided by: the scale as stored, and 1 in a group of zeros.
    __aicore__ inline void Scale(AscendC::LocalTensor<half>& scales, uint32_t size)
    {
        AscendC::LocalTensor<float> amax = amaxBuffer_.Get<float>();
        AscendC::LocalTensor<float> nanAmax = nanAmaxBuffer_.Get<float>();
        AscendC::LocalTensor<int32_t> nanBits = nanAmaxBuffer_.Get<int32_t>();
        AscendC::LocalTensor<int32_t> occupied = emptyBuffer_.Get<int32_t>();
        AscendC::LocalTensor<float> empty = emptyBuffer_.Get<float>();
        AscendC::Mins(occupied, amaxBuffer_.Get<int32_t>(), int32_t(1), size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Cast(empty, occupied, AscendC::RoundMode::CAST_NONE, size);
        AscendC::Div(amax, amax, sevenBuffer_.Get<float>(), size);
        AscendC::Cast(nanBits, nanAmax, AscendC::RoundMode::CAST_RINT, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Muls(empty, empty, -1.0f, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Adds(empty, empty, 1.0f, size);
        AscendC::Maxs(amax, amax, FLOOR, size);
        AscendC::Muls(nanBits, nanBits, NAN_BITS, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Mins(amax, amax, LARGEST, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Or(amax.ReinterpretCast<uint16_t>(), amax.ReinterpretCast<uint16_t>(), nanBits.ReinterpretCast<uint16_t>(),
                    2 * size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Cast(scales, amax, AscendC::RoundMode::CAST_RINT, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Cast(amax, scales, AscendC::RoundMode::CAST_NONE, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Add(amax, amax, empty, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Brcb(spreadBuffer_.Get<float>(), amax, uint8_t(size / 8), AscendC::BrcbRepeatParams(1, 8));
        AscendC::PipeBarrier<PIPE_V>();
    }

    // q = clamp(RNE(x / scale), -8, 7), packed two to a byte.
    __aicore__ inline void Encode(AscendC::LocalTensor<float>& value, uint32_t count, uint32_t width)
    {
        const uint32_t size = ROWS * width;
        AscendC::LocalTensor<float> spread = spreadBuffer_.Get<float>();
        const uint8_t stride = width * sizeof(float) / BLOCK;
        const AscendC::BinaryRepeatParams sameBlock(1, 1, 0, stride, stride, 1);
        for (uint32_t group = 0; group < count; ++group) {
            const uint32_t at = group * GROUP;
            AscendC::Div(value[at], value[at], spread[group * ROWS * 8], uint64_t(GROUP), ROWS, sameBlock);
        }
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Maxs(value, value, -8.0f, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Mins(value, value, 7.0f, size);
        AscendC::PipeBarrier<PIPE_V>();
        // binary32 to whole numbers here: to binary16 first would round twice
        AscendC::LocalTensor<float> whole = finiteBuffer_.Get<float>();
        AscendC::Cast(whole, value, AscendC::RoundMode::CAST_RINT, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::LocalTensor<half> narrow = nanBuffer_.Get<half>();
        AscendC::Cast(narrow, whole, AscendC::RoundMode::CAST_RINT, size);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::LocalTensor<uint8_t> q = qQueue_.AllocTensor<uint8_t>();
        AscendC::LocalTensor<AscendC::int4b_t> nibbles = q.ReinterpretCast<AscendC::int4b_t>();
        AscendC::Cast(nibbles, narrow, AscendC::RoundMode::CAST_RINT, size);
        qQueue_.EnQue(q);
    }

    __aicore__ inline void Store(uint32_t row, uint32_t first, uint32_t count, uint32_t width)
    {
        AscendC::LocalTensor<uint8_t> q = qQueue_.DeQue<uint8_t>();
        AscendC::DataCopyParams rows;
        rows.blockCount = ROWS;
        rows.blockLen = width / 2 / BLOCK;
        rows.srcStride = 0;
        rows.dstStride = (tiling_.k - width) / 2 / BLOCK;
        AscendC::DataCopy(q_[uint64_t(row) * (tiling_.k / 2) + first * (GROUP / 2)], q, rows);
        qQueue_.FreeTensor(q);
        AscendC::LocalTensor<half> scales = scaleQueue_.DeQue<half>();
        AscendC::DataCopyParams columns;
        columns.blockCount = count;
        columns.blockLen = ROWS * sizeof(half) / BLOCK;
        columns.srcStride = 0;
        columns.dstStride = (tiling_.rows - ROWS) * sizeof(half) / BLOCK;
        AscendC::DataCopy(scales_[uint64_t(first) * tiling_.rows + row], scales, columns);
        scaleQueue_.FreeTensor(scales);
    }

    // Rows m .. rows - 1 of lora_act.
    __aicore__ inline void ClearPadding()
    {
        const uint64_t total = uint64_t(tiling_.rows - tiling_.m) * tiling_.r;
        if (total == 0) {
            return;
        }
        AscendC::LocalTensor<float> zeros = zeroQueue_.AllocTensor<float>();
        AscendC::Duplicate<float>(zeros, 0.0f, WIDTH);
        zeroQueue_.EnQue(zeros);
        zeros = zeroQueue_.DeQue<float>();
        const uint64_t step = uint64_t(AscendC::GetBlockNum()) * WIDTH;
        for (uint64_t at = uint64_t(AscendC::GetBlockIdx()) * WIDTH; at < total; at += step) {
            const uint64_t left = total - at < WIDTH ? total - at : WIDTH;
            AscendC::DataCopyParams run;
            run.blockCount = 1;
            run.blockLen = left * sizeof(float) / BLOCK;
            run.srcStride = 0;
            run.dstStride = 0;
            AscendC::DataCopy(loraAct_[uint64_t(tiling_.m) * tiling_.r + at], zeros, run);
        }
        zeroQueue_.FreeTensor(zeros);
    }

    const QuantizeTiling tiling_;
    AscendC::GlobalTensor<T> x_, smooth_;
    AscendC::GlobalTensor<half> scales_;
    AscendC::GlobalTensor<uint8_t> q_;
    AscendC::GlobalTensor<float> loraAct_;
    AscendC::TQue<AscendC::TPosition::VECIN, 2> xQueue_;
    AscendC::TQue<AscendC::TPosition::VECIN, 1> smoothQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, 2> qQueue_, scaleQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, 1> zeroQueue_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> valueBuffer_, finiteBuffer_, nanBuffer_, smoothBuffer_, maskBuffer_,
        sevenBuffer_, amaxBuffer_, nanAmaxBuffer_, emptyBuffer_, spreadBuffer_;
};

}  // namespace

extern "C" __global__ __aicore__ void quantize_int4(GM_ADDR x, GM_ADDR smooth, GM_ADDR q, GM_ADDR scales, GM_ADDR loraAct,
                                                     GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    const __gm__ QuantizeTiling* given = (const __gm__ QuantizeTiling*)tiling;
    const QuantizeTiling sizes = {given->m, given->k, given->rows, given->r, given->smooth, given->bf16};
    AscendC::TPipe pipe;
    if (sizes.bf16 != 0) {
        QuantizeInt4<bfloat16_t>(x, smooth, q, scales, loraAct, sizes, &pipe).Process();
    } else {
        QuantizeInt4<half>(x, smooth, q, scales, loraAct, sizes, &pipe).Process();
    }
}
