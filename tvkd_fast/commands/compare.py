"""`tvkd eval` of several models: the table of who is right, and pages of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvkd_fast.commands.eval import EvalConfig
from tvkd_fast.commands.models import load_frozen, load_policy, sharing_of, world_of
from tvkd_fast.commands.refusals import check_readable
from tvkd_fast.data import PairDataset
from tvkd_fast.data.data_config import load_dataset
from tvkd_fast.distributed import World
from tvkd_fast.evaluation.generate import answers
from tvkd_fast.evaluation.html import html_page, markdown_page
from tvkd_fast.evaluation.judged import Judged, by_row, compared, judge_pairs
from tvkd_fast.evaluation.rewardbench import HUB, SPLIT, to_rewardbench
from tvkd_fast.files import ready_file, ready_folder, written
from tvkd_fast.models import load_stop_ids, load_tokenizer
from tvkd_fast.training.train_config import micro_batching

if TYPE_CHECKING:
    from tvkd_fast.data.reading.formats import Preference

AT_ONCE = 8
"""Prompts that are answered together."""


def compare_models(config: EvalConfig, *, show_progress: bool = True) -> dict[str, Any]:
    """The policy and `config.compare` on the held-out pairs, each in tokens of its own; see `judged.compared`."""
    with world_of(config) as world:
        verbose = show_progress and world.first
        datasets = [_dataset(name, config, verbose=verbose and i == 0) for i, name in enumerate(_models(config))]
        _check_same_rows(datasets, _models(config))
        rows = [pair.row for pair in datasets[0]]
        judged = [
            by_row(_judge(name, data, config, world), rows)
            for name, data in zip(_models(config), datasets, strict=True)
        ]
        subsets = [text.subset or "pairs" for text in _one_a_row(datasets[0])]
        found = compared(judged, subsets, sections=config.format == "rewardbench")
    scored = "reference" if config.reference is not None else f"reference-free, {config.reference_free} of log π"
    return {"format": config.format, "reference": config.reference, "scores": scored} | found


def write_answers(config: EvalConfig) -> tuple[Path, Path]:
    """answers.md and answers.html in `config.generate`: what policy, reference and `config.compare` answer greedily.

    `check_can_answer` has been asked before anything was evaluated.
    """
    assert config.generate is not None
    dataset = _dataset(config.policy, config)
    every = _one_a_row(dataset)
    count = min(config.generate_prompts, len(every))
    texts = [every[i * len(every) // count] for i in range(count)]
    prompts = [text.prompt for text in texts]
    replies: dict[str, list[str]] = {}
    for name in _asked(config):
        tokenizer = load_tokenizer(name, trust_remote_code=config.model.trust_remote_code)
        policy = load_policy(name, replace(config.model, packing="padded"), frozen=True)
        replies[name] = []
        for start in range(0, count, AT_ONCE):
            here = slice(start, start + AT_ONCE)
            with policy.precision(required=True):
                replies[name] += answers(
                    policy.model, tokenizer, prompts[here], max_new_tokens=config.max_new_tokens, of=texts[here]
                )
    folder = Path(config.generate)
    pages = folder / "answers.md", folder / "answers.html"
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        pages[0].write_text(markdown_page(prompts, replies), encoding="utf-8")
        pages[1].write_text(html_page(prompts, replies), encoding="utf-8")
    return pages


def open_outputs(config: EvalConfig) -> None:
    """Open the outputs of the evaluation before it begins. Raises ValueError where one cannot be written."""
    if config.output is not None:
        ready_file(config.output)
    if config.generate is not None:
        ready_folder(config.generate)


def check_can_answer(config: EvalConfig) -> None:
    """Raise ValueError where `config.generate` is set and a model has no chat template to be asked by."""
    for name in _asked(config) if config.generate is not None else ():
        if not load_tokenizer(name, trust_remote_code=config.model.trust_remote_code).chat_template:
            raise ValueError(f"{name} has no chat template, so it cannot be asked: leave out --generate")


def _asked(config: EvalConfig) -> list[str]:
    return list(dict.fromkeys(([config.reference] if config.reference else []) + _models(config)))


def _models(config: EvalConfig) -> list[str]:
    return [config.policy, *config.compare]


def _dataset(name: str, config: EvalConfig, *, verbose: bool = False) -> PairDataset:
    tokenizer = load_tokenizer(name, trust_remote_code=config.model.trust_remote_code)
    data, batching = config.data, micro_batching(config)
    stops = load_stop_ids(name, trust_remote_code=config.model.trust_remote_code)
    if config.format == "pairs":
        return load_dataset("eval", data, tokenizer, batching, stop_ids=stops, verbose=verbose)
    if data.eval == HUB and data.eval_split == "test":
        # The set has no split of that name, which is the default of others.
        data = replace(data, eval_split=SPLIT)
    return load_dataset("eval", data, tokenizer, batching, stop_ids=stops, verbose=verbose, read=to_rewardbench)


def _one_a_row(dataset: PairDataset) -> list[Preference]:
    """The text of each row's first pair."""
    return list({text.row: text for text in reversed(dataset.texts)}.values())[::-1]


def _check_same_rows(datasets: Sequence[PairDataset], names: Sequence[str]) -> None:
    first = [pair.row for pair in datasets[0]]
    for name, dataset in zip(names, datasets, strict=True):
        if [pair.row for pair in dataset] != first:
            raise ValueError(
                f"{name} was left with other rows than {names[0]}, since pairs too long were dropped: raise "
                "--data.max_length and --tokens_per_micro_batch until none is"
            )


def _judge(name: str, dataset: PairDataset, config: EvalConfig, world: World) -> Judged:
    sharing = sharing_of(config, world)
    policy = load_policy(name, config.model, sharing=sharing, frozen=True)
    check_readable(dataset, policy, "model")
    reference = None
    if config.reference is not None:
        tokenizer = load_tokenizer(name, trust_remote_code=config.model.trust_remote_code)
        reference = load_frozen(config, tokenizer, kappa=1.0, sharing=sharing).scorer(dataset, config)
    return judge_pairs(
        name,
        policy,
        dataset,
        reference=reference,
        reference_free=config.reference_free,
        batching=micro_batching(config),
        world=world,
    )
