"""What a model is asked with."""

from types import SimpleNamespace

import torch

from tvkd_fast.data.formats import to_preference
from tvkd_fast.training.generate import answers

TEMPLATE = "{{ tools | tojson }} {{ thinking }}: {{ messages[0].content }}"
ROW = {
    "prompt": [{"role": "user", "content": "ab?"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
    "tools": [{"name": "f"}],
    "chat_template_kwargs": {"thinking": False},
}


def test_a_prompt_is_asked_with_its_rows_tools_and_variables(make_tokenizer):
    tokenizer, pair = make_tokenizer(TEMPLATE), to_preference(ROW, "row 0")
    asked = []

    def generate(input_ids, **_):
        asked.append(tokenizer.decode(input_ids[0]))
        return torch.cat([input_ids, torch.tensor([[tokenizer.eos_token_id]])], 1)

    model = SimpleNamespace(device="cpu", training=False, eval=lambda: None, train=lambda _: None, generate=generate)
    assert answers(model, tokenizer, [pair.prompt], of=[pair]) == [""]
    assert asked == ['[{"name": "f"}] False: ab?']
