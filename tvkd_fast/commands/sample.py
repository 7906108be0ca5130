"""`tvkd sample`: responses of a model, or pairs of them, as data for `tvkd train` and `tvkd score`."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tvkd_fast.commands.models import load_policy, precision, resolve_device
from tvkd_fast.commands.refusals import check_device
from tvkd_fast.data import Preference, fingerprint_tokenizer
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.data.reading.sample_folder import SampleManifest
from tvkd_fast.data.tokenization import PairTokenizer
from tvkd_fast.distributed import World, init_distributed, is_main_process
from tvkd_fast.distributed.parallel_config import ParallelConfig
from tvkd_fast.files import at_home
from tvkd_fast.models import PolicyWithHead, fingerprint_model, load_tokenizer, stop_ids_of
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.ranges import at_least, number
from tvkd_fast.rollout import ModelSampler, Sample, SampleCounts, SamplePrompt, Sampling
from tvkd_fast.rollout.model_sampler import TOKENS_AT_ONCE
from tvkd_fast.rollout.prompts import Prompts, load_prompts
from tvkd_fast.rollout.sample_rows import RowMaker, best_and_worst
from tvkd_fast.rollout.sample_shards import SampleWriter, check_sample_folder
from tvkd_fast.synthetic.bundled import judge
from tvkd_fast.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Counts = dict[str, dict[str, int]]
POLICY, REJECTED, ROWS = "policy", "rejected", "rows"
"""The parts of a shard's counts: what each model sampled, and what became of it."""


@dataclass(kw_only=True)
class SampleConfig(Sampling):
    """The settings of one sampling pass: `tvkd sample`."""

    policy: str
    """Model that responds; its responses are the chosen ones of pairs."""
    output_dir: str
    """Folder to write the rows to; `--data.train` of `tvkd train` and `tvkd score` reads it."""
    rejected_policy: str | None = None
    """Second model, whose responses are the rejected ones: pairs, as daDPO makes them of teacher and student."""
    rank: Literal["none", "judge"] = "none"
    """`judge`: pairs of the best and the worst of n responses to a bundled prompt, by the rule that judges them."""
    unfinished: Literal["keep", "drop"] = "keep"
    """A response that never stopped: keep it as one that was cut, or leave it out and count it."""
    step: int = number(0, at_least(0))
    """Samples are a function of seed, step, prompt and number: another step is another round."""
    seed: int = number(0, at_least(0))
    """Seed of the samples."""
    prompts_per_shard: int = number(64, at_least(1))
    """Prompts per file: a pass that was killed resumes after the last complete one."""
    tokens_at_once: int = number(TOKENS_AT_ONCE, at_least(1))
    """Most tokens of a batch, prompts and room for responses: the cache holds as many."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts: those of a preference set, or rows of a `prompt` alone."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    nproc: int = number(1, at_least(1))
    """Processes to start on this machine; prompts are shared among them, and each holds the whole model."""

    def __post_init__(self) -> None:
        at_home(self)
        super().__post_init__()
        if self.rank != "none" and self.rejected_policy is not None:
            raise ValueError(
                "pairs are of two models or of one model's ranked responses: set --rejected_policy or --rank"
            )
        if self.rank != "none" and self.n < 2:
            raise ValueError(f"the best and the worst of {self.n} response are the same: set --n 2 or more")
        if self.rank != "none" and not str(self.data.train).startswith("bundled:"):
            raise ValueError("--rank judge knows the answers to bundled prompts alone: set --data bundled:train")

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{f.name: getattr(self, f.name) for f in fields(Sampling)})


class Responder:
    """A model that responds, and its tokenizer."""

    def __init__(self, name: str, config: SampleConfig) -> None:
        trust = config.model.trust_remote_code
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name, trust_remote_code=trust)
        # A compiled block would be compiled anew as the cache grows.
        self.policy: PolicyWithHead = load_policy(
            name, replace(config.model, packing="padded", compile=False), frozen=True
        )
        model = self.policy.model
        self.to_tokens = PairTokenizer(
            self.tokenizer, chat_template=config.data.chat_template, stop_ids=stop_ids_of(model)
        )
        self.sampler = ModelSampler(
            model,
            self.to_tokens.ends.generation_stops,
            max_length=config.data.max_length,
            tokens_at_once=config.tokens_at_once,
        )

    def responses(self, prompts: Sequence[SamplePrompt], config: SampleConfig, bar: _Bar) -> list[list[Sample]]:
        with self.policy.precision():
            return self.sampler.sample(
                prompts, config.sampling, seed=config.seed, step=config.step, finished=bar.finished
            )


@dataclass(frozen=True)
class Sampled:
    """What a pass has left on disk, and how fast it was."""

    manifest: SampleManifest
    tokens: int
    """Tokens of this pass, without those of one that was killed before."""
    seconds: float

    def counts(self, whose: str) -> SampleCounts:
        found = SampleCounts()
        for shard in self.manifest.shards:
            found.merge(SampleCounts(**shard.counts[whose]))
        return found

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.manifest.shards)

    @property
    def left_out(self) -> Counter[str]:
        return sum((Counter(shard.counts[ROWS]) for shard in self.manifest.shards), Counter())


def sample(config: SampleConfig, *, show_progress: bool = True) -> Sampled:
    """`tvkd sample`: sample responses to the prompts of `config.data`, and keep them as rows."""
    check(config)
    with init_distributed(resolve_device(config.model), timeout_s=config.parallel.timeout_s) as world:
        return _sample(config, world, verbose=show_progress and world.first)


def _sample(config: SampleConfig, world: World, *, verbose: bool) -> Sampled:
    policy = Responder(config.policy, config)
    rejected = None if config.rejected_policy is None else Responder(config.rejected_policy, config)
    responders = [policy] if rejected is None else [policy, rejected]
    prompts = load_prompts(config.data, config.n, [(x.to_tokens, x.sampler.max_length) for x in responders])
    manifest = SampleManifest(_made_of(config, responders, prompts), len(prompts.texts), _versions())
    writer = SampleWriter(config.output_dir, manifest) if world.first else None
    start = world.broadcast(0 if writer is None else writer.manifest.done)
    if verbose:
        print(prompts.report(str(config.data.train), start), file=sys.stderr)
    since, bar = time.perf_counter(), _Bar((len(prompts.texts) - start) * config.n * len(responders), verbose)
    for first in range(start, len(prompts.texts), config.prompts_per_shard):
        last = min(first + config.prompts_per_shard, len(prompts.texts))
        mine = range(first + world.rank, last, world.size)
        parts = world.all_gather((list(mine), *_rows(config, responders, prompts, mine, bar)))
        if writer is not None:
            by_place = {place: of_one for places, rows, _ in parts for place, of_one in zip(places, rows, strict=True)}
            rows = [row for place in range(first, last) for row in by_place[place]]
            writer.write(rows, last - first, _summed([counts for _, _, counts in parts]))
    bar.close()
    sampled = world.broadcast(
        None if writer is None else Sampled(writer.manifest, bar.counts.tokens, time.perf_counter() - since)
    )
    assert sampled is not None
    _check_rows(config, sampled)
    if writer is not None:
        writer.finish()
    world.barrier()
    return sampled


def _rows(
    config: SampleConfig, responders: Sequence[Responder], prompts: Prompts, places: range, bar: _Bar
) -> tuple[list[list[dict[str, Any]]], Counts]:
    """The rows of each prompt at these places, and counts of what was sampled and left out."""
    found = [
        responder.responses([prompts.of_model[m][i] for i in places], config, bar)
        for m, responder in enumerate(responders)
    ]
    counts = {name: SampleCounts() for name in (POLICY, REJECTED)[: len(responders)]}
    for name, of_model in zip(counts, found, strict=True):
        for of_prompt in of_model:
            counts[name].add(of_prompt)
    tokenizers = [responder.tokenizer for responder in responders]
    one_tokenizer = len({fingerprint_tokenizer(tokenizer) for tokenizer in tokenizers}) == 1
    maker = RowMaker(tokenizers[0], keep_unfinished=config.unfinished == "keep", keep_ids=one_tokenizer)
    rows = []
    for place, *samples in zip(places, *found, strict=True):
        text, ids = prompts.texts[place], prompts.of_model[0][place].ids
        if len(samples) == 2:
            both = list(zip(*samples, strict=True))
            rows.append(maker.pairs(text, ids, both, rejected_by=tokenizers[1]))
        elif config.rank == "judge":
            kept = [x for x in samples[0] if maker.text_of(x) is not None]
            ranked = best_and_worst(kept, [_reward(text, x, tokenizers[0]) for x in kept])
            maker.left_out["prompt without a better and a worse response"] += ranked is None
            rows.append(maker.pairs(text, ids, [] if ranked is None else [ranked]))
        else:
            rows.append(maker.responses(text, ids, samples[0]))
    return rows, {name: asdict(of_one) for name, of_one in counts.items()} | {ROWS: dict(+maker.left_out)}


def _reward(text: Preference, response: Sample, tokenizer: PreTrainedTokenizerBase) -> float:
    """1 where the rule finds the answer to a bundled prompt good, else 0."""
    assert isinstance(text.prompt, list)
    return float(judge(text.prompt, str(tokenizer.decode(response.ids, skip_special_tokens=True)).strip()).good)


def _summed(parts: Sequence[Counts]) -> Counts:
    """The counts of all processes."""
    found: Counts = {}
    for name in parts[0]:
        if name == ROWS:
            found[name] = dict(sum((Counter(part[name]) for part in parts), Counter[str]()))
            continue
        of_all = SampleCounts()
        for part in parts:
            of_all.merge(SampleCounts(**part[name]))
        found[name] = asdict(of_all)
    return found


def _made_of(config: SampleConfig, responders: Sequence[Responder], prompts: Prompts) -> dict[str, Any]:
    """Everything that the rows are a function of."""
    return {
        "models": [fingerprint_model(x.policy.model) for x in responders],
        "tokenizers": [fingerprint_tokenizer(x.tokenizer) for x in responders],
        "stops": [sorted(x.sampler.stops) for x in responders],
        "prompts": prompts.fingerprint,
        "max_length": [x.sampler.max_length for x in responders],
        "precision": precision(config.model),
        "sampling": asdict(config.sampling),
        "bent": list(config.sampling.bent),
        "seed": config.seed,
        "step": config.step,
        "rank": config.rank,
        "unfinished": config.unfinished,
    }


def _versions() -> dict[str, str]:
    import transformers

    return {"tvkd_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _check_rows(config: SampleConfig, sampled: Sampled) -> None:
    """Raise ValueError where no row is left, and warn where no response stopped."""
    counts = sampled.counts(POLICY)
    if not sampled.rows:
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(sampled.left_out.items()))
        raise ValueError(
            f"no row is left of {counts}: {why}. Raise --max_new_tokens where responses never stop, and --temperature "
            "or --n where they are equal"
        )
    if counts.unfinished == counts.samples:
        warnings.warn(
            f"none of {counts.samples:,} responses stopped within {config.max_new_tokens:,} tokens: raise "
            "--max_new_tokens, or train the model to end its turns",
            stacklevel=2,
        )


class _Bar:
    """Progress on stderr: responses, and their speed, length and share that never stopped."""

    def __init__(self, responses: int, verbose: bool) -> None:
        from tqdm import tqdm

        self.counts, self._since = SampleCounts(), time.perf_counter()
        self._bar = tqdm(total=responses, desc="sampling", unit="response", disable=not verbose)

    def finished(self, samples: Sequence[Sample]) -> None:
        self.counts.add(samples)
        speed = self.counts.tokens / (time.perf_counter() - self._since)
        unfinished = self.counts.unfinished / self.counts.samples
        self._bar.set_postfix_str(
            f"{speed:,.0f} tokens/s, {self.counts.mean_length:,.0f} tokens each, {unfinished:.0%} never stopped"
        )
        self._bar.update(len(samples))

    def close(self) -> None:
        self._bar.close()


def check(config: SampleConfig) -> None:
    """The checks that need no process group, before several processes are started."""
    check_sample_folder(Path(config.output_dir))
    check_device(config.model)


def run(config: SampleConfig) -> None:
    """Sample, and print what was sampled and where it lies."""
    sampled = sample(config)
    if not is_main_process():
        return
    print(f"{config.policy}: {sampled.counts(POLICY)}")
    if config.rejected_policy is not None:
        print(f"{config.rejected_policy}: {sampled.counts(REJECTED)}")
    if sampled.tokens:
        print(f"{sampled.tokens / sampled.seconds:,.1f} tokens/s ({sampled.tokens:,} in {sampled.seconds:,.0f} s)")
    left_out = "".join(f"; left out, {reason}: {count:,}" for reason, count in sorted(sampled.left_out.items()))
    pairs = config.rejected_policy is not None or config.rank != "none"
    print(f"{sampled.rows:,} {'pairs' if pairs else 'responses'} in {config.output_dir}{left_out}")
    if config.sampling.bent:
        print(f"not the policy's own law ({', '.join(config.sampling.bent)}): objectives that need it refuse them")
    then = "" if pairs else "--objective sft "
    print(f"to train on them: tvkd train {then}--data.train {config.output_dir} …")
