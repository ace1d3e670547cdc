"""What schemes have on a GPU, in Triton."""
