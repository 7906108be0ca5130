"""DPO from start to end by each kind of head gradient: one start, the same pairs in the same order, several seeds.

    python -m bench.learning.head_training --layers 4 --data TRAIN.jsonl --eval HELD_OUT.jsonl --json FILE
    python -m bench.learning.head_training --data …          the whole model, not a pruned and warmed one
    python -m bench.learning.head_training --frozen_head …   the head's weight is frozen, as under LoRA
    python -m bench.learning.head_training --seeds 1 …       one of the seeds: processes may share a prepared study

After 10, 100 and the last step each run is compared with the exact one of its seed: ‖ΔW − ΔW*‖/‖ΔW*‖ of the head's
weight and of all others together, and on held-out pairs the reward margins, pair by pair. Runs that are finished lie
under `--out` and are skipped, so that a study that was cut off resumes.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.harness.machine import made_by, write_report
from bench.learning.policy_heads import EagerHead, RoundedHead
from tvkd_fast import HeadGradient, HeadStats
from tvkd_fast.commands.models import load_policy
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.commands.train import train
from tvkd_fast.data import PairDataset, micro_batches, pairs_of_step
from tvkd_fast.data.data_config import DataConfig, load_dataset
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import FusedLMHead, PolicyWithHead, load_tokenizer
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.scorer import CachedScorer
from tvkd_fast.training.optim import OptimConfig, learning_rate, make_optimizer
from tvkd_fast.training.step import train_step
from tvkd_fast.training.train_config import TrainConfig

MODEL = "smollm2-135m"
EXACT = "exact"
LAST = 50
"""Steps that the training loss at the end is a mean over."""


def sparse(log_eps: int) -> Callable[[PolicyWithHead], None]:
    def take(policy: PolicyWithHead) -> None:
        policy.head.gradient, policy.head.stats = HeadGradient(grad_mode="sparse", eps=2.0**log_eps), HeadStats()

    return take


def dense(head: type[FusedLMHead]) -> Callable[[PolicyWithHead], None]:
    def take(policy: PolicyWithHead) -> None:
        policy.head.__class__ = head

    return take


ARMS: dict[str, Callable[[PolicyWithHead], None]] = {
    EXACT: lambda policy: None,
    "exact, by eager log-softmax": dense(EagerHead),
    "sparse, 2^-14": sparse(-14),
    "sparse, 2^-16": sparse(-16),
    "sparse, 2^-18": sparse(-18),
    "bf16 logits": dense(RoundedHead),
}
"""The change of a policy's head, by name; the eager one shows what float32's own rounding grows to."""


class Study:
    """The start, its pairs and their log-probabilities under the reference, made once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        settings = {key: value for key, value in vars(arguments).items() if key not in ("only", "seeds", "json", "out")}
        # Other settings, another folder: what lies there is of this study.
        self.out = Path(arguments.out) / sha256(repr(settings).encode()).hexdigest()[:12]
        pairs = arguments.steps * arguments.pairs
        self.data = DataConfig(
            train=arguments.data,
            eval=arguments.eval,
            train_limit=pairs,
            eval_limit=arguments.held_out,
            max_length=arguments.max_length,
            bad_pairs="drop",
            overlong="drop",
        )
        self.milestones = sorted({min(10, arguments.steps), min(100, arguments.steps), arguments.steps})
        self.optim = OptimConfig(lr=arguments.lr, warmup_steps=arguments.steps // 10)
        self.start = self._start()
        tokenizer = load_tokenizer(self.start)
        self.train, self.held_out = (load_dataset(which, self.data, tokenizer) for which in ("train", "eval"))
        self.scorers = {which: CachedScorer(self._scores(which)) for which in ("train", "eval")}

    def _start(self) -> str:
        if self.arguments.layers is None:
            return MODEL
        folder = self.out / "start"
        config = TrainConfig(
            policy=MODEL,
            output_dir=str(folder),
            objective="sft",
            student_layers=self.arguments.layers,
            data=replace(self.data, train_limit=None),
            optim=OptimConfig(lr=1e-3, warmup_steps=10),
            max_steps=self.arguments.warm_steps,
            pairs_per_step=4,
        )
        if not (folder / "final").exists():
            train(replace(config, data=replace(config.data, eval=None)), show_progress=False)
        return str(folder / "final")

    def _scores(self, which: Any) -> ScoreCache:
        folder = self.out / f"scores-{which}"
        if not folder.exists():
            score(ScoreConfig(output_dir=str(folder), policy=self.start, which=which, data=self.data))
        return ScoreCache.load(str(folder), self.train if which == "train" else self.held_out)

    def title(self) -> str:
        arguments = self.arguments
        start = MODEL if arguments.layers is None else f"{MODEL}, {arguments.layers} layers, warmed"
        return f"{start}, head frozen" if arguments.frozen_head else start

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        policy = load_policy(self.start, ModelConfig())
        ARMS[arm](policy)
        policy.head.weight.requires_grad_(not self.arguments.frozen_head)
        optimizer = make_optimizer(policy, self.optim)
        start = weights(policy)
        losses, found = [], {}
        policy.train()
        for step in range(self.arguments.steps):
            order = pairs_of_step(seed, step, num_pairs=len(self.train), pairs_per_step=self.arguments.pairs)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, self.arguments.steps, self.optim)
            out = train_step(
                policy,
                self.scorers["train"],
                list(micro_batches(self.train, order, size=self.arguments.pairs)),
                optimizer,
                DPO(beta=0.1),
                clip_norm=1.0,
            )
            losses.append(float(out.loss))
            if step + 1 in self.milestones:
                change = {name: x - start[name] for name, x in weights(policy).items()}
                found[str(step + 1)] = {
                    **self._off(arm, seed, step + 1, change),
                    "margins": reward_margins(policy, self.held_out, self.scorers["eval"]),
                }
        stats = policy.head.stats
        head = {} if stats is None else stats.read()
        return {"arm": arm, "seed": seed, "losses": losses, "marks": found, "head": head}

    def _off(self, arm: str, seed: int, step: int, change: dict[str, Tensor]) -> dict[str, float]:
        """‖ΔW − ΔW*‖/‖ΔW*‖; the exact run leaves its ΔW* for the others."""
        file = self.out / f"change-{seed}-{step}.safetensors"
        if arm == EXACT:
            save_file(change, file)
            return {}
        exact = load_file(file)
        return {name: float((x - exact[name]).norm() / exact[name].norm()) for name, x in change.items()}


def weights(policy: PolicyWithHead) -> dict[str, Tensor]:
    """Return the trained weights as two vectors: the head's, unless it is frozen, and the backbone's."""
    head = policy.head.weight
    rest = [x.detach().flatten() for x in policy.parameters() if x.requires_grad and x is not head]
    found = {"backbone": torch.cat(rest)}
    return found | {"head": head.detach().flatten().clone()} if head.requires_grad else found


@torch.no_grad()
def reward_margins(policy: PolicyWithHead, dataset: PairDataset, scorer: CachedScorer) -> list[float]:
    """ρ_w − ρ_l of every pair."""
    policy.eval()
    found: list[float] = []
    for batch in micro_batches(dataset, range(len(dataset)), size=8):
        scores = scorer.of(batch)
        assert scores.ref_logps is not None
        chosen, rejected = (segment_sums(policy(batch), batch.cu_seqlens) - scores.ref_logps).chunk(2)
        found += (chosen - rejected).tolist()
    policy.train()
    return found


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an arm: means over seeds, and each seed's distance from its exact run."""
    exact = {run["seed"]: run for run in runs if run["arm"] == EXACT}
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm and run["seed"] in exact]
        row: dict[str, Any] = {"arm": arm, "seeds": [run["seed"] for run in mine]}
        row["loss"] = [mean(run["losses"][-LAST:]) for run in mine]
        row["loss_off"] = [_rms(run["losses"], exact[run["seed"]]["losses"]) for run in mine]
        row["head"] = {key: mean(run["head"][key] for run in mine) for key in mine[0]["head"]}
        row["marks"] = {milestone: _at(milestone, mine, exact) for milestone in mine[0]["marks"]}
        rows.append(row)
    return rows


def _at(milestone: str, runs: list[dict[str, Any]], exact: dict[int, dict[str, Any]]) -> dict[str, Any]:
    accuracy, margin, off = [], [], []
    for run in runs:
        margins = torch.tensor(run["marks"][milestone]["margins"])
        want = torch.tensor(exact[run["seed"]]["marks"][milestone]["margins"])
        accuracy.append(float((margins > 0).float().mean()))
        margin.append(float(margins.mean()))
        off.append(float((margins - want).norm() / want.norm()))
    weight = {f"{name}_off": [run["marks"][milestone].get(name) for run in runs] for name in ("head", "backbone")}
    return {"accuracy": accuracy, "margin": margin, "margins_off": off, **weight}


def _rms(got: list[float], want: list[float]) -> float:
    return float((torch.tensor(got) - torch.tensor(want)).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of a pruned student; the whole model where not given")
    parser.add_argument("--warm_steps", type=int, default=150, help="SFT steps that warm the pruned student")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=2, help="a step")
    parser.add_argument("--max_length", type=int, default=192, help="longer pairs are cut, or dropped")
    parser.add_argument("--held_out", type=int, default=64, help="pairs")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--frozen_head", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--eval", default="bundled:eval")
    parser.add_argument("--only", action="append", help="a part of a kind's name; may be repeated")
    parser.add_argument("--out", default="out/bench/training")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    study = Study(arguments)
    words = arguments.only or [""]
    runs = []
    for seed in arguments.seeds:
        for arm in ARMS:
            if arm != EXACT and not any(word in arm for word in words):
                continue
            file = study.out / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(study.run(arm, seed)) + "\n")
                gc.collect()
            runs.append(json.loads(file.read_text()))
            print(f"seed {seed}, {arm}: loss {mean(runs[-1]['losses'][-LAST:]):.4f}", flush=True)
    report = {
        "rows": summary(runs),
        "losses": {f"{run['arm']}, {run['seed']}": run["losses"] for run in runs},
        "start": study.title(),
        "steps": arguments.steps,
        "pairs": arguments.pairs,
        "held_out": len(study.held_out),
        "lr": arguments.lr,
        "max_length": arguments.max_length,
        "data": Path(arguments.data).name,
        "made_by": made_by(),
    }
    for row in report["rows"]:
        print(json.dumps(row))
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
