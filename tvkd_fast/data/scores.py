"""The score cache: what teacher and reference say of a dataset, made once, as a folder of numbers and a manifest.

Letters: P pairs, M response states; responses are stored pair by pair, chosen then rejected.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tvkd_fast.data.folders import sha256_of, whole_folder
from tvkd_fast.data.tokenization import TokenizedPair

FORMAT = 1
MANIFEST, TENSORS = "manifest.json", "scores.safetensors"


@dataclass(frozen=True)
class ScoreManifest:
    """What the numbers were made of. Fingerprints are sha256 in hex; None where there was no such model."""

    dataset: str
    """Of the token ids, `PairDataset.fingerprint`: truncation and tokenizer are in it."""
    tokenizer: str
    teacher: str | None
    """Of the teacher's weights."""
    reference: str | None
    """Of the reference's weights."""
    precision: str
    """Dtype of the weights and of the products: scores in one are not those in another."""
    kappa: float
    pairs: int
    states: int
    versions: dict[str, str]
    """Of this library, torch and transformers, for the record."""
    format: int = FORMAT


@dataclass(frozen=True)
class Scores:
    """Numbers of a whole dataset, or of a batch of it (then chosen rows first, then rejected)."""

    ref_logps: Tensor | None
    """[P, 2] float32 in a dataset, (2P,) in a batch: summed reference log-probabilities."""
    lse: Tensor | None
    """(M,) float32: LSE(z) of every response state under the teacher."""
    lse_kappa: Tensor | None
    """(M,) float32: LSE(κz); the same tensor as `lse` where κ=1."""


class ScoreLayout:
    """Where the numbers of a pair stand in a dataset's flat arrays."""

    def __init__(self, dataset: Sequence[TokenizedPair]) -> None:
        lengths = torch.tensor([[len(p.chosen_ids), len(p.rejected_ids)] for p in dataset]).flatten()
        self.num_pairs = len(dataset)
        self.bounds = torch.cat([torch.zeros(1, dtype=torch.int64), (lengths + 1).cumsum(0)])

    @property
    def num_states(self) -> int:
        return int(self.bounds[-1])

    def responses(self, pairs: Tensor) -> Tensor:
        """(P,) pairs to the (2P,) places of their responses, in a batch's order: chosen first, then rejected."""
        return torch.cat([2 * pairs, 2 * pairs + 1])

    def states(self, pairs: Tensor) -> Tensor:
        """(P,) pairs to the (M,) places of their responses' states, in a batch's order."""
        responses = self.responses(pairs)
        ends = zip(self.bounds[responses].tolist(), self.bounds[responses + 1].tolist(), strict=True)
        return torch.cat([torch.arange(start, end) for start, end in ends])


class ScoreCache:
    """Scores of a dataset that can be asked for by pair."""

    def __init__(self, manifest: ScoreManifest, scores: Scores, layout: ScoreLayout) -> None:
        self.manifest, self.scores, self.layout = manifest, scores, layout

    def of(self, pairs: Tensor) -> Scores:
        """The scores of `pairs` (P,), laid out as a `PairBatch` lays out its responses."""
        scores, pairs = self.scores, pairs.cpu()
        states = self.layout.states(pairs)
        return Scores(
            ref_logps=None if scores.ref_logps is None else scores.ref_logps.flatten()[self.layout.responses(pairs)],
            lse=None if scores.lse is None else scores.lse[states],
            lse_kappa=None if scores.lse_kappa is None else scores.lse_kappa[states],
        )

    def save(self, folder: str | Path) -> None:
        """Write the folder whole or not at all. ValueError where it holds anything but scores, or the disk is full."""
        folder = Path(folder)
        if folder.exists() and {p.name for p in folder.iterdir()} - {MANIFEST, TENSORS}:
            raise ValueError(f"{folder} holds other things than scores: give --output_dir a folder of its own")
        tensors = {"ref_logps": self.scores.ref_logps, "lse": self.scores.lse}
        if self.manifest.kappa != 1.0:
            tensors["lse_kappa"] = self.scores.lse_kappa
        with whole_folder(folder, "scores") as partial:
            save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, partial / TENSORS)
            body = asdict(self.manifest) | {"sha256": sha256_of(partial / TENSORS)}
            (partial / MANIFEST).write_text(json.dumps(body, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, dataset: Sequence[TokenizedPair]) -> ScoreCache:
        """Read a folder that `save` wrote, for the dataset it was made of. Raises ValueError where it is not whole."""
        folder = Path(folder)
        body = read_manifest(folder)
        recorded = body.pop("sha256", None)
        try:
            manifest = ScoreManifest(**body)
            if sha256_of(folder / TENSORS) != recorded:
                raise ValueError(
                    f"{folder / TENSORS} does not match its checksum: it is damaged; run `tvkd score` again"
                )
            tensors = load_file(folder / TENSORS)
        except (TypeError, OSError, SafetensorError) as error:
            raise ValueError(f"{folder} is not a whole score cache ({error}); run `tvkd score` again") from error
        layout = ScoreLayout(dataset)
        if (manifest.pairs, manifest.states) != (layout.num_pairs, layout.num_states):
            raise ValueError(
                f"{folder} holds {manifest.pairs} pairs and {manifest.states} states, the data {layout.num_pairs} and "
                f"{layout.num_states}: it was made of other data; run `tvkd score` again"
            )
        lse = tensors.get("lse")
        return cls(manifest, Scores(tensors.get("ref_logps"), lse, tensors.get("lse_kappa", lse)), layout)

    def check(self, **expected: str | float | None) -> None:
        """Refuse a cache of something else: every given manifest field must be equal; None is not compared."""
        known = {f.name for f in fields(ScoreManifest)}
        for name, value in expected.items():
            assert name in known
            found = getattr(self.manifest, name)
            if value is not None and found != value:
                raise ValueError(
                    f"the score cache was made with another {name} ({_short(found)}, wanted {_short(value)}): run "
                    "`tvkd score` again with this run's settings, or give --scores the folder that belongs to it"
                )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest as it stands in the folder; ValueError where there is none or it is of a later format."""
    path = Path(folder) / MANIFEST
    try:
        body = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no score cache at {folder}: make one with `tvkd score --output_dir {folder} …`") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); run `tvkd score` again") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}: it was written by another version; run `tvkd score` again")
    return body


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)
