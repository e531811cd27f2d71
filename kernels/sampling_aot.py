"""The sampling kernels' cases for ``bench/aot.py``: the published models' sizes, both filters on."""

from collections.abc import Iterator

from .sampling import plan, sample_kernel, sample_shortlist_kernel
from .sampling_shortlist import shortlist_kernel
from .sampling_small import sample_small_kernel

# label, V, M, top_k, type of the logits, with stats
CASES = [
    ("V=2", 2, 1, 1, "*fp32", False),
    ("V=32", 32, 1, 9, "*fp32", False),
    ("V=256 M=1", 256, 1, 0, "*fp32", False),
    ("V=4096 M=1 nucleus only", 4096, 1, 0, "*fp32", False),
    ("V=4096 M=1", 4096, 1, 900, "*fp32", False),
    ("V=4096 M=1 no guidance", 4096, 1, 900, "*fp32", False),
    ("V=4096 M=4", 4096, 4, 900, "*fp32", False),
    ("V=4096 M=128", 4096, 128, 900, "*fp32", False),
    ("V=4096 M=128 bfloat16", 4096, 128, 900, "*bf16", False),
    ("V=4096 M=128 with stats", 4096, 128, 900, "*fp32", True),
    ("V=4096 M=128 top_k=2000", 4096, 128, 2000, "*fp32", False),
    ("V=8912 M=128", 8912, 128, 900, "*fp32", False),
    ("V=16384 M=128", 16384, 128, 900, "*fp32", False),
    ("V=262144 M=128", 262144, 128, 900, "*fp32", False),
]
ESSENTIAL = ("V=2", "V=4096 M=1 nucleus only", "V=4096 M=128 with stats")
POINTERS = {
    "seeds_ptr": "*i64",
    "tokens_ptr": "*i64",
    "values_ptr": "*fp32",
    "columns_ptr": "*i16",
    "headers_ptr": "*fp32",
}
STATS = {"log_prob_ptr": "*fp32", "raw_log_prob_ptr": "*fp32", "num_kept_ptr": "*i64", "raw_totals_ptr": "*i64"}
STRIDES = [f"stride_{half}_{axis}" for half in ("cond", "uncond") for axis in ("image", "position")]
COUNTS = ["num_rows", "length", "vocabulary", "num_candidates", "scale", "top_k", "nucleus"]
FLOATS = ["guidance", "inverse_temperature", "deviations", "spacing"]


def aot_specs() -> Iterator[dict]:
    for label, vocabulary, num_candidates, top_k, dtype, with_stats in CASES:
        chosen = plan(vocabulary, num_candidates, top_k)
        types = {"cond_ptr": dtype, "uncond_ptr": dtype, **POINTERS, **dict.fromkeys(STRIDES + COUNTS, "i32")}
        types |= dict.fromkeys(FLOATS, "fp32") | (STATS if with_stats else {})
        constants = {"FILTER_TOP_K": True, "FILTER_NUCLEUS": True, "strengths_ptr": None}
        constants |= {} if with_stats else dict.fromkeys((*STATS, "inverse_temperature"))
        if label.endswith("no guidance"):
            del types["uncond_ptr"]
            constants["uncond_ptr"] = None
        kernels = [(sample_kernel, "sample")]
        if chosen["kind"] == "small":
            kernels = [(sample_small_kernel, "sample")]
        elif chosen["kind"] == "shortlist":
            kernels = [(shortlist_kernel, "shortlist"), (sample_shortlist_kernel, "sample")]
        for kernel, part in kernels:
            sizes = dict(chosen[part])
            options = {"num_warps": sizes.pop("num_warps"), "enable_fp_fusion": False}
            signature = {name: types[name] for name in kernel.arg_names if name in types and name not in constants}
            yield {
                "label": f"{label}: {kernel.__name__}",
                "kernel": kernel,
                "signature": signature,
                "constexprs": {n: v for n, v in {**constants, **sizes}.items() if n in kernel.arg_names},
                "divisible": [name for name in signature if name.endswith("_ptr") or name in STRIDES],
                "options": options,
                "no_spills": vocabulary == 4096,
                "essential": label in ESSENTIAL,
            }
