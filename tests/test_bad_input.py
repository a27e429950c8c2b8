"""Everything a user or a backend can get wrong, through the command: one sentence or one verdict, and the documented code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.conformance.cli import main
from lowbit.conformance.exit_codes import ExitCode

Command = Callable[..., subprocess.CompletedProcess[str]]
CASE = "gemm_w4a8_int8/direct/m4n8k64g32/f16/normal/s1"

BACKENDS = '''
"""Backends that misbehave. The tactic names how; `fine` computes as the cpu backend does."""
import ctypes, os, signal, time
import numpy as np
from lowbit.kernels.cpu import backend as cpu

WAYS = {ways}


class Bad:
    name, target = "bad", "cpu"

    def __init__(self):
        self._cpu = cpu()

    def supports(self, problem):
        return None

    def tactics(self, problem):
        return WAYS

    def declare(self, problem, tactic):
        if tactic == "undeclared":
            return None
        found = self._cpu.declare(problem, tactic)
        if tactic == "other sum":
            return type(found)(found.program[1:], found.claim)
        return found

    def prepare(self, problem, tactic, constants):
        return self._cpu.prepare(problem, tactic, constants)

    def stage(self, problem, tactic, activations):
        return self._cpu.stage(problem, tactic, activations)

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        view = outputs["d"]
        if tactic == "raises":
            raise RuntimeError("no tile of this size\\nsecond line")
        if tactic == "exits":
            raise SystemExit(3)
        if tactic == "wrong shape":
            view.memory[...] = np.zeros((view.shape[0] + 1, view.shape[1]), np.uint16)
            return "kernel"
        if tactic == "hangs":
            time.sleep(600)
        if tactic == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if tactic == "leaves":
            os._exit(7)
        name = self._cpu.run(problem, tactic, state, inputs, outputs, workspace, stream)
        if tactic == "floats as codes":
            view.memory[...] = view.memory.view(np.float16).astype(np.float32)
        if tactic == "nan":
            view.memory[1, 3] = 0x7E00
        if tactic == "unwritten":
            view.memory[-1, -1] = 0xFFFF
        if tactic == "far out":
            ctypes.memset(view.pointer + view.memory.nbytes, 0, 1 << 12)
        if tactic == "before":
            ctypes.memset(view.pointer - 2, 0, 2)
        return None if tactic == "nameless" else name


class Broken(Bad):
    def __init__(self):
        raise ImportError("libacme.so.3: cannot open shared object file")


class Halved:
    name, target = "halved", "cpu"

    def run(self):
        pass


class Odd(Bad):
    def supports(self, problem):
        return 5


class Cornered(Bad):
    def supports(self, problem):
        raise ZeroDivisionError("k // 0")


class Listless(Bad):
    def tactics(self, problem):
        return ()


class Refusing(Bad):
    def supports(self, problem):
        return "this machine has no matrix unit"
'''

WAYS = {  # way -> status, what its sentence says
    "fine": ("EXACT", ""),
    "raises": ("RAISED", "run() raised RuntimeError: no tile of this size second line"),
    "exits": ("RAISED", "run() raised SystemExit: 3"),
    "wrong shape": ("RAISED", "could not broadcast input array from shape (5,8) into shape (4,8)"),
    "floats as codes": ("DRIFT", "judged elements are outside their admissible set"),
    "nan": ("DRIFT", "1 of 32 judged elements are outside their admissible set"),
    "unwritten": ("DRIFT", "1 of 32 judged elements are outside their admissible set"),
    "hangs": ("TIMEOUT", "no answer within 2 s; the worker was killed"),
    "crashes": ("CRASHED", "the worker died of SIGSEGV"),
    "leaves": ("CRASHED", "the worker exited with status 7 in the middle of the call"),
    "far out": ("CRASHED", "byte(s) written past its end, the nearest at end+0"),
    "before": ("MALFORMED", "tensor 'd': 2 byte(s) written before its start, the nearest at start-1"),
    "nameless": ("MALFORMED", "run() returned NoneType 'None', expected the name of the kernel"),
    "undeclared": ("MALFORMED", "declare() is malformed: declaration: got 'None' (NoneType), expected Declaration"),
    "other sum": ("MALFORMED", "declaration: the declared program computes"),
    "fine again": ("EXACT", ""),
}


@pytest.fixture
def bad(tmp_path: Path) -> Callable[..., str]:
    """Reference of a class of the module above whose tactics are the ways given."""

    def write(name: str, *ways: str) -> str:
        (tmp_path / "bad.py").write_text(BACKENDS.replace("{ways}", repr(ways or ("fine",))))
        return f"python:bad.py:{name}"

    return write


def only_sentence(done: subprocess.CompletedProcess[str], code: ExitCode, *parts: str) -> None:
    """One line on stderr that holds all parts, no traceback, the code, and no report of a defect."""
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("lowbit: ")
    assert "Traceback" not in done.stdout
    for part in parts:
        assert part in lines[0], lines[0]


def test_every_way_to_misbehave_is_one_verdict_and_the_next_call_works(
    lowbit: Command, bad: Callable[..., str], tmp_path: Path
) -> None:
    """One run, one tactic per way: each ends in its own verdict, the hang and the crashes included, and the last is fine."""
    done = lowbit("run", CASE, "--backend", bad("Bad", *WAYS), "--timeout", "2", "--json", "verdicts.json")
    assert done.returncode == ExitCode.FAILED
    assert done.stderr == ""
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert [verdict["tactic"] for verdict in verdicts] == list(WAYS)
    for verdict, (way, (status, sentence)) in zip(verdicts, WAYS.items(), strict=True):
        assert (verdict["tactic"], verdict["status"]) == (way, status), verdict["reason"]
        assert sentence in verdict["reason"], verdict["reason"]
        assert "\n" not in verdict["reason"]
        repro = f"lowbit run '{CASE}' --backend python:bad.py:Bad --tactic '{way}'" if " " in way else f"--tactic {way}"
        assert (repro in done.stdout) == (status != "EXACT")


@pytest.mark.parametrize(
    ("name", "code", "parts"),
    [
        ("Broken", ExitCode.FAILED, ("does not load", "ImportError: libacme.so.3: cannot open shared object file")),
        ("Halved", ExitCode.FAILED, ("lacks supports, declare",)),
        ("Absent", ExitCode.FAILED, ("does not load", "Absent")),
    ],
)
def test_backend_that_does_not_load_is_one_sentence(
    inside: Command, bad: Callable[..., str], name: str, code: ExitCode, parts: tuple[str, ...]
) -> None:
    only_sentence(inside("certify", bad(name), "--ops", "int4_pack", "--out", "out"), code, *parts)


def test_backend_that_takes_no_argument_says_so(inside: Command) -> None:
    only_sentence(inside("run", CASE, "--backend", "cpu:fast"), ExitCode.FAILED, "takes no argument, got 'fast'")


@pytest.mark.parametrize(
    ("name", "status", "sentence"),
    [
        ("Odd", "MALFORMED", "supports() returned '5', expected None or a sentence that says why not"),
        ("Cornered", "RAISED", "supports() raised ZeroDivisionError: k // 0"),
        ("Listless", "MALFORMED", "tactics() returned (), expected distinct non-empty names"),
    ],
)
def test_answers_that_are_none_become_verdicts(
    inside: Command, bad: Callable[..., str], name: str, status: str, sentence: str
) -> None:
    done = inside("run", CASE, "--backend", bad(name))
    assert (done.returncode, done.stderr) == (ExitCode.FAILED, "")
    assert done.stdout.startswith(status)
    assert sentence in done.stdout


def test_backend_that_refuses_everything_leaves_nothing_to_certify(inside: Command, bad: Callable[..., str]) -> None:
    reference = bad("Refusing")
    only_sentence(inside("run", CASE, "--backend", reference), ExitCode.NOTHING_TO_CERTIFY, "does not support")
    done = inside("certify", reference, "--ops", "int8_quantize", "--per-op", "1", "--out", "out")
    only_sentence(done, ExitCode.NOTHING_TO_CERTIFY, "no case was judged")
    assert "no level granted" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("run", "gemm_nosuch/a/m1/x/normal/s1"), ("unknown op 'gemm_nosuch'", "gemm_w4a16")),
        (("run", CASE.replace("direct", "sideways")), ("no variant 'sideways'", "direct, viaf16")),
        (("run", CASE.replace("f16", "f17")), ("option token 'f17'", "bf16, f16")),
        (("run", CASE.replace("normal", "gaussian")), ("no pattern 'gaussian'", "normal")),
        (("run", CASE.replace("n8", "n12")), ("requires n > 0 and n % 8 == 0", "W4I8-1")),
        (("run", CASE.replace("g32", "g48")), ("W4I8-1",)),
        (("run", CASE.replace("g32", "")), ("needs the dims m, n, k, g",)),
        (("run", CASE.replace("m4", "m4m4")), ("malformed", "letters each followed by a number")),
        (("run", CASE.removesuffix("/s1")), ("malformed", "op/variant/dims/options/pattern/sSEED")),
        (("run", "one two"), ("malformed", "op/variant/dims/options/pattern/sSEED")),
        (("run", CASE.replace("normal/s1", "golden/s9999")), ("golden",)),
        (("run", "nvfp4_quantize/static/m16k128/bf16.nosuch/normal/s0"), ("option token 'nosuch'", "svdquant")),
        (("run", CASE, "--backend", "nosuch"), ("unknown backend 'nosuch'", "registered under 'lowbit.backends' are: ")),
        (("run", CASE, "--backend", "sim:h300"), ("unknown datapath 'h300'",)),
        (("run", CASE, "--backend", "python:nosuch.py:Bad"), ("python:FILE.py:ATTRIBUTE",)),
        (("run", CASE, "--tactic", "nosuch"), ("no tactic 'nosuch'",)),
        (("certify", "cpu", "--ops", "gemm_nosuch"), ("unknown op 'gemm_nosuch'", "gemm_w4a16")),
        (("certify", "cpu", "--level", "L7"), ("--level L7", "L0, L1, L2 or L3")),
        (("certify", "cpu", "--shard", "4/3"), ("--shard 4/3", "1 <= i <= n")),
        (("run", CASE.replace("g32", "g0")), ("requires k > 0 and k % g == 0", "W4I8-1")),
        (("run", CASE.replace("m4", "m9999999999999")), ("too little memory", "take a smaller case")),
        (("run", CASE, "--timeout", "nan"), ("--timeout nan", "seconds above 0")),
        (("certify", "cpu", "--timeout", "-1"), ("--timeout -1", "seconds above 0")),
        (("certify", "cpu", "--target", "cuda"), ("a backend, cpu, and --target cuda",)),
        (("certify",), ("certify needs a backend",)),
        (("certify", "cpu", "--colour"), ("No such option", "--colour")),
        (("list", "nosuch"), ("list one of ops, tensors, options, constraints, cases",)),
        (("list", "cases", "--op", "nosuch"), ("unknown op 'nosuch'",)),
        (("explain", CASE, "4,0"), ("outside the output of shape (4, 8)",)),
        (("explain", CASE, "1"), ("expected 2 numbers joined by commas",)),
        (("reduce", CASE), ("does not fail on cpu",)),
        (("run", CASE.replace("normal", "prop_rows"), "--bundle", "b.safetensors"), ("a bundle is one run",)),
        (("nosuch",), ("No such command",)),
    ],
)
def test_wrong_command_line_is_one_sentence_and_nothing_is_run(
    inside: Command, tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    only_sentence(inside(*arguments), ExitCode.USAGE, *parts)
    assert list(tmp_path.iterdir()) == []


def test_the_lists_say_what_a_vendor_has_to_know_of_an_op(inside: Command) -> None:
    tensors = inside("list", "tensors", "--op", "gemm_w4a8_int8", "--json", "t.json")
    assert tensors.returncode == 0
    rows = {row["tensor"]: row for row in json.loads(Path("t.json").read_text(encoding="utf-8"))}
    assert {name: (row["role"], row["format"], row["shape"]) for name, row in rows.items()} == {
        "a": ("activation", "int8", "[m, k]"), "w": ("constant", "uint4", "[n, k]"),
        "group_scale": ("constant", "by option out", "[n, k/g]"), "token_scale": ("activation", "by option out", "[m]"),
        "bias": ("constant", "by option out", "[n]"), "d": ("output", "by option out", "[m, n]"),
    }
    assert rows["bias"]["where"] == "bias: bias"
    assert "out     bf16, f16" in inside("list", "options", "--op", "gemm_w4a8_int8").stdout
    assert "W4I8-1" in inside("list", "constraints", "--op", "gemm_w4a8_int8").stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("list", "ops"), ExitCode.REACHED),
        (("run", "one two"), ExitCode.USAGE),
        (("verify", "nosuch.json"), ExitCode.BAD_INPUT),
        (("certify", "--target", "rocm"), ExitCode.NOTHING_TO_CERTIFY),
        (("run", CASE, "--json", "wall/v.json"), ExitCode.NOT_WRITABLE),
    ],
)
def test_code_is_that_of_the_process(lowbit: Command, tmp_path: Path, arguments: tuple[str, ...], code: ExitCode) -> None:
    """What the shell sees; the other tests of mistakes open the same door without a process."""
    (tmp_path / "wall").write_text("a file")
    done = lowbit(*arguments)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (1 if code else 0)


def test_target_without_a_backend_is_said_in_one_sentence(inside: Command) -> None:
    only_sentence(inside("certify", "--target", "vulkan"), ExitCode.NOTHING_TO_CERTIFY, "target vulkan: nothing to certify")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good bundle and a good report."""
    folder = tmp_path_factory.mktemp("made")
    certify = ("certify", "cpu", "--ops", "int8_quantize", "--per-op", "1", "--level", "L1", "--out", folder / "out")
    for arguments in (("run", CASE, "--bundle", folder / "case.safetensors"), certify):
        with pytest.raises(SystemExit, match=r"^0$"):
            main([str(argument) for argument in arguments])
    return folder


def _truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A bundle with its own JSON changed."""

    def spoil(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        outer = json.loads(data[8 : 8 + size])
        inner = json.loads(outer["__metadata__"]["lowbit"])
        change(inner)
        outer["__metadata__"]["lowbit"] = json.dumps(inner)
        text = json.dumps(outer).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return spoil


SPOILED_BUNDLES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (_truncated, "is not a readable safetensors file"),
    "empty": (lambda data: b"", "is not a readable safetensors file"),
    "text": (lambda data: b"not a bundle\n" * 40, "is not a readable safetensors file"),
    "last byte": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "do not have the digests of the header"),
    "schema": (_header(lambda h: h.update(schema="lowbit-bundle/9")), "is not a lowbit bundle"),
    "no tactic": (_header(lambda h: h.pop("tactic")), "lacks 'tactic'"),
    "other case": (_header(lambda h: h.update(case=CASE.replace("s1", "s2"))), "the operands are not those of"),
    "no case": (_header(lambda h: h.update(case="gemm")), "makes no sense"),
    "other shape": (_header(lambda h: h.update(case=CASE.replace("m4", "m5"))), "tensor in.a should be uint8 (5, 64)"),
    "datapath": (_header(lambda h: h["declaration"]["program"][0].update(datapath="h300")), "declaration cannot be rebuilt"),
    "kernel source": (_header(lambda h: h.update(kernel_source="rumour")), "makes no sense"),
    "batch": (_header(lambda h: h.update(batch=1)), "batch 1"),
}


@pytest.mark.parametrize("way", SPOILED_BUNDLES)
def test_spoiled_bundle_is_refused(inside: Command, made: Path, tmp_path: Path, way: str) -> None:
    spoil, part = SPOILED_BUNDLES[way]
    (tmp_path / "b.safetensors").write_bytes(spoil((made / "case.safetensors").read_bytes()))
    only_sentence(inside("replay", "b.safetensors"), ExitCode.BAD_INPUT, "b.safetensors", part)


def test_good_bundle_passes(inside: Command, made: Path) -> None:
    """The bundle that the others are spoiled copies of."""
    done = inside("replay", made / "case.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"EXACT {CASE} on cpu")


def test_spoiled_report_is_refused_by_every_reader(inside: Command, made: Path, tmp_path: Path) -> None:
    report = (made / "out" / "report.json").read_bytes()
    (tmp_path / "cut.json").write_bytes(_truncated(report))
    (tmp_path / "total.json").write_bytes(report.replace(b'"EXACT"', b'"WITHIN"', 1))
    only_sentence(inside("diff", made / "out" / "report.json", "cut.json"), ExitCode.BAD_INPUT, "cut.json")
    only_sentence(inside("merge", "cut.json", "--out", "merged"), ExitCode.BAD_INPUT, "cut.json")
    only_sentence(inside("merge", "nosuch.json", "--out", "merged"), ExitCode.BAD_INPUT, "nosuch.json cannot be read")
    assert not (tmp_path / "merged").exists()
    for name in ("cut.json", "total.json", "nosuch.json"):
        assert inside("verify", name).returncode == ExitCode.BAD_INPUT, name
    assert inside("verify", made / "out" / "report.json").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("certify", "cpu", "--waivers", "nosuch.toml"), "nosuch.toml cannot be read"),
        (("certify", "cpu", "--strength", "nosuch.json"), "nosuch.json"),
        (("certify", "cpu", "--tensors", "text.bin"), "text.bin"),
        (("certify", "cpu", "--tensors", "nosuch.safetensors"), "nosuch.safetensors"),
        (("replay", "nosuch.safetensors"), "nosuch.safetensors"),
        (("explain", "text.bin", "0,0"), "not a readable safetensors file"),
    ],
)
def test_missing_or_foreign_file_is_refused_before_anything_runs(
    inside: Command, tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    (tmp_path / "text.bin").write_bytes(b"plain text, not safetensors\n" * 9)
    more = ("--ops", "int8_quantize", "--out", "out") if arguments[0] == "certify" else ()
    only_sentence(inside(*arguments, *more), ExitCode.BAD_INPUT, part)
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("certify", "cpu", "--ops", "int8_quantize", "--out", "wall/out"),
        ("run", CASE, "--bundle", "wall/b.safetensors"),
        ("certify", "cpu", "--ops", "int8_quantize", "--out", "out", "--json", "wall/figures.json"),
        ("run", CASE, "--json", "wall/v.json"),
        ("list", "ops", "--json", "wall/ops.json"),
        ("replay", "b.safetensors", "--json", "wall/v.json"),
    ],
)
def test_output_that_cannot_be_written_is_found_first(inside: Command, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """The folder would lie below a file, which no right can change; nothing is left behind."""
    (tmp_path / "wall").write_text("a file")
    done = inside(*arguments)
    only_sentence(done, ExitCode.NOT_WRITABLE, "cannot be written")
    assert done.stdout == ""
    assert not (tmp_path / "out" / "report.json").exists()


def _workers(parent: int) -> list[int]:
    """Processes that serve a parent as workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--parent" in words and words[words.index(b"--parent") + 1] == str(parent).encode():
            found.append(int(folder.name))
    return found


def test_interrupt_ends_with_its_own_code_and_keeps_the_verdicts(tmp_path: Path) -> None:
    """Ctrl-C: one sentence, 130, no report, whole lines on disk."""
    command = [str(Path(sysconfig.get_path("scripts")) / "lowbit"), "certify", "cpu", "--ops", "gemm_w4a8_int8", "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "out" / "verdicts.jsonl"
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    assert told.splitlines()[-1] == "lowbit: interrupted; the verdicts so far are in verdicts.jsonl, continue with --resume"
    assert not (tmp_path / "out" / "report.json").exists()
    first, *lines = partial.read_text().splitlines()
    assert json.loads(first)["run"]["backend"] == "cpu"
    assert all(json.loads(line)["case"] for line in lines)


def test_killed_run_is_resumed_and_keeps_its_verdicts(lowbit: Command, tmp_path: Path) -> None:
    """kill -9 in the middle: the worker dies too, whole verdicts are on disk, --resume judges the rest, and the report is that of
    a run that was never killed."""
    arguments = ("certify", "cpu", "--ops", "gemm_w4a8_int8", "--per-op", "1", "--level", "L1", "--out")
    whole = lowbit(*arguments, "whole")
    assert whole.returncode == 0, whole.stderr
    partial = tmp_path / "out" / "verdicts.jsonl"
    process = subprocess.Popen(
        [str(Path(sysconfig.get_path("scripts")) / "lowbit"), *arguments, "out"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 12):
        assert process.poll() is None
        time.sleep(0.01)
    workers = _workers(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(workers) == 1
    deadline = time.monotonic() + 5
    while _workers(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _workers(process.pid) == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"verdicts.jsonl"}
    kept = [json.loads(line) for line in partial.read_text().split("\n")[1:-1]]
    with partial.open("ab") as stream:
        stream.write(b'{"case": "gemm_w4a8_int8/dir')  # what a kill leaves of a line
    only_sentence(lowbit(*arguments, "out", "--resume", "--shard", "1/2"), ExitCode.BAD_INPUT, "of another run")
    assert lowbit(*arguments, "out", "--level", "L9").returncode == ExitCode.USAGE
    resumed = lowbit(*arguments, "out", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert not partial.exists()
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "out"))
    same = ("case", "tactic", "status", "operands", "output_sha256", "judged", "power", "worst")
    told = [[{name: verdict[name] for name in same} for verdict in report["verdicts"]] for report in (one, other)]
    assert told[0] == told[1]
    seconds = {verdict["case"]: verdict["seconds"] for verdict in other["verdicts"]}
    assert [verdict["seconds"] for verdict in kept[:-1]] == [seconds[verdict["case"]] for verdict in kept[:-1]]
    for name in ("totals", "coverage", "declarations", "manifest", "level_granted"):
        assert one[name] == other[name], name
    assert lowbit("verify", "out/report.json").returncode == 0
