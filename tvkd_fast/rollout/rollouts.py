"""What the steps of an on-policy run learn from: the policy's own samples, drawn as the steps come.

A sample is a function of (seed, the step that sampled it, its prompt, its number) and the weights. Every process
samples its part of the prompts, and all get all samples: the number of processes leaves them as they are.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from tvkd_fast.data import PairBatch, TokenizedPair
from tvkd_fast.data.step_pairs import StepPairs
from tvkd_fast.distributed import World
from tvkd_fast.rollout.rollout_config import RolloutConfig
from tvkd_fast.rollout.samples import Sample, SampleCounts, SamplePrompt, Sampler
from tvkd_fast.scoring.timed import TimedScorer

Responses = list[list[Sample]]
"""Samples of each of a step's prompts."""


class Rollouts:
    """Micro-batches of single responses that the policy samples, for the steps that `config.samples` names; of the
    dataset's chosen responses for the others.

    Args:
        given: the dataset in its order, whose prompts are answered.
        sampler: the policy; it is asked for the samples of `config.every` steps at once, at the first of them.
        config: how it is asked.
        share: of steps over samples, in [0, 1].
        seed: of the samples, and of which steps these are.
        steps: of the run; nothing is sampled for later ones.
        world: the processes of the run; every one makes the same calls.
        scorer: whose seconds are reported beside those of sampling.
    """

    def __init__(
        self,
        given: StepPairs,
        sampler: Sampler,
        config: RolloutConfig,
        *,
        share: float,
        seed: int,
        steps: int,
        world: World,
        scorer: TimedScorer,
    ) -> None:
        self.given, self.sampler, self.config = given, sampler, config
        self.share, self.seed = share, seed
        self.steps, self.world, self.scorer = steps, world, scorer
        self._held: dict[int, Responses] = {}
        """Responses of the steps that are to come, by step."""
        self._taken: dict[int, Responses] = {}
        """Responses of the steps since the last call of `metrics`, by step."""
        self._sampled_at = 0
        self._reset()

    def batches(self, step: int) -> list[PairBatch]:
        """This process's micro-batches of a step, which samples where the step has none yet."""
        if not self._samples(step):
            return self.given.batches(step)
        if step not in self._held:
            self._sample(step)
        responses = self._taken[step] = self._held[step]
        self._held = {later: x for later, x in self._held.items() if later > step}
        self._ages.append(step - self._sampled_at)
        pairs = [
            _response(self.given.dataset[i], sample)
            for i, of_prompt in zip(self.given.pairs(step), responses, strict=True)
            for sample in of_prompt
        ]
        return self.given.share(pairs, range(len(pairs)))

    def samples(self, step: int) -> list[tuple[int, list[int]]]:
        """The pairs whose prompts a step since the last call of `metrics` has sampled for, and the token ids of each
        response."""
        taken = self._taken.get(step)
        if taken is None:
            return []
        of_pairs = zip(self.given.pairs(step), taken, strict=True)
        return [(pair, sample.ids) for pair, samples in of_pairs for sample in samples]

    def _samples(self, step: int) -> bool:
        return self.config.samples(self.share, self.seed, step)

    def _sample(self, step: int) -> None:
        start = time.perf_counter()
        end = min((step // self.config.every + 1) * self.config.every, self.steps)
        steps = {later: self.given.pairs(later) for later in range(step, end) if self._samples(later)}
        asked = self._prompts([i for of_one in steps.values() for i in of_one])
        mine = self.sampler.sample(asked[self.world.rank :: self.world.size], self.config, seed=self.seed, step=step)
        found: Responses = [[] for _ in asked]
        for rank, part in enumerate(self.world.all_gather(mine)):
            found[rank :: self.world.size] = part
        for later, of_one in steps.items():
            self._held[later], found = found[: len(of_one)], found[len(of_one) :]
            for samples in self._held[later]:
                self._counts.add(samples)
        self._sampled_at = step
        self._seconds += time.perf_counter() - start

    def _prompts(self, pairs: Sequence[int]) -> list[SamplePrompt]:
        """Prompts that come twice get further samples, not the same ones."""
        asked = Counter[tuple[int, ...]]()
        found = []
        for pair in (self.given.dataset[i] for i in pairs):
            key = tuple(pair.prompt_ids)
            found.append(SamplePrompt(pair.prompt_ids, pair.row, self.config.n * asked[key]))
            asked[key] += 1
        return found

    def metrics(self, busy: float) -> dict[str, float]:
        """Figures since the last call, which `busy` seconds have passed since: speed, lengths and ages of samples, and
        the shares of time."""
        found = {"age": sum(self._ages) / len(self._ages)} if self._ages else {}
        counts = self._counts
        if counts.samples:
            found |= {
                "tokens_per_s": counts.tokens / self._seconds,
                "length": counts.mean_length,
                "unfinished": counts.unfinished / counts.samples,
                "empty": counts.empty / counts.samples,
            }
        sampling, scoring = self._seconds / busy, self.scorer.take() / busy
        found |= {"sampling_share": sampling, "scoring_share": scoring, "learning_share": 1 - sampling - scoring}
        self._reset()
        return {f"rollout/{name}": value for name, value in found.items()}

    def _reset(self) -> None:
        self._counts, self._seconds, self._ages = SampleCounts(), 0.0, list[int]()
        self._taken.clear()

    def state(self, step: int) -> dict[str, Any]:
        """The samples that wait for later steps, drawn from weights that are gone by then."""
        held = {str(later): [list(map(asdict, x)) for x in of_one] for later, of_one in self._held.items()}
        # A text, which a checkpoint does not spread over a line per number.
        return {"rollout": json.dumps({"sampled_at": self._sampled_at, "held": held})} if held else {}

    def load(self, state: dict[str, Any]) -> None:
        """Put back the samples that `state` gave, bit for bit."""
        if "rollout" in state:
            found = json.loads(state["rollout"])
            self._sampled_at = found["sampled_at"]
            self._held = {
                int(step): [[Sample(**one) for one in x] for x in of_one] for step, of_one in found["held"].items()
            }


def _response(prompt: TokenizedPair, sample: Sample) -> TokenizedPair:
    logps = sample.logps if sample.law_logps is None else sample.law_logps
    return replace(
        prompt,
        chosen_ids=sample.ids,
        rejected_ids=[],
        chosen_ended=sample.ended,
        rejected_ended=False,
        sampled=True,
        sampler_logps=tuple(logps),
        rewards=(),
    )
