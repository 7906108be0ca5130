"""TVKD in TRL: two names of a DPO script change, and a teacher is given.

python examples/trl_trainer.py --policy POLICY --teacher TEACHER --data PAIRS.jsonl
"""

from datasets import load_dataset
from pairs import arguments

from tvkd_fast.integrations.trl import TVKDConfig, TVKDTrainer


def main() -> None:
    given = arguments(__doc__)
    trainer = TVKDTrainer(
        model=given.policy,
        teacher_model=given.teacher,
        args=TVKDConfig(
            given.out,
            per_device_train_batch_size=given.batch_size,
            gradient_accumulation_steps=given.accumulate,
            learning_rate=given.lr,
            lr_scheduler_type="constant",
            num_train_epochs=1,
            bf16=False,
            logging_steps=1,
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=given.data, split="train"),
    )
    trainer.train()
    trainer.save_model(given.out)


if __name__ == "__main__":
    main()
