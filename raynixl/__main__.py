"""`python -m raynixl` is the `raynixl` command."""

from raynixl.cli import app

if __name__ == "__main__":
    app(prog_name="raynixl")
