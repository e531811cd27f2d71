"""What measures a set of images."""
