"""`python -m diffquant` is the same as the `diffquant` command."""

from diffquant.cli import main

if __name__ == "__main__":
    main()
