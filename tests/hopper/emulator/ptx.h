// Instructions of PTX by name: translate.py turns `asm("op.x.y a, b;")` into ptx::op_x_y(a, b), registers by reference, addresses
// by value. An instruction that is not here does not compile, and the compiler names it.
#pragma once

namespace ptx {

using emulator::fail;

struct Sink {  // the register `_`
  template <class T> const Sink& operator=(const T&) const { return *this; }
};
constexpr Sink sink = {};

// Operands by constraint
template <class T> uint32_t in_r(T x) {
  if constexpr (std::is_same_v<T, float>) return emulator::bits(x);
  else return (uint32_t)x;
}
template <class T> uint64_t in_l(T x) { return (uint64_t)x; }
template <class T> uint16_t in_h(T x) { return (uint16_t)x; }
template <class T> float in_f(T x) { return (float)x; }
template <class T> int64_t in_n(T x) { return (int64_t)x; }

template <class T, int N>
struct Vector {
  T* at[N];
  T& operator[](int i) const { return *at[i]; }
};
template <class First, class... Rest>
Vector<First, 1 + sizeof...(Rest)> vector(First& first, Rest&... rest) { return {{&first, &rest...}}; }

template <class T> T* global(uint64_t address) { return (T*)(uintptr_t)address; }
template <class T> T& shared(uint32_t address, const char* what) {
  if (address % sizeof(T)) fail("%s: at 0x%x, expected a multiple of %zu", what, address, sizeof(T));
  return *(T*)emulator::shared_pointer(address, sizeof(T), what);
}

// Integers
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
template <class D> void prmt_b32(D& d, uint32_t a, uint32_t b, uint32_t selector) { d = prmt(a, b, selector); }
template <class D> void lop3_b32(D& d, uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t made = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) made |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  d = made;
}
template <class D> void shf_r_wrap_b32(D& d, uint32_t a, uint32_t b, uint32_t by) { d = __funnelshift_r(a, b, by); }
template <class D> void mul_wide_u32(D& d, uint32_t a, uint32_t b) { d = (uint64_t)a * b; }
template <class D> void setp_ne_b32(D& d, uint32_t a, uint32_t b) { d = a != b; }
template <class D, class T> void mov_u32(D& d, T x) { d = (D)x; }
template <class D, class T> void mov_u64(D& d, T x) { d = (D)x; }
inline void mov_b32(const Vector<uint16_t, 2>& d, uint32_t x) { d[0] = (uint16_t)x, d[1] = (uint16_t)(x >> 16); }
inline void mov_b32(uint32_t& d, const Vector<uint16_t, 2>& x) { d = x[0] | (uint32_t)x[1] << 16; }
inline uint32_t special_cluster_ctarank() { return emulator::current->rank; }
inline uint32_t special_cluster_nctarank() { return emulator::current->ranks; }
inline uint32_t special_laneid() { return emulator::current->lane; }
inline uint32_t special_tid_x() { return emulator::current->thread.x; }
inline uint32_t special_ctaid_x() { return emulator::current->block.x; }

// Conversions
inline float of_half(uint16_t code) { return __half2float(__half(__half_raw{code})); }
inline uint16_t to_half(float x) { return __half_raw(__float2half_rn(x)).x; }
inline float of_bf16(uint16_t code) { return emulator::value((uint32_t)code << 16); }
inline void cvt_f32_f16(float& d, uint16_t code) { d = emulator::made(of_half(code)); }
template <class D> void cvt_rn_f16_f32(D& d, float x) { d = x != x ? 0x7FFF : to_half(x); }
template <class D> void cvt_rn_satfinite_e4m3x2_f32(D& d, float high, float low) {
  d = (D)(__nv_cvt_float_to_fp8(high, __NV_SATFINITE, __NV_E4M3) << 8 | __nv_cvt_float_to_fp8(low, __NV_SATFINITE, __NV_E4M3));
}
template <class D> void cvt_rn_f16x2_e4m3x2(D& d, uint32_t codes) {
  d = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t code = codes >> (8 * i) & 0xFF;
    const uint32_t half = (code & 0x7F) == 0x7F ? 0x7FFF : __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E4M3).x;
    d |= half << (16 * i);
  }
}
template <class D> void cvt_rn_satfinite_e4m3x2_f16x2(D& d, uint32_t x) {
  __half2_raw both;
  both.x = (uint16_t)x, both.y = (uint16_t)(x >> 16);
  d = (D)__nv_cvt_halfraw2_to_fp8x2(both, __NV_SATFINITE, __NV_E4M3);
}
template <class D> void cvt_rn_bf16x2_f32(D& d, float high, float low) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  memcpy(&d, &both, 4);
}
template <class D> void cvt_rn_f16x2_f32(D& d, float high, float low) {
  uint16_t halves[2];
  cvt_rn_f16_f32(halves[0], low), cvt_rn_f16_f32(halves[1], high);
  d = (D)(halves[0] | (uint32_t)halves[1] << 16);
}

// The larger of two 16-bit values, code by code: a NaN gives way (or, `nan`, wins), +0 is above -0.
inline uint16_t larger(uint16_t a, uint16_t b, uint16_t infinity, bool nan) {
  const bool a_nan = (a & 0x7FFF) > infinity, b_nan = (b & 0x7FFF) > infinity;
  if (a_nan || b_nan) return nan || (a_nan && b_nan) ? 0x7FFF : a_nan ? b : a;
  const int x = a & 0x8000 ? -(int)(a & 0x7FFF) - 1 : a, y = b & 0x8000 ? -(int)(b & 0x7FFF) - 1 : b;
  return x < y ? b : a;
}
template <class D> void larger_pair(D& d, uint32_t a, uint32_t b, uint16_t infinity, bool nan) {
  d = larger((uint16_t)a, (uint16_t)b, infinity, nan) | (uint32_t)larger((uint16_t)(a >> 16), (uint16_t)(b >> 16), infinity,
      nan) << 16;
}
template <class D> void max_NaN_bf16x2(D& d, uint32_t a, uint32_t b) { larger_pair(d, a, b, 0x7F80, true); }
template <class D> void max_bf16x2(D& d, uint32_t a, uint32_t b) { larger_pair(d, a, b, 0x7F80, false); }
template <class D> void max_NaN_f16x2(D& d, uint32_t a, uint32_t b) { larger_pair(d, a, b, 0x7C00, true); }
template <class D> void max_f16x2(D& d, uint32_t a, uint32_t b) { larger_pair(d, a, b, 0x7C00, false); }

// One rounding of a b + c in binary16: the product is exact in binary64, and the sum is rounded to odd there before it is
// narrowed.
inline uint16_t fma_half(uint16_t a, uint16_t b, uint16_t c) {
  const double product = (double)of_half(a) * of_half(b), z = of_half(c), sum = product + z;
  if (!(sum - sum == 0)) return sum != sum ? 0x7FFF : sum > 0 ? 0x7C00 : 0xFC00;
  const double part = sum - product, error = (product - (sum - part)) + (z - part);
  int64_t code;
  memcpy(&code, &sum, 8);
  if (error != 0 && !(code & 1)) code += (error > 0) == (sum > 0) ? 1 : -1;
  double odd;
  memcpy(&odd, &code, 8);
  return __half_raw(__double2half(odd)).x;
}
template <class D> void fma_rn_f16x2(D& d, uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t low = fma_half((uint16_t)a, (uint16_t)b, (uint16_t)c);
  d = low | (uint32_t)fma_half((uint16_t)(a >> 16), (uint16_t)(b >> 16), (uint16_t)(c >> 16)) << 16;
}
template <class D> void mul_rn_f16x2(D& d, uint32_t a, uint32_t b) { fma_rn_f16x2(d, a, b, 0x80008000u); }
template <class D> void mul_f16x2(D& d, uint32_t a, uint32_t b) { mul_rn_f16x2(d, a, b); }

// Global memory
template <class D> void words(const D& d, uint64_t from, int count) {
  if (from % (4 * count)) fail("a load of %d bytes from 0x%llx", 4 * count, (unsigned long long)from);
  for (int i = 0; i < count; ++i) d[i] = global<const uint32_t>(from)[i];
}
template <class D> void ld_global_cs_v4_u32(const D& d, uint64_t from) { words(d, from, 4); }
template <class D> void ld_global_nc_v4_u32(const D& d, uint64_t from) { words(d, from, 4); }
template <class D> void ld_acquire_gpu_global_u32(D& d, uint64_t from) { emulator::turn(),
    d = (D)*global<volatile uint32_t>(from); }
template <class D> void ld_acquire_gpu_global_s32(D& d, uint64_t from) { ld_acquire_gpu_global_u32(d, from); }
template <class D> void ld_acquire_gpu_u32(D& d, uint64_t from) { ld_acquire_gpu_global_u32(d, from); }
template <class D> void ld_relaxed_gpu_global_u32(D& d, uint64_t from) { ld_acquire_gpu_global_u32(d, from); }
template <class D> void ld_volatile_global_u32(D& d, uint64_t from) { ld_acquire_gpu_global_u32(d, from); }
template <class D> void ld_relaxed_gpu_global_v4_f32(const D& d, uint64_t from) {
  emulator::turn();
  if (from % 16) fail("ld.relaxed.v4 from 0x%llx", (unsigned long long)from);
  for (int i = 0; i < 4; ++i) d[i] = global<const float>(from)[i];
}
inline void st_relaxed_gpu_global_v4_f32(uint64_t to, float x, float y, float z, float w) {
  emulator::turn();
  if (to % 16) fail("st.relaxed.v4 to 0x%llx", (unsigned long long)to);
  const float values[4] = {x, y, z, w};
  memcpy(global<void>(to), values, 16);
}
inline void st_release_gpu_global_u32(uint64_t to, uint32_t x) { emulator::turn(), *global<volatile uint32_t>(to) = x; }
inline void st_relaxed_gpu_global_u32(uint64_t to, uint32_t x) { st_release_gpu_global_u32(to, x); }
template <class D> void atom_add_acq_rel_gpu_global_u32(D& d, uint64_t at, uint32_t x)
    { d = (D)atomicAdd(global<uint32_t>(at), x); }
template <class D> void atom_acq_rel_gpu_global_add_u32(D& d, uint64_t at, uint32_t x)
    { d = (D)atomicAdd(global<uint32_t>(at), x); }
template <class D> void atom_global_add_acq_rel_gpu_u32(D& d, uint64_t at, uint32_t x)
    { d = (D)atomicAdd(global<uint32_t>(at), x); }
template <class D> void atom_add_release_gpu_global_u32(D& d, uint64_t at, uint32_t x)
    { d = (D)atomicAdd(global<uint32_t>(at), x); }
inline void red_release_gpu_global_add_u32(uint64_t at, uint32_t x) { atomicAdd(global<uint32_t>(at), x); }
inline void red_release_gpu_global_add_s32(uint64_t at, uint32_t x) { atomicAdd(global<uint32_t>(at), x); }
inline void fence_acq_rel_gpu() { emulator::turn(); }
inline void fence_acq_rel_cluster() { emulator::turn(); }
inline void fence_proxy_async() {}
inline void fence_proxy_async_global() {}
inline void nanosleep_u32(uint32_t) { emulator::spin(); }

// Shared memory by address
inline void st_shared_u32(uint32_t to, uint32_t x) { shared<uint32_t>(to, "st.shared") = x; }
template <class D> void ld_shared_u32(D& d, uint32_t from) { d = (D)shared<uint32_t>(from, "ld.shared"); }
inline void ld_shared_cluster_f32(float& d, uint32_t from) { d = emulator::value(shared<uint32_t>(from, "ld.shared::cluster")); }

// Barriers
inline void mbarrier_init_shared_cta_b64(uint32_t barrier, uint32_t arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void fence_mbarrier_init_release_cluster() { emulator::barrier_fence(); }
inline void mbarrier_arrive_shared_cta_b64(const Sink&, uint32_t barrier)
    { emulator::barrier_arrive(barrier, 0, "mbarrier.arrive"); }
inline void mbarrier_arrive_shared_cluster_b64(const Sink&, uint32_t barrier) {
  emulator::barrier_arrive(barrier, 0, "mbarrier.arrive.shared::cluster");
}
inline void mbarrier_arrive_release_cluster_shared_cluster_b64(const Sink&, uint32_t barrier) {
  emulator::barrier_arrive(barrier, 0, "mbarrier.arrive.shared::cluster");
}
inline void mbarrier_arrive_expect_tx_shared_cta_b64(const Sink&, uint32_t barrier, uint32_t bytes) {
  emulator::barrier_arrive(barrier, bytes, "mbarrier.arrive.expect_tx");
}
inline void mbarrier_try_wait_parity_shared_cta_b64(bool& done, uint32_t barrier, uint32_t parity) {
  emulator::barrier_wait(barrier, parity), done = true;
}
inline void mbarrier_try_wait_parity_acquire_cluster_shared_cta_b64(bool& done, uint32_t barrier, uint32_t parity) {
  emulator::barrier_wait(barrier, parity), done = true;
}
inline void mbarrier_test_wait_parity_shared_cta_b64(bool& done, uint32_t barrier, uint32_t parity) {
  emulator::turn(), done = emulator::barrier_test(barrier, parity);
}
inline void bar_sync(uint32_t id, uint32_t threads) { emulator::threads_sync(id, threads, true); }
inline void bar_arrive(uint32_t id, uint32_t threads) { emulator::threads_sync(id, threads, false); }
inline void barrier_sync(uint32_t id, uint32_t threads) { emulator::threads_sync(id, threads, true); }
inline void fence_proxy_async_shared_cta() {}
template <class D> void mapa_shared_cluster_u32(D& d, uint32_t place, uint32_t rank) { d = (D)emulator::place_in(place, rank); }
inline void barrier_cluster_arrive_release_aligned() { emulator::cluster_arrive(); }
inline void barrier_cluster_arrive_relaxed_aligned() { emulator::cluster_arrive(); }
inline void barrier_cluster_wait_acquire_aligned() { emulator::cluster_wait(); }

// Copies
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes_L2_cache_hint(uint32_t to, uint64_t from,
    uint32_t bytes,
                                                                                         uint32_t barrier, uint64_t) {
  emulator::copy_bulk(to, global<void>(from), bytes, barrier, 0);
}
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(uint32_t to, uint64_t from, uint32_t bytes,
    uint32_t barrier) {
  emulator::copy_bulk(to, global<void>(from), bytes, barrier, 0);
}
inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes(uint32_t to, uint64_t map, uint32_t x,
    uint32_t y,
                                                                                     uint32_t barrier) {
  emulator::copy_box(to, global<CUtensorMap>(map), (int)x, (int)y, barrier, 0);
}
inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes_L2_cache_hint(
    uint32_t to, uint64_t map, uint32_t x, uint32_t y, uint32_t barrier, uint64_t) {
  emulator::copy_box(to, global<CUtensorMap>(map), (int)x, (int)y, barrier, 0);
}
inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes_multicast_cluster(
    uint32_t to, uint64_t map, uint32_t x, uint32_t y, uint32_t barrier, uint32_t blocks) {
  if (blocks == 0) fail("cp.async.bulk.tensor: a multicast to no block");
  emulator::copy_box(to, global<CUtensorMap>(map), (int)x, (int)y, barrier, blocks);
}
inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes_multicast_cluster_L2_cache_hint(
    uint32_t to, uint64_t map, uint32_t x, uint32_t y, uint32_t barrier, uint32_t blocks, uint64_t) {
  if (blocks == 0) fail("cp.async.bulk.tensor: a multicast to no block");
  emulator::copy_box(to, global<CUtensorMap>(map), (int)x, (int)y, barrier, blocks);
}
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes_multicast_cluster(uint32_t to, uint64_t from,
    uint32_t bytes,
                                                                                            uint32_t barrier, uint32_t blocks) {
  if (blocks == 0) fail("cp.async.bulk: a multicast to no block");
  emulator::copy_bulk(to, global<void>(from), bytes, barrier, blocks);
}
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes_multicast_cluster_L2_cache_hint(
    uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier, uint32_t blocks, uint64_t) {
  cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes_multicast_cluster(to, from, bytes, barrier, blocks);
}
inline void prefetch_global_L2(uint64_t from) { (void)*global<volatile const uint8_t>(from); }
inline void cp_async_bulk_prefetch_L2_global(uint64_t from, uint32_t bytes) { emulator::prefetch(global<void>(from), bytes); }
inline void prefetch_tensormap(uint64_t) {}
inline void createpolicy_fractional_L2_evict_first_b64(uint64_t& d, double) { d = 1; }
inline void createpolicy_fractional_L2_evict_normal_b64(uint64_t& d, double) { d = 2; }
inline void createpolicy_fractional_L2_evict_last_b64(uint64_t& d, double) { d = 3; }
template <class V> void st_async_weak_shared_cluster_mbarrier_complete_tx_bytes_v4_b32(uint32_t to, uint32_t x, uint32_t y,
    uint32_t z,
                                                                                       uint32_t w, V barrier) {
  const uint32_t words[4] = {x, y, z, w};
  emulator::send(to, words, 4, barrier);
}

inline void griddepcontrol_wait() { emulator::wait_for_launches(); }
inline void griddepcontrol_launch_dependents() { emulator::launch_dependents(); }
inline void setmaxnreg_inc_sync_aligned_u32(int64_t count) { emulator::registers((int)count, true); }
inline void setmaxnreg_dec_sync_aligned_u32(int64_t count) { emulator::registers((int)count, false); }

// Matrices
inline void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t words[4] = {a, b, c, d};
  emulator::store_matrices(to, words, 4, true);
}
inline void stmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t words[4] = {a, b, c, d};
  emulator::store_matrices(to, words, 4, false);
}
inline void stmatrix_sync_aligned_m8n8_x2_trans_shared_b16(uint32_t to, uint32_t a, uint32_t b) {
  const uint32_t words[2] = {a, b};
  emulator::store_matrices(to, words, 2, true);
}
template <class D> void ldmatrix_sync_aligned_m8n8_x4_shared_b16(const D& d, uint32_t from) {
  uint32_t words[4];
  emulator::load_matrices(from, words, 4, false);
  for (int i = 0; i < 4; ++i) d[i] = words[i];
}

// Products: m64nNkK.f32.A.B
struct f32 {};
struct e4m3 { static constexpr emulator::Format format = emulator::E4M3; static constexpr int k = 32; };
struct e5m2 { static constexpr emulator::Format format = emulator::E5M2; static constexpr int k = 32; };
struct f16 { static constexpr emulator::Format format = emulator::F16; static constexpr int k = 16; };
struct bf16 { static constexpr emulator::Format format = emulator::BF16; static constexpr int k = 16; };

inline emulator::Fragment fragment(const uint32_t& x) { return {&x, 0}; }
inline emulator::Fragment fragment(uint32_t&& x) { return {nullptr, x}; }

inline void wgmma_fence_sync_aligned() { emulator::product_fence(); }
inline void wgmma_commit_group_sync_aligned() { emulator::product_commit(); }
inline void wgmma_wait_group_sync_aligned(int64_t pending) { emulator::product_wait((int)pending); }

template <int N, int K, class D, class A, class B, int COUNT>
void check(int64_t scale_a, int64_t scale_b) {
  static_assert(std::is_same_v<D, f32> && A::k == K && B::k == K && COUNT == N / 2,
      "wgmma: shape, formats and number of accumulators");
  if (scale_a != 1 || scale_b != 1) fail("wgmma: operands are negated, which is not modelled");
}
template <int N, int K, class D, class A, class B, size_t COUNT>
void wgmma(float* const (&d)[COUNT], const emulator::Fragment (&a)[4], uint64_t b, bool accumulate, int64_t scale_a,
    int64_t scale_b,
           int64_t turned_b = 0) {
  check<N, K, D, A, B, (int)COUNT>(scale_a, scale_b);
  if (turned_b) fail("wgmma: B along N, which is not modelled");
  emulator::product_issue(A::format, B::format, N, d, a, 0, b, accumulate);
}
template <int N, int K, class D, class A, class B, size_t COUNT>
void wgmma(float* const (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate, int64_t scale_a, int64_t scale_b,
    int64_t turned_a = 0,
           int64_t turned_b = 0) {
  check<N, K, D, A, B, (int)COUNT>(scale_a, scale_b);
  if (turned_a || turned_b) fail("wgmma: A along M or B along N, which is not modelled");
  emulator::product_issue(A::format, B::format, N, d, nullptr, a, b, accumulate);
}

}  // namespace ptx

inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  uint32_t x, y, z, made;
  memcpy(&x, &a, 4), memcpy(&y, &b, 4), memcpy(&z, &c, 4);
  ptx::fma_rn_f16x2(made, x, y, z);
  __half2 result;
  memcpy(&result, &made, 4);
  return result;
}
