"""``python -m foldkv``, and the command ``foldkv``."""

import sys


def main() -> None:
    """Run the command line. Imports are part of it: Ctrl-C ends them too."""
    try:
        from foldkv.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
