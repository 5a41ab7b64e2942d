"""Runs the command line by `python -m gia_jax`, as the program `gia-jax` does."""

from gia_jax.cli import process

if __name__ == "__main__":
    process()
