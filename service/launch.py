"""Where the program begins. Light on purpose: what is imported here is imported twice."""

import os
import sys

from service.memory import prefer_system_allocator


def run() -> None:
    """Run the command line; the daemon itself on the allocator that suits it."""
    if "serve" in sys.argv[1:]:
        prefer_system_allocator(os.environ)
    from service.cli import main  # noqa: PLC0415 - as said above

    main(prog_name="messagesd")
