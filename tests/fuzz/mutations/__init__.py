"""Changes to valid files: of any bytes, of texts, and of each binary format by its own grammar."""
