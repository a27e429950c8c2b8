// Cores, pipes and the order between them.
//
// A core executes its program in program order, but every instruction belongs to a pipe, and on the device the pipes run on
// their own. Each pipe therefore carries a vector clock: what of every other pipe it is known to come after. Flags, barriers
// and queues pass clocks on; nothing else does. An access that conflicts with an earlier one its pipe is not ordered after is
// an error here, whatever the program order was. One core runs at a time and gives way only where it waits, so that a launch
// has one outcome and a launch nobody can continue is seen at once.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

enum pipe_t : uint8_t { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };

enum event_t : int32_t { EVENT_ID0, EVENT_ID1, EVENT_ID2, EVENT_ID3, EVENT_ID4, EVENT_ID5, EVENT_ID6, EVENT_ID7 };

namespace lowbit {

constexpr uint32_t PIPES = 7;
constexpr uint32_t EVENT_IDS = 8;
constexpr uint32_t CROSS_FLAGS = 11;
constexpr uint32_t CROSS_LIMIT = 15;

inline const char* PipeName(uint32_t pipe) {
    static const char* const names[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX", "ALL"};
    return names[pipe];
}

enum class Kind : uint8_t { AIC, AIV };
enum class Mode : uint8_t { AIV, AIC, MIX_AIC_1_2 };

using Clock = std::vector<uint32_t>;

inline void Join(Clock& clock, const Clock& other) {
    for (size_t i = 0; i < clock.size(); ++i) {
        if (clock[i] < other[i]) clock[i] = other[i];
    }
}

// Leaves the core that runs; the launch already holds the message.
struct Stop {};

// One executed instruction: which pipe of which core, and its number on that pipe (from 1).
struct Record {
    const char* name;
    uint32_t core;
    uint32_t pipe;
    uint32_t time;
};

// What a launch buffer is at run time. `valid` and `marks` exist only where reads or conflicts must be checked.
struct Mark {
    uint32_t writer;   // record of the last write, 0: none
    uint32_t readers;  // set of records that read since, 0: none
};

struct Region {
    uint8_t* data = nullptr;
    uint64_t bytes = 0;
    bool readable = false;
    bool writable = false;
    uint32_t argument = 0;
    std::vector<uint8_t> valid;                                          // empty: every byte was initialised by the host
    std::unique_ptr<Mark[], void (*)(void*)> marks{nullptr, std::free};  // null: never written, no conflict possible
};

struct Memory;
struct Core;

struct LaunchState {
    std::string kernel;
    Mode mode = Mode::AIV;
    uint32_t blocks = 0;
    std::vector<Region> regions;
    std::vector<std::unique_ptr<Core>> cores;
    std::vector<Record> records{1};
    std::vector<std::vector<uint32_t>> readers{1};  // interned sets of records; set 0 is empty
    std::string message;
    bool stopped = false;
    std::mutex mutex;
    std::condition_variable idle;
    int64_t running = -1;
};

struct Flag {
    bool set = false;
    Clock clock;
};

enum class Activity : uint8_t { Ready, Waiting, Done };

// The mask register of the vector unit. `owned`: the kernel set it and nothing has overwritten it since.
struct MaskRegister {
    bool counter = false;
    bool owned = false;
    uint64_t low = ~0ull;
    uint64_t high = ~0ull;
};

struct Core {
    LaunchState* launch = nullptr;
    uint32_t index = 0;
    uint32_t block = 0;
    uint32_t sub = 0;
    Kind kind = Kind::AIC;

    uint32_t issued[PIPES] = {};
    Clock clocks[PIPES];  // clocks[p][index * PIPES + p]: instructions of p that p itself is known to come after
    std::vector<Flag> flags;
    std::vector<uint8_t> reserved;  // per hardware event: ids handed out by AllocEventID
    std::deque<Clock> arrived[CROSS_FLAGS];
    std::deque<Clock> sent[CROSS_FLAGS][3];  // [mode]: sets of this core that its partners have not completed yet
    MaskRegister mask;
    std::string leftover;  // first thing a destroyed queue had not given back
    bool filled = false;   // the last Mmad was long enough to retire the one before it
    bool drained = false;  // the kernel waited for an event that TPipe waits for at its end

    std::unique_ptr<Memory> ub, l1, l0a, l0b, l0c;
    uint32_t buffers = 0;

    Activity activity = Activity::Ready;
    uint32_t awaited = 0;
    std::condition_variable wake;
};

inline thread_local Core* self = nullptr;

inline std::string Place(const Core& core) {
    std::ostringstream text;
    text << "block " << core.block << ", " << (core.kind == Kind::AIC ? "AIC" : "AIV");
    if (core.launch->mode == Mode::MIX_AIC_1_2 && core.kind == Kind::AIV) text << core.sub;
    return text.str();
}

template <class... Parts>
[[noreturn]] void Fail(const char* rule, const Parts&... parts) {
    std::ostringstream text;
    text << rule << ": ";
    (text << ... << parts);
    text << " (kernel " << self->launch->kernel << ", " << Place(*self) << ")";
    LaunchState& launch = *self->launch;
    if (!launch.stopped) {
        launch.stopped = true;
        launch.message = text.str();
    }
    throw Stop{};
}

// ---- clocks

inline uint32_t Lane(const Core& core, uint32_t pipe) { return core.index * PIPES + pipe; }

// What is known once everything `pipe` has been given is complete.
inline Clock Completed(const Core& core, uint32_t pipe) {
    Clock clock = core.clocks[pipe];
    clock[Lane(core, pipe)] = core.issued[pipe];
    return clock;
}

inline bool HasPipe(Kind kind, uint32_t pipe) {
    if (pipe == PIPE_V || pipe == PIPE_MTE3) return kind == Kind::AIV;
    if (pipe == PIPE_M || pipe == PIPE_MTE1 || pipe == PIPE_FIX) return kind == Kind::AIC;
    return true;
}

inline void RequirePipe(uint32_t pipe, const char* name) {
    if (!HasPipe(self->kind, pipe)) {
        Fail("CORE-PIPE", "got ", name, " on pipe ", PipeName(pipe), ", expected a core that has this pipe; guard it with ",
             pipe == PIPE_V || pipe == PIPE_MTE3 ? "ASCEND_IS_AIV" : "ASCEND_IS_AIC");
    }
}

// An instruction being executed: the identity its accesses leave behind.
struct Access {
    const char* name;
    uint32_t pipe;
    uint32_t record;
    uint32_t lastOrdered = 0;                        // the record found ordered most recently
    uint32_t readersBefore = ~0u, readersAfter = 0;  // the set of readers this access was added to most recently, and the result
};

inline Access Begin(pipe_t pipe, const char* name) {
    RequirePipe(pipe, name);
    Core& core = *self;
    core.launch->records.push_back(Record{name, core.index, pipe, ++core.issued[pipe]});
    return Access{name, pipe, static_cast<uint32_t>(core.launch->records.size() - 1)};
}

inline std::string Describe(uint32_t record) {
    const Record& other = self->launch->records[record];
    std::ostringstream text;
    text << other.name << " on ";
    if (other.core != self->index) text << Place(*self->launch->cores[other.core]) << " ";
    text << "pipe " << PipeName(other.pipe) << " (instruction " << other.time << ")";
    return text.str();
}

enum class Conflict : uint8_t { ReadAfterWrite, WriteAfterRead, WriteAfterWrite };

inline bool Ordered(const Access& access, uint32_t earlier, Conflict conflict) {
    const Record& other = self->launch->records[earlier];
    const uint32_t lane = other.core * PIPES + other.pipe;
    if (self->clocks[access.pipe][lane] >= other.time) return true;
    // One pipe reads the operands of its instructions in order; the scalar unit also completes in order.
    return lane == Lane(*self, access.pipe) && (access.pipe == PIPE_S || conflict == Conflict::WriteAfterRead);
}

// Raises unless `earlier` is known to be complete when this access happens.
inline void RequireOrder(Access& access, uint32_t earlier, Conflict conflict, const char* where, uint64_t offset) {
    if (earlier == 0 || earlier == access.record || earlier == access.lastOrdered) return;
    if (Ordered(access, earlier, conflict)) {
        if (conflict != Conflict::WriteAfterRead) access.lastOrdered = earlier;
        return;
    }
    const Record& other = self->launch->records[earlier];
    const char* const got = conflict == Conflict::ReadAfterWrite   ? " reads what an unfinished write may still change: "
                            : conflict == Conflict::WriteAfterRead ? " overwrites what an unfinished read may still need: "
                                                                   : " overwrites an unfinished write: ";
    if (other.core != self->index) {
        Fail("SYNC-CROSS-CORE", "got ", access.name, " on pipe ", PipeName(access.pipe), got, Describe(earlier),
             ", expected a CrossCoreSetFlag on the pipe of that access and a CrossCoreWaitFlag before this one, at ", where,
             " byte ", offset);
    }
    if (other.pipe == access.pipe) {
        Fail("SYNC-SAME-PIPE", "got ", access.name, " on pipe ", PipeName(access.pipe), got, Describe(earlier),
             ", expected PipeBarrier<PIPE_", PipeName(access.pipe), "> between dependent instructions, at ", where, " byte ",
             offset);
    }
    const char* const expected = ", expected SetFlag and WaitFlag of HardEvent ";
    if (conflict == Conflict::ReadAfterWrite) {
        Fail("SYNC-READ", "got ", access.name, " on pipe ", PipeName(access.pipe), got, Describe(earlier), expected,
             PipeName(other.pipe), "_", PipeName(access.pipe), " between them, at ", where, " byte ", offset);
    }
    Fail("SYNC-WRITE", "got ", access.name, " on pipe ", PipeName(access.pipe), got, Describe(earlier), expected,
         PipeName(other.pipe), "_", PipeName(access.pipe), " between them, at ", where, " byte ", offset);
}

// ---- flags and barriers inside a core

struct EventPipes {
    pipe_t source, destination;
};

inline Flag& FlagOf(EventPipes event, int64_t id) {
    if (id < 0 || id >= static_cast<int64_t>(EVENT_IDS)) {
        Fail("FLAG-ID", "got event id ", id, " for ", PipeName(event.source), "_", PipeName(event.destination),
             ", expected 0 to 7");
    }
    return self->flags[(event.source * PIPES + event.destination) * EVENT_IDS + static_cast<uint32_t>(id)];
}

inline void SetEvent(EventPipes event, int64_t id) {
    Flag& flag = FlagOf(event, id);
    RequirePipe(event.source, "SetFlag");
    RequirePipe(event.destination, "SetFlag");
    if (flag.set) {
        Fail("FLAG-SET-TWICE", "got a second SetFlag of ", PipeName(event.source), "_", PipeName(event.destination), " id ", id,
             ", expected its WaitFlag first; the flag is one bit");
    }
    flag.set = true;
    flag.clock = Completed(*self, event.source);
}

inline void WaitEvent(EventPipes event, int64_t id) {
    Flag& flag = FlagOf(event, id);
    if (!flag.set) {
        Fail("FLAG-UNSET", "got WaitFlag of ", PipeName(event.source), "_", PipeName(event.destination), " id ", id,
             " with no SetFlag before it, expected a pair; the pipe would wait for ever");
    }
    flag.set = false;
    Join(self->clocks[event.destination], flag.clock);
}

inline void Barrier(pipe_t pipe) {
    Core& core = *self;
    if (pipe == PIPE_S)
        Fail("BARRIER-SCALAR", "got PipeBarrier<PIPE_S>, expected another pipe; the device raises a hardware error");
    if (pipe != PIPE_ALL) {
        RequirePipe(pipe, "PipeBarrier");
        core.clocks[pipe][Lane(core, pipe)] = core.issued[pipe];
        return;
    }
    Clock all(core.clocks[0].size(), 0);
    for (uint32_t p = 0; p < PIPES; ++p) Join(all, Completed(core, p));
    for (uint32_t p = 0; p < PIPES; ++p) core.clocks[p] = all;
}

// ---- the launch's one running core

// Chooses the next core after `from` that can go on; called with the mutex held. False: none can, and not all are done.
inline bool PassOn(LaunchState& launch, uint32_t from) {
    const uint32_t count = static_cast<uint32_t>(launch.cores.size());
    bool waiting = false;
    for (uint32_t step = 1; step <= count; ++step) {
        Core& core = *launch.cores[(from + step) % count];
        if (core.activity == Activity::Done) continue;
        if (core.activity == Activity::Ready || launch.stopped || !core.arrived[core.awaited].empty()) {
            launch.running = core.index;
            core.wake.notify_one();
            return true;
        }
        waiting = true;
    }
    if (waiting) return false;
    launch.running = -1;
    launch.idle.notify_one();
    return true;
}

inline void AwaitTurn(Core& core, std::unique_lock<std::mutex>& lock) {
    core.wake.wait(lock, [&core] { return core.launch->running == static_cast<int64_t>(core.index); });
}

// Sets the message of a launch nobody can continue.
inline void ReportDeadlock(LaunchState& launch) {
    std::ostringstream text;
    text << "SYNC-DEADLOCK: got a launch in which no core can continue:";
    uint32_t listed = 0;
    for (const auto& core : launch.cores) {
        if (core->activity != Activity::Waiting) continue;
        if (++listed <= 4) text << (listed == 1 ? " " : "; ") << Place(*core) << " waits for cross-core flag " << core->awaited;
    }
    if (listed > 4) text << "; " << listed - 4 << " more wait";
    text << ", expected as many sets as waits of each flag (kernel " << launch.kernel << ")";
    launch.stopped = true;
    launch.message = text.str();
}

inline void Suspend(uint32_t flag) {
    Core& core = *self;
    LaunchState& launch = *core.launch;
    std::unique_lock<std::mutex> lock(launch.mutex);
    core.activity = Activity::Waiting;
    core.awaited = flag;
    if (!PassOn(launch, core.index)) {
        ReportDeadlock(launch);
        PassOn(launch, core.index);
    }
    AwaitTurn(core, lock);
    core.activity = Activity::Ready;
    if (launch.stopped) throw Stop{};
}

// ---- flags between cores (910B: one counter per flag and core; the wait stops every pipe of the core)

inline void Arrive(Core& core, uint32_t flag, const Clock& clock) {
    core.arrived[flag].push_back(clock);
    if (core.arrived[flag].size() > CROSS_LIMIT) {
        Fail("CROSS-COUNT", "got ", core.arrived[flag].size(), " sets of cross-core flag ", flag, " that ", Place(core),
             " has not waited for, expected at most 15");
    }
}

inline void CheckCrossFlag(uint64_t flag) {
    if (flag >= CROSS_FLAGS) Fail("CROSS-ID", "got cross-core flag id ", flag, ", expected 0 to 10");
}

inline void CrossSet(uint32_t mode, pipe_t pipe, uint64_t flag) {
    CheckCrossFlag(flag);
    Core& core = *self;
    LaunchState& launch = *core.launch;
    Clock clock = Completed(core, pipe == PIPE_ALL ? PIPE_S : pipe);
    if (pipe == PIPE_ALL) {
        for (uint32_t p = 0; p < PIPES; ++p) Join(clock, Completed(core, p));
    } else {
        RequirePipe(pipe, "CrossCoreSetFlag");
    }
    if (mode > 2 || (mode != 0 && launch.mode != Mode::MIX_AIC_1_2) || (mode == 1 && core.kind == Kind::AIC)) {
        Fail("CROSS-MODE", "got CrossCoreSetFlag in mode ", mode,
             ", expected 0 (cores of one kind), 1 (the two AIV of a block, on an AIV) or 2 (AIC and AIV of a mixed block)");
    }
    if (mode == 2 && core.kind == Kind::AIC) {
        for (uint32_t v = 1; v <= 2; ++v) Arrive(*launch.cores[core.index + v], static_cast<uint32_t>(flag), clock);
        return;
    }
    // A group set: every member must have set before anyone is released.
    std::vector<Core*> members, released;
    for (const auto& other : launch.cores) {
        const bool sibling = other->block == core.block && other->kind == Kind::AIV;
        if (mode == 0 ? other->kind == core.kind : sibling) members.push_back(other.get());
        if (mode == 2 && other->block == core.block && other->kind == Kind::AIC) released.push_back(other.get());
    }
    if (mode != 2) released = members;
    std::deque<Clock>& mine = core.sent[flag][mode];
    mine.push_back(clock);
    if (mine.size() > CROSS_LIMIT) {
        Fail("CROSS-COUNT", "got ", mine.size(), " sets of cross-core flag ", flag,
             " that the other cores of its group have not matched, expected at most 15");
    }
    for (Core* member : members) {
        if (member->sent[flag][mode].empty()) return;
    }
    for (Core* member : members) {
        Join(clock, member->sent[flag][mode].front());
        member->sent[flag][mode].pop_front();
    }
    for (Core* other : released) Arrive(*other, static_cast<uint32_t>(flag), clock);
}

inline void CrossWait(uint64_t flag) {
    CheckCrossFlag(flag);
    Core& core = *self;
    while (core.arrived[flag].empty()) Suspend(static_cast<uint32_t>(flag));
    for (uint32_t p = 0; p < PIPES; ++p) Join(core.clocks[p], core.arrived[flag].front());
    core.arrived[flag].pop_front();
}

}  // namespace lowbit
