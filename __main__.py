"""``python -m foldkv``."""

from foldkv.cli import main

if __name__ == "__main__":
    main()
