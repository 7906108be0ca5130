"""The vocabulary head on a CPU, forward and backward: ours beside its peers and beside the bare product.

    tvkd bench head --shape 4096x576x49152 --json FILE       (or python -m bench.head)

A shape that the packaged model has is measured on that model's states over preference data (`--data`), any other on
made ones that say so. How: `bench/head/comparison.py`.
"""

from bench.head.comparison import command
from bench.head.contenders import on_cpu

if __name__ == "__main__":
    command("bench.head", __doc__, on_cpu())
