"""A patched model in the forms that other code makes of it: copies, pickles, wrappers, new heads, hooks."""

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaForCausalLM, MixtralConfig, T5Config, T5ForConditionalGeneration

from tvkd_fast.integrations import FusedLMOutput, patch_lm_head, unpatch_lm_head
from tvkd_fast.integrations.lm_head import is_patched
from tvkd_fast.models import FusedLMHead

IDS = torch.randint(1, 262, (2, 8), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(8) < 3, -100)


def own_logps(model: Any) -> torch.Tensor:
    """Return log-probabilities in float64, from the logits of a plain call."""
    logps = model(input_ids=IDS).logits.double()[:, :-1].log_softmax(-1)
    found = logps.gather(2, LABELS[:, 1:].clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(LABELS[:, 1:] == -100, 0).detach()


def answers(model: Any, tolerance: float = 1e-5) -> None:
    """The fused answer is that of the model's own logits."""
    out = model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    assert type(out) is FusedLMOutput
    assert float((out.log_probs.detach() - own_logps(model)).abs().max()) < tolerance


def answers_for_itself(model: Any, tolerance: float = 1e-5) -> None:
    """Its logits are those of a model that was made of its weights."""
    answers(model, tolerance)
    other = LlamaForCausalLM(model.config).train(model.training)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=0, atol=tolerance)


def train_on(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model(0)


@pytest.fixture
def bf16() -> Iterator[accelerate.Accelerator]:
    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    reset(reset_partial_state=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_answers_for_itself(model: Any, duplicate: Callable[[Any], Any]) -> None:
    other = duplicate(duplicate(patch_lm_head(model)))
    train_on(model)
    answers_for_itself(other)
    unpatch_lm_head(model)
    answers_for_itself(other)
    unpatch_lm_head(other)
    assert "forward" not in vars(other)
    assert type(other.lm_head) is nn.Linear
    assert "forward" not in vars(duplicate(other))


def test_an_average_of_weights_answers_for_itself(model: Any) -> None:
    average = AveragedModel(patch_lm_head(model))
    train_on(model)
    answers_for_itself(average.module)
    unpatch_lm_head(average)
    assert is_patched(model)


@pytest.mark.parametrize("patched_first", [True, False])
def test_mixed_precision_is_put_on_and_taken_off(model: Any, bf16: accelerate.Accelerator, patched_first: bool) -> None:
    if patched_first:
        prepared = bf16.prepare(patch_lm_head(model))
    else:
        prepared = bf16.prepare(model)
        before = prepared(IDS).logits
        patch_lm_head(prepared)
        assert torch.equal(prepared(IDS).logits, before)
    # What bfloat16 products leave of it, and no float32 ones.
    answers(prepared, 5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.base_model(IDS).last_hidden_state
        wanted = model.lm_head(rounded).float()
    torch.testing.assert_close(prepared(IDS).logits, wanted)
    other = copy.deepcopy(prepared)
    plain = bf16.unwrap_model(prepared, keep_fp32_wrapper=False)
    answers_for_itself(plain)
    train_on(plain)
    answers(other, 5e-2)
    torch.testing.assert_close(other(IDS).logits, wanted)
    answers_for_itself(pickle.loads(pickle.dumps(plain)))
    unpatch_lm_head(plain)
    assert not is_patched(plain)


def test_a_model_unpatched_under_a_wrapper_keeps_the_wrapper(model: Any, bf16: accelerate.Accelerator) -> None:
    before = bf16.prepare(model)(IDS).logits
    unpatch_lm_head(patch_lm_head(model))
    assert torch.equal(model(IDS).logits, before)
    answers(patch_lm_head(model), 5e-2)


@torch.compiler.set_stance("force_eager")
def test_compiled_before_or_after(model: Any) -> None:
    compiled = torch.compile(model, backend="eager")
    assert patch_lm_head(compiled) is compiled  # type: ignore[type-var]
    answers(compiled)
    answers(model)
    # Either handle may be all that somebody has.
    unpatch_lm_head(compiled)  # type: ignore[type-var]
    unpatch_lm_head(model)
    assert not hasattr(compiled(IDS, labels=LABELS), "log_probs")
    with pytest.raises(ValueError, match="there is nothing to undo"):
        unpatch_lm_head(model)
    patch_lm_head(model)
    answers(torch.compile(model, backend="eager"))


@pytest.mark.slow
def test_compiled_graphs_are_the_patched_models(model: Any) -> None:
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(IDS)
    patch_lm_head(compiled)  # type: ignore[type-var]
    graphs.clear()
    answers(compiled)
    assert graphs
    unpatch_lm_head(compiled)  # type: ignore[type-var]
    assert not hasattr(compiled(IDS, labels=LABELS), "log_probs")


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_vocabulary_and_a_new_head(tiny_model: Callable[..., Any], tied: bool) -> None:
    model = patch_lm_head(tiny_model(0, tie_word_embeddings=tied))
    model.resize_token_embeddings(270)
    answers_for_itself(model)
    model.set_output_embeddings(nn.Linear(32, 270))
    answers(model)
    unpatch_lm_head(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.out_features == model.lm_head.weight.shape[0]


@pytest.mark.filterwarnings("ignore:no fused head is in place")
@pytest.mark.parametrize("changes", [{"lora_dropout": 0.3}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_peft_puts_on_a_patched_head(model: Any, changes: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
    targets = ["q_proj"] if "modules_to_save" in changes else ["q_proj", "lm_head"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **changes)
    adapted = peft.get_peft_model(patch_lm_head(model), config).eval()
    train_on(adapted)
    answers(adapted)
    adapted(IDS, labels=LABELS, fused_lm_head=True).loss.backward()
    fused = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    adapted(IDS, labels=LABELS).loss.backward()
    for name, gradient in fused.items():
        torch.testing.assert_close(adapted.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    with adapted.disable_adapter():
        answers(adapted)
    unpatch_lm_head(adapted)
    assert not is_patched(model)


def test_a_head_that_its_own_hooks_cast(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(0, tie_word_embeddings=False).to(torch.bfloat16)
    model.lm_head.float()
    with pytest.raises(ValueError, match="cannot be called with input_ids and labels as it is"):
        patch_lm_head(model)
    assert type(model.lm_head) is nn.Linear
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    answers(patch_lm_head(model))
    assert len(seen) > 2


def test_offloaded_before_or_after(tiny_model: Callable[..., Any]) -> None:
    for patched_first in (True, False):
        model = tiny_model(0, tie_word_embeddings=False)
        before = own_logps(model)
        steps = [lambda m: accelerate.cpu_offload(m, execution_device="cpu"), patch_lm_head]
        for step in reversed(steps) if patched_first else steps:
            step(model)
        assert model.lm_head.weight.is_meta
        answers(model)
        unpatch_lm_head(model)
        torch.testing.assert_close(own_logps(model), before)
        patch_lm_head(model)
        remove_hook_from_module(model, recurse=True)
        answers_for_itself(model)
        unpatch_lm_head(model)
        torch.testing.assert_close(own_logps(model), before)


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    """A group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_sharded_before_or_after(
    tiny_model: Callable[..., Any], alone: DeviceMesh, precision: torch.dtype | None
) -> None:
    policy = MixedPrecisionPolicy(param_dtype=precision)

    def shard(model: Any) -> None:
        for unit in (model.lm_head, model):
            fully_shard(unit, mesh=alone, mp_policy=policy)

    for steps in ([patch_lm_head, shard], [shard, patch_lm_head]):
        model, other = (tiny_model(0, tie_word_embeddings=False) for _ in range(2))
        for step in steps:
            step(model)
        answers(model, 1e-5 if precision is None else 5e-2)
        model(IDS, labels=LABELS, fused_lm_head=True).loss.backward()
        other(IDS, labels=LABELS).loss.backward()
        for own, wanted in zip(model.parameters(), other.parameters(), strict=True):
            error = (own.grad.full_tensor() - wanted.grad).norm() / wanted.grad.norm()
            assert error < (1e-5 if precision is None else 0.1)
        unpatch_lm_head(model)
        assert not isinstance(model.lm_head, FusedLMHead)
        assert isinstance(model.lm_head, FSDPModule)
        assert model(IDS).logits is not None


def test_a_model_without_weights_is_patched_and_not_asked(model: Any) -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config)
    drawn = torch.get_rng_state()
    patch_lm_head(empty)
    assert torch.equal(torch.get_rng_state(), drawn)
    with pytest.raises(ValueError, match="load them before it is asked"):
        empty(IDS, labels=LABELS, fused_lm_head=True)
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    # Its rotary table is no part of a state dict.
    empty.model.rotary_emb = model.model.rotary_emb
    answers(empty)


def test_arguments_that_change_the_loss(tiny_model: Callable[..., Any], model: Any) -> None:
    patch_lm_head(model)
    shifted = IDS.roll(-2, 1).masked_fill(torch.arange(8) > 5, -100)
    for given in (
        {"labels": LABELS, "shift_labels": shifted},
        {"labels": LABELS, "num_items_in_batch": torch.tensor(7)},
        {"labels": LABELS.clamp(min=0), "ignore_index": 0},
    ):
        torch.testing.assert_close(model(IDS, **given, fused_lm_head=True).loss, model(IDS, **given).loss)
    with pytest.raises(ValueError, match="mask labels by -100 instead"):
        model(IDS, labels=LABELS, logits_to_keep=2, fused_lm_head=True)


def test_calls_by_position_without_labels_and_for_a_tuple(model: Any) -> None:
    patch_lm_head(model)
    wanted = model(IDS, labels=LABELS, fused_lm_head=True)
    places = list(inspect.signature(model.forward).parameters)
    assert torch.equal(
        model(*[{"input_ids": IDS, "labels": LABELS}.get(name) for name in places[:6]], fused_lm_head=True).log_probs,
        wanted.log_probs,
    )
    assert model(IDS, fused_lm_head=True).logits is not None
    loss, log_probs, _ = model(IDS, labels=LABELS, fused_lm_head=True, return_dict=False)
    assert torch.equal(log_probs, wanted.log_probs)
    assert torch.equal(loss, wanted.loss)
    with pytest.raises(TypeError, match="input_ids twice"):
        model(IDS, input_ids=IDS, labels=LABELS, fused_lm_head=True)


def test_a_config_that_asks_for_tuples(tiny_model: Callable[..., Any], model: Any) -> None:
    odd = patch_lm_head(tiny_model(0, return_dict=False))
    assert odd.config.return_dict is False
    patch_lm_head(model)
    assert torch.equal(odd(IDS, labels=LABELS, fused_lm_head=True)[1], model(IDS, labels=LABELS, fused_lm_head=True)[1])


def test_a_routers_loss_is_added(tiny_model: Callable[..., Any]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_model(0, MixtralConfig(vocab_size=262, num_key_value_heads=2, **sizes)).eval()
    patch_lm_head(model)
    given = {"labels": LABELS, "attention_mask": torch.ones_like(IDS)}
    for router in (False, True):
        out = model(IDS, **given, output_router_logits=router, fused_lm_head=True)
        torch.testing.assert_close(out.loss, model(IDS, **given, output_router_logits=router).loss)
        assert (out.aux_loss is not None) is router
    model.config.output_router_logits = True
    torch.testing.assert_close(model(IDS, **given, fused_lm_head=True).loss, model(IDS, **given).loss)
    patch_lm_head(model)


def test_it_stays_what_it_was(model: Any, tmp_path: Any) -> None:
    kind, signature = type(model), inspect.signature(model.forward)
    patch_lm_head(model)
    assert type(model) is kind
    assert inspect.signature(model.forward) == signature
    model.save_pretrained(tmp_path)
    read = kind.from_pretrained(tmp_path)
    assert not is_patched(read)
    assert read.config.architectures == [kind.__name__]
    torch.testing.assert_close(read.eval()(IDS).logits, model.eval()(IDS).logits)


def test_patching_under_autocast(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        patch_lm_head(model)
    answers(model)


def scaled(model: Any) -> None:
    def scale(_: Any, args: Any, out: Any) -> None:
        if "logits" in out:
            out.logits = out.logits * 1.3

    model.register_forward_hook(scale)


def other_loss(model: Any) -> None:
    model.loss_function = lambda logits, labels, **_: logits.sum()


def changed_by_a_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _, args, out: out * 0.5)


def replaced(model: Any) -> None:
    model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.T


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled, "transforms its logits in a way"),
        (other_loss, "has a loss of its own"),
        (changed_by_a_hook, r"Its head has hooks \(changed_by_a_hook"),
        (replaced, "the head's forward was replaced"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_nothing_stays_changed_when_it_is_refused(
    model: Any, change: Callable[[Any], None], message: str, before: bool
) -> None:
    if before:
        patch_lm_head(model)
    change(model)
    model.train().model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    carried, of_head, kind = dict(vars(model)), dict(vars(model.lm_head)), type(model.lm_head)
    hooks = dict(model.lm_head._forward_pre_hooks)
    drawn = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        patch_lm_head(model)
    assert vars(model) == carried
    assert vars(model.lm_head) == of_head
    assert type(model.lm_head) is kind
    assert model.lm_head._forward_pre_hooks == hooks
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear is no transformers model"):
        patch_lm_head(nn.Linear(2, 2))
    with torch.device("meta"):
        other = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=2, d_ff=8, num_layers=1, num_heads=1))
    with pytest.raises(ValueError, match="is no causal language model"):
        patch_lm_head(other)


def test_a_forward_of_the_instances_own_stays_beneath(model: Any) -> None:
    calls, before = [], model.forward

    def forward(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return before(*args, **options)

    model.forward = forward
    patch_lm_head(model)
    calls.clear()
    model(IDS)
    assert calls == [1]
    answers(model)
    # Somebody's that wraps ours in turn, and says nothing of it.
    model.forward = lambda *args, _of=model.forward, **options: _of(*args, **options)
    answers(patch_lm_head(model))
    unpatch_lm_head(model)
    assert model(IDS).logits is not None
