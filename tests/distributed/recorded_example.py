"""An example, and the gradient's norm of every update before it is clipped. Arguments: its file and its own."""

import os
import runpy
import sys

import torch

clip = torch.nn.utils.clip_grad_norm_


def clipped(*given: object, **options: object) -> torch.Tensor:
    norm = clip(*given, **options)  # type: ignore[arg-type]
    # A progress bar may stand on the line.
    print(f"\nnorm {float(norm):.9g}", flush=True)
    return norm


if __name__ == "__main__":
    torch.nn.utils.clip_grad_norm_ = clipped
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
