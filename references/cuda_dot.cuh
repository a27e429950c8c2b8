// The emulator of matrix units as device code: dot_definition in integers, one body for every datapath.
//
// A struct P of compile-time constants (written by cuda_dot.py from the same record that NumPy reads) says which unit and which
// operand formats. A block computes ROWS x COLUMNS results: it takes codes apart into shared memory, a stretch of k at a time,
// and every thread chains the nodes of its OUTPUTS results. The file is also host C++: there the phases of a block run one
// thread after the other, so that everything but the launch is tested without a GPU.
// Values are significand * 2^(exponent - fraction bits); special: 0 finite, 1 +Inf, -1 -Inf, 2 NaN.

#ifdef __CUDACC__
#define LOWBIT_DEVICE __device__ __forceinline__
#define LOWBIT_UNROLL _Pragma("unroll")
#else
#define LOWBIT_DEVICE inline
#define LOWBIT_UNROLL
#endif

typedef long long Wide;
typedef unsigned int Word;

enum : int { RNE = 0, RZ = 1, FLOOR = 3 };  // rounding.Rounding
enum : int { GROUPED = 1, EMULATED_PAIRS = 3, INTEGER = 4 };  // datapaths.Family
enum : int { FLOAT = 0, INT = 1, EXPONENT = 3 };  // formats.Kind
enum : int { IEEE_NAN = 1, ALL_ONES_NAN = 2 };  // formats.Nan
enum : int { ROWS = 32, COLUMNS = 32, THREADS = 256, OUTPUTS = ROWS * COLUMNS / THREADS };  // of one block

struct Number {
  int s, e, special;
};

LOWBIT_DEVICE int bit_length(Wide magnitude) {
#ifdef __CUDACC__
  return 64 - __clzll(magnitude);
#else
  return magnitude ? 64 - __builtin_clzll((unsigned long long)magnitude) : 0;
#endif
}

LOWBIT_DEVICE int larger(int x, int y) { return x > y ? x : y; }
LOWBIT_DEVICE int smaller(int x, int y) { return x < y ? x : y; }

// x * 2^-right to an integer. Terms cut to nothing end at a right shift of 62.
template <int MODE>
LOWBIT_DEVICE Wide cut(Wide x, int right) {
  if (right <= 0) return x * ((Wide)1 << -right);
  right = smaller(right, 62);
  if (MODE == RZ) return x < 0 ? -(-x >> right) : x >> right;
  Wide kept = x >> right;
  if (MODE == FLOOR) return kept;
  Wide rest = x - kept * ((Wide)1 << right), half = (Wide)1 << (right - 1);
  return kept + (rest > half || (rest == half && (kept & 1)) ? 1 : 0);
}

// Codes ---------------------------------------------------------------------------------------------------------------

// One code of a float format F, cut to the upper `bits` bits of its significand (0: all) before it is taken for anything.
template <class F>
LOWBIT_DEVICE Number take_float(Word code, int bits) {
  const int dropped = bits ? F::mantissa_bits + 1 - bits : 0;
  code = code >> dropped << dropped;
  if (F::kind == EXPONENT) return Number{1, (int)code - F::bias, code == 255 ? 2 : 0};
  const Word ones = (1u << F::exponent_bits) - 1, below = (1u << F::mantissa_bits) - 1;
  const Word magnitude = code & ((1u << (F::exponent_bits + F::mantissa_bits)) - 1);
  const Word field = magnitude >> F::mantissa_bits, fraction = magnitude & below;
  const int sign = F::is_signed && (code >> (F::exponent_bits + F::mantissa_bits) & 1) ? -1 : 1;
  const int exponent = larger((int)field, 1) - F::bias;
  if (F::nan == IEEE_NAN && field == ones) return Number{0, 1 - F::bias, fraction ? 2 : sign};
  if (F::nan == ALL_ONES_NAN && magnitude == ((ones << F::mantissa_bits) | below)) return Number{0, 1 - F::bias, 2};
  const int significand = (int)(fraction | (field ? below + 1 : 0));
  return Number{sign * (significand >> dropped), exponent, 0};
}

template <class F>
LOWBIT_DEVICE int take_integer(Word code) {
  return F::kind == INT && (code >> (F::bits - 1) & 1) ? (int)code - (1 << F::bits) : (int)code;
}

LOWBIT_DEVICE Word fetch(const void* codes, Wide index, int size) {
  if (size == 1) return ((const unsigned char*)codes)[index];
  if (size == 2) return ((const unsigned short*)codes)[index];
  return ((const Word*)codes)[index];
}

// An operand as the unit reads it: F is its format, S that of its block scales (read where P::scale_group > 0).
template <class P, class F, class S>
LOWBIT_DEVICE Number take_operand(Word code, [[maybe_unused]] Word scale_code) {
  if constexpr (P::family == INTEGER) return Number{take_integer<F>(code), 0, 0};
  Number x = take_float<F>(code, P::operand_bits);
  if (P::operand_min_exponent != 0) {  // small values are normal in the format that the unit converts to
    const int bits = P::operand_bits ? P::operand_bits : F::mantissa_bits + 1;
    const int length = bit_length(x.s < 0 ? -x.s : x.s);
    const int up = x.s == 0 ? 0 : smaller(larger(bits - length, 0), larger(x.e - P::operand_min_exponent, 0));
    x.s *= 1 << up;
    x.e -= up;
  }
  if constexpr (P::scale_group > 0) {
    const Number scale = take_float<S>(scale_code, 0);
    if (scale.special) x.special = 2;
    if (P::family == GROUPED) {  // aligned by the scales alone: the element's exponent moves into its significand
      x.s *= (1 << (x.e - F::min_exponent)) * scale.s;
      x.e = scale.e;
    } else {
      x.s *= scale.s;
      x.e += scale.e;
    }
    if (x.special) x.s = 0;
  }
  return x;
}

// The accumulator ------------------------------------------------------------------------------------------------------

template <class P>
LOWBIT_DEVICE Number zero() {
  return Number{0, P::output_min_exponent, 0};
}

// total * 2^unit to `bits` significant bits of the output format.
template <class P, int MODE>
LOWBIT_DEVICE Number finish(Wide total, int unit, int bits) {
  if (total == 0) return zero<P>();
  const Wide magnitude = total < 0 ? -total : total;
  int exponent = larger(bit_length(magnitude) - 1 + unit, P::output_min_exponent);
  Wide kept = cut<MODE>(total, exponent - (bits - 1) - unit);
  if ((kept < 0 ? -kept : kept) >> bits) {
    kept /= 2;
    exponent += 1;
  }
  if (kept == 0) return zero<P>();
  if (exponent > P::output_max_exponent) return Number{0, P::output_min_exponent, kept < 0 ? -1 : 1};
  return Number{(int)kept * (1 << (P::output_mantissa_bits + 1 - bits)), exponent, 0};
}

LOWBIT_DEVICE int join(int x, int y) {
  if (x == 2 || y == 2 || x * y == -1) return 2;
  return x ? x : y;
}

template <class P>
LOWBIT_DEVICE Number merge(Number finite, int special) {
  return special ? Number{0, P::output_min_exponent, special} : finite;
}

// IEEE addition, to nearest even. 26 bits below the smaller operand's last one: the lowest kept bit is sticky.
template <class P>
LOWBIT_DEVICE Number add(Number x, Number y) {
  const int top = larger(x.e, y.e);
  Wide total = 0;
  for (int i = 0; i < 2; ++i) {
    const Number part = i ? y : x;
    const Wide wide = (Wide)part.s * ((Wide)1 << 26);
    const int right = smaller(top - part.e, 62);
    const Wide kept = wide >> right;
    total += kept | (kept * ((Wide)1 << right) != wide ? 1 : 0);
  }
  const Number finite = finish<P, RNE>(total, top - P::output_mantissa_bits - 26, P::output_mantissa_bits + 1);
  return merge<P>(finite, join(x.special, y.special));
}

struct OutputFloat32 {
  static constexpr int kind = FLOAT, exponent_bits = 8, mantissa_bits = 23, bias = 127, is_signed = 1, nan = IEEE_NAN;
};
struct OutputFloat16 {
  static constexpr int kind = FLOAT, exponent_bits = 5, mantissa_bits = 10, bias = 15, is_signed = 1, nan = IEEE_NAN;
};

template <class P>
LOWBIT_DEVICE Number take_output(Word code) {
  if constexpr (P::family == INTEGER) return Number{(int)code, 0, 0};
  return P::output_size == 32 ? take_float<OutputFloat32>(code, 0) : take_float<OutputFloat16>(code, 0);
}

template <class P>
LOWBIT_DEVICE Word put_output(Number c) {
  if constexpr (P::family == INTEGER) return (Word)c.s;
  const Word sign = c.s < 0 || c.special == -1 ? 1u << (P::output_size - 1) : 0;
  if (c.special == 2) return (Word)P::nan_code;
  if (c.special) return sign | ((Word)(2 * P::output_max_exponent + 1) << P::output_mantissa_bits);
  const Word magnitude = (Word)(c.s < 0 ? -c.s : c.s), hidden = 1u << P::output_mantissa_bits;
  if (magnitude < hidden) return sign | magnitude;
  return sign | (((Word)(c.e + P::output_max_exponent) << P::output_mantissa_bits) + magnitude - hidden);
}

// One stretch of k in shared memory ------------------------------------------------------------------------------------

template <class P>
struct Tile {
  static constexpr int DEPTH = P::instruction_k > 32 ? P::instruction_k : 32, STRIDE = DEPTH + 1;
  int s[2][ROWS][STRIDE], e[2][ROWS][STRIDE];
  signed char special[2][ROWS][STRIDE];
  int any_special;
};

// Where element k of an instruction stands: the sub-nodes of EMULATED_PAIRS take k in alternating runs.
template <class P>
LOWBIT_DEVICE int position(int k) {
  if constexpr (P::family == EMULATED_PAIRS) {
    const int inside = k % P::instruction_k, run = inside / P::group;
    return k - inside + run % 2 * (P::instruction_k / 2) + run / 2 * P::group + inside % P::group;
  } else {
    return k;
  }
}

// Both operands of one stretch: rows beyond the matrix and k beyond K are zeros.
template <class P, int SIDE, class F, class S>
LOWBIT_DEVICE void load(Tile<P>& tile, int thread, const void* codes, [[maybe_unused]] const void* scales,
                        Wide first, int rows, int K, int k0) {
  for (int i = thread; i < ROWS * Tile<P>::DEPTH; i += THREADS) {
    const int row = i / Tile<P>::DEPTH, inside = i % Tile<P>::DEPTH, k = k0 + inside;
    Number x{0, 0, 0};
    if (row < rows && k < K) {
      const Wide at = first + row;
      Word scale = 0;
      if constexpr (P::scale_group > 0) scale = fetch(scales, at * (K / P::scale_group) + k / P::scale_group, 1);
      x = take_operand<P, F, S>(fetch(codes, at * K + k, F::size), scale);
    }
    const int to = position<P>(inside);
    tile.s[SIDE][row][to] = x.s;
    tile.e[SIDE][row][to] = x.e;
    tile.special[SIDE][row][to] = (signed char)x.special;
    if (x.special) tile.any_special = 1;
  }
}

// The special value of a node's products, 0 where all are finite.
template <class P>
LOWBIT_DEVICE int special_sum(const Tile<P>& tile, int row, int column, int k0) {
  int plus = 0, minus = 0, nan = 0;
  for (int k = k0; k < k0 + P::products; ++k) {
    const int x = tile.special[0][row][k], y = tile.special[1][column][k];
    if (x == 0 && y == 0) continue;
    const int a = tile.s[0][row][k], w = tile.s[1][column][k];
    const int sign = (x ? x : (a > 0) - (a < 0)) * (y ? y : (w > 0) - (w < 0));
    if (x == 2 || y == 2 || sign == 0) nan = 1;
    else if (sign > 0) plus = 1;
    else minus = 1;
  }
  return nan || (plus && minus) ? 2 : plus - minus;
}

template <bool CHOICE, class A, class B>
struct Choose {
  typedef A type;
};
template <class A, class B>
struct Choose<false, A, B> {
  typedef B type;
};

// One node: products k0 .. k0 + products - 1 of the tile and c.
template <class P>
LOWBIT_DEVICE Number node(const Tile<P>& tile, int row, int column, int k0, Number c) {
  const int bits = P::fraction_bits_a + P::fraction_bits_w;   // below the exponent of a product
  const int left = P::fraction_bits - bits;                   // a product at the top exponent moves up by so much
  const int run = P::family == GROUPED ? P::group : 1;
  const int up = left > 0 ? left : 0, down = left < 0 ? -left : 0;
  // A product is below 2^(bits + 2), a term below 2^(F + 2): 32 bits hold the terms of every unit that rounds each product.
  typedef typename Choose<(run == 1 && P::fraction_bits <= 28 && bits <= 28), int, Wide>::type Term;
  typedef typename Choose<(run == 1 && P::fraction_bits <= 22), int, Wide>::type Sum;
  const int *sa = tile.s[0][row] + k0, *ea = tile.e[0][row] + k0, *sw = tile.s[1][column] + k0, *ew = tile.e[1][column] + k0;
  int top = c.s ? c.e : P::zero_exponent;
  LOWBIT_UNROLL
  for (int k = 0; k < P::products; k += run) {
    int alive = 0, e = ea[k] + ew[k];
    for (int i = k; i < k + run; ++i) alive |= sa[i] * sw[i];
    if (P::normalised && run == 1 && alive) e += bit_length(alive < 0 ? -(Wide)alive : alive) - 1 - bits;
    top = larger(top, alive ? e : P::zero_exponent);
  }
  Sum total = 0;
  LOWBIT_UNROLL
  for (int k = 0; k < P::products; k += run) {
    Term p = 0;
    for (int i = k; i < k + run; ++i) p += sa[i] * sw[i];
    const int right = top - (ea[k] + ew[k]);
    if (P::alignment_rounding == RZ && !P::normalised && run == 1) {
      // A live product is never above the top, and a dead one is zero wherever it goes.
      const Term sign = p >> (8 * sizeof(Term) - 1);
      const Term magnitude = ((p ^ sign) - sign) << up;
      total += ((magnitude >> smaller(larger(right, 0) + down, 8 * (int)sizeof(Term) - 2)) ^ sign) - sign;
    } else if (p) {
      total += (Sum)cut<P::alignment_rounding>(p, right - left);
    }
  }
  const int unit = top - P::fraction_bits;
  const Wide whole = (Wide)total + cut<P::alignment_rounding>(c.s, unit - c.e + P::output_mantissa_bits);
  Number d = finish<P, P::output_rounding>(whole, unit, P::output_bits);
  if (tile.any_special || c.special) d = merge<P>(d, join(tile.any_special ? special_sum(tile, row, column, k0) : 0, c.special));
  return d;
}

// All nodes of one instruction.
template <class P>
LOWBIT_DEVICE Number instruction(const Tile<P>& tile, int row, int column, int k0, Number c) {
  if constexpr (P::family == INTEGER) {
    Wide total = c.s;
    for (int k = k0; k < k0 + P::instruction_k; ++k) total += tile.s[0][row][k] * tile.s[1][column][k];
    if (P::saturate) {
      const Wide low = -2147483647 - 1, high = 2147483647;
      total = total < low ? low : total > high ? high : total;
    }
    return Number{(int)(Word)total, 0, 0};
  } else {
    Number t = P::family == EMULATED_PAIRS ? zero<P>() : c;
    for (int k = k0; k < k0 + P::instruction_k; k += P::products) t = node(tile, row, column, k, t);
    return P::family == EMULATED_PAIRS ? add<P>(t, c) : t;
  }
}

// What a thread carries from stretch to stretch. With segments, `c` starts from zero in each and `main` adds them up.
template <class P>
struct State {
  Number c[OUTPUTS], main[OUTPUTS];
};

struct Shape {
  int M, N, K, segment, has_start;
};

template <class P>
LOWBIT_DEVICE void begin(State<P>& state, int thread, Shape shape, const void* start, Wide first, int row0, int column0) {
  LOWBIT_UNROLL
  for (int i = 0; i < OUTPUTS; ++i) {
    const int row = row0 + thread / COLUMNS + i * (THREADS / COLUMNS), column = column0 + thread % COLUMNS;
    Number x = zero<P>();
    if (shape.has_start && row < shape.M && column < shape.N)
      x = take_output<P>(fetch(start, first + (Wide)row * shape.N + column, P::output_size / 8));
    state.c[i] = shape.segment ? zero<P>() : x;
    state.main[i] = x;
  }
}

template <class P>
LOWBIT_DEVICE void advance(State<P>& state, const Tile<P>& tile, int thread, Shape shape, int k0) {
  for (int k = 0; k < Tile<P>::DEPTH && k0 + k < shape.K; k += P::instruction_k) {
    const int end = k0 + k + P::instruction_k;
    const bool closes = shape.segment && (end % shape.segment == 0 || end >= shape.K);
    LOWBIT_UNROLL
    for (int i = 0; i < OUTPUTS; ++i) {
      const int row = thread / COLUMNS + i * (THREADS / COLUMNS), column = thread % COLUMNS;
      state.c[i] = instruction(tile, row, column, k, state.c[i]);
      if constexpr (P::family != INTEGER) {
        if (closes) {
          state.main[i] = add<P>(state.main[i], state.c[i]);
          state.c[i] = zero<P>();
        }
      }
    }
  }
}

template <class P>
LOWBIT_DEVICE void end(const State<P>& state, int thread, Shape shape, void* out, Wide first, int row0, int column0) {
  LOWBIT_UNROLL
  for (int i = 0; i < OUTPUTS; ++i) {
    const int row = row0 + thread / COLUMNS + i * (THREADS / COLUMNS), column = column0 + thread % COLUMNS;
    if (row >= shape.M || column >= shape.N) continue;
    const Word code = put_output<P>(shape.segment ? state.main[i] : state.c[i]);
    const Wide at = first + (Wide)row * shape.N + column;
    if (P::output_size == 16) ((unsigned short*)out)[at] = (unsigned short)code;
    else ((Word*)out)[at] = code;
  }
}

struct Buffers {
  const void *a, *w, *a_scales, *w_scales, *start;
  void* out;
};

// One stretch of both operands; `thread` runs over THREADS.
template <class P>
LOWBIT_DEVICE void load_both(Tile<P>& tile, int thread, Buffers at, Shape shape, int batch, int row0, int column0, int k0) {
  load<P, 0, typename P::A, typename P::AS>(
      tile, thread, at.a, at.a_scales, (Wide)batch * shape.M + row0, shape.M - row0, shape.K, k0);
  load<P, 1, typename P::W, typename P::WS>(
      tile, thread, at.w, at.w_scales, (Wide)batch * shape.N + column0, shape.N - column0, shape.K, k0);
}

#ifdef __CUDACC__

// grid: (batch, ceil(M / ROWS), ceil(N / COLUMNS)), block: THREADS.
template <class P>
__device__ void run(Buffers at, Shape shape) {
  __shared__ Tile<P> tile;
  const int thread = threadIdx.x, row0 = blockIdx.y * ROWS, column0 = blockIdx.z * COLUMNS;
  const Wide first = (Wide)blockIdx.x * shape.M * shape.N;
  State<P> state;
  begin(state, thread, shape, at.start, first, row0, column0);
  for (int k0 = 0; k0 < shape.K; k0 += Tile<P>::DEPTH) {
    __syncthreads();
    if (thread == 0) tile.any_special = 0;
    __syncthreads();
    load_both(tile, thread, at, shape, blockIdx.x, row0, column0, k0);
    __syncthreads();
    advance(state, tile, thread, shape, k0);
  }
  end(state, thread, shape, at.out, first, row0, column0);
}

#else

// The same blocks on the host, threads in turn.
template <class P>
void run(Buffers at, Shape shape, int batches) {
  Tile<P> tile;
  State<P> states[THREADS];
  for (int batch = 0; batch < batches; ++batch)
    for (int row0 = 0; row0 < shape.M; row0 += ROWS)
      for (int column0 = 0; column0 < shape.N; column0 += COLUMNS) {
        const Wide first = (Wide)batch * shape.M * shape.N;
        for (int t = 0; t < THREADS; ++t) begin(states[t], t, shape, at.start, first, row0, column0);
        for (int k0 = 0; k0 < shape.K; k0 += Tile<P>::DEPTH) {
          tile.any_special = 0;
          for (int t = 0; t < THREADS; ++t) load_both(tile, t, at, shape, batch, row0, column0, k0);
          for (int t = 0; t < THREADS; ++t) advance(states[t], tile, t, shape, k0);
        }
        for (int t = 0; t < THREADS; ++t) end(states[t], t, shape, at.out, first, row0, column0);
      }
}

#endif
