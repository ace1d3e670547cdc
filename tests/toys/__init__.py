"""A codec, a recipe and a family that the product does not have, each added to a copy of the package in one place."""
