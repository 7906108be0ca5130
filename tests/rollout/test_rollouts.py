"""A run's own samples, step by step: whose they are, how old, and what is kept of them."""

import json
from dataclasses import replace

import pytest
import torch

from tvkd_fast.data import MicroBatching, TokenizedPair, pairs_of_step
from tvkd_fast.data.step_pairs import StepPairs
from tvkd_fast.distributed import World
from tvkd_fast.rollout import RolloutConfig, Rollouts, Sample
from tvkd_fast.scoring.timed import TimedScorer

PAIRS = [TokenizedPair([1, i], [7], [], True, False, f"row {i}") for i in range(6)]


class Counting:
    """Answers with what it was asked: step, prompt and number of the sample."""

    def __init__(self):
        self.asked = []

    def sample(self, prompts, sampling, *, seed, step=0, finished=None):
        self.asked.append((step, len(prompts)))
        return [
            [
                Sample([10 + step, prompt.ids[1], prompt.first + i, 2][: 4 - i], i == 0, [-0.1 * (i + 1)] * (4 - i))
                for i in range(sampling.n)
            ]
            for prompt in prompts
        ]


@pytest.fixture
def rollouts_of():
    def make(config, *, dataset=PAIRS, share=1.0, sampler=None):
        def pairs(step):
            return pairs_of_step(0, step, num_pairs=len(dataset), pairs_per_step=2)

        given = StepPairs(dataset, MicroBatching(tokens=64), pairs, chosen_only=True)
        world = World(torch.device("cpu"))
        return Rollouts(
            given, sampler or Counting(), config, share=share, seed=0, steps=8, world=world, scorer=TimedScorer(None)
        )

    return make


def test_a_step_learns_from_samples_of_its_prompts(rollouts_of):
    rollouts = rollouts_of(RolloutConfig(n=2))
    for step in range(3):
        (batch,) = rollouts.batches(step)
        first, second = ([1, i] for i in rollouts.given.pairs(step))
        rows = [prompt + [10 + step, prompt[1], i, 2][: 4 - i] for prompt in (first, second) for i in range(2)]
        # Longer ones are packed first.
        order = [0, 2, 1, 3]
        assert batch.pairs.tolist() == order
        assert batch.input_ids.tolist() == [[token for i in order for token in rows[i]]]
        assert batch.response_lengths == (4, 4, 3, 3)
        assert batch.ended.tolist() == [True, True, False, False]
        assert batch.sampler_logps.tolist() == [-0.1] * 8 + [-0.2] * 6
    # The second of each two never stopped.
    assert rollouts.metrics(busy=1.0)["rollout/unfinished"] == 0.5


def test_samples_of_several_steps_are_drawn_at_the_first_and_age(rollouts_of):
    rollouts = rollouts_of(RolloutConfig(every=3))
    labels = [rollouts.batches(step)[0].labels[0].item() for step in range(4)]
    assert labels == [10, 10, 10, 13]
    assert rollouts.sampler.asked == [(0, 6), (3, 6)]
    # The run ends after eight.
    rollouts.batches(6)
    assert rollouts.sampler.asked[-1] == (6, 4)
    found = rollouts.metrics(busy=2.0)
    assert found["rollout/age"] == (0 + 1 + 2 + 0 + 0) / 5
    assert found["rollout/length"] == 4
    assert found["rollout/unfinished"] == found["rollout/empty"] == 0
    shares = [found[f"rollout/{name}_share"] for name in ("sampling", "scoring", "learning")]
    assert sum(shares) == pytest.approx(1)
    assert set(rollouts.metrics(busy=1.0)) == {f"rollout/{x}_share" for x in ("sampling", "scoring", "learning")}


def test_what_waits_for_later_steps_survives_a_checkpoint(rollouts_of):
    config = RolloutConfig(n=2, every=3)
    whole, cut, resumed = (rollouts_of(config) for _ in range(3))
    for step in range(2):
        whole.batches(step), cut.batches(step)
    resumed.load(json.loads(json.dumps(cut.state(2))))
    ours, theirs = whole.batches(2)[0], resumed.batches(2)[0]
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.sampler_logps, theirs.sampler_logps)
    assert not resumed.sampler.asked
    assert whole.state(3) == {}


def test_a_prompt_that_comes_twice_is_sampled_further(rollouts_of):
    rollouts = rollouts_of(RolloutConfig(n=2), dataset=[PAIRS[0], replace(PAIRS[0], row="again")])
    (batch,) = rollouts.batches(0)
    assert sorted(ids.tolist()[2] for ids in batch.labels.split(batch.lengths.tolist())) == [0, 1, 2, 3]


def test_steps_over_samples_are_a_share_of_all_and_the_others_take_the_datas(rollouts_of):
    config = RolloutConfig()
    mixed = [config.samples(0.25, 3, step) for step in range(4000)]
    assert sum(mixed) == pytest.approx(1000, abs=3 * (4000 * 0.25 * 0.75) ** 0.5)
    assert mixed == [config.samples(0.25, 3, step) for step in range(4000)]
    assert all(config.samples(1.0, 3, step) and not config.samples(0.0, 3, step) for step in range(100))
    rollouts = rollouts_of(config, share=0.5)
    own = [config.samples(0.5, 0, step) for step in range(8)]
    assert True in own
    assert False in own
    for step, samples in enumerate(own):
        (batch,) = rollouts.batches(step)
        assert (batch.labels[0].item() == 10 + step) == samples
        assert (batch.sampler_logps is not None) == samples


def test_the_laws_log_probabilities_are_kept_where_it_is_bent(rollouts_of):
    class Bent(Counting):
        def sample(self, *given, **more):
            return [[replace(x, law_logps=[-0.5] * len(x.ids)) for x in y] for y in super().sample(*given, **more)]

    (batch,) = rollouts_of(RolloutConfig(temperature=0.9), sampler=Bent()).batches(0)
    assert set(batch.sampler_logps.tolist()) == {-0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "set --rollout.n"),
        ({"every": 0}, "set --rollout.every"),
        ({"share": 1.5}, "set --rollout.share"),
        ({"temperature": -1.0}, "set --rollout.temperature"),
        ({"temperature": 0.0, "n": 2}, "set --rollout.n 1"),
        ({"max_new_tokens": 0}, "set --rollout.max_new_tokens"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_options(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**settings)
