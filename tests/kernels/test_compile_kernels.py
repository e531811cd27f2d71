"""Several processes compile the kernels ahead of time, each a share. Together they compile all and run none."""

import itertools

import pytest
import torch
from varkern.kernels import density, density_bandwidth

from bench.compile_kernels import compile_share
from tests import emulator
from varkern import ops
from varkern.ops import use_backend

pytestmark = pytest.mark.compiled_only


def launches():
    with use_backend("triton"):
        for n in (3, 40):  # two ways to compile the same kernels
            ops.kernel_density(torch.ones(1, n, 7))
            ops.kernel_density(torch.ones(1, n, 7), metric="cosine")


def compile_afresh(share, shares):
    """Names of the kernels that are compiled by a process that has compiled nothing before."""
    for kernel in (density.density_kernel, density_bandwidth.deviations_kernel, density_bandwidth.inverse_norms_kernel):
        kernel.device_caches.clear()
    return sorted(name for name, _, error in compile_share(launches, share, shares) if not error)


def test_shares_make_up_the_whole_and_run_nothing():
    for totals in emulator.launched.values():
        totals.reset()
    whole, shares = compile_afresh(0, 1), [compile_afresh(share, 3) for share in range(3)]
    assert sorted(itertools.chain(*shares)) == whole and len(whole) >= 4 and all(shares)
    assert not any(totals.launches for totals in emulator.launched.values())
