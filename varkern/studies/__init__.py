"""What measures or explains a search."""
