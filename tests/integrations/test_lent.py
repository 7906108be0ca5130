"""Teachers and references that are lent: what they are asked, and that they come back as they were."""

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'tvkd_fast[trl]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tvkd_fast.integrations import patch_lm_head
from tvkd_fast.integrations.teacher import ShapingSettings, TeacherReturns
from tvkd_fast.models.lent import adapters_off, dropouts, undone

ROWS = torch.randint(3, 262, (4, 9), generator=torch.Generator().manual_seed(0))
COMPLETIONS = torch.arange(9).expand(4, 9) > 4
ENDED = torch.ones(len(ROWS), dtype=torch.bool)


def settings(value_from: Any = "logits") -> ShapingSettings:
    return ShapingSettings(gamma=0.9, kappa=1.0, value_scale=1.0, value_from=value_from, terminal="last_content")


def state_of(model: Any) -> dict[str, Any]:
    """All that a caller may look at."""
    head = model.get_output_embeddings()
    return {
        "carried": dict(vars(model)),
        "head": (head, type(head), dict(vars(head)), dict(head._forward_hooks)),
        "modes": {name: (x.training, dropouts(x)) for name, x in model.named_modules()},
        "grads": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
    }


@pytest.fixture
def lent(tiny_model: Callable[..., Any]) -> Any:
    """A model that its owner is about to train on: modes, gradients and hooks of all kinds."""
    model = tiny_model(1, attention_dropout=0.1).train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.register_forward_hook(lambda *_: None)
    model(ROWS, labels=ROWS).loss.backward()
    return model


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("value_from", ["logits", "implicit_reward"])
def test_it_comes_back_as_it_was(tiny_model: Callable[..., Any], lent: Any, value_from: Any, patched: bool) -> None:
    if patched:
        patch_lm_head(lent)
    before = state_of(lent)
    reference = tiny_model(2) if value_from == "implicit_reward" else None
    returns = TeacherReturns(lent, reference, settings(value_from))
    assert state_of(lent) == before
    psi = returns.of(ROWS, COMPLETIONS, ENDED)
    assert state_of(lent) == before
    other = tiny_model(1).eval()
    wanted = TeacherReturns(other, reference, settings(value_from)).of(ROWS, COMPLETIONS, ENDED)
    assert torch.equal(psi, wanted)
    # It may be trained between two batches, by whoever lent it.
    lent(ROWS, labels=ROWS).loss.backward()


def test_an_offloaded_teacher_is_asked(tiny_model: Callable[..., Any]) -> None:
    wanted = TeacherReturns(tiny_model(1), None, settings()).of(ROWS, COMPLETIONS, ENDED)
    teacher = tiny_model(1)
    accelerate.cpu_offload(teacher, execution_device="cpu")
    returns = TeacherReturns(teacher, None, settings())
    torch.testing.assert_close(returns.of(ROWS, COMPLETIONS, ENDED), wanted)
    assert teacher(ROWS).logits is not None


def test_it_comes_back_from_a_refusal(lent: Any) -> None:
    def scale(_: Any, args: Any, out: Any) -> None:
        out.logits = out.logits * 1.5

    lent.register_forward_hook(scale)
    before = state_of(lent)
    with pytest.raises(ValueError, match="transforms its logits in a way"):
        TeacherReturns(lent, None, settings())
    assert state_of(lent) == before


def test_what_is_undone(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(0).train()
    before = state_of(model)
    with undone(model, on_error=True):
        model.model.eval()
    assert not model.model.training
    model.train()

    def fail() -> None:
        with undone(model, on_error=True):
            model.eval().requires_grad_(False)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert state_of(model) == before


def test_adapters_are_off_for_a_while(tiny_model: Callable[..., Any]) -> None:
    base = tiny_model(0).eval()
    wanted = base(ROWS).logits
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        base.model.norm.modules_to_save["default"].weight.add_(1.0)
    with adapters_off(base):
        torch.testing.assert_close(adapted(ROWS).logits, wanted)
    assert not torch.allclose(adapted(ROWS).logits, wanted)
    with adapted.disable_adapter():
        with adapters_off(base):
            pass
        torch.testing.assert_close(adapted(ROWS).logits, wanted)


def loaded(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("precomputed", [True, False])
def test_a_policys_own_base_is_its_teacher(
    make_trainer: Callable[..., Any], folders: tuple[str, str], precomputed: bool
) -> None:
    base = loaded(folders[0])
    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(base, base, peft_config=config, precompute_teacher=precomputed, learning_rate=0.5)
    trainer.train()
    learned = [p for p in trainer.model.parameters() if p.requires_grad]
    assert learned
    assert all(p.abs().sum() > 0 for p in learned)
    other = TeacherReturns(loaded(folders[0]), None, trainer._teacher.settings)
    # What it says does not move with the adapters.
    assert torch.equal(trainer._teacher.of(ROWS, COMPLETIONS, ENDED), other.of(ROWS, COMPLETIONS, ENDED))


def test_a_reference_comes_back_as_it_was(make_trainer: Callable[..., Any], folders: tuple[str, str]) -> None:
    reference = loaded(folders[0])
    before = state_of(reference)
    trainer = make_trainer(loaded(folders[0]), folders[1], ref_model=reference)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    after = state_of(reference)
    # accelerate's own mark.
    assert after["carried"].pop("_is_accelerate_prepared") is True
    assert after == before
    # It may be the teacher, too.
    make_trainer(loaded(folders[0]), reference, ref_model=reference, precompute_teacher=False).train()


def test_a_teacher_that_would_move_is_refused(make_trainer: Callable[..., Any], folders: tuple[str, str]) -> None:
    base, teacher = loaded(folders[0]), loaded(folders[1])
    with pytest.raises(ValueError, match="shares weights with, the model that is trained"):
        make_trainer(base, base)
    teacher.model.embed_tokens.weight = base.model.embed_tokens.weight
    with pytest.raises(ValueError, match="shares weights with, the model that is trained"):
        make_trainer(base, teacher)


def test_nothing_to_train_is_refused(make_trainer: Callable[..., Any], folders: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="nothing would be learned"):
        make_trainer(loaded(folders[0]).requires_grad_(False), loaded(folders[1]))


def test_a_trainers_policy_is_copied_with_its_own_weights(
    make_trainer: Callable[..., Any], folders: tuple[str, str]
) -> None:
    """TRL's own head, which this library's stands in place of, is a closure over the policy."""
    policy = patch_lm_head(loaded(folders[0]))
    trainer = make_trainer(policy, loaded(folders[1]))
    other = copy.deepcopy(trainer.model).eval()
    before = other(ROWS).logits
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(other(ROWS).logits, before)


@torch.compiler.set_stance("force_eager")
@pytest.mark.parametrize("changes", [{}, {"precompute_ref_log_probs": True}])
def test_compiled_models_are_asked(make_trainer: Callable[..., Any], folders: tuple[str, str], changes: Any) -> None:
    def steps(**more: Any) -> Any:
        trainer = make_trainer(loaded(folders[0]), folders[1], logging_steps=1, **changes, **more)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    # A head that is not compiled makes its gradient in the forward, whose sums are rounded otherwise.
    assert steps(torch_compile=True, torch_compile_backend="eager") == pytest.approx(steps(), rel=1e-6)
