"""Read and write weights of other code bases: official FLIP checkpoints, and open_clip models both ways."""
