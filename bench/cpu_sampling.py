"""What further candidates cost on a CPU: ``python bench/cpu_sampling.py`` prints M=1, M=64 and their ratio.

24 images with guidance at VAR's last scale (l=256, V=4096, top_k=900, top_p=0.96), in plain PyTorch. The candidates
share one filtered distribution, so M=64 should cost less than 1.5 times M=1 plus the 63 further look-ups.
"""

import argparse
import statistics
import time

import torch

from varkern.ops import image_seeds, sample_tokens, use_backend


def seconds(num_candidates: int, repeats: int, logits: torch.Tensor, uncond_logits: torch.Tensor) -> float:
    """Median of ``repeats`` calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        sample_tokens(
            logits,
            num_candidates,
            uncond_logits=uncond_logits,
            guidance=1.5,
            top_k=900,
            top_p=0.96,
            seeds=image_seeds(0, logits.shape[0]),
        )
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    logits, uncond_logits = (2 * torch.randn(24, 256, 4096, generator=generator) for _ in range(2))
    with use_backend("torch"):
        one, many = (seconds(m, arguments.repeats, logits, uncond_logits) for m in (1, 64))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"M=1 {one:.3f} s, M=64 {many:.3f} s, ratio {many / one:.2f}")
