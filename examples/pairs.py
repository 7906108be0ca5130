"""The code that the examples share: preference pairs as padded rows, scored once by reference and teacher.

Letters: P pairs of a batch (2P rows, chosen first), L row length.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tvkd_fast import linear_soft_values, shaping_returns
from tvkd_fast.data import tokenize_pair
from tvkd_fast.data.reading.formats import to_preference
from tvkd_fast.integrations import patch_lm_head

IGNORED = -100


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="model to train")
    parser.add_argument("--teacher", required=True, help="DPO-trained model in the policy's tokens")
    parser.add_argument("--data", required=True, help='lines {"prompt": …, "chosen": …, "rejected": …}')
    parser.add_argument("--out", default="out/example", help="folder")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs of a micro-batch, in each process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of an update")
    parser.add_argument("--lr", type=float, default=1e-5)
    return parser.parse_args()


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def save(model: PreTrainedModel, given: argparse.Namespace) -> None:
    """Save the model with its tokenizer, so that the folder is all that its user needs."""
    model.save_pretrained(given.out)
    AutoTokenizer.from_pretrained(given.policy).save_pretrained(given.out)


def read_pairs(file: str, policy: str) -> list[dict[str, Any]]:
    """Return each pair's responses: input_ids, and labels that are IGNORED in the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    found = []
    for number, line in enumerate(Path(file).read_text().splitlines()):
        # Prompt and response are tokenized together, as the model reads them, and each response has its end.
        pair = tokenize_pair(to_preference(json.loads(line), f"row {number}"), tokenizer)
        prompt, responses = pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)
        found.append(
            {
                "input_ids": [torch.tensor(prompt + response) for response in responses],
                "labels": [torch.tensor([IGNORED] * len(prompt) + response) for response in responses],
            }
        )
    return found


def collate(pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """input_ids and labels [2P, L], padded where a causal model does not see it; ref_logps, psi (2P,) once scored."""
    batch = {}
    for name, padding in (("input_ids", 0), ("labels", IGNORED)):
        rows = [pair[name][side] for side in (0, 1) for pair in pairs]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    if "psi" in pairs[0]:
        for name in ("ref_logps", "psi"):
            batch[name] = torch.stack([pair[name][side] for side in (0, 1) for pair in pairs])
    return batch


@torch.no_grad()
def score(pairs: list[dict[str, Any]], policy: str, teacher: str) -> None:
    """Add, two of each per pair, log π_ref(y) and Ψ(y): all that training needs of reference and teacher."""
    reference, taught = patch_lm_head(load(policy)), load(teacher)
    for pair in pairs:
        rows = collate([pair])
        pair["ref_logps"] = reference(**rows, fused_lm_head=True).log_probs.sum(1)
        states = taught.base_model(rows["input_ids"], use_cache=False).last_hidden_state
        response = rows["labels"] != IGNORED
        kept = response | response.roll(-1, 1)
        values = linear_soft_values(states[kept], taught.get_output_embeddings().weight, value_scale=0.1)
        pair["psi"] = shaping_returns(values, torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)))
