// binary16 and bfloat16 in integer code: no result depends on the host's support for either.
#pragma once

#include <cstdint>
#include <cstring>

namespace lowbit {

// Rounding modes with the names of AscendC (Cast.md): RINT ties to even, ROUND ties away from zero, ODD to odd.
enum class Rounding : uint8_t { None, Rint, Floor, Ceil, Round, Trunc, Odd };

inline uint32_t FloatBits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float BitsFloat(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// One step of rounding: `kept` with `dropped` of the lowest `shift` bits (1..31) lost; true when the magnitude grows by one.
inline bool RoundsUp(uint32_t kept, uint32_t dropped, uint32_t shift, bool negative, Rounding mode) {
    if (dropped == 0) return false;
    const uint32_t tie = 1u << (shift - 1);
    switch (mode) {
        case Rounding::None:
        case Rounding::Rint: return dropped > tie || (dropped == tie && (kept & 1u) != 0);
        case Rounding::Floor: return negative;
        case Rounding::Ceil: return !negative;
        case Rounding::Round: return dropped >= tie;
        case Rounding::Trunc: return false;
        case Rounding::Odd: return (kept & 1u) == 0;
    }
    return false;
}

// float bits to half bits: subnormals kept, overflow to infinity in the modes that round away from zero there and to the
// largest finite half in the others, NaN to the canonical quiet NaN of its sign.
inline uint16_t HalfFromFloat(float value, Rounding mode = Rounding::Rint) {
    const uint32_t bits = FloatBits(value);
    const bool negative = (bits >> 31) != 0;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
    if (magnitude == 0x7F800000u) return static_cast<uint16_t>(sign | 0x7C00u);
    const int32_t exponent = static_cast<int32_t>(magnitude >> 23) - 127;
    const uint32_t significand = exponent == -127 ? (magnitude & 0x7FFFFFu) : ((magnitude & 0x7FFFFFu) | 0x800000u);
    if (exponent > 15) {
        const bool away = mode == Rounding::None || mode == Rounding::Rint || mode == Rounding::Round ||
                          (mode == Rounding::Floor && negative) || (mode == Rounding::Ceil && !negative);
        return static_cast<uint16_t>(sign | (away ? 0x7C00u : 0x7BFFu));
    }
    // A half has its last bit at 2^(exponent - 10), at 2^-24 below the normal range.
    const uint32_t shift = exponent >= -14 ? 13u : static_cast<uint32_t>(-1 - exponent);
    if (shift > 31u) {
        const bool up = RoundsUp(0, significand == 0 ? 0u : 1u, 31, negative, mode);
        return static_cast<uint16_t>(sign | (up ? 1u : 0u));
    }
    uint32_t kept = significand >> shift;
    const uint32_t dropped = significand & ((1u << shift) - 1u);
    if (RoundsUp(kept, dropped, shift, negative, mode)) ++kept;
    // The hidden bit carries into the exponent field; a carry out of the top exponent is infinity.
    const uint32_t field = exponent >= -14 ? (static_cast<uint32_t>(exponent + 14) << 10) + kept : kept;
    return static_cast<uint16_t>(sign | field);
}

inline float FloatFromHalf(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1Fu;
    uint32_t fraction = half & 0x3FFu;
    if (exponent == 0x1Fu) return BitsFloat(sign | 0x7F800000u | (fraction << 13));
    if (exponent != 0) return BitsFloat(sign | ((exponent + 112u) << 23) | (fraction << 13));
    if (fraction == 0) return BitsFloat(sign);
    uint32_t scale = 113u;
    while ((fraction & 0x400u) == 0) {
        fraction <<= 1;
        --scale;
    }
    return BitsFloat(sign | (scale << 23) | ((fraction & 0x3FFu) << 13));
}

// A finite float rounded to an integer value, still a float. Infinities and NaN are returned as they came.
inline float RoundToInteger(float value, Rounding mode) {
    const uint32_t bits = FloatBits(value);
    const bool negative = (bits >> 31) != 0;
    const uint32_t sign = bits & 0x80000000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const int32_t exponent = static_cast<int32_t>(magnitude >> 23) - 127;
    if (exponent >= 23 || magnitude == 0) return value;
    const uint32_t significand = exponent == -127 ? (magnitude & 0x7FFFFFu) : ((magnitude & 0x7FFFFFu) | 0x800000u);
    const uint32_t shift = static_cast<uint32_t>(23 - exponent);
    uint32_t kept = 0;
    if (shift > 31u) {
        if (RoundsUp(0, 1u, 31, negative, mode)) kept = 1;
    } else {
        kept = significand >> shift;
        if (RoundsUp(kept, significand & ((1u << shift) - 1u), shift, negative, mode)) ++kept;
    }
    return BitsFloat(sign | FloatBits(static_cast<float>(kept)));
}

// The upper half of a float, ties to even; NaN to the canonical quiet NaN of its sign.
inline uint16_t Bfloat16FromFloat(float value) {
    const uint32_t bits = FloatBits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | 0x7FC0u);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace lowbit

// The scalar half of device code: storage and exact conversion to float; arithmetic belongs to the vector unit.
struct half {
    uint16_t bits = 0;

    half() = default;
    half(float value) : bits(lowbit::HalfFromFloat(value)) {}
    operator float() const { return lowbit::FloatFromHalf(bits); }

    static half FromBits(uint16_t bits) {
        half value;
        value.bits = bits;
        return value;
    }
};

// As half: storage, and exact conversion to float.
struct bfloat16_t {
    uint16_t bits = 0;

    bfloat16_t() = default;
    bfloat16_t(float value) : bits(lowbit::Bfloat16FromFloat(value)) {}
    operator float() const { return lowbit::BitsFloat(static_cast<uint32_t>(bits) << 16); }
};
