"""`python -m bench.rollout`: sampling on a CPU."""

from bench.rollout.comparison import main

if __name__ == "__main__":
    main()
