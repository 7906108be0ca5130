"""What the joint ops refuse, and the remedies they name; and what they take that looks as if it should be refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from joint_case import JointCase
from torch import Tensor

from tvkd_fast.ops import Head, unchecked
from tvkd_fast.ops.joint.divergence import linear_divergence, linear_joint
from tvkd_fast.ops.joint.outputs import OUTPUTS

N, D, WIDE, V = SHAPE = (6, 4, 5, 12)


def given(**changes: Any) -> dict[str, Any]:
    hidden, head, teacher_hidden, teacher = JointCase.draw(SHAPE).arguments()
    inputs = {"hidden": hidden, "weight": head, "teacher_hidden": teacher_hidden, "teacher_weight": teacher}
    return inputs | changes


def broken(x: Tensor, row: int, value: float = torch.nan) -> Tensor:
    return x.detach().index_fill(0, torch.tensor([row]), value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "kl"}, "kind must be one of forward_kl, reverse_kl, jsd"),
    "temperature 0": ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
    "temperature below 0": ({"temperature": -1.0}, "temperature must be a positive number"),
    "temperature NaN": ({"temperature": float("nan")}, "temperature must be a positive number"),
    "beta above 1": ({"kind": "jsd", "beta": 1.1}, r"beta must be in \[0, 1\], got 1.1"),
    "beta below 0": ({"kind": "jsd", "beta": -0.1}, r"beta must be in \[0, 1\]"),
    "alpha 0": ({"kind": "alpha", "alpha": 0.0}, "alpha must lie between 0 and 1.*kind='forward_kl'"),
    "alpha 1": ({"kind": "alpha", "alpha": 1.0}, "alpha must lie between 0 and 1"),
    "vocabularies": (
        {"teacher_weight": torch.zeros(V + 1, WIDE)},
        "student's vocabulary has 12 tokens and the teacher's 13: give teacher_index",
    ),
    "rows of states": ({"teacher_hidden": torch.zeros(N + 1, WIDE)}, "hidden has 6 rows and teacher_hidden 7"),
    "width": ({"teacher_hidden": torch.zeros(N, WIDE + 1)}, "the teacher's hidden has size 6 and weight 5"),
    "a student's bias": (
        {"weight": torch.zeros(V, D), "bias": torch.zeros(V + 1)},
        r"the student's bias must be \(12,\)",
    ),
    "double": ({"teacher_hidden": torch.zeros(N, WIDE).double()}, "the teacher's hidden is torch.float64 and weight"),
    "a hole": ({"teacher_index": torch.tensor([*range(V - 1), -1])}, "teacher_index has -1 for token 11"),
    "beyond": ({"teacher_index": torch.tensor([*range(V - 1), V])}, "teacher_index has 12 for token 11"),
    "a repeat": ({"teacher_index": torch.tensor([*range(V - 1), 3])}, "teacher_index names row 3 2 times"),
    "a short index": ({"teacher_index": torch.arange(V - 1)}, r"teacher_index must be \(12,\) integers"),
    "teacher_lse": ({"teacher_lse": torch.zeros(N + 1)}, r"teacher_lse must be \(6,\)"),
    "rows": ({"rows": torch.zeros(N)}, "rows must be bool"),
    "impl": ({"impl": "cuda"}, "impl must be one of auto, torch, triton, got 'cuda'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_remedy(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        linear_divergence(**given(**changes))


def test_unequal_precisions() -> None:
    wide = JointCase.draw(SHAPE, dtype=torch.float64)
    _, _, teacher_hidden, teacher = wide.arguments()
    with pytest.raises(ValueError, match=r"hidden is torch.float32 and teacher_hidden torch.float64: cast one"):
        linear_divergence(**given(teacher_hidden=teacher_hidden, teacher_weight=teacher))


@pytest.mark.parametrize("side", ["hidden", "teacher_hidden"])
def test_a_model_with_nan_is_named(side: str) -> None:
    inputs = given()
    inputs[side] = broken(inputs[side], 2)
    model = "student" if side == "hidden" else "teacher"
    with pytest.raises(ValueError, match=f"the {model}'s hidden has NaN or inf in row 2"):
        linear_divergence(**inputs)
    with unchecked():
        value = linear_divergence(**inputs)
    assert value[2].isnan()
    assert value[[0, 1, 3, 4, 5]].isfinite().all()


def test_a_softcap_does_not_hide_a_broken_state() -> None:
    inputs = given()
    inputs["teacher_hidden"] = broken(inputs["teacher_hidden"], 1, torch.inf)
    inputs["teacher_weight"] = replace(inputs["teacher_weight"], softcap=3.0)
    with pytest.raises(ValueError, match="the teacher's hidden has NaN or inf in row 1"):
        linear_divergence(**inputs)


@pytest.mark.parametrize(("kind", "side"), [("reverse_kl", "teacher_weight"), ("forward_kl", "weight")])
def test_an_infinite_divergence(kind: str, side: str) -> None:
    inputs = given(kind=kind)
    head: Head = inputs[side]
    assert head.bias is not None
    inputs[side] = replace(head, bias=broken(head.bias, 5, -torch.inf))
    with pytest.raises(ValueError, match=rf"{kind} is inf in row 0.*take the token out of both heads"):
        linear_divergence(**inputs)
    with unchecked():
        assert linear_divergence(**inputs).isinf().all()


@pytest.mark.parametrize("rows", [0, 1])
def test_no_token_and_one(rows: int) -> None:
    case = JointCase.draw((rows, D, WIDE, V))
    got = linear_joint(*case.arguments(), case.labels, outputs=OUTPUTS)
    assert all(x.shape == (rows,) for x in got.values())
    assert all(x.isfinite().all() for x in case.gradients(got))


def test_a_vocabulary_of_one_token() -> None:
    case = JointCase.draw((3, D, WIDE, 1))
    got = linear_joint(*case.arguments(), case.labels, outputs=("logps", "forward_kl", "jsd", "entropy"))
    for x in got.values():
        torch.testing.assert_close(x.detach(), torch.zeros(3))


def test_everything_is_ignored() -> None:
    case = JointCase.draw(SHAPE)
    got = linear_joint(*case.arguments(), torch.full((N,), -100), outputs=("logps", "jsd"))
    assert all((x == 0).all() for x in got.values())
    assert all((x == 0).all() for x in case.gradients(got))


NAMES: dict[str, tuple[dict[str, Any], str]] = {
    "a string": ({"outputs": "jsd"}, r"write outputs=\('jsd',\)"),
    "unknown": ({"outputs": ("kl",)}, r"outputs must be names among logps, .* got \['kl'\]"),
    "none": ({"outputs": ()}, "outputs must be names among"),
    "twice": ({"outputs": ("jsd", "jsd")}, "asked for twice"),
    "no labels": ({"outputs": ("logps",)}, "logps needs labels"),
    "no teacher": ({"outputs": ("jsd",), "teacher_hidden": None, "teacher_weight": None}, "jsd needs a teacher"),
    "half a teacher": ({"outputs": ("lse",), "teacher_weight": None}, "go together"),
    "a label": (
        {"outputs": ("logps",), "labels": torch.tensor([0, 1, 2, V, 4, 5])},
        r"labels out of range in row 3: \[12\]",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_cannot_be_had(name: str) -> None:
    changes, message = NAMES[name]
    with pytest.raises(ValueError, match=message):
        linear_joint(**given(**changes))
