"""``python -m weft`` is the command ``weft``; so torchrun can start it: ``torchrun ... -m weft run digits``."""

from weft.cli import main

if __name__ == "__main__":
    main()
