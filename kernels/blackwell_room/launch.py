"""From torch tensors of the suite to a launch: packing on the device, compiled instances, the call.

Decides: which tactics a problem has, what each operand looks like in memory, which stream is used. Refuses: a missing compiler,
with the sentence that says what to install; nothing else stands in for it. CuTe DSL and Triton are imported at the first launch,
never before: this module loads without either, and without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from lowbit.conformance.backend import Problem, TensorView

from .declare import TRITON, in_one_cast
from .pack import pack_codes, place_scales, scale_bytes, scale_offsets
from .schedule import CONFIGS, choose

__all__ = ["Weights", "activations", "launch", "tactics", "weights"]

_BY_NAME = {config.name: config for config in CONFIGS}
_BY_TENSOR_MAP = ("a", "a_scale", "w", "w_scale", "lora_act", "lora_up", "d")


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Constants as the kernels read them: tensors by name (w, w_scale, alpha, lora_up, channel_scale, bias), and alpha on the
    host, exactly."""

    tensors: Mapping[str, Any]
    alpha: float


def tactics(problem: Problem) -> tuple[str, ...]:
    """The CuTe instances of the problem's format and kind, the preferred one first, where the CuTe kernel computes the problem;
    then the Triton twin."""
    if not in_one_cast(problem):
        return (TRITON,)
    ranked = problem.option("lora") == "lora"
    first = choose(problem.dim("m"), problem.dim("n"), "bf16" if problem.option("out") == "bf16" else "f16", ranked)
    others = (config.name for config in CONFIGS if (config.out, config.lora) == (first.out, ranked) and config != first)
    return (first.name, *others, TRITON)


def _torch() -> Any:
    return import_module("torch")


def _operand(codes: Any, scales: Any) -> tuple[Any, Any]:
    """(codes uint8 [rows, K / 2], scales flat uint8 in 128x4 tiles) from codes [rows, K] and scales [rows, K / 16]."""
    torch = _torch()
    rows, groups = scales.shape
    storage = torch.zeros(scale_bytes(rows, codes.shape[1]), dtype=torch.uint8, device=scales.device)
    offsets = torch.from_numpy(scale_offsets(rows, groups)).to(scales.device)
    return pack_codes(codes).contiguous(), place_scales(storage, offsets, scales)


def weights(constants: Mapping[str, TensorView]) -> Weights:
    """Pack the constants of a problem on the device where they are."""
    torch = _torch()
    w, w_scale = _operand(constants["w"].memory, constants["w_scale"].memory)
    kept = {name: constants[name].memory.contiguous() for name in ("lora_up", "channel_scale", "bias") if name in constants}
    alpha = constants["alpha"].memory.view(torch.float32)
    return Weights({"w": w, "w_scale": w_scale, "alpha": alpha, **kept}, float(np.float32(alpha.item())))


def activations(problem: Problem, tensors: Mapping[str, TensorView]) -> Mapping[str, Any]:
    """Pack the activations of a problem. lora_act f32 [M, R] is rounded to codes of the output format (RNE, overflow to
    infinity): that is what both kernels multiply."""
    torch = _torch()
    a, a_scale = _operand(tensors["a"].memory, tensors["a_scale"].memory)
    found = {"a": a, "a_scale": a_scale}
    if "lora_act" in tensors:
        wide = tensors["lora_act"].memory.view(torch.float32).contiguous()
        narrow = {"f16": torch.float16, "bf16": torch.bfloat16}[problem.option("out")]
        found["lora_act"] = wide.to(narrow).view(torch.int16)
    return found


def _missing(error: ModuleNotFoundError, distribution: str) -> ImportError:
    return ImportError(f"{distribution} is not installed ({error}); install the extra lowbit[blackwell]")


def _cute() -> Any:
    """The CuTe DSL kernel. Raises ImportError where its compiler is absent."""
    try:
        from . import cute_gemm
    except ModuleNotFoundError as error:
        raise _missing(error, "nvidia-cutlass-dsl") from error
    return cute_gemm


def _triton() -> Any:
    """The Triton twin. Raises ImportError where its compiler is absent."""
    try:
        from ..triton_room import blackwell_gemm_nvfp4
    except ModuleNotFoundError as error:
        raise _missing(error, "triton") from error
    return blackwell_gemm_nvfp4


@cache
def _compiled(name: str) -> Any:
    """An instance, compiled for the chip that is present, once per process."""
    return _cute().compile_gemm(_BY_NAME[name])


def launch(problem: Problem, tactic: str, tensors: Mapping[str, Any], d: Any, alpha: float, stream: Any) -> None:
    """Compute `d` (int16 [M, N], contiguous, 16-byte aligned, M > 0) on the device. Does not wait.

    `tensors`: what `weights` and `activations` made for the tactic; they have to live until the stream is done with them.
    `stream`: a torch stream of the device of `d`, None for the current one there. Raises ImportError where the tactic's compiler
    is not installed, and ValueError for an operand of a CuTe instance that does not start at a multiple of 16 bytes, as tensor
    maps need it."""
    torch = _torch()
    stream = torch.cuda.current_stream(d.device) if stream is None else stream
    if tactic == TRITON:
        twin = _triton()
        with torch.cuda.stream(stream):  # the device of the stream, too
            twin.launch(problem, {**tensors, "d": d}, alpha)
        return
    shape = (problem.dim("m"), problem.dim("n"), problem.dim("k"), problem.dim("r"))
    addresses = {name: tensor.data_ptr() for name, tensor in {**tensors, "d": d}.items()}
    if odd := {name: address % 16 for name, address in addresses.items() if address % 16 and name in _BY_TENSOR_MAP}:
        raise ValueError(f"{tactic}: got {', '.join(f'{name} {rest} bytes past' for name, rest in odd.items())} a multiple of 16 "
                         "bytes, where tensor maps have to start; copy the tensor into memory of its own")
    multiprocessors = torch.cuda.get_device_properties(d.device).multi_processor_count
    with torch.cuda.stream(stream):
        _cute().run_gemm(_compiled(tactic), _BY_NAME[tactic], addresses, shape, alpha, multiprocessors, stream.cuda_stream)
