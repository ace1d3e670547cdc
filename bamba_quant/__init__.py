"""Import me."""
