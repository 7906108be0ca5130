"""The refusals of the ops, whose messages give the reason and the remedy."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from tvkd_fast.ops import linear_logps, linear_lse, linear_soft_values, soft_values

N, D, V = 12, 6, 30


def logps(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return linear_logps(hidden, weight, torch.zeros(len(hidden), dtype=torch.int64), **options)


OPS: tuple[Callable[..., Any], ...] = (logps, linear_lse, linear_soft_values)
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(N)


@every_op
def test_sizes_of_different_models(op: Callable[..., Any], hidden: Tensor) -> None:
    with pytest.raises(ValueError, match="hidden has size 6 and weight 8: they are not of the same model"):
        op(hidden, torch.zeros(V, 8))


@every_op
def test_a_transposed_weight(op: Callable[..., Any], hidden: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"or the weight is transposed \(\[V, D\] is wanted\)"):
        op(hidden, weight.T)


@every_op
def test_a_layer_in_place_of_its_weight(op: Callable[..., Any], hidden: Tensor) -> None:
    with pytest.raises(ValueError, match=r"weight is a Linear, and a tensor is wanted: of a head give lm_head\.weight"):
        op(hidden, torch.nn.Linear(6, 30))


@every_op
def test_padded_hidden_states(op: Callable[..., Any], hidden: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"got \(3, 4, 6\) and \(30, 6\): flatten batch and time first"):
        op(hidden.view(3, 4, D), weight)


@every_op
@pytest.mark.parametrize("shape", [(0, D), (V, 0)])
def test_an_empty_weight(op: Callable[..., Any], shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="weight is empty"):
        op(torch.zeros(N, shape[1]), torch.zeros(shape))


@every_op
def test_dtypes_that_differ(op: Callable[..., Any], hidden: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"hidden is torch.float32 and weight torch.bfloat16: cast one of them"):
        op(hidden, weight.bfloat16())
    with pytest.raises(ValueError, match=r"hidden is torch.float32 and bias torch.float64: cast one of them"):
        op(hidden, weight, bias=torch.zeros(V).double())


@every_op
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_without_a_meaning(op: Callable[..., Any], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"hidden is {dtype}; float16, bfloat16, float32 or float64 is wanted"):
        op(torch.zeros(N, D, dtype=dtype), torch.zeros(V, D, dtype=dtype))


@every_op
def test_devices_that_differ(op: Callable[..., Any], hidden: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match="hidden is on cpu and weight on meta: move one of them"):
        op(hidden, weight.to("meta"))
    with pytest.raises(ValueError, match="hidden is on cpu and bias on meta: move one of them"):
        op(hidden, weight, bias=torch.zeros(V, device="meta"))


def test_labels_on_another_device(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="hidden is on cpu and labels on meta: move one of them"):
        linear_logps(hidden, weight, labels.to("meta"))


@every_op
@pytest.mark.parametrize("shape", [(V - 1,), (V, 1), (1,)])
def test_a_bias_of_another_shape(
    op: Callable[..., Any], hidden: Tensor, weight: Tensor, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"bias must be \(30,\), one a vocabulary row, got"):
        op(hidden, weight, bias=torch.zeros(shape))


@every_op
@pytest.mark.parametrize("softcap", [0.0, -30.0, float("nan"), float("inf")])
def test_a_softcap_that_caps_nothing(op: Callable[..., Any], hidden: Tensor, weight: Tensor, softcap: float) -> None:
    with pytest.raises(ValueError, match="softcap must be a positive number or None"):
        op(hidden, weight, softcap=softcap)


@every_op
@pytest.mark.parametrize("logit_scale", [0.0, float("nan"), float("inf")])
def test_a_logit_scale_without_logits(
    op: Callable[..., Any], hidden: Tensor, weight: Tensor, logit_scale: float
) -> None:
    with pytest.raises(ValueError, match="logit_scale must be finite and not 0"):
        op(hidden, weight, logit_scale=logit_scale)


@every_op
def test_implementations_that_there_are_not(
    op: Callable[..., Any], hidden: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvkd_fast.kernels.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"CUDA or ROCm tensors, not cpu.*take impl='torch'.*TRITON_INTERPRET=1"):
        op(hidden, weight, impl="triton")
    with pytest.raises(ValueError, match="impl must be one of auto, torch, triton, got 'cuda'"):
        op(hidden, weight, impl="cuda")


@pytest.mark.parametrize("op", [linear_lse, linear_soft_values])
@pytest.mark.parametrize("kappa", [0.0, -1.0, float("nan"), float("inf")])
def test_a_kappa_that_is_no_temperature(op: Callable[..., Any], hidden: Tensor, weight: Tensor, kappa: float) -> None:
    with pytest.raises(ValueError, match="kappa must be a positive number"):
        op(hidden, weight, kappa=kappa)
    with pytest.raises(ValueError, match="kappa must be a positive number"):
        soft_values(torch.zeros(3), torch.zeros(3), kappa=kappa)


def test_an_unknown_kind_of_value(hidden: Tensor, weight: Tensor) -> None:
    unknown: Any = "probs"
    with pytest.raises(ValueError, match="value_from must be 'logits' or 'logprobs', got 'probs'"):
        linear_soft_values(hidden, weight, value_from=unknown)
    with pytest.raises(ValueError, match="value_from must be 'logits' or 'logprobs', got 'probs'"):
        soft_values(torch.zeros(3), torch.zeros(3), value_from=unknown)


@pytest.mark.parametrize("label", [V, -1, -101, 2**40])
def test_a_label_outside_the_vocabulary(hidden: Tensor, weight: Tensor, labels: Tensor, label: int) -> None:
    labels[7] = label
    with pytest.raises(ValueError, match=rf"labels out of range in row 7: \[{label}\] not in \[0, 30\) and not ignore"):
        linear_logps(hidden, weight, labels)


def test_many_labels_outside_the_vocabulary(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    shown = r"labels out of range in rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more: \[100, 101, 102, 103, 104, 105, 106, 107\]"
    with pytest.raises(ValueError, match=shown + ".*does the tokenizer belong to this model"):
        linear_logps(hidden, weight, labels + 100)


@pytest.mark.parametrize("shape", [(N - 1,), (N + 1,), (N, 1), (3, 4), ()])
def test_labels_that_do_not_fit(hidden: Tensor, weight: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"labels must be \(12,\), one per row of hidden.*shifted already"):
        linear_logps(hidden, weight, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16], ids=str)
def test_labels_that_are_no_token_ids(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"labels are {dtype}; int64 token ids are wanted"):
        linear_logps(hidden, weight, torch.zeros(N, dtype=dtype))


@every_op
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_hidden_states_that_are_not_finite(
    op: Callable[..., Any], hidden: Tensor, weight: Tensor, value: float, softcap: float | None
) -> None:
    hidden[3, 2] = value
    with pytest.raises(ValueError, match="hidden has NaN or inf in row 3: the forward pass that made it overflowed"):
        op(hidden, weight, softcap=softcap)
    hidden[[5, 9], 0] = value
    with pytest.raises(ValueError, match="hidden has NaN or inf in rows 3, 5, 9: "):
        op(hidden, weight, softcap=softcap)
    with pytest.raises(ValueError, match="hidden has NaN or inf in rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more: "):
        op(torch.full_like(hidden, value), weight, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_states_of_any_dtype_are_looked_at(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    hidden[3, 2] = torch.inf
    with pytest.raises(ValueError, match="hidden has NaN or inf in row 3: "):
        logps(hidden.to(dtype), weight.to(dtype))


def test_an_infinity_that_no_product_turns_into_nan() -> None:
    with pytest.raises(ValueError, match="hidden has NaN or inf in row 0: "):
        logps(torch.full((1, 1), torch.inf), torch.ones(5, 1), softcap=2.0)


@every_op
def test_a_weight_that_is_not_finite(op: Callable[..., Any], hidden: Tensor, weight: Tensor) -> None:
    weight[17] = torch.nan
    with pytest.raises(ValueError, match="weight has NaN or inf in row 17: "):
        op(hidden, weight)


@every_op
def test_a_bias_that_is_not_finite(op: Callable[..., Any], hidden: Tensor, weight: Tensor) -> None:
    bias = torch.zeros(V)
    bias[4] = torch.nan
    with pytest.raises(ValueError, match="bias has NaN or inf in row 4: "):
        op(hidden, weight, bias=bias)
    bias[4] = torch.inf
    with pytest.raises(ValueError, match="bias has NaN or inf in row 4: "):
        op(hidden, weight, bias=bias)


def test_a_bias_that_takes_every_token_out(hidden: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match="bias is -inf everywhere: a head has at least one token"):
        logps(hidden, weight, bias=torch.full((V,), -torch.inf))


def test_finite_inputs_whose_logits_overflow(hidden: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match="the head's logits overflow although hidden and weight are finite"):
        logps(hidden * 1e30, weight * 1e30)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_op
@pytest.mark.usefixtures("one_process")
def test_a_sharded_head_belongs_into_its_module(op: Callable[..., Any], hidden: Tensor, weight: Tensor) -> None:
    mesh = init_device_mesh("cpu", (1,))
    sharded = distribute_tensor(weight, mesh, [Replicate()])
    assert isinstance(sharded, DTensor)
    with pytest.raises(ValueError, match=r"weight is a DTensor: .*Call FusedLMHead\(hidden, labels\)"):
        op(hidden, sharded)
    with pytest.raises(ValueError, match="hidden is a DTensor"):
        op(distribute_tensor(hidden, mesh, [Replicate()]), weight)
