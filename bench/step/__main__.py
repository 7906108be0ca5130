"""`python -m bench.step`: whole optimizer steps on a CPU."""

from bench.step.comparison import main

if __name__ == "__main__":
    main()
