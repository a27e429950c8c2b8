"""Kernels of other projects: what is installed is certified against its documented findings, what is absent says so.

Literals are worked out by hand beside the arithmetic that gives them. The findings are those of reports/subjects; readings of
products are of processors with AVX-512 and without AMX, and are asserted there alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lowbit.conformance import survey
from lowbit.conformance.backend import EXACT_BITS, TensorView
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.case import Case, Operands, Tensor
from lowbit.conformance.op import Role, make_problem, parse_problem, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.verdict import Status, Verdict
from lowbit.conformance.worker import Worker, WorkerError
from lowbit.kernels.subjects import compressed_tensors_quant, modelopt_quant, onnxruntime_cpu, tensors, torch_cpu, torchao_quant
from lowbit.references.formats import BF16, F32, container

Array = npt.NDArray[Any]

SUBJECTS = {
    "torch_cpu": "torch", "onnxruntime_cpu": "onnxruntime", "compressed_tensors_quant": "compressed_tensors",
    "torchao_quant": "torchao", "modelopt_quant": "modelopt",
}
READ = torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()


@pytest.fixture(scope="module")
def shims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """References to the subjects that do not need their entry points to be installed."""
    folder = tmp_path_factory.mktemp("subjects")
    found = {}
    for module in SUBJECTS:
        path = folder / f"{module}_shim.py"
        path.write_text(f"from lowbit.kernels.subjects.{module} import backend\n")
        found[module] = f"python:{path}:backend"
    return found


def call(subject: Any, text: str, tactic: str = "default", **codes: Any) -> dict[str, Array]:
    """Outputs of a subject on operands laid into zero tensors from the front; scalars fill their tensor."""
    problem = parse_problem(text, ops())
    assert subject.supports(problem) is None
    views: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    for spec in tensors_of(ops()[problem.op], problem):
        memory = np.full(spec.shape, 0x5A, dtype=container(spec.format))
        if spec.role is not Role.OUTPUT:
            given = np.array(codes[spec.name], dtype=memory.dtype)
            memory[...] = 0 if given.ndim else given
            memory[tuple(slice(size) for size in given.shape)] = given
        strides = tuple(step // memory.itemsize for step in memory.strides)
        views[spec.role][spec.name] = TensorView(spec.name, spec.format, spec.shape, strides, spec.role, spec.layout, 0, memory)
    state = subject.prepare(problem, tactic, views[Role.CONSTANT]) if hasattr(subject, "prepare") else views[Role.CONSTANT]
    assert subject.run(problem, tactic, state, views[Role.ACTIVATION], views[Role.OUTPUT], None, None)
    return {name: np.array(view.memory) for name, view in views[Role.OUTPUT].items()}


# Certifications ------------------------------------------------------------------------------------------------------


def failing(found: dict[str, Any]) -> set[tuple[str, str]]:
    return {(row["case"].partition("/")[0], row["tactic"]) for row in found["failing"]}


def test_torch_is_certified_up_to_its_findings(shims: dict[str, str]) -> None:
    """int_mm, casts to fp8 and sums without scales pass; int4pack leaves W4A16-2, _scaled_mm leaves W8A8-2, nothing else."""
    found = survey.verdicts(shims["torch_cpu"], ("fp8_quantize", "gemm_w4a8_int8", "gemm_w4a16", "gemm_w8a8_fp8"), per_op=8)
    assert set(found["counts"]["gemm_w8a8_fp8 unit_scales"]) <= {"EXACT", "WITHIN"}
    assert set(found["counts"]["gemm_w4a8_int8 default"]) <= {"EXACT", "WITHIN"}
    assert set(found["counts"]["fp8_quantize default"]) == {"EXACT", "UNSUPPORTED"}
    assert failing(found) <= {("gemm_w8a8_fp8", "scaled_mm"), ("gemm_w4a16", "default")}
    assert all(row["status"] == "DRIFT" for row in found["failing"])
    if READ:
        assert "gemm_w8a8_fp8/scaled/m4n8k16/f32/golden/s9" in {row["case"] for row in found["failing"]}
        assert [row for row in found["failing"] if row["unexplained"]] == []


def test_onnxruntime_is_certified_up_to_its_findings(shims: dict[str, str]) -> None:
    """Level 0 keeps weights in binary32 (W4A16-2), level 4 computes with activations of its own."""
    found = survey.verdicts(shims["onnxruntime_cpu"], ("gemm_w4a16",), per_op=8)
    assert failing(found) == {("gemm_w4a16", "accuracy_level_0"), ("gemm_w4a16", "accuracy_level_4")}
    assert all(row["status"] == "DRIFT" for row in found["failing"])
    assert found["counts"]["gemm_w4a16 accuracy_level_4"]["DRIFT"] > found["counts"]["gemm_w4a16 accuracy_level_0"]["DRIFT"]
    if READ:
        assert [row for row in found["failing"] if row["unexplained"]] == []


def test_a_reading_explains_what_leaves_the_contract(shims: dict[str, str]) -> None:
    """One product of each kernel: elements leave the contract, none leaves the reading. fp8 casts: none leaves the contract."""
    with Worker(shims["torch_cpu"]) as worker:
        cast = survey.quantiser_entry(worker, "torch_cpu", parse_problem("fp8_quantize/token/m64k64p0/bf16.vllm_native", ops()))
        entries = [
            survey.product_entry(worker, "torch_cpu", parse_problem(text, ops()), tactic)
            for text, tactic in (("gemm_w4a16/sym/m4n80k512g32/bf16", "default"),
                                 ("gemm_w8a8_fp8/scaled/m4n80k16/f32", "scaled_mm"))
        ]
    assert (cast["faults"], cast["values"]) == ([], 7 * 64 * 64)
    assert all(counts[1] == 0 for pattern in cast["patterns"].values() for counts in pattern.values())
    for entry in entries:
        assert entry is not None
        assert entry["faults"] == []
        counts = [pattern["d"] for pattern in entry["patterns"].values()]
        if READ:
            assert sum(outside for _, outside, _ in counts) > 0
            assert sum(unread for _, _, unread in counts) == 0


# What the kernels do, by hand ----------------------------------------------------------------------------------------


def test_int4pack_keeps_weights_wider_than_the_activation() -> None:
    """Five weights 5 * (1 + 2^-7) = 5.0390625. In bf16 each is 5.03125 and the sum 25.15625 rounds to 25.125 (0x41C9); unrounded
    the sum is 25.1953125, which rounds to 25.25 (0x41CA). N = 8: the columns that fill the pack up are cut off."""
    w = np.full((8, 32), 8)
    w[:, :5] = 13
    found = call(torch_cpu.backend(), "gemm_w4a16/sym/m3n8k32g32/bf16", a=0x3F80, w=w, scale=0x3F81)
    assert found["d"].shape == (3, 8)
    assert set(found["d"].flat) == {0x41CA}


def test_scaled_mm_scales_its_operands() -> None:
    """3 * (1 + 2^-23) rounds to 3 + 2^-21; three times that is a tie at 9 + 1.5 * 2^-20, which rounds to 9 + 2^-19. The contract
    has 9 * (1 + 2^-23), which rounds to 9 + 2^-20; so have sums without scales."""
    one, above = 0x3F800000, 0x3F800001
    given: dict[str, Any] = {"a": [[0x44]], "w": np.full((8, 1), 0x44), "token_scale": above, "channel_scale": one}
    for text in ("m1n8k16/f32", "m1n8k16/f32.atensor.wtensor", "m1n8k16/f32.wtensor"):
        scaled = call(torch_cpu.backend(), f"gemm_w8a8_fp8/scaled/{text}", "scaled_mm", **given)
        alone = call(torch_cpu.backend(), f"gemm_w8a8_fp8/scaled/{text}", "unit_scales", **given)
        assert set(scaled["d"].flat) == {0x41100002 if READ else 0x41100001}
        assert set(alone["d"].flat) == {0x41100001}


def test_int_mm_is_exact_at_its_ends() -> None:
    """64 products of -128 and -8 are 65536; times 1.5 and 2, plus 1, is 196609: infinity in f16, also on the way to bf16."""
    given: dict[str, Any] = {"a": np.full((2, 64), 0x80), "w": np.zeros((8, 64)), "group_scale": 0x3FC0}
    given |= {"token_scale": 0x4000, "bias": 0x3F80}
    direct = call(torch_cpu.backend(), "gemm_w4a8_int8/direct/m2n8k64g64/bf16.bias", **given)
    assert set(direct["d"].flat) == {0x4840}  # 196608
    half = call(torch_cpu.backend(), "gemm_w4a8_int8/viaf16/m2n8k64g32/bf16.bias", **given)
    assert set(half["d"].flat) == {0x7F80}


def test_casts_to_fp8_saturate_and_pad() -> None:
    """Scale 0.5: 1 -> 2 (0x40), 300 -> 600 -> 448 (0x7E); NaN stays NaN; rows beyond M are zero."""
    x = [[0x3F80, 0x4396, 0x7FC0, 0x8000]]
    found = call(torch_cpu.backend(), "fp8_quantize/static/m1k4p2/bf16.vllm_native", x=x, scale=0x3F000000)
    assert found["q"][0, [0, 1, 3]].tolist() == [0x40, 0x7E, 0x80]
    assert found["q"][0, 2] & 0x7F == 0x7F
    assert found["q"][1].tolist() == [0, 0, 0, 0]


def test_level_4_loses_a_nan() -> None:
    """A row of ones with one NaN, weights 1: level 0 gives NaN, level 4 gives 15, the sum of the others."""
    a = np.full((1, 16), 0x3C00)
    a[0, 0] = 0x7E00
    found = {
        tactic: call(onnxruntime_cpu.backend(), "gemm_w4a16/sym/m1n8k16g16/f16", tactic, a=a, w=np.full((8, 16), 9), scale=0x3C00)
        for tactic in ("accuracy_level_0", "accuracy_level_4")
    }
    assert all(code & 0x7FFF > 0x7C00 for code in found["accuracy_level_0"]["d"].flat)
    if READ:
        assert set(found["accuracy_level_4"]["d"].flat) == {0x4B80}


def test_matmul_nbits_gets_what_the_op_says() -> None:
    """Three groups, zero points 1, 2 and 3, bias 0.5: (9 - 1) + (9 - 2) + (9 - 3) of one activation per group, plus 0.5."""
    a, zero = np.zeros((1, 48)), np.tile(np.array([1, 2, 3]), (8, 1))
    a[0, ::16] = 0x3C00
    found = call(onnxruntime_cpu.backend(), "gemm_w4a16/zp/m1n8k48g16/f16.bias", "accuracy_level_0", a=a,
                 w=np.full((8, 48), 9), scale=0x3C00, zero=zero, bias=0x3800)
    assert set(found["d"].flat) == {0x4D60}  # 21.5
    assert onnxruntime_cpu._pairs(np.array([[1, 2, 3]], dtype=np.uint8)).tolist() == [[0x21, 0x03]]


def test_pairs_of_codes_are_taken_apart() -> None:
    assert tensors.unpaired(torch, torch.tensor([[0x21, 0xF3]], dtype=torch.uint8)).tolist() == [[1, 2, 3, 15]]


# Readings ------------------------------------------------------------------------------------------------------------


def read(name: str, case: Case, operands: Operands, outputs: dict[str, Array]) -> Any:
    return survey.READINGS[name](case, operands, outputs, survey._contract(ops()[case.problem.op], case, operands, outputs))


def nvfp4(variant: str, recipe: str, m: int = 1, k: int = 16) -> Case:
    return Case(make_problem(ops()["nvfp4_quantize"], variant, {"m": m, "k": k}, {"recipe": recipe}), "normal", 0)


def operands_of(**codes: tuple[Array, Any]) -> Operands:
    return Operands({name: Tensor(array, fmt) for name, (array, fmt) in codes.items()})


def test_compressed_tensors_rounds_a_sixth_to_the_input() -> None:
    """amax 2, g = 1200: 2 / 6 is 0.333984375 in bf16, times g 400.78, above the midpoint 400 of 384 and 416: 0x7D. In binary32
    it is 399.99..., below it: 0x7C. The zero code of -0 has no sign; that of a small negative number has one."""
    x = np.zeros((1, 16), dtype=np.uint16)
    x[0, :3] = 0xC000, 0x8000, 0xB000
    g = np.array([0x44960000 - 0x10], dtype=np.uint32)  # 1200 less 2^-9
    operands = operands_of(x=(x, BF16), global_scale=(g, F32))
    case = nvfp4("static", "compressed_tensors")
    found = read("compressed_tensors", case, operands, {})
    contract = ops()["nvfp4_quantize"].expect(case, operands, EXACT_BITS)
    assert (found["scales"].example().tolist(), contract["scales"].example().tolist()) == ([[0x7D]], [[0x7C]])
    assert found["q"].example()[0, :4].tolist() == [0xF, 0x0, 0x8, 0x0]
    assert contract["q"].example()[0, 1] == 0x8


def test_compressed_tensors_rounds_its_global_scale() -> None:
    """amax 5 in bf16: 1 / 5 is 0.2001953125, times 2688 is 538.125, in bf16 540. A division would give 537.6, or 536 in bf16."""
    x = np.full((1, 16), 0x40A0, dtype=np.uint16)
    case = nvfp4("dynamic", "compressed_tensors")
    outputs = {"global_scale": np.array([0x44070000], dtype=np.uint32)}
    found = read("compressed_tensors", case, operands_of(x=(x, BF16)), outputs)
    assert found["global_scale"].example().tolist() == [0x44070000]


def test_modelopt_takes_the_sign_from_the_quotient() -> None:
    """The least bf16 number over a scale of 448 * 2^100 is -0 in binary32: its code has no sign. A larger one keeps its sign."""
    x = np.zeros((1, 16), dtype=np.uint16)
    x[0, :3] = 0x7F00, 0x8001, 0xBF80  # 2^127, -2^-133, -1
    operands = operands_of(x=(x, BF16), global_scale=(np.array([0x71800000], dtype=np.uint32), F32))  # 2^100
    case = nvfp4("static", "modelopt")
    outputs = {"scales": np.array([[0x7E]], dtype=np.uint8), "q": np.zeros((1, 16), dtype=np.uint8)}
    found = read("modelopt", case, operands, outputs)
    assert found["q"].example()[0, :3].tolist() == [0x7, 0x0, 0x8]
    assert ops()["nvfp4_quantize"].expect(case, operands, EXACT_BITS)["q"].example()[0, 1] == 0x8


@pytest.mark.parametrize("name", ["compressed_tensors", "modelopt", "torchao"])
def test_a_reading_admits_nothing_beside_itself(name: str) -> None:
    """One changed code of every tensor is seen; so is a NaN scale where a number is due."""
    case = nvfp4("static", name, m=8, k=64)
    operands = draw_operands(ops()["nvfp4_quantize"], case, 0)
    start = {key: e.example() for key, e in ops()["nvfp4_quantize"].expect(case, operands, EXACT_BITS).items()}
    outputs = {key: e.example() for key, e in read(name, case, operands, start).items()}
    for key, expectation in read(name, case, operands, outputs).items():
        assert expectation.admits(outputs[key]).all()
        changed = outputs[key].copy()
        changed[0, 0] ^= 1
        assert not expectation.admits(changed)[0, 0]
    scales = read(name, case, operands, outputs)["scales"]
    assert not scales.admits(np.full_like(outputs["scales"], 0xFF)).any()


@pytest.mark.parametrize(("backend", "status"), [("torch_cpu", Status.RAISED), ("another", Status.DRIFT)])
def test_what_has_no_reading_is_not_explained(backend: str, status: Status) -> None:
    verdict = Verdict("gemm_w4a16/sym/m1n8k32g32/bf16/normal/s0", backend, "default", "bounded", 2, status, wrong=3, judged=8)
    with Worker("never started") as worker:
        assert survey._unexplained(worker, backend, verdict) == 3


def test_the_survey_writes_what_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Tensors without a reading count as not explained."""
    entry = {"patterns": {"normal/s0": {"q": [10, 2, 1]}, "ties/s0": {"q": [5, 1, -1]}}}
    failing = [{"unexplained": 0}, {"unexplained": 4}]
    found = {"backend": "b", "verdicts": {"failing": failing}, "quantisers": [entry], "products": []}
    monkeypatch.setattr(survey, "survey", lambda reference: found | {"reference": reference})
    assert survey.main(["one", "--json", str(tmp_path / "survey.json")]) == 0
    assert json.loads((tmp_path / "survey.json").read_text()) == {"subjects": [found | {"reference": "one"}]}
    assert capsys.readouterr().out.splitlines() == [
        "b verdicts: 2 fail, 1 of them not explained",
        "b quantisers, 1 problems: q: 15 judged, 3 outside, 2 not explained",
    ]


def test_every_quantiser_is_surveyed_on_enough_values() -> None:
    """At least a million values per problem, over all patterns."""
    found = list(survey.quantiser_problems())
    assert {problem.op for problem in found} == {"fp8_quantize", "int4_quantize", "int8_quantize", "nvfp4_quantize"}
    assert min(dict(problem.dims).get("m", 512) * problem.dim("k") for problem in found) * len(survey.PATTERNS) > 10**6


def test_maxps_loses_a_nan_except_in_one_lane() -> None:
    ones = np.ones((16, 32))
    for place in range(16):
        ones[place, 16 + place] = np.nan
    assert np.isnan(survey._vector_max(ones)).tolist() == [lane == 3 for lane in range(16)]
    assert survey._vector_max(-np.arange(48.0)).tolist() == 47.0


# What is refused, and what is absent ---------------------------------------------------------------------------------


def problems(subject: Any) -> Iterator[str]:
    """One refused problem and the reason."""
    for op, texts in REFUSED[subject.name].items():
        for text in texts:
            answer = subject.supports(parse_problem(f"{op}/{text}", ops(), check=False))
            assert answer is not None, text
            yield answer


REFUSED = {
    "torch_cpu": {
        "gemm_w8a8_fp8": ("block/m1n8k128/bf16", "scaled/m1n8k16/bf16.biasafter", "scaled/m1n8k40/bf16"),
        "gemm_w4a8_int8": ("direct/m1n8k96g48/bf16",),
        "gemm_w4a16": ("zp/m1n8k32g32/bf16", "sym/m1n8k32g16/bf16", "sym/m1n12k32g32/bf16", "sym/m1n8k32g32/bf16.bias"),
        "fp8_quantize": ("token/m1k16p0/bf16", "tensor/m0k16p0/bf16.vllm_native"), "gemm_int4": ("f32/m1n8k64r0/bf16",),
    },
    "onnxruntime": {
        "gemm_w4a16": ("sym/m1n8k32g32/bf16", "zpafter/m1n8k32g32/f16", "sym/m1n8k32g32/f16.biasafter", "sym/m1n8k96g96/f16",
                       "sym/m1n12k32g32/f16"),
        "gemm_int4": ("f32/m1n8k64r0/bf16",),
    },
    "compressed_tensors": {
        "int4_quantize": ("sym/n1k64g64/bf16",), "int8_quantize": ("token/m1k16/bf16",),
        "nvfp4_quantize": ("static/m1k16/bf16.compressed_tensors.swizzled", "dynamic/m0k16/bf16.compressed_tensors"),
    },
    "torchao": {
        "nvfp4_quantize": ("static/m1k16/bf16", "static/m1k16/f16.torchao", "dynamic/m0k16/bf16.torchao"),
        "int8_quantize": ("token/m1k16/bf16",),
    },
    "modelopt": {
        "nvfp4_quantize": ("static/m1k16/bf16", "static/m1k16/bf16.modelopt.swizzled", "static/m0k16/bf16.modelopt"),
        "int8_quantize": ("token/m1k16/bf16",),
    },
}


ABSENT: Any = None
"""What `supports` does without: the library."""


@pytest.mark.parametrize("subject", [
    torch_cpu.TorchCpu(ABSENT), onnxruntime_cpu.OnnxRuntime(ABSENT, ABSENT), torchao_quant.TorchAo(ABSENT),
    compressed_tensors_quant.CompressedTensors(ABSENT), modelopt_quant.ModelOpt(ABSENT, ABSENT),
], ids=lambda subject: str(subject.name))
def test_what_is_refused_gets_a_sentence(subject: Any) -> None:
    answers = list(problems(subject))
    assert len(answers) == sum(len(texts) for texts in REFUSED[subject.name].values())
    assert all(len(answer) > 40 and "\n" not in answer for answer in answers)


@pytest.mark.parametrize("text", [
    "gemm_w8a8_fp8/scaled/m1n8k16/f32.bias", "gemm_w4a8_int8/viaf16/m1n8k64g32/bf16.bias",
    "gemm_w4a16/sym/m1n8k32g32/bf16.biasafter",
])
def test_declarations_are_of_the_op(text: str) -> None:
    problem = parse_problem(text, ops())
    assert check_declaration(ops()[problem.op], problem, torch_cpu.backend().declare(problem, "default"))[0] == ""


@pytest.mark.parametrize("module", SUBJECTS)
def test_an_absent_library_is_one_sentence(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter imports without its library; `backend()` says what is missing and how to get it."""
    monkeypatch.setitem(sys.modules, SUBJECTS[module], None)
    adapter = import_module(f"lowbit.kernels.subjects.{module}")
    with pytest.raises(ImportError, match=r"^[a-z-]+ is not installed, so .*; install the extra lowbit\[subjects\]$"):
        adapter.backend()
    with pytest.raises(ValueError, match="takes no argument"):
        adapter.backend("x")


def test_a_library_that_lacks_one_of_its_own_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import quite_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"^half needs quite_absent, which is not installed, so"):
        tensors.library("half_installed", "half")


def test_the_worker_reports_an_absent_library(tmp_path: Path) -> None:
    """What `lowbit certify` shows: the suite's own sentence around ours."""
    shim = tmp_path / "absent_shim.py"
    shim.write_text(
        "import sys\nsys.modules['modelopt'] = None\nfrom lowbit.kernels.subjects.modelopt_quant import backend\n")
    with Worker(f"python:{shim}:backend") as worker, pytest.raises(WorkerError, match="nvidia-modelopt is not installed"):
        worker.hello()
