#include "products.h"

#include <string.h>

#include <vector>

namespace emulator {
namespace {

struct Number {  // significand * 2^exponent; kind: 0 finite, 1 infinity, 2 NaN
  int significand, exponent, kind;
};

// bits: of the exponent and of the fraction. `ieee`: the highest exponent holds infinity and NaN; else only NaN, in its last
// code.
Number decoded(uint32_t code, int exponent_bits, int fraction_bits, bool ieee) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const int field = code >> fraction_bits & top, fraction = code & ((1 << fraction_bits) - 1);
  const bool negative = code >> (exponent_bits + fraction_bits) & 1;
  if (ieee && field == top) return {negative ? -1 : 1, 0, fraction ? 2 : 1};
  if (!ieee && field == top && fraction == (1 << fraction_bits) - 1) return {1, 0, 2};
  const int significand = field ? fraction | 1 << fraction_bits : fraction;
  return {negative ? -significand : significand, (field ? field : 1) - bias, 0};  // the exponent of the leading place
}

struct Table {  // of the numbers of 8 bits
  Number of[256];
  Table(int exponent_bits, int fraction_bits, bool ieee) {
    for (int code = 0; code < 256; ++code) of[code] = decoded(code, exponent_bits, fraction_bits, ieee);
  }
};
const Table E4M3_NUMBERS(4, 3, false), E5M2_NUMBERS(5, 2, true);

Number number(Format format, const uint8_t* row, int k) {
  if (format == E4M3) return E4M3_NUMBERS.of[row[k]];
  if (format == E5M2) return E5M2_NUMBERS.of[row[k]];
  const uint32_t code = row[2 * k] | row[2 * k + 1] << 8;
  return format == F16 ? decoded(code, 5, 10, true) : decoded(code, 8, 7, true);
}

int fraction_bits(Format format) { return format == E4M3 ? 3 : format == E5M2 ? 2 : format == F16 ? 10 : 7; }

// A row as a node reads it. A zero has an exponent so low that it never is the largest one.
template <int K>
struct Row {
  alignas(64) int significand[K], exponent[K];
  bool special;
};

template <int K>
void read(Format format, const uint8_t* bytes, Row<K>& row) {
  row.special = false;
  for (int k = 0; k < K; ++k) {
    const Number x = number(format, bytes, k);
    row.significand[k] = x.kind ? 0 : x.significand, row.exponent[k] = x.kind || x.significand == 0 ? -400 : x.exponent;
    row.special |= x.kind != 0;
  }
}

float of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// Infinities and NaN among the operands: 0 none counts, 1 and 2 the infinities, 3 NaN.
int special_sum(Format a_format, Format b_format, const uint8_t* a, const uint8_t* b, int count, float c) {
  int seen = 0;
  const auto note = [&](int sign) { seen |= sign > 0 ? 1 : 2; };
  for (int k = 0; k < count; ++k) {
    const Number x = number(a_format, a, k), y = number(b_format, b, k);
    if (x.kind == 2 || y.kind == 2) return 3;
    if (x.kind == 0 && y.kind == 0) continue;
    const int sign = (x.significand > 0) - (x.significand < 0), other = (y.significand > 0) - (y.significand < 0);
    if (sign * other == 0) return 3;
    note(sign * other);
  }
  if (c != c) return 3;
  if (c - c != 0) note(c > 0 ? 1 : -1);
  return seen;
}

// The sum of a node in units of 2^(E - F), E the largest exponent. `place`: fraction bits of a product of significands.
template <int K, int F, class Sum>
inline __attribute__((always_inline)) float node(const Row<K>& a, const Row<K>& b, int place, int kept, float c) {
  int top = -1000, least = 0;
  for (int k = 0; k < K; ++k) {
    const int e = a.exponent[k] + b.exponent[k];
    top = e > top ? e : top, least = e < least ? e : least;
  }
  const uint32_t bits = bits_of(c);
  const int field = bits >> 23 & 0xFF;
  const int c_exponent = (field ? field : 1) - 127;
  const Sum c_significand = (bits & 0x7FFFFF) | (field ? 0x800000 : 0);
  if (c_significand && c_exponent > top) top = c_exponent;
  if ((least < -300 || c_significand == 0) && top < -133) top = -133;  // what a zero brings to the search
  const int scale = F - place;  // of both units 13 and 25, at least as many as a product has
  Sum sum = 0;
  for (int k = 0; k < K; ++k) {
    const int product = a.significand[k] * b.significand[k];
    const int magnitude = product < 0 ? -product : product;
    int down = top - a.exponent[k] - b.exponent[k];
    down = down > 31 ? 31 : down;
    const int part = (magnitude << scale) >> down;
    sum += product < 0 ? -part : part;
  }
  const int by = 23 - F + top - c_exponent;  // the same for c, which has 23 places
  const Sum part = c_significand == 0 ? 0 : by >= 31 ? 0 : by >= 0 ? c_significand >> by : c_significand << -by;
  sum += bits >> 31 ? -part : part;
  if (sum == 0) return 0.0f;
  uint64_t magnitude = sum < 0 ? -(int64_t)sum : (int64_t)sum;
  const int length = 64 - __builtin_clzll(magnitude);
  if (length > kept) magnitude = magnitude >> (length - kept) << (length - kept);
  int exponent = length - 1 + top - F;
  uint32_t code;
  if (exponent > 127) {
    code = 0x7F800000;
  } else if (exponent >= -126) {
    const uint64_t fraction = length > 24 ? magnitude >> (length - 24) : magnitude << (24 - length);
    code = (uint32_t)(exponent + 127) << 23 | ((uint32_t)fraction & 0x7FFFFF);
  } else {  // subnormal: a multiple of 2^(-126 - kept + 1)
    const int unit = top - F;  // magnitude 2^unit
    const int lost = -126 - kept + 1 - unit;
    if (lost > 0) magnitude = lost > 63 ? 0 : magnitude >> lost << lost;
    const int shift = unit + 149;
    code = (uint32_t)(shift >= 0 ? magnitude << shift : magnitude >> -shift);
  }
  return of_bits(code && sum < 0 ? code | 0x80000000u : code);  // zero is +0
}

template <int K, int F, class Sum>
__attribute__((target_clones("avx2", "default"), optimize("O3"))) void rows_by_columns(
    const Row<K>* a, const Row<K>* b, int rows, int n, int place, int kept, float* sums, bool accumulate) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < n; ++j) sums[i * n + j] = node<K, F, Sum>(a[i], b[j], place, kept, accumulate ? sums[i * n + j] : 0.0f);
}

template <int K, int F, class Sum>
void multiply_rows(Format a_format, Format b_format, int rows, int n, const uint8_t* a, const uint8_t* b, int kept, float* sums,
                   bool accumulate) {
  static std::vector<Row<K>> left(64), right(256);
  bool special = false;
  for (int i = 0; i < rows; ++i) read(a_format, a + 32 * i, left[i]), special |= left[i].special;
  for (int j = 0; j < n; ++j) read(b_format, b + 32 * j, right[j]), special |= right[j].special;
  std::vector<float> before;
  if (accumulate) {
    for (int i = 0; i < rows * n && !special; ++i) special = !(sums[i] - sums[i] == 0);
    if (special) before.assign(sums, sums + rows * n);
  }
  const int place = fraction_bits(a_format) + fraction_bits(b_format);
  rows_by_columns<K, F, Sum>(left.data(), right.data(), rows, n, place, kept, sums, accumulate);
  if (!special) return;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < n; ++j) {
      const int found = special_sum(a_format, b_format, a + 32 * i, b + 32 * j, K, accumulate ? before[i * n + j] : 0.0f);
      if (found) sums[i * n + j] = of_bits(found == 1 ? 0x7F800000 : found == 2 ? 0xFF800000 : 0x7FFFFFFF);
    }
}

}  // namespace

void multiply(Format a_format, Format b_format, int rows, int n, const uint8_t* a, const uint8_t* b, float* sums,
    bool accumulate) {
  if (a_format == E4M3 || a_format == E5M2)
    multiply_rows<EIGHT_BITS.k, EIGHT_BITS.fraction, int32_t>(a_format, b_format, rows, n, a, b, EIGHT_BITS.kept, sums,
        accumulate);
  else
    multiply_rows<SIXTEEN_BITS.k, SIXTEEN_BITS.fraction, int64_t>(a_format, b_format, rows, n, a, b, SIXTEEN_BITS.kept, sums,
        accumulate);
}

}  // namespace emulator

// The same for Python: formats as in machine.h.
extern "C" void emulator_multiply(int a_format, int b_format, int n, const uint8_t* a, const uint8_t* b, float* sums,
    int accumulate) {
  emulator::multiply((emulator::Format)a_format, (emulator::Format)b_format, 64, n, a, b, sums, accumulate != 0);
}
