"""Options of the benchmarks. Their rehearsals on a CPU run the kernels in Triton's interpreter."""

import os
from pathlib import Path

import torch

if os.environ.get("VARKERN_BENCH_TINY") == "1" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported


def pytest_addoption(parser):
    parser.addoption("--upstream", type=Path, help="checkout of FoundationVision/VAR, whose class is timed too")
    parser.addoption("--depths", default="", help="depths of the generation benchmark, such as 16,30 (default: all)")
