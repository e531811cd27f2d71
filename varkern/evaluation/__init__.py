"""Metrics, sweeps and pictures: does a search help, and at what cost."""
