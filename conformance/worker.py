"""A backend in a process of its own: the parent's side, and the door to the child's.

Decides: what came of one call of a backend (`Outcome`): the bytes read back, or that it raised, crashed, hung or wrote where
it must not; and, after a crash or a hang, whether the suspect fails alone or only after the cases before it.
Refuses: to import a backend in the parent, and to load objects of a backend's classes there (see worker_messages). Started as a
program, this module is the child (see worker_process).

One worker serves many calls: importing a framework takes a second, a call takes milliseconds. The worker is killed after a
hang, started again when the next call needs it, and dies with its parent.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache
from types import TracebackType
from typing import IO, Any

from lowbit.references.declarations import Declaration

from .case import Operands, Problem
from .memory import POISONS, check_placement
from .op import ResolvedTensor, Role
from .verdict import Kernel
from .worker_messages import (
    BY_FILE,
    TAIL,
    VARIATIONS,
    Ending,
    Fault,
    Outcome,
    Variation,
    WorkerError,
    check_record,
    decode_frame,
    differences,
    encode_frame,
    in_unicode,
)
from .worker_process import serve

__all__ = ["VARIATIONS", "Ending", "Fault", "Outcome", "Variation", "Worker", "WorkerError", "check_record", "differences"]

_LOG_LIMIT = 1 << 20  # bytes of the worker's output kept on disk between calls
_POLL = 0.25  # seconds between two looks at whether the worker is alive
_GUARD_HINT = ", probably an access outside its buffers: guard pages surround every tensor"
_PLAIN = Variation()


class _Gone(Exception):
    """The worker died, hung or sent what is no answer."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A submitted call: all that is needed to make it again."""

    request: Mapping[str, Any]
    label: str
    timeout: float
    deadline: float
    after: tuple[str, ...]
    fault: Fault | None  # the worker failed before it had the request


@cache
def _spawner() -> ThreadPoolExecutor:
    """A thread that lives as long as the process. Linux kills a worker when the THREAD that started it ends."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowbit-spawn")


class Worker:
    """One backend in a process of its own. Not for use by several threads at once.

    `reference`: `name` or `name:argument` of an entry point, or `python:FILE.py:ATTRIBUTE`. `timeout`: seconds for one answer;
    `start_timeout`: seconds for starting the process and loading the backend. `path`: folders added to the worker's sys.path.
    The environment (OMP_NUM_THREADS, say) is the parent's. The process starts with the first call that needs it.
    """

    def __init__(
        self, reference: str, *, timeout: float = 60.0, start_timeout: float = 120.0, path: Sequence[str] = ()
    ) -> None:
        self.reference, self.timeout, self.start_timeout = reference, timeout, start_timeout
        self.starts = 0  # processes started so far
        self._path = tuple(path)
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._log: IO[bytes] | None = None
        self._greeting: dict[str, Any] = {}
        self._history: list[str] = []
        self._pending: _Pending | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the running worker, None where none runs."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """End the process. A later call starts a new one."""
        self._pending = None
        if self._link:
            self._link.close()
            self._link = None
            if self._process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(1.0)
        self._kill()

    def hello(self) -> dict[str, Any]:
        """name, target, device, execution: str; describe: dict of str; unpack, probe, registered: bool (registered: found by
        entry point). Raises WorkerError where the backend does not load."""
        try:
            self._start()
        except _Gone as gone:
            raise WorkerError(gone.fault) from None
        return dict(self._greeting)

    def supports(self, problems: Sequence[Problem]) -> list[str | Fault | None]:
        """Per problem None (supported), a sentence (not, and why) or the Fault of a `supports` that failed on it."""
        self._idle()
        answers: list[str | Fault | None] = []
        while len(answers) < len(problems):
            try:
                self._start()
            except _Gone as gone:
                return answers + [gone.fault] * (len(problems) - len(answers))
            try:
                self._send({"call": "supports", "problems": list(problems[len(answers):])}, self.timeout)
                while len(answers) < len(problems):
                    answers.append(self._support(self._receive(time.monotonic() + self.timeout, self.timeout)))
            except _Gone as gone:
                answers.append(gone.fault)
        return answers

    @staticmethod
    def _support(reply: Any) -> str | Fault | None:
        if "raised" in reply:
            return Fault(Ending.RAISED, reply["raised"], reply["log"])
        answer = reply["answer"]
        if answer is None or (type(answer) is str and answer.strip()):
            return " ".join(answer.split()) if answer else None
        return Fault(Ending.MALFORMED, f"supports() returned {str(answer)[:60]!r}, expected None or a sentence that says why not")

    def code(self) -> str:
        """The digest of the backend's code (`code_digest`). Raises WorkerError."""
        return str(self._ask({"call": "code"}))

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """Names of the tactics for a problem. Raises WorkerError."""
        names = self._ask({"call": "tactics", "problem": problem})
        good = type(names) is tuple and names and all(type(name) is str and name for name in names)
        if not good or len(set(names)) != len(names):
            raise WorkerError(Fault(Ending.MALFORMED, f"tactics() returned {names!r}, expected distinct non-empty names"))
        return tuple(names)

    def declare(self, problem: Problem, tactic: str = "default") -> Declaration:
        """The backend's declaration, every field checked. Raises WorkerError."""
        found = self._ask({"call": "declare", "problem": problem, "tactic": tactic})
        try:
            check_record(found, Declaration)
        except ValueError as error:
            raise WorkerError(Fault(Ending.MALFORMED, f"declare() is malformed: {error}")) from None
        declaration: Declaration = found
        return declaration

    def execute(
        self, problem: Problem, tactic: str, operands: Operands, tensors: Sequence[ResolvedTensor],
        variation: Variation = _PLAIN, *, observe: bool = False, label: str = "", timeout: float | None = None,
    ) -> Outcome:
        """`submit`, then `collect`."""
        self.submit(problem, tactic, operands, tensors, variation, observe=observe, label=label, timeout=timeout)
        return self.collect()

    def submit(
        self, problem: Problem, tactic: str, operands: Operands, tensors: Sequence[ResolvedTensor],
        variation: Variation = _PLAIN, *, observe: bool = False, label: str = "", timeout: float | None = None,
    ) -> None:
        """Start one call of the backend and return. `operands`: codes of every tensor that is not OUTPUT, in its `shape`.
        `observe`: watch which kernels are launched (the first repeat only, and slower). `label`: name of the call in
        messages. `timeout`: seconds for the whole call with its repeats. Raises ValueError for operands that do not fit, and
        RuntimeError where another call is not collected yet."""
        self._idle()
        check_placement(variation.placement)
        if variation.poison not in range(len(POISONS)) or variation.repeats < 1 or variation.row_pad < 0:
            raise ValueError(f"{variation} needs poison 0 or 1, repeats >= 1 and row_pad >= 0")
        codes = {}
        for tensor in tensors:
            if tensor.role is Role.OUTPUT:
                continue
            if tensor.name not in operands or operands[tensor.name].codes.shape != tensor.shape:
                got = operands[tensor.name].codes.shape if tensor.name in operands else "nothing"
                raise ValueError(f"{problem}: tensor {tensor.name!r} needs codes of shape {tensor.shape}, got {got}")
            codes[tensor.name] = operands[tensor.name].codes
        request = {
            "call": "execute", "problem": problem, "tactic": tactic, "tensors": tuple(tensors), "codes": codes,
            "variation": astuple(variation), "observe": observe, "guarded": True,
        }
        timeout = self.timeout if timeout is None else timeout
        self._pending = self._begin(request, label or str(problem), timeout)

    def collect(self) -> Outcome:
        """The outcome of the submitted call. A call that crashes or hangs is made again alone in a fresh worker, and a crash
        once more with open guards, which shows where a write went. Raises RuntimeError where nothing was submitted."""
        pending, self._pending = self._pending, None
        if pending is None:
            raise RuntimeError("collect() without submit()")
        try:
            return self._finish(pending)
        except _Gone as gone:
            fault = gone.fault
        if not pending.after:
            return self._explain(pending, fault)
        try:
            alone = self._again(pending)
        except _Gone as gone:
            return self._explain(pending, gone.fault)
        reason = (
            f"{fault.reason}; alone in a fresh worker the same call ends {alone.status}, so look at the calls before it: "
            f"{len(pending.after)} in this worker, the last {pending.after[-1]}"
        )
        return Outcome(fault.ending, reason, poison=alone.poison, sequence=True, after=pending.after, log=fault.log)

    def _again(self, pending: _Pending, *, guarded: bool = True) -> Outcome:
        self._kill()
        return self._finish(self._begin({**pending.request, "guarded": guarded}, pending.label, pending.timeout))

    def _explain(self, pending: _Pending, fault: Fault) -> Outcome:
        """The outcome of a call that fails by itself."""
        reason = fault.reason
        if _GUARD_HINT in reason:
            try:
                opened = self._again(pending, guarded=False)
            except _Gone:
                reason += "; it also dies with the guard pages opened, so the access is far from every tensor of the suite"
            else:
                where = "; ".join(opened.findings) or "no byte around any tensor changes, so it read outside its buffers"
                reason += f"; with the guard pages opened it ends {opened.status}: {where}"
            self._kill()
        poison = POISONS[pending.request["variation"][0]]
        return Outcome(fault.ending, reason, poison=poison, after=pending.after, log=fault.log)

    def _begin(self, request: Mapping[str, Any], label: str, timeout: float) -> _Pending:
        fault: Fault | None = None
        after: tuple[str, ...] = ()
        try:
            self._start()
            after = tuple(self._history)
            self._history.append(label)
            self._send(request, timeout)
        except _Gone as gone:
            fault = gone.fault
        return _Pending(request, label, timeout, time.monotonic() + timeout, after, fault)

    def _finish(self, pending: _Pending) -> Outcome:
        if pending.fault:
            raise _Gone(pending.fault)
        reply = self._receive(pending.deadline, pending.timeout)
        if reply.get("lost"):
            self._kill()
            reason = f"{reply['raised']}; the device does no more work in that process ({reply['lost']})"
            raise _Gone(Fault(Ending.CRASHED, reason, reply["log"]))
        poison = POISONS[pending.request["variation"][0]]
        if "raised" in reply:
            return Outcome(Ending.RAISED, reply["raised"], poison=poison, after=pending.after, log=reply["log"])
        answer = reply["answer"]
        findings, observed = tuple(answer["findings"]), answer.get("observed", ())
        reason = findings[0] + (f" (and {len(findings) - 1} more)" if len(findings) > 1 else "") if findings else ""
        return Outcome(
            Ending.MALFORMED if findings else Ending.OK, reason, answer.get("outputs", {}), tuple(answer.get("digests", ())),
            answer.get("variation", ""), ", ".join(observed) or answer.get("kernel", ""),
            Kernel.OBSERVED if observed else Kernel.CLAIMED, findings, answer.get("seconds", 0.0), poison, after=pending.after,
        )

    def _idle(self) -> None:
        if self._pending:
            raise RuntimeError(f"{self._pending.label} was submitted and not collected")

    def _ask(self, request: Mapping[str, Any]) -> Any:
        """The answer to a small request. Raises WorkerError."""
        self._idle()
        try:
            self._start()
            self._send(request, self.timeout)
            reply = self._receive(time.monotonic() + self.timeout, self.timeout)
        except _Gone as gone:
            raise WorkerError(gone.fault) from None
        if "raised" in reply:
            raise WorkerError(Fault(Ending.RAISED, reply["raised"], reply["log"]))
        return reply["answer"]

    def _start(self) -> None:
        """Start the process where none runs. Raises _Gone where the backend does not load."""
        if self._process:
            return
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile("a+b")  # noqa: SIM115  (it lives as long as the process)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        command = [sys.executable, "-P", "-m", __name__, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        with theirs:
            self._process = _spawner().submit(
                subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(theirs.fileno(),),
                start_new_session=True,
            ).result()
        self._link, self._log, self._history = ours, log, []
        self.starts += 1
        self._send({"reference": self.reference, "path": self._path}, self.start_timeout)
        reply = self._receive(time.monotonic() + self.start_timeout, self.start_timeout)
        if "raised" in reply:
            self._kill()
            raise _Gone(Fault(Ending.RAISED, reply["raised"], reply["log"]))
        self._greeting = {**reply["answer"], "registered": not self.reference.startswith(BY_FILE)}

    def _send(self, message: Any, timeout: float) -> None:
        link = self._link
        if link is None:
            raise _Gone(Fault(Ending.CRASHED, "the worker is gone"))
        link.settimeout(timeout)
        try:
            for buffer in encode_frame(message):
                link.sendall(buffer)
        except TimeoutError:
            raise _Gone(self._hung(timeout)) from None
        except OSError:
            raise _Gone(self._died()) from None

    def _receive(self, deadline: float, timeout: float) -> Any:
        """The next answer. Raises _Gone, with the worker killed, where none comes until `deadline`, which is the end of
        `timeout` seconds."""

        def read(size: int) -> bytearray:
            data = bytearray(size)
            view = memoryview(data)
            while view:
                count = self._read_some(view, deadline, timeout)
                view = view[count:]
            return data

        try:
            reply = in_unicode(decode_frame(read))
            if type(reply) is not dict or not ({"raised", "log"} <= reply.keys() or "answer" in reply):
                raise pickle.UnpicklingError("it is no reply")
        except _Gone:
            raise
        except Exception as error:  # whatever a hostile pickle raises
            fault = Fault(Ending.MALFORMED, f"the worker's answer cannot be read: {error}", self._tail())
            self._kill()
            raise _Gone(fault) from None
        if self._log and os.fstat(self._log.fileno()).st_size > _LOG_LIMIT:
            os.ftruncate(self._log.fileno(), 0)
        return reply

    def _read_some(self, view: memoryview, deadline: float, timeout: float) -> int:
        """Read at least one byte. What the worker has already sent is read even past the deadline."""
        link, process = self._link, self._process
        if link is None or process is None:
            raise _Gone(Fault(Ending.CRASHED, "the worker is gone"))
        dead = False
        while True:
            link.settimeout(max(min(_POLL, deadline - time.monotonic()), 0.001))
            try:
                count = link.recv_into(view)
            except TimeoutError:
                if dead:  # a child of the worker holds the socket open
                    raise _Gone(self._died()) from None
                dead = process.poll() is not None
                if not dead and time.monotonic() > deadline:
                    raise _Gone(self._hung(timeout)) from None
                continue
            except OSError:
                count = 0
            if not count:
                raise _Gone(self._died())
            return count

    def _tail(self) -> str:
        if self._log is None:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), TAIL, max(size - TAIL, 0)).decode(errors="replace")

    def _hung(self, seconds: float) -> Fault:
        if self._process:  # faulthandler writes where it hangs
            self._process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
        fault = Fault(Ending.TIMEOUT, f"no answer within {math.ceil(seconds * 10) / 10:g} s; the worker was killed", self._tail())
        self._kill()
        return fault

    def _died(self) -> Fault:
        code: int | None = None
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(2.0)
        reason = "the worker closed its connection and was killed"
        if code is not None and code < 0:
            known = {each.value: each.name for each in signal.Signals}
            reason = f"the worker died of {known.get(-code, f'signal {-code}')}"
            if -code in (signal.SIGSEGV, signal.SIGBUS) and self._greeting.get("device") == "host":
                reason += _GUARD_HINT
            if -code == signal.SIGKILL:
                reason += "; a machine that runs out of memory does this"
        elif code is not None:
            reason = f"the worker exited with status {code} in the middle of the call"
        fault = Fault(Ending.CRASHED, reason, self._tail())
        self._kill()
        return fault

    def _kill(self) -> None:
        """End the worker and all processes of its group."""
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._link:
            self._link.close()
            self._link = None
        if self._log:
            self._log.close()
            self._log = None


if __name__ == "__main__":
    serve()
