// int4 x int4 GEMM with one fp16 scale per 64 of K on both sides, and a low-rank term, for the Ascend 910B (DAV C220).
//
//   D[m,n] = fp16( (sum_g f32(sum_{k in g} a w) * a_scale[g,m] * w_scale[g,n] + lora_act[m,:] . lora_up[n,:])
//                  * channel_scale[n] + bias[n] )
//
// Order and roundings: the sum of a group of 64 is exact in int32; its conversion to f32, the product with a_scale, the
// product with w_scale and the addition to the running f32 total each round once, groups ascending; the low-rank sum
// (fp16 products, f32, on the cube) is added to the total, then channel_scale, then bias, each rounded; one cast to fp16,
// ties to even. Groups, rows or columns are never regrouped, so D does not depend on the number of blocks.
//
// Operands in global memory: a [M, K/2] and w [N, K/2] bytes, two codes per byte along K, even k in bits 3..0; aScale
// [K/64, M] and wScale [K/64, N] fp16; loraAct [M, R] and loraUp [N, R] fp16; channelScale and bias [N] fp16; d [M, N]
// fp16. M >= 0, N a multiple of 8, K of 64, R of 16 or 0: the host refuses everything else, the kernel does not check.
//
// A block is one cube core and two vector cores (MIX 1:2) and walks over output tiles of 128 x 128. The cube core writes,
// per group, the int32 tile, and then the f32 tile of the low-rank product, into the next of four slots of a ring in
// global memory (256 KiB per block, held by L2) and sets FULL; each vector core takes its half of the rows out of the
// slot, and the slot is FREE again when both have. The cube core waits for FREE before it reuses a slot and, at the end,
// for the slots still out, so all flags are zero when the kernel returns, for any number of groups.
//
// 64 codes are 32 bytes: exactly the C0 of a fractal. Codes are moved as bytes and read as int4b_t by the cube; both operands
// are packed alike, so no sum depends on which nibble of a byte the cube takes first. All operands are contiguous along K, so
// a fractal in L1 is a fractal of L0A or L0B without transposition.
//
// Rows and columns are padded to 16 in L1, L0 and the slot. The padding holds zeros or operands of earlier tiles; it
// reaches neither a valid element nor d. The cube is given the padded numbers: with m = 1 it would switch to its
// matrix-vector mode, which reads L0A in another layout.

#include "kernel_operator.h"

#include "gemm_int4_mutants.h"
#include "tiling.h"

using AscendC::GlobalTensor;
using AscendC::HardEvent;
using AscendC::LocalTensor;
using AscendC::PipeBarrier;
using AscendC::SetFlag;
using AscendC::TBuf;
using AscendC::TPosition;
using AscendC::WaitFlag;

namespace {

constexpr uint32_t TILE_M = GEMM_INT4_TILE_M;
constexpr uint32_t TILE_N = GEMM_INT4_TILE_N;
constexpr uint32_t GROUP = GEMM_INT4_GROUP;
constexpr uint32_t SLOTS = GEMM_INT4_RING_SLOTS;
constexpr uint32_t SLOT_ELEMENTS = TILE_M * TILE_N;
constexpr uint32_t STAGES = 2;

// A panel is 256 bytes of K of every row of a tile: what one copy into L1 takes. 8 groups of codes or 128 halves.
constexpr uint32_t BLOCK_BYTES = 32;
constexpr uint32_t FRACTAL_ROWS = 16;
constexpr uint32_t PANEL_BYTES = 256;
constexpr uint32_t PANEL_GROUPS = PANEL_BYTES / BLOCK_BYTES;
constexpr uint32_t PANEL_HALVES = PANEL_BYTES / sizeof(half);
constexpr uint32_t FRACTAL_HALVES = 256;
constexpr uint32_t C0_HALVES = 16;

// L1 512 KiB: (codes, halves) x (left, right) x stages, 32 KiB each. L0A and L0B 64 KiB, L0C 128 KiB: two halves each.
constexpr uint32_t L1_PANEL = TILE_M * PANEL_BYTES;
constexpr uint32_t L1_LORA = 2 * STAGES * L1_PANEL;
constexpr uint32_t L1_BYTES = 2 * L1_LORA;
constexpr uint32_t L0_STAGE = TILE_M * PANEL_BYTES;
constexpr uint32_t L0C_STAGE = SLOT_ELEMENTS * 4;
static_assert(TILE_M == TILE_N && L1_BYTES <= 512 * 1024 && STAGES * L0_STAGE <= 64 * 1024 && STAGES * L0C_STAGE <= 128 * 1024,
              "tile does not fit the cube core");

// Flags between the cores of a block (mode 2), ids 0 to 10. A counter holds at most 15; of FULL at most SLOTS sets are ever
// outstanding. Each slot has a FREE of its own: one vector core may be slots ahead of the other, and no document says that two
// sets by one of them do not count as one by each. A core sets the flag of a slot again only after both have set it.
constexpr uint16_t FULL = 0;
constexpr uint16_t FREE = 1;
static_assert(FREE + SLOTS <= 11 && SLOTS <= 15, "flags between cores");

// The constructor of TPipe sets M_MTE1 events 0, 1 and 2 of a cube core for its own library and its destructor waits for
// them; the kernel's events of that kind start after them. All other kinds are counted from 0, one per stage: the kernel has
// no queue, so that TPipe hands out no other event.
constexpr uint32_t EVENT_L0 = 3;

__aicore__ inline uint32_t Ceil(uint32_t value, uint32_t unit)
{
    return (value + unit - 1) / unit;
}

__aicore__ inline uint32_t RoundUp(uint32_t value, uint32_t unit)
{
    return Ceil(value, unit) * unit;
}

__aicore__ inline uint32_t Min(uint32_t left, uint32_t right)
{
    return left < right ? left : right;
}

struct Operands {
    GM_ADDR a;
    GM_ADDR w;
    GM_ADDR aScale;
    GM_ADDR wScale;
    GM_ADDR loraAct;
    GM_ADDR loraUp;
    GM_ADDR channelScale;
    GM_ADDR bias;
    GM_ADDR d;
};

// The walk that the three cores of a block share: its output tiles, and what passes through the ring for each.
struct Walk {
    uint32_t m;
    uint32_t n;
    uint32_t k;
    uint32_t r;
    uint32_t groups;
    uint32_t mainPanels;
    uint32_t panels;
    uint32_t columns;
    uint32_t tiles;
    uint32_t first;
    uint32_t step;
    bool scaled;
    bool biased;

    __aicore__ inline void Init(__gm__ GemmInt4Tiling* tiling, uint32_t block, uint32_t blocks)
    {
        m = tiling->m;
        n = tiling->n;
        k = tiling->k;
        r = tiling->r;
        scaled = tiling->hasChannelScale != 0;
        biased = tiling->hasBias != 0;
        groups = k / GROUP;
        mainPanels = Ceil(groups, PANEL_GROUPS);
        panels = mainPanels + Ceil(r, PANEL_HALVES);
        columns = Ceil(n, TILE_N);
        tiles = Ceil(m, TILE_M) * columns;
        first = block;
        step = blocks;
    }

    // Slots of the ring that one tile uses.
    __aicore__ inline uint32_t Slots() const
    {
        return groups + (r > 0 ? 1 : 0);
    }

    __aicore__ inline uint32_t Row(uint32_t tile) const
    {
        return tile / columns * TILE_M;
    }

    __aicore__ inline uint32_t Column(uint32_t tile) const
    {
        return tile % columns * TILE_N;
    }

    __aicore__ inline uint32_t Rows(uint32_t tile) const
    {
        return Min(TILE_M, m - Row(tile));
    }

    __aicore__ inline uint32_t Columns(uint32_t tile) const
    {
        return Min(TILE_N, n - Column(tile));
    }
};

class Cube {
public:
    __aicore__ inline void Init(AscendC::TPipe* pipe, const Walk& walk, const Operands& operands, GM_ADDR workspace,
                                uint32_t block)
    {
        walk_ = walk;
        a_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(operands.a), static_cast<uint64_t>(walk.m) * (walk.k / 2));
        w_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(operands.w), static_cast<uint64_t>(walk.n) * (walk.k / 2));
        loraAct_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(operands.loraAct), static_cast<uint64_t>(walk.m) * walk.r);
        loraUp_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(operands.loraUp), static_cast<uint64_t>(walk.n) * walk.r);
        GM_ADDR ring = workspace + static_cast<uint64_t>(block) * GEMM_INT4_WORKSPACE_PER_BLOCK;
        sums_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(ring), SLOTS * SLOT_ELEMENTS);
        products_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(ring), SLOTS * SLOT_ELEMENTS);
        pipe->InitBuffer(l1_, L1_BYTES);
        pipe->InitBuffer(l0a_, STAGES * L0_STAGE);
        pipe->InitBuffer(l0b_, STAGES * L0_STAGE);
        pipe->InitBuffer(l0c_, STAGES * L0C_STAGE);
    }

    __aicore__ inline void Process()
    {
        if (walk_.first >= walk_.tiles) {
            return;
        }
        ClearL1();
        for (uint32_t stage = 0; stage < STAGES; ++stage) {
            SetFlag<HardEvent::MTE1_MTE2>(stage);
            SetFlag<HardEvent::M_MTE1>(EVENT_L0 + stage);
            SetFlag<HardEvent::FIX_M>(stage);
        }
        Load(walk_.first, 0);
        for (uint32_t tile = walk_.first; tile < walk_.tiles; tile += walk_.step) {
            for (uint32_t panel = 0; panel < walk_.panels; ++panel) {
                LoadNext(tile, panel);
                if (panel < walk_.mainPanels) {
                    MultiplyCodes(tile, panel);
                } else {
                    MultiplyLora(tile, panel - walk_.mainPanels);
                }
            }
        }
        for (uint32_t stage = 0; stage < STAGES; ++stage) {
            WaitFlag<HardEvent::MTE1_MTE2>(stage);
            WaitFlag<HardEvent::M_MTE1>(EVENT_L0 + stage);
            WaitFlag<HardEvent::FIX_M>(stage);
        }
        const uint32_t out = mutant::DRAIN_COUNT ? SLOTS : Min(published_, SLOTS);
        for (uint32_t slot = 0; slot < out; ++slot) {
            AscendC::CrossCoreWaitFlag(static_cast<uint16_t>(FREE + slot));
        }
    }

private:
    // Padding rows of a panel are read by the cube, so L1 must hold numbers before the first short tile comes.
    __aicore__ inline void ClearL1()
    {
        constexpr uint16_t blocks = L1_LORA / BLOCK_BYTES;
        AscendC::InitConstValueParams<half> zeros(2, blocks, 0, static_cast<half>(0));
        AscendC::InitConstValue(l1_.Get<half>(), zeros);
        PipeBarrier<PIPE_MTE2>();
    }

    __aicore__ inline uint32_t LoraHalves(uint32_t part) const
    {
        return Min(PANEL_HALVES, walk_.r - part * PANEL_HALVES);
    }

    // Row-major rows in global memory to a column of fractals per 32 bytes of K in L1.
    template <typename T>
    __aicore__ inline void CopyRows(uint32_t offset, const GlobalTensor<T>& source, uint32_t rows, uint32_t length,
                                    uint32_t pitch)
    {
        AscendC::Nd2NzParams params;
        params.ndNum = 1;
        params.nValue = static_cast<uint16_t>(rows);
        params.dValue = static_cast<uint16_t>(length);
        params.srcNdMatrixStride = 0;
        params.srcDValue = static_cast<uint16_t>(pitch);
        params.dstNzC0Stride = static_cast<uint16_t>(RoundUp(rows, FRACTAL_ROWS));
        params.dstNzNStride = 1;
        params.dstNzMatrixStride = 1;
        AscendC::DataCopy(l1_.GetWithOffset<T>(L1_PANEL / sizeof(T), offset), source, params);
    }

    __aicore__ inline void Load(uint32_t tile, uint32_t panel)
    {
        const uint32_t stage = loaded_++ % STAGES;
        const uint64_t row = walk_.Row(tile);
        const uint64_t column = walk_.Column(tile);
        const uint32_t left = stage * 2 * L1_PANEL;
        const uint32_t right = left + L1_PANEL;
        WaitFlag<HardEvent::MTE1_MTE2>(stage);
        if (panel < walk_.mainPanels) {
            const uint32_t pitch = walk_.k / 2;
            const uint32_t start = panel * PANEL_BYTES;
            const uint32_t length = Min(PANEL_BYTES, pitch - start);
            CopyRows<int8_t>(left, a_[row * pitch + start], walk_.Rows(tile), length, pitch);
            CopyRows<int8_t>(right, w_[column * pitch + start], walk_.Columns(tile), length, pitch);
        } else {
            const uint32_t part = panel - walk_.mainPanels;
            const uint32_t start = part * PANEL_HALVES;
            CopyRows<half>(L1_LORA + left, loraAct_[row * walk_.r + start], walk_.Rows(tile), LoraHalves(part), walk_.r);
            CopyRows<half>(L1_LORA + right, loraUp_[column * walk_.r + start], walk_.Columns(tile), LoraHalves(part), walk_.r);
        }
        SetFlag<HardEvent::MTE2_MTE1>(stage);
    }

    __aicore__ inline void LoadNext(uint32_t tile, uint32_t panel)
    {
        if (panel + 1 < walk_.panels) {
            Load(tile, panel + 1);
        } else if (tile + walk_.step < walk_.tiles) {
            Load(tile + walk_.step, 0);
        }
    }

    __aicore__ inline AscendC::LoadData2DParams Fractals(uint32_t count, uint32_t stride) const
    {
        AscendC::LoadData2DParams params;
        params.startIndex = 0;
        params.repeatTimes = static_cast<uint8_t>(count);
        params.srcStride = static_cast<uint16_t>(stride);
        params.dstGap = 0;
        params.ifTranspose = false;
        return params;
    }

    __aicore__ inline AscendC::MmadParams Product(uint32_t rows, uint32_t columns, uint32_t depth, bool fresh) const
    {
        AscendC::MmadParams params;
        params.m = static_cast<uint16_t>(rows);
        params.n = static_cast<uint16_t>(columns);
        params.k = static_cast<uint16_t>(depth);
        params.cmatrixInitVal = fresh;
        return params;
    }

    __aicore__ inline void MultiplyCodes(uint32_t tile, uint32_t panel)
    {
        const uint32_t rows = RoundUp(walk_.Rows(tile), FRACTAL_ROWS);
        const uint32_t columns = RoundUp(walk_.Columns(tile), FRACTAL_ROWS);
        const uint32_t stage = used_++ % STAGES;
        const uint32_t count = Min(PANEL_GROUPS, walk_.groups - panel * PANEL_GROUPS);
        LocalTensor<int8_t> left = l1_.GetWithOffset<int8_t>(L1_PANEL, stage * 2 * L1_PANEL);
        LocalTensor<int8_t> right = l1_.GetWithOffset<int8_t>(L1_PANEL, stage * 2 * L1_PANEL + L1_PANEL);
        WaitFlag<HardEvent::MTE2_MTE1>(stage);
        for (uint32_t group = 0; group < count; ++group) {
            const uint32_t bank = multiplied_++ % STAGES;
            LocalTensor<int8_t> l0a = l0a_.GetWithOffset<int8_t>(L0_STAGE, bank * L0_STAGE);
            LocalTensor<int8_t> l0b = l0b_.GetWithOffset<int8_t>(L0_STAGE, bank * L0_STAGE);
            WaitFlag<HardEvent::M_MTE1>(EVENT_L0 + bank);
            AscendC::LoadData(l0a, left[group * rows * BLOCK_BYTES], Fractals(rows / FRACTAL_ROWS, 1));
            AscendC::LoadData(l0b, right[group * columns * BLOCK_BYTES], Fractals(columns / FRACTAL_ROWS, 1));
            if (group + 1 == count) {
                SetFlag<HardEvent::MTE1_MTE2>(stage);
            }
            SetFlag<HardEvent::MTE1_M>(bank);
            WaitFlag<HardEvent::MTE1_M>(bank);
            const uint32_t accumulator = published_ % STAGES;
            LocalTensor<int32_t> l0c = l0c_.GetWithOffset<int32_t>(SLOT_ELEMENTS, accumulator * L0C_STAGE);
            WaitFlag<HardEvent::FIX_M>(accumulator);
            AscendC::Mmad(l0c, l0a.ReinterpretCast<AscendC::int4b_t>(), l0b.ReinterpretCast<AscendC::int4b_t>(),
                          Product(rows, columns, GROUP, true));
            SetFlag<HardEvent::M_MTE1>(EVENT_L0 + bank);
            Publish(sums_, l0c, tile);
        }
    }

    __aicore__ inline void MultiplyLora(uint32_t tile, uint32_t part)
    {
        const uint32_t rows = RoundUp(walk_.Rows(tile), FRACTAL_ROWS);
        const uint32_t columns = RoundUp(walk_.Columns(tile), FRACTAL_ROWS);
        const uint32_t stage = used_++ % STAGES;
        const uint32_t depth = LoraHalves(part);
        const uint32_t deep = depth / C0_HALVES;
        const uint32_t high = rows / FRACTAL_ROWS;
        const uint32_t bank = multiplied_++ % STAGES;
        LocalTensor<half> left = l1_.GetWithOffset<half>(L1_PANEL / sizeof(half), L1_LORA + stage * 2 * L1_PANEL);
        LocalTensor<half> right = l1_.GetWithOffset<half>(L1_PANEL / sizeof(half), L1_LORA + stage * 2 * L1_PANEL + L1_PANEL);
        LocalTensor<half> l0a = l0a_.GetWithOffset<half>(L0_STAGE / sizeof(half), bank * L0_STAGE);
        LocalTensor<half> l0b = l0b_.GetWithOffset<half>(L0_STAGE / sizeof(half), bank * L0_STAGE);
        WaitFlag<HardEvent::MTE2_MTE1>(stage);
        WaitFlag<HardEvent::M_MTE1>(EVENT_L0 + bank);
        // L0A holds rows of fractals, L1 columns of them; L0B holds the same order as L1, k outermost.
        if constexpr (mutant::LORA_FRACTAL_ORDER) {
            AscendC::LoadData(l0a, left, Fractals(high * deep, 1));
        } else {
            for (uint32_t row = 0; row < high; ++row) {
                AscendC::LoadData(l0a[row * deep * FRACTAL_HALVES], left[row * FRACTAL_HALVES], Fractals(deep, high));
            }
        }
        AscendC::LoadData(l0b, right, Fractals(deep * (columns / FRACTAL_ROWS), 1));
        SetFlag<HardEvent::MTE1_MTE2>(stage);
        SetFlag<HardEvent::MTE1_M>(bank);
        WaitFlag<HardEvent::MTE1_M>(bank);
        const uint32_t accumulator = published_ % STAGES;
        LocalTensor<float> l0c = l0c_.GetWithOffset<float>(SLOT_ELEMENTS, accumulator * L0C_STAGE);
        const bool fresh = part == 0;
        if (fresh) {
            WaitFlag<HardEvent::FIX_M>(accumulator);
        } else {
            PipeBarrier<PIPE_M>();
        }
        AscendC::Mmad(l0c, l0a, l0b, Product(rows, columns, depth, fresh && !mutant::LORA_L0C_STALE));
        SetFlag<HardEvent::M_MTE1>(EVENT_L0 + bank);
        if (part + 1 == walk_.panels - walk_.mainPanels) {
            Publish(products_, l0c, tile);
        }
    }

    // L0C to the next slot, row-major with a pitch of the padded columns, and FULL to both vector cores.
    template <typename T>
    __aicore__ inline void Publish(const GlobalTensor<T>& ring, const LocalTensor<T>& l0c, uint32_t tile)
    {
        const uint32_t rows = walk_.Rows(tile);
        const uint32_t columns = RoundUp(walk_.Columns(tile), FRACTAL_ROWS);
        const uint32_t accumulator = published_ % STAGES;
        SetFlag<HardEvent::M_FIX>(accumulator);
        WaitFlag<HardEvent::M_FIX>(accumulator);
        if (published_ >= SLOTS) {
            AscendC::CrossCoreWaitFlag(static_cast<uint16_t>(FREE + published_ % SLOTS));
        }
        AscendC::FixpipeParamsV220 params;
        params.nSize = static_cast<uint16_t>(columns);
        params.mSize = static_cast<uint16_t>(mutant::UNINITIALISED_WORKSPACE ? rows - 1 : rows);
        params.srcStride = static_cast<uint16_t>(RoundUp(rows, FRACTAL_ROWS));
        params.dstStride = columns;
        params.quantPre = QuantMode_t::NoQuant;
        params.reluEn = false;
        AscendC::Fixpipe<T, T, AscendC::CFG_ROW_MAJOR>(ring[published_ % SLOTS * SLOT_ELEMENTS], l0c, params);
        SetFlag<HardEvent::FIX_M>(accumulator);
        AscendC::CrossCoreSetFlag<0x2, PIPE_FIX>(FULL);
        ++published_;
    }

    Walk walk_;
    GlobalTensor<int8_t> a_;
    GlobalTensor<int8_t> w_;
    GlobalTensor<half> loraAct_;
    GlobalTensor<half> loraUp_;
    GlobalTensor<int32_t> sums_;
    GlobalTensor<float> products_;
    TBuf<TPosition::A1> l1_;
    TBuf<TPosition::A2> l0a_;
    TBuf<TPosition::B2> l0b_;
    TBuf<TPosition::CO1> l0c_;
    uint32_t loaded_ = 0;
    uint32_t used_ = 0;
    uint32_t multiplied_ = 0;
    uint32_t published_ = 0;
};

// UB of a vector core, in bytes: two 32-bit tiles coming in, the running tile, the product, the tile going out, the scales
// of a panel as they come (twice), as f32, and a_scale with each value repeated over a block, channel scale and bias.
constexpr uint32_t HALF_M = TILE_M / 2;
constexpr uint32_t UB_TILE = HALF_M * TILE_N * 4;
constexpr uint32_t UB_A_SCALE = PANEL_GROUPS * HALF_M;
constexpr uint32_t UB_W_SCALE = PANEL_GROUPS * TILE_N;
constexpr uint32_t LANES = 64;
constexpr uint32_t F32_PER_BLOCK = 8;
constexpr uint32_t BRCB_VALUES = 8;

constexpr uint32_t UB_IN = 0;
constexpr uint32_t UB_TOTAL = UB_IN + STAGES * UB_TILE;
constexpr uint32_t UB_PRODUCT = UB_TOTAL + UB_TILE;
constexpr uint32_t UB_OUT = UB_PRODUCT + UB_TILE;
constexpr uint32_t UB_SCALES = UB_OUT + UB_TILE / 2;
constexpr uint32_t UB_SCALES_STAGE = (UB_A_SCALE + UB_W_SCALE) * 2;
constexpr uint32_t UB_A_F32 = UB_SCALES + STAGES * UB_SCALES_STAGE;
constexpr uint32_t UB_A_BLOCKS = UB_A_F32 + UB_A_SCALE * 4;
constexpr uint32_t UB_W_F32 = UB_A_BLOCKS + UB_A_SCALE * BLOCK_BYTES;
constexpr uint32_t UB_COLUMNS = UB_W_F32 + UB_W_SCALE * 4;
constexpr uint32_t UB_COLUMNS_F32 = UB_COLUMNS + 2 * TILE_N * 2;
constexpr uint32_t UB_BYTES = UB_COLUMNS_F32 + 2 * TILE_N * 4;
static_assert(UB_BYTES <= 192 * 1024, "tile does not fit a vector core");

// Events of the vector core: 0 and 1 the tiles coming in, 2 and 3 the scales, 4 channel scale and bias; 0 the tile out.
constexpr int32_t EVENT_SCALES = 2;
constexpr int32_t EVENT_COLUMNS = 4;
constexpr int32_t EVENT_OUT = 0;

class Vector {
public:
    __aicore__ inline void Init(AscendC::TPipe* pipe, const Walk& walk, const Operands& operands, GM_ADDR workspace,
                                uint32_t block, uint32_t side)
    {
        walk_ = walk;
        side_ = side;
        aScale_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(operands.aScale), static_cast<uint64_t>(walk.groups) * walk.m);
        wScale_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(operands.wScale), static_cast<uint64_t>(walk.groups) * walk.n);
        channel_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(operands.channelScale), walk.n);
        bias_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(operands.bias), walk.n);
        d_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(operands.d), static_cast<uint64_t>(walk.m) * walk.n);
        GM_ADDR ring = workspace + static_cast<uint64_t>(block) * GEMM_INT4_WORKSPACE_PER_BLOCK;
        sums_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(ring), SLOTS * SLOT_ELEMENTS);
        products_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(ring), SLOTS * SLOT_ELEMENTS);
        pipe->InitBuffer(ub_, UB_BYTES);
        total_ = ub_.GetWithOffset<float>(HALF_M * TILE_N, UB_TOTAL);
        product_ = ub_.GetWithOffset<float>(HALF_M * TILE_N, UB_PRODUCT);
        out_ = ub_.GetWithOffset<half>(HALF_M * TILE_N, UB_OUT);
        aF32_ = ub_.GetWithOffset<float>(UB_A_SCALE, UB_A_F32);
        aBlocks_ = ub_.GetWithOffset<float>(UB_A_SCALE * F32_PER_BLOCK, UB_A_BLOCKS);
        wF32_ = ub_.GetWithOffset<float>(UB_W_SCALE, UB_W_F32);
        columnsF32_ = ub_.GetWithOffset<float>(2 * TILE_N, UB_COLUMNS_F32);
    }

    __aicore__ inline void Process()
    {
        for (int32_t stage = 0; stage < static_cast<int32_t>(STAGES); ++stage) {
            if constexpr (!mutant::MISSING_FLAG) {
                SetFlag<HardEvent::V_MTE2>(stage);
            }
            SetFlag<HardEvent::V_MTE2>(EVENT_SCALES + stage);
        }
        SetFlag<HardEvent::V_MTE2>(EVENT_COLUMNS);
        SetFlag<HardEvent::MTE3_V>(EVENT_OUT);
        for (uint32_t tile = walk_.first; tile < walk_.tiles; tile += walk_.step) {
            Tile(tile);
        }
        for (int32_t stage = 0; stage < static_cast<int32_t>(STAGES); ++stage) {
            if constexpr (!mutant::MISSING_FLAG) {
                WaitFlag<HardEvent::V_MTE2>(stage);
            }
            WaitFlag<HardEvent::V_MTE2>(EVENT_SCALES + stage);
        }
        WaitFlag<HardEvent::V_MTE2>(EVENT_COLUMNS);
        WaitFlag<HardEvent::MTE3_V>(EVENT_OUT);
    }

private:
    __aicore__ inline void Tile(uint32_t tile)
    {
        const uint32_t upper = Ceil(walk_.Rows(tile), 2);
        above_ = side_ == 0 ? 0 : upper;
        rows_ = side_ == 0 ? upper : walk_.Rows(tile) - upper;
        row_ = walk_.Row(tile) + above_;
        column_ = walk_.Column(tile);
        columns_ = walk_.Columns(tile);
        pitch_ = RoundUp(columns_, FRACTAL_ROWS);
        if (rows_ == 0) {
            for (uint32_t slot = 0; slot < walk_.Slots(); ++slot) {
                AscendC::CrossCoreWaitFlag(FULL);
                AscendC::CrossCoreSetFlag<0x2, PIPE_MTE2>(static_cast<uint16_t>(FREE + taken_ % SLOTS));
                ++taken_;
            }
            return;
        }
        LoadColumns();
        if constexpr (!mutant::TOTAL_NOT_ZEROED) {
            AscendC::Duplicate(total_, 0.0f, static_cast<int32_t>(rows_ * pitch_));
        }
        PipeBarrier<PIPE_V>();
        for (uint32_t group = 0; group < walk_.groups; ++group) {
            if (group % PANEL_GROUPS == 0) {
                LoadScales(group);
            }
            AddGroup(group % PANEL_GROUPS);
        }
        if (walk_.r > 0) {
            AddLora();
        }
        Store();
    }

    // The scales of the next 8 groups: to UB as they lie, to f32, and each a_scale over a block of 8 lanes.
    __aicore__ inline void LoadScales(uint32_t group)
    {
        const uint32_t stage = scaleLoads_++ % STAGES;
        const uint32_t count = Min(PANEL_GROUPS, walk_.groups - group);
        const uint32_t rows = RoundUp(rows_, FRACTAL_ROWS);
        LocalTensor<half> a = ub_.GetWithOffset<half>(UB_A_SCALE, UB_SCALES + stage * UB_SCALES_STAGE);
        LocalTensor<half> w = ub_.GetWithOffset<half>(UB_W_SCALE, UB_SCALES + stage * UB_SCALES_STAGE + UB_A_SCALE * 2);
        WaitFlag<HardEvent::V_MTE2>(EVENT_SCALES + stage);
        CopyScales(a, aScale_, group, count, walk_.m, row_, rows_, rows_);
        CopyScales(w, wScale_, group, count, walk_.n, column_, columns_, mutant::HEAD_ONLY ? C0_HALVES : columns_);
        SetFlag<HardEvent::MTE2_V>(EVENT_SCALES + stage);
        WaitFlag<HardEvent::MTE2_V>(EVENT_SCALES + stage);
        AscendC::Cast(aF32_, a, AscendC::RoundMode::CAST_NONE, count * rows);
        AscendC::Cast(wF32_, w, AscendC::RoundMode::CAST_NONE, count * pitch_);
        SetFlag<HardEvent::V_MTE2>(EVENT_SCALES + stage);
        PipeBarrier<PIPE_V>();
        AscendC::Brcb(aBlocks_, aF32_, static_cast<uint8_t>(count * rows / BRCB_VALUES), {1, BRCB_VALUES});
        PipeBarrier<PIPE_V>();
    }

    // `count` rows of a [groups, extent] array from `group` on, each `length` values from `start`, to rows of the length
    // rounded up to 16 values, zeros after the last; `copied` is the length.
    __aicore__ inline void CopyScales(const LocalTensor<half>& target, const GlobalTensor<half>& source, uint32_t group,
                                      uint32_t count, uint32_t extent, uint32_t start, uint32_t length, uint32_t copied)
    {
        const uint32_t pitch = RoundUp(length, C0_HALVES);
        copied = Min(copied, length);
        AscendC::DataCopyPadExtParams<half> zeros(true, 0, static_cast<uint8_t>(RoundUp(copied, C0_HALVES) - copied),
                                                  static_cast<half>(0));
        if constexpr (mutant::SCALE_K_MAJOR) {
            AscendC::DataCopyExtParams one(1, copied * sizeof(half), 0, 0, 0);
            for (uint32_t index = 0; index < count; ++index) {
                AscendC::DataCopyPad(target[index * pitch], source[start * walk_.groups + group + index], one, zeros);
            }
        } else {
            const uint32_t gap = (pitch - RoundUp(copied, C0_HALVES)) / C0_HALVES;
            AscendC::DataCopyExtParams all(static_cast<uint16_t>(count), copied * sizeof(half), (extent - copied) * sizeof(half),
                                           gap, 0);
            AscendC::DataCopyPad(target, source[static_cast<uint64_t>(group) * extent + start], all, zeros);
        }
    }

    // The vector core's rows of the next slot of the ring, to `target`; the slot is free once they are copied.
    template <typename T>
    __aicore__ inline void Take(const LocalTensor<T>& target, const GlobalTensor<T>& ring)
    {
        const uint32_t stage = taken_ % STAGES;
        AscendC::DataCopyParams rows(1, static_cast<uint16_t>(rows_ * pitch_ / F32_PER_BLOCK), 0, 0);
        if constexpr (!mutant::SLOT_NOT_AWAITED) {
            AscendC::CrossCoreWaitFlag(FULL);
        }
        if constexpr (mutant::MISSING_FLAG) {
            PipeBarrier<PIPE_MTE2>();
        } else {
            WaitFlag<HardEvent::V_MTE2>(stage);
        }
        AscendC::DataCopy(target, ring[taken_ % SLOTS * SLOT_ELEMENTS + above_ * pitch_], rows);
        if constexpr (mutant::SLOT_NOT_AWAITED) {
            AscendC::CrossCoreWaitFlag(FULL);
        }
        AscendC::CrossCoreSetFlag<0x2, PIPE_MTE2>(static_cast<uint16_t>(FREE + taken_ % SLOTS));
        SetFlag<HardEvent::MTE2_V>(stage);
        WaitFlag<HardEvent::MTE2_V>(stage);
    }

    // The vector unit has read what Take brought: its buffer may be filled again.
    __aicore__ inline void Release()
    {
        if constexpr (!mutant::MISSING_FLAG) {
            SetFlag<HardEvent::V_MTE2>(taken_ % STAGES);
        }
        ++taken_;
    }

    template <typename T>
    __aicore__ inline LocalTensor<T> Incoming()
    {
        return ub_.GetWithOffset<T>(HALF_M * TILE_N, UB_IN + taken_ % STAGES * UB_TILE);
    }

    __aicore__ inline void AddGroup(uint32_t index)
    {
        const int32_t elements = static_cast<int32_t>(rows_ * pitch_);
        const LocalTensor<int32_t> sums = Incoming<int32_t>();
        Take(sums, sums_);
        AscendC::Cast(product_, sums, AscendC::RoundMode::CAST_RINT, static_cast<uint32_t>(elements));
        Release();
        PipeBarrier<PIPE_V>();
        MulRows(aBlocks_[index * RoundUp(rows_, FRACTAL_ROWS) * F32_PER_BLOCK]);
        PipeBarrier<PIPE_V>();
        MulColumns(wF32_[index * pitch_]);
        PipeBarrier<PIPE_V>();
        AscendC::Add(total_, total_, product_, elements);
        PipeBarrier<PIPE_V>();
    }

    // product[i, :] *= blocks[i], one block of equal lanes per row: the factor's block is not advanced within a row.
    __aicore__ inline void MulRows(const LocalTensor<float>& blocks)
    {
        const uint8_t step = static_cast<uint8_t>(pitch_ / F32_PER_BLOCK);
        const AscendC::BinaryRepeatParams params(1, 1, 0, step, step, 1);
        for (uint32_t start = 0; start < pitch_; start += LANES) {
            const uint64_t mask = Min(LANES, pitch_ - start);
            AscendC::Mul(product_[start], product_[start], blocks, mask, static_cast<uint8_t>(rows_), params);
        }
    }

    // product[:, j] *= row[j]: the factor is not advanced from row to row.
    __aicore__ inline void MulColumns(const LocalTensor<float>& row)
    {
        const AscendC::BinaryRepeatParams params = RowParams();
        for (uint32_t start = 0; start < pitch_; start += LANES) {
            if constexpr (mutant::STALE_MASK) {
                AscendC::Mul<float, false>(product_[start], product_[start], row[start], AscendC::MASK_PLACEHOLDER,
                                           static_cast<uint8_t>(rows_), params);
            } else {
                const uint64_t mask = Min(LANES, pitch_ - start);
                AscendC::Mul(product_[start], product_[start], row[start], mask, static_cast<uint8_t>(rows_), params);
            }
        }
    }

    __aicore__ inline AscendC::BinaryRepeatParams RowParams() const
    {
        const uint8_t step = static_cast<uint8_t>(pitch_ / F32_PER_BLOCK);
        return AscendC::BinaryRepeatParams(1, 1, 1, step, step, 0);
    }

    __aicore__ inline void AddLora()
    {
        const LocalTensor<float> lora = mutant::LORA_COLLISION ? total_ : Incoming<float>();
        Take(lora, products_);
        AscendC::Add(total_, total_, lora, static_cast<int32_t>(rows_ * pitch_));
        Release();
        PipeBarrier<PIPE_V>();
    }

    // Channel scale and bias of the tile's columns to f32, channel scale first; waits for nothing that is not there.
    __aicore__ inline void LoadColumns()
    {
        if (!walk_.scaled && !walk_.biased) {
            return;
        }
        LocalTensor<half> staged = ub_.GetWithOffset<half>(2 * TILE_N, UB_COLUMNS);
        AscendC::DataCopyExtParams one(1, columns_ * sizeof(half), 0, 0, 0);
        AscendC::DataCopyPadExtParams<half> zeros(true, 0, static_cast<uint8_t>(pitch_ - columns_), static_cast<half>(0));
        WaitFlag<HardEvent::V_MTE2>(EVENT_COLUMNS);
        if (walk_.scaled) {
            AscendC::DataCopyPad(staged, channel_[column_], one, zeros);
        }
        if (walk_.biased) {
            AscendC::DataCopyPad(staged[TILE_N], bias_[column_], one, zeros);
        }
        SetFlag<HardEvent::MTE2_V>(EVENT_COLUMNS);
        WaitFlag<HardEvent::MTE2_V>(EVENT_COLUMNS);
        if (walk_.scaled) {
            AscendC::Cast(columnsF32_, staged, AscendC::RoundMode::CAST_NONE, pitch_);
        }
        if (walk_.biased) {
            AscendC::Cast(columnsF32_[TILE_N], staged[TILE_N], AscendC::RoundMode::CAST_NONE, pitch_);
        }
        SetFlag<HardEvent::V_MTE2>(EVENT_COLUMNS);
    }

    // Channel scale, bias, the one cast, and the valid rows and columns to d.
    __aicore__ inline void Store()
    {
        const AscendC::BinaryRepeatParams params = RowParams();
        const uint8_t rows = static_cast<uint8_t>(rows_);
        if (walk_.scaled) {
            for (uint32_t start = 0; start < pitch_; start += LANES) {
                const uint64_t mask = Min(LANES, pitch_ - start);
                AscendC::Mul(total_[start], total_[start], columnsF32_[start], mask, rows, params);
            }
            PipeBarrier<PIPE_V>();
        }
        if (walk_.biased) {
            for (uint32_t start = 0; start < pitch_; start += LANES) {
                const uint64_t mask = Min(LANES, pitch_ - start);
                AscendC::Add(total_[start], total_[start], columnsF32_[TILE_N + start], mask, rows, params);
            }
            PipeBarrier<PIPE_V>();
        }
        WaitFlag<HardEvent::MTE3_V>(EVENT_OUT);
        AscendC::Cast(out_, total_, AscendC::RoundMode::CAST_RINT, rows_ * pitch_);
        SetFlag<HardEvent::V_MTE3>(EVENT_OUT);
        WaitFlag<HardEvent::V_MTE3>(EVENT_OUT);
        AscendC::DataCopyExtParams all(static_cast<uint16_t>(rows_), columns_ * sizeof(half), 0,
                                       (walk_.n - columns_) * sizeof(half), 0);
        AscendC::DataCopyPad(d_[static_cast<uint64_t>(row_) * walk_.n + column_], out_, all);
        SetFlag<HardEvent::MTE3_V>(EVENT_OUT);
        PipeBarrier<PIPE_V>();
    }

    Walk walk_;
    uint32_t side_ = 0;
    GlobalTensor<half> aScale_;
    GlobalTensor<half> wScale_;
    GlobalTensor<half> channel_;
    GlobalTensor<half> bias_;
    GlobalTensor<half> d_;
    GlobalTensor<int32_t> sums_;
    GlobalTensor<float> products_;
    TBuf<TPosition::VECCALC> ub_;
    LocalTensor<float> total_;
    LocalTensor<float> product_;
    LocalTensor<half> out_;
    LocalTensor<float> aF32_;
    LocalTensor<float> aBlocks_;
    LocalTensor<float> wF32_;
    LocalTensor<float> columnsF32_;
    uint32_t above_ = 0;
    uint32_t rows_ = 0;
    uint32_t row_ = 0;
    uint32_t column_ = 0;
    uint32_t columns_ = 0;
    uint32_t pitch_ = 0;
    uint32_t taken_ = 0;
    uint32_t scaleLoads_ = 0;
};

}  // namespace

extern "C" __global__ __aicore__ void gemm_int4(GM_ADDR a, GM_ADDR w, GM_ADDR aScale, GM_ADDR wScale, GM_ADDR loraAct,
                                                GM_ADDR loraUp, GM_ADDR channelScale, GM_ADDR bias, GM_ADDR d,
                                                GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
    AscendC::TPipe pipe;
    const Operands operands = {a, w, aScale, wScale, loraAct, loraUp, channelScale, bias, d};
    Walk walk;
    if ASCEND_IS_AIC {
        const uint32_t block = static_cast<uint32_t>(AscendC::GetBlockIdx());
        walk.Init(reinterpret_cast<__gm__ GemmInt4Tiling*>(tiling), block, static_cast<uint32_t>(AscendC::GetBlockNum()));
        Cube cube;
        cube.Init(&pipe, walk, operands, workspace, block);
        cube.Process();
    }
    if ASCEND_IS_AIV {
        const uint32_t block = static_cast<uint32_t>(AscendC::GetBlockIdx() / AscendC::GetSubBlockNum());
        walk.Init(reinterpret_cast<__gm__ GemmInt4Tiling*>(tiling), block, static_cast<uint32_t>(AscendC::GetBlockNum()));
        Vector vector;
        vector.Init(&pipe, walk, operands, workspace, block, static_cast<uint32_t>(AscendC::GetSubBlockIdx()));
        vector.Process();
    }
}
