"""Checks of an installed tvkd_fast without its checkout: `make dist` runs this in an environment of its own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import tvkd_fast
from tvkd_fast import linear_logps

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"


def main() -> None:
    assert "site-packages" in tvkd_fast.__file__, f"{tvkd_fast.__file__} is no installed package"
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8)
    labels = torch.randint(30, (5,))
    logps = linear_logps(hidden, weight, labels)
    eager = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, eager)
    with tempfile.TemporaryDirectory() as folder:
        trained(Path(folder))
    print(f"tvkd_fast {tvkd_fast.__version__} works in {sys.prefix}")


def trained(folder: Path) -> None:
    """A tiny student under a tiny teacher, by the command."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "</s>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=TEMPLATE)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for name in ("policy", "teacher"):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"{i}: say a.", "chosen": "a", "rejected": "b"} for i in range(6)]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tvkd = str(Path(sys.executable).with_name("tvkd"))
    models_ = ["--policy", str(folder / "policy"), "--teacher", str(folder / "teacher")]
    steps = ["--max_steps", "2", "--pairs_per_step", "3", "--output_dir", str(folder / "run")]
    for command in (
        [tvkd, "--version"],
        [tvkd, "train", *models_, "--data.train", str(data), *steps],
        [tvkd, "eval", "--model", str(folder / "run" / "final"), "--data", str(data)],
    ):
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
