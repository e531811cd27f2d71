"""The lane-wise instructions, each a C expression of its operands. ``TABLE`` maps an opcode to (C function, kinds).

The kind of an operand is ``p`` predicate, ``h`` 16 bits, ``w`` 32 bits or ``l`` 64 bits. The first is the destination.
"""

from __future__ import annotations

import re

CTYPE = {"u16": "u32", "s16": "u32", "b16": "u32", "u32": "u32", "s32": "s32", "b32": "u32", "f32": "f32", "u64": "u64",
         "s64": "s64", "b64": "u64", "f64": "f64", "f16": "u32", "bf16": "u32", "pred": "p", "u8": "u32", "s8": "u32",
         "b8": "u32", "f16x2": "u32", "bf16x2": "u32"}  # fmt: skip
KIND = {"u32": "w", "s32": "w", "f32": "w", "u64": "l", "s64": "l", "f64": "l", "p": "p"}
WIDTH = {"u8": 1, "s8": 1, "b8": 1, "u16": 2, "s16": 2, "b16": 2, "f16": 2, "bf16": 2, "u32": 4, "s32": 4, "b32": 4,
         "f32": 4, "u64": 8, "s64": 8, "b64": 8, "f64": 8, "f16x2": 4, "bf16x2": 4}  # fmt: skip

TABLE: dict[str, tuple[str, str]] = {}
CODE: list[str] = []


def kind_of(ptx_type: str) -> str:
    return "p" if ptx_type == "pred" else {1: "h", 2: "h", 4: "w", 8: "l"}[WIDTH[ptx_type]]


def op(names, dst: str, srcs, expression: str, guard: str = ""):
    """``names``: opcodes with the same meaning. ``expression`` in a, b, c; 16-bit values lie in 32-bit lanes."""
    names = [names] if isinstance(names, str) else names
    kinds = kind_of(dst) + "".join(kind_of(s) for s in srcs)
    fn = "f_" + "".join(ch if ch.isalnum() else "_" for ch in names[0])
    body = []
    for k, (name, s) in enumerate(zip("abcd", srcs, strict=False)):
        if s == "pred":
            body.append(f"u32 q{name} = *RU({k + 1});")
        else:
            body.append(f"const {CTYPE[s]} *s{name} = (const {CTYPE[s]} *)R({k + 1});")
    take = " ".join(
        f"u32 {n} = (q{n} >> i) & 1;" if s == "pred" else f"{CTYPE[s]} {n} = s{n}[i];"
        for n, s in zip("abcd", srcs, strict=False)
    )
    if guard:
        body.append(f"FOR_LANES(i) if (ON(m, i)) {{ {take} {guard} }}")
    if dst == "pred":
        body.append(f"u32 r = 0; FOR_LANES(i) {{ {take} r |= (u32)(({expression}) ? 1 : 0) << i; }}")
        body.append("u32 *d = RU(0); *d = (*d & ~m) | (r & m);")
    else:
        t = CTYPE[dst]
        cut = f"(({expression}) & 0xffff)" if WIDTH[dst] <= 2 else f"({t})({expression})"
        body.append(f"{t} *d = ({t} *)R(0); if (m == ~0u) FOR_LANES(i) {{ {take} d[i] = {cut}; }}")
        body.append(f"else FOR_LANES(i) if (ON(m, i)) {{ {take} d[i] = {cut}; }}")
    CODE.append(f"static void {fn}(Warp *w, const Ins *in, u32 m) {{ {' '.join(body)} }}")
    for name in names:
        TABLE[name] = (fn, kinds)


def special(name: str, fn: str):
    TABLE["!" + name] = (fn, "")


SIGNED = {"16": "(s32)(s16)", "32": "(s32)", "64": "(s64)"}
for bits in ("16", "32", "64"):
    u, s, b = "u" + bits, "s" + bits, "b" + bits
    sg = SIGNED[bits]
    for t in (u, s):
        op(f"add.{t}", u, [u, u], "a + b")
        op(f"sub.{t}", u, [u, u], "a - b")
        op([f"mul.lo.{t}"], u, [u, u], "a * b")
        op([f"mad.lo.{t}"], u, [u, u, u], "a * b + c")
    op(f"min.{s}", u, [u, u], f"{sg}a < {sg}b ? a : b")
    op(f"max.{s}", u, [u, u], f"{sg}a > {sg}b ? a : b")
    op(f"min.{u}", u, [u, u], "a < b ? a : b")
    op(f"max.{u}", u, [u, u], "a > b ? a : b")
    op(f"neg.{s}", u, [u], "-a")
    op(f"abs.{s}", u, [u], f"{sg}a < 0 ? -a : a")
    op(f"and.{b}", b, [b, b], "a & b")
    op(f"or.{b}", b, [b, b], "a | b")
    op(f"xor.{b}", b, [b, b], "a ^ b")
    op(f"not.{b}", b, [b], "~a")
    op(f"cnot.{b}", b, [b], "a == 0")
    op(f"shl.{b}", b, [b, "u32"], f"b >= {bits} ? 0 : a << b")
    op([f"shr.{u}", f"shr.{b}"], u, [u, "u32"], f"b >= {bits} ? 0 : a >> b")
    op(f"shr.{s}", u, [u, "u32"], f"{sg}a >> (b >= {bits} ? {int(bits) - 1} : b)")
    op([f"mov.{b}", f"mov.{u}", f"mov.{s}"] + ([f"mov.f{bits}"] if bits != "16" else []), b, [b], "a")
    op(
        [f"selp.{b}", f"selp.{u}", f"selp.{s}"] + ([f"selp.f{bits}"] if bits != "16" else []),
        b,
        [b, b, "pred"],
        "c ? a : b",
    )
    zero = "if (b == 0) { EV(EV_DIV0, i, 0, 0); }"
    smin = {"16": "(s32)-32768", "32": "(s32)0x80000000", "64": "INT64_MIN"}[bits]
    op(
        f"div.{s}",
        u,
        [u, u],
        f"b == 0 ? ~({'u64' if bits == '64' else 'u32'})0 : {sg}b == -1 ? -a : {sg}a / {sg}b",
        zero,
    )
    op(f"rem.{s}", u, [u, u], f"b == 0 ? a : {sg}b == -1 ? 0 : {sg}a % {sg}b", zero)
    op(f"div.{u}", u, [u, u], f"b == 0 ? ~({'u64' if bits == '64' else 'u32'})0 : a / b", zero)
    op(f"rem.{u}", u, [u, u], "b == 0 ? a : a % b", zero)
    for cc, c in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
        op(f"setp.{cc}.{s}", "pred", [u, u], f"{sg}a {c} {sg}b")
        op([f"setp.{cc}.{u}", f"setp.{cc}.{b}"], "pred", [u, u], f"a {c} b")
    for cc, c in (("lo", "<"), ("ls", "<="), ("hi", ">"), ("hs", ">=")):
        op(f"setp.{cc}.{u}", "pred", [u, u], f"a {c} b")
op("mul.hi.u32", "u32", ["u32", "u32"], "((u64)a * b) >> 32")
op("mul.hi.s32", "s32", ["s32", "s32"], "((s64)a * b) >> 32")
op("mul.hi.u64", "u64", ["u64", "u64"], "(u64)(((unsigned __int128)a * b) >> 64)")
op("mul.hi.s64", "s64", ["s64", "s64"], "(s64)(((__int128)a * b) >> 64)")
op("mul.hi.u16", "u16", ["u16", "u16"], "(a * b) >> 16")
op("mul.wide.u32", "u64", ["u32", "u32"], "(u64)a * b")
op("mul.wide.s32", "s64", ["s32", "s32"], "(s64)a * b")
op("mul.wide.u16", "u32", ["u16", "u16"], "a * b")
op("mul.wide.s16", "s32", ["u16", "u16"], "(s32)(s16)a * (s32)(s16)b")
op("mad.wide.u32", "u64", ["u32", "u32", "u64"], "(u64)a * b + c")
op("mad.wide.s32", "s64", ["s32", "s32", "s64"], "(s64)a * b + c")
op("mad.wide.u16", "u32", ["u16", "u16", "u32"], "a * b + c")
op("mad.wide.s16", "u32", ["u16", "u16", "u32"], "(u32)((s32)(s16)a * (s32)(s16)b) + c")
op("mul24.lo.u32", "u32", ["u32", "u32"], "(a & 0xffffff) * (b & 0xffffff)")
op(["add.s16x2", "add.u16x2"], "b32", ["b32", "b32"], "((a + b) & 0xffff) | ((((a >> 16) + (b >> 16)) & 0xffff) << 16)")
for t, cast in (("u16x2", "(u32)(u16)"), ("s16x2", "(s32)(s16)")):
    for name, c in (("min", "<"), ("max", ">")):
        low, high = (
            f"({cast}(a) {c} {cast}(b) ? a : b) & 0xffff",
            f"({cast}(a >> 16) {c} {cast}(b >> 16) ? a : b) & 0xffff0000u",
        )
        op(f"{name}.{t}", "b32", ["b32", "b32"], f"({low}) | ({high})")
op("sub.s16x2", "b32", ["b32", "b32"], "((a - b) & 0xffff) | ((((a >> 16) - (b >> 16)) & 0xffff) << 16)")
op("popc.b32", "u32", ["u32"], "__builtin_popcount(a)")
op("popc.b64", "u32", ["u64"], "__builtin_popcountll(a)")
op("clz.b32", "u32", ["u32"], "clz32(a)")
op("brev.b32", "u32", ["u32"], "brev32(a)")
op("bfe.u32", "u32", ["u32", "u32", "u32"], "bfe_u(a, b, c)")
op("bfe.s32", "u32", ["u32", "u32", "u32"], "bfe_s(a, b, c)")
op("bfi.b32", "u32", ["u32", "u32", "u32", "u32"], "bfi_(a, b, c, d_)".replace("d_", "d4"))
CODE[-1] = CODE[-1].replace("u32 d = sd[i];", "u32 d4 = sd[i];")
op("lop3.b32", "u32", ["u32", "u32", "u32", "u32"], "lop3_(a, b, c, d4)")
CODE[-1] = CODE[-1].replace("u32 d = sd[i];", "u32 d4 = sd[i];")
op("prmt.b32", "u32", ["u32", "u32", "u32"], "prmt_(a, b, c)")
op("shf.l.wrap.b32", "u32", ["u32", "u32", "u32"], "shfl_l(a, b, c, 1)")
op("shf.r.wrap.b32", "u32", ["u32", "u32", "u32"], "shfl_r(a, b, c, 1)")
op("shf.l.clamp.b32", "u32", ["u32", "u32", "u32"], "shfl_l(a, b, c, 0)")
op("shf.r.clamp.b32", "u32", ["u32", "u32", "u32"], "shfl_r(a, b, c, 0)")
op("sad.u32", "u32", ["u32", "u32", "u32"], "(a > b ? a - b : b - a) + c")
# predicates
op("mov.pred", "pred", ["pred"], "a")
op("not.pred", "pred", ["pred"], "!a")
op("and.pred", "pred", ["pred", "pred"], "a & b")
op("or.pred", "pred", ["pred", "pred"], "a | b")
op("xor.pred", "pred", ["pred", "pred"], "a ^ b")
# float32 and float64
for t, mn, mx in (("f32", "minf_", "maxf_"), ("f64", "mind_", "maxd_")):
    fma = "__builtin_fmaf" if t == "f32" else "__builtin_fma"
    for ftz in ("", ".ftz") if t == "f32" else ("",):
        z = (lambda e: f"ftz({e})") if ftz else (lambda e: e)
        A, B, C = z("a"), z("b"), z("c")
        op([f"add{ftz}.{t}", f"add.rn{ftz}.{t}"], t, [t, t], z(f"({A} + {B})"))
        op([f"sub{ftz}.{t}", f"sub.rn{ftz}.{t}"], t, [t, t], z(f"({A} - {B})"))
        op([f"mul{ftz}.{t}", f"mul.rn{ftz}.{t}"], t, [t, t], z(f"({A} * {B})"))
        op([f"fma.rn{ftz}.{t}", f"mad.rn{ftz}.{t}"], t, [t, t, t], z(f"{fma}({A}, {B}, {C})"))
        op(f"min{ftz}.{t}", t, [t, t], z(f"{mn}({A}, {B})"))
        op(f"max{ftz}.{t}", t, [t, t], z(f"{mx}({A}, {B})"))
        if t == "f32":
            op(f"min{ftz}.NaN.{t}", t, [t, t], z(f"minnan_({A}, {B})"))
            op(f"max{ftz}.NaN.{t}", t, [t, t], z(f"maxnan_({A}, {B})"))
        op(f"neg{ftz}.{t}", t, [t], "bf(fb(a) ^ 0x80000000u)" if t == "f32" else "bd(db(a) ^ (1ull << 63))")
        op(f"abs{ftz}.{t}", t, [t], "bf(fb(a) & 0x7fffffffu)" if t == "f32" else "bd(db(a) & ~(1ull << 63))")
        for cc, c in (("eq", "=="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
            op(f"setp.{cc}{ftz}.{t}", "pred", [t, t], f"{A} {c} {B}")
            op(f"setp.{cc}u{ftz}.{t}", "pred", [t, t], f"({A} {c} {B}) || a != a || b != b")
        op(f"setp.ne{ftz}.{t}", "pred", [t, t], f"({A} != {B}) && a == a && b == b")
        op(f"setp.neu{ftz}.{t}", "pred", [t, t], f"{A} != {B}")
        op(f"setp.num{ftz}.{t}", "pred", [t, t], "a == a && b == b")
        op(f"setp.nan{ftz}.{t}", "pred", [t, t], "a != a || b != b")
    op([f"div.rn.{t}"], t, [t, t], "a / b")
    op([f"sqrt.rn.{t}"], t, [t], "__builtin_sqrtf(a)" if t == "f32" else "__builtin_sqrt(a)")
    op([f"rcp.rn.{t}"], t, [t], f"({t})1 / a")
op("copysign.f32", "f32", ["f32", "f32"], "bf((fb(a) & 0x80000000u) | (fb(b) & 0x7fffffffu))")
APPROXIMATE = {"ex2": "exp2((f64)A)", "lg2": "log2((f64)A)", "rcp": "1.0 / (f64)A", "rsqrt": "1.0 / sqrt((f64)A)"}
APPROXIMATE |= {name: f"{name}((f64)A)" for name in ("sqrt", "sin", "cos", "tanh")}
for z in ("", ".ftz"):
    q = (lambda e: f"ftz({e})") if z else (lambda e: e)
    for name, e in APPROXIMATE.items():
        op(f"{name}.approx{z}.f32", "f32", ["f32"], q(f"approx_(w, in, {e.replace('A', q('a'))}, fb(a))"))
    op(
        [f"div.full{z}.f32", f"div.approx{z}.f32"],
        "f32",
        ["f32", "f32"],
        q(f"approx_(w, in, (f64){q('a')} / (f64){q('b')}, fb(a) ^ fb(b))"),
    )
# conversions
INTS = {name: f"({name})" for name in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")}
for d in INTS:
    for s in INTS:
        if d != s:
            # destinations narrower than their register are extended by their own sign
            wide = f"{INTS[d]}{INTS[s]}a"
            if WIDTH[d] < 4:
                wide = f"(u32)({'s32' if d[0] == 's' else 'u32'}){wide}"
            op(f"cvt.{d}.{s}", d, [s], wide)
for s in INTS:
    op(f"cvt.rn.f32.{s}", "f32", [s], f"(f32){INTS[s]}a")
    op(f"cvt.rn.f64.{s}", "f64", [s], f"(f64){INTS[s]}a")
    op(f"cvt.rn.f16.{s}", "f16", [s], f"d2h((f64){INTS[s]}a)")
    op(f"cvt.rn.bf16.{s}", "bf16", [s], f"f2b((f32){INTS[s]}a)")
ROUNDINGS = {"rzi": "trunc", "rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}
for d in ("s32", "u32", "s64", "u64"):
    for s in ("f32", "f64"):
        for z in ("", ".ftz") if s == "f32" else ("",):
            for r, e in ROUNDINGS.items():
                fix = "a != a ? INT64_MIN : " if d == "s64" else ""
                op(f"cvt.{r}{z}.{d}.{s}", d, [s], f"{fix}f2{d}({e}((f64)a))")
for r, e in ROUNDINGS.items():
    op(f"cvt.{r}.f32.f32", "f32", ["f32"], f"{e}f(a)")
op("cvt.f32.f16", "f32", ["f16"], "h2f(a)")
op("cvt.f32.bf16", "f32", ["bf16"], "b2f(a)")
op("cvt.f64.f16", "f64", ["f16"], "(f64)h2f(a)")
op("cvt.f64.bf16", "f64", ["bf16"], "(f64)b2f(a)")
op("cvt.f64.f32", "f64", ["f32"], "(f64)a")
op("cvt.rn.f32.f64", "f32", ["f64"], "(f32)a")
op("cvt.rn.f16.f32", "f16", ["f32"], "f2h(a)")
op("cvt.rn.bf16.f32", "bf16", ["f32"], "f2b(a)")
op("cvt.rz.bf16.f32", "bf16", ["f32"], "f2b_rz(a)")
op("cvt.rn.f16x2.f32", "f16x2", ["f32", "f32"], "(f2h(a) << 16) | f2h(b)")
op("cvt.rn.bf16x2.f32", "bf16x2", ["f32", "f32"], "(f2b(a) << 16) | f2b(b)")
# half precision
INVERSE = {"lt": ">=", "le": ">", "gt": "<=", "ge": "<"}


def of_halves(expression: str) -> str:
    """An expression of 16-bit A, B, C, done for the low and for the high half of a, b, c."""
    low = re.sub(r"\b([ABC])\b", lambda m: f"({m[1].lower()} & 0xffff)", expression)
    high = re.sub(r"\b([ABC])\b", lambda m: f"({m[1].lower()} >> 16)", expression)
    return f"({low}) | (({high}) << 16)"


for t, to, of in (("f16", "h2f", "f2h"), ("bf16", "b2f", "f2b")):
    arithmetic = {name: f"{of}({to}(A) {e} {to}(B))" for name, e in (("add", "+"), ("sub", "-"), ("mul", "*"))}
    arithmetic |= {name: f"{of}({name}f_({to}(A), {to}(B)))" for name in ("min", "max")}
    for name, e in arithmetic.items():
        op([f"{name}.{t}", f"{name}.rn.{t}"], t, [t, t], e.replace("A", "a").replace("B", "b"))
        op([f"{name}.{t}x2", f"{name}.rn.{t}x2"], t + "x2", [t + "x2"] * 2, of_halves(e))
    fma = f"{of}((f32)((f64){to}(A) * {to}(B) + {to}(C)))"
    op(f"fma.rn.{t}", t, [t, t, t], fma.replace("A", "a").replace("B", "b").replace("C", "c"))
    op(f"fma.rn.{t}x2", t + "x2", [t + "x2"] * 3, of_halves(fma))
    op(f"neg.{t}", t, [t], "a ^ 0x8000")
    op(f"neg.{t}x2", t + "x2", [t + "x2"], "a ^ 0x80008000u")
    op(f"abs.{t}", t, [t], "a & 0x7fff")
    for cc, c in (("eq", "=="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
        op(f"setp.{cc}.{t}", "pred", [t, t], f"{to}(a) {c} {to}(b)")
        negated = f"{to}(a) < {to}(b) || {to}(a) > {to}(b)" if cc == "eq" else f"{to}(a) {INVERSE[cc]} {to}(b)"
        op(f"setp.{cc}u.{t}", "pred", [t, t], f"!({negated})")
    op(f"setp.neu.{t}", "pred", [t, t], f"{to}(a) != {to}(b)")
    op(f"setp.ne.{t}", "pred", [t, t], f"{to}(a) < {to}(b) || {to}(a) > {to}(b)")
    op(f"setp.num.{t}", "pred", [t, t], f"{to}(a) == {to}(a) && {to}(b) == {to}(b)")
    op(f"setp.nan.{t}", "pred", [t, t], f"{to}(a) != {to}(a) || {to}(b) != {to}(b)")
# pairs of float32 (sm_100 on)
for name in ("add", "sub", "mul"):
    op([f"{name}.f32x2", f"{name}.rn.f32x2"], "b64", ["b64", "b64"], f"f2{name}_(a, b, 0)")
op(["fma.rn.f32x2"], "b64", ["b64", "b64", "b64"], "f2fma_(a, b, c)")
# In the C files.
IN_C = "ld_global st_global ld_shared st_shared ld_param unpack pack shfl redux vote mma ldmatrix stmatrix wgmma"
for name in [*IN_C.split(), "cp_async", "cp_commit", "cp_wait", "barwarp", "nop", "trap"]:
    special(name, "op_" + name)

NAMES = list(TABLE)
INDEX = {name: k for k, name in enumerate(NAMES)}


def c_source() -> str:
    return "\n".join(CODE) + "\nstatic const Fn FNS[] = {" + ", ".join(TABLE[n][0] for n in NAMES) + "};\n"
