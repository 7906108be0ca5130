"""Hidden states to measure a head on: a real model's over preference data, or made ones with a stated sparsity.

    python -m bench.harness.states FILE --model smollm2-135m --tokens 4096 [--data PAIRS.jsonl.gz] [--layers L]
    python -m bench.harness.states FILE --shape 4096x2048x128256 --entries 300 [--data PAIRS.jsonl.gz]

Run in a process of its own and kept as safetensors, so that what measures starts from nothing but a file.

Letters: N tokens, S responses, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tvkd_fast.data import PairDataset, build_dataset
from tvkd_fast.data.batch import micro_batches
from tvkd_fast.models import PolicyWithHead, load_model, load_tokenizer, prune_layers

ROWS = 256
EPS = 2.0**-14
TENSORS = ("hidden", "weight", "labels", "coefficients", "lengths")


@dataclass(frozen=True)
class States:
    """hidden [N, D], weight [V, D], labels (N,), coefficients (N,) to go backward with, and where they come from.

    `lengths` (S,) of the responses that the tokens are of: the chosen ones, then in the same order the rejected.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    coefficients: Tensor
    lengths: Tensor
    source: str

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.hidden.shape[0], self.hidden.shape[1], self.weight.shape[0]


def real_states(model: str, tokens: int, data: str, layers: int | None) -> States:
    """The states that predict response tokens, of as many pairs as have so many; the last one's responses are cut."""
    dataset = _pairs(model, data)
    loaded = load_model(model)
    policy = PolicyWithHead(loaded if layers is None else prune_layers(loaded, layers)).requires_grad_(False).eval()
    pairs: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
    found = 0
    for batch in micro_batches(dataset, range(len(dataset)), size=8):
        lengths = batch.lengths.tolist()
        hidden = policy.hidden(batch, batch.predicting).split(lengths)
        responses = list(zip(hidden, batch.labels.split(lengths), strict=True))
        pairs += zip(responses[: len(responses) // 2], responses[len(responses) // 2 :], strict=True)
        found += batch.labels.numel()
        if found >= tokens:
            break
    else:
        raise SystemExit(f"{data} has {found} response tokens, {tokens} are wanted: give --data a larger file")
    chosen: list[tuple[Tensor, Tensor]] = []
    rejected: list[tuple[Tensor, Tensor]] = []
    left = tokens
    for one, other in pairs:
        for into, (h, y) in ((chosen, one), (rejected, other)):
            into.append((h[:left], y[:left]))
            left -= len(into[-1][1])
        if not left:
            break
    name = Path(model).name + (f", {layers} layers" if layers else "")
    return States(
        torch.cat([h for h, _ in chosen + rejected]),
        policy.head.weight,
        torch.cat([y for _, y in chosen + rejected]),
        _coefficients(tokens),
        torch.tensor([len(y) for _, y in chosen + rejected]),
        f"states of {name} over {_named(data)}",
    )


def made_states(shape: tuple[int, int, int], entries: float, pairs: list[tuple[int, int]] | None = None) -> States:
    """Logits σ·g − log(j + 10) of normal g: Zipf's law in the rank j and a spread that leaves `entries` above 2⁻¹⁴.

    Labels are drawn from the softmax itself. The responses are as long as those of `pairs`, chosen and rejected, over
    and over, and the last one's are cut; of 64 tokens where none are given.
    """
    n, d, v = shape
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d), torch.randn(v, d)
    # One dimension carries the frequencies: constant in the states, −log of the rank in the weight.
    weight[:, 0] = -torch.log(torch.arange(v) + 10.0)
    low, high = 0.1, 8.0
    for _ in range(12):
        spread = (low * high) ** 0.5
        sample = _spread(hidden[:: max(1, n // 64)][:64], spread)
        kept = (sample @ weight.T).softmax(1) >= EPS
        # A flat softmax has few entries above ε and a peaked one too: the search is on the peaked side.
        low, high = (low, spread) if float(kept.sum(1).float().mean()) < entries else (spread, high)
    hidden = _spread(hidden, spread)
    labels = torch.cat([torch.multinomial((h @ weight.T).softmax(1), 1)[:, 0] for h in hidden.split(ROWS)])
    source = f"made states, {entries:g} entries per token above 2^-14"
    return States(hidden, weight, labels, _coefficients(n), _lengths(n, pairs or [(64, 64)]), source)


def _lengths(tokens: int, pairs: list[tuple[int, int]]) -> Tensor:
    """(S,) chosen, then rejected responses of the pairs, over and over until they have so many tokens."""
    found: list[list[int]] = [[], []]
    for pair in itertools.cycle(pairs):
        for into, length in zip(found, pair, strict=True):
            into.append(min(length, tokens))
            tokens -= into[-1]
        if not tokens:
            return torch.tensor(found).flatten()
    raise AssertionError("no pairs")


def _named(data: str) -> str:
    return Path(data).name if "/" in data else data


def _pairs(model: str, data: str) -> PairDataset:
    return build_dataset(data, load_tokenizer(model), max_length=512, bad_pairs="drop", overlong="drop")


def _spread(hidden: Tensor, spread: float) -> Tensor:
    scaled = hidden * (spread / math.sqrt(hidden.shape[1] - 1))
    scaled[:, 0] = 1.0
    return scaled


def _coefficients(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1))


def save_states(states: States, file: Path) -> None:
    tensors = {name: getattr(states, name).contiguous() for name in TENSORS}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"source": states.source})


def load_states(file: Path) -> States:
    """Read by one thread: the caller may go on to fork."""
    with safe_open(file, "pt") as opened:
        source = opened.metadata()["source"]
        tensors = {name: opened.get_tensor(name) for name in TENSORS}
    return States(**tensors, source=source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--shape", help="make states of this shape, tokens x hidden x vocabulary")
    parser.add_argument("--entries", type=float, default=300.0)
    arguments = parser.parse_args()
    with torch.no_grad():
        if arguments.shape:
            n, d, v = (int(x) for x in arguments.shape.split("x"))
            pairs = [(len(p.chosen_ids), len(p.rejected_ids)) for p in _pairs(arguments.model, arguments.data)]
            states = made_states((n, d, v), arguments.entries, pairs)
            states = replace(
                states, source=f"{states.source}, in responses as long as those of {_named(arguments.data)}"
            )
        else:
            states = real_states(arguments.model, arguments.tokens, arguments.data, arguments.layers)
    save_states(states, arguments.file)
    print(f"{'x'.join(map(str, states.shape))}: {states.source}")


if __name__ == "__main__":
    main()
