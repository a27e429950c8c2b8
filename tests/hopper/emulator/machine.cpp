// State and scheduler of the emulated machine; machine.h says what each call is, the head of emulated.py what is modelled.
#include "machine.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <setjmp.h>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "products.h"

#if !defined(__x86_64__)
#error "the emulator switches between threads in x86-64 assembly"
#endif

extern "C" void emulator_switch(void** kept, void* next);
asm(".text\n.globl emulator_switch\n.type emulator_switch,@function\nemulator_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size emulator_switch,.-emulator_switch\n");

namespace emulator {

Thread* current = nullptr;

namespace {

constexpr size_t STACK = 128 * 1024, PAGE = 4096;
constexpr uint32_t RESERVED = 1024;         // bytes at the start of the window that belong to the system
constexpr uint32_t WINDOW = 232448 + 1024;  // what a block may have, with those
constexpr uint32_t POISON = 0x7FBADBAD;     // accumulators between a product and the wait for it

struct Grid;
struct Block;

struct Barrier {
  uint32_t expected = 0, pending = 0, parity = 0;
  int64_t bytes = 0;
  bool fenced = false;
  std::vector<Fiber*> waiting;
};

struct Gather {  // lanes of a collective that have come
  const char* what = nullptr;
  uint32_t mask = 0, present = 0;
  uint32_t values[32];
  std::vector<Fiber*> waiting;
};

struct Named {  // a barrier of threads
  int expected = 0, present = 0;
  std::vector<Fiber*> waiting;
};

struct Sums {  // accumulators of a warp that products in flight will write
  int n = 0, last = 0;  // the last product that uses them
  float* const* places(int lane) const { return &place[lane * (n / 2)]; }
  std::vector<float*> place;
  std::vector<float> value;  // [16, n]
  bool known[32] = {};
};

struct Signature {  // what the threads of a warpgroup must agree on
  Format a_format, b_format;
  int n;
  bool registers, accumulate;
  uint64_t a, b;
  bool operator==(const Signature& o) const {
    return a_format == o.a_format && b_format == o.b_format && n == o.n && registers == o.registers &&
        accumulate == o.accumulate &&
           (registers || a == o.a) && b == o.b;
  }
};

struct Product {  // the part of one warp: 16 rows
  Signature signature;
  int warp, lanes = 0;
  bool early, done = false;
  std::shared_ptr<Sums> sums;
  Fragment fragments[32][4];
};

struct Warp {
  std::deque<Product> products;
  int first = 0;  // index of products[0]; those before were delivered
  std::vector<std::shared_ptr<Sums>> active;
  int waiting_for = -1, at_wait = 0;
  std::vector<Fiber*> waiting;
};

struct Warpgroup {
  std::vector<Signature> products;
  const char* registers_what = nullptr;
  int registers_count = 0, registers_held = 0;
  std::vector<Fiber*> registers_waiting;
};

struct Cluster {
  Grid* grid;
  std::vector<std::unique_ptr<Block>> blocks;
  int live = 0, arrived = 0;
  unsigned generation = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  Cluster* cluster;
  int rank = 0, live = 0;
  uint3 index;
  uint8_t* region = nullptr;  // mapped; the window ends where a page that cannot be touched begins
  size_t region_bytes = 0;
  uint8_t* window = nullptr;  // address 0
  uint32_t used = 0;          // end of the window
  uint32_t dynamic = 0, statics = RESERVED;
  std::map<std::string, std::pair<uint32_t, size_t>> named_statics;
  std::map<uint32_t, Barrier> barriers;
  std::map<std::pair<int, uint32_t>, Gather> gathers;  // warp, mask
  std::vector<Fiber*> by_thread;
  Named named[16];
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  int register_pool = 0;  // given back and not yet taken
  std::vector<Fiber*> register_waiting;
};

}  // namespace

struct Fiber {
  Thread thread;
  Block* block;
  void* stack_pointer;
  uint8_t* stack;
  const char* doing;
  uint32_t detail[2];
  int issued, committed;  // products
  std::vector<int> groups;  // products before the end of each commit group that may be pending
  bool fenced_since_wait, fenced_since_commit;
  unsigned cluster_generation;
  uint32_t lanes[32];  // what a collective found
  bool cluster_arrived;
};

namespace {

struct Grid {
  Shape shape;
  std::function<void()> body;
  std::vector<unsigned> order;  // of clusters yet to start, last first
  std::vector<std::unique_ptr<Cluster>> running;
  int resident = 0;
  bool released = true;  // whether what came before on the stream has ended
  std::vector<Fiber*> waiting;
  bool ended() const { return order.empty() && running.empty(); }
};

struct Item {  // of the stream
  std::unique_ptr<Grid> grid;
  std::function<void()> host;
};

struct Pending {  // work that is done as late as possible
  std::function<void()> work;
  Cluster* cluster;
};

struct Settings {
  int copies = 0, products = 0;  // 0 early, 1 late, 2 either
  uint64_t seed = 1;
  int processors = 4;
} settings;

std::string message;
std::deque<Item> stream;
std::vector<Fiber*> ready, fibers_free;
std::vector<Pending> pending;
std::map<const void*, int> shared_allowed;
std::vector<uint8_t*> stacks_free;
Fiber* running = nullptr;
void* scheduler = nullptr;
sigjmp_buf unwind;
bool active = false, failed = false;
uint64_t random_state = 1;
unsigned steps = 0, behind = 0;  // of the scheduler: choices made, who comes last
unsigned idle = 0;  // turns of loops over memory since a thread last waited in another way
Grid* current_grid_of(Fiber* f) { return f->block->cluster->grid; }

uint64_t draw() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state * 0x2545F4914F6CDD1Dull;
}
uint32_t below(uint32_t n) { return (uint32_t)((draw() >> 32) * n >> 32); }
bool late(int mode) { return mode == 1 || (mode == 2 && below(2)); }

void to_scheduler() {
  Fiber* self = running;
  emulator_switch(&self->stack_pointer, scheduler);
}

// The fiber goes on when somebody puts it among the ready ones.
void sleep(const char* doing, uint32_t first = 0, uint32_t second = 0) {
  idle = 0;
  running->doing = doing, running->detail[0] = first, running->detail[1] = second;
  to_scheduler();
}

void wake(std::vector<Fiber*>& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

Fiber* self() {
  if (running == nullptr) fail("an instruction of a kernel outside a kernel");
  return running;
}
Block& here() { return *self()->block; }

Block& block_at(uint32_t address, const char* what) {
  const uint32_t rank = address >> 24;
  Block& own = here();
  if (rank == 0) return own;
  if (rank > own.cluster->blocks.size()) fail("%s: address 0x%08x is of no block of the cluster", what, address);
  Block& found = *own.cluster->blocks[rank - 1];
  if (found.live == 0) fail("%s: block %u of the cluster has ended", what, rank - 1);
  return found;
}

uint8_t* place(Block& block, uint32_t address, uint32_t bytes, const char* what) {
  const uint32_t offset = address & 0xFFFFFF;
  if (offset < RESERVED || offset + (uint64_t)bytes > block.used)
    fail("%s: %u bytes at 0x%x, the block has shared memory from 0x%x to 0x%x", what, bytes, offset, RESERVED, block.used);
  return block.window + offset;
}

constexpr uint64_t MARK = 0xB1A55EDBA221E25Full;  // what a barrier holds in memory: an overwritten one is told

Barrier& barrier_of(Block& block, uint32_t address, const char* what) {
  const uint32_t offset = address & 0xFFFFFF;
  if (offset % 8) fail("%s: barrier at 0x%x, expected a multiple of 8", what, offset);
  const auto found = block.barriers.find(offset);
  if (found == block.barriers.end()) fail("%s: nothing initialised a barrier at 0x%x of block %d", what, offset, block.rank);
  if (memcmp(place(block, address, 8, what), &MARK, 8)) fail("%s: the barrier at 0x%x was overwritten", what, offset);
  return found->second;
}

void settle(Barrier& barrier, uint32_t address) {
  if (barrier.pending || barrier.bytes > 0) return;
  if (barrier.bytes < 0) fail("barrier at 0x%x: %lld bytes more arrived than were expected", address & 0xFFFFFF,
      (long long)-barrier.bytes);
  barrier.parity ^= 1, barrier.pending = barrier.expected;
  wake(barrier.waiting);
}

void complete(Block& block, uint32_t address, uint32_t bytes, const char* what) {
  if (block.live == 0) fail("%s: block %d of the cluster has ended", what, block.rank);
  Barrier& barrier = barrier_of(block, address, what);
  if (!barrier.fenced) fail("%s: the barrier at 0x%x was initialised without a fence for the copy engine", what,
      address & 0xFFFFFF);
  barrier.bytes -= bytes;
  settle(barrier, address);
}

void later(bool is_late, std::function<void()> work) {
  if (is_late) pending.push_back({std::move(work), here().cluster});
  else work();
}

// Fibers ------------------------------------------------------------------------------------------------------------------------

std::string describe(const Fiber& f) {
  char text[256];
  const uint3 b = f.thread.block;
  snprintf(text, sizeof text, "block (%u, %u, %u) thread %d: ", b.x, b.y, b.z, f.thread.linear);
  return text;
}

void finish_fiber();

void fiber_main() {
  current_grid_of(running)->body();
  finish_fiber();
}

uint8_t* new_stack() {
  if (!stacks_free.empty()) {
    uint8_t* found = stacks_free.back();
    stacks_free.pop_back();
    return found;
  }
  void* found = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) fail("no memory for the stack of a thread");
  mprotect(found, PAGE, PROT_NONE);
  return (uint8_t*)found;
}

void start_fiber(Block* block, const uint3& thread, int linear) {
  Fiber* f;
  if (fibers_free.empty()) f = new Fiber();
  else f = fibers_free.back(), fibers_free.pop_back();
  const Grid& grid = *block->cluster->grid;
  f->thread = {thread, block->index, grid.shape.block, grid.shape.grid, linear, linear % 32, block->rank,
               (int)block->cluster->blocks.size()};
  f->block = block, f->doing = "", f->issued = f->committed = 0, f->groups.clear();
  f->fenced_since_wait = f->fenced_since_commit = false, f->cluster_generation = 0, f->cluster_arrived = false;
  f->stack = new_stack();
  void** top = (void**)(f->stack + STACK);
  *--top = nullptr;
  *--top = (void*)fiber_main;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->stack_pointer = top;
  block->by_thread.push_back(f);
  ready.push_back(f);
}

void start_cluster(Grid& grid, unsigned index) {
  auto cluster = std::make_unique<Cluster>();
  cluster->grid = &grid;
  const unsigned ranks = grid.shape.cluster.x, first = index * ranks;
  const dim3 b = grid.shape.block, g = grid.shape.grid;
  const int threads = b.x * b.y * b.z;
  cluster->blocks.resize(ranks);
  for (unsigned rank = 0; rank < ranks; ++rank) cluster->blocks[rank] = std::make_unique<Block>();
  for (unsigned rank = 0; rank < ranks; ++rank) {
    Block& block = *cluster->blocks[rank];
    const unsigned linear = first + rank;
    block.cluster = cluster.get(), block.rank = rank, block.live = threads;
    block.index = {linear % g.x, linear / g.x % g.y, linear / g.x / g.y};
    block.warps.resize((threads + 31) / 32), block.warpgroups.resize((threads + 127) / 128);
    const int each = std::min(256, 65536 / ((threads + 31) / 32 * 32) / 8 * 8);
    for (Warpgroup& group : block.warpgroups) group.registers_held = each;
    block.region_bytes = (WINDOW + 2048 + PAGE - 1) / PAGE * PAGE + 2 * PAGE;
    void* region = mmap(nullptr, block.region_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) fail("no memory for shared memory");
    block.region = (uint8_t*)region;
  }
  cluster->live = ranks;
  grid.resident += ranks;
  for (unsigned rank = 0; rank < ranks; ++rank) {
    int linear = 0;
    for (unsigned z = 0; z < b.z; ++z)
      for (unsigned y = 0; y < b.y; ++y)
        for (unsigned x = 0; x < b.x; ++x) start_fiber(cluster->blocks[rank].get(), {x, y, z}, linear++);
  }
  grid.running.push_back(std::move(cluster));
}

// Static arrays first, dynamic memory behind them; the window is laid out when the first thread asks for either.
void lay_out(Block& block, unsigned alignment) {
  if (block.window) return;
  const uint32_t bytes = (uint32_t)block.cluster->grid->shape.shared;
  const uint32_t room = 48 * 1024;  // for static arrays, where there is no dynamic memory
  const uint32_t start = bytes == 0 ? RESERVED + room : RESERVED + 16;
  block.dynamic = (start + alignment - 1) / alignment * alignment;
  if (bytes == 0) block.dynamic = RESERVED + room;
  block.used = block.dynamic + (bytes + 15) / 16 * 16;
  uint8_t* end = block.region + block.region_bytes - PAGE;
  mprotect(end, PAGE, PROT_NONE);
  block.window = end - block.used;
  mprotect(block.region, ((size_t)(block.window + RESERVED - block.region)) / PAGE * PAGE, PROT_NONE);
  memset(block.window + RESERVED, 0xFF, block.used - RESERVED);
}

void end_of_cluster(Cluster& cluster) {
  for (const Pending& work : pending)
    if (work.cluster == &cluster) fail("block (%u, 0, 0) ends while copies to its cluster are on their way",
        cluster.blocks[0]->index.x);
  for (auto& block : cluster.blocks) munmap(block->region, block->region_bytes);
}

void finish_fiber() {
  Fiber* f = running;
  if (f->issued != f->committed || !f->groups.empty())
    fail("the thread ends with products on their way: nothing waited for them");
  for (auto& entry : f->block->gathers)
    if (entry.first.first == f->thread.linear / 32 && entry.second.present && entry.first.second >> f->thread.lane & 1)
      fail("the thread ends where others of its warp wait for it in %s", entry.second.what);
  Block& block = *f->block;
  stacks_free.push_back(f->stack);
  f->stack = nullptr, f->doing = nullptr;
  if (--block.live == 0) {
    Cluster& cluster = *block.cluster;
    if (--cluster.live == 0) {
      Grid& grid = *cluster.grid;
      end_of_cluster(cluster);
      grid.resident -= (int)cluster.blocks.size();
      for (auto& each : cluster.blocks)
        for (Fiber* fiber : each->by_thread) fibers_free.push_back(fiber);
      for (size_t i = 0; i < grid.running.size(); ++i)
        if (grid.running[i].get() == &cluster) {
          std::swap(grid.running[i], grid.running.back());
          grid.running.pop_back();
          break;
        }
    }
  }
  void* nobody;
  emulator_switch(&nobody, scheduler);  // the stack is used until here; it is handed out again by the scheduler alone
}

// Who runs next, by the seed: the last to become ready; any; mostly one of the last; any, but one warp of each block, or one
// block of each cluster, only where nobody else can.
size_t chosen() {
  const uint32_t count = (uint32_t)ready.size();
  const unsigned policy = settings.seed % 5;
  if (policy == 0) return count - 1;
  if (policy == 2 && count > 64 && below(4)) return count - 1 - below(64);
  const uint32_t first = below(count);
  if (policy < 3) return first;
  if (policy == 3 && ++steps % 4096 == 0) behind = below(32);
  for (uint32_t i = 0; i < count; ++i) {
    const Thread& thread = ready[(first + i) % count]->thread;
    const unsigned warps = (thread.threads.x * thread.threads.y * thread.threads.z + 31) / 32;
    if (policy == 3 ? thread.linear / 32 != (int)(behind % warps) : thread.rank != (int)(behind % thread.ranks))
        return (first + i) % count;
  }
  return first;
}

// Everything that can run, runs; then what was put off; until neither is left.
void run_ready() {
  while (true) {
    if (ready.empty()) {
      if (pending.empty()) return;
      const size_t at = below((uint32_t)pending.size());
      std::function<void()> work = std::move(pending[at].work);
      pending.erase(pending.begin() + at);
      work();
      continue;
    }
    size_t at = chosen();
    Fiber* next = ready[at];
    ready[at] = ready.back(), ready.pop_back();
    running = next, current = &next->thread;
    emulator_switch(&scheduler, next->stack_pointer);
    running = nullptr, current = nullptr;
    if (failed) siglongjmp(unwind, 1);
  }
}

std::string doing_of(const Fiber& f) {
  char line[200];
  if (!strcmp(f.doing, "barrier")) {
    const Barrier& b = f.block->barriers[f.detail[0]];
    snprintf(line, sizeof line, "phase %u of the barrier at 0x%x (lacks %u of %u arrivals, %lld bytes)", f.detail[1],
        f.detail[0], b.pending,
             b.expected, (long long)b.bytes);
  } else if (!strcmp(f.doing, "bar.sync")) {
    snprintf(line, sizeof line, "bar.sync %u (%d of %u came)", f.detail[0], f.block->named[f.detail[0]].present, f.detail[1]);
  } else if (!strncmp(f.doing, "setmaxnreg", 10)) {
    snprintf(line, sizeof line, "%s, %d registers are free", f.doing, f.block->register_pool);
  } else {
    return f.doing;
  }
  return line;
}

// Who waits for what, block by block.
std::string deadlock(const std::vector<Grid*>& grids) {
  std::string text = "deadlock";
  for (Grid* grid : grids)
    for (auto& cluster : grid->running)
      for (auto& block : cluster->blocks) {
        std::map<std::string, std::vector<int>> waiting;
        for (Fiber* f : block->by_thread)
          if (f->doing) waiting[doing_of(*f)].push_back(f->thread.linear);
        text += "; block " + std::to_string(block->index.x);
        for (auto& each : waiting)
          text += ", " + std::to_string(each.second.size()) + " from thread " + std::to_string(each.second[0])
              + " on wait for " + each.first;
      }
  return text.substr(0, 4000);
}

void admit(Grid& grid) {
  while (!grid.order.empty() && (grid.resident == 0 || grid.resident + (int)grid.shape.cluster.x <= settings.processors)) {
    const unsigned index = grid.order.back();
    grid.order.pop_back();
    start_cluster(grid, index);
  }
}

// The grid to its end, or, `prologue`, until every thread of what is resident waits for the launch before.
void run_grid(Grid& grid, bool prologue, Grid* next) {
  while (true) {
    admit(grid);
    run_ready();
    if (grid.ended()) return;
    if (prologue) {
      size_t live = 0;
      for (auto& cluster : grid.running)
        for (auto& block : cluster->blocks) live += block->live;
      // those that wait for others that wait for the launch are well: whether they are stuck is seen afterwards
      if (live) return;
      continue;
    }
    const bool moved = !grid.order.empty() && (grid.resident == 0 ||
        grid.resident + (int)grid.shape.cluster.x <= settings.processors);
    if (!moved) {
      std::vector<Grid*> all = {&grid};
      if (next) all.push_back(next);
      fail("%s", deadlock(all).c_str());
    }
  }
}

void run_stream() {
  while (!stream.empty()) {
    Item& item = stream.front();
    Grid* next = stream.size() > 1 && stream[1].grid && stream[1].grid->shape.programmatic ? stream[1].grid.get() : nullptr;
    if (next) next->released = false, run_grid(*next, true, nullptr);
    if (item.grid) {
      item.grid->released = true;
      wake(item.grid->waiting);
      run_grid(*item.grid, false, next);
    } else {
      item.host();
    }
    stream.pop_front();
  }
}

void drop_everything() {
  for (Item& item : stream)
    for (size_t i = 0; item.grid && i < item.grid->running.size(); ++i)
      for (auto& block : item.grid->running[i]->blocks) {
        munmap(block->region, block->region_bytes);
        for (Fiber* f : block->by_thread) {
          if (f->stack) stacks_free.push_back(f->stack);
          fibers_free.push_back(f);
        }
      }
  pending.clear(), ready.clear(), stream.clear();
  running = nullptr, current = nullptr;
}

struct sigaction previous_segv, previous_bus;
uint8_t signal_stack[64 * 1024];

void on_signal(int number, siginfo_t* info, void* context) {
  if (active) {
    char text[200];
    const uint8_t* at = (const uint8_t*)info->si_addr;
    const char* kind = "memory that belongs to nobody (a global address, or past a thread's stack)";
    if (running && running->block->region && at >= running->block->region &&
        at < running->block->region + running->block->region_bytes)
      kind = "an address beyond the shared memory of the block";
    snprintf(text, sizeof text, "access to %p, %s", (const void*)at, kind);
    message = (running ? describe(*running) : "") + text;
    failed = true;
    siglongjmp(unwind, 1);
  }
  const struct sigaction& before = number == SIGSEGV ? previous_segv : previous_bus;
  if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(number, info, context);
  else if (before.sa_handler == SIG_DFL) signal(number, SIG_DFL), raise(number);
  else if (before.sa_handler != SIG_IGN) before.sa_handler(number);
}

struct Handlers {  // while kernels run
  stack_t before;
  Handlers() {
    stack_t mine = {};
    mine.ss_sp = signal_stack, mine.ss_size = sizeof signal_stack;
    sigaltstack(&mine, &before);
    struct sigaction action = {};
    action.sa_sigaction = on_signal, action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_segv), sigaction(SIGBUS, &action, &previous_bus);
  }
  ~Handlers() {
    sigaction(SIGSEGV, &previous_segv, nullptr), sigaction(SIGBUS, &previous_bus, nullptr);
    if (before.ss_flags & SS_DISABLE || before.ss_sp) sigaltstack(&before, nullptr);
  }
};

}  // namespace

void fail(const char* format, ...) {
  char text[6000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = (running ? describe(*running) : std::string()) + text;
  failed = true;
  if (running) to_scheduler();
  siglongjmp(unwind, 1);
}

void turn() {
  if (below(8)) return;
  ready.push_back(self());
  to_scheduler();
}

void spin() {
  Fiber* f = self();
  if (++idle > 1000000) fail("a loop waits for memory that nobody writes");
  ready.insert(ready.begin(), f);
  if (ready.size() == 1 && !pending.empty()) {  // nobody else can go on: what was put off happens now
    std::function<void()> work = std::move(pending.back().work);
    pending.pop_back();
    work();
  }
  to_scheduler();
}

// Shared memory -----------------------------------------------------------------------------------------------------------------

void* dynamic_shared(unsigned alignment) {
  Block& block = here();
  lay_out(block, alignment);
  return block.window + block.dynamic;
}

void* static_shared(const char* where, size_t bytes, size_t alignment) {
  Block& block = here();
  if (block.cluster->grid->shape.shared) fail("static shared arrays beside dynamic shared memory are not modelled");
  lay_out(block, 16);
  const auto found = block.named_statics.find(where);
  if (found != block.named_statics.end()) return block.window + found->second.first;
  const uint32_t at = (uint32_t)((block.statics + alignment - 1) / alignment * alignment);
  if (at + bytes > block.dynamic) fail("more than 48 KB of static shared memory");
  block.statics = (uint32_t)(at + bytes);
  block.named_statics[where] = {at, bytes};
  return block.window + at;
}

uint32_t shared_address(const void* pointer) {
  Block& block = here();
  const uint8_t* at = (const uint8_t*)pointer;
  if (!block.window || at < block.window || at > block.window + block.used)
      fail("an address that is none of shared memory was converted to one");
  return (uint32_t)(at - block.window);
}

void* shared_pointer(uint32_t address, unsigned bytes, const char* what)
    { return place(block_at(address, what), address, bytes, what); }

uint32_t place_in(uint32_t address, uint32_t rank) {
  if (rank >= here().cluster->blocks.size()) fail("mapa: rank %u, the cluster has %zu blocks", rank,
      here().cluster->blocks.size());
  return (rank + 1) << 24 | (address & 0xFFFFFF);
}

// Collectives -------------------------------------------------------------------------------------------------------------------

Exchange together(uint32_t mask, uint32_t value, const char* what) {
  Fiber* f = self();
  Block& block = *f->block;
  const int warp = f->thread.linear / 32;
  if (!(mask >> f->thread.lane & 1)) fail("%s: the mask 0x%08x leaves out the thread that executes it", what, mask);
  for (const auto& entry : block.gathers)
    if (entry.first.first == warp && entry.second.present && (entry.first.second & mask) &&
        (entry.first.second != mask || strcmp(entry.second.what, what)))
      fail("threads of a warp diverge: %s with mask 0x%08x here, %s with 0x%08x in others", what, mask, entry.second.what,
          entry.first.second);
  Gather& gather = block.gathers[{warp, mask}];
  if (gather.present == 0) gather.what = what;
  gather.values[f->thread.lane] = value, gather.present |= 1u << f->thread.lane;
  if (gather.present != mask) {
    gather.waiting.push_back(f);
    sleep(what);
    return {f->lanes, mask};
  }
  memcpy(f->lanes, gather.values, sizeof f->lanes);
  for (Fiber* other : gather.waiting) memcpy(other->lanes, gather.values, sizeof f->lanes);
  gather.present = 0;
  wake(gather.waiting);
  return {f->lanes, mask};
}

namespace {

// Of four (or two, or one) 8 x 8 matrices lane 8 i + j gives the address of row j of matrix i; a lane holds two neighbours of row
// lane / 4, or of that column where the matrix is turned.
template <class Each>
void matrices(uint32_t address, int count, bool transposed, const char* what, Each each) {
  const Exchange found = together(0xFFFFFFFFu, address, what);
  const int lane = current->lane;
  for (int i = 0; i < count; ++i)
    for (int e = 0; e < 2; ++e) {
      const int row = transposed ? 2 * (lane % 4) + e : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + e;
      const uint32_t start = found.values[8 * i + row];
      if (start % 16) fail("%s: row at 0x%x, expected a multiple of 16", what, start);
      each(i, e, (uint16_t*)shared_pointer(start, 16, what) + column);
    }
}

}  // namespace

void store_matrices(uint32_t address, const uint32_t* words, int count, bool transposed) {
  matrices(address, count, transposed, "stmatrix", [&](int i, int e, uint16_t* at) { *at = (uint16_t)(words[i] >> (16 * e)); });
}

void load_matrices(uint32_t address, uint32_t* words, int count, bool transposed) {
  for (int i = 0; i < count; ++i) words[i] = 0;
  matrices(address, count, transposed, "ldmatrix", [&](int i, int e, uint16_t* at) { words[i] |= (uint32_t)*at << (16 * e); });
}

// Barriers ----------------------------------------------------------------------------------------------------------------------

void barrier_init(uint32_t address, uint32_t arrivals) {
  Block& block = here();
  const uint32_t offset = address & 0xFFFFFF;
  if (address >> 24) fail("mbarrier.init: a barrier of another block");
  if (arrivals == 0 || arrivals >= 1u << 20) fail("mbarrier.init: %u arrivals", arrivals);
  if (offset % 8) fail("mbarrier.init: barrier at 0x%x, expected a multiple of 8", offset);
  memcpy(place(block, address, 8, "mbarrier.init"), &MARK, 8);
  Barrier& barrier = block.barriers[offset];
  if (!barrier.waiting.empty()) fail("mbarrier.init: threads wait for the barrier at 0x%x", offset);
  barrier = Barrier();
  barrier.expected = barrier.pending = arrivals;
}

void barrier_fence() {
  for (auto& entry : here().barriers) entry.second.fenced = true;
}

void barrier_arrive(uint32_t address, uint32_t expected_bytes, const char* what) {
  turn();
  Block& block = block_at(address, what);
  Barrier& barrier = barrier_of(block, address, what);
  const uint32_t offset = address & 0xFFFFFF;
  if (address >> 24 && !barrier.fenced) fail("%s: the barrier at 0x%x was initialised without a fence for the cluster", what,
      offset);
  if (barrier.pending == 0) fail("%s: more than %u arrivals at the barrier at 0x%x in one phase", what, barrier.expected, offset);
  barrier.bytes += expected_bytes, --barrier.pending;
  settle(barrier, address);
}

bool barrier_test(uint32_t address, uint32_t parity) {
  if (address >> 24) fail("mbarrier.try_wait: a barrier of another block");
  return barrier_of(here(), address, "mbarrier.try_wait").parity != (parity & 1);
}

void barrier_wait(uint32_t address, uint32_t parity) {
  while (!barrier_test(address, parity)) {
    here().barriers[address].waiting.push_back(self());
    sleep("barrier", address, parity & 1);
  }
}

void threads_sync(int id, int threads, bool waits) {
  Block& block = here();
  const int all = (int)block.by_thread.size(), whole = (all + 31) / 32 * 32;
  if (threads == 0) threads = whole;
  if (id < 0 || id > 15 || threads % 32 || threads > whole) fail("bar.sync %d: %d threads", id, threads);
  Named& named = block.named[id];
  if (named.present && named.expected != threads) fail("bar.sync %d: %d threads here, %d said by others", id, threads,
      named.expected);
  named.expected = threads;
  const int lacking = threads > all ? threads - all : 0;  // lanes that a block of no whole warps does not have
  if (++named.present < threads - lacking) {
    if (!waits) return;
    named.waiting.push_back(self());
    sleep("bar.sync", id, threads);
    return;
  }
  named.present = 0;
  wake(named.waiting);
}

void cluster_arrive() {
  Fiber* f = self();
  Cluster& cluster = *f->block->cluster;
  if (f->cluster_arrived) fail("barrier.cluster.arrive: twice without a wait");
  f->cluster_arrived = true, f->cluster_generation = cluster.generation;
  int all = 0;
  for (auto& block : cluster.blocks) all += (int)block->by_thread.size();
  if (++cluster.arrived == all) cluster.arrived = 0, ++cluster.generation, wake(cluster.waiting);
}

void cluster_wait() {
  Fiber* f = self();
  Cluster& cluster = *f->block->cluster;
  if (!f->cluster_arrived) fail("barrier.cluster.wait: without an arrive");
  f->cluster_arrived = false;
  while (cluster.generation == f->cluster_generation) {
    cluster.waiting.push_back(f);
    sleep("barrier.cluster.wait");
  }
}

// Copies ------------------------------------------------------------------------------------------------------------------------

namespace {

// each(block, address, barrier there) for the blocks of a multicast, or for the block that `to` names.
template <class Each>
void to_blocks(uint32_t to, uint32_t barrier, uint32_t blocks, const char* what, Each each) {
  Cluster& cluster = *here().cluster;
  if (blocks == 0) {
    const uint32_t own = to >> 24 ? to >> 24 : here().rank + 1;
    if (barrier >> 24 && barrier >> 24 != own) fail("%s: the barrier lies in another block than the data", what);
    return each(&block_at(to, what), own << 24 | (to & 0xFFFFFF), own << 24 | (barrier & 0xFFFFFF));
  }
  if (blocks >> cluster.blocks.size()) fail("%s: blocks 0x%x, the cluster has %zu", what, blocks, cluster.blocks.size());
  for (uint32_t rank = 0; blocks >> rank; ++rank)
    if (blocks >> rank & 1) {
      const uint32_t there = (rank + 1) << 24;
      each(&block_at(there, what), there | (to & 0xFFFFFF), there | (barrier & 0xFFFFFF));
    }
}

}  // namespace

void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint32_t blocks) {
  turn();
  const char* what = "cp.async.bulk";
  if (to % 16 || (uintptr_t)from % 16 || bytes % 16 || bytes == 0)
    fail("%s: %u bytes from %p to 0x%x, expected multiples of 16", what, bytes, from, to);
  to_blocks(to, barrier, blocks, what, [=](Block* there, uint32_t target, uint32_t counter) {
    later(late(settings.copies), [=] {
      memcpy(place(*there, target, bytes, what), from, bytes);
      complete(*there, counter, bytes, what);
    });
  });
}

namespace {

struct Map {  // what a tensor map holds here
  const uint8_t* base;
  uint64_t sizes[2], stride;
  uint32_t box[2], element, swizzle, mark;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");
constexpr uint32_t MAP_MARK = 0x7E4504A9;

uint32_t bytes_of(CUtensorMapDataType type) {
  if (type == CU_TENSOR_MAP_DATA_TYPE_UINT8) return 1;
  if (type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
      type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) return 2;
  return type == CU_TENSOR_MAP_DATA_TYPE_UINT32 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 0;
}

CUresult encode_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                    const cuuint64_t* strides, const cuuint32_t* boxes, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const uint32_t element = bytes_of(type);
  const bool turned = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  const bool taken = element && rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && steps[0] == 1 && steps[1] == 1 &&
                     fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && (turned || swizzle == CU_TENSOR_MAP_SWIZZLE_NONE);
  const bool lies = (uintptr_t)map % 64 == 0 && (uintptr_t)base % 16 == 0 && strides[0] % 16 == 0 && strides[0] < 1ull << 40;
  const bool sized = sizes[0] > 0 && sizes[1] > 0 && sizes[0] <= 1ull << 32 && sizes[1] <= 1ull << 32;
  const bool boxed = boxes[0] > 0 && boxes[1] > 0 && boxes[0] <= 256 && boxes[1] <= 256 && boxes[0] * element % 16 == 0;
  const bool legal = taken && lies && sized && boxed && (!turned || boxes[0] * element <= 128);
  if (!legal) return CUDA_ERROR_INVALID_VALUE;
  const Map made = {(const uint8_t*)base, {sizes[0], sizes[1]}, strides[0], {boxes[0], boxes[1]}, element, turned, MAP_MARK};
  memset(map, 0xFF, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

// 128-byte swizzling: bits 4 to 6 of an address by bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void fill_box(Block& block, uint32_t to, const Map& map, int x, int y) {
  const int64_t limit = (int64_t)map.sizes[0] * map.element;
  const uint32_t row_bytes = map.box[0] * map.element;
  for (uint32_t r = 0; r < map.box[1]; ++r) {
    const int64_t row = (int64_t)y + r;
    const bool inside = row >= 0 && row < (int64_t)map.sizes[1];
    for (uint32_t c = 0; c < row_bytes; c += 16) {
      const uint32_t linear = to + r * row_bytes + c;
      uint8_t* out = block.window + (map.swizzle ? swizzled(linear) : linear);
      const int64_t first = (int64_t)x * map.element + c;
      const uint8_t* from = map.base + row * (int64_t)map.stride + first;
      if (inside && first >= 0 && first + 16 <= limit) {
        memcpy(out, from, 16);
      } else {
        for (int b = 0; b < 16; ++b) out[b] = inside && first + b >= 0 && first + b < limit ? from[b] : 0;
      }
    }
  }
}

}  // namespace

void copy_box(uint32_t to, const CUtensorMap* tensor, int x, int y, uint32_t barrier, uint32_t blocks) {
  turn();
  const char* what = "cp.async.bulk.tensor";
  Map map;
  memcpy(&map, tensor, sizeof map);
  if (map.mark != MAP_MARK || (uintptr_t)tensor % 64) fail("%s: no tensor map, or none at a multiple of 64", what);
  if (to % 128) fail("%s: to 0x%x, expected a multiple of 128", what, to);
  const uint32_t bytes = map.box[0] * map.element * map.box[1];
  to_blocks(to, barrier, blocks, what, [=](Block* there, uint32_t target, uint32_t counter) {
    later(late(settings.copies), [=] {
      place(*there, target, bytes, what);
      fill_box(*there, target & 0xFFFFFF, map, x, y);
      complete(*there, counter, bytes, what);
    });
  });
}

void send(uint32_t to, const uint32_t* words, int count, uint32_t barrier) {
  turn();
  const char* what = "st.async";
  if (to % (4 * count)) fail("%s: to 0x%x, expected a multiple of %d", what, to, 4 * count);
  if (to >> 24 != barrier >> 24) fail("%s: the barrier lies in another block than the data", what);
  Block* there = &block_at(to, what);
  const std::vector<uint32_t> kept(words, words + count);
  later(late(settings.copies), [=] {
    memcpy(place(*there, to, 4 * count, what), kept.data(), 4 * count);
    complete(*there, barrier, 4 * count, what);
  });
}

void prefetch(const void* from, uint32_t bytes) {
  if ((uintptr_t)from % 16 || bytes % 16) fail("cp.async.bulk.prefetch: %u bytes from %p, expected multiples of 16", bytes, from);
}

// Products ----------------------------------------------------------------------------------------------------------------------

namespace {

Warpgroup& group_of(Fiber* f) {
  const int first = f->thread.linear / 128 * 128;
  if (first + 128 > (int)f->block->by_thread.size()) fail("wgmma, setmaxnreg: a warpgroup of less than 128 threads");
  return f->block->warpgroups[first / 128];
}

// Row (of the 16 of a warp) and column of element i of a thread's accumulators.
int row_of(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
int column_of(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

// 32 bytes of each row of a K-major matrix in shared memory, as a descriptor says.
void fetch(Block& block, uint64_t descriptor, int rows, uint8_t* out, const char* which) {
  const uint32_t start = (uint32_t)(descriptor & 0x3FFF) << 4, stride = (uint32_t)(descriptor >> 32 & 0x3FFF) << 4;
  const int mode = (int)(descriptor >> 62), base = (int)(descriptor >> 49 & 7);
  if (mode != 1) fail("wgmma: the descriptor of %s asks for swizzling %d, modelled is 1 (128 bytes)", which, mode);
  if (base) fail("wgmma: the descriptor of %s has a base offset, which is not modelled", which);
  if (start >> 7 & 7) fail("wgmma: the descriptor of %s starts at 0x%x, within a swizzled pattern of 1024 bytes", which, start);
  for (int row = 0; row < rows; ++row)
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = swizzled(start + row / 8 * stride + row % 8 * 128 + 16 * half);
      memcpy(out + 32 * row + 16 * half, place(block, at, 16, "wgmma"), 16);
    }
}

void execute(Block& block, Product& product) {
  if (product.done) return;
  product.done = true;
  const Signature& said = product.signature;
  uint8_t a[64 * 32], b[256 * 32];
  fetch(block, said.b, said.n, b, "B");
  if (said.registers) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const Fragment& fragment = product.fragments[lane][i];
        const uint32_t word = fragment.at ? *fragment.at : fragment.value;
        memcpy(a + 32 * (lane / 4 + 8 * (i % 2)) + 16 * (i / 2) + 4 * (lane % 4), &word, 4);
      }
  } else {
    fetch(block, said.a, 64, a, "A");
    memmove(a, a + 16 * 32 * (product.warp % 4), 16 * 32);
  }
  multiply(said.a_format, said.b_format, 16, said.n, a, b, product.sums->value.data(), said.accumulate);
}

// Products before `end` are over: their sums go to the registers where no later product uses them.
void deliver(Block* block, Warp* warp, int end) {
  for (int i = 0; i < end - warp->first; ++i) {
    if (warp->products[i].lanes != 32) fail("wgmma.wait_group: not every thread of the warp issued the product");
    execute(*block, warp->products[i]);
  }
  while (warp->first < end) warp->products.pop_front(), ++warp->first;
  for (size_t i = 0; i < warp->active.size();) {
    Sums& sums = *warp->active[i];
    if (sums.last >= end) {
      ++i;
      continue;
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < sums.n / 2; ++j) {
        float* at = sums.places(lane)[j];
        if (memcmp(at, &POISON, 4))
          fail("wgmma.wait_group: accumulator %d of lane %d of a warp was written while products were in flight", j, lane);
        *at = sums.value[row_of(lane, j) * sums.n + column_of(lane, j)];
      }
    warp->active.erase(warp->active.begin() + i);
  }
  warp->at_wait = 0, warp->waiting_for = -1;
  wake(warp->waiting);
}

std::shared_ptr<Sums> sums_of(Warp& warp, int lane, int n, float* first) {
  for (auto& each : warp.active)
    if (each->known[lane] && each->places(lane)[0] == first) return each;
  auto made = std::make_shared<Sums>();
  made->n = n, made->place.resize(32 * (n / 2)), made->value.resize(16 * n);
  warp.active.push_back(made);
  return made;
}

// The accumulators of one thread: from now on they belong to the products.
void take(Warp& warp, Sums& held, int lane, int n, float* const* sums) {
  if (held.n != n) fail("wgmma: accumulators of products in flight are used with N = %d and N = %d", held.n, n);
  if (held.known[lane]) {
    for (int i = 0; i < n / 2; ++i)
      if (held.places(lane)[i] != sums[i]) fail("wgmma: accumulators of two products in flight overlap in part");
    return;
  }
  for (auto& each : warp.active)
    for (int i = 0; each.get() != &held && each->known[lane] && i < each->n / 2; ++i)
      for (int j = 0; j < n / 2; ++j)
        if (each->places(lane)[i] == sums[j]) fail("wgmma: accumulators of two products in flight overlap");
  for (int i = 0; i < n / 2; ++i) {
    held.place[lane * (n / 2) + i] = sums[i];
    held.value[row_of(lane, i) * n + column_of(lane, i)] = *sums[i];
    memcpy(sums[i], &POISON, 4);
  }
  held.known[lane] = true;
}

}  // namespace

void product_fence() {
  Fiber* f = self();
  f->fenced_since_wait = f->fenced_since_commit = true;
}

void product_issue(Format a_format, Format b_format, int n, float* const* sums, const Fragment* fragments, uint64_t a, uint64_t b,
                   bool accumulate) {
  Fiber* f = self();
  Warpgroup& group = group_of(f);
  Warp& warp = f->block->warps[f->thread.linear / 32];
  const int lane = f->thread.lane;
  const Signature said = {a_format, b_format, n, fragments != nullptr, accumulate, a, b};
  if (n % 8 || n < 8 || n > 256) fail("wgmma: N = %d", n);
  if (!(said.registers ? f->fenced_since_commit : f->fenced_since_wait))
    fail("wgmma: no wgmma.fence since registers may have been written (the last %s)",
        said.registers ? "commit_group" : "wait_group");
  const size_t number = f->issued++;
  if (number == group.products.size()) group.products.push_back(said);
  if (!(group.products[number] == said)) fail("wgmma: the threads of the warpgroup issue different products");
  const size_t index = number - warp.first;
  if (index == warp.products.size()) {
    warp.products.emplace_back();
    Product& made = warp.products.back();
    made.signature = said, made.warp = f->thread.linear / 32, made.early = !late(settings.products);
    made.sums = sums_of(warp, lane, n, sums[0]);
    made.sums->last = (int)number;
  }
  Product& product = warp.products[index];
  take(warp, *product.sums, lane, n, sums);
  for (int i = 0; fragments && i < 4; ++i) product.fragments[lane][i] = fragments[i];
  if (++product.lanes < 32 || !product.early) return;
  for (size_t i = 0; i <= index; ++i) execute(*f->block, warp.products[i]);  // in order: those before it, too
}

void product_commit() {
  Fiber* f = self();
  f->fenced_since_commit = false, f->committed = f->issued;
  f->groups.push_back(f->issued);
}

void product_wait(int most) {
  Fiber* f = self();
  Block* block = f->block;
  group_of(f);
  Warp* warp = &block->warps[f->thread.linear / 32];
  int end = warp->first;  // of the products that are waited for
  while ((int)f->groups.size() > most) end = std::max(end, f->groups.front()), f->groups.erase(f->groups.begin());
  f->fenced_since_wait = false;
  if (warp->at_wait && warp->waiting_for != end) fail("wgmma.wait_group: the threads of a warp wait for different products");
  warp->waiting_for = end, warp->waiting.push_back(f);
  f->doing = "wgmma.wait_group";
  idle = 0;
  if (++warp->at_wait == 32) later(end > warp->first && settings.products, [=] { deliver(block, warp, end); });
  to_scheduler();
}

void registers(int count, bool up) {
  Fiber* f = self();
  Block* block = f->block;
  Warpgroup& group = group_of(f);
  const char* what = up ? "setmaxnreg.inc" : "setmaxnreg.dec";
  if (count % 8 || count < 24 || count > 256) fail("%s: %d registers", what, count);
  if (group.registers_what && (group.registers_what != what || group.registers_count != count))
    fail("%s: the threads of the warpgroup differ", what);
  group.registers_what = what, group.registers_count = count;
  if (group.registers_waiting.size() < 127) {
    group.registers_waiting.push_back(f);
    return sleep(what);
  }
  if (up ? count < group.registers_held : count > group.registers_held) fail("%s %d: the warpgroup has %d", what, count,
      group.registers_held);
  const int needed = (count - group.registers_held) * 128;
  while (up && block->register_pool < needed) {
    block->register_waiting.push_back(f);
    sleep(what, needed, block->register_pool);
  }
  block->register_pool += (group.registers_held - count) * 128;
  group.registers_held = count, group.registers_what = nullptr;
  wake(group.registers_waiting), wake(block->register_waiting);
}

// Launches ----------------------------------------------------------------------------------------------------------------------

void wait_for_launches() {
  Grid* grid = current_grid_of(self());
  while (!grid->released) {
    grid->waiting.push_back(running);
    sleep("griddepcontrol.wait");
  }
}

void launch_dependents() { turn(); }

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > 232448) return cudaErrorInvalidValue;
  shared_allowed[kernel] = bytes;
  return cudaSuccess;
}

int active_clusters(const Shape& shape) { return settings.processors / (int)shape.cluster.x; }

cudaError_t shape_of(const cudaLaunchConfig_t& config, Shape& shape) {
  shape.grid = config.gridDim, shape.block = config.blockDim, shape.shared = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      shape.cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
    else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      shape.programmatic = attribute.val.programmaticStreamSerializationAllowed != 0;
    else
      return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const Shape& shape, std::function<void()> body) {
  const dim3 g = shape.grid, b = shape.block, c = shape.cluster;
  const uint64_t threads = (uint64_t)b.x * b.y * b.z;
  if (threads == 0 || threads > 1024 || b.z > 64) return cudaErrorInvalidConfiguration;
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7FFFFFFF || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (c.x == 0 || c.x > 8 || c.y != 1 || c.z != 1 || g.x % c.x) return cudaErrorInvalidClusterSize;
  const int allowed = shared_allowed.count(kernel) ? shared_allowed[kernel] : 48 * 1024;
  if (shape.shared > (size_t)allowed) return cudaErrorInvalidValue;
  auto grid = std::make_unique<Grid>();
  grid->shape = shape, grid->body = std::move(body);
  const unsigned clusters = (unsigned)((uint64_t)g.x * g.y * g.z / c.x);
  grid->order.resize(clusters);
  for (unsigned i = 0; i < clusters; ++i) grid->order[i] = clusters - 1 - i;
  for (unsigned i = clusters; i > 1 && settings.seed % 2; --i) std::swap(grid->order[i - 1], grid->order[below(i)]);
  stream.push_back({std::move(grid), nullptr});
  return cudaSuccess;
}

}  // namespace emulator

// The runtime as host code calls it, and what Python calls ----------------------------------------------------------------------

using namespace emulator;

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) *value = settings.processors;
  else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = 232448;
  else if (attribute == cudaDevAttrComputeCapabilityMajor) *value = 9;
  else if (attribute == cudaDevAttrComputeCapabilityMinor) *value = 0;
  else return cudaErrorInvalidValue;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  stream.push_back({nullptr, [=] { memset(to, value, bytes); }});
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  stream.push_back({nullptr, [=] { memcpy(to, from, bytes); }});
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* answer) {
  const bool known = !strcmp(name, "cuTensorMapEncodeTiled");
  *found = known ? (void*)encode_map : nullptr;
  *answer = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// copies, products: 0 early, 1 late, 2 either, by the seed.
void emulator_settings(int copies, int products, unsigned long long seed, int processors) {
  settings = {copies, products, seed, processors};
  random_state = seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  for (int i = 0; i < 8; ++i) draw();
  steps = 0, behind = below(32);
}

// Work of the host that lies ahead of the next launch on the stream.
void emulator_before(void (*work)()) { stream.push_back({nullptr, work}); }

// Runs what was launched. 0, or 1 where the machine found a fault; emulator_message then says which.
int emulator_finish() {
  if (stream.empty()) return 0;
  Handlers handlers;
  active = true, failed = false;
  message.clear();
  if (sigsetjmp(unwind, 1) == 0) run_stream();
  active = false;
  const bool bad = failed;
  failed = false;
  drop_everything();
  return bad;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulator_finish() ? cudaErrorLaunchFailure : cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return emulator_finish() ? cudaErrorLaunchFailure : cudaSuccess; }

const char* emulator_message() { return message.c_str(); }
}
