"""The door of the triton backend without triton and without torch: what it says where nothing runs, its tables, its arguments.

Nothing here runs a kernel; `tests/interpreter` does. The modules of the room are read as syntax trees, because importing them
needs Triton.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowbit.conformance.backend import DATAPATHS, NEVER_EXECUTED, Backend, Order, Problem, execution_of
from lowbit.conformance.op import make_problem
from lowbit.conformance.ops import ops
from lowbit.kernels import triton as door
from lowbit.kernels.triton_room import machine

ROOM = Path(door.__file__).parent / "triton_room"
NOTHING = door.Triton(query=lambda: door.Place("compiled", "host", None, "triton and torch cannot be imported here"))
INTERFACE = {"OPS", "MUTANTS", "unsupported", "tactics", "declaration", "workspace", "prepare", "stage", "run"}
OWN = ("blocks", "codes8", "codes16", "division", "encodings", "fp8_quantize", "int4_quantize", "int8_quantize", "nvfp4_quantize",
       "svdquant_quantize", "tensor_scale")


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOM / f"{module}.py").read_text(encoding="utf-8"))


def names_of(tree: ast.Module) -> set[str]:
    """Names that a module defines."""
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def literal(tree: ast.Module, name: str) -> tuple[str, ...]:
    """The tuple of strings that a module assigns to a name."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            found: tuple[str, ...] = ast.literal_eval(node.value)
            return found
    raise AssertionError(f"no {name}")


def problem(op: str) -> Problem:
    """Some problem of an op."""
    dims = {"m": 16, "n": 64, "k": 128, "g": 64, "r": 16, "p": 0, "s": 2, "e": 1}
    return make_problem(ops()[op], ops()[op].variants[0], {letter: dims[letter] for letter in ops()[op].dims})


def test_loading_the_door_loads_no_framework() -> None:
    program = "import sys, lowbit.kernels.triton; print([n for n in ('torch', 'triton') if n in sys.modules])"
    answer = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_it_is_a_backend_of_the_target_cuda() -> None:
    assert isinstance(NOTHING, Backend)
    assert (NOTHING.name, NOTHING.target, NOTHING.device) == ("triton", "cuda", "host")
    assert execution_of(NOTHING) == "compiled"
    assert NOTHING.describe()["machine"] == "none"


@pytest.mark.parametrize("op", ["nvfp4_quantize", "svdquant_quantize", "scale_swizzle", "fp8_requantize"])
def test_where_nothing_runs_every_problem_is_refused_with_the_reason(op: str) -> None:
    reason = NOTHING.supports(problem(op))
    assert reason == f"{NEVER_EXECUTED}: triton and torch cannot be imported here"


def test_an_op_without_a_kernel_is_refused_by_name() -> None:
    reason = NOTHING.supports(problem("scale_pack_e4m3"))
    assert reason is not None
    assert "no kernel for 'scale_pack_e4m3'" in reason
    assert "svdquant_quantize" in reason


def torch_of(
    cuda: str | None = "13.0", there: bool = True, capability: tuple[int, int] = (9, 0), broken: str = ""
) -> SimpleNamespace:
    """What `look_through` asks of torch."""
    def asked(index: int) -> tuple[int, int]:
        if broken:
            raise RuntimeError(broken)
        return capability

    device = SimpleNamespace(is_available=lambda: there, get_device_capability=asked, get_device_name=lambda index: "some GPU")
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda, hip=None), cuda=device)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """`look` afresh, on a machine whose driver lists nothing and whose torch sees nothing."""
    monkeypatch.setattr(door, "_DRIVER", tmp_path / "gpus")
    monkeypatch.setattr(door, "import_module", lambda name: torch_of(None, there=False))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    door.look.cache_clear()
    yield monkeypatch
    door.look.cache_clear()


def present(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """All packages but those that are missing can be imported."""
    monkeypatch.setattr(door, "find_spec", lambda name: None if name in missing else machine.__spec__)


def test_the_interpreter_is_what_was_asked_for(looked: pytest.MonkeyPatch) -> None:
    looked.setenv("TRITON_INTERPRET", "1")
    present(looked)
    assert door.look() == door.Place("emulated", "host", machine.INTERPRETER)


@pytest.mark.parametrize("missing", [("triton",), ("torch",), ("triton", "torch")])
def test_what_cannot_be_imported_is_named(looked: pytest.MonkeyPatch, missing: tuple[str, ...]) -> None:
    looked.setenv("TRITON_INTERPRET", "1")
    present(looked, *missing)
    assert door.look() == door.Place("compiled", "host", None, f"{' and '.join(missing)} cannot be imported here")


def test_a_folder_called_triton_is_not_triton(looked: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    looked.setattr(door, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    assert door.look().reason == "triton and torch cannot be imported here"


@pytest.mark.parametrize(("torch", "said"), [
    (torch_of(None), "torch 2.13.0 is built without CUDA"),
    (torch_of(there=False), "torch 2.13.0 cannot use one"),
])
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_device_of_the_driver_that_torch_cannot_use_is_a_fault(
    looked: pytest.MonkeyPatch, tmp_path: Path, torch: SimpleNamespace, said: str, hidden: str
) -> None:
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    looked.setattr(door, "import_module", lambda name: torch)
    present(looked)
    assert door.look().fault.startswith("1 NVIDIA device(s) are visible to the driver, but ")
    assert said in door.look().fault
    with pytest.raises(door.DeviceFault, match=said):
        execution_of(door.backend())
    door.look.cache_clear()
    present(looked, "torch", "triton")
    assert "torch is not installed" in door.look().fault
    door.look.cache_clear()
    looked.setenv("CUDA_VISIBLE_DEVICES", hidden)  # hidden on purpose
    assert door.look().fault == ""


def test_what_torch_sees() -> None:
    assert door.look_through(torch_of(), 1) == door.Place("executed", "cuda:0", machine.MACHINES[9, 0])
    assert door.look_through(torch_of(there=False), 0).reason == "torch sees no CUDA device"
    assert door.look_through(torch_of(None), 0).reason == "torch 2.13.0 is built without CUDA"
    broken = door.look_through(torch_of(broken="no kernel image"), 1)
    assert broken.fault == "CUDA device 0 is visible and does not initialise: RuntimeError: no kernel image"


def test_another_capability_is_compiled_and_named() -> None:
    """Not an error of the factory: `--target cuda` would leave the backend out without a word."""
    place = door.look_through(torch_of(capability=(10, 0)), 1)
    known = ", ".join(f"{major}.{minor}" for major, minor in machine.MACHINES)
    found = door.Triton(query=lambda: place)
    assert execution_of(found) == "compiled"
    reason = found.supports(problem("gemm_w4a16"))
    assert reason == f"{NEVER_EXECUTED}: needs compute capability {known}, found some GPU (10.0)"


def test_making_the_backend_looks_at_no_device(looked: pytest.MonkeyPatch) -> None:
    door.backend()
    door.backend("mutant=offsets_wrap")
    assert door.look.cache_info().currsize == 0


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False), ("off", False)])
def test_the_interpreter_is_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert machine.interpreted() is expected


def test_arguments() -> None:
    assert door.backend("mutant=offsets_wrap").mutant == "offsets_wrap"
    for wrong in ("cuda:0", "mutant=", "emulate"):
        with pytest.raises(ValueError, match="mutant=NAME, got"):
            door.backend(wrong)


# Tables --------------------------------------------------------------------------------------------------------------


def test_every_module_of_the_table_has_the_interface() -> None:
    for name in sorted(set(door.MODULES.values()) & set(OWN)):
        tree = tree_of(name)
        assert names_of(tree) >= INTERFACE, name
        assert {op for op, module in door.MODULES.items() if module == name} == set(literal(tree, "OPS")), name
    assert set(door.MODULES) <= set(ops())


def test_mutants_are_flags_that_kernels_know() -> None:
    """Every fault named in a MUTANTS is compared with in the same module: a name without an effect would be a mutant that
    lives."""
    for name in sorted(set(door.MODULES.values()) & set(OWN)):
        tree = tree_of(name)
        compared = {node.comparators[0].value for node in ast.walk(tree)
                    if isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant)}
        assert set(literal(tree, "MUTANTS")) <= compared, name


def test_machines_name_datapaths_that_exist() -> None:
    kinds = {"f16", "bf16", "fp8", "int8"}
    for found in (machine.INTERPRETER, *machine.MACHINES.values()):
        assert set(found.datapaths) == kinds
        assert set(found.datapaths.values()) <= set(DATAPATHS)
    assert machine.INTERPRETER.order is Order.UNKNOWN
    assert machine.MACHINES[9, 0].order is Order.ASCENDING
    assert not machine.INTERPRETER.native


def calls_of(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("module", OWN)
def test_bits_never_depend_on_an_approximate_operation(module: str) -> None:
    """In kernels: no `/`, no cast to bf16 or fp8, no atomics, no tl.dot_scaled, and PTX only where a compile-time argument asks
    for it, beside the same in Triton."""
    kernels = [node for node in tree_of(module).body if isinstance(node, ast.FunctionDef)
               and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)]
    for kernel in kernels:
        divisions = [node for node in ast.walk(kernel) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)]
        assert not divisions, kernel.name
        assert not [name for name in calls_of(kernel) if "atomic" in name or "dot_scaled" in name]
        unasked = [node for node in ast.walk(kernel) if isinstance(node, ast.Call) and "inline_asm" in ast.unparse(node.func)]
        for branch in ast.walk(kernel):
            if isinstance(branch, ast.If) and "PTX" in ast.unparse(branch.test):
                assert branch.orelse, kernel.name
                inside = {id(node) for statement in branch.body for node in ast.walk(statement)}
                unasked = [node for node in unasked if id(node) not in inside]
        assert not unasked, kernel.name
        for node in ast.walk(kernel):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".to") and node.args:
                kind = ast.unparse(node.args[0])
                assert not {"tl.bfloat16", "tl.float8e4nv", "tl.float8e4b8"} & {kind}, (kernel.name, ast.unparse(node))


# Arithmetic that the kernels rest on, from fractions -------------------------------------------------------------------


def nearest_but_equal(y: int, bits: int) -> Fraction:
    """Least distance, relative to the integer y, of a number of `bits` significand bits that is not y."""
    below = y.bit_length() - bits
    unit = Fraction(2) ** below
    floor = (Fraction(y) / unit).__floor__()
    return min(abs(n * unit / y - 1) for n in (floor - 1, floor, floor + 1) if n * unit != y)


def test_what_is_divided_twice_is_a_tie_of_e2m1_or_not_near_one() -> None:
    """`fast_tile`, nvfp4: x of 11 significand bits is t s c, for a tie t of e2m1, s of 11 bits and a scale c of ue4m3, or further
    from it than 2^-18 of its size. Ties 1/4 to 5 have the odd parts 1, 3, 5, 7; of s and c all significands are tried."""
    closest = min(nearest_but_equal(t * c * s, 11) for t in (1, 3, 5, 7) for c in range(8, 16) for s in range(1024, 2048))
    assert closest > Fraction(1, 1 << 18)
    margin, near = Fraction(1, 1 << 19), Fraction(1, 1 << 20)  # what is added to quotients, and how near they are
    assert near < margin
    assert closest > margin + near + margin * near


def test_a_sixth_of_amax_is_a_tie_of_ue4m3_or_not_near_one() -> None:
    """`fast_tile`, nvfp4: amax = x / s; its sixth against ties of ue4m3, 17/16 to 31/16 of a power of two, or (2k + 1) / 2 units
    of the subnormal numbers. In codes of binary32 of which ue4m3 is the upper part, a tie is 2^19 above a multiple of 2^20; what
    is no tie is more than the 16 places away that count as one, and what is one is within them."""
    near = Fraction(1, 1 << 21)  # four roundings to 24 bits, one of them of the constant
    for tie in range(17, 32, 2):  # a place is 2^-23 of a number of 1 to 2
        closest = min(nearest_but_equal(6 * tie * s, 11) for s in range(1024, 2048))
        value = Fraction(tie, 16)
        assert (closest - near * (1 + closest)) * value * (1 << 23) > 17
        assert near * value * (1 << 23) + 1 < 16
    for k in range(8):  # a place is 2^-20 of a unit
        closest = min(nearest_but_equal(3 * (2 * k + 1) * s, 11) for s in range(1024, 2048))
        value = Fraction(2 * k + 1, 2)
        assert (closest - near * (1 + closest)) * value * (1 << 20) > 17
        assert near * value * (1 << 20) + 1 < 16


def test_short_quotients_stay_clear_of_the_points_between_two_numbers() -> None:
    """`by_pair` is right because no quotient of a 24-bit by an 11-bit significand is within 2^-37 of its size of a point halfway
    between two binary32 numbers: the nearest numerators on either side of (2n + 1) b / 2 are tried for some b and many n."""
    closest = Fraction(1)
    for b in (1024, 1025, 1365, 1536, 1707, 2045, 2047):
        for n in range((1 << 23) + 1, 1 << 24, 399_989):
            middle = Fraction(2 * n + 1, 2) * b
            for a in (middle.__floor__(), middle.__floor__() + 1):
                shift = max(0, a.bit_length() - 24)
                for numerator in ((a >> shift) << shift, ((a >> shift) + 1) << shift):
                    distance = abs(Fraction(numerator) / middle - 1)
                    assert distance > 0
                    closest = min(closest, distance)
    assert closest > Fraction(1, 1 << 37)
