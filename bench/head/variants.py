"""Variants that were tried of a sparse gradient from selected entries, each over the forward product.

    python -m bench.head.variants --data PAIRS.jsonl.gz --json FILE

On the packaged model's states. All in one process, interleaved, medians; dense blocks are timed as the three products
that they would take, beside the share of the entries that they would save the gathering.

Letters: N tokens, D hidden, V vocabulary, K columns with the most selected entries.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.harness.machine import made_by, seconds, write_report
from bench.harness.meters import interleaved
from bench.harness.states import load_states
from bench.head.comparison import prepared_states, product
from tvkd_fast.kernels.records import Head, SelectedEntries, SelectionRule
from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles import sparse as sparse_tiles

TILING = (2048, 1024)
DENSE = (2048, 8192)


def csr(selected: SelectedEntries, entries: Tensor, shape: tuple[int, int], *, transposed: bool) -> Tensor:
    """torch's compressed rows of the entries, or of their transpose."""
    places = torch.stack([selected.rows, selected.columns]).long()
    whole = torch.sparse_coo_tensor(places, entries, shape)
    return (whole.t() if transposed else whole).coalesce().to_sparse_csr()


def variants(states: Any, eps: float) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Return the timed variants by name, and the counts."""
    hidden, weight, labels = states.hidden, states.weight, states.labels
    (n, _), v = hidden.shape, weight.shape[0]
    head, rule = Head(weight), SelectionRule(eps, v // 16)
    sums, selected = sparse_tiles.select_entries(hidden, head, labels, rule)
    parts = sparse_tiles.Parts(hidden, head, labels, sums, selected, states.coefficients, None)
    entries = parts.entries(slice(None))
    by_row, by_column = (csr(selected, entries, (n, v), transposed=t) for t in (False, True))
    total = torch.empty_like(weight)

    def in_torch(passes: Any) -> Callable[[], Any]:
        def run() -> Any:
            kept, native.passes = native.passes, passes
            try:
                return sparse_tiles.select_entries(hidden, head, labels, rule)
            finally:
                native.passes = kept

        return run

    found: dict[str, Callable[[], Any]] = {
        "forward: log-probabilities alone": lambda: sparse_tiles.exact.head_sums(hidden, head, labels=labels),
        "forward: marked by numba": in_torch(native.passes),
        "forward: marked by torch": in_torch(lambda z: None),
        "dH: gathered tile by tile": parts.by_hidden,
        "dH: torch's CSR product": lambda: by_row @ weight,
        "dW: gathered tile by tile": lambda: sparse_tiles.ByColumn(parts).weight(slice(0, v), total),
        "dW: torch's CSR product, transposed before": lambda: by_column @ hidden,
    }
    share = torch.bincount(selected.columns, minlength=v).sort(descending=True).values.cumsum(0) / selected.count
    saved = {}
    for k in DENSE:
        block = weight[:k].contiguous()
        name = f"a dense block of {k:,} columns"
        found[name] = partial(dense, hidden, block)
        saved[name] = float(share[k - 1])
    return found, {"entries": selected.count / n, "saved": saved}


def dense(hidden: Tensor, block: Tensor) -> None:
    """Its logits again, dH and dW."""
    for h in hidden.split(1024):
        z = h @ block.T
        z @ block
        z.T @ h


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse")
    shape = (arguments.tokens, 576, 49152)
    states = load_states(prepared_states(shape, model=arguments.model, data=arguments.data))
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for eps in (2.0**-14, 2.0**-16):
            jobs, counted = variants(states, eps)
            runs: dict[str, Callable[[], Any]] = {
                "product": partial(product, states.hidden, states.weight, TILING),
                **jobs,
            }
            taken = interleaved({name: partial(seconds, run) for name, run in runs.items()}, arguments.rounds + 1)
            # The first round wakes threads and fills caches.
            medians = {name: median(own for _, own in times[1:]) for name, times in taken.items()}
            unit = medians.pop("product")
            over = {name: middle / unit for name, middle in medians.items()}
            results.append({"eps": eps, **counted, "over_product": over})
            print(json.dumps(results[-1], indent=1))
    report = {"results": results, "states": states.source, "tokens": arguments.tokens, "rounds": arguments.rounds}
    write_report(report | {"made_by": made_by()}, arguments.json)


if __name__ == "__main__":
    main()
