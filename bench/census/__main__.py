"""`python -m bench.census`: every kernel that ships, compiled and held to its gates."""

from bench.census.binaries import main

if __name__ == "__main__":
    main()
