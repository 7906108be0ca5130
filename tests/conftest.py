import gzip
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>"]

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


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
