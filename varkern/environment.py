"""Versions and devices for a bug report; ``varkern env`` prints them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata

import torch

import varkern
from varkern.diagnosis import attempt, describe_driver, describe_gpus, describe_triton
from varkern.ops.backend import explain

VARIABLES = (
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
)


def describe(device: torch.device) -> dict[str, str]:
    """Describe versions, the device, the backend in use with its reason, every GPU, and the extras, by name."""
    driver = describe_driver()
    report = {
        "varkern": varkern.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": describe_triton(version_of("triton")),
        "cuda": f"{torch.version.cuda or 'none'} (PyTorch's), driver {driver or 'none'}",
        "device": attempt(lambda: device_name(device)),
        "backend": explain(device),
        **describe_gpus(driver),
    }
    if torch.version.hip:
        report["rocm"] = torch.version.hip
    for name, missing in extras().items():
        report[f"[{name}]"] = f"missing {', '.join(missing)}" if missing else "installed"
    report.update({name: os.environ[name] for name in VARIABLES if name in os.environ})
    return report


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", None) or f"compute {properties.major}.{properties.minor}"
    return f"{device}, {properties.name}, {architecture}, {properties.total_memory / 2**30:.0f} GiB"


def extras() -> dict[str, list[str]]:
    """List the extras of varkern and the missing packages of each; empty if varkern is not installed."""
    try:
        requirements = metadata.requires("varkern") or []
    except metadata.PackageNotFoundError:
        return {}
    brought: dict[str, list[tuple[str, list[str]]]] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?.*;.*extra == ['\"](\w+)['\"]", requirement)
        if match:
            brought.setdefault(match[3], []).append((match[1], (match[2] or "").split(",")))

    def packages(extra: str) -> Iterator[str]:
        for name, others in brought.get(extra, []):
            if name == "varkern":  # an extra may bring other extras
                for other in others:
                    yield from packages(other)
            else:
                yield name

    return {
        extra: [name for name in dict.fromkeys(packages(extra)) if version_of(name) == "not installed"]
        for extra in brought
    }
