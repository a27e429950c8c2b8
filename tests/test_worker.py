"""Every way in which a backend can fail, seen from the parent: one clear outcome each, and the next call works.

This file is also the backend: the worker loads `backend` (host) and `torch_backend` (torch tensors) from it by path. The
tactic names the misbehaviour.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from lowbit.conformance.backend import BackendError, TensorView
from lowbit.conformance.case import Operands, Problem, Tensor
from lowbit.conformance.device import HostDevice
from lowbit.conformance.op import Family, ResolvedTensor, Role
from lowbit.conformance.verdict import Kernel
from lowbit.conformance.worker import (
    VARIATIONS,
    Ending,
    Fault,
    Outcome,
    Variation,
    Worker,
    WorkerError,
    check_record,
    differences,
)
from lowbit.conformance.worker_process import resolve
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import EXACT_BITS, Claim, Contraction, Declaration, cast, mul
from lowbit.references.formats import BF16, F16, F32, INT4, UINT8, Format

# The backend. It computes out = x + w and changes y to y + 1, on codes.


def _poke(view: Any, offset: int, count: int = 1) -> None:
    """Write native bytes relative to a tensor: behind the back of NumPy."""
    ctypes.memmove(view.pointer + offset, b"\x33" * count, count)


def _span(view: Any) -> int:
    """Bytes from element 0 to the end of the last element."""
    last: int = sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    size: int = view.memory.itemsize
    return size * (last + 1)


def _threads(inputs: Any, outputs: Any, workspace: Any) -> None:
    threads = [threading.Thread(target=lambda: sum(range(1000))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _late(inputs: Any, outputs: Any, workspace: Any) -> None:
    """Return, then write: the memory belongs to nobody by then."""
    pointer = outputs["out"].pointer

    def write() -> None:
        time.sleep(0.2)
        ctypes.memset(pointer, 0x33, 4)

    threading.Thread(target=write, daemon=True).start()


def _drift(inputs: Any, outputs: Any, workspace: Any) -> None:
    Fake.calls += 1
    outputs["out"].memory[1, 2] += Fake.calls // 3 % 2  # every third call changes its mind


def _use_workspace(inputs: Any, outputs: Any, workspace: Any) -> None:
    """An uninitialised workspace shows in the output."""
    outputs["out"].memory[0, 0] = workspace.memory[5]


def _remember(inputs: Any, outputs: Any, workspace: Any) -> None:
    Fake.poisoned = True


def _crash_if_remembered(inputs: Any, outputs: Any, workspace: Any) -> None:
    if Fake.poisoned:
        os.kill(os.getpid(), signal.SIGSEGV)


def _hang_if_remembered(inputs: Any, outputs: Any, workspace: Any) -> None:
    if Fake.poisoned:
        time.sleep(1000)


def _raise(inputs: Any, outputs: Any, workspace: Any) -> None:
    raise ValueError("no such\ntile")


def _leave_child(inputs: Any, outputs: Any, workspace: Any) -> None:
    """A forked child holds every descriptor open while the worker dies."""
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(7)


def _lose_device(inputs: Any, outputs: Any, workspace: Any) -> None:
    """What an accelerator does after a bad access: every later synchronisation of the process fails."""

    def fail(device: HostDevice) -> None:
        raise RuntimeError("illegal address")

    setattr(HostDevice, "synchronize", fail)  # noqa: B010  (a method is no variable to a type checker)


def _last_words(inputs: Any, outputs: Any, workspace: Any) -> None:
    os.write(2, b"y" * 3_000_000 + b"last words\n")
    os.kill(os.getpid(), signal.SIGILL)


BEHAVIOUR: dict[str, Callable[[Any, Any, Any], Any]] = {
    "raise_run": _raise,
    "exit": lambda i, o, w: sys.exit(3),
    "os_exit": lambda i, o, w: os._exit(3),
    "segv": lambda i, o, w: os.kill(os.getpid(), signal.SIGSEGV),
    "kill": lambda i, o, w: os.kill(os.getpid(), signal.SIGKILL),
    "abort": lambda i, o, w: os.abort(),
    "child": _leave_child,
    "hang": lambda i, o, w: time.sleep(1000),
    "slow": lambda i, o, w: time.sleep(1.9),
    "past": lambda i, o, w: _poke(o["out"], _span(o["out"]), 4),
    "before": lambda i, o, w: _poke(o["out"], -2, 2),
    "past_input": lambda i, o, w: _poke(i["x"], _span(i["x"]), 1),
    "past_workspace": lambda i, o, w: _poke(w, 100),
    "read_past": lambda i, o, w: ctypes.string_at(o["out"].pointer + _span(o["out"]) + 4096, 4),
    "change_input": lambda i, o, w: _poke(i["x"], 5),
    "padding": lambda i, o, w: _poke(o["out"], 4 * o["out"].shape[1]) if o["out"].strides[0] > o["out"].shape[1] else None,
    "loud": lambda i, o, w: print("x" * 5_000_000, flush=True),
    "lose_device": _lose_device,
    "loud_crash": _last_words,
    "threads": _threads,
    "late": _late,
    "drift": _drift,
    "workspace": _use_workspace,
    "remember": _remember,
    "crash_if_remembered": _crash_if_remembered,
    "hang_if_remembered": _hang_if_remembered,
    "unwritten": lambda i, o, w: o["out"].memory.__setitem__(2, int.from_bytes(b"\xff" * 4, "little")),
    "resize": lambda i, o, w: setattr(o["out"].memory, "shape", (o["out"].memory.size,)),
    "steal_socket": lambda i, o, w: [os.write(fd, b"garbage on the wire, long enough to be a header") for fd in _sockets()],
}


def _sockets() -> list[int]:
    return [fd for fd in range(3, 64) if Path(f"/proc/self/fd/{fd}").exists()
            and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")]


class Vendor:
    """What a vendor may return by mistake, or not by mistake: unpickling it would run code."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(os.environ.get("LOWBIT_TEST_MARK", os.devnull)),))


class Fake:
    """The backend of this file."""

    name = "fake"
    target = "nowhere"
    calls: ClassVar[int] = 0
    poisoned: ClassVar[bool] = False

    def describe(self) -> Mapping[str, str]:
        return {"compiler": "none", "omp": os.environ.get("OMP_NUM_THREADS", "")}

    def supports(self, problem: Problem) -> Any:
        match problem.variant:
            case "raises":
                raise KeyError("variant")
            case "dies":
                os._exit(5)
            case "false":
                return False
            case "vendor":
                return Vendor()
            case "refused":
                return "no kernel\nfor this"
        return None

    def tactics(self, problem: Problem) -> Any:
        return {"none": (), "twice": ("a", "a"), "number": ("a", 1)}.get(problem.variant, ("default", "other"))

    def declare(self, problem: Problem, tactic: str) -> Any:
        dot = Contraction(("a", "b"), DATAPATHS["hopper_wgmma_fp8"], segment=128, steps=(mul("s"),))
        custom = replace(DATAPATHS["ieee_f32"], name="my_unit")
        match tactic:
            case "vendor":
                return Vendor()
            case "vendor_inside":
                return Declaration((replace(dot, operands=Vendor()),))  # type: ignore[arg-type]
            case "number":
                return Declaration((replace(dot, splits=1.5),))  # type: ignore[arg-type]
            case "bool":
                return Declaration((replace(dot, segment=True),))
            case "list":
                return Declaration([dot])  # type: ignore[arg-type]
            case "lambda":
                return Declaration((lambda x: x,))  # type: ignore[arg-type]
            case "format":
                return Declaration((cast(replace(F32, mantissa_bits=3)),))
            case "disguise":
                return Declaration((replace(dot, datapath=replace(dot.datapath, fraction_bits=3)),))
            case "custom":
                return Declaration((replace(dot, datapath=custom), cast(BF16)))
            case "raise":
                raise RuntimeError("undecided")
        return Declaration((dot, mul("alpha", "beta"), cast(BF16)), Claim.BIT_EXACT, batch_invariant=False)

    def workspace(self, problem: Problem, tactic: str) -> Any:
        return {"bad_workspace": 1.5, "past_workspace": 100}.get(tactic, 16)

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        if tactic == "raise_prepare":
            raise MemoryError
        if tactic == "change_constant":
            constants["w"].memory[1, 0] ^= 1
        return constants["w"]

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any],
        workspace: Any, stream: Any,
    ) -> Any:
        x, y, out = inputs["x"].memory, inputs["y"].memory, outputs["out"].memory
        out[...] = x
        out[...] += state.memory
        y += 1
        if tactic in BEHAVIOUR:
            BEHAVIOUR[tactic](inputs, outputs, workspace)
        return {"no_name": None, "bytes_name": b"kernel", "array": out, "empty_name": ""}.get(tactic, "fake_kernel")


class TorchFake(Fake):
    """The same on torch tensors."""

    device = "cpu"

    def describe(self) -> Mapping[str, str]:
        return {"tensors": "torch"}


backend = Fake
torch_backend = TorchFake()
broken = 3


def explode() -> Any:
    """A backend whose constructor fails."""
    raise OSError("no driver")


# The tests.

ONCE = Variation()
HOST, TORCH = (f"python:{Path(__file__).resolve()}:{name}" for name in ("backend", "torch_backend"))


def problem(variant: str = "plain") -> Problem:
    return Problem("fake", variant, (("m", 5), ("n", 3)), ())


def tensors(rows: int = 5, columns: int = 3) -> tuple[ResolvedTensor, ...]:
    def tensor(name: str, fmt: Format, role: Role) -> ResolvedTensor:
        return ResolvedTensor(name, fmt, (rows, columns), role, Family.REAL, "", (rows, columns))

    return (
        tensor("w", UINT8, Role.CONSTANT), tensor("x", F16, Role.ACTIVATION), tensor("y", BF16, Role.INOUT),
        tensor("out", F32, Role.OUTPUT),
    )


def operands(rows: int = 5, columns: int = 3) -> Operands:
    grid = np.arange(rows * columns).reshape(rows, columns)
    return Operands({
        "w": Tensor((grid % 251).astype(np.uint8), UINT8), "x": Tensor((1000 + 7 * grid % 9973).astype(np.uint16), F16),
        "y": Tensor((3 * grid % 997).astype(np.uint16), BF16),
    })


def call(worker: Worker, tactic: str, how: Variation = ONCE, rows: int = 5, columns: int = 3, **more: Any) -> Outcome:
    return worker.execute(problem(), tactic, operands(rows, columns), tensors(rows, columns), how, label=tactic, **more)


def right(outcome: Outcome, rows: int = 5, columns: int = 3) -> bool:
    """Whether the outputs are x + w and y + 1, by Python integers."""
    given = operands(rows, columns)
    flat = {name: [int(code) for code in tensor.codes.reshape(-1)] for name, tensor in given.items()}
    out = [x + w for x, w in zip(flat["x"], flat["w"], strict=True)]
    return (outcome.outputs["out"].reshape(-1).tolist() == out and outcome.outputs["out"].dtype == np.uint32
            and outcome.outputs["y"].reshape(-1).tolist() == [y + 1 for y in flat["y"]]
            and outcome.outputs["out"].shape == (rows, columns) and outcome.outputs["y"].dtype == np.uint16)


@pytest.fixture(scope="module")
def host() -> Iterator[Worker]:
    with Worker(HOST, timeout=20) as worker:
        yield worker


@pytest.fixture(scope="module")
def torch() -> Iterator[Worker]:
    with Worker(TORCH, timeout=20) as worker:
        yield worker


@pytest.mark.parametrize("rows", [0, 1, 5, 64])
@pytest.mark.parametrize("device", ["host", "torch"])
@pytest.mark.parametrize("name", ["once", *VARIATIONS])
def test_a_sound_backend_is_read_back_whole_under_every_variation(
    request: pytest.FixtureRequest, device: str, name: str, rows: int
) -> None:
    worker: Worker = request.getfixturevalue(device)
    outcome = call(worker, "sound", VARIATIONS.get(name, ONCE), rows)
    assert (outcome.status, outcome.reason, outcome.findings) == (Ending.OK, "", ())
    assert right(outcome, rows)
    assert outcome.distinct == 1
    assert outcome.variation == ""
    assert (outcome.kernel, outcome.kernel_source) == ("fake_kernel", Kernel.CLAIMED)
    assert outcome.seconds > 0
    assert not any(mask.any() for mask in outcome.untouched.values())


def test_hello_says_what_the_backend_is(host: Worker, torch: Worker) -> None:
    assert host.hello() == {
        "name": "fake", "target": "nowhere", "device": "host", "execution": "executed",
        "unpack": False, "probe": False, "registered": False,
        "describe": {"compiler": "none", "omp": os.environ.get("OMP_NUM_THREADS", "")},
    }
    assert torch.hello()["device"] == "cpu"
    assert torch.hello()["describe"] == {"tensors": "torch"}


@pytest.mark.parametrize(
    ("tactic", "status", "reason"),
    [
        ("raise_run", "raised", "run() raised ValueError: no such tile"),
        ("raise_prepare", "raised", "prepare() raised MemoryError"),
        ("exit", "raised", "run() raised SystemExit: 3"),
        ("bad_workspace", "malformed", "workspace() returned '1.5', expected a number of bytes"),
        ("no_name", "malformed", "run() returned NoneType 'None', expected the name of the kernel"),
        ("bytes_name", "malformed", "run() returned bytes \"b'kernel'\", expected the name of the kernel"),
        ("array", "malformed", "run() returned ndarray "),
        ("empty_name", "malformed", "run() returned str '', expected the name of the kernel"),
        ("past", "malformed", "tensor 'out': 4 byte(s) written past its end, the nearest at end+0"),
        ("before", "malformed", "tensor 'out': 2 byte(s) written before its start, the nearest at start-1"),
        ("past_input", "malformed", "tensor 'x': 1 byte(s) written past its end, the nearest at end+0"),
        ("past_workspace", "malformed", "tensor 'workspace': 1 byte(s) written past its end, the nearest at end+0"),
        ("change_input", "malformed", "input 'x' was changed, first in byte 5"),
        ("change_constant", "malformed", "input 'w' was changed, first in byte 3"),
        ("steal_socket", "malformed", "the worker's answer cannot be read: it is no frame"),
    ],
)
def test_what_a_backend_does_wrong_is_named(host: Worker, tactic: str, status: str, reason: str) -> None:
    outcome = call(host, tactic, rows=3)  # 3 x 3: no tensor fills a multiple of 16 bytes, so every end has slack
    assert (outcome.status, outcome.reason[: len(reason)]) == (status, reason)
    assert not outcome.sequence
    assert "\n" not in outcome.reason
    assert right(call(host, "sound")), "the next call works"


def test_a_raising_backend_leaves_its_traceback(host: Worker) -> None:
    assert "in _raise" in call(host, "raise_run").log


@pytest.mark.parametrize("tactic", ["threads", "loud", "resize"])
def test_what_a_backend_may_do(host: Worker, tactic: str) -> None:
    assert right(call(host, tactic))


def test_output_of_megabytes_does_not_pile_up(host: Worker) -> None:
    call(host, "loud")
    assert host._log is not None
    assert os.fstat(host._log.fileno()).st_size < 1 << 20


SEGV = "the worker died of SIGSEGV, probably an access outside its buffers: guard pages surround every tensor; "


@pytest.mark.parametrize(
    ("tactic", "reason"),
    [
        ("os_exit", "the worker exited with status 3 in the middle of the call"),
        ("segv", SEGV + "it also dies with the guard pages opened, so the access is far from every tensor of the suite"),
        ("kill", "the worker died of SIGKILL; a machine that runs out of memory does this"),
        ("abort", "the worker died of SIGABRT"),
        ("child", "the worker exited with status 7 in the middle of the call"),
        ("past", SEGV + "with the guard pages opened it ends malformed: "
                 "tensor 'out': 4 byte(s) written past its end, the nearest at end+0"),
        ("read_past", SEGV + "with the guard pages opened it ends ok: "
                      "no byte around any tensor changes, so it read outside its buffers"),
    ],
)
def test_a_crash_is_an_outcome_and_says_where(host: Worker, tactic: str, reason: str) -> None:
    call(host, "sound")
    outcome = call(host, tactic, rows=4, columns=4)  # 64 bytes: the end of the output is the guard page
    assert (outcome.status, outcome.reason, outcome.sequence) == (Ending.CRASHED, reason, False)
    assert outcome.outputs == {}
    assert right(call(host, "sound")), "the next call works"


def test_a_lost_device_is_a_crash_and_the_next_call_gets_a_fresh_one(host: Worker) -> None:
    outcome = call(host, "lose_device")
    assert (outcome.status, outcome.sequence) == (Ending.CRASHED, False)
    assert outcome.reason == (
        "run() raised RuntimeError: illegal address; the device does no more work in that process (illegal address)"
    )
    assert right(call(host, "sound"))


def test_a_write_before_the_start_faults_at_the_lower_guard(host: Worker) -> None:
    outcome = call(host, "before", Variation(placement="start"))
    assert outcome.status is Ending.CRASHED
    assert outcome.reason.endswith("tensor 'out': 2 byte(s) written before its start, the nearest at start-1")


def test_the_last_words_of_a_crash_are_kept(host: Worker) -> None:
    outcome = call(host, "loud_crash")
    assert outcome.reason == "the worker died of SIGILL"
    assert "yyy" in outcome.log
    assert "last words" in outcome.log
    assert len(outcome.log) <= 4096


def test_a_hang_is_killed_and_says_where(host: Worker) -> None:
    host.hello()
    call(host, "sound")
    pid, start = host.pid, time.monotonic()
    outcome = call(host, "hang", timeout=0.5)
    assert (outcome.status, outcome.reason) == (Ending.TIMEOUT, "no answer within 0.5 s; the worker was killed")
    assert "test_worker.py" in outcome.log, "faulthandler shows the stack"
    assert 0.5 <= time.monotonic() - start < 15
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()
    assert right(call(host, "sound"))


@pytest.mark.parametrize(
    ("tactic", "ending"), [("crash_if_remembered", Ending.CRASHED), ("hang_if_remembered", Ending.TIMEOUT)]
)
def test_a_fault_of_the_sequence_is_not_blamed_on_the_last_call(tactic: str, ending: Ending) -> None:
    with Worker(HOST) as worker:
        for name in ("sound", "remember"):
            assert call(worker, name).status is Ending.OK
        outcome = call(worker, tactic, timeout=1.5)
        assert (outcome.status, outcome.sequence, outcome.after) == (ending, True, ("sound", "remember"))
        assert outcome.reason.endswith(
            "; alone in a fresh worker the same call ends ok, so look at the calls before it: 2 in this worker, the last remember"
        )
        assert worker.starts == 2
        alone = call(worker, tactic)
        assert (alone.status, alone.after) == (Ending.OK, (tactic,)), "the rerun's worker serves on"


def test_a_write_after_the_return_is_a_fault_of_the_sequence() -> None:
    with Worker(HOST) as worker:
        assert call(worker, "late").status is Ending.OK
        time.sleep(0.6)
        outcome = call(worker, "sound")
        assert (outcome.status, outcome.sequence, outcome.after) == (Ending.CRASHED, True, ("late",))


def test_repeats_count_distinct_outputs(host: Worker) -> None:
    """Calls 1, 2 add 0; 3, 4, 5 add 1; 6, 7, 8 add 0."""
    with Worker(HOST) as worker:
        outcome = call(worker, "drift", Variation(repeats=8))
    assert (outcome.status, outcome.distinct, len(outcome.digests)) == (Ending.OK, 2, 2)
    assert right(outcome), "the outputs are those of the first repeat"
    want = 1000 + 7 * 5 + 5  # x + w of element [1, 2] = 5 of the grid
    assert outcome.variation == (
        "repeat 3 differs from the first in output 'out': 1 of 15 elements differ, "
        f"first [1, 2]: {want:#010x} and {want + 1:#010x}"
    )


def test_an_inout_tensor_starts_anew_in_every_repeat(host: Worker) -> None:
    assert right(call(host, "sound", Variation(repeats=3)))


def test_a_finding_in_a_late_repeat_names_it(host: Worker) -> None:
    outcome = call(host, "past", Variation(repeats=3))
    assert outcome.reason.endswith("the nearest at end+0 (repeat 1 of 3)")


def test_two_poisons_separate_unwritten_elements_from_equal_ones(host: Worker) -> None:
    """Row 2 is written with 0xFFFFFFFF: it looks untouched under the first poison only."""
    masks = [call(host, "unwritten", Variation(poison=poison)).untouched["out"] for poison in (0, 1)]
    assert [mask[2].all() for mask in masks] == [True, False]
    assert [mask.sum() for mask in masks] == [3, 0]


def test_elements_never_written_are_untouched_under_both_poisons(torch: Worker, host: Worker) -> None:
    given, shapes = operands(), (*tensors(), ResolvedTensor("more", INT4, (7,), Role.OUTPUT, Family.ELEMENT, "", (7,)))
    for worker in (host, torch):
        for poison, byte in enumerate((0xFF, 0x5A)):
            outcome = worker.execute(problem(), "sound", given, shapes, Variation(poison=poison))
            assert outcome.untouched["more"].all()
            assert outcome.outputs["more"].tolist() == [byte] * 7
            assert not outcome.untouched["out"].any()


def test_an_unwritten_workspace_is_poisoned_so_that_reading_it_shows(host: Worker) -> None:
    got = [call(host, "workspace", Variation(poison=poison)) for poison in (0, 1)]
    assert [int(outcome.outputs["out"][0, 0]) for outcome in got] == [0xFF, 0x5A]
    assert differences(*got) == ("output 'out': 1 of 15 elements differ, first [0, 0]: 0x000000ff and 0x0000005a",)
    assert differences(got[0], got[0]) == ()


def test_padding_between_rows_must_stay(host: Worker) -> None:
    assert call(host, "padding").status is Ending.OK
    for rows, pad in ((5, 1), (5, 3), (2, 8)):
        outcome = call(host, "padding", Variation(row_pad=pad), rows)
        assert outcome.status is Ending.MALFORMED
        assert outcome.reason == (
            f"output 'out': 1 element(s) of padding between rows written, first after row 0 at column 3 (strides ({3 + pad}, 1))"
        )
        assert right(outcome, rows)


@pytest.mark.parametrize("tactic", ["past", "before", "past_input", "past_workspace", "change_input"])
def test_a_torch_device_notices_the_same(torch: Worker, tactic: str) -> None:
    """No guard page there: whatever the size, the arena tells."""
    outcome = call(torch, tactic, rows=4, columns=4)
    assert outcome.status is Ending.MALFORMED
    assert ("was changed" if tactic == "change_input" else "byte(s) written") in outcome.reason
    assert torch.starts == 1


def test_supports_answers_per_problem_and_survives_the_one_that_dies(host: Worker) -> None:
    variants = ["plain", "raises", "refused", "dies", "plain", "false", "vendor", "refused"]
    answers = host.supports([problem(variant) for variant in variants])
    assert answers[0] is None
    assert isinstance(answers[1], Fault)
    assert (answers[1].ending, answers[1].reason) == (Ending.RAISED, "supports() raised KeyError: 'variant'")
    assert answers[2] == "no kernel for this"
    assert isinstance(answers[3], Fault)
    assert (answers[3].ending, answers[3].reason[:35]) == (Ending.CRASHED, "the worker exited with status 5 in ")
    assert answers[4] is None
    assert isinstance(answers[5], Fault)
    assert answers[5].reason == "supports() returned 'False', expected None or a sentence that says why not"
    assert isinstance(answers[6], Fault)
    assert answers[6].ending is Ending.MALFORMED
    assert answers[7] == "no kernel for this"
    assert host.supports([]) == []


def test_tactics_are_distinct_names(host: Worker) -> None:
    assert host.tactics(problem()) == ("default", "other")
    for variant, shown in (("none", "()"), ("twice", "('a', 'a')"), ("number", "('a', 1)")):
        with pytest.raises(WorkerError) as caught:
            host.tactics(problem(variant))
        assert str(caught.value) == f"tactics() returned {shown}, expected distinct non-empty names"


def test_a_declaration_crosses_whole_with_the_records_of_the_parent(host: Worker) -> None:
    got = host.declare(problem())
    dot = Contraction(("a", "b"), DATAPATHS["hopper_wgmma_fp8"], segment=128, steps=(mul("s"),))
    assert got == Declaration((dot, mul("alpha", "beta"), cast(BF16)), Claim.BIT_EXACT, True, False)
    first, last = got.program[0], got.program[2]
    assert isinstance(first, Contraction)
    assert first.datapath is DATAPATHS["hopper_wgmma_fp8"]
    assert last.format is BF16  # type: ignore[union-attr]
    custom = host.declare(problem(), "custom").program[0]
    assert isinstance(custom, Contraction)
    assert custom.datapath == replace(DATAPATHS["ieee_f32"], name="my_unit")


@pytest.mark.parametrize(
    ("tactic", "ending", "reason"),
    [
        ("raise", "raised", "declare() raised RuntimeError: undecided"),
        ("vendor", "malformed", "which is no record of the suite"),
        ("vendor_inside", "malformed", "which is no record of the suite"),
        ("format", "malformed", "it holds a lowbit.references.formats.Format, which is no record of the suite"),
        ("lambda", "raised", "no answer could be sent: "),
        ("number", "malformed", "declare() is malformed: declaration.program[0].splits: got '1.5' (float), expected int"),
        ("bool", "malformed", "declaration.program[0].segment: got 'True' (bool), expected int"),
        ("list", "malformed", "(list), expected tuple["),
        ("disguise", "malformed", "a datapath called 'hopper_wgmma_fp8' exists and has other numbers; give yours another name"),
    ],
)
def test_a_declaration_that_is_no_record_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tactic: str, ending: str, reason: str
) -> None:
    mark = tmp_path / "code_ran_in_the_parent"
    monkeypatch.setenv("LOWBIT_TEST_MARK", str(mark))
    with Worker(HOST) as worker, pytest.raises(WorkerError) as caught:
        worker.declare(problem(), tactic)
    assert caught.value.fault.ending == ending
    assert reason in str(caught.value)
    assert not mark.exists()


def test_the_planted_object_would_run_code_where_it_is_loaded_plainly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    monkeypatch.setenv("LOWBIT_TEST_MARK", str(mark))
    pickle.loads(pickle.dumps(Vendor()))
    assert mark.exists()


def test_check_record_accepts_the_suite_and_names_the_field_it_refuses() -> None:
    check_record(EXACT_BITS, Declaration)
    wrong: Any = (1, "f32")
    dot: Any = Contraction(("a", "b"), DATAPATHS["ieee_f32"])
    check_record(replace(EXACT_BITS, program=(dot,)), Declaration)
    for bad, where in (
        (replace(EXACT_BITS, claim=wrong[0]), r"declaration.claim: got '1' \(int\), expected Claim"),
        (replace(EXACT_BITS, program=wrong[:1]), r"declaration.program\[0\]: got '1' \(int\), expected Contraction or Step"),
        (replace(EXACT_BITS, program=(replace(dot, operands=("a",)),)), r"\[0\].operands: .* expected tuple\[str, str\]"),
        (replace(EXACT_BITS, program=(cast(wrong[1]),)), r"declaration.program\[0\].format: got 'f32' \(str\), expected Format"),
    ):
        with pytest.raises(ValueError, match=where):
            check_record(bad, Declaration)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (f"python:{Path(__file__).resolve()}:broken", "load() raised BackendError: .*TypeError: 'int' object is not callable"),
        (f"python:{Path(__file__).resolve()}:explode", "load() raised BackendError: .*does not load: OSError: no driver"),
        (f"python:{Path(__file__).resolve()}:operands", "lacks name, target, supports, declare, run"),
        ("python:/nowhere/at/all.py:backend", "'/nowhere/at/all.py' to be a file"),
        ("no_such_backend", "load() raised BackendError: unknown backend 'no_such_backend'"),
    ],
)
def test_a_backend_that_does_not_load_fails_every_call_in_one_sentence(reference: str, reason: str) -> None:
    with Worker(reference) as worker:
        with pytest.raises(WorkerError) as caught:
            worker.hello()
        outcome = call(worker, "sound")
        answers = worker.supports([problem(), problem()])
    assert all(part in str(caught.value) for part in reason.split(".*"))
    assert (outcome.status, outcome.reason) == (Ending.RAISED, str(caught.value))
    assert [answer.reason for answer in answers if isinstance(answer, Fault)] == [str(caught.value)] * 2
    assert worker.pid is None


class Surrogate:
    """Says things that UTF-8 cannot hold, wherever a backend says something."""

    name, target = "half \udc80", "cpu"

    def supports(self, problem: Problem) -> str:
        return "no \udc80 way"

    def describe(self) -> Mapping[str, str]:
        return {"driver \udc81": "\udc82"}

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        return replace(EXACT_BITS, program=(mul("scale \udc83"),))

    def run(self, *given: Any) -> str:
        raise OSError("gone \udc84")


def surrogate_backend() -> Surrogate:
    return Surrogate()


def test_texts_that_utf8_cannot_hold_do_not_reach_a_report() -> None:
    with Worker(f"python:{Path(__file__).resolve()}:surrogate_backend") as worker:
        hello = worker.hello()
        assert hello["name"] == "half \\udc80"
        assert hello["describe"]["driver \\udc81"] == "\\udc82"
        assert worker.supports([problem()]) == ["no \\udc80 way"]
        with pytest.raises(WorkerError, match=r"got 'scale \\\\udc83', expected a text that UTF-8 can hold") as caught:
            worker.declare(problem(), "default")
        assert caught.value.fault.ending is Ending.MALFORMED
        assert "gone \\udc84" in call(worker, "default").reason


@pytest.mark.parametrize("text", ["from lowbit.kernels.cpu import backend", "raise OSError('no driver')"])
def test_a_backend_in_a_file_named_as_a_module_stands_in_for_no_module(tmp_path: Path, text: str) -> None:
    before = set(sys.modules)
    (tmp_path / "copy.py").write_text(text, encoding="utf-8")
    (tmp_path / "colorsys.py").write_text(text, encoding="utf-8")
    for name in ("copy", "colorsys"):
        with contextlib.suppress(BackendError):
            resolve(f"python:{tmp_path / name}.py:backend")
    assert importlib.import_module("copy").copy([1]) == [1]
    assert importlib.import_module("colorsys").rgb_to_hsv(1, 1, 1) == (0, 0, 1)
    left = [name for name in set(sys.modules) - before if name.startswith("backend_")]
    assert len(left) == (2 if "import" in text else 0)


def test_submit_returns_at_once_and_collect_waits(host: Worker) -> None:
    host.submit(problem(), "sound", operands(2000, 300), tensors(2000, 300), Variation(repeats=3))
    with pytest.raises(RuntimeError, match="was submitted and not collected"):
        host.supports([problem()])
    with pytest.raises(RuntimeError, match="was submitted and not collected"):
        call(host, "sound")
    assert right(host.collect(), 2000, 300)
    with pytest.raises(RuntimeError, match="without submit"):
        host.collect()


def test_an_answer_that_lies_ready_counts_even_if_it_is_collected_late(host: Worker) -> None:
    host.submit(problem(), "sound", operands(), tensors(), timeout=0.5)
    time.sleep(1.0)
    assert right(host.collect())


def test_a_slow_call_gets_its_whole_time(host: Worker) -> None:
    assert right(call(host, "slow", timeout=2.6))


def test_a_hang_that_is_collected_late_is_told_by_its_own_limit(host: Worker) -> None:
    host.submit(problem(), "hang", operands(), tensors(), timeout=0.3)
    time.sleep(0.5)
    assert host.collect().reason == "no answer within 0.3 s; the worker was killed"


def test_operands_that_do_not_fit_are_refused_before_the_call(host: Worker) -> None:
    with pytest.raises(ValueError, match=r"tensor 'w' needs codes of shape \(4, 3\), got \(5, 3\)"):
        host.execute(problem(), "sound", operands(), tensors(4))
    with pytest.raises(ValueError, match=r"tensor 'y' needs codes of shape \(5, 3\), got nothing"):
        host.execute(problem(), "sound", Operands({n: t for n, t in operands().items() if n != "y"}), tensors())
    for how in (Variation(poison=2), Variation(repeats=0), Variation(row_pad=-1), Variation(placement=8)):
        with pytest.raises(ValueError, match=r"poison 0 or 1, repeats|placement must be"):
            host.execute(problem(), "sound", operands(), tensors(), how)
    assert right(call(host, "sound"))


def test_the_worker_survives_the_thread_that_started_it() -> None:
    with Worker(HOST) as worker:
        thread = threading.Thread(target=worker.hello)
        thread.start()
        thread.join()
        time.sleep(0.3)
        assert right(call(worker, "sound"))
        assert worker.starts == 1


def test_close_ends_the_process_and_a_later_call_starts_another() -> None:
    worker = Worker(HOST)
    assert worker.pid is None
    call(worker, "sound")
    pid = worker.pid
    worker.close()
    assert not Path(f"/proc/{pid}").exists()
    assert right(call(worker, "sound"))
    assert worker.starts == 2
    worker.close()


def test_a_killed_parent_leaves_no_worker_not_even_one_that_hangs() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_worker as t\n"
        "worker = t.Worker(t.HOST)\n"
        "worker.submit(t.problem(), 'hang', t.operands(), t.tensors()); print(worker.pid, flush=True)\n"
        "worker.collect()"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        time.sleep(0.3)
        parent.kill()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "\nState:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
