"""Entry point of `python -m worldloom.envs.check`; see `worldloom.check`."""

from worldloom.check.__main__ import main

if __name__ == "__main__":
    main()
