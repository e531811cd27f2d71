"""Kernels written in PTX by hand: planted faults are found, and correct code raises nothing."""

import re

import pytest
import torch

from tests import emulator

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 p0, .param .u32 p1)
.reqntid 64
{
 .reg .pred %p<9>;
 .reg .b32 %r<19>;
 .reg .b64 %rd<9>;
 ld.param.b64 %rd1, [p0];
 ld.param.b32 %r9, [p1];
 mov.u32 %r1, %tid.x;
 shl.b32 %r2, %r1, 2;
 mov.b32 %r3, global_smem;
 add.s32 %r4, %r3, %r2;
 xor.b32 %r5, %r2, 128;
 add.s32 %r6, %r3, %r5;
 cvt.u64.u32 %rd2, %r2;
 add.s64 %rd3, %rd1, %rd2;
"""
# %r1 thread, %r4 its place in shared memory, %r6 the place of the same lane of the other warp, %rd3 its global place.
WRITE, READ_OTHER, OUT = "st.shared.b32 [%r4], %r1;", "ld.shared.b32 %r7, [%r6];", "st.global.b32 [%rd3], %r7;"
BARRIER = "bar.sync 0;"
COPY = "cp.async.ca.shared.global [%r4], [%rd3], 4;\ncp.async.commit_group;"
ODD_LANES_LEAVE = "and.b32 %r10, %r1, 1;\nsetp.eq.b32 %p1, %r10, 0;\n@!%p1 bra $A;"

CLEAN = {
    "exchange between warps with a barrier": [WRITE, BARRIER, READ_OTHER, OUT],
    "branches that meet again": [
        "and.b32 %r10, %r1, 1;\nsetp.eq.b32 %p1, %r10, 0;\nmov.b32 %r11, 0;\n@%p1 bra $A;\nmov.b32 %r11, 1;\n$A:",
        "shfl.sync.bfly.b32 %r7, %r11, 1, 31, -1;",
        OUT,
    ],
    "cp.async that is waited for": [COPY, "cp.async.wait_group 0;", BARRIER, READ_OTHER],
}
# What is planted: (statements, what is said, bytes of shared memory)
FAULTS = {
    "exchange between warps without a barrier": ([WRITE, READ_OTHER, OUT], "shared race", 256),
    "shared access out of bounds": ([WRITE, BARRIER, READ_OTHER, OUT], "shared access out of bounds", 128),
    "read of shared memory never written": ([READ_OTHER, OUT], "never written", 256),
    "write without a barrier after reads": (
        [WRITE, BARRIER, READ_OTHER, "st.shared.b32 [%r4], %r7;"], "write after read", 256,
    ),
    "two warps write one place": (["st.shared.b32 [global_smem], %r1;"], "write after write", 256),
    "lanes of a warp write one place": (
        ["setp.lt.u32 %p1, %r1, 32;\n@%p1 st.shared.b32 [global_smem], %r1;"], "lanes store different values", 256,
    ),
    "global store out of bounds": (["st.global.b32 [%rd3+4], %r1;"], "global store out of bounds", 16),
    "misaligned vector": (["st.global.v2.b32 [%rd3], {%r1, %r1};"], "misaligned global", 16),
    "all threads store to one place": (["st.global.b32 [%rd1], %r1;"], "global race between warps", 16),
    "barrier in a divergent branch": (
        ["setp.lt.u32 %p1, %r1, 40;\n@%p1 bra $A;", BARRIER, "$A:", BARRIER], "warp-synchronous|deadlock|barrier", 16,
    ),
    "shuffle in a divergent branch": (
        [ODD_LANES_LEAVE, "shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;", "$A:"], "warp-synchronous|deadlock", 16,
    ),
    "division by zero": (["sub.s32 %r10, %r1, %r1;\ndiv.s32 %r7, %r1, %r10;", OUT], "division by zero", 16),
    "cp.async read before its wait": ([COPY, "ld.shared.b32 %r7, [%r4];", "cp.async.wait_group 0;"], "in flight", 256),
    "cp.async never waited for": ([COPY], "in flight", 256),
    "trap": (["trap;"], "trap", 16),
}  # fmt: skip


def run(statements: list[str], shared: int) -> torch.Tensor:
    """Two warps, each thread with a place of its own in ``memory[64]``."""
    kernel = emulator.translate(HEAD + "\n".join([*statements, "ret;\n}\n"]))
    memory = torch.arange(64, dtype=torch.int32)
    emulator.launch(kernel, (1,), [(memory, "*i32"), (64, "i32")], shared, emulator.Totals(kernel))
    return memory


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("statements", CLEAN.values(), ids=CLEAN)
def test_clean_code_raises_nothing(statements, seed, monkeypatch):
    monkeypatch.setattr(emulator.SETTINGS, "seed", seed)
    run(statements, 256)


def test_a_result():
    assert torch.equal(
        run(CLEAN["exchange between warps with a barrier"], 256), torch.arange(64, dtype=torch.int32) ^ 32
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("statements, said, shared", FAULTS.values(), ids=FAULTS)
def test_faults_are_raised(statements, said, shared, seed, monkeypatch):
    monkeypatch.setattr(emulator.SETTINGS, "seed", seed)
    with pytest.raises(emulator.EmulationError) as caught:
        run(statements, shared)
    assert re.search(said, str(caught.value)), str(caught.value)


def test_the_same_value_from_all_warps_is_a_remark():
    kernel = emulator.translate(HEAD + "st.shared.b32 [global_smem], %r9;\nret;\n}\n")
    totals = emulator.Totals(kernel)
    emulator.launch(kernel, (1,), [(torch.zeros(64, dtype=torch.int32), "*i32"), (64, "i32")], 16, totals)
    assert [what for what, _ in totals.events] == ["warps store the same value to one shared address"]


def test_an_unknown_instruction_is_named():
    with pytest.raises(emulator.UnsupportedPTX, match=r"tcgen05\.mma"):
        emulator.translate(HEAD + "tcgen05.mma %r1, %r2;\nret;\n}\n")
