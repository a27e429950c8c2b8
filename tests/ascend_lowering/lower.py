"""Lower the Triton int4 kernels for an Ascend 910B that is not here, and assert what came out.

Decides: which builds are made (`BUILDS`), and what each must and must not contain: in linalg, made by triton-ascend, that every
masked load is a copy cut to its mask; in HIVM, made by the bishengir-compile of ascendnpu-ir, the cube operation with its operand
and accumulator types in a loop of the cube core, the vector operations of the recipe, rounding modes of its casts, and buffers
that fit.
Refuses: to run anything. The tool stops where the vendor's back end, `hivmc`, would make a binary: nothing here shows that such a
binary exists, that its instructions round as their names say, or how fast it is. Prints the facts of every build and ends with 1
where an assertion failed, 0 otherwise.

    python tests/ascend_lowering/lower.py [--json F] [--only NAME,...] [--room FOLDER]

`--room` takes ascend_int4_quantize.py and ascend_gemm_int4.py from another folder: variants that the assertions must refuse.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import distribution, version
from pathlib import Path
from types import ModuleType
from typing import Any

from lowbit.kernels import triton_room

CHIP = "Ascend910B1"
RINT, WRAP = 0, 6  # RoundMode rint and truncwithoverflow (HIVM dialect documentation, enumerations)
COMPILER = (
    f"--target={CHIP}", "--enable-auto-multi-buffer=true", "--enable-auto-bind-sub-block=true", "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true",
)
"""The options that triton-ascend gives bishengir-compile for this chip by default."""


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel with its compile-time arguments. `cube` and `vector`: name of a called operation -> least number of calls in the
    function of that core; a cube operation counts inside a loop only. `modes`: cast -> the rounding mode of each of its calls."""

    module: str
    kernel: str
    meta: Mapping[str, int]
    cube: Mapping[str, int]
    vector: Mapping[str, int]
    modes: Mapping[str, int] = field(default_factory=dict)


_TILE = {"BLOCK_M": 32, "GROUPS": 4}
_PROJECTION = {"NATIVE": 1, "BLOCK_M": 32, "BLOCK_R": 16, "BLOCK_K": 64}
_GEMM = {"NATIVE": 1, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_R": 16}
_F16 = {"nd2nz_half": 2, "mma_tile_half_to_float": 1}
_BF16 = {"nd2nz_bfloat16_t": 2, "mma_tile_bfloat16_t_to_float": 1}
_INT8 = {"nd2nz_int8_t": 2, "mma_tile_int8_t_to_int32_t": 1, "fixpipe_nz2nd_int32_t_to_int32_t": 1}
# dequantisation: int32 to binary32, two products, one sum; then the channel scale and the cast
_DEQUANTISE = {"vcast_int32_t_to_float": 1, "vmul_2d_float": 3, "vadd_1d_float": 1, "vcast_float_to_half": 1}
# amax of even and of odd k and of both; scale, cap, floor; two codes to a byte; a division each for scale, even and odd k
_QUANTISE = {
    "reduce_max_ar_int32_t": 2, "vmax_2d_int32_t": 1, "vdiv_vs_2d_float": 1, "vdiv_2d_float": 2, "vcast_float_to_half": 1,
    "vadds_vs_1d_float": 2, "vshls_vs_1d_int32_t": 1, "vor_1d_int32_t": 1, "vcast_int32_t_to_int8_t": 1,
}
_CODES = {"vcast_float_to_half": RINT, "vcast_int32_t_to_int8_t": WRAP}
_SUMS = {"vcast_int32_t_to_float": RINT, "vcast_float_to_half": RINT}
BUILDS = {
    "quantise.f16.smooth": Build("ascend_int4_quantize", "int4_quantize", {"SMOOTH": 1, "IS_BF16": 0, **_TILE}, {},
                                 {**_QUANTISE, "vdiv_2d_float": 4, "vshrs_vs_1d_int32_t": 2},
                                 {**_CODES, "vcast_int32_t_to_int16_t": WRAP}),
    "quantise.bf16": Build("ascend_int4_quantize", "int4_quantize", {"SMOOTH": 0, "IS_BF16": 1, **_TILE}, {}, _QUANTISE, _CODES),
    "project.f16": Build("ascend_int4_quantize", "project_low_rank", {"IS_BF16": 0, **_PROJECTION}, _F16, {}),
    "project.bf16": Build("ascend_int4_quantize", "project_low_rank", {"IS_BF16": 1, **_PROJECTION}, _BF16, {}),
    "gemm.f16": Build("ascend_gemm_int4", "int8_gemm", {"R": 0, "BIAS": 0, "IS_BF16": 0, **_GEMM}, _INT8, _DEQUANTISE, _SUMS),
    "gemm.f16.lora.bias": Build("ascend_gemm_int4", "int8_gemm", {"R": 32, "BIAS": 1, "IS_BF16": 0, **_GEMM},
                                {**_INT8, **_F16}, {**_DEQUANTISE, "vadd_2d_float": 1}, _SUMS),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What came out of one build. `unbounded`: masked loads less copies cut to a mask. `stopped`: the compiler's last reason."""

    name: str
    cube: Mapping[str, int]
    vector: Mapping[str, int]
    unbounded: int
    stopped: str
    missing: tuple[str, ...]


def room(folder: Path, name: str) -> ModuleType:
    """A module of kernels by its file."""
    spec = importlib.util.spec_from_file_location(f"lowered_{name}", folder / f"{name}.py")
    assert spec is not None, folder
    assert spec.loader is not None, folder
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton reads the source of a kernel through its module
    spec.loader.exec_module(module)
    return module


def linalg(kernel: Any, signature: dict[str, str], fixed: Mapping[str, int]) -> tuple[str, str]:
    """(Triton IR, linalg) of a kernel: the stages of triton-ascend before its call of the compiler, which needs CANN."""
    from triton._C.libtriton import ir  # here, because the readers below work without triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("npu", CHIP, 0))
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature, dict(fixed))
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    metadata = {"hash": "", **{name: getattr(options, name) for name in options.__dataclass_fields__}}
    module = stages["ttir"](module, metadata)
    try:
        return str(module), stages["ttadapter"](module, metadata)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{source.name}: triton-ascend made no linalg: {error.stderr.decode()[:2000]}") from error


def hivm(text: str) -> tuple[str, str, str]:
    """(HIVM, what the compiler said, what stopped it) of linalg text; HIVM is empty where it failed before its back end."""
    compiler = distribution("ascendnpu-ir").locate_file("ascendnpuir/bin/bishengir-compile")
    with tempfile.TemporaryDirectory() as folder:
        source, kept = Path(folder) / "kernel.mlir", Path(folder) / "kept" / "module.hivm.opt.mlir"
        source.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", text))  # as triton-ascend hands it over
        command = [str(compiler), str(source), *COMPILER, f"--save-temps={kept.parent}", "-o", f"{folder}/kernel.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        said = done.stdout + done.stderr
        stopped = "hivmc" if "Cannot find hivmc" in said else (said.strip().splitlines() or ["no reason given"])[-1]
        return kept.read_text() if kept.exists() else "", said, stopped if done.returncode else ""


def functions(module: str) -> dict[str, list[str]]:
    """Lines of each function that has a body, by name."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"(?m)^(?=  func\.func )", module):
        if match := re.match(r"  func\.func @(\w+)", part):
            found[match[1]] = part.splitlines()
    return found


def calls(lines: list[str], *, looped: bool) -> Counter[str]:
    """Operations that a function calls, by name; with `looped` those inside a loop only. The printer indents by nesting."""
    found: Counter[str] = Counter()
    loops: list[int] = []
    for line in lines:
        depth = len(line) - len(line.lstrip())
        loops = [loop for loop in loops if loop < depth]
        if match := re.search(r"\bcall @(\w+)", line):
            found[match[1]] += not looped or bool(loops)
        if "scf.for" in line:
            loops.append(depth)
    return found


def counted(found: Mapping[str, int], prefix: str) -> int:
    """Calls of an operation in any of its forms: the name goes on with `_` and dimensions or modes."""
    return sum(count for name, count in found.items() if re.match(rf"{prefix}(?:_|$)", name))


def modes(lines: list[str], prefix: str) -> set[str]:
    """The last argument of every call of a cast: the constant that holds its rounding mode."""
    return {match[1] for line in lines if (match := re.search(rf"\bcall @{prefix}_\w+\([^)]*%(\w+)\) :", line))}


def facts(name: str, folder: Path) -> Facts:
    """Lower one build and look. `missing` lists every assertion that failed, in words."""
    build = BUILDS[name]
    module = room(folder, build.module)
    named = {} if build.module == "ascend_gemm_int4" else {"kernel": build.kernel}
    signature = module.signature(**named, bf16=bool(build.meta["IS_BF16"]))
    triton_ir, text = linalg(getattr(module, build.kernel), signature, build.meta)
    lowered, said, stopped = hivm(text)
    bodies = functions(lowered)
    cube_lines = bodies.get(f"{build.kernel}_mix_aic", bodies.get(build.kernel, []) if build.cube else [])
    vector_lines = bodies.get(f"{build.kernel}_mix_aiv", [] if build.cube else bodies.get(build.kernel, []))
    cube, vector = calls(cube_lines, looped=True), calls(vector_lines, looped=False)
    masked = len(re.findall(r"tt\.load %[^,\n]+, %", triton_ir))
    unbounded = masked - len(re.findall(r"memref\.copy %subview", text))
    checks = {
        f"HIVM was made and nothing but hivmc is missing: {said[-400:]!r}": bool(lowered) and stopped in ("", "hivmc"),
        "buffers fit at once": "overflow" not in said,
        f"masked loads that are not cut to their mask: {unbounded} of {masked}": unbounded <= 0,
        "no element is moved by itself": "memref.load" not in text,
        "no operand of the cube passes through the vector core": not build.cube or counted(vector, "store_ubuf_to_gm") == 1,
        **{f"{part} in a loop of the cube core: {counted(cube, part)}, at least {least}": counted(cube, part) >= least
           for part, least in build.cube.items()},
        **{f"{part} on the vector core: {counted(vector, part)}, at least {least}": counted(vector, part) >= least
           for part, least in build.vector.items()},
        **{f"rounding mode of {part}: {sorted(modes(vector_lines, part))}, expected {mode}":
           modes(vector_lines, part) == {f"c{mode}_i32"} for part, mode in build.modes.items()},
        "no fused multiply-add": not re.search(r"\bcall @\w*(?:vmla|vfma|vmadd|vaxpy)", lowered),
        "no product of another type on the cube":
            all(any(counted({key: 1}, part) for part in build.cube) for key in cube if key.startswith("mma_tile")),
    }
    return Facts(name, dict(sorted((+cube).items())), dict(sorted(vector.items())), unbounded, stopped,
                 tuple(sentence for sentence, good in checks.items() if not good))


def main(arguments: list[str]) -> int:
    """Lower the builds, print their facts, end with 1 where an assertion failed."""
    parser = argparse.ArgumentParser(description="Lower the Triton int4 kernels for Ascend 910B and assert their operations.")
    parser.add_argument("--only", default="", help="names of builds, comma separated; default: all")
    parser.add_argument("--room", type=Path, default=Path(next(iter(triton_room.__path__))), help="folder of the kernels")
    parser.add_argument("--json", type=Path, help="file for the facts")
    chosen = parser.parse_args(arguments)
    names = chosen.only.split(",") if chosen.only else list(BUILDS)
    if unknown := [name for name in names if name not in BUILDS]:
        parser.error(f"got the builds {', '.join(unknown)}, expected some of {', '.join(BUILDS)}")
    found = []
    for name in names:
        row = facts(name, chosen.room)
        found.append(row)
        mma = ", ".join(f"{count} {key}" for key, count in row.cube.items() if key.startswith("mma_tile")) or "no cube operation"
        print(f"{name}: {mma}; {sum(row.vector.values())} vector calls; stopped at {row.stopped or 'nothing'}")
        for text in row.missing:
            print(f"  FAILED {text}")
    tools = {name: version(name) for name in ("triton-ascend", "ascendnpu-ir")}
    print(f"lowered to HIVM for {CHIP}, never compiled to a binary and never executed on a device: {len(found)} builds by "
          f"{', '.join(f'{name} {number}' for name, number in tools.items())}, "
          f"{sum(bool(row.missing) for row in found)} of them fail an assertion")
    if chosen.json:
        record = {"chip": CHIP, **tools, "builds": [asdict(row) for row in found]}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(row.missing for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
