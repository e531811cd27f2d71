"""Options of the benchmarks."""

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--upstream", type=Path, help="a checkout of FoundationVision/VAR, to time its own class too")
    parser.addoption("--depths", default="", help="of the generation benchmark, such as 16,30; default: all")
