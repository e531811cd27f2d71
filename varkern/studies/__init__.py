"""Tools that measure or explain a search."""
