"""How the Hopper kernels are compiled and kept: by a compiler that this file makes up, so that no CUDA toolkit is needed.

The compiler is a shell script that answers --version, notes each call, and has g++ make a library with one function. Every
sentence of an error is asked for word by word.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lowbit.kernels import cuda_hopper
from lowbit.kernels.hopper_room import build
from lowbit.kernels.hopper_room.build import BuildError, build_all, cache_folder, command, compiled, compiler, library, sources

COMPILER = textwrap.dedent("""\
    #!/bin/sh
    if [ "$1" = --version ]; then echo "made-up compiler $(cat {version})"; exit 0; fi
    echo "$*" >> {calls}
    echo "$NVCC_PREPEND_FLAGS$NVCC_APPEND_FLAGS" >> {added}
    if [ -s {edits} ]; then head -n 1 {edits} >> {room}/deeper.cuh; sed -i 1d {edits}; fi
    while [ "$1" != -o ]; do shift; done
    sleep {seconds}
    if [ -s {fault} ]; then echo "some output"; cat {fault} >&2; echo half > "$2"; exit 2; fi
    echo 'extern "C" int lowbit_answer() {{ return 42; }}' | g++ -shared -fPIC -x c++ - -o "$2"
    """)


@pytest.fixture(name="place")
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a compiler, a room of two sources, and an empty cache."""
    for name in ("bin", "room", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "version").write_text("1.0", encoding="utf-8")
    for name in ("calls", "fault", "added", "edits"):
        (tmp_path / name).touch()
    write_compiler(tmp_path)
    (tmp_path / "room" / "one.cu").write_text('#include <cuda.h>\n#include "deep.cuh"\nint one;\n', encoding="utf-8")
    (tmp_path / "room" / "deep.cuh").write_text('#include "deeper.cuh"\n', encoding="utf-8")
    (tmp_path / "room" / "deeper.cuh").write_text("int deeper;\n", encoding="utf-8")
    (tmp_path / "room" / "two.cu").write_text("int two;\n", encoding="utf-8")
    monkeypatch.setattr(build, "ROOM", tmp_path / "room")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    build._version.cache_clear()
    return tmp_path


def write_compiler(place: Path, seconds: float = 0) -> None:
    names = {name: place / name for name in ("version", "calls", "fault", "added", "edits", "room")}
    path = place / "bin" / "nvcc"
    path.write_text(COMPILER.format(seconds=seconds, **names), encoding="utf-8")
    path.chmod(0o755)


def calls(place: Path) -> list[str]:
    return (place / "calls").read_text(encoding="utf-8").splitlines()


def test_a_library_is_compiled_once_and_loads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = compiled("one.cu", defines={"TILE": 128, "A": "x"}, flags=("-fmad=false",))
    said = capsys.readouterr().err
    assert said == f"lowbit: compiling one.cu A=x TILE=128 for sm_90a, once; kept in {place / 'cache' / 'lowbit' / 'hopper'}\n"
    assert compiled("one.cu", defines={"A": "x", "TILE": 128}, flags=("-fmad=false",)) == path
    loaded = library("one.cu", defines={"TILE": 128, "A": "x"}, flags=("-fmad=false",))
    assert loaded.lowbit_answer() == 42
    assert library("one.cu", defines={"TILE": 128, "A": "x"}, flags=("-fmad=false",)) is loaded
    assert len(calls(place)) == 1
    assert capsys.readouterr().err == ""
    assert sorted(p.suffix for p in cache_folder().iterdir()) == [".lock", ".so"]  # no folder of a build is left


def test_the_command_names_the_architecture(place: Path) -> None:
    compiled("one.cu", defines={"TILE": 128}, flags=("-fmad=false",))
    words = calls(place)[0].split()
    assert "-gencode arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC -fmad=false -DTILE=128" in " ".join(words)
    assert words[-3] == str(place / "room" / "one.cu")


def test_a_change_is_a_new_library(place: Path) -> None:
    first = compiled("one.cu")
    two = compiled("two.cu")
    (place / "room" / "deeper.cuh").write_text("int changed;\n", encoding="utf-8")
    second = compiled("one.cu")
    assert second != first
    assert compiled("two.cu") == two  # it does not include the header
    (place / "version").write_text("1.1", encoding="utf-8")
    build._version.cache_clear()
    third = compiled("one.cu")
    assert third not in (first, second)
    others = {compiled("one.cu", defines={"A": 1}), compiled("one.cu", defines={"A": 2}), compiled("one.cu", flags=("-G",))}
    assert len(others | {third}) == 4
    assert len(calls(place)) == 7
    (place / "version").write_text("1.0", encoding="utf-8")
    (place / "room" / "deeper.cuh").write_text("int deeper;\n", encoding="utf-8")
    build._version.cache_clear()
    assert compiled("one.cu") == first
    assert len(calls(place)) == 7


def test_a_change_while_the_compiler_runs_is_compiled_again(place: Path) -> None:
    """The made-up compiler appends a line of `edits` to a header before it reads it."""
    (place / "edits").write_text("int second;\n", encoding="utf-8")
    kept = compiled("one.cu")
    assert len(calls(place)) == 2
    assert (place / "room" / "deeper.cuh").read_text(encoding="utf-8") == "int deeper;\nint second;\n"
    assert compiled("one.cu") == kept
    assert len(calls(place)) == 2
    (place / "room" / "deeper.cuh").write_text("int deeper;\n", encoding="utf-8")
    assert compiled("one.cu") != kept  # nothing was filed under the name of what was there before the edit
    assert len(calls(place)) == 3


def test_sources_that_keep_changing_are_said(place: Path) -> None:
    (place / "edits").write_text("int second;\nint third;\n", encoding="utf-8")
    with pytest.raises(BuildError) as caught:
        compiled("one.cu")
    assert str(caught.value) == (
        "got sources of one.cu that changed twice while they were compiled, expected them at rest; try again"
    )
    assert {path.suffix for path in cache_folder().iterdir()} == {".lock"}
    assert compiled("one.cu").exists()


def test_variables_that_add_flags_do_not_reach_the_compiler(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no part of a library's name."""
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.setenv(name, "-use_fast_math")
    compiled("one.cu")
    assert (place / "added").read_text(encoding="utf-8") == "\n"


def test_where_the_compiler_lies_is_no_part_of_the_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled("one.cu")
    shutil.copytree(place / "bin", place / "elsewhere" / "bin")
    monkeypatch.setenv("PATH", f"{place / 'elsewhere' / 'bin'}:{os.environ['PATH']}")
    assert command("one.cu", {}, (), Path("/out"))[0] == str(place / "elsewhere" / "bin" / "nvcc")
    assert compiled("one.cu") == first


def test_a_failed_compilation_is_said_and_leaves_nothing(place: Path) -> None:
    (place / "fault").write_text("one.cu(3): error: no such thing\nfatal: stop\nmore\n", encoding="utf-8")
    with pytest.raises(BuildError) as caught:
        compiled("one.cu")
    assert re.fullmatch(
        rf"got exit code 2 from {place}/bin/nvcc, expected a library of one\.cu: one\.cu\(3\): error: no such thing \| fatal: "
        rf"stop; to see all of it, run {place}/bin/nvcc -O3 .*one\.cu -o .*\.so", str(caught.value),
    )
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"]
    (place / "fault").write_text("", encoding="utf-8")
    assert compiled("one.cu").exists()


def test_many_processes_compile_once(place: Path) -> None:
    write_compiler(place, 0.5)
    program = (
        "import sys; from pathlib import Path; from lowbit.kernels.hopper_room import build; build.ROOM = Path(sys.argv[1]); "
        "print(build.library('two.cu').lowbit_answer())"
    )
    asked = [
        subprocess.Popen([sys.executable, "-c", program, str(place / "room")], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate()[0].strip() for process in asked] == ["42"] * 4
    assert len(calls(place)) == 1


def test_all_units_are_built_with_a_count(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = build_all((("one.cu", {}, ()), ("two.cu", {"A": 1}, ()), ("two.cu", {"A": 2}, ())), workers=2)
    said = capsys.readouterr().err
    assert len(set(made)) == 3
    assert [text for text in ("(1 of 3)", "(2 of 3)", "(3 of 3)") if text in said] == ["(1 of 3)", "(2 of 3)", "(3 of 3)"]
    assert said.endswith(f"lowbit: 3 of 3 libraries are in {cache_folder()}\n")


def test_the_door_builds_every_library(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda_hopper, "units", lambda: (("one.cu", {}, ()), ("two.cu", {}, ())))
    assert cuda_hopper.main(["--build"]) == 0
    assert len(calls(place)) == 2
    (place / "fault").write_text("error: no\n", encoding="utf-8")
    (place / "room" / "two.cu").write_text("int other;\n", encoding="utf-8")
    assert cuda_hopper.main(["--build"]) == 1
    assert "cuda_hopper: got exit code 2 from" in capsys.readouterr().err
    assert cuda_hopper.main(["--burn", "x"]) == 2
    assert capsys.readouterr().err == "cuda_hopper: got --burn x, expected --build\n"
    assert cuda_hopper.main([]) == 2
    assert capsys.readouterr().err == "cuda_hopper: got no argument, expected --build\n"


def test_the_compiler_is_looked_for_in_order(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler() == place / "bin" / "nvcc"
    home = tmp_path / "home"
    shutil.copytree(place / "bin", home / "bin")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert compiler() == place / "bin" / "nvcc"
    monkeypatch.setenv("PATH", "")
    assert compiler() == home / "bin" / "nvcc"


def test_no_compiler(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_candidates", lambda: iter((place / "version",)))  # a file that cannot be executed
    with pytest.raises(BuildError) as caught:
        compiled("one.cu")
    assert str(caught.value) == (
        "got no nvcc on PATH, under CUDA_HOME or among pip's packages, expected one for Hopper kernels; install the CUDA toolkit "
        "(12.8 or later) and put nvcc on PATH or set CUDA_HOME, or pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt "
        "nvidia-cuda-runtime nvidia-cuda-cccl"
    )


def test_no_host_compiler_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "fault").write_text("sh: g++: not found, fatal\n", encoding="utf-8")
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **options: None if name == "g++" else real(name, **options))
    sentence = r"expected a library of one\.cu: no g\+\+ on PATH, which nvcc calls: install it; sh: g\+\+"
    with pytest.raises(BuildError, match=sentence):
        compiled("one.cu")


def test_a_cache_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "version"))
    sentence = r"got .*Not a directory.* expected one to write to; set XDG_CACHE_HOME to such a folder"
    with pytest.raises(BuildError, match=sentence):
        compiled("one.cu")


def test_a_relative_cache_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert cache_folder() == Path.home() / ".cache" / "lowbit" / "hopper"


def test_a_missing_header_is_named(place: Path) -> None:
    assert [path.name for path in sources("one.cu")] == ["one.cu", "deep.cuh", "deeper.cuh"]
    (place / "room" / "deeper.cuh").unlink()
    with pytest.raises(BuildError, match=r"got no deeper\.cuh beside deep\.cuh, expected a source of the Hopper kernels in"):
        compiled("one.cu")
    with pytest.raises(BuildError, match=r"got no three\.cu beside the room, expected a source"):
        compiled("three.cu")


def test_every_source_of_the_room_is_built() -> None:
    room = Path(cuda_hopper.__file__).parent / "hopper_room"
    named = {path for unit in cuda_hopper.units() for path in sources(unit[0])}
    assert {path for path in room.iterdir() if path.suffix in (".cu", ".cuh")} == {p for p in named if p.parent == room}
    keys = [(source, tuple(sorted(defines.items())), tuple(flags)) for source, defines, flags in cuda_hopper.units()]
    assert len(keys) == len(set(keys))
