import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it as it is imported, which transformers does.
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from tvkd_fast.fused import known_op
from tvkd_fast.ops import linear_logps, logps, reference, sparse_logps, values

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>"]

pytest_plugins = ("runs", "scored")

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
COLLECTED = pytest.StashKey[dict[str, frozenset[str]]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what `each_once` leaves to later tiers, and notes all that was found before any of it is left out."""
    of_a_function: dict[Any, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("each_once"):
            of_a_function.setdefault((item.parent, item.originalname), []).append(item)
    for cases in of_a_function.values():
        mark_all_but_each_once(cases)
    config.stash[COLLECTED] = {item.nodeid: frozenset(mark.name for mark in item.iter_markers()) for item in items}


def mark_all_but_each_once(cases: list[pytest.Function]) -> None:
    """Gives `each_once`'s mark to all but the cases on the diagonal, where every parameter's values come by in turn."""
    # As they were written, whatever order they are to run in.
    cases = sorted(cases, key=lambda case: tuple(case.callspec.indices.values()))
    shown = [{name: repr(value) for name, value in case.callspec.params.items()} for case in cases]
    values = {name: list(dict.fromkeys(one[name] for one in shown)) for name in shown[0]}
    longest = max(len(own) for own in values.values())
    diagonal = [{name: own[i % len(own)] for name, own in values.items()} for i in range(longest)]
    for case, one in zip(cases, shown, strict=True):
        marker = case.get_closest_marker("each_once")
        assert marker is not None
        if one not in diagonal:
            case.add_marker(marker.args[0])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def collected(pytestconfig: pytest.Config) -> dict[str, frozenset[str]]:
    """The marks of every test that was found, whether it runs or not."""
    return pytestconfig.stash[COLLECTED]


ELSEWHERE = """
import hashlib, json, sys
import torch
before = set(sys.modules)
import tvkd_fast
loaded = sorted(name for name in set(sys.modules) - before)
from tvkd_fast.data import pairs_of_step
from tvkd_fast.synthetic.bundled import preference_rows
rows = hashlib.sha256(json.dumps(preference_rows("train", 48)).encode()).hexdigest()
order = pairs_of_step(3, 5, num_pairs=1000, pairs_per_step=8)
print(json.dumps({"loaded": loaded, "rows": rows, "order": list(order)}))
"""


@pytest.fixture(scope="session")
def another_process() -> dict[str, Any]:
    """Return the package's facts in another process with another hash seed, which is started once per session."""
    environment = {**os.environ, "PYTHONHASHSEED": "4321"}
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Byte-level tokenizers with one merge, "a" + "b", so that a border inside "ab" can be seen."""

    def make(
        chat_template: str | None = CHATML,
        eos: str | None = "<|im_end|>",
        prefix: str = "",
        suffix: str = "",
    ) -> PreTrainedTokenizerFast:
        symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
        vocab = {symbol: i for i, symbol in enumerate(symbols)}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        around = [token for token in (prefix, suffix) if token]
        if around:
            single = " ".join(token for token in (prefix, "$A", suffix) if token)
            backend.post_processor = processors.TemplateProcessing(
                single=single, special_tokens=[(token, vocab[token]) for token in around]
            )
        backend.add_special_tokens(SPECIAL)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def train_tokenizer() -> MakeTokenizer:
    """Byte-level tokenizers of at most 400 tokens, trained on texts; "</s>" ends a sequence."""

    def train(
        texts: Iterable[str], chat_template: str | None = None, normalizer: Any = None
    ) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if normalizer is not None:
            backend.normalizer = normalizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
        backend.train_from_iterator(texts, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
        tokenizer.chat_template = chat_template
        return tokenizer

    return train


@pytest.fixture(scope="session")
def chatml(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def templateless(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(chat_template=None, eos="<|endoftext|>", prefix="<s>")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Llamas of some ten thousand parameters, in the byte-level tokenizers' vocabulary."""

    def make(seed: int = 0, config: Any = None, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        if config is None:
            shape = {
                "vocab_size": 262,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
                "initializer_range": 0.2,
                "pad_token_id": 0,
                "eos_token_id": 2,
                "bos_token_id": 1,
            }
            config = LlamaConfig(**(shape | changes))
        return AutoModelForCausalLM.from_config(config)

    return make


class Wider:
    """torch, as a family's module sees it, in which float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """A model in float64 throughout: families compute norms in float32 whatever the dtype, a rounding of theirs."""

    def widen(model: PreTrainedModel) -> PreTrainedModel:
        monkeypatch.setattr(sys.modules[type(model).__module__], "torch", Wider())
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model.double()

    return widen


@pytest.fixture(scope="session")
def model_folder(
    tiny_model: Callable[..., PreTrainedModel],
    chatml: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., str]:
    """Folders with a tiny model and its tokenizer, as `from_pretrained` wants them."""

    def make(seed: int = 0, tokenizer: PreTrainedTokenizerFast = chatml, **changes: Any) -> str:
        folder = tmp_path_factory.mktemp("model")
        tiny_model(seed, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Iterable[Any], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """The real data's files, which are no part of the project: TVKD_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("TVKD_DATA") or Path(__file__).parents[2] / "shared" / "data")

    def find(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"{folder / name} is missing: set TVKD_DATA to the folder that holds {name}")
        return folder / name

    return find


BODIES: dict[str, Callable[..., Any]] = {
    "linear_logps": logps._logps,
    "linear_logps_gradients": logps._logps_gradients,
    "scaled_slopes": logps._scaled_derivatives,
    "sparse_logps": sparse_logps._sparse_logps,
    "sparse_logps_gradients": sparse_logps._sparse_gradients,
    "linear_lse": values._lse,
    "linear_entropy": values._entropy,
    "fused_linear_tvkd_known": known_op._known,
}
"""The functions that the registered ops run."""


@dataclass(frozen=True)
class Case:
    """One call of a head op: its tensors, the upstream gradient of each token, and the head's transforms."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor
    bias: Tensor | None = None
    transforms: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Log-probabilities, and the gradients of their sum weighted by the upstream gradient."""

    logps: Tensor
    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None


def random_case(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    ignored: float = 0.2,
    spread: float = 3.0,
    seed: int = 0,
    **transforms: Any,
) -> Case:
    """Normal logits of standard deviation `spread`; `ignored` is the share of ignored rows. The last label is V − 1."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(v, (n,), generator=draw)
    labels[-1:] = v - 1
    labels[torch.rand(n, generator=draw) < ignored] = transforms.get("ignore_index", -100)
    return Case(
        hidden=torch.randn(n, d, generator=draw).to(dtype),
        weight=(torch.randn(v, d, generator=draw) * spread / d**0.5).to(dtype),
        labels=labels,
        upstream=torch.randn(n, generator=draw).double(),
        bias=torch.randn(v, generator=draw).to(dtype) if bias else None,
        transforms=transforms,
    )


def torch_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Compute what a careful user writes: whole logits and log_softmax, in the dtype that came in."""
    z = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    kept = labels != ignore_index
    return z.log_softmax(-1).gather(1, labels.where(kept, 0)[:, None])[:, 0].masked_fill(~kept, 0.0)


def run(
    op: Callable[..., Tensor], case: Case, upcast_to: torch.dtype | None = None, *, frozen: bool = False
) -> Results:
    """`op` and its gradients, on leaves of the case's dtype or upcast from it; a frozen head has none."""
    inputs = [None if x is None else x.detach().to(upcast_to or x.dtype) for x in (case.hidden, case.weight, case.bias)]
    hidden, weight, bias = inputs
    leaves = [x.requires_grad_() for x in (inputs[:1] if frozen else inputs) if x is not None]
    logps = op(hidden, weight, case.labels, bias=bias, **case.transforms)
    grads = torch.autograd.grad(logps, leaves, case.upstream.to(logps.dtype))
    return Results(logps.detach(), *grads, *[None] * (3 - len(grads)))


def no_worse(ours: Tensor, twin: Tensor, plain: Tensor, unit: float | None = None) -> None:
    """The error against float64 is at most twice plain torch's, plus 1e-5 of `unit` (where None, the largest value)."""
    assert ours.shape == twin.shape
    if twin.numel() == 0:
        return
    slack, smallest = (1e-13, 1e-12) if ours.dtype == torch.float64 else (1e-5, 0.0)
    # Values that are infinite by right (a token that a bias takes out) must agree, and have no error to measure.
    finite = twin.isfinite()
    assert torch.equal(ours.double()[~finite], twin[~finite])
    ours, twin, plain = ours[finite].double(), twin[finite], plain[finite].double()
    # In float64 plain torch and the twin are one computation, equally rounded: hence the least error that is allowed.
    error, allowed = (ours - twin).abs().max(), 2 * (plain - twin).abs().max() + smallest
    allowed += slack * (twin.abs().max() if unit is None else unit)
    assert error <= allowed, f"error {error:.3g}, plain torch {(plain - twin).abs().max():.3g}, allowed {allowed:.3g}"


def logps_no_worse(case: Case, op: Callable[..., Tensor] = linear_logps) -> Results:
    """Test `linear_logps` against its float64 twin: values and gradients, a frozen head's too. Return its results."""
    ours, frozen = run(op, case), run(op, case, frozen=True)
    twin = run(reference.linear_logps, case, upcast_to=torch.float64)
    wide = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    plain = run(torch_logps, case, upcast_to=wide)
    assert ours.logps.dtype == wide
    no_worse(ours.logps, twin.logps, plain.logps)
    no_worse(frozen.logps, twin.logps, plain.logps)
    assert frozen.hidden.dtype == case.hidden.dtype
    no_worse(frozen.hidden, twin.hidden, plain.hidden.to(case.hidden.dtype))
    for name in ("hidden", "weight") if case.bias is None else ("hidden", "weight", "bias"):
        got, exact, eager = (getattr(results, name) for results in (ours, twin, plain))
        assert got.dtype == case.hidden.dtype
        no_worse(got, exact, eager.to(got.dtype))
    return ours


@contextmanager
def tile_sizes(workspace_floats: int, rows: int) -> Iterator[None]:
    """Tiles small enough that a small case walks over many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tvkd_fast.ops.tiles.exact.WORKSPACE_FLOATS", workspace_floats)
        patch.setattr("tvkd_fast.ops.tiles.exact.TILE_ROWS", rows)
        yield


class Watch(TorchDispatchMode):
    """Counts what happens under autograd: multiply-adds of matrix products, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tvkd_fast":
            # Looks into the registered ops, which a dispatch mode is handed whole.
            with self:
                return BODIES[func.overloadpacket.__name__](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """Return the helpers that the ops' tests share; a conftest cannot be imported."""
    return SimpleNamespace(
        case=random_case,
        Case=Case,
        run=run,
        torch_logps=torch_logps,
        no_worse=no_worse,
        logps_no_worse=logps_no_worse,
        tile_sizes=tile_sizes,
        Watch=Watch,
    )
