"""The Triton kernels and their launchers; one file a kernel, named like the op in ``varkern.ops`` that calls it.

This package imports triton, and torch only to launch; it knows nothing of the rest of varkern.
"""
