
// grid: tiles, block: 128.
extern "C" __global__ void __launch_bounds__(128)
probe(const void* a, const void* w, const void* c, void* out, int tiles, int steps) {
  __shared__ __align__(128) unsigned char shared_a[Probe::M * K_BYTES];
  __shared__ __align__(128) unsigned char shared_b[Probe::N * K_BYTES];
  const int thread = threadIdx.x;
  const long long tile = blockIdx.x;
  Word d[Probe::REGISTERS];
  take_accumulator(d, thread, tile, c);
  const Descriptor at_a = descriptor((Word)__cvta_generic_to_shared(shared_a));
  const Descriptor at_b = descriptor((Word)__cvta_generic_to_shared(shared_b));
  for (int step = 0; step < steps; ++step) {
    __syncthreads();
    take_shared(shared_a, thread, Probe::M, a, tile * Probe::M, step, steps);
    take_shared(shared_b, thread, Probe::N, w, tile * Probe::N, step, steps);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the unit reads what these threads wrote
    __syncthreads();
    execute(d, at_a, at_b);
  }
  put_accumulator(d, thread, tile, out);
}
