"""The public surface: names and arguments that others build on, each with a docstring that is so."""

import doctest
import importlib
import inspect
import sys
from typing import Any

import pytest

import tvkd_fast
from tvkd_fast import integrations, losses

SURFACE = {
    "DistillationOutput",
    "ExpectedRows",
    "FusedLinearTVKDLoss",
    "Head",
    "HeadGradient",
    "HeadStats",
    "TVKDOutput",
    "__version__",
    "dpo_loss",
    "fused_linear_distillation_loss",
    "fused_linear_tvkd_loss",
    "linear_cached_forward_kl",
    "linear_divergence",
    "linear_expected_rows",
    "linear_expected_score",
    "linear_joint",
    "linear_logps",
    "linear_soft_values",
    "linear_sparse_divergence",
    "sft_loss",
    "shaping_returns",
    "tvkd_loss",
}
HEAD = "hidden weight labels bias softcap logit_scale ignore_index grad_mode eps row_cap"
PAIR = "hidden weight teacher_hidden teacher_weight"
OF_PAIR = (
    "beta alpha temperature bias softcap logit_scale teacher_bias teacher_softcap teacher_logit_scale teacher_index "
    "teacher_lse rows"
)
GRADIENT = "grad_mode eps row_cap max_tail stats"
ARGUMENTS = {
    "linear_divergence": f"{PAIR} kind {OF_PAIR} {GRADIENT} impl",
    "linear_joint": f"{PAIR} labels outputs {OF_PAIR} ignore_index {GRADIENT} impl",
    "linear_expected_rows": (
        "teacher_hidden teacher_weight weight temperature bias teacher_bias teacher_softcap teacher_logit_scale "
        "teacher_index impl"
    ),
    "linear_cached_forward_kl": (
        "hidden weight expected_rows teacher_entropy expected_bias temperature bias softcap logit_scale rows impl"
    ),
    "linear_expected_score": "hidden weight heads temperature clip bias softcap logit_scale rows impl",
    "linear_sparse_divergence": "hidden weight ids probs tail kind temperature bias softcap logit_scale rows impl",
    "fused_linear_distillation_loss": f"{PAIR} labels mixture token_weights {OF_PAIR} ignore_index {GRADIENT} impl",
    "linear_logps": f"{HEAD} tail seed max_tail workspace_mb stats impl",
    "linear_soft_values": "hidden weight bias softcap logit_scale kappa value_scale value_from rows impl",
    "shaping_returns": "values cu_states gamma terminal ended",
    "tvkd_loss": "policy_logps ref_logps psi beta alpha label_smoothing",
    "dpo_loss": "policy_logps ref_logps beta label_smoothing",
    "sft_loss": "policy_logps num_tokens",
}
INPUTS = {"teacher_hidden", "teacher_weight", "labels", "expected_bias"}
"""Tensors that may be left out and are no settings."""
EXPLAINED = [(tvkd_fast, name) for name in sorted(SURFACE - {"__version__"})]
EXPLAINED += [(integrations, name) for name in ("patch_lm_head", "unpatch_lm_head")]
EXPLAINED += [(losses, "segment_sums")]


def test_names_are_those_that_were_promised() -> None:
    assert set(tvkd_fast.__all__) == SURFACE
    assert set(integrations.__all__) == {"FusedLMOutput", "patch_lm_head", "unpatch_lm_head"}
    assert all(hasattr(tvkd_fast, name) for name in SURFACE)


def test_importing_the_package_costs_torch_and_little_more(another_process: dict[str, Any]) -> None:
    """Dynamo, DTensor and transformers take seconds together, and no op asks for them."""
    foreign = {name for name in another_process["loaded"] if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in foreign} == {"tvkd_fast"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_stay_in_their_order(name: str) -> None:
    found = inspect.signature(getattr(tvkd_fast, name)).parameters
    assert list(found) == ARGUMENTS[name].split()
    # Settings are named where they are given, so that one more can stand anywhere among them.
    optional = [p for p in found.values() if p.default is not p.empty and p.name not in INPUTS]
    assert all(p.kind is p.KEYWORD_ONLY for p in optional)


@pytest.mark.parametrize(("module", "name"), EXPLAINED, ids=lambda x: x if isinstance(x, str) else "")
def test_an_example_stands_in_the_docstring_and_is_so(module: Any, name: str) -> None:
    thing = getattr(module, name)
    home = vars(sys.modules[thing.__module__])
    (test,) = [x for x in doctest.DocTestFinder(recurse=False).find(thing, name, globs=dict(home)) if x.examples]
    output: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.append)
    assert result.attempted > 1
    assert result.failed == 0, "".join(output)


@pytest.mark.parametrize(
    ("module", "name"), [("build", "score"), ("build", "train"), ("config", "DataConfig"), ("config", "TrainConfig")]
)
def test_names_that_moved_are_found_where_they_were(module: str, name: str) -> None:
    old = importlib.import_module(f"tvkd_fast.training.{module}")
    with pytest.warns(DeprecationWarning, match=rf"tvkd_fast.training.{module}.{name} has moved: import it from "):
        found = getattr(old, name)
    assert found.__name__ == name
    with pytest.raises(AttributeError, match=f"module 'tvkd_fast.training.{module}' has no attribute 'nothing'"):
        _ = old.nothing
