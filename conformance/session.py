"""One worker, one backend, one case: what a single judgement takes.

Decides: the status of a case from its operands, its declaration and the outcome of its runs. Refuses: to let what a backend does
become an exception; it becomes a verdict. The loop over many cases is `run.py`.
While the worker computes a case the parent derives what may come back, so the expectation never sees the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lowbit.references.declarations import Claim, Contraction, Declaration, restricted, text_of
from lowbit.references.formats import Codes
from lowbit.references.interpret import ProgramError

from . import audit_findings, properties, report, stability, tensors, vectors, waivers
from .audit_probes import PATTERNS as AUDITS
from .audit_probes import Probed, battery, check_room, probe_operands, probed, problems, subject_of
from .backend import NOT_EXECUTED
from .bounds import accumulator_bits, check_declaration, gemm_expect, power, restrict, sample_of
from .case import Case, Operands, Problem
from .op import DomainError, Expectation, Op, parse_case, parse_problem, tensors_of
from .ops import ops
from .patterns import draw_operands, lane_of, level_of, rows_probed
from .selection import PER_OP, REPEATS, Listed
from .stability import Finding, Refused
from .verdict import NOT_NAMED, PASSING, Execution, Judgement, Kernel, Status, Verdict, digest_outputs, judge_outputs
from .worker import Ending, Fault, Outcome, Variation, Worker, WorkerError

__all__ = [
    "Plan", "Rejudged", "Session", "batches_of", "expectations_of", "listed_of", "operands_of", "products_of",
    "rejudge",
]


_ENDINGS = {
    Ending.RAISED: Status.RAISED,
    Ending.CRASHED: Status.CRASHED,
    Ending.TIMEOUT: Status.TIMEOUT,
    Ending.MALFORMED: Status.MALFORMED,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to certify. `ops`: names, empty for all. `shard`: (i, n). `per_op`: drawn cases per op. `timeout`: seconds a call
    may take. `path`: folders added to the worker's sys.path. `repeats`: runs of a stability case."""

    backend: str
    level: int = 2
    ops: tuple[str, ...] = ()
    shard: tuple[int, int] = (1, 1)
    per_op: int = PER_OP
    timeout: float = 60.0
    path: tuple[str, ...] = ()
    repeats: int = REPEATS
    waivers: tuple[waivers.Waiver, ...] = ()
    tensors: str = ""  # FILE.safetensors[:GLOB] of real weights


def products_of(op: Op, problem: Problem) -> int:
    """Multiplications of operand pairs in a plain evaluation; 0 for ops that sum nothing."""
    dims = dict(problem.dims)
    if not op.is_gemm or "n" not in dims:
        return 0
    return dims["m"] * dims["n"] * (dims["k"] + dims.get("r", 0))


def operands_of(op: Op, case: Case, batch: int = 0, source: str = "") -> Operands:
    """The operands of a case, golden vectors and real weights (of the file `source`) included. Raises DomainError."""
    if case.pattern == tensors.PATTERN:
        return tensors.tensor_operands(op, case, source)
    if case.pattern == "golden":
        return vectors.vector_of(case).operands
    if case.pattern in AUDITS:
        return probe_operands(op, case)
    return draw_operands(op, case, batch)


def _golden(op: Op, case: Case, declaration: Declaration) -> Mapping[str, Expectation] | None:
    """The stored expectation, unless the declared accumulator is too narrow for the vector's sum to be exact, or the bits are
    those of the op's own program and another one may be declared: the vector is then judged by the declaration."""
    vector = vectors.vector_of(case)
    if declaration.program and not vector.any_program:
        return None
    bits = [accumulator_bits(item) for item in declaration.program if isinstance(item, Contraction)]
    if vector.min_bits and bits and min(bits) < vector.min_bits:
        return None
    return vector.expectations


def expectations_of(op: Op, case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    """Admissible outputs of a case under a declaration."""
    if case.pattern == "golden":
        stored = _golden(op, case, declaration)
        if stored is not None:
            return stored
    if case.pattern in AUDITS:
        declaration = audit_findings.must_equal(declaration)
    return op.expect(case, operands, declaration)


@dataclass(slots=True)
class Session:
    """One worker and what has been learnt of its backend. Not a base class; the loop's state in one place."""

    plan: Plan
    worker: Worker
    name: str = ""
    target: str = ""
    device: str = "host"
    execution: Execution = Execution.EXECUTED
    describe: Mapping[str, str] = field(default_factory=dict)
    coverage: report.Coverage = field(default_factory=report.Coverage)
    declared: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _known: dict[tuple[Problem, str], tuple[Declaration | None, str, str]] = field(default_factory=dict)
    _tactics: dict[Problem, tuple[str, ...]] = field(default_factory=dict)
    _shares: dict[str, float] = field(default_factory=dict)
    _probes: dict[tuple[Case, str], tuple[Verdict, Codes | None]] = field(default_factory=dict)
    _findings: dict[tuple[Problem, str], audit_findings.Found | None] = field(default_factory=dict)
    _admitted: dict[tuple[Case, Declaration], Admitted] = field(default_factory=dict)

    def open(self) -> None:
        """Start the backend. Raises WorkerError where it does not load."""
        hello = self.worker.hello()
        self.name, self.target, self.device, self.describe = hello["name"], hello["target"], hello["device"], hello["describe"]
        self.execution = Execution(hello["execution"])

    # What the backend says of a problem ---------------------------------------------------------------------------------

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """Tactics of a problem, asked once."""
        if problem not in self._tactics:
            self._tactics[problem] = self.worker.tactics(problem)
        return self._tactics[problem]

    def declaration(self, op: Op, problem: Problem, tactic: str) -> tuple[Declaration | None, str, str]:
        """(declaration or None, what is wrong with it, its class), asked once per problem and tactic."""
        key = (problem, tactic)
        if key not in self._known:
            try:
                found = self.worker.declare(problem, tactic)
                wrong, kind = check_declaration(op, problem, found)
                self._known[key] = (None if wrong else found, wrong, kind)
                if not wrong:
                    self.declared.setdefault((op.name, tactic, text_of(found)), kind)
            except WorkerError as error:
                self._known[key] = (None, str(error), "")
        return self._known[key]

    def recall(self, verdict: Verdict) -> None:
        """Count a verdict of an earlier run as if this session had judged it. Raises ReportError where its operands are not
        those that the case has today."""
        if verdict.lane == "reject" or verdict.status is Status.UNSUPPORTED:
            return
        case = listed_of(verdict.case).case
        op = ops()[case.problem.op]
        self.declaration(op, case.problem, verdict.tactic)
        if verdict.lane in ("property", "stability") or not verdict.operands:
            return
        for batch in range(batches_of(op, case)):
            operands = operands_of(op, case, batch, self.plan.tensors)
            if batch == 0 and operands.sha256() != verdict.operands:
                raise report.ReportError(f"the verdict of {verdict.case} to resume from is of other operands; leave out --resume")
            self.coverage.add(case, operands)

    # One case -----------------------------------------------------------------------------------------------------------

    def _verdict(self, item: Listed, tactic: str, status: Status, reason: str = "", **more: object) -> Verdict:
        op = ops()[item.case.problem.op]
        base = Verdict(
            str(item.case),
            self.plan.backend,
            tactic,
            item.lane,
            item.level,
            status,
            reason,
            execution=self.execution,
            source=self.plan.tensors if item.lane == "tensors" else "",
            products=products_of(op, item.case.problem) if item.lane != "reject" else 0,
        )
        if "clause" not in more:
            more["clause"] = op.judged[item.case.problem.variant]
        return replace(base, **more)  # type: ignore[arg-type]

    def judge(self, item: Listed, support: str | Fault | None) -> Iterator[Verdict]:
        """The verdicts of one listed case, one per tactic."""
        op = ops()[item.case.problem.op]
        if self.execution is Execution.COMPILED:
            reason = support if isinstance(support, str) and support.startswith(NOT_EXECUTED) else NOT_EXECUTED
            yield self._verdict(item, "default", Status.UNSUPPORTED, reason)
            return
        if item.lane == "reject":
            yield self._rejected(op, item, support)
            return
        if isinstance(support, Fault):
            yield self._verdict(item, "default", _ENDINGS[support.ending], f"supports() failed: {support.reason}", clause="BCK-2")
            return
        if support is not None:
            yield self._verdict(item, "default", Status.UNSUPPORTED, support)
            return
        try:
            tactics = self.tactics(item.case.problem)
        except WorkerError as error:
            yield self._verdict(item, "default", _ENDINGS[error.fault.ending], f"tactics() failed: {error}", clause="BCK-2")
            return
        self._admitted.clear()
        for tactic in tactics:
            declaration, wrong, kind = self.declaration(op, item.case.problem, tactic)
            if declaration is None:
                yield self._verdict(item, tactic, Status.MALFORMED, f"declaration: {wrong}", clause="DEC-1")
            else:
                try:
                    yield self._by_lane(op, item, tactic, declaration, kind)
                except ProgramError as error:
                    yield self._verdict(item, tactic, Status.MALFORMED, f"declaration: {error}", clause="DEC-1")

    def _by_lane(self, op: Op, item: Listed, tactic: str, declaration: Declaration, kind: str) -> Verdict:
        """Raises ProgramError where the declared program has no value on the case's operands."""
        if item.lane == "property":
            return self._property(op, item, tactic, declaration)
        if item.lane == "stability":
            return self._stability(op, item, tactic, declaration)
        if item.lane == "audit":
            return replace(self._probe(op, item, tactic, declaration)[0], declared=kind)
        if item.lane in ("bounded", "tensors"):
            declaration, kind = self._measured(op, item.case.problem, tactic, declaration, kind)
        return replace(self._compute(op, item, tactic, declaration)[0], declared=kind)

    # The accumulator ------------------------------------------------------------------------------------------------------

    def _probe(self, op: Op, item: Listed, tactic: str, declaration: Declaration) -> tuple[Verdict, Codes | None]:
        """The verdict of one probe and, where it gave outputs, the codes of D; run once per session."""
        key = (item.case, tactic)
        if key not in self._probes:
            verdict, outputs = self._compute(op, item, tactic, declaration)
            known = audit_findings.known_order(declaration)
            if verdict.status is Status.DRIFT:
                verdict = replace(verdict, clause="AUD-2" if known else "AUD-3")
            elif "d" in outputs and not known:
                operands = probe_operands(op, item.case)
                wrong = audit_findings.contradiction(op, item.case, operands, declaration, outputs["d"])
                if wrong:
                    verdict = replace(verdict, status=Status.DRIFT, reason=wrong, clause="AUD-4")
            worst = verdict.worst if verdict.wrong else None
            self._probes[key] = replace(verdict, ulp_histogram={}, heat=(), worst=worst), outputs.get("d")
        return self._probes[key]

    def finding(self, op: Op, problem: Problem, tactic: str) -> audit_findings.Found | None:
        """What the audit of one probed problem says of a tactic; None where its battery is not supported or gives no outputs."""
        key = (problem, tactic)
        if key not in self._findings:
            try:
                self._findings[key] = self._found(op, problem, tactic)
            except (ProgramError, WorkerError):  # the verdicts of the audit lane say so
                self._findings[key] = None
        return self._findings[key]

    def _found(self, op: Op, problem: Problem, tactic: str) -> audit_findings.Found | None:
        cases = battery(op, problem)
        if any(self.worker.supports([case.problem for case in cases])) or tactic not in self.tactics(problem):
            return None
        verdicts: list[Verdict] = []
        probes: list[Probed] = []
        for case in cases:
            declaration, _, _ = self.declaration(op, case.problem, tactic)
            if declaration is None:
                return None
            verdict, codes = self._probe(op, Listed(case, "audit", level_of("audit")), tactic, declaration)
            if codes is None:
                return None
            verdicts.append(verdict)
            probes.append(probed(op, case, probe_operands(op, case), codes))
        declaration, _, _ = self.declaration(op, problem, tactic)
        assert declaration is not None
        return audit_findings.found_of(op, problem, tactic, declaration, verdicts, probes)

    def audits(self, verdicts: Sequence[Verdict]) -> tuple[report.Audited, ...]:
        """The findings of every problem and tactic of which a probe is among the verdicts."""
        asked = {
            (case.problem, verdict.tactic) for verdict in verdicts if verdict.lane == "audit" and verdict.operands
            for case in [listed_of(verdict.case).case]
        }
        found = [
            self.finding(ops()[problem.op], problem, tactic) for problem, tactic in sorted(asked, key=str)
            if problem in problems(ops()[problem.op])
        ]
        return tuple(item.record for item in found if item is not None)

    def _measured(self, op: Op, problem: Problem, tactic: str, declaration: Declaration, kind: str) -> tuple[Declaration, str]:
        """The declaration a bounded case is judged by, and its class: what was measured takes the place of what is declared
        looser (AUD-5)."""
        if not op.is_gemm or not audit_findings.leaves_open(declaration):
            return declaration, kind
        subject = subject_of(op, problem)
        found = self.finding(op, subject, tactic) if subject is not None else None
        if found is None or found.gain is None or not audit_findings.alike(declaration, found.declaration):
            return declaration, kind
        return audit_findings.refined(declaration, found.gain), f"measured: {'; '.join(found.gain.words)}"

    def _rejected(self, op: Op, item: Listed, support: str | Fault | None) -> Verdict:
        clause = dict((text, clause) for text, clause in op.rejects)[str(item.case.problem)]
        if isinstance(support, str):
            return self._verdict(item, "default", Status.EXACT, clause=clause)
        if isinstance(support, Fault):  # a refusal is a sentence; an exception may be any mistake of the backend
            reason = f"supports() failed: {support.reason}; a problem outside the contract's domain is refused by a sentence"
            return self._verdict(item, "default", _ENDINGS[support.ending], reason, clause="BCK-2")
        reason = f"supports() admits a problem outside the contract's domain (clause {clause}); it must give a reason"
        return self._verdict(item, "default", Status.DRIFT, reason, clause=clause)

    def _outcome_verdict(self, item: Listed, tactic: str, outcome: Outcome) -> Verdict | None:
        """The verdict of an outcome that gives nothing to judge; None where it does."""
        if outcome.status in _ENDINGS:
            reason = outcome.reason or "; ".join(outcome.findings)
            return self._verdict(
                item, tactic, _ENDINGS[outcome.status], reason, clause="BCK-3", kernel=outcome.kernel, seconds=outcome.seconds
            )
        if outcome.findings:
            return self._verdict(
                item, tactic, Status.MALFORMED, "; ".join(outcome.findings), clause="MEM-1", kernel=outcome.kernel
            )
        return None

    def _compute(
        self, op: Op, item: Listed, tactic: str, declaration: Declaration
    ) -> tuple[Verdict, Mapping[str, Codes]]:
        """Run and judge one case on one tactic, in as many batches as its probes need; also the outputs of the last batch."""
        case = item.case
        specs = tensors_of(op, case.problem)
        batches = batches_of(op, case)
        judgements: list[Judgement] = []
        shown: dict[str, bool] = {}
        seconds, kernel, kernel_source, digest = 0.0, "", Kernel.CLAIMED, ""
        statement, operand_digest = "", ""
        elements = 0
        for batch in range(batches):
            operands = operands_of(op, case, batch, self.plan.tensors)
            self.worker.submit(
                case.problem, tactic, operands, specs, observe=self.device != "host", label=str(case), timeout=self.plan.timeout
            )
            try:
                operand_digest = operand_digest or operands.sha256()
                expected, statement, cut, found = self._admissible(op, case, operands, declaration, batch, batches)
                shown = shown if batch else found
                self.coverage.add(case, operands)
            finally:
                outcome = self.worker.collect()
            failed = self._outcome_verdict(item, tactic, outcome)
            if failed is not None:
                return replace(failed, operands=operand_digest), {}
            elements += sum(codes.size for codes in outcome.outputs.values())
            judgements.append(_judgement(op, case, operands, declaration, outcome, expected, cut))
            seconds += outcome.seconds
            kernel, kernel_source = outcome.kernel, outcome.kernel_source
            digest = digest or digest_outputs(outcome.outputs)
        verdict = self._settle(
            item,
            tactic,
            declaration,
            judgements,
            shown,
            Verdict(
                "",
                "",
                "",
                "",
                0,
                Status.EXACT,
                kernel=kernel,
                kernel_source=kernel_source,
                operands=operand_digest,
                total=elements,
                sample=statement,
                seconds=seconds,
                output_sha256=digest,
            ),
        )
        return verdict, outcome.outputs

    def _admissible(
        self, op: Op, case: Case, operands: Operands, declaration: Declaration, batch: int, batches: int
    ) -> Admitted:
        """What one batch may output and, of the first, which faults it would have shown; worked out once for all tactics of a
        case that declare the same, where it is one batch."""
        known = self._admitted.get((case, declaration))
        if known is None:
            expected, statement, cut = _expected(op, case, operands, declaration)
            shown = {} if batch else _shown(op, case, operands, declaration, expected, cut)
            known = expected, statement, cut, shown
            if batches == 1:
                self._admitted[case, declaration] = known
        return known

    def _settle(
        self,
        item: Listed,
        tactic: str,
        declaration: Declaration,
        judgements: Sequence[Judgement],
        shown: Mapping[str, bool],
        facts: Verdict,
    ) -> Verdict:
        """One verdict from the judgements of all batches."""
        wrong, judged = sum(j.wrong for j in judgements), sum(j.judged for j in judgements)
        worst = max(
            (j for j in judgements if j.worst),
            key=lambda j: (j.worst.ulps, j.worst.share or 0.0) if j.worst else (0, 0.0),
            default=None,
        )
        histogram: dict[str, int] = {}
        for judgement in judgements:
            for label, count in judgement.ulp_histogram.items():
                histogram[label] = histogram.get(label, 0) + count
        status, reason = _conclusion(wrong, judged, all(j.pointed for j in judgements), shown, declaration)
        heat = worst.heat if worst else ()
        share = worst.worst.share if worst and worst.worst else None
        name = item.case.problem.op
        if status in PASSING and item.lane != "audit":
            if share is None or share <= self._shares.get(name, 0.0):
                heat = ()
            else:
                self._shares[name] = share
        return self._verdict(
            item,
            tactic,
            status,
            reason,
            kernel=facts.kernel,
            kernel_source=facts.kernel_source,
            operands=facts.operands,
            wrong=wrong,
            judged=judged,
            total=facts.total,
            sample=facts.sample,
            worst=worst.worst if worst else None,
            ulp_histogram=histogram,
            power=dict(shown),
            seconds=facts.seconds,
            heat=heat,
            output_sha256=facts.output_sha256,
        )

    def _property(self, op: Op, item: Listed, tactic: str, declaration: Declaration) -> Verdict:
        try:
            found = properties.judge_property(op, item.case, tactic, declaration, self._execute(op, tactic, item))
        except Refused as refused:
            return self._verdict(item, tactic, Status.UNSUPPORTED, str(refused))
        if isinstance(found, Outcome):
            return self._outcome_verdict(item, tactic, found) or self._verdict(item, tactic, Status.MALFORMED, "no outcome")
        return self._related(item, tactic, found)

    def _stability(self, op: Op, item: Listed, tactic: str, declaration: Declaration) -> Verdict:
        run = self._execute(op, tactic, item, others=True)
        found = stability.judge_stability(op, item.case, declaration, run, self.plan.repeats)
        if isinstance(found, Outcome):
            return self._outcome_verdict(item, tactic, found) or self._verdict(item, tactic, Status.MALFORMED, "no outcome")
        return self._related(item, tactic, found)

    def _related(self, item: Listed, tactic: str, found: Finding) -> Verdict:
        """The verdict of a finding about several runs."""
        status = Status.DRIFT if found.wrong else Status.EXACT
        return self._verdict(
            item, tactic, status, found.reason, clause=found.clause, wrong=found.wrong, judged=found.judged, total=found.judged,
            operands=found.operands, kernel=found.kernel,
        )

    def _execute(
        self, op: Op, tactic: str, item: Listed, others: bool = False
    ) -> Callable[[Problem, Operands, Variation], Outcome]:
        """Run the backend on other operands or under another variation, for properties and stability. A problem other than the
        case's own, of which `tactic` may not be a name (BCK-4), takes its first tactic where `others` is set: whatever ran
        between two calls may leak. Raises Refused for one that the backend does not support, or not by this tactic."""
        known: dict[Problem, str | Fault | None] = {item.case.problem: None}

        def execute(problem: Problem, operands: Operands, variation: Variation) -> Outcome:
            if problem not in known:
                known[problem] = self.worker.supports([problem])[0]
            support = known[problem]
            if isinstance(support, Fault):
                return Outcome(support.ending, f"supports() failed for {problem}: {support.reason}", log=support.log)
            if support is not None:
                raise Refused(f"the relation needs {problem}: {support}")
            name = tactic
            if problem != item.case.problem:
                try:
                    named = self.tactics(problem)
                except WorkerError as error:
                    return Outcome(error.fault.ending, f"tactics() failed for {problem}: {error}", log=error.fault.log)
                if tactic not in named and not others:
                    raise Refused(f"the relation needs {problem}: {NOT_NAMED} {tactic} for it")
                name = tactic if tactic in named else named[0]
            specs = tensors_of(op, problem)
            return self.worker.execute(problem, name, operands, specs, variation, label=str(item.case), timeout=self.plan.timeout)

        return execute


Cut = tuple[Problem, Operands, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
Admitted = tuple[Mapping[str, Expectation], str, Cut | None, dict[str, bool]]
"""Expectations, statement of the sample, what the sample cut out, fault classes that the case would have shown."""


def batches_of(op: Op, case: Case) -> int:
    """How many runs a case takes: probes light one k per row of A, and K may be longer than M."""
    if case.pattern not in ("onehot", "scaleprobe"):
        return 1
    rows = case.problem.dim("m")
    return max(1, -(-len(rows_probed(op, case)) // rows)) if rows else 1


def _expected(
    op: Op, case: Case, operands: Operands, declaration: Declaration
) -> tuple[Mapping[str, Expectation], str, Cut | None]:
    """(expectations, statement of the sample, what the sample cut out)."""
    sample = sample_of(case) if op.is_gemm else None
    if sample is None:
        return expectations_of(op, case, operands, declaration), "", None
    problem, part = restrict(op, case.problem, operands, sample.rows, sample.columns)
    local = restricted(declaration, sample.rows, sample.columns)
    expected = gemm_expect(op, Case(problem, case.pattern, case.seed), part, local)
    return expected, sample.statement(), (problem, part, (sample.rows, sample.columns))


def _shown(
    op: Op, case: Case, operands: Operands, declaration: Declaration, expected: Mapping[str, Expectation], cut: Cut | None
) -> dict[str, bool]:
    """Fault classes that the case would have shown, on its sample where it has one."""
    if not op.is_gemm or "d" not in expected or case.pattern == "golden" or case.pattern in AUDITS:
        return {}
    local = case if cut is None else Case(cut[0], case.pattern, case.seed)
    return dict(power(op, local, operands if cut is None else cut[1], declaration, expected["d"]))


def _judgement(
    op: Op,
    case: Case,
    operands: Operands,
    declaration: Declaration,
    outcome: Outcome,
    expected: Mapping[str, Expectation],
    cut: Cut | None,
) -> Judgement:
    """The outputs of one batch against their admissible sets."""
    outputs, untouched = outcome.outputs, outcome.untouched
    given = _given(op, case, operands, declaration, outputs, expected)
    if cut is not None:
        rows, columns = cut[2]
        outputs = {name: codes[np.ix_(rows, columns)] for name, codes in outputs.items()}
        untouched = {name: mask[np.ix_(rows, columns)] for name, mask in untouched.items()}
    return judge_outputs(given, outputs, untouched)


def _conclusion(
    wrong: int, judged: int, pointed: bool, shown: Mapping[str, bool], declaration: Declaration
) -> tuple[Status, str]:
    """Status and sentence of a case whose outputs were judged."""
    if wrong:
        return Status.DRIFT, f"{wrong:,} of {judged:,} judged elements are outside their admissible set"
    if shown.get("zero_output") is False:
        return Status.UNTRUSTED, "an all-zero output would have passed: the declared arithmetic is too loose for this case"
    return (Status.EXACT if pointed or declaration.claim is Claim.BIT_EXACT else Status.WITHIN), ""


@dataclass(frozen=True, slots=True)
class Rejudged:
    """What the loop says of one batch whose outputs are already there."""

    status: Status
    reason: str
    judgement: Judgement
    sample: str
    power: Mapping[str, bool]


def rejudge(op: Op, case: Case, operands: Operands, declaration: Declaration, outcome: Outcome) -> Rejudged:
    """Judge the outcome of one batch as `certify` does, without a worker."""
    wrong, _ = check_declaration(op, case.problem, declaration)
    try:
        expected, statement, cut = _expected(op, case, operands, declaration)
    except ProgramError as error:
        return Rejudged(Status.MALFORMED, f"declaration: {error}", Judgement(0, 0, True, None, {}, ()), "", {})
    shown = _shown(op, case, operands, declaration, expected, cut)
    found = _judgement(op, case, operands, declaration, outcome, expected, cut)
    status, reason = _conclusion(found.wrong, found.judged, found.pointed, shown, declaration)
    if case.pattern in AUDITS and "d" in outcome.outputs and status in PASSING:
        said = audit_findings.contradiction(op, case, operands, declaration, outcome.outputs["d"])
        status, reason = (Status.DRIFT, said) if said else (status, reason)
    if wrong:
        status, reason = Status.MALFORMED, f"declaration: {wrong}"
    elif outcome.findings:
        status, reason = Status.MALFORMED, "; ".join(outcome.findings)
    return Rejudged(status, reason, found, statement, shown)


def _given(
    op: Op,
    case: Case,
    operands: Operands,
    declaration: Declaration,
    outputs: Mapping[str, Codes],
    expected: Mapping[str, Expectation],
) -> Mapping[str, Expectation]:
    """Expectations that depend on the backend's own scales, where the op has such: codes are judged on those."""
    if op.expect_given is None or case.pattern == "golden":
        return expected
    return op.expect_given(case, operands, declaration, outputs)


def listed_of(text: str) -> Listed:
    """The entry behind a case id, whatever its lane. Raises DomainError for an id that means nothing."""
    try:
        return _listed(text)
    except DomainError:
        raise
    except ValueError as error:
        raise DomainError(str(error)) from error


def _listed(text: str) -> Listed:
    *_, pattern, seed = Case.split(text)
    if pattern == "reject":
        return Listed(Case(parse_problem(text.rsplit("/", 2)[0], ops(), check=False), pattern, seed), "reject", 2)
    case = parse_case(text, ops())
    op = ops()[case.problem.op]
    if pattern == "golden":
        vectors.vector_of(case)
    lane = "stability" if pattern == stability.PATTERN else lane_of(op, pattern)
    if lane == "audit":
        check_room(op, case)
    elif lane not in ("property", "stability", "golden") and pattern not in op.patterns:
        raise DomainError(f"{op.name} has no pattern {pattern!r}; it has {', '.join(op.patterns)}")
    return Listed(case, lane, level_of(lane))
