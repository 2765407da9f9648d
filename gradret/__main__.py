"""`python -m gradret`."""

from gradret.cli import main

if __name__ == "__main__":
    main(prog_name="gradret")
