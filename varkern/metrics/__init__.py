"""Tools that measure a set of images."""
