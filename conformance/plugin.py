"""The cases as pytest items, for people who live in pytest.

    pytest --pyargs lowbit.conformance -p lowbit.conformance.plugin --backend cpu [--level L1] [--lowbit-ops gemm_int4,...]

One item per case; the id is the case id. A failing item prints the verdict and the line that reproduces it. UNSUPPORTED is
reported as a skip with the backend's reason, the only skip there is, and stays countable by `-rs`.
Refuses: to be loaded by default. It adds `--backend`, so it is asked for with -p.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .ops import ops
from .run import Plan, Session, listed_cases
from .selection import PER_OP, Listed
from .verdict import FAILING, Status
from .worker import Worker, WorkerError

__all__ = ["judge", "pytest_addoption", "pytest_configure", "pytest_generate_tests", "pytest_sessionstart", "session"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suite."""
    group = parser.getgroup("lowbit", "lowbit conformance suite")
    group.addoption("--backend", default="cpu", help="backend under test: NAME, NAME:ARGUMENT or python:FILE.py:ATTRIBUTE")
    group.addoption("--level", default="L2", choices=("L0", "L1", "L2", "L3"), help="highest level asked for")
    group.addoption("--lowbit-ops", default="", help="only these ops, comma separated")
    group.addoption("--per-op", default=PER_OP, type=int, help="drawn cases per op, of the list that all backends share")


def _plan(config: pytest.Config) -> Plan:
    names = tuple(name for name in str(config.getoption("--lowbit-ops")).split(",") if name)
    return Plan(config.getoption("--backend"), int(config.getoption("--level")[1:]), names, per_op=config.getoption("--per-op"))


def pytest_configure(config: pytest.Config) -> None:
    """The marker that carries the lane."""
    config.addinivalue_line("markers", "lowbit(lane): a case of the conformance suite")


def pytest_sessionstart(session: pytest.Session) -> None:
    """What is wrong with the options ends the run here, in one sentence, before a case is collected. The backend is loaded once
    to see that it does; not where cases are only listed."""
    plan = _plan(session.config)
    unknown = [name for name in plan.ops if name not in ops()]
    if unknown:
        raise pytest.UsageError(f"unknown op {', '.join(unknown)}; the ops are {', '.join(ops())}")
    if session.config.option.collectonly:
        return
    with Worker(plan.backend, timeout=plan.timeout, path=plan.path) as worker:
        try:
            worker.hello()
        except WorkerError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item per listed case."""
    if "listed" in metafunc.fixturenames:
        found = listed_cases(_plan(metafunc.config))
        metafunc.parametrize("listed", found, ids=[f"{item.case}" for item in found])


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Iterator[Session]:
    """One worker for the whole run."""
    plan = _plan(pytestconfig)
    with Worker(plan.backend, timeout=plan.timeout, path=plan.path) as worker:
        opened = Session(plan, worker)
        opened.open()
        yield opened


def judge(session: Session, listed: Listed) -> None:
    """Judge one case; fail with the verdict's sentence and its repro line."""
    support = session.worker.supports([listed.case.problem])[0]
    for verdict in session.judge(listed, support):
        if verdict.status is Status.UNSUPPORTED:
            pytest.skip(verdict.reason)
        if verdict.status in FAILING:
            pytest.fail(f"{verdict.status}: {verdict.reason} (clause {verdict.clause})\n{verdict.repro}", pytrace=False)
