"""A registered backend as an arm: its kernels run inside a model, in this process.

Decides: the memory that a backend is handed (torch tensors, or NumPy arrays over them for host backends), how often `prepare` is
called, and which of its own quantisers it may use. Refuses: problems that the backend does not support and tactics that it does
not have, in one sentence that names the layer; an exception of the backend becomes one, too. Guard pages, red zones and isolation
are the business of the conformance run: certify a backend before it serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lowbit.references.declarations import Declaration
from lowbit.references.formats import BF16, UINT8, Format, container

from ..backend import TensorView, tactics_of
from ..case import Problem, Tensor
from ..op import Family, ResolvedTensor, Role, make_problem, tensors_of
from ..ops import ops
from ..worker_process import resolve
from .activations import DTYPES, InputRule, input_rule, input_tensors, torch_codes
from .arms import ArmError, gemm_constants, problem_of
from .checkpoint import QuantisedLinear

__all__ = ["BackendArm"]


@dataclass(slots=True, eq=False)
class _Placed:
    """A layer of a backend. `codes`: constants of the GEMM, kept only while `prepare` may be called again. `nbytes`: of the codes
    that were handed over; what a backend keeps of them it does not say."""

    name: str
    n: int
    k: int
    out: Format
    device: torch.device
    nbytes: int
    problem: Problem  # of one row
    state: Any
    inputs: InputRule
    codes: Mapping[str, Tensor] | None
    prepared: int  # rows of the problem that `state` was made for


class BackendArm:
    """The arm of a backend. Its outputs hold NaN before each run.

    `reference`: `name` or `name:argument` of an entry point, `python:FILE.py:ATTRIBUTE`, or the backend itself. `tactic`: one of
    the backend's, by default the first that it offers for one row. `prepare` is called once per layer, with the problem of one
    row, and its state serves all calls; `per_rows` asks for tactic and state again whenever the number of rows changes, as the
    conformance run does, for a backend that packs by M (this keeps the codes beside the state).
    `quantises`: activations are quantised by the backend's own op where it supports that; otherwise, and by default, by the
    reference. `kernels`: names that `run` has returned, with their number of calls.
    """

    def __init__(self, reference: Any, *, tactic: str = "", per_rows: bool = False, quantises: bool = False) -> None:
        self.backend: Any = resolve(reference) if isinstance(reference, str) else reference
        self.name = reference if isinstance(reference, str) else str(self.backend.name)
        self.kernels: dict[str, int] = {}
        self._tactic, self._per_rows, self._quantises = tactic, per_rows, quantises
        self._device = str(getattr(self.backend, "device", "host"))
        self._reasons: dict[Problem, str | None] = {}
        self._offers: dict[Problem, tuple[str, ...]] = {}

    def declare(self, problem: Problem) -> Declaration:
        """The backend's own declaration of a problem, for the tactic that `run` uses."""
        found: Declaration = self.backend.declare(problem, self._chosen(problem))
        return found

    def _chosen(self, problem: Problem) -> str:
        """The tactic that a problem is computed by."""
        return self._tactic or self._offered(problem if self._per_rows else _with_rows(problem, 1))[0]

    def _offered(self, problem: Problem) -> tuple[str, ...]:
        """The backend's tactics for a problem; it is asked once."""
        if problem not in self._offers:
            self._offers[problem] = tuple(tactics_of(self.backend, problem))
        return self._offers[problem]

    def prepare(self, linear: QuantisedLinear, out: Format, device: torch.device, bias: Tensor | None = None) -> _Placed:
        """The layer as the backend's state. Raises ArmError where the backend does not support it."""
        problem = problem_of(linear, 1, out, bias=bias is not None)
        self._check(linear.name, problem)
        codes = gemm_constants(linear, bias)
        nbytes = sum(tensor.codes.nbytes for tensor in codes.values())
        inputs = input_rule(linear, out, device)
        layer = _Placed(linear.name, linear.n, linear.k, out, device, nbytes, problem, None, inputs, codes, 0)
        self._pack(layer, problem)
        if not self._per_rows:
            layer.codes = None
        return layer

    def _check(self, name: str, problem: Problem) -> None:
        """Raises ArmError for a problem that is not supported, or has another tactic than the layer was prepared for."""
        reason = self._reason(problem)
        if reason is not None:
            text = f"{name}: backend {self.name} does not compute {problem}: {reason}"
            raise ArmError(f"{text}; choose another recipe, or ignore the layer")
        offered, tactic = self._offered(problem), self._chosen(problem)
        if tactic not in offered:
            text = f"{name}: backend {self.name} has no tactic {tactic!r} for {problem}; it has {', '.join(offered)}"
            raise ArmError(f"{text}; name one of these, or prepare per number of rows")

    def _reason(self, problem: Problem) -> str | None:
        """Why the backend does not compute a problem; it is asked once."""
        if problem not in self._reasons:
            self._reasons[problem] = self.backend.supports(problem)
        return self._reasons[problem]

    def _pack(self, layer: _Placed, problem: Problem) -> None:
        """Give the constants to the backend."""
        assert layer.codes is not None
        codes = {name: torch_codes(tensor.codes) for name, tensor in layer.codes.items()}
        layer.state = self._views(problem, codes, Role.CONSTANT)
        if hasattr(self.backend, "prepare"):
            layer.state = self._called(layer.name, problem, "prepare", self._chosen(problem), layer.state)
        layer.prepared = problem.dim("m")

    def _called(self, name: str, problem: Problem, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self.backend, method)(problem, *arguments)
        except Exception as error:
            text = " ".join(str(error).split())
            failed = f"{name}: {method}() of backend {self.name} failed on {problem}"
            raise ArmError(f"{failed}: {type(error).__name__}: {text}; replay the problem with lowbit run") from error

    def _views(self, problem: Problem, codes: Mapping[str, torch.Tensor], *roles: Role) -> dict[str, TensorView]:
        """Tensors of a problem as the backend sees them: codes that are given, outputs as they are allocated here."""
        return {
            tensor.name: self._view(tensor, codes.get(tensor.name))
            for tensor in tensors_of(ops()[problem.op], problem) if tensor.role in roles
        }

    def _view(self, tensor: ResolvedTensor, codes: torch.Tensor | None) -> TensorView:
        size = container(tensor.format).itemsize
        place = "cpu" if self._device == "host" else self._device.replace("hip", "cuda", 1)
        if codes is None:  # every byte 0xFF: NaN in 16 bits, where a kernel forgets to write
            codes = torch.full(tensor.shape, -1, dtype={1: torch.int8, 2: torch.int16, 4: torch.int32}[size], device=place)
            codes = codes.view(torch.uint8) if size == 1 else codes
        codes = codes.reshape(tensor.shape).contiguous().to(place)
        memory: Any = codes.numpy().view(container(tensor.format)) if self._device == "host" else codes
        strides = tuple(codes.stride())
        return TensorView(tensor.name, tensor.format, tensor.shape, strides, tensor.role, tensor.layout, codes.data_ptr(), memory)

    def run(self, layer: _Placed, x: torch.Tensor) -> torch.Tensor:
        """D of one call."""
        problem = _with_rows(layer.problem, x.shape[0])
        self._check(layer.name, problem)
        if self._per_rows and layer.prepared != x.shape[0]:
            self._pack(layer, problem)
        outputs = self._run(layer.name, problem, self._chosen(problem), layer.state, self._inputs(layer, x))
        found = outputs["d"].memory
        codes = torch.from_numpy(found.view(np.int16)) if isinstance(found, np.ndarray) else found
        return codes.view(DTYPES[layer.out]).to(x.device)

    def _run(
        self, name: str, problem: Problem, tactic: str, state: Any, codes: Mapping[str, torch.Tensor]
    ) -> dict[str, TensorView]:
        """One call of the backend: outputs as it left them."""
        inputs: Any = self._views(problem, codes, Role.ACTIVATION)
        outputs = self._views(problem, {}, Role.OUTPUT)
        size = self._called(name, problem, "workspace", tactic) if hasattr(self.backend, "workspace") else 0
        scratch = self._view(ResolvedTensor("workspace", UINT8, (size,), Role.OUTPUT, Family.ELEMENT, "", (size,)), None)
        if hasattr(self.backend, "stage"):
            inputs = self._called(name, problem, "stage", tactic, inputs)
        kernel = self._called(name, problem, "run", tactic, state, inputs, outputs, scratch, None)
        self.kernels[str(kernel)] = self.kernels.get(str(kernel), 0) + 1
        return outputs

    def _inputs(self, layer: _Placed, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes of the activations, by the backend's quantiser where it is asked for and has one."""
        quantiser = _quantiser(layer.inputs, x.shape[0], layer.k) if self._quantises else None
        if quantiser is None or self._reason(quantiser) is not None:
            return input_tensors(layer.inputs, x)
        tactic = self._offered(quantiser)[0]
        given = _quantiser_inputs(layer.inputs, x, quantiser)
        state: Any = self._views(quantiser, given, Role.CONSTANT)
        if hasattr(self.backend, "prepare"):
            state = self._called(layer.name, quantiser, "prepare", tactic, state)
        outputs = self._run(layer.name, quantiser, tactic, state, given)
        return _quantiser_outputs(layer.inputs, outputs, x.shape[0])


def _with_rows(problem: Problem, m: int) -> Problem:
    """The same problem with `m` rows: no constraint of a GEMM speaks of m."""
    return replace(problem, dims=tuple((letter, m if letter == "m" else size) for letter, size in problem.dims))


_QUANTISERS = {
    "vllm_fp8_token": ("fp8_quantize", "token", {"recipe": "vllm"}),
    "vllm_fp8_tensor": ("fp8_quantize", "tensor", {"recipe": "vllm"}),
    "vllm_fp8_static": ("fp8_quantize", "static", {"recipe": "vllm"}),
    "vllm_fp8_group128": ("fp8_quantize", "block", {"recipe": "vllm"}),
    "xpu_int8_token": ("int8_quantize", "token", {}),
    "compressed_tensors_nvfp4": ("nvfp4_quantize", "static", {"recipe": "compressed_tensors"}),
    "svdquant_nvfp4": ("svdquant_quantize", "nvfp4", {"recipe": "svdquant"}),
    "svdquant_int4": ("svdquant_quantize", "int4", {"recipe": "svdquant"}),
    "nunchaku_int4": ("svdquant_quantize", "int4", {"recipe": "nunchaku"}),
}
"""Recipe -> the op, variant and options that quantise by it."""


def _quantiser(rule: InputRule, m: int, k: int) -> Problem | None:
    """The problem of quantising x [m, k]; None where activations stay, or a low-rank recipe has no low rank."""
    if not rule.recipe or (rule.recipe.startswith(("svdquant", "nunchaku")) and rule.lora_down is None):
        return None
    name, variant, options = _QUANTISERS[rule.recipe]
    op = ops()[name]
    sizes = {"m": m, "k": k, "p": 0, "r": 0 if rule.lora_down is None else rule.lora_down.shape[1]}
    chosen = {"x": "bf16" if rule.out is BF16 else "f16"} | options
    return make_problem(op, variant, {letter: sizes[letter] for letter in op.dims}, chosen)


def _quantiser_inputs(rule: InputRule, x: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """Codes of what a quantiser takes: x, the given scale, the projection, smoothing factors of 1."""
    found = {"x": x.contiguous().view(torch.int16)}
    if rule.given is not None:
        found["global_scale" if problem.op == "nvfp4_quantize" else "scale"] = rule.given.view(torch.int32)
    if rule.lora_down is not None:
        found["lora_down"] = rule.lora_down.view(torch.int16)
        found["smooth"] = torch.ones(x.shape[1], dtype=x.dtype, device=x.device).view(torch.int16)
    return found


def _quantiser_outputs(rule: InputRule, outputs: Mapping[str, TensorView], m: int) -> dict[str, torch.Tensor]:
    """Outputs of a quantiser as activations of the GEMM: padding rows dropped, scales with rows first."""
    codes = {
        name: view.memory if isinstance(view.memory, torch.Tensor) else torch_codes(view.memory)
        for name, view in outputs.items()
    }
    if "lora_act" in codes:
        return {"a": codes["q"][:m], "a_scale": codes["scales"].T[:m].contiguous(), "lora_act": codes["lora_act"][:m]}
    if "scales" not in codes:
        assert rule.given is not None
        return {"a": codes["q"], "token_scale": rule.given.view(torch.int32)}
    blocks = rule.recipe in ("vllm_fp8_group128", "compressed_tensors_nvfp4")
    return {"a": codes["q"], "a_scale" if blocks else "token_scale": codes["scales"] if blocks else codes["scales"].reshape(-1)}
