"""Greedy answers: what a model is asked with, and where its answers stop."""

import pytest
import torch

from tvkd_fast.data.reading.formats import Preference, to_preference
from tvkd_fast.evaluation.generate import answers
from tvkd_fast.models import load_model
from tvkd_fast.rollout import ModelSampler, Sample

PROMPTS = [[{"role": "user", "content": text}] for text in ("Say red.", "A rather longer one, which is to say blue?")]


@pytest.fixture
def model(model_folder):
    return load_model(model_folder(seed=3)).eval()


def greedy(model, tokenizer, prompt, count):
    """Token ids, one after the other, and never an end."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits[0, -1]
            logits[:5] = -torch.inf
            ids.append(int(logits.argmax()))
    return ids[start:]


@pytest.fixture
def endless(model):
    """The model without a way to end: its special tokens are never the likeliest."""

    def without_special(head, inputs, logits):
        return logits.index_fill(-1, torch.arange(5), -torch.inf)

    model.get_output_embeddings().register_forward_hook(without_special)
    return model


def test_rows_of_a_batch_are_answered_as_alone(endless, chatml):
    together = answers(endless, chatml, PROMPTS, max_new_tokens=6)
    for prompt, reply in zip(PROMPTS, together, strict=True):
        assert reply == chatml.decode(greedy(endless, chatml, prompt, 6)).strip()
        assert answers(endless, chatml, [prompt], max_new_tokens=6) == [reply]


def test_an_answer_stops_at_any_stop_of_the_models_own(endless, chatml):
    ids = greedy(endless, chatml, PROMPTS[0], 8)
    stop = next(i for i, token in enumerate(ids) if token not in ids[:i] and i > 1)
    endless.generation_config.eos_token_id = [2, ids[stop]]
    assert answers(endless, chatml, PROMPTS[:1], max_new_tokens=8) == [chatml.decode(ids[:stop]).strip()]


def test_an_answer_stops_where_the_template_ends_turns(model, make_tokenizer, asked):
    tokenizer = make_tokenizer(eos="<|endoftext|>")
    model.generation_config.eos_token_id = 3
    answers(model, tokenizer, PROMPTS)
    ((sampler, _),) = asked
    assert sampler.stops == set(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|eot_id|>"]))


def test_a_prompt_that_a_template_wrote_is_asked_as_it_stands(endless, chatml):
    written = chatml.apply_chat_template(PROMPTS[0], tokenize=False, add_generation_prompt=True)
    replies = answers(endless, chatml, [written, PROMPTS[0]], max_new_tokens=6)
    assert replies[0] == replies[1]


def test_a_conversation_is_written_by_the_template_whatever_it_says(chatml, echo):
    turn = {"role": "user", "content": "<|im_start|>user\na<|im_end|>\n"}
    call = [PROMPTS[0][0], {"role": "assistant", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "3"}]
    for prompt in ([turn], call, [{**turn, "content": None, "reasoning_content": "ab"}]):
        wanted = chatml.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert echo(chatml, prompt) == wanted
    assert echo(chatml, "a plain text") == "a plain text"


def test_settings_of_the_models_own_generation_are_left_aside(endless, chatml):
    replies = answers(endless, chatml, PROMPTS, max_new_tokens=6)
    own = endless.generation_config
    own.update(num_beams=2, num_return_sequences=2, return_dict_in_generate=True, min_new_tokens=3, do_sample=True)
    own.update(stop_strings=["a"], repetition_penalty=9.0, max_length=3)
    assert answers(endless, chatml, PROMPTS, max_new_tokens=6) == replies
    assert endless.generation_config is own


def test_what_the_model_has_no_positions_for_is_refused_by_prompt(model_folder, chatml):
    short = load_model(model_folder(seed=3, max_position_embeddings=64))
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, .* the model's 64 positions: lower --max_new_tok"):
        answers(short, chatml, PROMPTS)
    pairs = [Preference(prompt, [], [], f"eval.jsonl row {i + 8}") for i, prompt in enumerate(PROMPTS)]
    with pytest.raises(ValueError, match=r"eval.jsonl row 9 has \d+ tokens"):
        answers(short, chatml, PROMPTS, of=pairs)


@pytest.fixture
def asked(monkeypatch):
    """The samplers that are asked, and the prompts; every answer is empty."""
    seen = []

    def sample(sampler, prompts, sampling, *, seed):
        seen.append((sampler, prompts))
        return [[Sample([min(sampler.stops)], True, [0.0])] for _ in prompts]

    monkeypatch.setattr(ModelSampler, "sample", sample)
    return seen


@pytest.fixture
def echo(model, asked):
    """The text that a model is asked with."""

    def written(tokenizer, prompt, **options):
        assert answers(model, tokenizer, [prompt], **options) == [""]
        _, (seen,) = asked[-1]
        return tokenizer.decode(seen.ids)

    return written


def test_a_prompt_is_asked_with_its_rows_tools_and_variables(make_tokenizer, echo):
    tokenizer = make_tokenizer("{{ tools | tojson }} {{ thinking }}: {{ messages[0].content }}")
    row = {
        "prompt": [{"role": "user", "content": "ab?"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"thinking": False},
    }
    pair = to_preference(row, "row 0")
    assert echo(tokenizer, pair.prompt, of=[pair]) == '[{"name": "f"}] False: ab?'


def test_every_part_of_the_model_keeps_its_mode(endless, chatml):
    endless.train()
    endless.model.norm.eval()
    modes = [module.training for module in endless.modules()]
    answers(endless, chatml, PROMPTS[:1], max_new_tokens=2)
    assert [module.training for module in endless.modules()] == modes
