// Intrinsics and runtime calls that CUDA's headers declare for a device alone, with the bits of a device: every operation rounds
// once, a NaN that arithmetic makes is 0x7FFFFFFF. Compile without contraction.
#pragma once

namespace emulator {

inline uint32_t bits(float x) {
  uint32_t made;
  memcpy(&made, &x, 4);
  return made;
}
inline float value(uint32_t x) {
  float made;
  memcpy(&made, &x, 4);
  return made;
}
inline float made(float x) { return x != x ? value(0x7FFFFFFF) : x; }

template <class T>
uint32_t word_of(T x) {
  static_assert(sizeof(T) == 4, "lanes exchange words of four bytes");
  uint32_t word;
  memcpy(&word, &x, 4);
  return word;
}
template <class T>
T of_word(uint32_t word) {
  T x;
  memcpy(&x, &word, 4);
  return x;
}

template <class T>
T from_lane(uint32_t mask, T x, int lane, int width, bool inside, const char* what) {
  const Exchange found = together(mask, word_of(x), what);
  if (!inside) return x;
  if (width < 1 || width > 32 || (width & (width - 1))) fail("%s: width %d", what, width);
  if (!(found.present >> lane & 1)) fail("%s: from lane %d, which is not in the mask 0x%08x", what, lane, mask);
  return of_word<T>(found.values[lane]);
}

template <class T, class Combine>
T reduced(uint32_t mask, T x, const char* what, Combine combine) {
  const Exchange found = together(mask, word_of(x), what);
  bool any = false;
  T total = T();
  for (int lane = 0; lane < 32; ++lane)
    if (found.present >> lane & 1) {
      const T each = of_word<T>(found.values[lane]);
      total = any ? combine(total, each) : each, any = true;
    }
  return total;
}

template <class... Parameters>
struct Configured {
  void (*kernel)(Parameters...);
  Shape shape;
  void operator()(Parameters... arguments) const {
    const auto entry = kernel;
    const cudaError_t error = launch((const void*)kernel, shape, [=] { entry(arguments...); });
    if (error != cudaSuccess) launch_error() = error;
  }
  static cudaError_t& launch_error() {
    static cudaError_t error = cudaSuccess;
    return error;
  }
};

// kernel<<<grid, block, shared, stream>>>
template <class... Parameters>
Configured<Parameters...> configured(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared = 0,
    cudaStream_t = nullptr) {
  Shape shape;
  shape.grid = grid, shape.block = block, shape.shared = shared;
  return {kernel, shape};
}

template <class T, class F>
T atomically(T* at, F next) {
  turn();
  const T before = *at;
  *at = next(before);
  return before;
}

}  // namespace emulator

inline uint32_t __float_as_uint(float x) { return emulator::bits(x); }
inline int __float_as_int(float x) { return (int)emulator::bits(x); }
inline float __uint_as_float(uint32_t x) { return emulator::value(x); }
inline float __int_as_float(int x) { return emulator::value((uint32_t)x); }
inline float __fadd_rn(float x, float y) { return emulator::made(x + y); }
inline float __fsub_rn(float x, float y) { return emulator::made(x - y); }
inline float __fmul_rn(float x, float y) { return emulator::made(x * y); }
inline float __fmaf_rn(float x, float y, float z) { return emulator::made(fmaf(x, y, z)); }
inline float __fdiv_rn(float x, float y) { return emulator::made(x / y); }
inline float __frcp_rn(float x) { return emulator::made(1.0f / x); }
inline float __fsqrt_rn(float x) { return emulator::made(sqrtf(x)); }

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i) & 0xF, byte = bytes >> (8 * (choice & 7)) & 0xFF;
    made |= (choice & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * i);  // bit 3: the sign of the byte, eight times
  }
  return made;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((uint32_t)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by)
    { return (uint32_t)(((uint64_t)high << 32 | low) >> (by & 31)); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t by) {
  return (uint32_t)(((uint64_t)high << 32 | low) << (by & 31) >> 32);
}

inline uint32_t __cvta_generic_to_shared(const void* pointer) { return emulator::shared_address(pointer); }
inline uint64_t __cvta_generic_to_global(const void* pointer) { return (uint64_t)(uintptr_t)pointer; }

template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> T __ldca(const T* from) { return *from; }
template <class T> T __ldcv(const T* from) { emulator::turn(); return *from; }
template <class T> void __stcs(T* to, T x) { *to = x; }
template <class T> void __stcg(T* to, T x) { *to = x; }
template <class T> void __stwt(T* to, T x) { *to = x; }

inline void __syncthreads() { emulator::threads_sync(0, 0, true); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { emulator::together(mask, 0, "__syncwarp"); }
template <class T> T __shfl_sync(uint32_t mask, T x, int from, int width = 32) {
  const int lane = ::emulator::current->lane;
  return emulator::from_lane(mask, x, lane / width * width + (from & (width - 1)), width, true, "__shfl_sync");
}
template <class T> T __shfl_xor_sync(uint32_t mask, T x, int by, int width = 32) {
  const int lane = ::emulator::current->lane, from = lane ^ by;
  return emulator::from_lane(mask, x, from & 31, width, from / width <= lane / width, "__shfl_xor_sync");
}
template <class T> T __shfl_up_sync(uint32_t mask, T x, unsigned by, int width = 32) {
  const int lane = ::emulator::current->lane, from = lane - (int)by;
  return emulator::from_lane(mask, x, from & 31, width, from >= lane / width * width, "__shfl_up_sync");
}
template <class T> T __shfl_down_sync(uint32_t mask, T x, unsigned by, int width = 32) {
  const int lane = ::emulator::current->lane, from = lane + (int)by;
  return emulator::from_lane(mask, x, from & 31, width, from < lane / width * width + width, "__shfl_down_sync");
}
template <class T> T __reduce_max_sync(uint32_t mask, T x) {
  return emulator::reduced(mask, x, "__reduce_max_sync", [](T a, T b) { return a < b ? b : a; });
}
template <class T> T __reduce_min_sync(uint32_t mask, T x) {
  return emulator::reduced(mask, x, "__reduce_min_sync", [](T a, T b) { return b < a ? b : a; });
}
template <class T> T __reduce_add_sync(uint32_t mask, T x) {
  return emulator::reduced(mask, x, "__reduce_add_sync", [](T a, T b) { return (T)(a + b); });
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t x) {
  return emulator::reduced(mask, x, "__reduce_or_sync", [](uint32_t a, uint32_t b) { return a | b; });
}
inline uint32_t __ballot_sync(uint32_t mask, int x) {
  const emulator::Exchange found = emulator::together(mask, x != 0, "__ballot_sync");
  uint32_t made = 0;
  for (int lane = 0; lane < 32; ++lane) made |= (found.present >> lane & 1 ? found.values[lane] : 0) << lane;
  return made;
}
inline int __any_sync(uint32_t mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(uint32_t mask, int x) { return __ballot_sync(mask, x) == mask; }

template <class T, class U> T atomicAdd(T* at, U x) { return emulator::atomically(at, [=](T old) { return (T)(old + (T)x); }); }
template <class T, class U> T atomicSub(T* at, U x) { return emulator::atomically(at, [=](T old) { return (T)(old - (T)x); }); }
template <class T, class U> T atomicMax(T* at, U x) { return emulator::atomically(at,
    [=](T old) { return old < (T)x ? (T)x : old; }); }
template <class T, class U> T atomicMin(T* at, U x) { return emulator::atomically(at,
    [=](T old) { return (T)x < old ? (T)x : old; }); }
template <class T, class U> T atomicExch(T* at, U x) { return emulator::atomically(at, [=](T) { return (T)x; }); }
template <class T, class U> T atomicOr(T* at, U x) { return emulator::atomically(at, [=](T old) { return (T)(old | (T)x); }); }
template <class T, class U> T atomicAnd(T* at, U x) { return emulator::atomically(at, [=](T old) { return (T)(old & (T)x); }); }
template <class T, class U, class V> T atomicCAS(T* at, U is, V becomes) {
  return emulator::atomically(at, [=](T old) { return old == (T)is ? (T)becomes : old; });
}
inline unsigned atomicInc(unsigned* at, unsigned most) { return emulator::atomically(at,
    [=](unsigned old) { return old >= most ? 0 : old + 1; }); }

inline void __threadfence() { emulator::turn(); }
inline void __threadfence_block() { emulator::turn(); }
inline void __threadfence_system() { emulator::turn(); }
inline void __nanosleep(unsigned) { emulator::spin(); }
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

#define EMULATOR_LEAST_AND_MOST(T) \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_LEAST_AND_MOST(int)
EMULATOR_LEAST_AND_MOST(unsigned)
EMULATOR_LEAST_AND_MOST(long)
EMULATOR_LEAST_AND_MOST(unsigned long)
EMULATOR_LEAST_AND_MOST(long long)
EMULATOR_LEAST_AND_MOST(unsigned long long)
#undef EMULATOR_LEAST_AND_MOST
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

namespace emulator {

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  Shape shape;
  const cudaError_t error = shape_of(*config, shape);
  if (error != cudaSuccess) return error;
  return [&](Parameters... kept) { return launch((const void*)kernel, shape, [=] { kernel(kept...); }); }(arguments...);
}
template <class... Parameters>
cudaError_t set_attribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) return allow_shared((const void*)kernel, value);
  return attribute == cudaFuncAttributePreferredSharedMemoryCarveout ? cudaSuccess : cudaErrorNotSupported;
}
template <class... Parameters>
cudaError_t max_clusters(int* clusters, void (*)(Parameters...), const cudaLaunchConfig_t* config) {
  Shape shape;
  const cudaError_t error = shape_of(*config, shape);
  *clusters = error == cudaSuccess ? active_clusters(shape) : 0;
  return error;
}
template <class... Parameters>
cudaError_t max_blocks(int* blocks, void (*)(Parameters...), int, size_t) { return *blocks = 1, cudaSuccess; }

}  // namespace emulator

// Templates of CUDA's headers have these names, for kernels that a driver knows.
#define cudaLaunchKernelEx ::emulator::launch_kernel
#define cudaFuncSetAttribute ::emulator::set_attribute
#define cudaOccupancyMaxActiveClusters ::emulator::max_clusters
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor ::emulator::max_blocks
