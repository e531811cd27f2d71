"""Token-map datasets: the real and the generated maps that a scorer is trained on."""
