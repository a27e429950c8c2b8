// One instruction on many tiles: C into registers, `steps` times the instruction on consecutive k, registers out.
//
// sources.py writes above this a struct `Probe` (constants of one instruction) and `execute`, its inline PTX, and below it the
// entry. A is [tiles, M, steps K], W [tiles, N, steps K], C and D [tiles, M, N], all contiguous, codes as the unit takes them.
// The functions that move data are also host C++.

// Accumulator: 32 bits hold one f32 or s32, or two f16 neighbours of a row.
template <class Move>
PROBE_DEVICE void for_accumulator(int thread, long long tile, Move move) {
  constexpr int per_register = 4 / Probe::OUT_SIZE;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int r = 0; r < Probe::REGISTERS; ++r) {
    const At at = accumulator_at(thread, r * per_register);
    move(r, (tile * Probe::M + at.row) * Probe::N + at.column);
  }
}

PROBE_DEVICE Word* word_at(void* base, long long element, int size) { return (Word*)((char*)base + element * size); }
PROBE_DEVICE Word word_at(const void* base, long long element, int size) {
  return *(const Word*)((const char*)base + element * size);
}

PROBE_DEVICE void take_accumulator(Word* d, int thread, long long tile, const void* c) {
  for_accumulator(thread, tile, [=](int r, long long element) { d[r] = word_at(c, element, Probe::OUT_SIZE); });
}

PROBE_DEVICE void put_accumulator(const Word* d, int thread, long long tile, void* out) {
  for_accumulator(thread, tile, [=](int r, long long element) { *word_at(out, element, Probe::OUT_SIZE) = d[r]; });
}

// wgmma: one step of k, `rows` rows, into shared memory, a word at a time.
PROBE_DEVICE void take_shared(unsigned char* shared, int thread, int rows, const void* matrix, long long first_row, int step, int steps) {
  for (int i = thread; i < rows * (K_BYTES / 4); i += 128) {
    const int row = i / (K_BYTES / 4), byte = i % (K_BYTES / 4) * 4;
    const char* from = (const char*)matrix + ((first_row + row) * steps + step) * K_BYTES + byte;
    *(Word*)(shared + shared_offset(row, byte)) = *(const Word*)from;
  }
}

// mma.sync: one step of k into the registers of a lane.
PROBE_DEVICE void take_registers(Word* a, Word* b, int lane, long long tile, const void* left, const void* right, int step, int steps) {
  const long long k = (long long)steps * Probe::K;
  for (int r = 0; r < Probe::A_REGISTERS; ++r) {
    const At at = a_register_at(lane, r, Probe::SIZE);
    a[r] = word_at(left, (tile * Probe::M + at.row) * k + step * Probe::K + at.column, Probe::SIZE);
  }
  for (int r = 0; r < Probe::B_REGISTERS; ++r) {
    const At at = b_register_at(lane, r, Probe::SIZE);
    b[r] = word_at(right, (tile * Probe::N + at.row) * k + step * Probe::K + at.column, Probe::SIZE);
  }
}
