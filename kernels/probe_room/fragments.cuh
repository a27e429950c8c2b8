// Where every element of a tile lives: registers of a thread, bytes of shared memory, bits of a descriptor.
//
// Written from the PTX ISA's text on register fragments and shared-memory matrices (wgmma: 64 x N over 4 warps of 16 rows; no
// swizzling, K-major). Also host C++, so that the maps are tested element by element without a GPU.

#ifdef __CUDACC__
#define PROBE_DEVICE __device__ __forceinline__
#else
#define PROBE_DEVICE inline
#endif

typedef unsigned int Word;
typedef unsigned long long Descriptor;

struct At {
  int row, column;
};

// Element i of a thread's accumulator: pairs of neighbours in a row, then eight rows down, then eight columns on.
PROBE_DEVICE At accumulator_at(int thread, int i) {
  return At{thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (thread % 4) + i % 2};
}

// The first element of register r of A (row = row of A, column = k) for mma.sync with `size` bytes per element.
PROBE_DEVICE At a_register_at(int lane, int r, int size) {
  return At{lane / 4 + 8 * (r % 2), (lane % 4 + 4 * (r / 2)) * (4 / size)};
}

// The first element of register r of B (row = column n of the result, column = k).
PROBE_DEVICE At b_register_at(int lane, int r, int size) { return At{lane / 4, (lane % 4 + 4 * r) * (4 / size)}; }

// One wgmma takes 32 bytes of k: two core matrices of 8 rows by 16 bytes side by side, then the next eight rows.
constexpr int K_BYTES = 32, CORE_BYTES = 128, ROW_GROUP_BYTES = 256;

PROBE_DEVICE int shared_offset(int row, int byte) {
  return row / 8 * ROW_GROUP_BYTES + byte / 16 * CORE_BYTES + row % 8 * 16 + byte % 16;
}

// Fields in units of 16 bytes: start in bits 0-13, along k (leading) in 16-29, along rows (stride) in 32-45; no swizzling: 0 in 62-63.
PROBE_DEVICE Descriptor descriptor(Word shared_address) {
  return ((Descriptor)(shared_address & 0x3FFFF) >> 4) | ((Descriptor)(CORE_BYTES >> 4) << 16) |
         ((Descriptor)(ROW_GROUP_BYTES >> 4) << 32);
}
