"""What ends a benchmark."""


class BenchError(Exception):
    """It cannot be run, or what it read was wrong; the text says which."""
