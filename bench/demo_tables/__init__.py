"""The papers' tables on the demo model: all figures of varkern/demo/README.md.

    python -m bench.demo_tables --out DIR --page varkern/demo/README.md

This trains the three scorers that the tables compare, measures and times every cell, and puts the tables into the
page. ``--tables NAME ...`` makes some of the tables. It can be killed at any time and continues where it stopped.

When the scorers exist, several processes can share the cells: ``torchrun --nproc-per-node 2 -m bench.demo_tables ...``.
A last call without ``torchrun`` measures the times and writes the tables.
"""
