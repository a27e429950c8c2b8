// Runs a program by name: as a library called by ctypes, or (LOWBIT_MAIN) as a process that runs every program once without a
// fault and once with each, for the sanitizers.
#include "launch.h"

#include "casts.cpp"
#include "copies.cpp"
#include "cross.cpp"
#include "cube.cpp"
#include "flags.cpp"
#include "queues.cpp"
#include "vectors.cpp"

namespace {

struct Program {
    const char* name;
    void (*kernel)(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR);
    lowbit::Mode mode;
    uint32_t faults;
};

constexpr Program PROGRAMS[] = {
    {"flags", flags, lowbit::Mode::AIV, flags_fault::SECOND_PIPE},
    {"queues", queues, lowbit::Mode::AIV, queues_fault::NEVER_WRITTEN},
    {"copies", copies, lowbit::Mode::AIV, copies_fault::SCALAR_TOO_EARLY},
    {"vectors", vectors, lowbit::Mode::AIV, vectors_fault::REDUCED_UNALIGNED},
    {"casts", casts, lowbit::Mode::AIV, 0},
    {"cube", cube, lowbit::Mode::AIC, cube_fault::NO_MATRIX_STRIDE},
    {"cross", cross, lowbit::Mode::MIX_AIC_1_2, cross_fault::WRONG_PIPE},
};

}  // namespace

// `mode` 0 to 2 overrides the program's own, -1 does not. -1 is also returned for an unknown name.
extern "C" int lowbit_program(const char* name, int32_t mode, uint32_t blocks, const lowbit::Buffer* buffers, size_t count,
                              char* message, size_t message_size)
{
    for (const Program& program : PROGRAMS) {
        if (std::strcmp(program.name, name) != 0) continue;
        const lowbit::Mode chosen = mode < 0 ? program.mode : static_cast<lowbit::Mode>(mode);
        return lowbit::Launch(program.kernel, chosen, blocks, buffers, count, message, message_size);
    }
    return -1;
}

#ifdef LOWBIT_MAIN
int main()
{
    std::vector<uint8_t> in(65536, 0), out(65536, 0), space(65536, 0);
    for (const Program& program : PROGRAMS) {
        for (uint32_t fault = 0; fault <= program.faults; ++fault) {
            const bool cube = std::strcmp(program.name, "cube") == 0, copies = std::strcmp(program.name, "copies") == 0;
            Tiling tiling = {fault, copies ? 3u : 20u, cube ? 24u : 0u, 64u, cube ? 2u : 0u};
            const lowbit::Buffer buffers[] = {{in.data(), in.size(), 5, 0},
                                              {out.data(), out.size(), 2, 0},
                                              {space.data(), space.size(), 3, 0},
                                              {&tiling, sizeof tiling, 5, 0}};
            char message[512] = "";
            const int broken = lowbit::Launch(program.kernel, program.mode, program.mode == lowbit::Mode::MIX_AIC_1_2 ? 2 : 1,
                                              buffers, 4, message, sizeof message);
            std::printf("%s %u %d %s\n", program.name, fault, broken, message);
        }
    }
    return 0;
}
#endif
