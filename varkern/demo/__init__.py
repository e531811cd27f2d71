"""The small pretrained digits model that ships with the package, and its training."""
