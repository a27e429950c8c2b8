// TPipe, TQue and TBuf: who owns which bytes of a local memory, and the flags a queue sets for its user.
#pragma once

#include "tensor.h"

namespace AscendC {

enum class HardEvent : uint8_t {
    MTE2_MTE1,
    MTE1_MTE2,
    MTE1_M,
    M_MTE1,
    MTE2_V,
    V_MTE2,
    MTE3_V,
    V_MTE3,
    M_V,
    V_M,
    MTE3_MTE2,
    MTE2_MTE3,
    S_V,
    V_S,
    S_MTE2,
    MTE2_S,
    S_MTE3,
    MTE3_S,
    M_FIX,
    FIX_M,
    MTE1_FIX,
    FIX_MTE1,
    FIX_MTE2,
    MTE2_FIX,
    S_M,
    M_S,
    S_MTE1,
    MTE1_S,
    S_FIX,
    FIX_S,
    COUNT
};

}  // namespace AscendC

namespace lowbit {

using AscendC::HardEvent;

inline EventPipes PipesOf(HardEvent event) {
    static constexpr EventPipes table[] = {
        {PIPE_MTE2, PIPE_MTE1}, {PIPE_MTE1, PIPE_MTE2}, {PIPE_MTE1, PIPE_M},   {PIPE_M, PIPE_MTE1},   {PIPE_MTE2, PIPE_V},
        {PIPE_V, PIPE_MTE2},    {PIPE_MTE3, PIPE_V},    {PIPE_V, PIPE_MTE3},   {PIPE_M, PIPE_V},      {PIPE_V, PIPE_M},
        {PIPE_MTE3, PIPE_MTE2}, {PIPE_MTE2, PIPE_MTE3}, {PIPE_S, PIPE_V},      {PIPE_V, PIPE_S},      {PIPE_S, PIPE_MTE2},
        {PIPE_MTE2, PIPE_S},    {PIPE_S, PIPE_MTE3},    {PIPE_MTE3, PIPE_S},   {PIPE_M, PIPE_FIX},    {PIPE_FIX, PIPE_M},
        {PIPE_MTE1, PIPE_FIX},  {PIPE_FIX, PIPE_MTE1},  {PIPE_FIX, PIPE_MTE2}, {PIPE_MTE2, PIPE_FIX}, {PIPE_S, PIPE_M},
        {PIPE_M, PIPE_S},       {PIPE_S, PIPE_MTE1},    {PIPE_MTE1, PIPE_S},   {PIPE_S, PIPE_FIX},    {PIPE_FIX, PIPE_S},
    };
    static_assert(sizeof table / sizeof table[0] == static_cast<size_t>(HardEvent::COUNT));
    return table[static_cast<size_t>(event)];
}

inline Memory& MemoryOf(TPosition position) {
    Core& core = *self;
    Memory* memory = nullptr;
    switch (position) {
        case TPosition::A1:
        case TPosition::B1: memory = core.l1.get(); break;
        case TPosition::A2: memory = core.l0a.get(); break;
        case TPosition::B2: memory = core.l0b.get(); break;
        case TPosition::CO1: memory = core.l0c.get(); break;
        case TPosition::VECIN:
        case TPosition::VECOUT:
        case TPosition::VECCALC: memory = core.ub.get(); break;
        default: break;
    }
    if (memory == nullptr) {
        Fail("CORE-MEMORY", "got a buffer at TPosition ", static_cast<uint32_t>(position), " on an ",
             core.kind == Kind::AIC ? "AIC" : "AIV",
             ", expected a memory this core has: L1, L0A, L0B, L0C on an AIC, UB on an AIV");
    }
    return *memory;
}

// The next `bytes` bytes of a memory, rounded up to whole data blocks.
inline Span TakeBuffer(TPosition position, uint64_t bytes) {
    Memory& memory = MemoryOf(position);
    const uint64_t whole = (bytes + BLOCK - 1) / BLOCK * BLOCK;
    if (memory.used + whole > memory.bytes) {
        Fail("MEMORY-OVERFLOW", "got ", memory.used + whole, " bytes of buffers in ", memory.name, ", expected at most ",
             memory.bytes);
    }
    if (++self->buffers > 64) Fail("BUFFER-COUNT", "got a 65th buffer, expected at most 64 on one TPipe");
    const uint32_t begin = memory.used;
    memory.used += static_cast<uint32_t>(whole);
    return Span{&memory, begin, begin, begin + static_cast<uint32_t>(whole)};
}

inline uint8_t& ReservedIds(HardEvent event) { return self->reserved[static_cast<size_t>(event)]; }

inline int32_t FreeId(HardEvent event) {
    for (uint32_t id = 0; id < EVENT_IDS; ++id) {
        if ((ReservedIds(event) >> id & 1u) == 0) return static_cast<int32_t>(id);
    }
    Fail("EVENT-EXHAUSTED", "got a request for a ninth event id of ", PipeName(PipesOf(event).source), "_",
         PipeName(PipesOf(event).destination), ", expected at most 8 in use");
}

inline int32_t TakeId(HardEvent event) {
    const int32_t id = FreeId(event);
    ReservedIds(event) = static_cast<uint8_t>(ReservedIds(event) | 1u << id);
    return id;
}

inline void GiveBackId(HardEvent event, int32_t id) {
    ReservedIds(event) = static_cast<uint8_t>(ReservedIds(event) & ~(1u << id));
}

// The two flags of a queue: data are there, and the buffer may be filled again.
struct QueueEvents {
    HardEvent filled, drained;
};

constexpr QueueEvents EventsOf(TPosition position) {
    switch (position) {
        case TPosition::A1:
        case TPosition::B1: return {HardEvent::MTE2_MTE1, HardEvent::MTE1_MTE2};
        case TPosition::A2:
        case TPosition::B2: return {HardEvent::MTE1_M, HardEvent::M_MTE1};
        case TPosition::CO1: return {HardEvent::M_FIX, HardEvent::FIX_M};
        case TPosition::VECOUT: return {HardEvent::V_MTE3, HardEvent::MTE3_V};
        default: return {HardEvent::MTE2_V, HardEvent::V_MTE2};
    }
}

inline void FullMask() { self->mask = MaskRegister{}; }

enum class Holding : uint8_t { Free, Allocated, Queued };

struct QueueBuffer {
    Span span;
    Holding holding = Holding::Free;
    int32_t filled = -1;   // event id of the EnQue, -1: none
    int32_t drained = -1;  // event id of the FreeTensor, -1: none
};

}  // namespace lowbit

namespace AscendC {

template <HardEvent event>
void SetFlag(int32_t id) {
    lowbit::SetEvent(lowbit::PipesOf(event), id);
}

template <HardEvent event>
void WaitFlag(int32_t id) {
    lowbit::WaitEvent(lowbit::PipesOf(event), id);
}

template <pipe_t pipe>
void PipeBarrier() {
    lowbit::Barrier(pipe);
}

template <TPosition position>
class TBuf {
public:
    template <class T>
    LocalTensor<T> Get() const {
        return LocalTensor<T>(span, uint64_t{8} * (span.end - span.begin) / lowbit::BITS<T>);
    }

    template <class T>
    LocalTensor<T> Get(uint32_t count) const {
        return GetWithOffset<T>(count, 0);
    }

    // `offset` in bytes.
    template <class T>
    LocalTensor<T> GetWithOffset(uint32_t count, uint32_t offset) const {
        lowbit::Span part = span;
        part.offset += offset;
        lowbit::RequireAlignment(part, lowbit::BLOCK, "TBuf::Get", "a tensor");
        part.begin = part.offset;
        part.end = lowbit::Inside(span, offset, lowbit::BytesOf<T>(count), "TBuf::Get") +
                   static_cast<uint32_t>(lowbit::BytesOf<T>(count));
        return LocalTensor<T>(part, count);
    }

    lowbit::Span span;
};

template <TPosition position, int32_t depth>
class TQue {
    static_assert(position == TPosition::VECIN || position == TPosition::VECOUT || position == TPosition::A1 ||
                  position == TPosition::B1 || position == TPosition::A2 || position == TPosition::B2 ||
                  position == TPosition::CO1);
    static_assert(depth >= 1);

public:
    TQue() = default;
    TQue(const TQue&) = delete;
    TQue& operator=(const TQue&) = delete;

    // The framework drains what FreeTensor announced; tensors the kernel still holds are its own fault.
    ~TQue() {
        if (owner == nullptr) return;
        for (lowbit::QueueBuffer& buffer : buffers) {
            if (buffer.drained >= 0) lowbit::FlagOf(lowbit::PipesOf(events.drained), buffer.drained).set = false;
            if (buffer.filled >= 0) lowbit::FlagOf(lowbit::PipesOf(events.filled), buffer.filled).set = false;
            if (buffer.holding != lowbit::Holding::Free && owner->leftover.empty()) {
                owner->leftover =
                    buffer.holding == lowbit::Holding::Queued ? "a tensor still in a queue" : "a tensor never freed";
            }
        }
    }

    void Init(uint64_t count, uint64_t bytes) {
        owner = lowbit::self;
        for (uint64_t i = 0; i < count; ++i) buffers.push_back(lowbit::QueueBuffer{lowbit::TakeBuffer(position, bytes)});
    }

    template <class T>
    LocalTensor<T> AllocTensor() {
        for (lowbit::QueueBuffer& buffer : buffers) {
            lowbit::QueueBuffer& next = buffers[(cursor + static_cast<size_t>(&buffer - buffers.data())) % buffers.size()];
            if (next.holding != lowbit::Holding::Free) continue;
            cursor = static_cast<size_t>(&next - buffers.data()) + 1;
            next.holding = lowbit::Holding::Allocated;
            if (next.drained >= 0) {
                lowbit::WaitEvent(lowbit::PipesOf(events.drained), next.drained);
                lowbit::GiveBackId(events.drained, next.drained);
                next.drained = -1;
            }
            return LocalTensor<T>(next.span, uint64_t{8} * (next.span.end - next.span.begin) / lowbit::BITS<T>);
        }
        lowbit::Fail("QUEUE-ALLOC", "got AllocTensor with all ", buffers.size(),
                     " buffers of the queue in use, expected a FreeTensor first");
    }

    template <class T>
    bool EnQue(const LocalTensor<T>& tensor) {
        lowbit::QueueBuffer& buffer = BufferOf(tensor.span, lowbit::Holding::Allocated, "EnQue");
        if (queued.size() == static_cast<size_t>(depth)) {
            lowbit::Fail("QUEUE-DEPTH", "got EnQue on a queue that holds ", queued.size(), ", expected at most its depth ",
                         depth);
        }
        buffer.filled = lowbit::TakeId(events.filled);
        lowbit::SetEvent(lowbit::PipesOf(events.filled), buffer.filled);
        buffer.holding = lowbit::Holding::Queued;
        queued.push_back(static_cast<size_t>(&buffer - buffers.data()));
        return true;
    }

    template <class T>
    LocalTensor<T> DeQue() {
        if (queued.empty()) lowbit::Fail("QUEUE-EMPTY", "got DeQue of an empty queue, expected an EnQue before it");
        lowbit::QueueBuffer& buffer = buffers[queued.front()];
        queued.pop_front();
        lowbit::WaitEvent(lowbit::PipesOf(events.filled), buffer.filled);
        lowbit::GiveBackId(events.filled, buffer.filled);
        buffer.filled = -1;
        buffer.holding = lowbit::Holding::Allocated;
        return LocalTensor<T>(buffer.span, uint64_t{8} * (buffer.span.end - buffer.span.begin) / lowbit::BITS<T>);
    }

    template <class T>
    void FreeTensor(LocalTensor<T>& tensor) {
        lowbit::QueueBuffer& buffer = BufferOf(tensor.span, lowbit::Holding::Allocated, "FreeTensor");
        buffer.drained = lowbit::TakeId(events.drained);
        lowbit::SetEvent(lowbit::PipesOf(events.drained), buffer.drained);
        buffer.holding = lowbit::Holding::Free;
    }

private:
    lowbit::QueueBuffer& BufferOf(const lowbit::Span& span, lowbit::Holding holding, const char* name) {
        for (lowbit::QueueBuffer& buffer : buffers) {
            if (buffer.span.memory != span.memory || buffer.span.begin != span.begin || buffer.holding != holding) continue;
            return buffer;
        }
        lowbit::Fail("QUEUE-TENSOR", "got ", name,
                     " of a tensor this queue has not handed out, expected one from its AllocTensor or DeQue");
    }

    static constexpr lowbit::QueueEvents events = lowbit::EventsOf(position);
    lowbit::Core* owner = nullptr;
    std::vector<lowbit::QueueBuffer> buffers;
    std::deque<size_t> queued;
    size_t cursor = 0;
};

class TPipe {
public:
    TPipe();
    ~TPipe();
    TPipe(const TPipe&) = delete;
    TPipe& operator=(const TPipe&) = delete;

    template <TPosition position, int32_t depth>
    bool InitBuffer(TQue<position, depth>& queue, lowbit::Bits<8> count, lowbit::Bits<32> bytes) {
        queue.Init(count, bytes);
        return true;
    }

    template <TPosition position>
    bool InitBuffer(TBuf<position>& buffer, lowbit::Bits<32> bytes) {
        buffer.span = lowbit::TakeBuffer(position, bytes);
        return true;
    }

    int32_t FetchEventID(HardEvent event) { return lowbit::FreeId(event); }

    template <HardEvent event>
    int32_t AllocEventID() {
        return lowbit::TakeId(event);
    }

    template <HardEvent event>
    void ReleaseEventID(int32_t id) {
        lowbit::GiveBackId(event, id);
    }
};

inline thread_local TPipe* currentPipe = nullptr;

// Events M_MTE1 0 to 2 of a cube core belong to the framework: its constructor sets them, its destructor waits for them.
constexpr int32_t PIPE_EVENTS = 3;

inline TPipe::TPipe() {
    if (currentPipe != nullptr)
        lowbit::Fail("TPIPE-SECOND", "got a second TPipe on one core, expected one: both would hand out the same bytes");
    currentPipe = this;
    lowbit::FullMask();
    if (lowbit::self->kind == lowbit::Kind::AIV) return;
    for (int32_t i = 0; i < PIPE_EVENTS; ++i)
        lowbit::SetEvent(lowbit::PipesOf(HardEvent::M_MTE1), lowbit::TakeId(HardEvent::M_MTE1));
}

inline TPipe::~TPipe() {
    currentPipe = nullptr;
    if (lowbit::self->kind == lowbit::Kind::AIV) return;
    for (int32_t i = 0; i < PIPE_EVENTS; ++i) {
        lowbit::Flag& flag = lowbit::FlagOf(lowbit::PipesOf(HardEvent::M_MTE1), i);
        lowbit::self->drained = lowbit::self->drained || !flag.set;
        flag.set = false;
        lowbit::GiveBackId(HardEvent::M_MTE1, i);
    }
}

inline TPipe* GetTPipePtr() { return currentPipe; }

template <uint8_t modeId, pipe_t pipe>
void CrossCoreSetFlag(uint16_t flagId) {
    lowbit::CrossSet(modeId, pipe, flagId);
}

template <uint8_t modeId = 0, pipe_t pipe = PIPE_S>
void CrossCoreWaitFlag(uint16_t flagId) {
    lowbit::CrossWait(flagId);
}

inline int64_t GetBlockIdx() {
    const lowbit::Core& core = *lowbit::self;
    const bool vectors = core.launch->mode == lowbit::Mode::MIX_AIC_1_2 && core.kind == lowbit::Kind::AIV;
    return vectors ? int64_t{core.block} * 2 + core.sub : core.block;
}

inline int64_t GetBlockNum() { return lowbit::self->launch->blocks; }
inline int64_t GetSubBlockIdx() { return lowbit::self->sub; }

// Vector cores of one block: the ratio of the launch.
inline int64_t GetSubBlockNum() {
    return lowbit::self->launch->mode == lowbit::Mode::MIX_AIC_1_2 && lowbit::self->kind == lowbit::Kind::AIV ? 2 : 1;
}
inline int64_t GetTaskRation() { return GetSubBlockNum(); }

}  // namespace AscendC
