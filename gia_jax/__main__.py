"""`python -m gia_jax`."""

from gia_jax.cli import process

if __name__ == "__main__":
    process()
