"""The ascend target: INT4 GEMM with a low-rank term, its activation quantiser and nibble packing, in AscendC for the 910B.

Decides: which kernel computes an op, and with which sizes it is started. Where there is an NPU the kernels run on it; elsewhere
the same sources are compiled by g++ with headers of our own and run under emulation, and every verdict says `emulated`.
Refuses: ops, variants and formats that no kernel covers, one sentence each; and to fall back from a device that does not start.

    backend argument      meaning
    (none)                the NPU if there is one, else the emulation
    emulate               the emulation
    mutant=NAME           the emulation, with a known fault compiled in
    sanitize=NAME         the emulation, compiled with a sanitizer of g++
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.conformance.backend import Declaration, Problem, TensorView

from .ascend_room.build import DEVICE, compiler, source_digest
from .ascend_room.cann import toolkit
from .ascend_room.declare import ASSUMED, declare, refusal
from .ascend_room.entries import ENTRIES
from .ascend_room.launch import EMULATED_BLOCKS, Choice, Engine, choice_of, engine, library_of, run
from .ascend_room.pack import codes_of_nibbles, halves, nibbles, rows_of, transposed
from .ascend_room.rules import ASSUMPTIONS, EMULATION_VERSION, RULES

__all__ = ["REMAINS", "Ascend", "backend", "main"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

REMAINS = (
    "that bisheng compiles the kernels: they were never compiled by the vendor's compiler",
    "that they run on a 910B at all, without a core exception or a time-out",
    "that the cube reads int4 fractals, two codes per byte, in the order that the kernels lay down",
    "that the vector unit divides, multiplies and adds binary32 to nearest even and keeps subnormals",
    "that Cast to int4b_t puts even elements into bits 0 to 3, and that Cast to half of a NaN is a NaN",
    "how the cube sums 16-bit products: order, internal width, rounding",
    "that the flags between cube and vector cores order accesses to the ring in global memory as the emulation has it",
    "every time and throughput: nothing here measures speed",
)
"""What an emulated certificate leaves open, in plain words."""


def _unwritten(shape: tuple[int, ...], dtype: type[np.unsignedinteger[Any]]) -> Array:
    """An output for a kernel to fill. Its bytes are 0xA5, so that an element which no kernel writes is judged as it was left."""
    array: Array = np.full((*shape[:-1], shape[-1] * np.dtype(dtype).itemsize), 0xA5, np.uint8).view(dtype)
    return array


def _gemm(place: Engine, problem: Problem, tensors: Arrays) -> tuple[str, Arrays]:
    m, n, k, r = (problem.dim(letter) for letter in "mnkr")
    d = _unwritten((m, n), np.uint16)
    bias = int(problem.option("bias") == "bias")
    sizes = {"m": m, "n": n, "k": k, "r": r, "has_channel_scale": 1, "has_bias": bias}
    return run(place, "gemm_int4", {**tensors, "d": d}, sizes), {"d": d}


def _bf16(problem: Problem) -> int:
    return int(problem.option("x") == "bf16")


def _quantised(place: Engine, tensors: Arrays, sizes: Mapping[str, int], lora_act: Array | None) -> tuple[Array, Array]:
    """Packed codes [rows, k / 2] and scales [k / 64, rows]; rows of lora_act that x does not have become zero."""
    rows, k = sizes["rows"], sizes["k"]
    q, scales = _unwritten((rows, k // 2), np.uint8), _unwritten((k // 64, rows), np.uint16)
    operands = {"x": tensors["x"], "smooth": tensors.get("smooth"), "q": q, "scales": scales, "lora_act": lora_act}
    run(place, "quantize_int4", operands, dict(sizes))
    return q, scales


def _int4_quantize(place: Engine, problem: Problem, tensors: Arrays) -> tuple[str, Arrays]:
    n, k = problem.dim("n"), problem.dim("k")
    sizes = {"m": n, "k": k, "rows": -(-n // 16) * 16, "r": 0, "smooth": 0, "bf16": _bf16(problem)}
    q, scales = _quantised(place, tensors, sizes, None)
    return "quantize_int4", {"q": codes_of_nibbles(q[:n]), "scales": scales.T[:n]}


def _svdquant_quantize(place: Engine, problem: Problem, tensors: Arrays) -> tuple[str, Arrays]:
    m, k, r = (problem.dim(letter) for letter in "mkr")
    rows = -(-m // 256) * 256
    lora_act = _unwritten((rows, r), np.uint32)
    sizes = {"m": m, "k": k, "rows": rows, "r": r, "smooth": 1, "bf16": _bf16(problem)}
    q, scales = _quantised(place, tensors, sizes, lora_act)
    operands = {"x": tensors["x"], "lora_down": tensors["lora_down"], "lora_act": lora_act}
    run(place, "project_lora", operands, {"m": m, "k": k, "r": r, "bf16": _bf16(problem)})
    return "quantize_int4+project_lora", {"q": codes_of_nibbles(q), "scales": scales, "lora_act": lora_act}


def _int4_pack(place: Engine, problem: Problem, tensors: Arrays) -> tuple[str, Arrays]:
    if problem.variant == "b8":
        words = np.array(tensors["words"])
        return run(place, "convert_b8", {"words": words}, {"count": 8 * words.size, "offset": 0}), {"words": words}
    codes = tensors["q"]
    n, k = codes.shape
    offset = int(problem.variant == "compressed_tensors")
    if k % 8 and offset:  # words are filled with the code that becomes 0
        codes = np.pad(codes, ((0, 0), (0, -k % 8)), constant_values=8)
    packed = _unwritten((n, codes.shape[1] // 2), np.uint8)
    name = run(place, "pack_int4", {"codes": codes, "packed": packed}, {"count": codes.size, "offset": offset})
    return name, {"packed": packed if problem.variant == "nibble" else packed.view(np.uint32)}


_KERNELS: dict[str, Callable[[Engine, Problem, Arrays], tuple[str, Arrays]]] = {
    "gemm_int4": _gemm, "int4_quantize": _int4_quantize, "svdquant_quantize": _svdquant_quantize, "int4_pack": _int4_pack,
}
_ARRANGED: dict[str, dict[str, Callable[[Array], Array]]] = {
    "gemm_int4": {"a": nibbles, "w": nibbles, "a_scale": transposed, "w_scale": transposed, "lora_act": halves},
    "svdquant_quantize": {"lora_down": transposed},
}


def _arranged(problem: Problem, tensors: Mapping[str, TensorView]) -> Arrays:
    how = _ARRANGED.get(problem.op, {})
    return {name: how[name](array) if name in how else array for name, array in rows_of(tensors).items()}


@dataclass(frozen=True, slots=True)
class Ascend:
    """Backend protocol over the kernels of ascend_room/device; one tactic, "default". Tensors live in host memory: the launcher
    copies them to the device and back."""

    choice: Choice
    name: str = "ascend"
    target: str = "ascend"

    @property
    def execution(self) -> str:
        """ "executed" where an NPU computes, else "emulated". Raises CannError or BuildError where neither can."""
        return engine(self.choice).execution

    def describe(self) -> Mapping[str, str]:
        """What runs the kernels, what is assumed of the device, and what an emulated verdict leaves open."""
        place = engine(self.choice)
        about = {"kernels": f"AscendC sources, digest {source_digest(DEVICE)}", "datapath": ASSUMED}
        if place.runtime is not None:
            device = f"{place.runtime.soc}, device {place.runtime.device}"
            return about | {"device": device, "compiler": "bisheng, --npu-arch=dav-2201"}
        found = toolkit()
        about |= {
            "emulation": f"version {EMULATION_VERSION}, {EMULATED_BLOCKS} blocks, {_gcc()}",
            "vendor compiler": "never compiled by the vendor's compiler",
            "rules": f"{len(RULES)} enforced: {', '.join(rule.id for rule in RULES)}",
            "taken for true": " ".join(rule.sentence for rule in ASSUMPTIONS),
            "remains to be shown on silicon": "; ".join(REMAINS),
        }
        if self.choice.mutant or self.choice.sanitize:
            about["build"] = f"mutant {self.choice.mutant or 'none'}, sanitizer {self.choice.sanitize or 'none'}"
        if found is not None:
            about["CANN toolkit"] = f"{found}, not used: its CPU debug build was never tried with these kernels"
        return about

    def supports(self, problem: Problem) -> str | None:
        """None for gemm_int4/f32, int4_quantize and svdquant_quantize by the recipe svdquant, and int4_pack along K."""
        return refusal(problem)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """The program of a GEMM and of the projection; everything else: the contract's bits."""
        return declare(problem)

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Arrays:
        """Weights two codes per byte, their scales transposed; lora_down with K last."""
        return _arranged(problem, constants)

    def stage(self, problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> Arrays:
        """Activations two codes per byte, their scales transposed; the low-rank activation rounded to binary16."""
        return _arranged(problem, activations)

    def run(
        self, problem: Problem, tactic: str, state: Arrays, inputs: Arrays, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        """Start the kernels of the op, write their results, and name them. Raises EmulationError for a broken rule."""
        name, results = _KERNELS[problem.op](engine(self.choice), problem, {**state, **inputs})
        for output, codes in results.items():
            (outputs[output].memory if output in outputs else inputs[output])[...] = codes
        return name


def _gcc() -> str:
    gcc = compiler("g++", "install it")
    return subprocess.run([gcc, "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def backend(argument: str | None = None) -> Ascend:
    """The backend `ascend`. `argument`: see the module. Raises ValueError for one it does not know."""
    return Ascend(choice_of(argument))


def main(arguments: Sequence[str] = ()) -> None:
    """`python -m lowbit.kernels.ascend`: print what computes here; of the emulation also its rules and what it leaves open.
    With `--build` compile all kernels instead, so that no case waits for a compiler."""
    parser = argparse.ArgumentParser(prog="python -m lowbit.kernels.ascend", description="What computes for the target ascend.")
    parser.add_argument("--build", action="store_true", help="compile all kernels and print nothing else")
    found = backend()
    if parser.parse_args(arguments).build:
        for entry in ENTRIES.values():
            library_of(engine(found.choice), entry)
        return
    lists = {
        "rules": [f"{rule.id}: {rule.sentence}" for rule in RULES],
        "taken for true": [rule.sentence for rule in ASSUMPTIONS],
        "remains to be shown on silicon": list(REMAINS),
    }
    print(f"ascend: {found.execution}")
    for name, text in found.describe().items():
        print("\n  - ".join((f"{name}:", *lists[name])) if name in lists else f"{name}: {text}")


if __name__ == "__main__":
    main(sys.argv[1:])
