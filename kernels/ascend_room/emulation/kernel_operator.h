// The AscendC names the kernels use, for g++ on the host. Semantics follow the documentation of Atlas A2 (910B); rules.py lists
// every rule that is enforced here, with its source.
#pragma once

#include "cube.h"
#include "vector.h"

#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR uint8_t*

#define ASCEND_IS_AIC (::lowbit::self->kind == ::lowbit::Kind::AIC)
#define ASCEND_IS_AIV (::lowbit::self->kind == ::lowbit::Kind::AIV)

#define KERNEL_TASK_TYPE_DEFAULT(type) ::lowbit::RequireTaskType(::lowbit::type)

namespace lowbit {

constexpr Mode KERNEL_TYPE_AIV_ONLY = Mode::AIV;
constexpr Mode KERNEL_TYPE_AIC_ONLY = Mode::AIC;
constexpr Mode KERNEL_TYPE_MIX_AIC_1_2 = Mode::MIX_AIC_1_2;

// The kernel's declared cores are those it was launched on.
inline void RequireTaskType(Mode declared) {
    if (declared != self->launch->mode) {
        Fail("LAUNCH-MODE", "got a launch in mode ", static_cast<uint32_t>(self->launch->mode),
             ", expected the task type the kernel declares, ", static_cast<uint32_t>(declared),
             " (0: AIV, 1: AIC, 2: one AIC and two AIV)");
    }
}

}  // namespace lowbit
