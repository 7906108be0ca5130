"""Reward models: sequence-classification models with one label, by which whole responses are scored.

Letters: S sequences, L their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tvkd_fast.data import PairDataset
from tvkd_fast.models.load import locate, unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_reward_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A frozen sequence-classification model with one label, from a hub name or a folder.

    Raises ValueError where nothing of that name can be read, where it has more labels than one, and where a weight is
    missing from its files, as of a causal language model, whose rewards would be drawn at random.
    """
    from transformers import AutoModelForSequenceClassification

    source = locate(name)
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source.name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ImportError) as error:
        raise ValueError(unreadable("model", name, error)) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} is no reward model: its files lack {', '.join(missing[:3])}, which would be drawn at random; give "
            "--reward_model a sequence-classification model with one label"
        )
    if model.config.num_labels != 1:
        raise ValueError(
            f"{name} has {model.config.num_labels} labels, and a reward is one number: give --reward_model a model "
            "with one label"
        )
    scorer: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return scorer


@torch.no_grad()
def rewards_of(model: PreTrainedModel, sequences: Sequence[list[int]], *, tokens: int) -> Tensor:
    """(S,) float32 the model's one logit of each sequence, at most `tokens` of them at once where one alone is not
    longer.

    Sequences of one length go together. Those of other lengths join them behind the model's padding token, if it has
    one that no sequence holds: elsewhere a model that finds a sequence's end by its padding would find another.
    """
    found = torch.empty(len(sequences))
    pad = model.config.get_text_config().pad_token_id
    for places in _batches(sequences, pad, tokens):
        rows = [sequences[place] for place in places]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        ids = torch.tensor([row + [pad or 0] * (longest - len(row)) for row in rows])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        found[places] = logits[:, 0].float().cpu()
    return found


def _batches(sequences: Sequence[list[int]], pad: int | None, tokens: int) -> Iterator[list[int]]:
    """Places of the sequences, the shortest first."""
    padded = pad is not None and not any(pad in row for row in sequences)
    batch: list[int] = []
    for place in sorted(range(len(sequences)), key=lambda place: (len(sequences[place]), place)):
        length = len(sequences[place])
        # A model without a padding token refuses more than one row.
        fits = pad is not None and (len(batch) + 1) * length <= tokens
        if batch and not (fits and (padded or len(sequences[batch[0]]) == length)):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@dataclass(frozen=True)
class RewardModel:
    """A reward model with a dataset in its own tokens; a `reward_folder.RewardReader`."""

    model: PreTrainedModel
    dataset: PairDataset
    tokens_at_once: int
    autocast: torch.dtype | None = None

    def rewards(self, pairs: Sequence[int]) -> Tensor:
        """[P, 2] float32 of the chosen and of the rejected responses of these pairs."""
        read = [self.dataset[i] for i in pairs]
        sequences = [p.prompt_ids + ids for p in read for ids in (p.chosen_ids, p.rejected_ids)]
        kind = self.model.device.type
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            return rewards_of(self.model, sequences, tokens=self.tokens_at_once).view(-1, 2)
