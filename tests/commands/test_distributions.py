"""Runs of objectives over whole distributions: from a cache as online, with adapters, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from resumed import losses

from tvkd_fast.commands.train import check_run
from tvkd_fast.models.settings import LoraConfig
from tvkd_fast.ops import HeadGradient


def losses_of(config):
    return torch.tensor(losses(config))


@pytest.mark.parametrize("name", ["dckd", "forward_kl", "mixture"])
def test_a_cache_of_states_trains_as_the_teacher_does(name, make_config, run, scored, tmp_path):
    more: dict[str, Any] = {"loss_parts": [{"dpo": {}}, {"forward_kl": {}}]} if name == "mixture" else {}
    online = make_config(objective=name, max_steps=3, data_eval=None, **more)
    run(online)
    folder = str(tmp_path / "states")
    scored(keep=["states"], states_dtype="bfloat16", output_dir=folder)
    cached = replace(online, teacher=None, scores=folder, output_dir=str(tmp_path / "cached"))
    run(cached)
    # States are rounded to 8 bits of their mantissa, and nothing else differs.
    torch.testing.assert_close(losses_of(cached), losses_of(online), rtol=2e-3, atol=0.0)


def test_a_cache_without_states_is_refused_with_what_adds_them(make_config, run, scored, tmp_path):
    folder = str(tmp_path / "sums")
    scored(output_dir=folder)
    config = make_config(objective="jsd", teacher=None, scores=folder)
    with pytest.raises(ValueError, match=r"do not hold the teacher's states: add them with .*--keep \[states\]"):
        run(config)


@pytest.mark.parametrize("name", ["tdpo2", "jsd"])
def test_adapters_are_trained_towards_whole_distributions(name, make_config, run):
    pytest.importorskip("peft")
    config = make_config(objective=name, lora=LoraConfig(rank=2), eval_every=3, optim_lr=3e-2, optim_warmup_steps=0)
    figures = run(config if name == "jsd" else replace(config, teacher=None))
    found = losses_of(config)
    assert figures.loss is not None
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": HeadGradient(grad_mode="sparse")}, "set --head.grad_mode exact"),
        ({"objective": "tdpo1", "teacher": None, "scores": "s"}, "reference's states, which no folder of scores holds"),
        ({"teacher": None}, "jsd needs a teacher: set --teacher"),
    ],
)
def test_what_no_walk_can_have_is_refused(changes, message, make_config):
    with pytest.raises(ValueError, match=message):
        check_run(make_config(**{"objective": "jsd"} | changes))


def test_a_shared_vocabulary_is_refused(make_config):
    config = make_config(objective="jsd")
    with pytest.raises(ValueError, match=r"set --parallel.vocabulary gathered"):
        check_run(replace(config, parallel=replace(config.parallel, vocabulary="shared")))


def test_a_teachers_reference_is_asked_for(make_config):
    with pytest.raises(ValueError, match=r"adpa is what the teacher gained over its own reference.*set --teacher_ref"):
        make_config(objective="adpa")


def test_a_setting_of_the_loss_reaches_the_walk(make_config, run):
    """At β' = 1 and at 0.1 the divergences are others, and so are the losses."""
    found = []
    for mixing in (0.1, 1.0):
        config = make_config(objective="jsd", loss_mixing=mixing, max_steps=1)
        run(replace(config, resume=False))
        found.append(losses_of(config)[0])
    assert found[0] < 0.5 * found[1]
