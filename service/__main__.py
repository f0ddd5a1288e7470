"""``python -m service``: the same as the ``messagesd`` command."""

from service.launch import run

if __name__ == "__main__":
    run()
