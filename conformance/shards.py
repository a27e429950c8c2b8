"""One run in several processes side by side: each judges a shard of the list, and their reports are merged.

Decides: which process judges what (its shard), that a caller hears of verdicts as they are reached, those of a shard in the order
of its list, and that all processes end together, with the caller at the latest. Refuses: to give a report where a process gave
none.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from . import report
from .run import Plan, Session, certify, listed_of, marks_of
from .selection import shard
from .verdict import Verdict
from .worker import WorkerError

__all__ = ["OnStart", "ShardError", "certify_side_by_side", "marks_of_run"]

OnStart = Callable[[int, str, Mapping[str, object]], None]
"""Called with the number of cases to judge, the backend's name and what fixes the verdicts of the run (`marks_of_run`)."""


class ShardError(RuntimeError):
    """A process that judged a shard ended without a report."""


def marks_of_run(plan: Plan, session: Session, jobs: int) -> dict[str, object]:
    """`run.marks_of` of a run in `jobs` processes: resumed under another number, it would not know which cases are in doubt."""
    return {**marks_of(plan, session), "shard": [1, 1] if jobs > 1 else list(plan.shard), "jobs": jobs}


_THREADS = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def _share_of_threads(jobs: int) -> Iterator[None]:
    """Processes started inside take their share of the processors, no more: libraries read these variables once, at import, and
    each would take all. What the user has set stays."""
    given = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(given, str(max(1, len(os.sched_getaffinity(0)) // jobs))))
    try:
        yield
    finally:
        for name in given:
            os.environ.pop(name, None)


def _with_the_caller(link: Connection) -> None:
    """End this process when the caller's has ended, whatever ended it: its side of the pipe is then closed."""
    try:
        link.recv()
    except (EOFError, OSError):
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error, or one with its words where its class does not come out of a pickle."""
    try:
        again: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return again


def _judge(plan: Plan, jobs: int, done: tuple[Verdict, ...], strength: report.Strength | None, link: Connection) -> None:
    """One process: what it sends are (kind, content) pairs, the last one a report, a fault or an error."""
    threading.Thread(target=_with_the_caller, args=(link,), daemon=True).start()

    def start(total: int, session: Session) -> None:
        link.send(("start", (total, session.name, marks_of_run(plan, session, jobs))))

    def reached(verdict: Verdict) -> None:
        link.send(("verdict", verdict))

    try:
        mine = [verdict for verdict in done if shard([listed_of(verdict.case)], *plan.shard)]
        link.send(("report", certify(plan, on_start=start, on_verdict=reached, done=mine, strength=strength)))
    except KeyboardInterrupt:
        return
    except WorkerError as error:  # its argument is a record, and a pickled exception keeps its words alone
        link.send(("fault", error.fault))
    except Exception as error:
        link.send(("error", _portable(error)))


def _messages(links: Mapping[Any, tuple[int, int]]) -> Iterator[tuple[int, str, Any]]:
    """(shard, kind, content) as they come, until every process has given a report. Raises what one of them raised."""
    left = dict(links)
    while left:
        ready: list[Any] = wait(list(left))
        for link in ready:
            index, count = left[link]
            try:
                kind, content = link.recv()
            except (EOFError, ConnectionResetError):
                raise ShardError(
                    f"the process of shard {index}/{count} ended without a report; --resume goes on from the verdicts so far, "
                    "started again with fewer --jobs where memory was short"
                ) from None
            if kind == "fault":
                raise WorkerError(content)
            if kind == "error":
                raise content
            if kind == "report":
                del left[link]
            yield index, kind, content


def certify_side_by_side(
    plan: Plan, jobs: int, *, on_start: OnStart | None = None, on_verdict: Callable[[Verdict], None] | None = None,
    done: Iterable[Verdict] = (), strength: report.Strength | None = None,
) -> report.Report:
    """`run.certify` in `jobs` processes, each with a worker of its own. Verdicts are handed on once every process has started.

    `plan`: of the whole list; `done`: verdicts of an earlier run in as many processes. Raises ValueError for a plan that is a
    shard already, ShardError, and what `run.certify` raises."""
    if plan.shard != (1, 1):
        raise ValueError(f"got shard {plan.shard[0]}/{plan.shard[1]} and {jobs} jobs, expected the whole list or one job")
    context, reached = multiprocessing.get_context("spawn"), tuple(done)
    links: dict[Any, tuple[int, int]] = {}
    processes: list[Any] = []
    try:
        for index in range(1, jobs + 1):
            ours, theirs = context.Pipe()
            given = (replace(plan, shard=(index, jobs)), jobs, reached, strength, theirs)
            process = context.Process(target=_judge, args=given, name=f"lowbit shard {index}/{jobs}", daemon=True)
            with _share_of_threads(jobs):
                process.start()
            theirs.close()
            processes.append(process)
            links[ours] = (index, jobs)
        return _collected(_messages(links), jobs, on_start, on_verdict)
    finally:
        for link in links:
            link.close()
        for process in processes:
            process.terminate()
            process.join()


def _collected(
    messages: Iterator[tuple[int, str, Any]], jobs: int, on_start: OnStart | None, on_verdict: Callable[[Verdict], None] | None
) -> report.Report:
    """The merged report of all messages."""
    starts: dict[int, tuple[int, str, Mapping[str, object]]] = {}
    early: list[Verdict] = []
    found: dict[int, report.Report] = {}
    tell: Callable[[Verdict], object] = early.append
    for index, kind, content in messages:
        if kind == "start":
            starts[index] = content
            if len(starts) == jobs:
                if on_start is not None:
                    _, name, marks = starts[1]
                    on_start(sum(total for total, _, _ in starts.values()), name, marks)
                tell = on_verdict if on_verdict is not None else _nothing
                _each(tell, early)
        elif kind == "verdict":
            tell(content)
        else:
            found[index] = content
    return report.merge([found[index] for index in sorted(found)])


def _nothing(verdict: Verdict) -> None:
    """Where nobody listens."""


def _each(call: Callable[[Verdict], object], verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        call(verdict)
