"""``python -m foldkv``, and the command ``foldkv``."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C also ends the imports."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
