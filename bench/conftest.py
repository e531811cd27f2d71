"""Options of the benchmarks."""

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--upstream", type=Path, help="checkout of FoundationVision/VAR, whose class is timed too")
    parser.addoption("--depths", default="", help="depths of the generation benchmark, such as 16,30 (default: all)")
