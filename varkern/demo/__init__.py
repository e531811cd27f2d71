"""The small pretrained digits model that ships with the package, and how it was trained."""
