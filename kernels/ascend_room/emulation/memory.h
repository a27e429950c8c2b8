// The memories of a 910B core and the global buffers of a launch, each with what must be known to refuse a bad access:
// which bytes were ever written, and who touched them last.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "half.h"
#include "pipes.h"

namespace lowbit {

constexpr uint32_t BLOCK = 32;  // bytes of a data block, the unit of every local transfer
constexpr uint32_t FRACTAL = 512;
constexpr uint8_t POISON = 0xDB;

// Sizes of Atlas A2 (910B). The framework keeps 128 bytes of L1 to itself.
constexpr uint32_t UB_BYTES = 192 * 1024;
constexpr uint32_t L1_BYTES = 512 * 1024 - 128;
constexpr uint32_t L0A_BYTES = 64 * 1024;
constexpr uint32_t L0B_BYTES = 64 * 1024;
constexpr uint32_t L0C_BYTES = 128 * 1024;

struct Stamp {
    uint32_t writer = 0;
    uint32_t readers[PIPES] = {};
    uint32_t pipes = 0;  // bit p: readers[p] has read since the last write
};

struct Memory {
    const char* name;
    uint32_t bytes;
    uint32_t used = 0;  // handed out by InitBuffer
    std::vector<uint8_t> data, valid;
    std::vector<Stamp> stamps;

    Memory(const char* name, uint32_t bytes)
        : name(name), bytes(bytes), data(bytes, POISON), valid(bytes, 0), stamps(bytes / BLOCK) {}
};

inline void MarkRead(Memory& memory, uint32_t offset, uint32_t bytes, Access& access) {
    for (uint32_t b = offset / BLOCK; b <= (offset + bytes - 1) / BLOCK; ++b) {
        Stamp& stamp = memory.stamps[b];
        RequireOrder(access, stamp.writer, Conflict::ReadAfterWrite, memory.name, b * BLOCK);
        stamp.readers[access.pipe] = access.record;
        stamp.pipes |= 1u << access.pipe;
    }
}

// Once: no other write of the same instruction may have reached the block.
inline void MarkWrite(Memory& memory, uint32_t offset, uint32_t bytes, Access& access, bool once) {
    for (uint32_t b = offset / BLOCK; b <= (offset + bytes - 1) / BLOCK; ++b) {
        Stamp& stamp = memory.stamps[b];
        if (once && stamp.writer == access.record) {
            Fail("COPY-OVERLAP", "got ", access.name, " writing ", memory.name, " byte ", b * BLOCK,
                 " twice, expected destination rows that do not overlap");
        }
        // Readers first: they came after the writer, so the flag that is missing is theirs.
        for (uint32_t left = stamp.pipes, p = 0; left != 0; left >>= 1, ++p) {
            if ((left & 1u) != 0) {
                RequireOrder(access, stamp.readers[p], Conflict::WriteAfterRead, memory.name, b * BLOCK);
            }
        }
        RequireOrder(access, stamp.writer, Conflict::WriteAfterWrite, memory.name, b * BLOCK);
        stamp.writer = access.record;
        stamp.pipes = 0;
    }
}

inline void RequireValid(const Memory& memory, uint32_t offset, uint32_t bytes, const Access& access) {
    const void* hole = std::memchr(memory.valid.data() + offset, 0, bytes);
    if (hole != nullptr) {
        Fail("UNINIT-LOCAL", "got ", access.name, " on pipe ", PipeName(access.pipe), " reading ", memory.name, " byte ",
             static_cast<const uint8_t*>(hole) - memory.valid.data(), " that nothing has written, expected initialised data");
    }
}

// A read whose every byte must have been written.
inline const uint8_t* ReadLocal(Memory& memory, uint32_t offset, uint32_t bytes, Access& access) {
    MarkRead(memory, offset, bytes, access);
    RequireValid(memory, offset, bytes, access);
    return memory.data.data() + offset;
}

inline uint8_t* WriteLocal(Memory& memory, uint32_t offset, uint32_t bytes, Access& access, bool once) {
    MarkWrite(memory, offset, bytes, access, once);
    std::memset(memory.valid.data() + offset, 1, bytes);
    return memory.data.data() + offset;
}

// Bytes whose content the device leaves undefined: reading them is an error until something writes them.
inline void Invalidate(Memory& memory, uint32_t offset, uint32_t bytes) {
    std::memset(memory.valid.data() + offset, 0, bytes);
    std::memset(memory.data.data() + offset, POISON, bytes);
}

// ---- global memory

inline Region& RegionOf(const void* pointer, uint64_t bytes, const Access& access) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    for (Region& region : self->launch->regions) {
        const auto base = reinterpret_cast<uintptr_t>(region.data);
        if (address < base || address >= base + region.bytes) continue;
        if (bytes > region.bytes - (address - base)) {
            Fail("GM-RANGE", "got ", access.name, " of bytes ", address - base, " to ", address - base + bytes, " of argument ",
                 region.argument, ", expected at most its ", region.bytes, " bytes");
        }
        return region;
    }
    Fail("GM-RANGE", "got ", access.name, " of ", bytes,
         " bytes outside every argument of the launch, expected an address inside one");
}

// The set of readers that results when this access reads after `set`. Readers it comes after are dropped: who is ordered after
// this access is ordered after them.
inline uint32_t AddReader(uint32_t set, const Access& access) {
    LaunchState& launch = *self->launch;
    std::vector<uint32_t> next;
    for (uint32_t reader : launch.readers[set]) {
        if (reader == access.record) return set;
        if (!Ordered(access, reader, Conflict::WriteAfterRead)) next.push_back(reader);
    }
    next.push_back(access.record);
    launch.readers.push_back(std::move(next));
    return static_cast<uint32_t>(launch.readers.size() - 1);
}

inline const uint8_t* ReadGlobal(const void* pointer, uint64_t bytes, Access& access) {
    Region& region = RegionOf(pointer, bytes, access);
    const uint64_t first = static_cast<uint64_t>(static_cast<const uint8_t*>(pointer) - region.data);
    if (!region.readable) {
        Fail("GM-READ", "got ", access.name, " reading argument ", region.argument,
             ", expected a buffer the launch declares readable");
    }
    if (!region.valid.empty()) {
        const void* hole = std::memchr(region.valid.data() + first, 0, bytes);
        if (hole != nullptr) {
            Fail("UNINIT-GM", "got ", access.name, " reading byte ", static_cast<const uint8_t*>(hole) - region.valid.data(),
                 " of argument ", region.argument, " that nothing has written, expected initialised data");
        }
    }
    if (region.marks) {
        uint32_t writer = 0;
        for (uint64_t i = first; i < first + bytes; ++i) {
            Mark& mark = region.marks[i];
            if (mark.writer != writer) {
                RequireOrder(access, mark.writer, Conflict::ReadAfterWrite, "GM", i);
                writer = mark.writer;
            }
            if (mark.readers != access.readersBefore) {
                access.readersBefore = mark.readers;
                access.readersAfter = AddReader(mark.readers, access);
            }
            mark.readers = access.readersAfter;
        }
    }
    return region.data + first;
}

inline uint8_t* WriteGlobal(void* pointer, uint64_t bytes, Access& access) {
    Region& region = RegionOf(pointer, bytes, access);
    const uint64_t first = static_cast<uint64_t>(static_cast<uint8_t*>(pointer) - region.data);
    if (!region.writable) {
        Fail("GM-WRITE", "got ", access.name, " writing argument ", region.argument,
             ", expected a buffer the launch declares writable");
    }
    uint32_t writer = 0, readers = 0;
    for (uint64_t i = first; i < first + bytes; ++i) {
        Mark& mark = region.marks[i];
        if (mark.writer == access.record) {
            Fail("COPY-OVERLAP", "got ", access.name, " writing byte ", i, " of argument ", region.argument,
                 " twice, expected destination rows that do not overlap");
        }
        if (mark.readers != readers) {
            readers = mark.readers;
            for (uint32_t reader : self->launch->readers[readers]) {
                RequireOrder(access, reader, Conflict::WriteAfterRead, "GM", i);
            }
        }
        if (mark.writer != writer) {
            RequireOrder(access, mark.writer, Conflict::WriteAfterWrite, "GM", i);
            writer = mark.writer;
        }
        mark = Mark{access.record, 0};
    }
    if (!region.valid.empty()) std::memset(region.valid.data() + first, 1, bytes);
    return region.data + first;
}

}  // namespace lowbit
