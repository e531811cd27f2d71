"""Times of the sampler with other filters and launch parameters, at 24 images of 256 positions.

    python bench/tune_sampling.py        # needs a GPU; under a minute after compilation

The launch parameters are those of ``varkern.kernels.sampling.plan`` with one or two of them changed. Each line has the
device time from a CUDA graph and the time of each kernel from the profiler.
"""

import copy
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from varkern.kernels import sampling as kernels

from bench.measure import DEVICE, RATES, graph_seconds
from bench.test_sampling import B, logits_of
from varkern.ops import sample_tokens
from varkern.ops.philox import image_seeds

chosen_plan = kernels.plan


def override(kind=None, **changes):
    """A ``plan`` with changed parameters: ``shortlist_num_warps=8`` changes num_warps of the shortlist kernel."""

    def plan(vocabulary, num_candidates, top_k):
        made = copy.deepcopy(chosen_plan(vocabulary, num_candidates, 0 if kind == "row" else top_k))
        for name, value in changes.items():
            part, _, option = name.partition("_")
            if part in made:
                made[part][option] = value
        return made

    return plan


def kernel_times(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / 5 for event in profile.key_averages()}
    return ", ".join(
        f"{name} {micros:.1f}" for name, micros in found.items() if "sample" in name or "shortlist" in name
    )


def report(label, both, m, top_k=900, top_p=0.96, guidance=1.5):
    options = {"top_k": top_k, "top_p": top_p, "seeds": image_seeds(0, B, DEVICE)}
    if guidance:
        options |= {"uncond_logits": both[B:], "guidance": guidance}

    def step():
        return sample_tokens(both[:B], m, **options)

    floor = both.numel() * both.element_size() / RATES.bandwidth / (1 if guidance else 2)
    try:
        taken = graph_seconds(step)
        kinds = kernel_times(step)
    except Exception as error:  # a launch can need more resources than the device has
        print(f"{label:<56} {type(error).__name__}: {str(error)[:60]}", flush=True)
        return
    print(f"{label:<56} {taken * 1e6:8.1f} us {taken / floor:6.2f} x floor | {kinds}", flush=True)


def main():
    both = logits_of(256)
    for m, (label, k, p) in itertools.product(
        (1, 128), (("off", 0, 0.0), ("top_k", 900, 0.0), ("top_p", 0, 0.96), ("both", 900, 0.96))
    ):
        report(f"M={m} filters {label}", both, m, k, p)
    report("M=1 both, no guidance", both, 1, guidance=0.0)
    report("M=1 both, bfloat16", both.bfloat16(), 1)
    report("M=1 both, flat logits", both * 0.1, 1)
    report("M=1 both, peaked logits", both * 3, 1)
    for warps in (4, 8, 16):
        kernels.plan = override("row", sample_num_warps=warps)
        report(f"M=1 both, one kernel, num_warps={warps}", both, 1)
    for shortlist, sample in itertools.product((2, 4, 8, 16), (1, 2)):
        kernels.plan = override(shortlist_num_warps=shortlist, sample_num_warps=sample)
        report(f"M=1 both, shortlist num_warps={shortlist}, sample num_warps={sample}", both, 1)
    for shortlist, sample in itertools.product((None, 128, 96), (None, 128, 96)):
        kernels.plan = override(shortlist_maxnreg=shortlist, sample_maxnreg=sample)
        report(f"M=1 both, maxnreg={shortlist}, {sample}", both, 1)
    for size in (16, 64, 128):
        kernels.plan = override(shortlist_GROUP_SIZE=size, shortlist_GROUPS=4096 // size)
        report(f"M=1 both, shortlist GROUP_SIZE={size}", both, 1)
    for draws, size in itertools.product((8, 16, 32), (16, 32, 64)):
        kernels.plan = override(sample_DRAWS=draws, sample_GROUP_SIZE=size)
        report(f"M=128 both, DRAWS={draws}, sample GROUP_SIZE={size}", both, 128)


if __name__ == "__main__":
    main()
