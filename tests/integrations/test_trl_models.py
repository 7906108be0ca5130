"""Models that TVKDTrainer is given: references and teachers on the policy's base, wrapped, patched, refused."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'tvkd_fast[trl]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from tvkd_fast.integrations import patch_lm_head, unpatch_lm_head
from tvkd_fast.integrations.lm_head import is_patched
from tvkd_fast.ops import HeadGradient

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
STEPS = {"max_steps": 2, "logging_steps": 1, "learning_rate": 0.05}


def loaded(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def figures(trainer: Any, *names: str) -> list[float]:
    trainer.train()
    return [line[name] for line in trainer.state.log_history if "loss" in line for name in names]


@pytest.mark.each_once("e2e")
@pytest.mark.parametrize("wrap", [lambda base, _: base, lambda base, _: torch.compile(base, backend="eager")])
@pytest.mark.parametrize("changes", [{}, {"alpha": 0.0}])
@torch.compiler.set_stance("force_eager")
def test_a_reference_that_is_the_policys_own_base(
    make_trainer: Callable[..., Any], folders: tuple[str, str], wrap: Any, changes: Any
) -> None:
    def rewards(own_base: bool) -> list[float]:
        base = loaded(folders[0])
        torch.manual_seed(0)
        policy = get_peft_model(base, LoraConfig(**LORA))
        reference = wrap(base, policy) if own_base else loaded(folders[0])
        trainer = make_trainer(policy, folders[1], ref_model=reference, **STEPS, **changes)
        return figures(trainer, "loss", "rewards/margins")

    found, wanted = rewards(own_base=True), rewards(own_base=False)
    assert found == pytest.approx(wanted, abs=2e-5)
    assert abs(found[-1]) > 1e-3


def test_a_reference_that_would_move_is_refused(make_trainer: Callable[..., Any], folders: tuple[str, str]) -> None:
    base, other = loaded(folders[0]), loaded(folders[0])
    other.lm_head.weight = base.lm_head.weight
    with pytest.raises(ValueError, match="the reference is, or shares weights with, the model that is trained"):
        make_trainer(base, folders[1], ref_model=other)
    base = loaded(folders[0])
    policy = get_peft_model(base, LoraConfig(**LORA))
    with pytest.raises(
        ValueError, match="a PEFT model around the policy's own base, and its adapters cannot be distinguished"
    ):
        make_trainer(policy, folders[1], ref_model=get_peft_model(base, LoraConfig(**LORA), adapter_name="other"))
    base = loaded(folders[0])
    with pytest.raises(ValueError, match="the policy's own base, which TRL's head answers for once: leave ref_model"):
        make_trainer(get_peft_model(base, LoraConfig(**LORA)), None, ref_model=base, fused_head="trl")


@pytest.mark.parametrize("trained", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_base_whose_head_or_embedding_is_trained_is_its_teacher(
    make_trainer: Callable[..., Any], folders: tuple[str, str], trained: list[str]
) -> None:
    def shaping(own_base: bool) -> list[float]:
        base = loaded(folders[0])
        config = LoraConfig(**LORA, modules_to_save=trained)
        teacher = base if own_base else loaded(folders[0])
        trainer = make_trainer(base, teacher, peft_config=config, precompute_teacher=False, value_scale=50.0, **STEPS)
        return figures(trainer, "loss", "tvkd/shaping_margins")

    assert shaping(own_base=True) == pytest.approx(shaping(own_base=False), abs=2e-5)


def test_models_that_their_owner_patched_come_back_patched(
    make_trainer: Callable[..., Any], folders: tuple[str, str]
) -> None:
    ids = torch.arange(1, 9)[None]
    reference, teacher = (patch_lm_head(loaded(name), gradient=HeadGradient(grad_mode="sparse")) for name in folders)
    before = [model(ids, labels=ids, fused_lm_head=True) for model in (reference, teacher)]
    make_trainer(loaded(folders[0]), teacher, ref_model=reference, precompute_teacher=False).train()
    for model, wanted in zip((reference, teacher), before, strict=True):
        found = model(ids, labels=ids, fused_lm_head=True)
        assert type(found) is type(wanted)
        assert torch.equal(found.log_probs, wanted.log_probs)
        assert model.lm_head.gradient.grad_mode == "sparse"


@pytest.mark.parametrize("change", [unpatch_lm_head, patch_lm_head])
def test_a_policy_that_is_patched_otherwise_is_trained_all_the_same(
    make_trainer: Callable[..., Any], folders: tuple[str, str], change: Callable[[Any], Any]
) -> None:
    def steps(change: Callable[[Any], Any]) -> list[float]:
        trainer = make_trainer(loaded(folders[0]), folders[1], grad_mode="sparse", eps=1e-3, **STEPS)
        change(trainer.model)
        return figures(trainer, "loss", "tvkd/head_entries")

    assert steps(change) == steps(lambda model: model)


@pytest.fixture
def prepare() -> Iterator[Callable[[Any], Any]]:
    """Yield a function that changes a model as accelerate does after training in bfloat16."""
    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    yield lambda model: accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    reset(reset_partial_state=True)


def test_a_teacher_that_was_trained_in_mixed_precision(
    make_trainer: Callable[..., Any], folders: tuple[str, str], prepare: Callable[[Any], Any]
) -> None:
    options = {"bf16": True, "precompute_teacher": False, "value_scale": 50.0}
    shaping = [
        figures(make_trainer(loaded(folders[0]), teacher, **options, **STEPS), "tvkd/shaping_margins")
        for teacher in (prepare(loaded(folders[1])), loaded(folders[1]))
    ]
    assert shaping[0] == shaping[1]


@torch.compiler.set_stance("force_eager")
def test_a_compiled_teacher_and_its_reference(make_trainer: Callable[..., Any], folders: tuple[str, str]) -> None:
    def shaping(wrap: Callable[[Any], Any]) -> list[float]:
        teacher, before = (wrap(loaded(name)) for name in reversed(folders))
        options = {"teacher_reference": before, "value_from": "implicit_reward"}
        return figures(make_trainer(loaded(folders[0]), teacher, **options, **STEPS), "tvkd/shaping_margins")

    assert shaping(lambda model: torch.compile(model, backend="eager")) == shaping(lambda model: model)
    adapted = get_peft_model(loaded(folders[1]), LoraConfig(**LORA))
    for given in ({"teacher": adapted}, {"teacher": folders[1], "teacher_reference": adapted}):
        with pytest.raises(
            ValueError, match="is a PeftModel, which is no transformers model: of a PEFT model give what its m"
        ):
            make_trainer(loaded(folders[0]), **given, value_from="implicit_reward")


def state_of(model: Any) -> list[Any]:
    return [
        (name, type(x), x.training, sorted(vars(x)), list(x._forward_hooks), list(x._forward_pre_hooks))
        for name, x in model.named_modules()
    ] + [(name, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)])
def test_nothing_stays_changed_when_a_trainer_is_refused(
    make_trainer: Callable[..., Any], folders: tuple[str, str], tiny_model: Callable[..., Any], peft_config: Any
) -> None:
    models = [loaded(folders[0]).train(), loaded(folders[1]).train(), tiny_model(2, vocab_size=100).train()]
    models[0].model.layers[0].eval()
    models[0].model.norm.weight.requires_grad_(False)
    before = [state_of(model) for model in models]
    policy, reference, teacher = models
    with pytest.raises(ValueError, match="the teacher has 100 tokens"):
        make_trainer(policy, teacher, ref_model=reference, peft_config=peft_config)
    assert [state_of(model) for model in models] == before
    assert not is_patched(policy)


def test_a_routers_loss_is_that_of_trls_head(make_trainer: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=262, num_key_value_heads=2, num_local_experts=4, **sizes)

    def mixture() -> Any:
        return tiny_model(0, copy.deepcopy(config))

    def steps(head: str) -> list[float]:
        options = {"fused_head": head, "router_aux_loss_coef": 0.5, "ref_model": mixture()}
        return figures(make_trainer(mixture(), None, **options, **STEPS), "loss", "aux_loss", "grad_norm")

    assert steps("tvkd") == pytest.approx(steps("trl"), rel=1e-4)
