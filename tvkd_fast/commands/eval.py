"""`tvkd eval`: a policy on held-out pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tvkd_fast.commands.models import (
    load_frozen,
    load_policy,
    of_teacher,
    sharing_of,
    world_of,
)
from tvkd_fast.commands.refusals import check_processes, check_readable
from tvkd_fast.data.data_config import DataConfig, load_dataset
from tvkd_fast.distributed import World, is_main_process
from tvkd_fast.distributed.parallel_config import ParallelConfig
from tvkd_fast.evaluation import judged
from tvkd_fast.evaluation.evaluate import Evaluation
from tvkd_fast.evaluation.held_out import evaluate_held_out
from tvkd_fast.files import at_home, written
from tvkd_fast.models import (
    load_stop_ids,
    load_tokenizer,
)
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.objectives import DEFAULT, SCORED, Need, Objective, settings_of
from tvkd_fast.objectives.checks.fitting import check_labels, check_rewards, check_teacher_reference
from tvkd_fast.ranges import at_least, check_numbers, number
from tvkd_fast.training.train_config import micro_batching

if TYPE_CHECKING:
    pass


@dataclass(kw_only=True)
class EvalConfig:
    """The settings of one evaluation: `tvkd eval`."""

    policy: str
    """Model to evaluate."""
    reference: str | None = None
    """Reference for the rewards; without it log-probabilities themselves are compared."""
    teacher: str | None = None
    """Teacher for the shaping margins and their diagnostics; needs a reference."""
    teacher_reference: str | None = None
    """The teacher's own reference, for loss.value_from implicit_reward."""
    output: str | None = None
    """File to append the JSON line to, beside printing it."""
    format: Literal["pairs", "rewardbench"] = "pairs"
    """`rewardbench`: columns prompt, chosen, rejected and subset; a table of its subsets and sections. Of lists of
    answers, as RewardBench 2 has them, each chosen one must beat each rejected one."""
    compare: list[str] = field(default_factory=list)
    """More models, over the same reference: a table of all, and a paired test of each beside the policy."""
    reference_free: Literal["mean", "sum", "norm"] = "mean"
    """What a response scores in such a table without a reference: its tokens' mean log-probability, their sum, or the
    negative of their norm."""
    generate: str | None = None
    """Folder for answers.md and answers.html: greedy answers to held-out prompts, the models side by side."""
    generate_prompts: int = number(20, at_least(1))
    """How many prompts are answered, evenly spaced over the held-out ones."""
    max_new_tokens: int = number(128, at_least(1))
    """Most tokens of an answer."""
    tokens_per_micro_batch: int = number(2048, at_least(1))
    """Most tokens that go through a model at once, of whole pairs."""
    pairs_per_micro_batch: int = number(8, at_least(1))
    """The same in pairs, where model.packing is `padded`."""
    data: DataConfig = field(default_factory=DataConfig)
    objective: str = DEFAULT
    """Whose rewards and loss are shown; each objective has its own --loss settings (docs/objectives.md)."""
    loss: Objective = field(default_factory=Objective)
    """The objective's settings; its defaults where not given."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    nproc: int = number(1, at_least(1))
    """Processes to start on this machine; pairs and weights are shared among them."""

    def __post_init__(self) -> None:
        at_home(self)
        self.loss = settings_of(self.objective, self.loss)
        check_numbers(self)
        check_teacher_reference(self.teacher, self.teacher_reference, self.loss)
        check_rewards(self.data.rewards, self.loss)
        check_labels(self.data.unpair, self.loss)
        if self.tabled and self.teacher is not None:
            raise ValueError("a table of models tells who is right, and has no shaping: leave out --teacher")

    @property
    def tabled(self) -> bool:
        """Whether the result is a table of models, rather than one policy's figures."""
        return self.format == "rewardbench" or bool(self.compare)


def evaluate_policy(config: EvalConfig, *, show_progress: bool = True) -> Evaluation:
    """`tvkd eval`: a policy, with or without a reference, on data.eval."""
    if config.teacher is not None and config.reference is None and Need.REFERENCE in config.loss.needs:
        raise ValueError("shaping margins stand beside rewards: give --reference with --teacher")
    with world_of(config) as world:
        return _evaluated(config, world, verbose=show_progress and world.first)


def _evaluated(config: EvalConfig, world: World, *, verbose: bool) -> Evaluation:
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    stops = load_stop_ids(config.policy, trust_remote_code=config.model.trust_remote_code)
    needs = config.loss.needs
    dataset = load_dataset(
        "eval",
        config.data,
        tokenizer,
        micro_batching(config),
        stop_ids=stops,
        verbose=verbose,
        read=config.data.reader(rewards=Need.REWARDS in needs, labels=None if Need.LABELS in needs else False),
    )
    sharing = sharing_of(config, world, config.loss)
    policy = load_policy(config.policy, config.model, sharing=sharing, frozen=True)
    check_readable(dataset, policy, "policy")
    models = load_frozen(
        config,
        tokenizer,
        kappa=config.loss.teacher_kappa,
        of_teacher=of_teacher(needs),
        needs=needs,
        sharing=sharing,
    )
    return evaluate_held_out(
        policy,
        dataset,
        scorer=models.scorer(dataset, config, verbose=verbose),
        objective=config.loss.without(needs & SCORED - models.known()),
        batching=micro_batching(config),
        world=world,
    )


def check(config: EvalConfig) -> None:
    """The checks that need no process group, before several processes are started."""
    from tvkd_fast.commands import compare

    compare.open_outputs(config)
    check_processes(config)


def run(config: EvalConfig) -> None:
    """Evaluate one policy or several, and print and write what was found."""
    # It imports EvalConfig.
    from tvkd_fast.commands import compare

    if is_main_process():
        compare.open_outputs(config)
    compare.check_can_answer(config)
    if config.tabled:
        found = compare.compare_models(config)
        if is_main_process():
            print(judged.table(found) + "\n")
    else:
        found = evaluate_policy(config).known()
    if not is_main_process():
        return
    line = json.dumps({"policy": config.policy, **found})
    print(line)
    if config.output is not None:
        with written(Path(config.output)), Path(config.output).open("a") as file:
            file.write(line + "\n")
    if config.generate is not None:
        print("\n".join(map(str, compare.write_answers(config))))
