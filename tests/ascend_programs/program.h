// What the programs share: their four arguments, and the word of the tiling that plants a fault (0: none).
#pragma once

#include "kernel_operator.h"

using namespace AscendC;

struct Tiling {
    uint32_t fault;
    uint32_t a, b, c, d;
};

__aicore__ inline const __gm__ Tiling* TilingOf(GM_ADDR tiling) { return reinterpret_cast<const __gm__ Tiling*>(tiling); }

template <class T>
__aicore__ inline GlobalTensor<T> Global(GM_ADDR address)
{
    GlobalTensor<T> tensor;
    tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(address));
    return tensor;
}
