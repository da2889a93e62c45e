"""`python -m vico`: the console command without an installed package."""

from vico.cli.main import console

if __name__ == "__main__":
    console()
