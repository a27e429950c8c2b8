"""Compile every Triton kernel for AMD chips that are not here, branch by branch as it would be launched there; assert opcodes.

Decides: problems whose launches are caught and compiled, each with the matrix opcode that its code must hold and the local memory
that it must fit. The host code runs as on the chip; where it would launch, the kernel is compiled to hsaco with the arguments it
was given. Refuses: to run kernels; every line ends in `compiled, not executed on this machine`. Needs triton and torch, no GPU.

    python tests/rocm/compile_kernels.py [--only TEXT] [--chip CHIP] [--json FILE] [--branches FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lowbit.conformance.backend import INT8, NEVER_EXECUTED, Problem, Role, TensorView
from lowbit.conformance.op import parse_problem, tensors_of
from lowbit.conformance.ops import ops
from lowbit.kernels.rocm_room import skinny_fp8
from lowbit.kernels.rocm_room.devices import CHIPS, too_large
from lowbit.kernels.triton import MODULES
from lowbit.kernels.triton_room import gemm_w8a8_fp8
from lowbit.references.formats import container

FP8 = {"gfx942": r"v_mfma_f32_\w+_fp8_fp8\b", "gfx950": r"v_mfma_f32_\w+_(?:f8f6f4|fp8_fp8)\b"}
HALF = r"v_mfma_f32_\w+?(?:x|_)b?f16(?:_1k)?\b"
OPCODES: dict[str, dict[str, str]] = {  # what multiplies, by kind of problem and chip; codes of the other e4m3 become binary16
    "fnuz": {"gfx942": FP8["gfx942"], "gfx950": HALF}, "fn": {"gfx942": HALF, "gfx950": FP8["gfx950"]},
    "half": dict.fromkeys(CHIPS, HALF),
    "int8": dict.fromkeys(CHIPS, r"v_mfma_i32_\w+?(?:x|_)i8\b"), "none": {},
}
LOCAL_MEMORY = {"gfx942": 64 << 10, "gfx950": 160 << 10}  # bytes of LDS per work group; CDNA3 and CDNA4 ISA documents

PROBLEMS: tuple[tuple[str, str], ...] = (  # problem, opcode: a key of OPCODES
    ("fp8_quantize/static/m40k256p48/bf16.fnuz", "none"), ("fp8_quantize/tensor/m40k256p0/f16.fnuz", "none"),
    ("fp8_quantize/token/m40k256p48/bf16.fnuz.ub", "none"), ("fp8_quantize/token/m40k256p0/f32.vllm_native", "none"),
    ("fp8_quantize/block/m40k256p0/bf16", "none"), ("fp8_quantize/tile/m128k256p0/bf16.fnuz.deepgemm", "none"),
    ("fp8_convert_fnuz/channel/n64k256/fnuz.static", "none"), ("fp8_requantize/max_scale/n64k256s3/fnuz", "none"),
    ("fp8_requantize/max_scale_f16/n64k256s3/fn", "none"), ("fp8_requantize/channel/n64k256s3/fn", "none"),
    ("gemm_w8a8_fp8/scaled/m128n256k512/bf16.fnuz.bias", "fnuz"), ("gemm_w8a8_fp8/scaled/m128n256k512/bf16.fn.bias", "fn"),
    ("gemm_w8a8_fp8/scaled/m128n256k512/f32.fnuz.atensor.wtensor", "fnuz"), ("gemm_w8a8_fp8/block/m128n256k512/bf16.fn", "fn"),
    ("gemm_w8a8_fp8/block/m128n256k512/f16.fnuz.biasafter", "fnuz"),
    ("gemm_w8a8_fp8/scaled/m1n256k2048/bf16.fnuz.atensor.wtensor.bias", "fnuz"),
    ("gemm_w8a8_fp8/scaled/m1n256k2048/bf16.fn.atensor.wtensor.bias", "fn"),
    ("gemm_w8a8_fp8/scaled/m512n512k512/bf16.fnuz", "fnuz"), ("gemm_w8a8_fp8/scaled/m512n512k512/bf16.fn", "fn"),
    ("gemm_w4a16/sym/m512n512k512g128/bf16", "half"), ("gemm_w4a8_int8/direct/m512n512k512g128/f16", "int8"),
    ("gemm_int4/f32/m512n512k512r32/f16.lora", "int8"), ("gemm_nvfp4/plain/m512n512k512r0/bf16", "half"),
    ("gemm_w4a16/sym/m1n256k512g128/bf16", "half"), ("gemm_w4a16/zp/m128n256k512g32/f16", "half"),
    ("gemm_w4a16/zpafter/m33n256k512g64/bf16.bias", "half"), ("int4_repack/weight/n64k256/plain", "none"),
    ("int4_repack/zeros/n64k256/plain", "none"), ("int8_quantize/token/m40k256/bf16", "none"),
    ("int8_quantize/token/m40k256/f16.narrow", "none"), ("gemm_w4a8_int8/direct/m128n256k512g128/bf16.bias", "int8"),
    ("gemm_w4a8_int8/viaf16/m8n256k512g128/bf16", "int8"), ("int4_quantize/sym/n40k256g64/bf16.svdquant", "none"),
    ("int4_quantize/asym/n40k256g32/bf16.quantize_weights", "none"), ("nvfp4_quantize/dynamic/m40k256/bf16.vllm", "none"),
    ("nvfp4_quantize/none/m40k256/bf16.svdquant", "none"), ("svdquant_quantize/nvfp4/m40k256r32/bf16", "half"),
    ("svdquant_quantize/int4/m40k256r32/f16", "half"), ("gemm_int4/f32/m128n256k512r32/bf16.lora.bias", "int8"),
    ("gemm_int4/half/m128n256k512r32/f16.lora.bias", "int8"), ("gemm_nvfp4/svdquant/m128n256k512r32/bf16.lora.bias", "half"),
    ("gemm_nvfp4/nunchaku/m128n256k512r32/f16.lora.bias", "half"), ("int4_pack/compressed_tensors/n40k256/int8", "none"),
    ("scale_swizzle/tile128x4/m40g24/plain", "none"),
)

_TYPES = {
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.float16: "fp16",
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e4m3fnuz: "fp8e4b8",
    torch.bool: "i1",
}
_COMPILER = ("num_warps", "num_stages", "enable_fp_fusion", "num_ctas", "maxnreg", "waves_per_eu")


@dataclass(frozen=True, slots=True)
class Made:
    """One compiled launch: the kernel, its compile-time arguments that are text or flags, and its assembly."""

    kernel: str
    fixed: dict[str, Any]
    assembly: str
    binary: int
    shared: int  # bytes of local memory


@dataclass(slots=True)
class Recorder:
    """Stands in for a launch: compiles the kernel for `chip` with the types of the arguments it was given."""

    chip: str
    made: list[Made] = field(default_factory=list)
    seen: dict[str, Made] = field(default_factory=dict)

    def launched(self, kernel: Any, arguments: Sequence[Any], named: dict[str, Any]) -> None:
        options = {name: named.pop(name) for name in _COMPILER if name in named}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        fixed = {name: values[name] for name, of in zip(kernel.arg_names, kernel.params, strict=True) if of.is_constexpr}
        fixed |= {name: None for name, value in values.items() if value is None}
        types = {name: "constexpr" if name in fixed else typed(values[name]) for name in kernel.arg_names}
        key = repr((kernel.__name__, types, fixed, options))
        if key not in self.seen:
            aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")}
            source = ASTSource(kernel, signature=types, constexprs=fixed, attrs=aligned)
            built = triton.compile(source, target=GPUTarget("hip", self.chip, 64), options=options)
            self.seen[key] = Made(kernel.__name__, fixed, built.asm["amdgcn"], len(built.asm["hsaco"]),
                                  built.metadata.shared)
        self.made.append(self.seen[key])


def typed(value: Any) -> str:
    """Triton's name of the type of a run-time argument."""
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    if isinstance(value, float):
        return "fp32"
    return f"tensordesc<{_TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"  # a TensorDescriptor


def views(problem: Problem) -> dict[Role, dict[str, TensorView]]:
    """Zero tensors of a problem, shards of 1 row and the rest: nothing reads their values."""
    found: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    for spec in tensors_of(ops()[problem.op], problem):
        memory = np.zeros(spec.shape, container(spec.format))
        strides = tuple(step // memory.itemsize for step in memory.strides)
        found[spec.role][spec.name] = TensorView(spec.name, spec.format, spec.shape, strides, spec.role, spec.layout, 0, memory)
    return found


def launches(problem: Problem, recorder: Recorder) -> None:
    """Every launch of every tactic of a problem, as on the chip."""
    machine, module = CHIPS[recorder.chip].machine, import_module(f"lowbit.kernels.triton_room.{MODULES[problem.op]}")
    refused = module.unsupported(problem, machine)
    if refused:
        raise ValueError(f"{problem}: {refused}")
    for tactic in module.tactics(problem, machine):
        of = views(problem)
        state = module.prepare(problem, tactic, of[Role.CONSTANT], machine)
        inputs = module.stage(problem, tactic, of[Role.ACTIVATION] | of[Role.INOUT], machine)
        scratch = space(module.workspace(problem, tactic, machine))
        module.run(problem, tactic, state, inputs, of[Role.OUTPUT], scratch, None, machine)
        if problem.op == "gemm_w8a8_fp8" and skinny_fp8.takes(problem, machine):
            scratch = space(skinny_fp8.workspace(problem, machine))
            skinny_fp8.run(problem, state, inputs, of[Role.OUTPUT], scratch, machine)


def space(nbytes: int) -> TensorView:
    """Scratch memory."""
    return TensorView("workspace", INT8, (nbytes,), (1,), Role.OUTPUT, "", 0, np.zeros(nbytes, np.uint8))


def complaints(kind: str, chip: str, made: Sequence[Made]) -> list[str]:
    """What the launches of one problem lack, one sentence each."""
    wanted, limit = OPCODES[kind].get(chip, ""), LOCAL_MEMORY[chip]
    found = sorted({opcode for one in made for opcode in re.findall(r"v_mfma\w+", one.assembly)})
    large = [f"{one.kernel} takes {one.shared} bytes of local memory, {chip} has {limit}" for one in made if one.shared > limit]
    if not wanted:
        return [*large, *([f"{', '.join(found)} where nothing is multiplied"] if found else [])]
    held = any(re.fullmatch(wanted, opcode) for opcode in found)
    return [*large, *([] if held else [f"{', '.join(found) or 'no mfma'}, expected {wanted}"])]


def intermediate(kernel: Any, signature: dict[str, str], fixed: dict[str, Any]) -> str:
    """Triton's own code of a kernel before any target sees it."""
    source = ASTSource(kernel, signature={**signature, **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed)
    text: str = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options={"enable_fp_fusion": False}).asm["ttir"]
    return text


def branches() -> dict[str, dict[str, str]]:
    """Both fp8 products with UNIT = fp8 as gfx942 gets them, and with UNIT = binary32 as the interpreter does; no other argument
    differs."""
    machine, tile = CHIPS["gfx942"].machine, gemm_w8a8_fp8.Tile(64, 64)
    found: dict[str, dict[str, str]] = {"w8a8_gemm": {}, "skinny_parts": {}}
    for unit in ("fp8", "binary32"):
        signature = gemm_w8a8_fp8.signature(unit, "bf16", fnuz=True, described=False, tile=tile)
        fixed = gemm_w8a8_fp8.meta(
            out="bf16", unit=unit, fnuz=True, blocked=False, per_token=True, per_channel=True, promoted=False, bias="bias",
            described=False, fault="", tile=tile,
        )
        found["w8a8_gemm"][unit] = intermediate(gemm_w8a8_fp8.w8a8_gemm, signature, fixed)
        signature, fixed = skinny_fp8.signatures(unit, "bf16", machine)["skinny_parts"], skinny_fp8.meta_parts(unit, machine)
        found["skinny_parts"][unit] = intermediate(skinny_fp8.skinny_parts, signature, fixed)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per problem, chip and kernel; 1 where one lacks its opcode."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for AMD chips.")
    parser.add_argument("--only", default="", help="problems that hold this text")
    parser.add_argument("--chip", choices=tuple(CHIPS), help="this chip alone")
    parser.add_argument("--json", type=Path, help="write what was compiled")
    parser.add_argument("--branches", type=Path, help="write Triton's code of both branches of the fp8 products, and end")
    given = parser.parse_args(arguments)
    if given.branches:
        given.branches.write_text(json.dumps(branches()), encoding="utf-8")
        return 0
    records: list[dict[str, Any]] = []
    for chip in (given.chip,) if given.chip else tuple(CHIPS):
        recorder = Recorder(chip)
        JITFunction.run = lambda kernel, *a, grid, warmup, _to=recorder, **named: _to.launched(kernel, a, named)
        for text, kind in PROBLEMS:
            if given.only not in text:
                continue
            refused = too_large(parse_problem(text, ops()), CHIPS[chip].machine)
            if refused:
                print(f"{text} for {chip}: refused, {refused}")
                records.append({"problem": text, "chip": chip, "kernel": "", "opcodes": [], "lacking": [], "unit": None})
                continue
            recorder.made.clear()
            launches(parse_problem(text, ops()), recorder)
            lacking = complaints(kind, chip, recorder.made)
            for one in {id(one): one for one in recorder.made}.values():
                opcodes = sorted(set(re.findall(r"v_mfma\w+", one.assembly)))
                said = f"FAILED {'; '.join(lacking)}" if lacking else NEVER_EXECUTED
                print(f"{text} for {chip}: {one.kernel}, hsaco of {one.binary} bytes, {', '.join(opcodes) or 'no mfma'}; {said}")
                records.append({"problem": text, "chip": chip, "kernel": one.kernel, "opcodes": opcodes, "lacking": lacking,
                                "unit": one.fixed.get("UNIT", one.fixed.get("NATIVE"))})
    if given.json:
        given.json.write_text(json.dumps(records), encoding="utf-8")
    return int(any(record["lacking"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
