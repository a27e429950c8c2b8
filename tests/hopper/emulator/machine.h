// The machine as a kernel compiled for the processor sees it: threads, shared memory, barriers, copies, products, launches.
// machine.cpp has the state and the scheduler; ptx.h and device.h translate instructions and intrinsics into these calls.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <functional>

namespace emulator {

struct Fiber;  // one thread of a block

struct Thread {  // what a running fiber knows of itself
  uint3 thread, block;
  dim3 threads, blocks;
  int linear, lane, rank, ranks;  // within its block, its warp; block of the cluster, blocks in it
};
extern Thread* current;  // null while no fiber runs

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void turn();  // a point where another thread may run instead, if the seed says so
void spin();  // a point where others must run: a loop that waits for memory

// Shared memory. Addresses are those of the block's window; from place_in on they carry the block's rank.
void* dynamic_shared(unsigned alignment);
void* static_shared(const char* where, size_t bytes, size_t alignment);
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address, unsigned bytes, const char* what);
uint32_t place_in(uint32_t address, uint32_t rank);

// Collectives: every thread of `mask` brings a value and finds those of all.
struct Exchange {
  const uint32_t* values;  // of 32 lanes
  uint32_t present;
};
Exchange together(uint32_t mask, uint32_t value, const char* what);
void store_matrices(uint32_t address, const uint32_t* words, int count, bool transposed);
void load_matrices(uint32_t address, uint32_t* words, int count, bool transposed);

// Barriers
void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_fence();
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes, const char* what);
void barrier_wait(uint32_t barrier, uint32_t parity);
bool barrier_test(uint32_t barrier, uint32_t parity);
void threads_sync(int id, int threads, bool waits);
void cluster_arrive();
void cluster_wait();

// Copies: executed early (at once) or late (when no thread can go on)
void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint32_t blocks);
void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint32_t blocks);
void send(uint32_t to, const uint32_t* words, int count, uint32_t barrier);
void prefetch(const void* from, uint32_t bytes);

// Products of a warpgroup
enum Format { E4M3, E5M2, F16, BF16 };
struct Fragment {  // a register of A: read when the product is executed
  const uint32_t* at;
  uint32_t value;
};
void product_fence();
void product_issue(Format a_format, Format b_format, int n, float* const* sums, const Fragment* fragments, uint64_t a, uint64_t b,
                   bool accumulate);
void product_commit();
void product_wait(int pending);
void registers(int count, bool up);

void wait_for_launches();
void launch_dependents();

// Launches: queued, run by emulator_finish in order
struct Shape {
  dim3 grid, block, cluster = dim3(1, 1, 1);
  size_t shared = 0;
  bool programmatic = false;
};
cudaError_t launch(const void* kernel, const Shape& shape, std::function<void()> body);
cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t shape_of(const cudaLaunchConfig_t& config, Shape& shape);
int active_clusters(const Shape& shape);

}  // namespace emulator
