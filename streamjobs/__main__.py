"""``python -m streamjobs``: the command line."""

from streamjobs.cli import main

if __name__ == "__main__":
    main()
