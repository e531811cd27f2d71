"""Translates PTX instructions to rows of the emulator's program, except lane-wise ones (``lanewise.py``)."""

from __future__ import annotations

import re

from . import lanewise
from .lanewise import TABLE, WIDTH, kind_of
from .ptx import BARRIER, BRANCH, COLLECTIVE, EXIT, FIXED, Reader, read_number, split_vector

# They order memory, which the emulator always does, or wait for what it does at once.
NO_EFFECT = ("fence", "membar", "griddepcontrol", "nanosleep", "prefetch")
NO_EFFECT_WGMMA = ("wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned")
SHUFFLES = {"bfly": 0, "up": 1, "down": 2, "idx": 3}
REDUCTIONS = ["add.s32", "min.s32", "max.s32", "min.u32", "max.u32", "and.b32", "or.b32", "xor.b32"]
VOTES = {"ballot": 0, "any": 1, "all": 2, "uni": 3}
ALL_LANES = (-1, 0xFFFFFFFF)
HAS_MASK = 0x10000


class Translator(Reader):
    """A reader that knows instructions: the method ``do_<base>`` has those whose opcode begins with ``base``."""

    def translate(self, opcode: str, args: list[str], common: dict) -> None:
        parts = opcode.split(".")
        method = getattr(self, f"do_{parts[0]}", None)
        if parts[0] in NO_EFFECT or opcode in NO_EFFECT_WGMMA:
            self.emit("!nop", **common)
        elif method is None or method(opcode, parts, args, common) is NotImplemented:
            self.lanewise(opcode, parts, args, common)

    # ---- memory
    def do_ld(self, opcode, parts, args, common):
        if "param" in parts:
            self.load_parameter(parts, args, common)
        else:
            self.access("ld", parts, args[0], args[1], common)

    def do_st(self, opcode, parts, args, common):
        self.access("st", parts, args[1], args[0], common)

    def access(self, base, parts, cells, place, common):
        space = "shared" if any(part.startswith("shared") for part in parts) else "global"
        if space == "global" and "global" not in parts:
            raise KeyError("space")
        ptx_type = parts[-1]
        itemsize = WIDTH[ptx_type]
        slots, width = [], max(2, itemsize)
        for cell in split_vector(cells):
            if cell == "_":
                slots.append(-1)
            elif read_number(cell) is not None:
                slots.append(self.constant(read_number(cell), max(2, itemsize)))
            else:
                slot, width = self.register(cell)
                slots.append(slot)
        where, offset = self.address(place, "w" if space == "shared" else "l")
        flags = int(ptx_type[0] == "s") | (width << 4)
        self.emit(f"!{base}_{space}", (where, *slots), n=len(slots), esz=itemsize, flags=flags, imm=offset, **common)

    def load_parameter(self, parts, args, common):
        ptx_type = parts[-1]
        m = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", args[1].replace(" ", ""))
        offset = next(start for name, _, start in self.kernel.params if name == m.group(1)) + int(m.group(2) or 0)
        registers = [self.register(cell) for cell in split_vector(args[0])]
        flags = int(ptx_type[0] == "s") | (registers[0][1] << 4)
        slots = [slot for slot, _ in registers]
        self.emit("!ld_param", slots, n=len(slots), esz=WIDTH[ptx_type], flags=flags, imm=offset, **common)

    def do_cp(self, opcode, parts, args, common):
        if opcode == "cp.async.commit_group":
            self.emit("!cp_commit", **common)
        elif parts[2] in ("wait_all", "wait_group"):
            self.emit("!cp_wait", imm=-1 if parts[2] == "wait_all" else read_number(args[0]), **common)
        elif parts[2] in ("ca", "cg"):
            target, target_offset = self.address(args[0], "w")
            source, source_offset = self.address(args[1], "l")
            size = self.operand(args[3], "w") if len(args) > 3 else -1
            operands = (target, source, size)
            self.emit("!cp_async", operands, n=read_number(args[2]), imm=target_offset, target=source_offset, **common)
        else:
            raise KeyError("form")

    # ---- control
    def do_bra(self, opcode, parts, args, common):
        self.branches.append((len(self.rows), args[0]))
        self.emit("!nop", kind=BRANCH, **common)

    def do_ret(self, opcode, parts, args, common):
        self.emit("!nop", kind=EXIT, **common)

    do_exit = do_ret

    def do_trap(self, opcode, parts, args, common):
        self.emit("!trap", **common)

    def do_bar(self, opcode, parts, args, common):
        if opcode == "bar.warp.sync":
            self.collective("!barwarp", (), args[0], common)
        elif "sync" not in parts or (len(args) > 1 and read_number(args[1]) != self.kernel.threads):
            raise KeyError(f"barrier {args}")
        else:
            self.emit("!nop", kind=BARRIER, **common)

    do_barrier = do_bar

    # ---- exchange between the lanes of a warp
    def collective(self, name, operands, mask, common, flags=0):
        target = 0
        if read_number(mask) not in ALL_LANES:
            flags, target = flags | HAS_MASK, self.operand(mask, "w")
        self.emit(name, operands, kind=COLLECTIVE, flags=flags, target=target, **common)

    def do_shfl(self, opcode, parts, args, common):
        result, _, found = args[0].partition("|")
        operands = [self.operand(result, "w"), self.operand(found, "p") if found else -1]
        operands += [self.operand(a, "w") for a in args[1:4]]
        self.collective("!shfl", operands, args[4], common, flags=SHUFFLES[parts[2]])

    def do_redux(self, opcode, parts, args, common):
        kind = ".".join(parts[2:]).replace("add.u32", "add.s32")
        if kind not in REDUCTIONS:
            raise KeyError("form")
        operands = [self.operand(a, "w") for a in args[:2]]
        self.collective("!redux", operands, args[2], common, flags=REDUCTIONS.index(kind))

    def do_vote(self, opcode, parts, args, common):
        kind, source = VOTES[parts[2]], args[1].lstrip("!")
        negated = common | {"neg": common["neg"] | (2 if args[1].startswith("!") else 0)}
        operands = (self.operand(args[0], "w" if kind == 0 else "p"), self.operand(source, "p"))
        self.collective("!vote", operands, args[2], negated, flags=kind)

    # ---- matrix units
    def do_mma(self, opcode, parts, args, common):
        m = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16|bf16)\.\2\.f32", opcode)
        if not m:
            raise KeyError("form")
        operands = [self.operand(register, "w") for a in args for register in split_vector(a)]
        flags = int(m.group(2) == "bf16")
        self.emit("!mma", operands, kind=COLLECTIVE, esz=int(m.group(1)), flags=flags, **common)

    def do_ldmatrix(self, opcode, parts, args, common):
        self.matrix(parts, args[0], args[1], common)

    def do_stmatrix(self, opcode, parts, args, common):
        self.matrix(parts, args[1], args[0], common)

    def matrix(self, parts, cells, place, common):
        if "m8n8" not in parts or parts[-1] != "b16":
            raise KeyError("form")
        registers = [self.operand(cell, "w") for cell in split_vector(cells)]
        where, offset = self.address(place, "w")
        numbers = {"n": len(registers), "flags": int("trans" in parts), "imm": offset}
        self.emit(f"!{parts[0]}", (where, *registers), kind=COLLECTIVE, **numbers, **common)

    def do_wgmma(self, opcode, parts, args, common):
        m = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(f16|bf16)\.\2", opcode)
        if not m:
            raise KeyError("form")
        sums = [self.operand(cell, "w") for cell in split_vector(args[0])]
        in_registers = args[1][0] == "{"
        a = [self.operand(cell, "w" if in_registers else "l") for cell in split_vector(args[1])]
        b = self.operand(args[2], "l")
        always = read_number(args[3]) not in (None, 0)
        scale = -1 if always else self.operand(args[3], "p")
        rest = [read_number(x) for x in args[4:]]
        negated = int(rest[0] == -1) | 2 * int(rest[1] == -1)
        transposed = (0, rest[2]) if in_registers else (rest[2], rest[3])
        flags = int(m.group(2) == "bf16") | 2 * in_registers | 4 * bool(transposed[0]) | 8 * bool(transposed[1])
        numbers = {"imm": int(m.group(1)), "flags": flags, "esz": negated}
        self.emit("!wgmma", (*sums, *a, b, scale), kind=COLLECTIVE, **numbers, **common)

    # ---- lane-wise, but for their form
    def do_mov(self, opcode, parts, args, common):
        if args[0][0] == "{" or args[1][0] == "{":
            name = "!unpack" if args[0][0] == "{" else "!pack"
            packed, whole = (args[0], args[1]) if name == "!unpack" else (args[1], args[0])
            cells = split_vector(packed)
            each = WIDTH[parts[1]] // len(cells)
            kind = {2: "h", 4: "w", 8: "l"}[max(2, each)]
            slots = [-1 if cell == "_" else self.operand(cell, kind) for cell in cells]
            operands = (self.operand(whole, kind_of(parts[1])), *slots)
            self.emit(name, operands, n=len(cells), esz=each, flags=max(2, each) << 4, **common)
        elif parts[-1][-2:] in ("16", "32", "64"):
            bits = f"b{parts[-1][-2:]}"
            self.emit(f"mov.{bits}", [self.operand(a, kind_of(bits)) for a in args], **common)
        else:
            return NotImplemented

    def do_cvta(self, opcode, parts, args, common):
        if opcode not in ("cvta.to.global.u64", "cvta.global.u64"):
            raise KeyError("form")
        self.emit("mov.b64", [self.operand(a, "l") for a in args], **common)

    def do_setp(self, opcode, parts, args, common):
        """Pairs of halves are compared one by one."""
        if parts[-1] not in ("f16x2", "bf16x2"):
            return NotImplemented
        halves = []
        for a in args[1:3]:
            cells = [self.new_register("b16") for _ in range(2)]
            operands = (self.operand(a, "w"), *(self.operand(cell, "h") for cell in cells))
            self.emit("!unpack", operands, n=2, esz=2, flags=2 << 4, **common)
            halves.append(cells)
        for k, result in enumerate(args[0].split("|")):
            if result.strip() != "_":
                self.translate(opcode[:-2], [result.strip(), halves[0][k], halves[1][k]], common)

    def do_min(self, opcode, parts, args, common):
        """Of three, from sm_100 on: two and two."""
        if len(args) != 4:
            return NotImplemented
        between = self.new_register("b32")
        self.lanewise(opcode, parts, [between, *args[1:3]], common)
        self.lanewise(opcode, parts, [args[0], between, args[3]], common)

    do_max = do_min

    def do_cvt(self, opcode, parts, args, common):
        """A register may be wider than the type that it is converted from or to."""
        name = self.name_of(opcode)
        kinds, args = TABLE[name][1], list(args)
        for k, a in enumerate(args):
            if not a.startswith("%") or a.partition(".")[0] in FIXED:
                continue
            have, want = self.register(a)[1], {"h": 2, "w": 4, "l": 8}[kinds[k]]
            if have == want:
                continue
            if k == 0 and (have < want or have == 8 or parts[-2][0] == "s"):
                raise KeyError(f"{a}: {have} bytes")
            if k == 1 and have == 8:
                args[1] = self.new_register("b32")
                self.emit("cvt.u32.u64", (self.operand(args[1], "w"), self.operand(a, "l")), **common)
                have = 4
            kinds = kinds[:k] + {2: "h", 4: "w"}[have] + kinds[k + 1 :]
        self.emit(name, [self.operand(a, kind) for a, kind in zip(args, kinds, strict=True)], **common)

    @staticmethod
    def name_of(opcode: str) -> str:
        name = opcode if opcode in TABLE else opcode.replace(".uni", "")
        if name not in TABLE:
            raise KeyError("opcode")
        return name

    def lanewise(self, opcode, parts, args, common):
        name = self.name_of(opcode)
        kinds = lanewise.TABLE[name][1]
        if len(args) != len(kinds):
            raise KeyError(f"{len(args)} operands")
        self.emit(name, [self.operand(a, kind) for a, kind in zip(args, kinds, strict=True)], **common)
