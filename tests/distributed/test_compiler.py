"""Blocks through torch.compile: the same numbers to rounding, and a refusal where nothing compiles."""

import copy
import shutil
import sysconfig

import pytest
import torch

from tvkd_fast.commands.refusals import check_device
from tvkd_fast.commands.train import train
from tvkd_fast.data import TokenizedPair, collate_packed, collate_pairs
from tvkd_fast.distributed import check_compiler, compile_blocks
from tvkd_fast.distributed.recompute import checkpoint_activations
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.settings import ModelConfig

CPU = torch.device("cpu")
PAIRS = [
    TokenizedPair([5, 6, 7], [8, 9, 2], [10, 2], True, True, "row 0"),
    TokenizedPair([11, 12], [13, 2], [14, 15, 16, 17, 2], True, True, "row 1"),
    TokenizedPair([31, 32, 33, 34, 35, 36, 37], [38, 39], [40, 41, 42], True, False, "row 2"),
]


@pytest.fixture
def has_compiler():
    try:
        check_compiler(CPU)
    except ValueError as why:
        pytest.skip(str(why))
    torch._dynamo.reset()


def gradients(policy, batch):
    """(N,) log-probabilities, and the gradients of their weighted sum by name."""
    logps = policy(batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return logps.detach(), found


def check_same(one, other):
    torch.testing.assert_close(other[0], one[0], rtol=1e-5, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert (other[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("family", "packing"), [("tied", "shared"), ("gemma2", "shared"), ("tied", "padded")])
def test_a_compiled_policy_has_the_same_gradients_in_batches_of_any_shape(
    family, packing, recompute, tiny_model, family_config, has_compiler
):
    model = tiny_model(config=family_config(family))
    plain = PolicyWithHead(copy.deepcopy(model), packing=packing)
    compiled = PolicyWithHead(model, packing=packing)
    checkpoint_activations(compiled, recompute)
    compile_blocks(compiled)
    compiled.train()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for rows, stance in (([0, 1, 2], "default"), ([1, 0], "fail_on_recompile"), ([0, 1, 2, 0, 2], "fail_on_recompile")):
        pairs = [PAIRS[row] for row in rows]
        batch = collate_pairs(pairs, rows) if packing == "padded" else collate_packed(pairs, rows)
        with torch.compiler.set_stance(stance):
            got = gradients(compiled, batch)
        check_same(gradients(plain, batch), got)


@pytest.mark.slow
def test_a_run_is_the_same_to_rounding(make_config, files, has_compiler):
    """Its reference is a copy of the policy at its start, and compiled as well."""
    found = {}
    for compiled in (False, True):
        config = make_config(output_dir=str(files / f"compiled-{compiled}"), max_steps=3, objective="dpo", eval_every=3)
        config.model.compile = compiled
        found[compiled] = train(config, show_progress=False).loss
    assert found[True] == pytest.approx(found[False], rel=1e-5)


def test_without_a_compiler_a_run_is_refused(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"and (g|clang)\+\+ is not here.*CXX.*leave --model\.compile"):
        check_device(ModelConfig(compile=True, device="cpu"))
    check_device(ModelConfig(device="cpu"))


def test_another_compiler_can_be_named(monkeypatch):
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true" if name == "my-compiler" else None)
    check_compiler(CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="no-such-compiler is not here"):
        check_compiler(CPU)


def test_without_pythons_headers_a_run_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"no Python\.h: install python3-dev"):
        check_compiler(CPU)


def test_a_gpu_needs_triton_and_a_c_compiler(monkeypatch):
    monkeypatch.setattr("tvkd_fast.distributed.compiler.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        check_compiler(torch.device("cuda"))
    monkeypatch.setattr("tvkd_fast.distributed.compiler.find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="or name another in CC"):
        check_compiler(torch.device("cuda"))


def test_a_family_that_names_no_blocks_is_refused(tiny_model, monkeypatch):
    policy = PolicyWithHead(tiny_model())
    monkeypatch.setattr(policy.model, "_no_split_modules", [])
    with pytest.raises(ValueError, match=r"does not say what its blocks are.*leave --model\.compile out"):
        compile_blocks(policy)
