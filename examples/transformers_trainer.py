"""TVKD in transformers.Trainer: `compute_loss` is all that is written anew.

python examples/transformers_trainer.py --policy POLICY --teacher TEACHER --data PAIRS.jsonl
"""

from typing import Any

import torch
from pairs import arguments, collate, load, read_pairs, save, score
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from tvkd_fast import tvkd_loss
from tvkd_fast.integrations import patch_lm_head


class PreferenceTrainer(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **given: Any) -> Any:
        ref_logps, psi = inputs.pop("ref_logps"), inputs.pop("psi")
        outputs = model(**inputs, fused_lm_head=True)
        out = tvkd_loss(outputs.log_probs.sum(1), ref_logps, psi, beta=0.1, alpha=1.0)
        return (out.loss, outputs) if return_outputs else out.loss

    def _get_train_sampler(self, *given: Any) -> torch.utils.data.Sampler[int]:
        return SequentialSampler(self.train_dataset)


def main() -> None:
    given = arguments(__doc__)
    pairs = read_pairs(given.data, given.policy)
    score(pairs, given.policy, given.teacher)
    trainer = PreferenceTrainer(
        model=patch_lm_head(load(given.policy)),
        args=TrainingArguments(
            given.out,
            per_device_train_batch_size=given.batch_size,
            gradient_accumulation_steps=given.accumulate,
            learning_rate=given.lr,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            num_train_epochs=1,
            remove_unused_columns=False,
            logging_steps=1,
            report_to=[],
        ),
        data_collator=collate,
        train_dataset=pairs,
    )
    # The loss is a mean over the micro-batch's pairs; the Trainer takes a model with `labels` to have divided already.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    if not trainer.is_world_process_zero():
        return
    save(trainer.model, given)
    for line in trainer.state.log_history:
        if "loss" in line:
            print(f"loss {line['loss']:.6f}", flush=True)


if __name__ == "__main__":
    main()
