"""The papers' tables on the demo model: every figure of varkern/demo/README.md."""
