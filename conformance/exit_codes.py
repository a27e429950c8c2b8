"""Exit codes of the `lowbit` command: what a shell, a CI job or a script may conclude from a run.

Decides: one number per outcome. The table in docs/exit_codes.md lists the same numbers and names, and a test compares the two.
Refuses: a code of its own for every error. A caller branches on what to do next; the message says what happened.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """How a `lowbit` command ended. Numbers are part of the public interface and are never given a second meaning."""

    REACHED = 0
    """The command did what was asked; for `certify`: the requested level is reached."""
    FAILED = 1
    """A verdict breaks the contract (DRIFT, MALFORMED, RAISED, CRASHED, TIMEOUT, UNTRUSTED), or a waived case passes."""
    USAGE = 2
    """The command line is wrong: unknown op, backend or recipe, malformed case id, dims outside the domain of the op."""
    BAD_INPUT = 3
    """A file given to the command is unreadable or inconsistent: truncated, wrong schema, wrong digest, missing shard."""
    NOTHING_TO_CERTIFY = 4
    """No backend for the target, no device, or `--require-device` and a claimed op was not executed on the device."""
    NOT_WRITABLE = 5
    """The output cannot be written; no partial file is left behind."""
    INTERNAL = 6
    """lowbit itself is at fault; the traceback is saved and its path printed."""
    INTERRUPTED = 130
    """Stopped by the user (128 + SIGINT); the verdicts reached so far are not a certificate."""
