"""The density kernels' cases for ``bench/aot.py``: token maps, points and bits, at small and at large N."""

from collections.abc import Iterator

import triton

from . import density, density_bandwidth, density_bits

# label, N, dims, positions, length, type of the table, names rows by tokens, cosine
SAMPLES = [
    ("tokens N=100 l=4 C=32", 100, 32, 4, 1, "*fp32", True, False),
    ("tokens N=100 l=4 C=32 cosine", 100, 32, 4, 1, "*fp32", True, True),
    ("maps N=100 l=256 C=32", 100, 32, 1, 256, "*fp32", True, False),
    ("tokens N=3000 l=4 C=32", 3000, 32, 4, 1, "*fp32", True, False),
    ("x N=507 D=7", 507, 7, 1, 1, "*fp32", False, False),
    ("x N=3000 D=32", 3000, 32, 1, 1, "*fp32", False, False),
    ("x N=4096 D=8192", 4096, 8192, 1, 1, "*fp32", False, False),
    ("x N=4096 D=8192 bfloat16", 4096, 8192, 1, 1, "*bf16", False, False),
]
# label, N, positions, words
BITS = [
    ("bits N=100 l=4 d=32", 100, 4, 1),
    ("bits N=3000 l=4 d=32", 3000, 4, 1),
    ("bit maps N=3000 l=16 d=32", 3000, 1, 16),
]
ESSENTIAL = ("tokens N=100 l=4 C=32", "x N=4096 D=8192", "bits N=3000 l=4 d=32")
TYPES = {
    "tokens_ptr": "*i64",
    "inverse_ptr": "*fp32",
    "bandwidth_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "out_ptr": "*fp32",
    "slots_ptr": "*fp32",
    "words_ptr": "*i32",
    "bits_ptr": "*u8",
    "width": "fp32",
    "factor": "fp32",
}


def _spec(label, kernel, constexprs, table="*fp32", missing=(), divisible=()) -> dict:
    given = [name for name in kernel.arg_names if name not in constexprs and name not in missing]
    signature = {name: table if name == "table_ptr" else TYPES.get(name, "i32") for name in given}
    pointers = [name for name in signature if name.endswith("_ptr")]
    return {
        "label": f"{label}: {kernel.__name__}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": {**constexprs, **dict.fromkeys(missing)},
        "divisible": [*pointers, *(name for name in divisible if name in signature)],
        "options": {"num_warps": 4, "enable_fp_fusion": True},
        # ptxas sets 8 to 40 bytes of this one's registers aside on some targets, the running totals while coordinates
        # are summed, to fit one more block on a multiprocessor; none is touched in the inner loop.
        "no_spills": kernel is not density.density_kernel,
        "essential": label in ESSENTIAL,
    }


def aot_specs() -> Iterator[dict]:
    for label, count, dims, positions, length, table, has_tokens, cosine in SAMPLES:
        missing = ([] if has_tokens else ["tokens_ptr"]) + ([] if cosine else ["inverse_ptr"])
        even = ("D", "stride_table_group", "stride_table_row", "stride_table_place") if dims % 16 == 0 else ()
        block_n, block_d = density_bandwidth.deviation_blocks(count, dims)
        sizes = {"BITS": False, "BLOCK_N": block_n, "BLOCK_D": block_d}
        yield _spec(label, density_bandwidth.deviations_kernel, sizes, table, missing, even)
        if cosine:
            sizes = {"BLOCK_N": 64, "BLOCK_D": min(32, triton.next_power_of_2(dims))}
            yield _spec(label, density_bandwidth.inverse_norms_kernel, sizes, table, missing[:-1], even)
        parts = triton.next_power_of_2(length * triton.cdiv(dims, block_d))
        sizes = {**density.plan(count, dims, positions, length)["constants"], "BLOCK_PARTS": parts}
        yield _spec(label, density.density_kernel, sizes, table, missing, even)
    for label, count, positions, words in BITS:
        block_n, block_d = density_bandwidth.deviation_blocks(count, 32)
        sizes = {"BITS": True, "BLOCK_N": block_n, "BLOCK_D": block_d}
        missing = ["tokens_ptr", "inverse_ptr"]
        yield _spec(label, density_bandwidth.deviations_kernel, sizes, "*u8", missing)
        yield _spec(label, density_bits.pack_kernel, {"BLOCK_N": 128, "stride_bits_d": 1})
        parts = triton.next_power_of_2(words * triton.cdiv(32, block_d))
        sizes = {**density_bits.plan(count, positions, words)["constants"], "BLOCK_PARTS": parts}
        yield _spec(label, density_bits.bit_density_kernel, sizes)
    slots = {"BLOCK_SLOTS": 16, "BLOCK_SIZE": 128}
    yield _spec("slots", density_bandwidth.add_slots_kernel, slots)
