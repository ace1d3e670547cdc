"""Small valid inputs, made once a run."""
