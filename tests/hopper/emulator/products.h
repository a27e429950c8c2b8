// The arithmetic of one matrix instruction, independently of references/: sums in binary32 of a Hopper tensor core.
//
// One node takes all k of an instruction (32 bytes of a row: 32 codes of 8 bits or 16 of 16 bits) and the accumulator. Every term
// is cut towards zero to `fraction` bits below the largest exponent E, where a zero counts as -133, the sum is exact, and the
// result is cut towards zero to `kept` significant bits. An operand keeps the exponent of its encoding (subnormals the lowest), a
// product the sum of both. NaN operands, infinity times zero and opposite infinities give 0x7FFFFFFF.
#pragma once

#include <stdint.h>

#include "machine.h"

namespace emulator {

struct Unit {
  int k, fraction, kept;
};

constexpr Unit EIGHT_BITS = {32, 13, 14}, SIXTEEN_BITS = {16, 25, 24};

// a [rows, 32] and b [n, 32] bytes, at most 64 rows; sums [rows, n] in place; `accumulate` false: from zero.
void multiply(Format a_format, Format b_format, int rows, int n, const uint8_t* a, const uint8_t* b, float* sums,
    bool accumulate);

}  // namespace emulator
