"""TVKD in Lightning: a module whose training step is a model's call and a loss.

python examples/lightning_module.py --policy POLICY --teacher TEACHER --data PAIRS.jsonl
"""

import os
from typing import Any

import lightning
import torch
from pairs import arguments, collate, load, read_pairs, save, score
from torch import Tensor
from torch.utils.data import DataLoader

from tvkd_fast import tvkd_loss
from tvkd_fast.integrations import patch_lm_head, unpatch_lm_head


class Distilled(lightning.LightningModule):
    def __init__(self, policy: str, lr: float) -> None:
        super().__init__()
        self.policy, self.lr = patch_lm_head(load(policy)), lr

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        ref_logps, psi = batch.pop("ref_logps"), batch.pop("psi")
        logps = self.policy(**batch, fused_lm_head=True).log_probs.sum(1)
        out = tvkd_loss(logps, ref_logps, psi, beta=0.1, alpha=1.0)
        self.log("margin", out.margins.mean(), prog_bar=True)
        print(f"loss {out.loss.item():.6f}", flush=True)
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=self.lr)


def main() -> None:
    given = arguments(__doc__)
    pairs = read_pairs(given.data, given.policy)
    score(pairs, given.policy, given.teacher)
    module = Distilled(given.policy, given.lr)
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=given.accumulate,
        gradient_clip_val=1.0,
        default_root_dir=given.out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="auto",
        # As many processes as torchrun started; Lightning finds them out by itself where it starts them.
        devices=os.environ.get("WORLD_SIZE", "auto"),
    )
    # A list is all the dataset that a loader needs, though torch's types ask for a class.
    loader: DataLoader[Any] = DataLoader(pairs, batch_size=given.batch_size, collate_fn=collate)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        save(unpatch_lm_head(module.policy), given)


if __name__ == "__main__":
    main()
