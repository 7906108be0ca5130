"""TVKD in an accelerate loop: a fused head in the policy, and two of the teacher's numbers per response.

accelerate launch examples/accelerate_loop.py --policy POLICY --teacher TEACHER --data PAIRS.jsonl
"""

from typing import Any

import torch
from accelerate import Accelerator
from pairs import arguments, collate, load, read_pairs, save, score
from torch.utils.data import DataLoader

from tvkd_fast import tvkd_loss
from tvkd_fast.integrations import patch_lm_head, unpatch_lm_head


def main() -> None:
    given = arguments(__doc__)
    accelerator = Accelerator(gradient_accumulation_steps=given.accumulate)
    pairs = read_pairs(given.data, given.policy)
    score(pairs, given.policy, given.teacher)
    policy = patch_lm_head(load(given.policy))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=given.lr)
    # A list is all the dataset that a loader needs, though torch's types ask for a class.
    loader: DataLoader[Any] = DataLoader(pairs, batch_size=given.batch_size, collate_fn=collate)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(policy, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            ref_logps, psi = batch.pop("ref_logps"), batch.pop("psi")
            logps = model(**batch, fused_lm_head=True).log_probs.sum(1)
            out = tvkd_loss(logps, ref_logps, psi, beta=0.1, alpha=1.0)
            accelerator.backward(out.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"loss {accelerator.reduce(out.loss.detach(), 'mean').item():.6f}", flush=True)
    if accelerator.is_main_process:
        save(unpatch_lm_head(accelerator.unwrap_model(model)), given)


if __name__ == "__main__":
    main()
