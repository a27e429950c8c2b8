"""CUDA sources as C++ for the emulated machine: inline PTX, launches and shared arrays are rewritten, all else stays as it is.

Decides: what becomes of `asm(...)` (calls of ptx.h, one per instruction, by its name), of `kernel<<<...>>>(...)` and of
`__shared__` declarations. Lines keep their numbers, so that a compiler's complaint names the line of the source.
Refuses: nothing by itself. An instruction that ptx.h lacks does not compile, and the compiler names it; PTX that a macro puts
together is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Statement", "instructions", "translated"]

_ASM = re.compile(r"\basm\b\s*(?:volatile|__volatile__)?\s*\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_OPERAND = re.compile(r'\s*"([^"]*)"\s*\((.*)\)\s*', re.DOTALL)
_REGISTERS = {
    "pred": "bool", "b16": "uint16_t", "u16": "uint16_t", "b32": "uint32_t", "u32": "uint32_t", "s32": "uint32_t", "f32": "float",
    "b64": "uint64_t", "u64": "uint64_t", "f16x2": "uint32_t",
}
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\((\d+)\)\s+)?([\w ]+?)\s+(\w+)\[\]\s*;")
_STATIC = re.compile(r"(?:static\s+)?__shared__\s+(?:__align__\((\d+)\)\s+)?([\w:]+(?:<[^;]*?>)?)\s+(\w+)((?:\[[^\]]*\])*)\s*;")
_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)$")
_PLACES = re.compile(r"(?<![.\w>])(threadIdx|blockIdx|blockDim|gridDim)\b")
_WHERE = {"threadIdx": "thread", "blockIdx": "block", "blockDim": "threads", "gridDim": "blocks"}
_GROUPED = ("mov", "ld", "cvt")  # instructions whose {a, b} is one operand; elsewhere its parts are operands of their own


@dataclass(frozen=True, slots=True)
class Statement:
    """One inline assembly statement: PTX, then (constraint, expression) of outputs and inputs."""

    text: str
    outputs: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[str, str], ...]


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth, place = 0, start
    while place < len(text):
        if text[place] in "\"'":
            quote, place = text[place], place + 1
            while text[place] != quote:
                place += 2 if text[place] == "\\" else 1
        elif text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
            if depth == 0:
                return place
        place += 1
    raise ValueError(f"translate: got no bracket that closes {text[start:start + 40]!r}, expected one")


def _split(text: str, mark: str) -> list[str]:
    """Cut at `mark` outside brackets and strings."""
    parts, depth, last, place = [], 0, 0, 0
    while place < len(text):
        letter = text[place]
        if letter == '"':
            place += 1
            while text[place] != '"':
                place += 2 if text[place] == "\\" else 1
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == mark and depth == 0:
            parts.append(text[last:place])
            last = place + 1
        place += 1
    return [*parts, text[last:]]


def _statement(body: str) -> Statement:
    parts = _split(body, ":")
    text = "".join(bytes(found, "utf-8").decode("unicode_escape") for found in _STRING.findall(parts[0]))

    def operands(place: int) -> tuple[tuple[str, str], ...]:
        found = [_OPERAND.fullmatch(part) for part in _split(parts[place], ",")] if len(parts) > place else []
        return tuple((each[1], each[2]) for each in found if each is not None)

    return Statement(text, operands(1), operands(2))


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of what a piece of PTX holds: open, close, registers, label, instruction."""
    place = 0
    while place < len(text):
        rest = text[place:]
        if rest[0].isspace() or rest[0] == ";":
            place += 1
        elif rest[0] in "{}":
            yield ("open" if rest[0] == "{" else "close"), rest[0]
            place += 1
        elif label := re.match(r"(\w+)\s*:(?!:)", rest):
            yield "label", label[1]
            place += label.end()
        else:
            end = rest.find(";")
            words = rest if end < 0 else rest[:end]
            yield ("registers" if words.startswith(".reg") else "instruction"), " ".join(words.split())
            place += len(words) + 1


def _emitted(statement: Statement, number: int) -> str:
    """C++ for one statement."""
    count, own = len(statement.outputs), f"asm{number}_"
    code = [f"auto& {own}o{i} = ({expression});" for i, (_, expression) in enumerate(statement.outputs)]
    for i, (constraint, expression) in enumerate(statement.inputs, count):
        code.append(f"const auto {own}i{i} = ptx::in_{constraint[-1]}({expression});")

    def value(word: str) -> str:
        word = word.strip()
        if word == "_":
            return "ptx::sink"
        if word.startswith("%") and word[1:].isdigit():
            return f"{own}{'o' if int(word[1:]) < count else 'i'}{word[1:]}"
        if word.startswith("%"):
            return f"ptx::special_{word.lstrip('%').replace('.', '_')}()"
        if inner := re.fullmatch(r"\[(.*)\]", word):
            return ", ".join(value(part) for part in _split(inner[1], ","))
        if inner := re.fullmatch(r"\{(.*)\}", word):
            return ", ".join(value(part) for part in _split(inner[1], ","))
        if "+" in word:
            return " + ".join(value(part) for part in word.split("+"))
        return word if re.match(r"-?[\d.]", word) else f"{own}{word}"

    def product(found: re.Match[str], operands: list[str]) -> str:
        sums = ", ".join(f"&{value(part)}" for part in operands[0].strip("{} ").split(","))
        left = operands[1].strip()
        if left.startswith("{"):
            places = [int(part.strip()[1:]) - count for part in left.strip("{} ").split(",")]
            registers = ", ".join(f"ptx::fragment({statement.inputs[place][1]})" for place in places)
            made, given = f"const emulator::Fragment {own}a[] = {{{registers}}};", f"{own}a"
        else:
            made, given = "", value(left)
        shape = f"{found[1]}, {found[2]}, ptx::{found[3]}, ptx::{found[4]}, ptx::{found[5]}"
        rest = ", ".join(value(part) for part in operands[2:])
        return f"{{ float* const {own}d[] = {{{sums}}}; {made} ptx::wgmma<{shape}>({own}d, {given}, {rest}); }}"

    for kind, text in instructions(statement.text):
        if kind in ("open", "close"):
            code.append(text)
        elif kind == "label":
            code.append(f"{own}{text}:;")
        elif kind == "registers":
            _, form, names = text.split(" ", 2)
            code.append(f"{_REGISTERS[form[1:]]} {', '.join(f'{own}{name.strip()}' for name in names.split(','))};")
        else:
            guard = ""
            if text.startswith("@"):
                predicate, text = text.split(" ", 1)
                guard = f"if ({'!' if predicate[1] == '!' else ''}{own}{predicate.lstrip('@!')}) "
            opcode, _, rest = text.partition(" ")
            operands = [part.strip() for part in _split(rest, ",")] if rest.strip() else []
            if opcode in ("bra", "bra.uni"):
                code.append(f"{guard}goto {own}{operands[0]};")
            elif found := _PRODUCT.match(opcode):
                code.append(guard + product(found, operands))
            else:
                grouped = opcode.startswith(_GROUPED)
                values = (f"ptx::vector({value(part)})" if grouped and part[0] == "{" else value(part) for part in operands)
                code.append(f"{guard}ptx::{re.sub('[.:]+', '_', opcode)}({', '.join(values)});")
    return f"do {{ {' '.join(code)} }} while (0)"


def _assembly(text: str) -> str:
    out, last = [], 0
    for number, found in enumerate(_ASM.finditer(text)):
        end = _closing(text, found.end() - 1)
        original = text[found.start() : end + 1]
        out += [text[last : found.start()], _emitted(_statement(text[found.end() : end]), number), "\n" * original.count("\n")]
        last = end + 1
    return "".join((*out, text[last:]))


def _launches(text: str) -> str:
    while (start := text.find("<<<")) >= 0:
        begin = start
        while text[begin - 1].isspace():
            begin -= 1
        end_of_name, depth = begin, 0
        if text[begin - 1] == ">":  # template arguments
            while True:
                begin -= 1
                depth += {">": 1, "<": -1}.get(text[begin], 0)
                if depth == 0:
                    break
        while re.match(r"[\w:]", text[begin - 1]):
            begin -= 1
        end = text.index(">>>", start)
        kernel, how = text[begin:end_of_name], text[start + 3 : end]
        text = f"{text[:begin]}emulator::configured({kernel}, {how}){text[end + 3 :]}"
    return text


def _shared(text: str) -> str:
    def dynamic(found: re.Match[str]) -> str:
        return f"{found[2]}* {found[3]} = ({found[2]}*)::emulator::dynamic_shared({found[1] or 16});"

    def static(found: re.Match[str]) -> str:
        kind = f"std::remove_reference_t<decltype(*(({found[2]}(*){found[4]})nullptr))>"
        where = f'"{found[3]}"'
        alignment = found[1] or f"alignof({found[2]})"
        return f"auto& {found[3]} = *({found[2]}(*){found[4]})::emulator::static_shared({where}, sizeof({kind}), {alignment});"

    return _STATIC.sub(static, _DYNAMIC.sub(dynamic, text))


def translated(text: str) -> str:
    """The C++ of a CUDA source or header. Raises ValueError for brackets that do not close."""
    named = _PLACES.sub(lambda found: f"::emulator::current->{_WHERE[found[1]]}", text)
    return _shared(_launches(_assembly(named)))
