"""`python -m mint_mlx` is `mint-mlx`."""

from .cli import main

main()
