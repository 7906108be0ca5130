"""TVKD in a loop of one's own: three models' hidden states go into one loss, and nobody's logits are made.

python examples/plain_loop.py --policy POLICY --teacher TEACHER --data PAIRS.jsonl
"""

import torch
from pairs import arguments, collate, load, read_pairs, save

from tvkd_fast import FusedLinearTVKDLoss


def main() -> None:
    given = arguments(__doc__)
    pairs = read_pairs(given.data, given.policy)
    policy, reference, teacher = load(given.policy), load(given.policy).eval(), load(given.teacher).eval()
    head, ref_head, teacher_head = (model.get_output_embeddings().weight for model in (policy, reference, teacher))
    tvkd = FusedLinearTVKDLoss(beta=0.1, alpha=1.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=given.lr)
    pairs_of_update = given.batch_size * given.accumulate
    for first in range(0, len(pairs), pairs_of_update):
        update = pairs[first : first + pairs_of_update]
        for start in range(0, len(update), given.batch_size):
            micro_batch = update[start : start + given.batch_size]
            batch = collate(micro_batch)
            ids, labels = batch["input_ids"], batch["labels"]
            with torch.no_grad():
                ref_states, teacher_states = (m.base_model(ids, use_cache=False)[0] for m in (reference, teacher))
            states = policy.base_model(ids, use_cache=False)[0]
            # State t predicts token t+1; a response has one state more than it has tokens.
            out = tvkd(
                states[:, :-1],
                head,
                labels[:, 1:],
                teacher_hidden=teacher_states,
                teacher_weight=teacher_head,
                ref_hidden=ref_states[:, :-1],
                ref_weight=ref_head,
            )
            # A mean over the micro-batch's pairs becomes its share of the mean over the update's.
            (out.loss * len(micro_batch) / len(update)).backward()
            print(f"loss {out.loss.item():.6f}", flush=True)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save(policy, given)


if __name__ == "__main__":
    main()
