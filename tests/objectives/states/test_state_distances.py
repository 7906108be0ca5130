"""Objectives over the teacher's states against their formulas from float64 models, gradients included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed import check_resumes, losses
from torch import Tensor

from tvkd_fast.commands.export import export
from tvkd_fast.commands.prepare import prepare
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.distributed import World
from tvkd_fast.losses.states import relational_distances, transport_distances
from tvkd_fast.models import PolicyWithHead, fingerprint_weights, load_model
from tvkd_fast.objectives.mixtures.mixture import Mixture
from tvkd_fast.objectives.states.projected import Projected
from tvkd_fast.objectives.states.relational import Relational
from tvkd_fast.objectives.states.transport import Transport
from tvkd_fast.scoring import Scores


def test_relational_is_its_formula(is_its_formula_from_states: Callable[..., Any]) -> None:
    def formula(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
        relations = [x["last"] / x["last"].norm(dim=1, keepdim=True) for x in (ours, theirs)]
        return (relations[0] @ relations[0].T - relations[1] @ relations[1].T).square().mean()

    is_its_formula_from_states(Relational(distance_weight=3.0, likelihood_weight=0.5), formula)


def test_the_relation_is_as_set(is_its_formula_from_states: Callable[..., Any]) -> None:
    def formula(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
        lengths = [len(ours["last"])]
        return relational_distances(ours["last"], theirs["last"], lengths, relation="gram").squeeze(0)

    is_its_formula_from_states(Relational(relation="gram"), formula)


def test_projected_is_its_formula_and_its_projection_learns(is_its_formula_from_states: Callable[..., Any]) -> None:
    found, held = Projected(distance_weight=2.0), []

    def attach(policy: PolicyWithHead) -> None:
        found.attach(policy, None, lambda: Scores(teacher_hidden=torch.zeros(1, 48)))
        held.append(policy.beside["projection"].weight)
        assert held[0].shape == (48, 32)
        assert held[0].dtype == torch.float64

    def formula(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
        v, u = ours["last"] @ held[0].T, theirs["last"]
        return (1 - (v * u).sum(1) / (v.norm(dim=1) * u.norm(dim=1))).mean()

    is_its_formula_from_states(found, formula, attach)


def test_transport_is_its_formula(is_its_formula_from_states: Callable[..., Any]) -> None:
    def formula(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
        lengths = [len(ours["last"])]
        return transport_distances(ours["last"], theirs["last"], lengths, epsilon=0.2, iterations=30).squeeze(0)

    is_its_formula_from_states(Transport(epsilon=0.2, iterations=30), formula)


def test_a_run_with_a_projection_resumes_bit_for_bit(make_config: Any, run: Any, files: Path) -> None:
    check_resumes(make_config, run, files, objective="projected")
    # What was trained beside the policy is no part of a model that is made of a checkpoint.
    exported = export(files / "whole" / "checkpoints" / "step-000006")
    assert fingerprint_weights(load_model(exported)) == fingerprint_weights(load_model(files / "whole" / "final"))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_states_on_disk_serve_as_the_teacher_does(dtype: Any, make_config: Any, run: Any, files: Path) -> None:
    online = make_config(objective="relational", max_steps=2)
    asked = {name: getattr(online, name) for name in ("policy", "teacher", "data")}
    score(
        ScoreConfig(output_dir=str(files / "scores"), keep=["states"], states_dtype=dtype, **asked), show_progress=False
    )
    on_disk = {"scores": str(files / "scores"), "teacher": None, "data_eval": None, "max_steps": 2}
    cached = make_config(objective="relational", output_dir=str(files / "cached"), **on_disk)
    run(online)
    run(cached)
    assert losses(cached) == pytest.approx(losses(online), rel=1e-3)
    projected = make_config(objective="projected", output_dir=str(files / "projected"), **on_disk)
    if dtype == "bfloat16":
        run(projected)
        return
    with pytest.raises(
        ValueError, match=r"projected learns the coordinates .*: score anew with --states_dtype bfloat16"
    ):
        run(projected)


@pytest.mark.parametrize("name", ["self_distillation", "relational", "projected", "transport", "okd", "mixkd"])
def test_a_mixture_holds_none_of_them(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{name} measures more of the policy than a mixture does, .*: train by it alone"
    ):
        Mixture(parts=[{"dpo": {}}, {name: {}}])


def test_without_its_projection_a_policy_is_not_measured(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match=r"projected measures by a projection that is trained with the policy"):
        Projected().projection(PolicyWithHead(tiny_model(0)))


def test_the_seed_decides_where_a_projection_begins(make_config: Any) -> None:
    def of_seed(seed: int) -> Tensor:
        config = make_config(objective="projected", seed=seed, data_eval=None)
        policy = prepare(config, World(torch.device("cpu")), verbose=False).policy
        return policy.get_parameter("beside.projection.weight").detach()

    first, again, other = map(of_seed, (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # As wide as a linear layer's own.
    assert 0.9 < first.abs().max() * first.shape[1] ** 0.5 <= 1
