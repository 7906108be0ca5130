"""Teacher values on a CPU: log-sum-exp over the vocabulary, forward only, beside its peers and beside the bare product.

    tvkd bench values --shape 4096x576x49152 --json FILE       (or python -m bench.head.values)

Options and method are `bench.head`'s.
"""

from bench.head.comparison import command
from bench.head.contenders import of_values

if __name__ == "__main__":
    command("bench.head.values", __doc__, of_values())
