// Runs a kernel on the host: one thread per core, one core at a time (pipes.h). Called from the glue translation unit that
// includes the unchanged kernel source.
#pragma once

#include <dlfcn.h>

#include <system_error>
#include <thread>
#include <tuple>

#include "kernel_operator.h"

namespace lowbit {

constexpr uint32_t READABLE = 1, WRITABLE = 2, INITIALISED = 4;

// One GM_ADDR argument. `flags`: READABLE and WRITABLE by the kernel; INITIALISED: every byte holds data when it starts.
struct Buffer {
    void* data;
    uint64_t bytes;
    uint32_t flags;
    uint32_t reserved;
};

// A byte that two arguments reach would have two histories, so no argument the kernel writes may share one with another.
inline bool Overlap(const Buffer* buffers, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        for (size_t j = i + 1; j < count; ++j) {
            const auto first = reinterpret_cast<uintptr_t>(buffers[i].data),
                       second = reinterpret_cast<uintptr_t>(buffers[j].data);
            const bool apart = buffers[i].bytes == 0 || buffers[j].bytes == 0 || first + buffers[i].bytes <= second ||
                               second + buffers[j].bytes <= first;
            if (!apart && ((buffers[i].flags | buffers[j].flags) & WRITABLE) != 0) return true;
        }
    }
    return false;
}

inline void BuildRegions(LaunchState& launch, const Buffer* buffers, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        const Buffer& buffer = buffers[i];
        Region region;
        region.data = static_cast<uint8_t*>(buffer.data);
        region.bytes = buffer.bytes;
        region.readable = (buffer.flags & READABLE) != 0;
        region.writable = (buffer.flags & WRITABLE) != 0;
        region.argument = static_cast<uint32_t>(i);
        if ((buffer.flags & INITIALISED) == 0) region.valid.assign(buffer.bytes, 0);
        if (region.writable) {
            region.marks = {static_cast<Mark*>(std::calloc(buffer.bytes + 1, sizeof(Mark))), std::free};
            if (!region.marks) throw std::bad_alloc();
        }
        launch.regions.push_back(std::move(region));
    }
}

inline void AddCore(LaunchState& launch, Kind kind, uint32_t block, uint32_t sub) {
    auto core = std::make_unique<Core>();
    core->launch = &launch;
    core->index = static_cast<uint32_t>(launch.cores.size());
    core->block = block;
    core->sub = sub;
    core->kind = kind;
    core->flags.resize(PIPES * PIPES * EVENT_IDS);
    core->reserved.resize(static_cast<size_t>(HardEvent::COUNT));
    if (kind == Kind::AIV) {
        core->ub = std::make_unique<Memory>("UB", UB_BYTES);
    } else {
        core->l1 = std::make_unique<Memory>("L1", L1_BYTES);
        core->l0a = std::make_unique<Memory>("L0A", L0A_BYTES);
        core->l0b = std::make_unique<Memory>("L0B", L0B_BYTES);
        core->l0c = std::make_unique<Memory>("L0C", L0C_BYTES);
    }
    launch.cores.push_back(std::move(core));
}

inline void BuildCores(LaunchState& launch) {
    for (uint32_t block = 0; block < launch.blocks; ++block) {
        if (launch.mode != Mode::AIV) AddCore(launch, Kind::AIC, block, 0);
        if (launch.mode == Mode::AIV) AddCore(launch, Kind::AIV, block, 0);
        if (launch.mode == Mode::MIX_AIC_1_2) {
            AddCore(launch, Kind::AIV, block, 0);
            AddCore(launch, Kind::AIV, block, 1);
        }
    }
    for (auto& core : launch.cores) {
        for (Clock& clock : core->clocks) clock.assign(launch.cores.size() * PIPES, 0);
    }
}

// What a kernel must have given back when it returns.
inline void CheckEnd(const Core& core) {
    if (core.drained) {
        Fail("TPIPE-EVENT",
             "got the end of TPipe with an event M_MTE1 0, 1 or 2 already waited for, expected the kernel to use ids from 3");
    }
    if (!core.leftover.empty()) {
        Fail("QUEUE-LEFTOVER", "got the end of the kernel with ", core.leftover,
             ", expected DeQue and FreeTensor of every tensor");
    }
    for (uint32_t i = 0; i < core.flags.size(); ++i) {
        if (!core.flags[i].set) continue;
        const uint32_t pipes = i / EVENT_IDS;
        Fail("FLAG-LEFTOVER", "got the end of the kernel with ", PipeName(pipes / PIPES), "_", PipeName(pipes % PIPES), " id ",
             i % EVENT_IDS, " set, expected every SetFlag to be waited for");
    }
    if (core.mask.owned || core.mask.counter) {
        Fail("MASK-LEFTOVER", "got the end of the kernel with the mask register set, expected SetMaskNorm and ResetMask");
    }
}

inline void CheckCrossEnd(LaunchState& launch) {
    for (auto& core : launch.cores) {
        self = core.get();
        for (uint32_t flag = 0; flag < CROSS_FLAGS; ++flag) {
            size_t unmatched = core->arrived[flag].size();
            for (const auto& sent : core->sent[flag]) unmatched += sent.size();
            if (unmatched != 0) {
                Fail("CROSS-LEFTOVER", "got the end of the launch with ", unmatched, " sets of cross-core flag ", flag,
                     " nobody waited for, expected as many waits as sets");
            }
        }
    }
}

// The life of one core's thread.
template <class Call>
void RunCore(Core& core, const Call& call) {
    LaunchState& launch = *core.launch;
    self = &core;
    {
        std::unique_lock<std::mutex> lock(launch.mutex);
        AwaitTurn(core, lock);
    }
    if (!launch.stopped) {
        try {
            call();
            CheckEnd(core);
        } catch (const Stop&) {
            // The launch holds the message.
        } catch (const std::exception& error) {
            if (!launch.stopped)
                launch.message =
                    std::string("LAUNCH-FAILED: got ") + error.what() + " in the emulation, expected it to have memory";
            launch.stopped = true;
        }
    }
    std::unique_lock<std::mutex> lock(launch.mutex);
    core.activity = Activity::Done;
    if (!PassOn(launch, core.index)) {
        ReportDeadlock(launch);
        PassOn(launch, core.index);
    }
}

template <class Call>
void RunCores(LaunchState& launch, const Call& call) {
    std::vector<std::thread> threads;
    try {
        for (auto& core : launch.cores) threads.emplace_back([&call, &core] { RunCore(*core, call); });
    } catch (const std::system_error& error) {
        std::unique_lock<std::mutex> lock(launch.mutex);
        launch.stopped = true;
        launch.message = std::string("LAUNCH-FAILED: got ") + error.what() + " for a thread per core, expected fewer blocks";
        for (size_t i = threads.size(); i < launch.cores.size(); ++i) launch.cores[i]->activity = Activity::Done;
    }
    {
        std::unique_lock<std::mutex> lock(launch.mutex);
        PassOn(launch, static_cast<uint32_t>(launch.cores.size()) - 1);
        launch.idle.wait(lock, [&launch] { return launch.running == -1; });
    }
    for (std::thread& thread : threads) thread.join();
    if (launch.stopped) return;
    try {
        CheckCrossEnd(launch);
    } catch (const Stop&) {
        // The launch holds the message.
    }
    self = nullptr;
}

template <class... Arguments, size_t... I>
void Invoke(void (*kernel)(Arguments...), const Buffer* buffers, std::index_sequence<I...>) {
    kernel(static_cast<Arguments>(buffers[I].data)...);
}

inline std::string KernelName(void* address) {
    Dl_info info;
    return dladdr(address, &info) != 0 && info.dli_sname != nullptr ? info.dli_sname : "?";
}

// Runs `kernel` on `blocks` blocks with one buffer per argument. 0: it ran and broke no rule; 1: `message` says which it broke.
template <class... Arguments>
int Launch(void (*kernel)(Arguments...), Mode mode, uint32_t blocks, const Buffer* buffers, size_t count, char* message,
           size_t message_size) {
    LaunchState launch;
    launch.mode = mode;
    launch.blocks = blocks;
    try {
        launch.kernel = KernelName(reinterpret_cast<void*>(kernel));
        const bool numbers = count == sizeof...(Arguments) && blocks != 0 && (buffers != nullptr || count == 0);
        if (!numbers || Overlap(buffers, count)) {
            std::ostringstream text;
            text << "LAUNCH-ARGUMENTS: got " << count << " buffers" << (numbers ? " that overlap" : "") << " and " << blocks
                 << " blocks, expected " << sizeof...(Arguments)
                 << " buffers, none sharing a byte with a writable one, and at least one block (kernel " << launch.kernel << ")";
            launch.stopped = true;
            launch.message = text.str();
        } else {
            BuildRegions(launch, buffers, count);
            BuildCores(launch);
            RunCores(launch, [&] { Invoke(kernel, buffers, std::index_sequence_for<Arguments...>{}); });
        }
    } catch (const std::exception& error) {
        launch.stopped = true;
        launch.message = std::string("LAUNCH-FAILED: got ") + error.what() + " in the emulation, expected it to have memory";
    }
    if (message != nullptr && message_size != 0) std::snprintf(message, message_size, "%s", launch.message.c_str());
    return launch.stopped ? 1 : 0;
}

}  // namespace lowbit
