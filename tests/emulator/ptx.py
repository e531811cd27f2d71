"""Reads parameters, registers and labels from the text of a PTX kernel. ``instructions.py`` reads the statements."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from .lanewise import INDEX, WIDTH

# As in c/state.h and c/control.h.
NORMAL, BRANCH, BARRIER, EXIT, COLLECTIVE = range(5)
FIRST_SHARED_ADDRESS = 1024
FIXED = {"%ctaid": 0, "%tid": 3, "%ntid": 6, "%nctaid": 9, "%laneid": 12, "%warpid": 13}
FIRST_FREE_SLOT = 24
INSTRUCTION = np.dtype(
    [(name, np.int32) for name in ("op", "pred", "neg", "kind", "o", "n", "esz", "flags", "target", "pad")]
    + [("imm", np.int64)]
)
CONSTANT = np.dtype([("slot", np.int32), ("width", np.int32), ("value", np.uint64)])
MASK = {2: 0xFFFF, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF}
KIND_WIDTH = {"p": 1, "h": 2, "w": 4, "l": 8}


class UnsupportedPTX(Exception):
    """PTX that the emulator does not know; the message names it."""


@dataclass
class Kernel:
    """A kernel as the C part runs it. ``text`` and ``lines`` (PTX line, place in the source) explain ``program``."""

    name: str = ""
    params: list[tuple[str, int, int]] = field(default_factory=list)  # name, bytes, offset
    param_bytes: int = 0
    threads: int = 0
    text: list[str] = field(default_factory=list)
    lines: list[tuple[int, str]] = field(default_factory=list)
    program: np.ndarray | None = None
    pool: np.ndarray | None = None
    consts: np.ndarray | None = None
    slots: int = 0


def split_operands(text: str) -> list[str]:
    """The operands of a statement: split at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return parts + [current.strip()] if current.strip() else parts


def read_number(text: str) -> int | None:
    """The bits of a literal, or None if ``text`` is none."""
    if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return int(m.group(1) or m.group(2), 16)
    if m := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text):
        value = int(m.group(2), 16 if m.group(2)[:2] in ("0x", "0X") else 10)
        return -value if m.group(1) else value
    return None


class Reader:
    """Turns text into rows of the program. A register's slot is where it lies; constants have slots as registers do."""

    def __init__(self, text: str):
        self.kernel = Kernel()
        self.slots: dict[str, int] = {}
        self.constants: dict[tuple[int, int], int] = {}  # (width, value) -> slot
        self.types: dict[str, str] = {}  # a register's name, or its prefix before a number -> PTX type
        self.scopes: list[dict[str, str]] = []  # names that a block in braces declared
        self.next_slot, self.next_name = FIRST_FREE_SLOT, 0
        self.pool: list[int] = []
        self.rows: list[list[int]] = []
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[int, str]] = []
        self.unsupported: dict[str, int] = {}
        self.place = ""
        body, line = self.read_head(text)
        self.read_body(body, line)

    def read_head(self, text: str) -> tuple[str, int]:
        """Name, parameters and number of threads; returns the text after the first brace and its line number."""
        head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", text, re.S)
        if not head:
            raise UnsupportedPTX("no .entry")
        kernel, offset = self.kernel, 0
        kernel.name = head.group(1)
        for line in head.group(2).split(","):
            pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+).*?([\w$]+)\s*(\[(\d+)\])?\s*$"
            if m := re.search(pattern, line.strip()):
                width = WIDTH.get(m.group(2), 8)
                size, align = width * int(m.group(5) or 1), int(m.group(1) or min(8, width))
                offset = -(-offset // align) * align
                kernel.params.append((m.group(3), size, offset))
                offset += size
        kernel.param_bytes = offset
        if m := re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head.group(3)):
            kernel.threads = int(m.group(1))
        return text[head.end() :], text[: head.end()].count("\n") + 1

    def read_body(self, body: str, first_line: int) -> None:
        depth = 1
        for number, raw in enumerate(body.split("\n"), first_line):
            line, _, comment = raw.partition("//")
            line = line.strip()
            while line:
                if line.startswith(".loc"):
                    self.place = comment.strip() or line
                    break
                if line[0] == "{":
                    self.scopes.append({})
                    depth += 1
                    line = line[1:].strip()
                elif line[0] == "}":
                    if self.scopes:
                        self.scopes.pop()
                    depth -= 1
                    if depth == 0:
                        return self.finish()
                    line = line[1:].strip()
                elif m := re.match(r"([\w$%]+):\s*", line):
                    self.labels[m.group(1)] = len(self.rows)
                    line = line[m.end() :]
                elif ";" in line:
                    statement, line = line.split(";", 1)
                    line = line.strip()
                    self.read_statement(statement.strip(), number)
                elif line.startswith("."):
                    break
                else:
                    raise UnsupportedPTX(f"line {number}: {raw!r}")
        raise UnsupportedPTX("no end of the kernel")

    def finish(self) -> None:
        for row, label in self.branches:
            if label not in self.labels:
                raise UnsupportedPTX(f"label {label}")
            self.rows[row][8] = self.labels[label]
        if self.unsupported:
            raise UnsupportedPTX(", ".join(f"{k} ({v})" for k, v in sorted(self.unsupported.items())))
        self.emit("!nop", kind=EXIT, text="(end)")
        kernel = self.kernel
        kernel.program = np.array([tuple(row) for row in self.rows], dtype=INSTRUCTION)
        kernel.pool = np.array(self.pool, dtype=np.int32)
        constants = [(slot, width, value) for (width, value), slot in self.constants.items()]
        kernel.consts = np.array(constants, dtype=CONSTANT)
        kernel.slots = self.next_slot

    def read_statement(self, text: str, number: int) -> None:
        if not text or text.startswith((".pragma", ".loc")):
            return
        if text.startswith("."):
            m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
            if not m:
                raise UnsupportedPTX(f"line {number}: {text}")
            for name in m.group(2).split(","):
                self.declare(name.strip(), m.group(1))
            return
        predicate, negated, rest = -1, 0, text
        if m := re.match(r"@(!?)([%\w$]+)\s+", text):
            negated, predicate, rest = int(bool(m.group(1))), self.register(m.group(2))[0], text[m.end() :]
        opcode, _, operands = rest.replace("\t", " ", 1).partition(" ")
        common = {"pred": predicate, "neg": negated, "text": text, "number": number}
        try:
            self.translate(opcode.strip(), split_operands(operands.strip()), common)
        except KeyError as error:
            reason = f"{opcode} {error}"
            self.unsupported[reason] = self.unsupported.get(reason, 0) + 1

    def translate(self, opcode: str, args: list[str], common: dict) -> None:
        """One instruction to rows; ``instructions.Translator`` does it. A KeyError means that it is not known."""
        raise NotImplementedError  # of the base class alone

    # ---- registers and operands
    def declare(self, name: str, ptx_type: str) -> None:
        if m := re.match(r"([%\w$]+)<(\d+)>", name):
            self.types[m.group(1)] = ptx_type
        elif self.scopes:
            self.scopes[-1][name] = self.new_register(ptx_type, name)
        else:
            self.types[name] = ptx_type

    def new_register(self, ptx_type: str, name: str = "%new") -> str:
        self.next_name += 1
        unique = f"{name}@{self.next_name}"
        self.types[unique] = ptx_type
        return unique

    def new_slot(self, width: int) -> int:
        slot = self.next_slot
        self.next_slot += 2 if width == 8 else 1
        return slot

    def register(self, name: str) -> tuple[int, int]:
        """(slot, bytes) of a register; a predicate has 1 byte."""
        for scope in reversed(self.scopes):
            if name in scope:
                name = scope[name]
                break
        ptx_type = self.types.get(name) or self.types.get(name.rstrip("0123456789"))
        if ptx_type is None:
            raise KeyError(f"register {name}")
        width = 1 if ptx_type == "pred" else max(2, WIDTH[ptx_type])
        if name not in self.slots:
            self.slots[name] = self.new_slot(width)
        return self.slots[name], width

    def constant(self, value: int, width: int) -> int:
        value = (1 if value else 0) if width == 1 else value & MASK[max(2, width)]
        if (width, value) not in self.constants:
            self.constants[width, value] = self.new_slot(width)
        return self.constants[width, value]

    def operand(self, text: str, kind: str) -> int:
        """The slot of a source or destination of a kind: p, h, w or l, as ``lanewise`` has them."""
        width, value = KIND_WIDTH[kind], read_number(text)
        if value is not None:
            return self.constant(value, width)
        if text in ("global_smem", "global_smem_0"):
            return self.constant(FIRST_SHARED_ADDRESS, width)
        if text.startswith("%"):
            special, _, axis = text.partition(".")
            if special in FIXED:
                return FIXED[special] + ("xyz".index(axis) if axis else 0)
        slot, have = self.register(text)
        if have != width:
            raise KeyError(f"{text} has {have} bytes, {width} wanted")
        return slot

    def address(self, text: str, kind: str) -> tuple[int, int]:
        """(slot of the base, offset) of an address in brackets."""
        inner = text.strip()[1:-1].strip()
        if "+" in inner:
            base, offset = (part.strip() for part in inner.split("+", 1))
            return self.operand(base, kind), read_number(offset)
        if m := re.fullmatch(r"([%\w$]+)\s*-\s*(\d+)", inner):
            return self.operand(m.group(1), kind), -int(m.group(2))
        return self.operand(inner, kind), 0

    def emit(
        self, name, operands=(), *, pred=-1, neg=0, kind=NORMAL, n=0, esz=0, flags=0, target=0, imm=0, text="", number=0
    ):
        self.rows.append([INDEX[name], pred, neg, kind, len(self.pool), n, esz, flags, target, 0, imm])
        self.pool.extend(int(operand) for operand in operands)
        self.kernel.text.append(text)
        self.kernel.lines.append((number, self.place))


def split_vector(text: str) -> list[str]:
    """The registers of ``{a, b}``, or the one that stands alone."""
    text = text.strip()
    return [part.strip() for part in text[1:-1].split(",")] if text[0] == "{" else [text]


def translate(text: str, threads: int = 32) -> Kernel:
    """A kernel's PTX as the emulator runs it; ``threads`` of a CTA count where the PTX does not say.

    Raises:
        UnsupportedPTX: naming every instruction that is not known.
    """
    from .instructions import Translator

    kernel = Translator(text).kernel
    kernel.threads = kernel.threads or threads
    return kernel
