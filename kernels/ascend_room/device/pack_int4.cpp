// pack_int4: codes, one per byte, to two per byte: code 2i in bits 0 to 3 of byte i, code 2i + 1 in bits 4 to 7 (ENC-5); of
// sign-extended codes the low four bits (ENC-7). With `offset` codes are stored as value + 8 (ENC-6). Vector cores only.
//
// codes [count] bytes, packed [count / 2] bytes. A pair of codes is one little-endian 16-bit word to the vector unit.
//
// convert_b8: packed codes change between value + 8 and two's complement in place (ENC-9): bit 3 of each of `count` codes.
#include "kernel_operator.h"
#include "quantize_tiling.h"

namespace {

constexpr uint32_t CODES = 16384;  // per item
constexpr uint32_t PAIRS = CODES / 2;

// word ^= bits for `words` words: what is set lies in (word and bits), and (word or bits) less that is the rest.
__aicore__ inline void Invert(AscendC::LocalTensor<uint16_t>& word, AscendC::LocalTensor<uint16_t>& set,
                              AscendC::LocalTensor<uint16_t>& mask, uint16_t bits, uint32_t words)
{
    AscendC::Duplicate<uint16_t>(mask, bits, words);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::And(set, word, mask, int32_t(words));
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Or(word, word, mask, int32_t(words));
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::LocalTensor<int16_t> result = word.ReinterpretCast<int16_t>();
    AscendC::Sub(result, result, set.ReinterpretCast<int16_t>(), int32_t(words));
    AscendC::PipeBarrier<PIPE_V>();
}

class PackInt4 {
public:
    __aicore__ inline PackInt4(GM_ADDR codes, GM_ADDR packed, const PackTiling& tiling, AscendC::TPipe* pipe) : tiling_(tiling)
    {
        codes_.SetGlobalBuffer((__gm__ uint8_t*)codes);
        packed_.SetGlobalBuffer((__gm__ uint8_t*)packed);
        pipe->InitBuffer(inQueue_, 2, CODES);
        pipe->InitBuffer(outQueue_, 2, PAIRS);
        pipe->InitBuffer(highBuffer_, PAIRS * sizeof(uint16_t));
        pipe->InitBuffer(maskBuffer_, PAIRS * sizeof(uint16_t));
    }

    __aicore__ inline void Process()
    {
        const uint32_t items = (tiling_.count + CODES - 1) / CODES;
        for (uint32_t item = AscendC::GetBlockIdx(); item < items; item += AscendC::GetBlockNum()) {
            const uint32_t at = item * CODES;
            Pack(at, (tiling_.count - at < CODES ? tiling_.count - at : CODES) / 2);
        }
    }

private:
    __aicore__ inline void Pack(uint32_t at, uint32_t pairs)
    {
        AscendC::LocalTensor<uint8_t> codes = inQueue_.AllocTensor<uint8_t>();
        const AscendC::DataCopyExtParams in(1, 2 * pairs, 0, 0, 0);
        const AscendC::DataCopyPadExtParams<uint8_t> nothing(false, 0, 0, 0);
        AscendC::DataCopyPad(codes, codes_[at], in, nothing);
        inQueue_.EnQue(codes);
        codes = inQueue_.DeQue<uint8_t>();
        AscendC::LocalTensor<uint16_t> pair = codes.ReinterpretCast<uint16_t>();
        AscendC::LocalTensor<uint16_t> high = highBuffer_.Get<uint16_t>();
        AscendC::LocalTensor<uint16_t> mask = maskBuffer_.Get<uint16_t>();
        AscendC::ShiftRight(high, pair, uint16_t(4), int32_t(pairs));
        AscendC::Duplicate<uint16_t>(mask, 0x000F, pairs);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::And(pair, pair, mask, int32_t(pairs));
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Duplicate<uint16_t>(mask, 0x00F0, pairs);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::And(high, high, mask, int32_t(pairs));
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::Or(pair, pair, high, int32_t(pairs));
        AscendC::PipeBarrier<PIPE_V>();
        if (tiling_.offset != 0) {
            Invert(pair, high, mask, 0x0088, pairs);
        }
        // 0 to 255 is exact in binary16; there is no direct narrowing to eight bits
        AscendC::LocalTensor<half> number = highBuffer_.Get<half>();
        AscendC::Cast(number, pair.ReinterpretCast<int16_t>(), AscendC::RoundMode::CAST_NONE, pairs);
        AscendC::PipeBarrier<PIPE_V>();
        inQueue_.FreeTensor(codes);
        AscendC::LocalTensor<uint8_t> packed = outQueue_.AllocTensor<uint8_t>();
        AscendC::Cast(packed, number, AscendC::RoundMode::CAST_NONE, pairs);
        outQueue_.EnQue(packed);
        packed = outQueue_.DeQue<uint8_t>();
        const AscendC::DataCopyExtParams out(1, pairs, 0, 0, 0);
        AscendC::DataCopyPad(packed_[at / 2], packed, out);
        outQueue_.FreeTensor(packed);
    }

    const PackTiling tiling_;
    AscendC::GlobalTensor<uint8_t> codes_, packed_;
    AscendC::TQue<AscendC::TPosition::VECIN, 2> inQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, 2> outQueue_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> highBuffer_, maskBuffer_;
};

class ConvertB8 {
public:
    __aicore__ inline ConvertB8(GM_ADDR words, const PackTiling& tiling, AscendC::TPipe* pipe) : tiling_(tiling)
    {
        words_.SetGlobalBuffer((__gm__ uint16_t*)words);
        pipe->InitBuffer(inQueue_, 2, PAIRS * sizeof(uint16_t));
        pipe->InitBuffer(outQueue_, 2, PAIRS * sizeof(uint16_t));
        pipe->InitBuffer(setBuffer_, PAIRS * sizeof(uint16_t));
        pipe->InitBuffer(maskBuffer_, PAIRS * sizeof(uint16_t));
    }

    __aicore__ inline void Process()
    {
        const uint32_t words = tiling_.count / 4;
        const uint32_t step = AscendC::GetBlockNum() * PAIRS;
        for (uint32_t at = AscendC::GetBlockIdx() * PAIRS; at < words; at += step) {
            Convert(at, words - at < PAIRS ? words - at : PAIRS);
        }
    }

private:
    __aicore__ inline void Convert(uint32_t at, uint32_t words)
    {
        const AscendC::DataCopyExtParams run(1, uint32_t(words * sizeof(uint16_t)), 0, 0, 0);
        const AscendC::DataCopyPadExtParams<uint16_t> nothing(false, 0, 0, 0);
        AscendC::LocalTensor<uint16_t> in = inQueue_.AllocTensor<uint16_t>();
        AscendC::DataCopyPad(in, words_[at], run, nothing);
        inQueue_.EnQue(in);
        in = inQueue_.DeQue<uint16_t>();
        AscendC::LocalTensor<uint16_t> set = setBuffer_.Get<uint16_t>();
        AscendC::LocalTensor<uint16_t> mask = maskBuffer_.Get<uint16_t>();
        Invert(in, set, mask, 0x8888, words);
        AscendC::LocalTensor<uint16_t> out = outQueue_.AllocTensor<uint16_t>();
        AscendC::Or(out, in, in, int32_t(words));
        outQueue_.EnQue(out);
        inQueue_.FreeTensor(in);
        out = outQueue_.DeQue<uint16_t>();
        AscendC::DataCopyPad(words_[at], out, run);
        outQueue_.FreeTensor(out);
    }

    const PackTiling tiling_;
    AscendC::GlobalTensor<uint16_t> words_;
    AscendC::TQue<AscendC::TPosition::VECIN, 2> inQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, 2> outQueue_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> setBuffer_, maskBuffer_;
};

}  // namespace

extern "C" __global__ __aicore__ void pack_int4(GM_ADDR codes, GM_ADDR packed, GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    const __gm__ PackTiling* given = (const __gm__ PackTiling*)tiling;
    const PackTiling sizes = {given->count, given->offset};
    AscendC::TPipe pipe;
    PackInt4(codes, packed, sizes, &pipe).Process();
}

extern "C" __global__ __aicore__ void convert_b8(GM_ADDR words, GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    const __gm__ PackTiling* given = (const __gm__ PackTiling*)tiling;
    const PackTiling sizes = {given->count, given->offset};
    AscendC::TPipe pipe;
    ConvertB8(words, sizes, &pipe).Process();
}
