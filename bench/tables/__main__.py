"""`python -m bench.tables`: the documentation's tables, from bench/results/."""

from bench.tables.pages import main

if __name__ == "__main__":
    main()
