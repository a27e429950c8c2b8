// The vector unit (pipe V): masks, elementwise instructions, casts, reduction and broadcast over UB.
//
// An instruction handles 256 bytes of its widest operand per repeat, in 8 data blocks of 32 bytes; strides are in data blocks.
#pragma once

#include <cmath>

#include "copy.h"

namespace AscendC {

enum class RoundMode : uint8_t { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };
enum class MaskMode : uint8_t { NORMAL, COUNTER };
enum class ReduceOrder : uint8_t { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };

constexpr uint64_t MASK_PLACEHOLDER = 0;

struct BinaryRepeatParams {
    BinaryRepeatParams() = default;
    BinaryRepeatParams(lowbit::Bits<8> dstBlk, lowbit::Bits<8> src0Blk, lowbit::Bits<8> src1Blk, lowbit::Bits<8> dstRep,
                       lowbit::Bits<8> src0Rep, lowbit::Bits<8> src1Rep)
        : dstBlkStride(dstBlk),
          src0BlkStride(src0Blk),
          src1BlkStride(src1Blk),
          dstRepStride(dstRep),
          src0RepStride(src0Rep),
          src1RepStride(src1Rep) {}

    lowbit::Bits<8> dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1, dstRepStride = 8, src0RepStride = 8,
                    src1RepStride = 8;
};

struct BrcbRepeatParams {
    BrcbRepeatParams() = default;
    BrcbRepeatParams(lowbit::Bits<16> block, lowbit::Bits<16> repeat) : dstBlkStride(block), dstRepStride(repeat) {}

    lowbit::Bits<16> dstBlkStride = 1, dstRepStride = 8;
};

}  // namespace AscendC

namespace lowbit {

using AscendC::LocalTensor;
using AscendC::RoundMode;

constexpr uint32_t REPEAT = 256;  // bytes
constexpr uint32_t OPERANDS = 3;

// Elements next to each other in every operand: at[0] in the destination, at[1] and at[2] in the sources.
struct Run {
    uint32_t at[OPERANDS];
    uint32_t count;
};

struct Lanes {
    const Span* span;
    uint32_t bits;
    uint32_t block = 1, repeat = 8;  // strides in data blocks
};

// ---- masks

// The bits of the first `count` lanes.
inline MaskRegister FirstLanes(uint64_t count) {
    MaskRegister mask;
    mask.low = count >= 64 ? ~0ull : (1ull << count) - 1;
    mask.high = count >= 128 ? ~0ull : count > 64 ? (1ull << (count - 64)) - 1 : 0;
    return mask;
}

// The register an instruction with a mask argument runs under; it leaves the register as it set it.
inline const MaskRegister& SetMask(uint64_t count, uint32_t lanes, const char* name) {
    MaskRegister& mask = self->mask;
    if (mask.counter) {
        mask.low = count;
        mask.owned = false;
        return mask;
    }
    if (count == 0 || count > lanes)
        Fail("MASK-RANGE", "got mask ", count, " for ", name, ", expected 1 to ", lanes, " elements");
    mask = FirstLanes(count);
    return mask;
}

// The register as the kernel left it, for an instruction that sets none.
inline const MaskRegister& KeptMask(const char* name) {
    if (!self->mask.owned) {
        Fail("MASK-STALE", "got ", name, " without a mask of its own under a mask register the last instruction left, expected ",
             "SetVectorMask after any instruction that sets the mask");
    }
    return self->mask;
}

// ---- runs

// One run of `count` elements from the start of every operand.
inline std::vector<Run> Contiguous(const Lanes* operands, uint32_t number, int64_t count, const char* name) {
    if (count < 1 || count > 2 * int64_t{UB_BYTES})
        Fail("PARAM-RANGE", "got count ", count, " of ", name, ", expected 1 to what UB holds");
    Run run{{0, 0, 0}, static_cast<uint32_t>(count)};
    for (uint32_t i = 0; i < number; ++i) {
        if (run.count * operands[i].bits % 8 != 0)
            Fail("ALIGN", "got ", count, " int4 elements of ", name, ", expected an even number");
        run.at[i] = Inside(*operands[i].span, 0, uint64_t{run.count} * operands[i].bits / 8, name);
    }
    return {run};
}

// The active lanes of every repeat, neighbours joined.
inline std::vector<Run> Strided(const Lanes* operands, uint32_t number, uint64_t repeats, const MaskRegister& mask,
                                const char* name) {
    uint32_t widest = 0;
    for (uint32_t i = 0; i < number; ++i) widest = std::max(widest, operands[i].bits);
    const uint32_t perBlock = BLOCK * 8 / widest, perRepeat = 8 * perBlock;
    const uint64_t total = mask.counter ? mask.low : repeats * perRepeat;
    std::vector<Run> runs;
    std::vector<bool> written(UB_BYTES / BLOCK);
    const auto active = [&](uint64_t repeat, uint32_t lane) {
        if (mask.counter) return repeat * perRepeat + lane < total;
        return ((lane < 64 ? mask.low >> lane : mask.high >> (lane - 64)) & 1) != 0;
    };
    const auto add = [&](uint64_t repeat, uint32_t lane, uint32_t count) {
        Run run{{0, 0, 0}, count};
        for (uint32_t i = 0; i < number; ++i) {
            const Lanes& operand = operands[i];
            const uint32_t inBlock = BLOCK * 8 / operand.bits;
            const uint64_t place =
                (repeat * operand.repeat + lane / inBlock * operand.block) * BLOCK + lane % inBlock * operand.bits / 8;
            run.at[i] = Inside(*operand.span, static_cast<int64_t>(place), count * operand.bits / 8, name);
        }
        bool joins = !runs.empty();
        for (uint32_t i = 0; joins && i < number; ++i)
            joins = runs.back().at[i] + runs.back().count * operands[i].bits / 8 == run.at[i];
        if (joins) {
            runs.back().count += count;
        } else {
            runs.push_back(run);
        }
        return run.at[0] / BLOCK;
    };
    for (uint64_t r = 0; r * perRepeat < total; ++r) {
        for (uint32_t first = 0; first < perRepeat; first += perBlock) {
            uint32_t wanted = 0, block = 0;
            for (uint32_t lane = first; lane < first + perBlock; ++lane) wanted += active(r, lane);
            if (wanted == 0) continue;
            if (wanted == perBlock) {
                block = add(r, first, perBlock);
            } else {
                for (uint32_t lane = first; lane < first + perBlock; ++lane) {
                    if (active(r, lane)) block = add(r, lane, 1);
                }
            }
            if (written[block]) {
                Fail("VECTOR-OVERLAP", "got ", name, " writing the data block at UB byte ", block * BLOCK,
                     " twice, expected strides that keep the blocks of the destination apart");
            }
            written[block] = true;
        }
    }
    return runs;
}

// A destination may be a source, element for element, or have no byte in common with it.
inline void RequireApart(const std::vector<Run>& runs, const Lanes* operands, uint32_t source, const char* name) {
    bool same = operands[source].bits == operands[0].bits;
    uint32_t low[2] = {~0u, ~0u}, high[2] = {0, 0};
    for (const Run& run : runs) {
        same = same && run.at[0] == run.at[source];
        for (uint32_t side = 0; side < 2; ++side) {
            const uint32_t i = side == 0 ? 0 : source;
            low[side] = std::min(low[side], run.at[i]);
            high[side] = std::max(high[side], run.at[i] + run.count * operands[i].bits / 8);
        }
    }
    if (same || high[0] <= low[1] || high[1] <= low[0]) return;
    std::vector<bool> taken(UB_BYTES / BLOCK);
    for (const Run& run : runs) {
        for (uint32_t b = run.at[0] / BLOCK; b <= (run.at[0] + run.count * operands[0].bits / 8 - 1) / BLOCK; ++b)
            taken[b] = true;
    }
    for (const Run& run : runs) {
        for (uint32_t b = run.at[source] / BLOCK; b <= (run.at[source] + run.count * operands[source].bits / 8 - 1) / BLOCK;
             ++b) {
            if (taken[b]) {
                Fail("VECTOR-OVERLAP", "got ", name, " with a source and the destination sharing UB byte ", b * BLOCK,
                     ", expected the same elements or none in common");
            }
        }
    }
}

inline void RequireOperands(const Lanes* operands, uint32_t number, const char* name) {
    static const char* const names[OPERANDS] = {"dst", "src0", "src1"};
    for (uint32_t i = 0; i < number; ++i) {
        RequireMemory(*operands[i].span, "UB", name, names[i]);
        RequireAlignment(*operands[i].span, BLOCK, name, names[i]);
    }
}

// Runs `apply(destination bytes, source bytes, source bytes, count)` over checked memory.
template <class Apply>
void Execute(const std::vector<Run>& runs, const Lanes* operands, uint32_t number, const char* name, Apply apply) {
    for (uint32_t i = 1; i < number; ++i) RequireApart(runs, operands, i, name);
    Access access = Begin(PIPE_V, name);
    Memory& ub = *operands[0].span->memory;
    for (const Run& run : runs) {
        const uint8_t* sources[OPERANDS] = {};
        for (uint32_t i = 1; i < number; ++i) sources[i] = ReadLocal(ub, run.at[i], run.count * operands[i].bits / 8, access);
        apply(WriteLocal(ub, run.at[0], run.count * operands[0].bits / 8, access, false), sources[1], sources[2], run.count);
    }
}

// ---- numbers

template <class T>
constexpr bool ARITHMETIC =
    std::is_same_v<T, half> || std::is_same_v<T, float> || std::is_same_v<T, int16_t> || std::is_same_v<T, int32_t>;
template <class T>
constexpr bool FLOATING = std::is_same_v<T, half> || std::is_same_v<T, float>;

template <class T>
[[noreturn]] void RefuseType(const char* name) {
    Fail("VECTOR-TYPES", "got ", name, " on ", TypeName<T>(), ", expected a type the instruction has on Atlas A2");
}

// A sum, difference or product, floats rounded once to nearest even (a half result is exact in float before that).
template <class T, class Operation>
T Compute(T left, T right, const char* name, Operation operation) {
    if constexpr (std::is_integral_v<T>)
        return Exact<T>(operation(int64_t{left}, int64_t{right}), name);
    else
        return T(operation(static_cast<float>(left), static_cast<float>(right)));
}

// The larger or the smaller; NaN when either is.
template <class T>
T Extreme(T left, T right, bool larger) {
    if constexpr (FLOATING<T>) {
        if (std::isnan(static_cast<float>(left))) return left;
        if (std::isnan(static_cast<float>(right))) return right;
    }
    return (larger ? left < right : right < left) ? right : left;
}

// IEEE quotient, rounded once to nearest even.
template <class T>
T Quotient(T left, T right) {
    return T(static_cast<float>(left) / static_cast<float>(right));
}

// Bits that both have, or that either has; floats have no such instruction and never come here.
template <class T>
T Bitwise(T left, T right, bool both) {
    if constexpr (std::is_integral_v<T>)
        return static_cast<T>(both ? left & right : left | right);
    else
        return left;
}

// Towards lower bits, signed types by arithmetic shift; the amount is 0 to the width of the type.
template <class T>
T Shifted(T value, T amount) {
    constexpr int32_t width = 8 * sizeof(T);
    if (amount < 0 || static_cast<int64_t>(amount) > width)
        Fail("PARAM-RANGE", "got a shift by ", amount, ", expected 0 to ", width);
    return static_cast<T>(static_cast<int64_t>(value) >> static_cast<int32_t>(amount));
}

template <class T, class F>
void Map1(uint8_t* to, const uint8_t* from, uint32_t count, F f) {
    for (uint32_t i = 0; i < count; ++i) Store<T>(to + i * sizeof(T), f(Load<T>(from + i * sizeof(T))));
}

template <class T, class F>
void Map2(uint8_t* to, const uint8_t* left, const uint8_t* right, uint32_t count, F f) {
    for (uint32_t i = 0; i < count; ++i)
        Store<T>(to + i * sizeof(T), f(Load<T>(left + i * sizeof(T)), Load<T>(right + i * sizeof(T))));
}

// dst = f(src0, src1) over `count` elements; afterwards the mask is full again.
template <bool allowed, class T, class F>
void BinaryCount(const char* name, const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                 int64_t count, F f) {
    if constexpr (!allowed)
        RefuseType<T>(name);
    else {
        const Lanes operands[] = {{&dst.span, BITS<T>}, {&src0.span, BITS<T>}, {&src1.span, BITS<T>}};
        RequireOperands(operands, 3, name);
        const std::vector<Run> runs = Contiguous(operands, 3, count, name);
        Execute(runs, operands, 3, name,
                [&](uint8_t* to, const uint8_t* left, const uint8_t* right, uint32_t n) { Map2<T>(to, left, right, n, f); });
        FullMask();
    }
}

template <bool allowed, bool isSetMask, class T, class F>
void BinaryStrided(const char* name, const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                   uint64_t mask, uint64_t repeats, const AscendC::BinaryRepeatParams& p, F f) {
    if constexpr (!allowed)
        RefuseType<T>(name);
    else {
        const auto lanes = [](const LocalTensor<T>& tensor, uint64_t block, uint64_t repeat) {
            return Lanes{&tensor.span, BITS<T>, static_cast<uint32_t>(block), static_cast<uint32_t>(repeat)};
        };
        const Lanes operands[] = {lanes(dst, p.dstBlkStride, p.dstRepStride), lanes(src0, p.src0BlkStride, p.src0RepStride),
                                  lanes(src1, p.src1BlkStride, p.src1RepStride)};
        RequireOperands(operands, 3, name);
        RequireRange(repeats, 1, 255, "repeatTime", name);
        const MaskRegister kept = isSetMask ? SetMask(mask, REPEAT / sizeof(T), name) : KeptMask(name);
        const std::vector<Run> runs = Strided(operands, 3, repeats, kept, name);
        Execute(runs, operands, 3, name,
                [&](uint8_t* to, const uint8_t* left, const uint8_t* right, uint32_t n) { Map2<T>(to, left, right, n, f); });
    }
}

template <bool allowed, class T, class F>
void ScalarCount(const char* name, const LocalTensor<T>& dst, const LocalTensor<T>& src, int64_t count, F f) {
    if constexpr (!allowed)
        RefuseType<T>(name);
    else {
        const Lanes operands[] = {{&dst.span, BITS<T>}, {&src.span, BITS<T>}};
        RequireOperands(operands, 2, name);
        const std::vector<Run> runs = Contiguous(operands, 2, count, name);
        Execute(runs, operands, 2, name,
                [&](uint8_t* to, const uint8_t* from, const uint8_t*, uint32_t n) { Map1<T>(to, from, n, f); });
        FullMask();
    }
}

// ---- casts

constexpr uint32_t Modes(std::initializer_list<RoundMode> modes) {
    uint32_t set = 0;
    for (RoundMode mode : modes) set |= 1u << static_cast<uint32_t>(mode);
    return set;
}

constexpr uint32_t KEEPS = Modes({RoundMode::CAST_NONE});
constexpr uint32_t ROUNDS =
    Modes({RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC});

// The modes Atlas A2 has for a pair of types that the kernels use, 0: none.
template <class To, class From>
constexpr uint32_t CAST_MODES =
    std::is_same_v<From, half> && std::is_same_v<To, float>         ? KEEPS
    : std::is_same_v<From, bfloat16_t> && std::is_same_v<To, float> ? KEEPS
    : std::is_same_v<From, half> && std::is_same_v<To, int4b_t>     ? ROUNDS | KEEPS
    : std::is_same_v<From, half> && std::is_same_v<To, uint8_t>     ? ROUNDS | KEEPS
    : std::is_same_v<From, half> && std::is_same_v<To, int16_t>     ? ROUNDS
    : std::is_same_v<From, half> && std::is_same_v<To, int32_t>     ? ROUNDS
    : std::is_same_v<From, float> && std::is_same_v<To, float>      ? ROUNDS
    : std::is_same_v<From, float> && std::is_same_v<To, half>       ? ROUNDS | KEEPS | Modes({RoundMode::CAST_ODD})
    : std::is_same_v<From, float> && std::is_same_v<To, int32_t>    ? ROUNDS
    : std::is_same_v<From, float> && std::is_same_v<To, int16_t>    ? ROUNDS
    : std::is_same_v<From, int16_t> && std::is_same_v<To, half>     ? ROUNDS | KEEPS
    : std::is_same_v<From, uint8_t> && std::is_same_v<To, half>     ? KEEPS
    : std::is_same_v<From, int32_t> && std::is_same_v<To, float>    ? KEEPS | Modes({RoundMode::CAST_RINT})
                                                                    : 0u;

// A rounded float as an integer between `low` and `high`; beyond them the nearer one, NaN gives 0.
inline int32_t Saturate(float value, int64_t low, int64_t high) {
    if (std::isnan(value)) return 0;
    if (value <= static_cast<float>(low)) return static_cast<int32_t>(low);
    if (value >= static_cast<float>(high)) return static_cast<int32_t>(high);
    return static_cast<int32_t>(value);
}

template <class To, class From>
To Convert(From value, Rounding mode) {
    if constexpr (std::is_same_v<To, half> || std::is_same_v<To, float>) {
        const float wide = static_cast<float>(value);
        if constexpr (std::is_same_v<To, half>)
            return half::FromBits(HalfFromFloat(wide, mode));
        else if constexpr (std::is_same_v<From, float>)
            return RoundToInteger(wide, mode);
        else
            return wide;
    } else {
        using Limits = std::numeric_limits<To>;
        return static_cast<To>(Saturate(RoundToInteger(static_cast<float>(value), mode), Limits::min(), Limits::max()));
    }
}

template <class To, class From>
void CastRun(uint8_t* to, const uint8_t* from, uint32_t count, Rounding mode) {
    if constexpr (std::is_same_v<To, int4b_t>) {
        for (uint32_t i = 0; i < count; i += 2) {
            uint32_t pair = 0;
            for (uint32_t k = 0; k < 2; ++k) {
                const float value = static_cast<float>(Load<From>(from + (i + k) * sizeof(From)));
                pair |= (static_cast<uint32_t>(Saturate(RoundToInteger(value, mode), -8, 7)) & 15u) << (4 * k);
            }
            to[i / 2] = static_cast<uint8_t>(pair);
        }
    } else {
        for (uint32_t i = 0; i < count; ++i)
            Store(to + i * sizeof(To), Convert<To, From>(Load<From>(from + i * sizeof(From)), mode));
    }
}

}  // namespace lowbit

namespace AscendC {

inline void SetMaskCount() {
    lowbit::self->mask.counter = true;
    lowbit::self->mask.owned = true;
}

inline void SetMaskNorm() { lowbit::self->mask.counter = false; }

inline void ResetMask() {
    const bool counter = lowbit::self->mask.counter;
    lowbit::FullMask();
    lowbit::self->mask.counter = counter;
}

template <class T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(uint64_t high, uint64_t low) {
    lowbit::MaskRegister& mask = lowbit::self->mask;
    mask.high = high;
    mask.low = low;
    mask.owned = true;
}

// `length`: the first elements of every repeat, or in counter mode the elements altogether.
template <class T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(int32_t length) {
    if (mode == MaskMode::COUNTER) {
        SetVectorMask<T, mode>(0, static_cast<uint64_t>(length));
        return;
    }
    const uint64_t lanes = lowbit::REPEAT / sizeof(T);
    if (length < 1 || static_cast<uint64_t>(length) > lanes) {
        lowbit::Fail("MASK-RANGE", "got mask ", length, " for SetVectorMask, expected 1 to ", lanes, " elements");
    }
    const lowbit::MaskRegister first = lowbit::FirstLanes(static_cast<uint64_t>(length));
    SetVectorMask<T, mode>(first.high, first.low);
}

#define LOWBIT_BINARY(NAME, ALLOWED, F)                                                                           \
    template <class T>                                                                                            \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, int32_t count) { \
        lowbit::BinaryCount<ALLOWED>(#NAME, dst, src0, src1, count, F);                                           \
    }                                                                                                             \
    template <class T, bool isSetMask = true>                                                                     \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask,   \
              lowbit::Bits<8> repeatTime, const BinaryRepeatParams& repeatParams) {                               \
        lowbit::BinaryStrided<ALLOWED, isSetMask>(#NAME, dst, src0, src1, mask, repeatTime, repeatParams, F);     \
    }

#define LOWBIT_SCALAR(NAME, ALLOWED, F)                                                                                 \
    template <class T>                                                                                                  \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, std::common_type_t<T> scalarValue, int32_t count) { \
        lowbit::ScalarCount<ALLOWED>(#NAME, dst, src, count, F);                                                        \
    }

LOWBIT_BINARY(Add, lowbit::ARITHMETIC<T>,
              [](T a, T b) { return lowbit::Compute(a, b, "Add", [](auto x, auto y) { return x + y; }); })
LOWBIT_BINARY(Sub, lowbit::ARITHMETIC<T>,
              [](T a, T b) { return lowbit::Compute(a, b, "Sub", [](auto x, auto y) { return x - y; }); })
LOWBIT_BINARY(Mul, lowbit::ARITHMETIC<T>,
              [](T a, T b) { return lowbit::Compute(a, b, "Mul", [](auto x, auto y) { return x * y; }); })
LOWBIT_BINARY(Div, lowbit::FLOATING<T>, [](T a, T b) { return lowbit::Quotient(a, b); })
LOWBIT_BINARY(And, (std::is_integral_v<T> && sizeof(T) == 2), [](T a, T b) { return lowbit::Bitwise(a, b, true); })
LOWBIT_BINARY(Or, (std::is_integral_v<T> && sizeof(T) == 2), [](T a, T b) { return lowbit::Bitwise(a, b, false); })

LOWBIT_SCALAR(Adds, lowbit::ARITHMETIC<T>,
              ([=](T a) { return lowbit::Compute<T>(a, scalarValue, "Adds", [](auto x, auto y) { return x + y; }); }))
LOWBIT_SCALAR(Muls, lowbit::ARITHMETIC<T>,
              ([=](T a) { return lowbit::Compute<T>(a, scalarValue, "Muls", [](auto x, auto y) { return x * y; }); }))
LOWBIT_SCALAR(Maxs, lowbit::ARITHMETIC<T>, ([=](T a) { return lowbit::Extreme<T>(a, scalarValue, true); }))
LOWBIT_SCALAR(Mins, lowbit::ARITHMETIC<T>, ([=](T a) { return lowbit::Extreme<T>(a, scalarValue, false); }))
LOWBIT_SCALAR(ShiftRight, (std::is_integral_v<T> && sizeof(T) >= 2), ([=](T a) { return lowbit::Shifted(a, scalarValue); }))

#undef LOWBIT_BINARY
#undef LOWBIT_SCALAR

template <class T>
void Duplicate(const LocalTensor<T>& dst, std::common_type_t<T> scalarValue, int32_t count) {
    if constexpr (sizeof(T) < 2 || std::is_same_v<T, int4b_t>)
        lowbit::RefuseType<T>("Duplicate");
    else {
        const lowbit::Lanes operands[] = {{&dst.span, lowbit::BITS<T>}};
        lowbit::RequireOperands(operands, 1, "Duplicate");
        const std::vector<lowbit::Run> runs = lowbit::Contiguous(operands, 1, count, "Duplicate");
        lowbit::Execute(runs, operands, 1, "Duplicate", [&](uint8_t* to, const uint8_t*, const uint8_t*, uint32_t n) {
            for (uint32_t i = 0; i < n; ++i) lowbit::Store<T>(to + i * sizeof(T), scalarValue);
        });
        lowbit::FullMask();
    }
}

template <class T, class U>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, RoundMode roundMode, uint32_t count) {
    if ((lowbit::CAST_MODES<T, U> >> static_cast<uint32_t>(roundMode) & 1u) == 0) {
        lowbit::Fail("CAST-MODE", "got Cast of ", lowbit::TypeName<U>(), " to ", lowbit::TypeName<T>(), " in mode ",
                     static_cast<uint32_t>(roundMode), ", expected a pair and mode that Atlas A2 has and the emulation models");
    }
    if constexpr (lowbit::CAST_MODES<T, U> != 0) {
        const lowbit::Lanes operands[] = {{&dst.span, lowbit::BITS<T>}, {&src.span, lowbit::BITS<U>}};
        lowbit::RequireOperands(operands, 2, "Cast");
        const std::vector<lowbit::Run> runs = lowbit::Contiguous(operands, 2, count, "Cast");
        const auto mode = static_cast<lowbit::Rounding>(roundMode);
        lowbit::Execute(runs, operands, 2, "Cast", [&](uint8_t* to, const uint8_t* from, const uint8_t*, uint32_t n) {
            lowbit::CastRun<T, U>(to, from, n, mode);
        });
        lowbit::FullMask();
    }
}

// The largest of the first `mask` elements of every repeat, one value each; dstRepStride in elements, source strides in blocks.
template <class T, bool isSetMask = true>
void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask, int32_t repeatTime, int32_t dstRepStride,
                    int32_t srcBlkStride, int32_t srcRepStride, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {
    if constexpr (!lowbit::FLOATING<T>)
        lowbit::RefuseType<T>("WholeReduceMax");
    else {
        lowbit::RequireMemory(dst.span, "UB", "WholeReduceMax", "dst");
        lowbit::RequireAlignment(dst.span, 2 * sizeof(T), "WholeReduceMax", "dst");
        lowbit::RequireMemory(src.span, "UB", "WholeReduceMax", "src");
        lowbit::RequireAlignment(src.span, lowbit::BLOCK, "WholeReduceMax", "src");
        lowbit::RequireRange(static_cast<uint64_t>(int64_t{repeatTime}), 1, 255, "repeatTime", "WholeReduceMax");
        lowbit::RequireRange(static_cast<uint64_t>(int64_t{dstRepStride}), 1, 65535, "dstRepStride", "WholeReduceMax");
        lowbit::RequireRange(static_cast<uint64_t>(int64_t{srcBlkStride}), 0, 65535, "srcBlkStride", "WholeReduceMax");
        lowbit::RequireRange(static_cast<uint64_t>(int64_t{srcRepStride}), 0, 65535, "srcRepStride", "WholeReduceMax");
        const lowbit::MaskRegister kept =
            isSetMask ? lowbit::SetMask(static_cast<uint64_t>(int64_t{mask}), lowbit::REPEAT / sizeof(T), "WholeReduceMax")
                      : lowbit::KeptMask("WholeReduceMax");
        if (order != ReduceOrder::ORDER_ONLY_VALUE || kept.counter) {
            lowbit::Fail("NOT-MODELLED",
                         "got WholeReduceMax with an index or in counter mode, expected ORDER_ONLY_VALUE in normal mode");
        }
        constexpr uint32_t perBlock = lowbit::BLOCK / sizeof(T);
        lowbit::Access access = lowbit::Begin(PIPE_V, "WholeReduceMax");
        lowbit::Memory& ub = *src.span.memory;
        for (int64_t r = 0; r < repeatTime; ++r) {
            bool any = false;
            T best{};
            for (uint32_t lane = 0; lane < 8 * perBlock; ++lane) {
                if (((lane < 64 ? kept.low >> lane : kept.high >> (lane - 64)) & 1) == 0) continue;
                const int64_t place =
                    (r * srcRepStride + lane / perBlock * int64_t{srcBlkStride}) * lowbit::BLOCK + lane % perBlock * sizeof(T);
                const uint32_t at = lowbit::Inside(src.span, place, sizeof(T), access.name);
                const T value = lowbit::Load<T>(lowbit::ReadLocal(ub, at, sizeof(T), access));
                best = any ? lowbit::Extreme(best, value, true) : value;
                any = true;
            }
            const uint32_t at =
                lowbit::Inside(dst.span, r * dstRepStride * static_cast<int64_t>(sizeof(T)), sizeof(T), access.name);
            lowbit::Store(lowbit::WriteLocal(ub, at, sizeof(T), access, false), best);
        }
    }
}

// Every element of src, 8 per repeat, fills a data block of dst. The mask has no effect, and is full afterwards.
template <class T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src0, lowbit::Bits<8> repeatTime,
          const BrcbRepeatParams& repeatParams) {
    if constexpr (sizeof(T) != 2 && sizeof(T) != 4)
        lowbit::RefuseType<T>("Brcb");
    else {
        const lowbit::Lanes operands[] = {{&dst.span, lowbit::BITS<T>}, {&src0.span, lowbit::BITS<T>}};
        lowbit::RequireOperands(operands, 2, "Brcb");
        lowbit::RequireRange(repeatTime, 1, 255, "repeatTime", "Brcb");
        std::vector<lowbit::Run> runs;
        for (uint64_t e = 0; e < repeatTime * 8; ++e) {
            const uint64_t place = (e / 8 * repeatParams.dstRepStride + e % 8 * repeatParams.dstBlkStride) * lowbit::BLOCK;
            const uint32_t to = lowbit::Inside(dst.span, static_cast<int64_t>(place), lowbit::BLOCK, "Brcb");
            const uint32_t from = lowbit::Inside(src0.span, static_cast<int64_t>(e * sizeof(T)), sizeof(T), "Brcb");
            runs.push_back(lowbit::Run{{to, from, 0}, 1});
        }
        lowbit::RequireApart(runs, operands, 1, "Brcb");
        lowbit::Access access = lowbit::Begin(PIPE_V, "Brcb");
        lowbit::Memory& ub = *src0.span.memory;
        for (const lowbit::Run& run : runs) {
            const T value = lowbit::Load<T>(lowbit::ReadLocal(ub, run.at[1], sizeof(T), access));
            uint8_t* to = lowbit::WriteLocal(ub, run.at[0], lowbit::BLOCK, access, true);
            for (uint32_t b = 0; b < lowbit::BLOCK; b += sizeof(T)) lowbit::Store(to + b, value);
        }
        ResetMask();
    }
}

}  // namespace AscendC
