
// grid: ceil(tiles / 4), block: 128, a warp per tile.
extern "C" __global__ void __launch_bounds__(128)
probe(const void* a, const void* w, const void* c, void* out, int tiles, int steps) {
  const int lane = threadIdx.x % 32;
  const long long tile = (long long)blockIdx.x * 4 + threadIdx.x / 32;
  if (tile >= tiles) return;
  Word d[Probe::REGISTERS], left[Probe::A_REGISTERS], right[Probe::B_REGISTERS];
  take_accumulator(d, lane, tile, c);
  for (int step = 0; step < steps; ++step) {
    take_registers(left, right, lane, tile, a, w, step, steps);
    execute(d, left, right);
  }
  put_accumulator(d, lane, tile, out);
}
