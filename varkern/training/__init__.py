"""Training of scorers and of the demo's models, and the report of a scorer."""
