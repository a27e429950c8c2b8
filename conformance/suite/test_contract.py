"""Every case of the chosen level, one test each. The plug-in lowbit.conformance.plugin gives the cases and the worker."""

from __future__ import annotations

from lowbit.conformance.plugin import judge
from lowbit.conformance.run import Session
from lowbit.conformance.selection import Listed


def test_case(session: Session, listed: Listed) -> None:
    judge(session, listed)
