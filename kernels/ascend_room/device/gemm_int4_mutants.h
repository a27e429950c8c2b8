// The defects that gemm_int4.cpp can be built with, in one place: -DLOWBIT_MUTANT_<NAME> plants exactly one of them.
//
// A build without any of these macros is the kernel. The mutants exist so that the emulation's rules and the tests can be
// shown to notice them; most repeat a defect from the history of the first Ascend kernel of this operation.
//
//   SCALE_K_MAJOR            both scales are read as [M or N, K/64] although they lie as [K/64, M or N]
//   STALE_MASK               the multiplication by w_scale runs with the vector mask that the instruction before it left
//   MISSING_FLAG             the copy engine refills a UB buffer after its own last copy, but not after the vector unit's reads
//   UNINITIALISED_WORKSPACE  the last row of a ring slot is read by a vector core but not written by the cube core
//   SLOT_NOT_AWAITED         a ring slot is copied first and its FULL flag waited for afterwards
//   TOTAL_NOT_ZEROED         the running tile starts with what UB holds
//   LORA_COLLISION           the low-rank tile is copied over the running tile instead of into its own buffer
//   LORA_L0C_STALE           the first low-rank product adds to what L0C holds
//   LORA_FRACTAL_ORDER       the fractals of lora_act lie in L0A in L1's order (columns of fractals) instead of L0A's (rows)
//   HEAD_ONLY                of each row of w_scale only the first 32 bytes are copied
//   DRAIN_COUNT              the cube core waits at the end for as many free slots as the ring has, used or not

#ifndef LOWBIT_ASCEND_GEMM_INT4_MUTANTS_H
#define LOWBIT_ASCEND_GEMM_INT4_MUTANTS_H

namespace mutant {

#ifdef LOWBIT_MUTANT_SCALE_K_MAJOR
constexpr bool SCALE_K_MAJOR = true;
#else
constexpr bool SCALE_K_MAJOR = false;
#endif

#ifdef LOWBIT_MUTANT_STALE_MASK
constexpr bool STALE_MASK = true;
#else
constexpr bool STALE_MASK = false;
#endif

#ifdef LOWBIT_MUTANT_MISSING_FLAG
constexpr bool MISSING_FLAG = true;
#else
constexpr bool MISSING_FLAG = false;
#endif

#ifdef LOWBIT_MUTANT_UNINITIALISED_WORKSPACE
constexpr bool UNINITIALISED_WORKSPACE = true;
#else
constexpr bool UNINITIALISED_WORKSPACE = false;
#endif

#ifdef LOWBIT_MUTANT_SLOT_NOT_AWAITED
constexpr bool SLOT_NOT_AWAITED = true;
#else
constexpr bool SLOT_NOT_AWAITED = false;
#endif

#ifdef LOWBIT_MUTANT_TOTAL_NOT_ZEROED
constexpr bool TOTAL_NOT_ZEROED = true;
#else
constexpr bool TOTAL_NOT_ZEROED = false;
#endif

#ifdef LOWBIT_MUTANT_LORA_COLLISION
constexpr bool LORA_COLLISION = true;
#else
constexpr bool LORA_COLLISION = false;
#endif

#ifdef LOWBIT_MUTANT_LORA_L0C_STALE
constexpr bool LORA_L0C_STALE = true;
#else
constexpr bool LORA_L0C_STALE = false;
#endif

#ifdef LOWBIT_MUTANT_LORA_FRACTAL_ORDER
constexpr bool LORA_FRACTAL_ORDER = true;
#else
constexpr bool LORA_FRACTAL_ORDER = false;
#endif

#ifdef LOWBIT_MUTANT_HEAD_ONLY
constexpr bool HEAD_ONLY = true;
#else
constexpr bool HEAD_ONLY = false;
#endif

#ifdef LOWBIT_MUTANT_DRAIN_COUNT
constexpr bool DRAIN_COUNT = true;
#else
constexpr bool DRAIN_COUNT = false;
#endif

}  // namespace mutant

#endif
