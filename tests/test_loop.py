"""The loop on real backends: lists, shards, levels, and what cannot reach a level."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.conformance.case import Case
from lowbit.conformance.op import DomainError
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.report import MergeError, merge
from lowbit.conformance.report_levels import granted
from lowbit.conformance.run import Plan, certify, listed_cases, listed_of, operands_of, run_one
from lowbit.conformance.selection import FIXED_GROUPS, case_list, shard
from lowbit.conformance.verdict import FAILING, Status

OPS = ("gemm_int4", "int4_repack")


def test_the_list_asks_for_what_the_contract_promises() -> None:
    listed = listed_cases(Plan("cpu", level=2))
    ids = [str(item.case) for item in listed]
    assert len(ids) == len(set(ids))
    assert len({(item.case.problem, item.case.pattern) for item in listed if item.lane not in ("golden", "reject")}) >= 3000
    for name in NAMES:
        mine = [item.case.problem for item in listed if item.case.problem.op == name and item.lane != "reject"]
        assert len({(problem.dims, problem.options) for problem in mine}) >= 50, name
    products = [item.case.problem for item in listed if item.case.problem.op.startswith("gemm_")]
    assert statistics.median(problem.dim("k") for problem in products) >= 512
    for name in (name for name in NAMES if name.startswith("gemm_")):
        long = 0
        for item in listed:
            problem = item.case.problem
            if problem.op == name and item.lane != "reject" and (name, problem.variant) != ("gemm_w8a8_fp8", "scaled"):
                group = dict(problem.dims).get("g", FIXED_GROUPS.get(name, 0))
                long += problem.dim("k") > group**2
        assert long >= 5, f"{name}: {long} cases with K > G^2"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gemm_")])
def test_every_variant_output_format_and_pattern_meets_every_other(name: str) -> None:
    op = ops()[name]
    seen = {(i.case.problem.variant, i.case.problem.options[0][1], i.case.pattern) for i in case_list(op)}
    wanted = {(v, token, p) for v in op.variants for token in op.options[0].tokens for p in op.patterns} - {
        (v, token, p) for v in op.variants for token in op.options[0].tokens for p in ("golden", "tensors")
    }
    assert wanted - seen == set()
    assert {i.case.problem.dim("m") % 16 for i in case_list(op)} == set(range(16))


def test_shards_are_a_partition_and_their_union_is_the_run() -> None:
    listed = listed_cases(Plan("cpu", ops=OPS))
    parts = [shard(listed, index, 3) for index in (1, 2, 3)]
    assert sorted(str(i.case) for part in parts for i in part) == sorted(str(i.case) for i in listed)
    with pytest.raises(ValueError, match="does not exist"):
        shard(listed, 4, 3)


def test_merged_shards_are_the_whole_and_a_missing_one_is_refused() -> None:
    plan = Plan("cpu", ops=OPS, per_op=1)
    whole = certify(plan)
    parts = [certify(replace(plan, shard=(index, 3))) for index in (1, 2, 3)]
    assert all(part.level_granted is None for part in parts)
    merged = merge(parts)
    assert merged.levels == whole.levels
    assert merged.level_granted is whole.level_granted is None  # a shortened run stays one when it is merged (LVL-7)
    assert merged.levels[0].reasons == ("shortened run: 1 of 170 drawn cases per op",)
    assert {(v.case, v.status, v.operands, v.output_sha256) for v in merged.verdicts} == {
        (v.case, v.status, v.operands, v.output_sha256) for v in whole.verdicts
    }
    with pytest.raises(MergeError):
        merge(parts[:2])


LOOSE = '''
from lowbit.conformance.backend import DATAPATHS, Contraction, Declaration, Order, cast, mul, BF16

class Loose:
    name, target = "loose", "cpu"
    def supports(self, problem):
        if problem.op != "gemm_w8a8_fp8":
            return "w8a8 only"
        if problem.variant != "scaled" or problem.option("out") != "bf16" or problem.option("bias") != "nobias":
            return "plain only"
        bad = problem.dim("k") % 16 or problem.dim("n") % 8
        return "outside the domain" if bad else None
    def declare(self, problem, tactic):
        path = DATAPATHS["{path}"]
        order = Order.{order}
        return Declaration((Contraction(("a", "w"), path, order), mul("channel_scale"), mul("token_scale"), cast(BF16)))
    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        outputs["d"].memory[...] = 0
        return "zeros"
'''


@pytest.mark.parametrize(
    ("path", "order"), [("ieee_f64", "UNKNOWN"), ("hopper_wgmma_fp8", "UNKNOWN"), ("hopper_wgmma_fp8", "ASCENDING")]
)
def test_an_output_of_zeros_reaches_no_level_above_loading(tmp_path: Path, path: str, order: str) -> None:
    file = tmp_path / "loose.py"
    file.write_text(LOOSE.format(path=path, order=order))
    report = certify(Plan(f"python:{file}:Loose", ops=("gemm_w8a8_fp8",), per_op=1, timeout=30))
    assert report.level_granted in (None, 0)
    judged = Counter(v.status for v in report.verdicts if v.case.split("/")[4] == "normal" and v.judged)
    assert set(judged) <= {Status.DRIFT, Status.UNTRUSTED}
    assert judged


def test_an_unknown_order_of_thirteen_bits_cannot_reach_bounded() -> None:
    """The honest emulation of wgmma, declared with an unknown order: nothing drifts, and still it is refused."""
    text = "gemm_w4a8_fp8/folded/m64n64k1024g128/bf16/normal/s1"
    (known,) = run_one(text, "sim:hopper_wgmma_fp8")
    assert known.status is Status.WITHIN
    loose = Path(__file__).with_name("loose_simulator.py")
    report = certify(Plan(f"python:{loose}:backend", ops=("gemm_w4a8_fp8",), per_op=1))
    assert report.verdicts
    assert not [v for v in report.verdicts if v.status in FAILING and v.status is not Status.UNTRUSTED]
    assert not [v for v in report.verdicts if v.status in FAILING and v.level == 1]
    untrusted = sum(v.status is Status.UNTRUSTED for v in report.verdicts)
    assert untrusted > 1
    assert f"{untrusted} verdicts UNTRUSTED in gemm_w4a8_fp8" in report.levels[2].reasons


def test_ids_that_mean_nothing_are_refused() -> None:
    for text, said in (
        ("gemm_w9/x/m1/bf16/normal/s1", "unknown op"), ("gemm_int4/f32/m1n8k64r0/f16/nothing/s1", "no pattern"),
        ("gemm_int4/f32/m1n8k65r0/f16/normal/s1", "INT-1"), ("gemm_int4/f32/m1n8k64/f16/normal/s1", "needs the dims"),
    ):
        with pytest.raises(DomainError, match=said):
            run_one(text, "cpu")
    with pytest.raises(ValueError, match="malformed"):
        run_one("gemm_int4", "cpu")


DIGESTS = {
    "gemm_w4a8_fp8/folded/m17n384k1024g128/bf16/lognormal/s7":
        "27fcdd3fb9745c72da3472b40081c45019ca5eab122f7ed4ca20016b84b14f7a",
    "gemm_nvfp4/svdquant/m33n64k256r32/f16.lora.bias/normal/s1":
        "e92cc47f6ca898fadb24b000e71fef5ffd68ad4a70ec14705225ff211c1e7e03",
    "gemm_int4/half/m5n16k128r16/bf16.lora.bias/exactw14/s3":
        "6aa7096af4d65bf0d190bdaf6c1610d93e797278e0d7b28c6ea9e964df72dcaa",
    "fp8_quantize/token/m9k64p0/bf16/special/s1":
        "e322db1a02e5688d5a438b40f449087f74306b2a393a107e5a86d3c8c172ff49",
    "gemm_w4a16/zp/m17n64k512g32/bf16.biasafter/cancel/s1":
        "8d8eabc0c7ab16c9e4674b369682ae62a823771f31e9014efafc15aa98719fe2",
}


def test_a_case_id_fixes_its_operands() -> None:
    """Digests written down once: another machine, another NumPy, the same bytes."""
    for text, digest in DIGESTS.items():
        case: Case = listed_of(text).case
        assert operands_of(ops()[case.problem.op], case).sha256() == digest, text




LEAKY = '''
from lowbit.kernels.cpu import Cpu

class Leaky:
    """What another problem left behind changes one bit of the next call."""

    name, target = "leaky", "cpu"

    def __init__(self):
        self.honest, self.first, self.dirty = Cpu(), None, False
        for method in ("supports", "declare", "prepare", "stage"):
            setattr(self, method, getattr(self.honest, method))

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        name = self.honest.run(problem, tactic, state, inputs, outputs, workspace, stream)
        self.first = self.first or problem
        self.dirty = self.dirty or problem != self.first
        if self.dirty and problem == self.first:
            outputs["d"].memory[0, 0] ^= 1
        return name
'''


def test_state_that_leaks_between_calls_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "leaky.py"
    file.write_text(LEAKY)
    case = "gemm_int4/half/m9n112k128r0/f16.bias/stable/s2"
    (honest,) = run_one(case, "cpu", repeats=2)
    assert honest.status is Status.EXACT
    (leaky,) = run_one(case, f"python:{file}:Leaky", repeats=2)
    assert leaky.status is Status.DRIFT
    assert leaky.reason.startswith("after gemm_int4/")
    assert leaky.clause == "STA-1"


PARTS = '''
from lowbit.kernels.cpu import Cpu

class Parts:
    """A tactic that cuts K in two, where K is long enough, and would wait without end for a part that is empty."""

    name, target = "parts", "cpu"

    def __init__(self):
        self.honest = Cpu()
        for method in ("supports", "prepare", "stage"):
            setattr(self, method, getattr(self.honest, method))

    def tactics(self, problem):
        return ("whole", "halves") if problem.dim("k") >= 256 else ("whole",)

    def declare(self, problem, tactic):
        return self.honest.declare(problem, "default")

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        assert tactic in self.tactics(problem), "a part that is empty"
        return self.honest.run(problem, "default", state, inputs, outputs, workspace, stream)

class Halves(Parts):
    """Cuts every K that it takes: no relation over parts of a short K can be asked of it."""
    def tactics(self, problem):
        return ("halves",) if problem.dim("k") >= 256 else ("short",)

class Broken(Parts):
    """Has no word for a short K."""
    def tactics(self, problem):
        if problem.dim("k") < 256:
            raise RuntimeError("no word")
        return super().tactics(problem)
'''
SHARDS = "gemm_w4a8_fp8_grouped/exact/e5m3n168k256g128/f16.bias/prop_kshards/s4"


def test_a_tactic_runs_on_no_problem_for_which_it_is_not_named(tmp_path: Path) -> None:
    """BCK-4: each half of K is too short to be cut once more."""
    file = tmp_path / "parts.py"
    file.write_text(PARTS)
    found = run_one(SHARDS, f"python:{file}:Parts")
    whole, halves = (next(verdict for verdict in found if verdict.tactic == name) for name in ("whole", "halves"))
    assert whole.status is Status.EXACT
    assert halves.status is Status.UNSUPPORTED
    assert "k128g128" in halves.reason
    assert halves.reason.endswith("tactics() does not name halves for it")


def test_a_relation_that_no_tactic_could_be_asked_refuses_the_level(tmp_path: Path) -> None:
    """LVL-3: Halves answers for no part of a short K; Parts has another tactic that does."""
    file = tmp_path / "parts.py"
    file.write_text(PARTS)
    for name, refused in (("Parts", False), ("Halves", True)):
        cases = (SHARDS, SHARDS.replace("prop_kshards", "normal"))
        found = [verdict for case in cases for verdict in run_one(case, f"python:{file}:{name}")]
        said = [reason for level in granted(found, {}, 2)[1] for reason in level.reasons]
        assert ("gemm_w4a8_fp8_grouped: prop_kshards was judged by no tactic; name one for the sizes that the relation needs"
                in said) == refused


def test_a_backend_whose_tactics_fail_for_a_part_has_a_verdict(tmp_path: Path) -> None:
    file = tmp_path / "parts.py"
    file.write_text(PARTS)
    found = run_one(SHARDS, f"python:{file}:Broken")
    assert {verdict.status for verdict in found} == {Status.RAISED}
    assert all("tactics() failed for gemm_w4a8_fp8_grouped/exact/e5m3n168k128g128" in verdict.reason for verdict in found)


def test_other_problems_run_by_their_own_tactics_between_repeats(tmp_path: Path) -> None:
    """STA-1: a problem for which the tactic under judgement is not named takes its first one, and may leak all the same."""
    file = tmp_path / "leaky.py"
    file.write_text(LEAKY + """
class OneEach(Leaky):
    def tactics(self, problem):
        return (f"for_{problem.dim('m')}_{problem.dim('k')}",)
    def declare(self, problem, tactic):
        return self.honest.declare(problem, "default")
    def __init__(self):
        super().__init__()
        del self.declare
""")
    (leaky,) = run_one("gemm_int4/half/m9n112k128r0/f16.bias/stable/s2", f"python:{file}:OneEach", repeats=2)
    assert leaky.status is Status.DRIFT
    assert leaky.reason.startswith("after gemm_int4/")
