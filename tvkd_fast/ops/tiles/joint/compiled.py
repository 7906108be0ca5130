from __future__ import annotations
from typing import Any
from torch import Tensor

def passes(z: Tensor) -> Any:
    return None
