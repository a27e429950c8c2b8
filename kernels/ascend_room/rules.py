"""The rules the AscendC host emulation enforces, the things it takes for true, and its version.

Decides: nothing at run time; it is the table of what emulation/*.h refuses. Every refusal there begins with the id of a rule
here, and every rule here is raised by a planted program of the tests. Refuses: to name a rule without the public document it
stands on; where the document is silent or milder than the emulation, `assumed` is true and the sentence says so.

`source` is one or more of: a repository and a path in it. The documents are those of Atlas A2 (910B).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ASSUMPTIONS", "EMULATION_VERSION", "RULES", "Rule"]

EMULATION_VERSION = "1"
"""Rises with every change of what the emulation computes, accepts or refuses."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing the emulation enforces or takes for true.

    id: what a message begins with. sentence: what is required, in words. source: repository and path of the document.
    assumed: the document does not say it, or the emulation is stricter than the document.
    """

    id: str
    sentence: str
    source: str
    assumed: bool = False


def _doc(name: str) -> str:
    return f"cannmirror/asc-devkit docs/api/context/{name}.md"


_TPIPE = "mirror-cann/asc-devkit impl/basic_api/kernel_tpipe_impl.h"
_SIZES = "mirror-cann/asc-devkit impl/basic_api/utils/kernel_utils_constants.h; hicann/catlass include/catlass/arch/arch.hpp"
_STRUCTS = "mirror-cann/asc-devkit include/basic_api/kernel_struct_data_copy.h"
_SET_WAIT, _CROSS, _BARRIER = _doc("SetFlag-WaitFlag(ISASI)"), _doc("CrossCoreSetFlag(ISASI)"), _doc("PipeBarrier(ISASI)")
_PAD, _COPY, _MMAD, _MASK = _doc("DataCopyPad(ISASI)"), _doc("基础数据搬运"), _doc("Mmad"), _doc("SetVectorMask")
_GENERAL = _doc("通用说明和约束")
_HOST = "none: a condition of the emulation itself"

RULES: tuple[Rule, ...] = (
    # order between pipes and cores
    Rule("SYNC-READ",
         "What one pipe wrote is read by another only after SetFlag and WaitFlag from the first to the second.", _SET_WAIT),
    Rule("SYNC-WRITE",
         "What another pipe still reads or writes is overwritten only after SetFlag and WaitFlag from that pipe.", _SET_WAIT),
    Rule("SYNC-SAME-PIPE",
         "Dependent instructions of one pipe have PipeBarrier of that pipe between them, unless the compiler's automatic "
         "synchronisation is counted on, which the emulation does not; Mmads on one L0C tile from ten fractals up need "
         "none.", f"{_BARRIER}; hicann/catlass include/catlass/gemm/tile/tile_mmad.hpp"),
    Rule("SYNC-CROSS-CORE",
         "What another core wrote or reads in global memory is touched only after CrossCoreSetFlag on the pipe of that "
         "access and CrossCoreWaitFlag.", _CROSS),
    Rule("SYNC-DEADLOCK", "A launch has a core that can continue until all have returned.", _CROSS),
    Rule("BARRIER-SCALAR", "PipeBarrier is not given PIPE_S.", _BARRIER),
    Rule("CORE-PIPE",
         "A cube core runs no instruction of V or MTE3, a vector core none of M, MTE1 or FIX. On the device such a call "
         "does nothing.", "mirror-cann/asc-devkit impl/basic_api/dav_c220/kernel_operator_mm_impl.h"),
    # flags inside a core
    Rule("FLAG-ID", "Event ids are 0 to 7.", _SET_WAIT),
    Rule("FLAG-SET-TWICE", "A flag is one bit: it is not set again before it has been waited for.", _SET_WAIT),
    Rule("FLAG-UNSET",
         "WaitFlag has a SetFlag of the same event and id before it in the program; the document asks for the pair, not "
         "for this order.", _SET_WAIT, assumed=True),
    Rule("FLAG-LEFTOVER", "Every SetFlag has been waited for when the kernel returns.", _SET_WAIT),
    Rule("EVENT-EXHAUSTED", "At most eight event ids of one kind are allocated at a time.", _doc("AllocEventID")),
    Rule("TPIPE-EVENT",
         "Events M_MTE1 0 to 2 of a cube core are TPipe's own: it sets them at its start and waits for them at its end.", _TPIPE),
    Rule("TPIPE-SECOND", "A core has one TPipe at a time.", _TPIPE),
    # flags between cores
    Rule("CROSS-ID", "Cross-core flag ids are 0 to 10.", _CROSS),
    Rule("CROSS-COUNT", "A cross-core flag has at most 15 sets that nobody has waited for.", _CROSS),
    Rule("CROSS-MODE",
         "Cross-core flags have modes 0, 1 and 2; 1 and 2 within a block of one cube core and two vector cores.", _CROSS),
    Rule("CROSS-LEFTOVER", "Every set of a cross-core flag has been waited for when the launch ends.", _CROSS, assumed=True),
    # buffers and queues
    Rule("MEMORY-OVERFLOW",
         "Buffers fit the memory: UB 192 KiB, L1 512 KiB less 128 bytes, L0A and L0B 64 KiB, L0C 128 KiB.", _SIZES),
    Rule("BUFFER-COUNT", "One TPipe hands out at most 64 buffers.", _TPIPE),
    Rule("CORE-MEMORY", "A cube core has L1, L0A, L0B and L0C, a vector core UB.", _doc("InitBuffer")),
    Rule("LOCAL-RANGE",
         "An access stays in the buffer its tensor was taken from; the device would reach into the next buffer.",
         _doc("InitBuffer"), assumed=True),
    Rule("TENSOR-EMPTY", "A tensor comes from AllocTensor, DeQue or Get.", _doc("AllocTensor")),
    Rule("TENSOR-PLACE",
         "An operand lies in the memory its instruction works on.", f"{_MMAD}; {_doc('Fixpipe')}; {_doc('Load2D')}; {_COPY}"),
    Rule("QUEUE-ALLOC", "AllocTensor finds a buffer that is not in use.", _doc("AllocTensor")),
    Rule("QUEUE-DEPTH", "No more tensors are enqueued than the depth of the queue.", _doc("EnQue")),
    Rule("QUEUE-EMPTY", "DeQue follows an EnQue.", _doc("DeQue")),
    Rule("QUEUE-TENSOR",
         "EnQue and FreeTensor get a tensor that AllocTensor or DeQue of the same queue handed out.", _doc("FreeTensor")),
    Rule("QUEUE-LEFTOVER",
         "Every tensor of a queue has been dequeued and freed when the kernel returns.", _doc("FreeTensor"), assumed=True),
    # bytes nobody wrote
    Rule("UNINIT-LOCAL",
         "No byte of UB, L0A, L0B or L0C is used before something has written it; LoadData alone moves whole fractals "
         "whatever they hold. The device would use what the last kernel left.", _doc("AllocTensor"), assumed=True),
    Rule("UNINIT-GM",
         "No byte of an output or of the workspace is read before the kernel has written it.",
         _doc("GlobalTensor"), assumed=True),
    # global memory and copies
    Rule("GM-RANGE",
         "An access to global memory stays inside one argument of the launch and inside the size its GlobalTensor "
         "declares.", _doc("GlobalTensor")),
    Rule("GM-READ", "Only arguments the launch declares readable are read.", _doc("GlobalTensor"), assumed=True),
    Rule("GM-WRITE", "Only arguments the launch declares writable are written.", _doc("GlobalTensor"), assumed=True),
    Rule("ALIGN",
         "Operands start at multiples of 32 bytes in UB and L1, 512 in L0A and L0B, 64 in L0C (Mmad: 256 elements); int4 "
         "elements come in pairs.", f"{_GENERAL}; {_MMAD}"),
    Rule("COPY-LENGTH", "DataCopy moves whole data blocks of 32 bytes, DataCopyPad whole elements.", f"{_COPY}; {_PAD}"),
    Rule("COPY-OVERLAP", "The rows one copy writes do not overlap.", _doc("随路转换ND2NZ搬运"), assumed=True),
    Rule("PARAM-RANGE",
         "Parameters lie in their documented ranges. Zero repeats, counts and lengths, a documented way to do nothing, are "
         "refused as mistakes.", f"{_COPY}; {_PAD}; {_MMAD}; {_doc('Fixpipe')}; {_doc('WholeReduceMax')}", assumed=True),
    Rule("FIELD-RANGE", "A value fits the bits of its parameter field; the device would keep the low bits.", _STRUCTS),
    Rule("INIT-TYPES", "InitConstValue fills elements of 16 or 32 bits.", _doc("InitConstValue")),
    # cube
    Rule("MMAD-TYPES", "Mmad takes int4b_t or int8_t into int32_t, half or bfloat16_t into float.", _MMAD),
    Rule("FIXPIPE-TYPES", "Fixpipe writes int32_t and float unchanged, or float as half with F322F16.", _doc("Fixpipe")),
    Rule("NOT-MODELLED",
         "Uses the emulation has no model of are refused: Mmad of one row or of part of a 32-byte block of k, unit flags, "
         "bias sources, transposed loads, several Fixpipe matrices, reductions with an index.",
         f"{_MMAD}; {_doc('Load2D')}; {_doc('Fixpipe')}", assumed=True),
    # vector
    Rule("VECTOR-TYPES",
         "A vector instruction has the element types Atlas A2 gives it.", f"{_doc('Add')}; {_doc('And')}; {_doc('Brcb')}"),
    Rule("VECTOR-OVERLAP",
         "A destination coincides with a source element for element or shares no data block with it, and is written once; "
         "the documented accumulation over one block is refused too.", _GENERAL, assumed=True),
    Rule("CAST-MODE", "Cast has the pairs of types and the round modes of Atlas A2 that the emulation models.", _doc("Cast")),
    Rule("INT-OVERFLOW",
         "Integer results fit their type; the document does not say what else they would be.", _doc("Add"), assumed=True),
    Rule("MASK-RANGE",
         "A mask counts from 1 to the elements of 256 bytes; the device reads 0 as nothing and more as all.",
         _MASK, assumed=True),
    Rule("MASK-STALE",
         "An instruction without a mask of its own runs under a mask SetVectorMask set and no instruction has changed "
         "since.", _MASK),
    Rule("MASK-LEFTOVER",
         "A mask set by SetVectorMask and the counter mode are reset before the kernel returns.",
         _doc("ResetMask"), assumed=True),
    # launch
    Rule("LAUNCH-MODE", "A kernel runs on the cores KERNEL_TASK_TYPE_DEFAULT declares.", _doc("设置Kernel类型")),
    Rule("LAUNCH-ARGUMENTS",
         "A launch passes one buffer per argument, none sharing a byte with a writable one, and at least one block.", _HOST,
         assumed=True),
    Rule("LAUNCH-FAILED",
         "The host has the memory and the threads for the cores and the buffers of the launch.", _HOST, assumed=True),
)
"""What the emulation refuses, each with the public document it stands on."""

ASSUMPTIONS: tuple[Rule, ...] = (
    Rule("MODEL-CUBE-FLOAT",
         "Half and bfloat16 products accumulate in binary32, one product after the other over ascending k, each sum "
         "rounded to nearest even; the order and width inside the cube are not published.", _MMAD, assumed=True),
    Rule("MODEL-VECTOR-FLOAT",
         "Add, Sub, Mul and Div of the vector unit round once to nearest even and keep subnormals.", _doc("Add"), assumed=True),
    Rule("MODEL-OVERFLOW",
         "Cast of float to half overflows to infinity (INF_NAN mode, the default of the 910B runtime); the page of Cast "
         "describes the saturating mode.", _doc("Cast"), assumed=True),
    Rule("MODEL-NAN",
         "Cast of NaN to an integer gives 0; Maxs, Mins and WholeReduceMax give NaN when an operand is NaN.",
         _doc("Cast"), assumed=True),
    Rule("MODEL-PIPE-READS",
         "One pipe reads the operands of its instructions in order, so that a later instruction of the same pipe may "
         "overwrite them without a barrier.", _BARRIER, assumed=True),
    Rule("MODEL-WAIT-ALL",
         "CrossCoreWaitFlag stops every pipe of its core whatever its template arguments are.",
         _doc("CrossCoreWaitFlag(ISASI)"), assumed=True),
    Rule("MODEL-EVENT-IDS",
         "Event ids may be numbered by the kernel where no queue of the same core uses events of that kind; the page wants "
         "them from AllocEventID or FetchEventID, lest they meet those of the framework.", _SET_WAIT, assumed=True),
    Rule("MODEL-SCALAR-READS",
         "Plain scalar loads from global memory (tiling) are not checked.", _doc("GlobalTensor"), assumed=True),
    Rule("MODEL-TIME",
         "Instructions take no time: queue depths of pipes, bank conflicts and bandwidth have no model.", _GENERAL, assumed=True),
)
"""What the emulation takes for true where no document settles it; nothing raises these."""
