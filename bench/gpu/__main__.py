"""`python -m bench.gpu`: the vocabulary head on a GPU."""

from bench.gpu.comparison import main

if __name__ == "__main__":
    main()
