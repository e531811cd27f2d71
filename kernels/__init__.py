"""The Triton kernels and their launchers. Each file has the name of the op in ``varkern.ops`` that calls it.

This package imports triton, and torch only to launch kernels. It imports nothing else from varkern.
"""
