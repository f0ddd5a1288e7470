"""``python -m service``: the same as the ``messagesd`` command."""

from service.cli import main

if __name__ == "__main__":
    main(prog_name="messagesd")
