// project_lora: lora_act[m, r] = sum over k of x[m, k] * lora_down[r, k], 16-bit products summed in binary32 on the cube.
// Cube cores only. lora_down is handed over with K last, so that both operands reach L0 without a transposition.
//
// x [m, k] and lora_down [r, k] half or bfloat16_t, lora_act [m, r] float. A work item is 64 rows by up to 256 columns over all
// of K, in ascending steps of 64: the same sum on every call, whatever the number of cores.
#include "kernel_operator.h"
#include "quantize_tiling.h"

namespace {

constexpr uint32_t FRACTAL = 16;       // rows and columns of a 16-bit fractal of 512 bytes
constexpr uint32_t TILE_M = 64;
constexpr uint32_t TILE_N = 256;
constexpr uint32_t STEP_K = 64;        // of one multiplication: 8 KiB of L0A, 32 KiB of L0B, two of each
constexpr uint32_t CHUNK_K = 256;      // of one copy to L1

template <typename T>
class ProjectLora {
public:
    __aicore__ inline ProjectLora(GM_ADDR x, GM_ADDR loraDown, GM_ADDR loraAct, const ProjectTiling& tiling,
                                  AscendC::TPipe* pipe)
        : tiling_(tiling)
    {
        x_.SetGlobalBuffer((__gm__ T*)x);
        loraDown_.SetGlobalBuffer((__gm__ T*)loraDown);
        loraAct_.SetGlobalBuffer((__gm__ float*)loraAct);
        pipe->InitBuffer(a1_, 2, TILE_M * CHUNK_K * sizeof(T));
        pipe->InitBuffer(b1_, 2, TILE_N * CHUNK_K * sizeof(T));
        pipe->InitBuffer(a2_, 2, TILE_M * STEP_K * sizeof(T));
        pipe->InitBuffer(b2_, 2, TILE_N * STEP_K * sizeof(T));
        pipe->InitBuffer(c_, 1, TILE_M * TILE_N * sizeof(float));
    }

    __aicore__ inline void Process()
    {
        const uint32_t across = (tiling_.r + TILE_N - 1) / TILE_N;
        const uint32_t items = (tiling_.m + TILE_M - 1) / TILE_M * across;
        for (uint32_t item = AscendC::GetBlockIdx(); item < items; item += AscendC::GetBlockNum()) {
            const uint32_t row = item / across * TILE_M;
            const uint32_t column = item % across * TILE_N;
            Project(row, tiling_.m - row < TILE_M ? tiling_.m - row : TILE_M, column,
                    tiling_.r - column < TILE_N ? tiling_.r - column : TILE_N);
        }
    }

private:
    __aicore__ inline void Project(uint32_t row, uint32_t rows, uint32_t column, uint32_t columns)
    {
        const uint32_t padded = (rows + FRACTAL - 1) / FRACTAL * FRACTAL;
        AscendC::LocalTensor<float> c = c_.AllocTensor<float>();
        for (uint32_t k = 0; k < tiling_.k; k += CHUNK_K) {
            const uint32_t length = tiling_.k - k < CHUNK_K ? tiling_.k - k : CHUNK_K;
            Load(row, rows, padded, column, columns, k, length);
            AscendC::LocalTensor<T> a = a1_.DeQue<T>();
            AscendC::LocalTensor<T> b = b1_.DeQue<T>();
            for (uint32_t step = 0; step < length; step += STEP_K) {
                Split(a, b, padded, columns, step);
                Multiply(c, padded, columns, k == 0 && step == 0);
            }
            a1_.FreeTensor(a);
            b1_.FreeTensor(b);
        }
        c_.EnQue(c);
        Store(row, rows, padded, column, columns);
    }

    // GM to L1, rows along K to fractals. Rows that x does not have are zeros: the multiplication takes whole fractals.
    __aicore__ inline void Load(uint32_t row, uint32_t rows, uint32_t padded, uint32_t column, uint32_t columns, uint32_t k,
                                uint32_t length)
    {
        AscendC::LocalTensor<T> a = a1_.AllocTensor<T>();
        if (rows != padded) {
            AscendC::InitConstValueParams<half> zeros;
            zeros.repeatTimes = 1;
            zeros.blockNum = padded * length * sizeof(T) / 32;
            zeros.dstGap = 0;
            zeros.initValue = half(0.0f);
            AscendC::InitConstValue(a.template ReinterpretCast<half>(), zeros);
            AscendC::PipeBarrier<PIPE_MTE2>();
        }
        AscendC::DataCopy(a, x_[uint64_t(row) * tiling_.k + k], Fractals(rows, length, padded));
        a1_.EnQue(a);
        AscendC::LocalTensor<T> b = b1_.AllocTensor<T>();
        AscendC::DataCopy(b, loraDown_[uint64_t(column) * tiling_.k + k], Fractals(columns, length, columns));
        b1_.EnQue(b);
    }

    // One matrix of `rows` by `length`, whose rows lie tiling_.k apart, to columns of fractals of `padded` rows.
    __aicore__ inline AscendC::Nd2NzParams Fractals(uint32_t rows, uint32_t length, uint32_t padded)
    {
        AscendC::Nd2NzParams params;
        params.ndNum = 1;
        params.nValue = rows;
        params.dValue = length;
        params.srcNdMatrixStride = 0;
        params.srcDValue = tiling_.k;
        params.dstNzC0Stride = padded;
        params.dstNzNStride = 1;
        params.dstNzMatrixStride = 1;
        return params;
    }

    // L1 to L0: rows of fractals for the left operand, the order of L1 for the right one.
    __aicore__ inline void Split(AscendC::LocalTensor<T>& a, AscendC::LocalTensor<T>& b, uint32_t padded,
                                 uint32_t columns, uint32_t step)
    {
        AscendC::LocalTensor<T> left = a2_.AllocTensor<T>();
        AscendC::LoadData2DParams across;
        across.repeatTimes = STEP_K / FRACTAL;
        across.srcStride = padded / FRACTAL;
        across.ifTranspose = false;
        for (uint32_t row = 0; row < padded; row += FRACTAL) {
            AscendC::LoadData(left[row * STEP_K], a[step * padded + row * FRACTAL], across);
        }
        a2_.EnQue(left);
        AscendC::LocalTensor<T> right = b2_.AllocTensor<T>();
        AscendC::LoadData2DParams straight;
        straight.repeatTimes = STEP_K / FRACTAL * (columns / FRACTAL);
        straight.srcStride = 1;
        straight.ifTranspose = false;
        AscendC::LoadData(right, b[step * columns], straight);
        b2_.EnQue(right);
    }

    __aicore__ inline void Multiply(AscendC::LocalTensor<float>& c, uint32_t padded, uint32_t columns, bool first)
    {
        AscendC::LocalTensor<T> left = a2_.DeQue<T>();
        AscendC::LocalTensor<T> right = b2_.DeQue<T>();
        AscendC::MmadParams params;
        params.m = padded;  // never 1, which would be read as a vector
        params.n = columns;
        params.k = STEP_K;
        params.cmatrixInitVal = first;
        AscendC::Mmad(c, left, right, params);
        AscendC::PipeBarrier<PIPE_M>();  // the next one adds to the same accumulator
        a2_.FreeTensor(left);
        b2_.FreeTensor(right);
    }

    __aicore__ inline void Store(uint32_t row, uint32_t rows, uint32_t padded, uint32_t column, uint32_t columns)
    {
        AscendC::LocalTensor<float> c = c_.DeQue<float>();
        AscendC::FixpipeParamsV220 params;
        params.nSize = columns;
        params.mSize = rows;
        params.srcStride = padded;
        params.dstStride = tiling_.r;
        AscendC::Fixpipe<float, float, AscendC::CFG_ROW_MAJOR>(loraAct_[uint64_t(row) * tiling_.r + column], c, params);
        c_.FreeTensor(c);
    }

    const ProjectTiling tiling_;
    AscendC::GlobalTensor<T> x_, loraDown_;
    AscendC::GlobalTensor<float> loraAct_;
    AscendC::TQue<AscendC::TPosition::A1, 2> a1_;
    AscendC::TQue<AscendC::TPosition::B1, 2> b1_;
    AscendC::TQue<AscendC::TPosition::A2, 2> a2_;
    AscendC::TQue<AscendC::TPosition::B2, 2> b2_;
    AscendC::TQue<AscendC::TPosition::CO1, 1> c_;
};

}  // namespace

extern "C" __global__ __aicore__ void project_lora(GM_ADDR x, GM_ADDR loraDown, GM_ADDR loraAct, GM_ADDR workspace,
                                                   GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);
    const __gm__ ProjectTiling* given = (const __gm__ ProjectTiling*)tiling;
    const ProjectTiling sizes = {given->m, given->k, given->r, given->bf16};
    AscendC::TPipe pipe;
    if (sizes.bf16 != 0) {
        ProjectLora<bfloat16_t>(x, loraDown, loraAct, sizes, &pipe).Process();
    } else {
        ProjectLora<half>(x, loraDown, loraAct, sizes, &pipe).Process();
    }
}
