"""`python -m mint_mlx` is `mint-mlx`."""

from .cli.main import main

main()
