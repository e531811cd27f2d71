"""The papers' tables on the demo model: every figure of varkern/demo/README.md.

    python -m bench.demo_tables --out DIR --page varkern/demo/README.md

Trains the three scorers that the tables compare, measures and times every cell, and puts the tables into the page. It
can be killed at any time and continues where it stopped. Under ``torchrun --nproc-per-node 2 -m bench.demo_tables ...``
processes share the cells once the scorers are there; a last call without it takes the times and writes the tables.
"""
