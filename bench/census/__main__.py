"""`python -m bench.census`: every kernel that ships, compiled and tested against its gates."""

from bench.census.binaries import main

if __name__ == "__main__":
    main()
