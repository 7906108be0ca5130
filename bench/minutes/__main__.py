"""`python -m bench.minutes`: the first ten minutes on a GPU."""

from bench.minutes.walk import main

if __name__ == "__main__":
    main()
