"""One file a group of readers; each is imported by ``registry.readers``."""
