"""`python -m vico`: the console command without an installed package."""

from vico.cli import console

if __name__ == "__main__":
    console()
