"""Pairs are in the ids that transformers and TRL make of prompt and response together, whatever the tokenizer."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tvkd_fast.data.reading.formats import Preference, to_preference
from tvkd_fast.data.tokenization import tokenize_pair

TEXTS = ["The quick fox. Name a colour. Blue, of course. user assistant Seven hello world 1 2 3\n\n"] * 20
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
COMMAND_R = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end_response|><|end_turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MISTRAL_1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_3 = MISTRAL_1.replace(" [/INST]", "[/INST]").replace("{{ m['content'] + eos", "{{ ' ' + m['content'] + eos")


def byte_level(template, eos, *special, bos="<bos>"):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = list(dict.fromkeys([bos, eos, *special]))
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    begin = (bos, backend.token_to_id(bos))
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[begin])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def metaspace(template, scheme):
    """Make a tokenizer like one converted from sentencepiece: a space is a letter, bytes replace unknown characters."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    held = special + [f"<0x{i:02X}>" for i in range(256)]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=held, show_progress=False))
    made = json.loads(backend.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] in special[:3]]
    made["pre_tokenizer"] |= {"prepend_scheme": scheme, "split": False}
    backend = Tokenizer.from_str(json.dumps(made))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


FAMILIES = {
    "chatml": lambda: byte_level(QWEN_3.replace("<think>\n\n</think>\n\n", ""), "<|im_end|>", "<|im_start|>"),
    "qwen 3": lambda: byte_level(QWEN_3, "<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    "llama 3": lambda: byte_level(LLAMA_3, "<eos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": lambda: byte_level(GEMMA, "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "phi 3": lambda: byte_level(PHI_3, "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "command r": lambda: byte_level(
        COMMAND_R, "<eos>", "<|user|>", "<|assistant|>", "<|end_response|>", "<|end_turn|>"
    ),
    **{f"mistral 1, {scheme}": lambda s=scheme: metaspace(MISTRAL_1, s) for scheme in ("first", "always", "never")},
    **{f"mistral 3, {scheme}": lambda s=scheme: metaspace(MISTRAL_3, s) for scheme in ("first", "always", "never")},
}
ENDS = {"llama 3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi 3": "<|end|>", "command r": "<|end_turn|>"}


@pytest.fixture(scope="module")
def families():
    return cache(lambda name: FAMILIES[name]())


@pytest.fixture(params=list(FAMILIES))
def family(request, families):
    return request.param, families(request.param)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ROWS = [
    {"prompt": [user("Name a colour.")], "chosen": [assistant("Blue.")], "rejected": [assistant("Seven.")]},
    {
        "prompt": [user("Hi"), assistant("Yes?"), user(" Café 日本 \n")],
        "chosen": [assistant(" \tBlue\n\n")],
        "rejected": [assistant("😀 ﬁ")],
    },
]
PLAIN = [
    {"prompt": "Name a colour:\n", "chosen": "Blue.", "rejected": "Seven."},
    {"prompt": "Name a col", "chosen": "our", "rejected": " of course\n\n"},
    {"prompt": "Name ", "chosen": " a", "rejected": "a"},
]


@pytest.mark.parametrize("row", ROWS)
def test_conversations_are_what_the_template_writes(family, row):
    name, tokenizer = family
    pair = tokenize_pair(to_preference(row, "row 0"), tokenizer)
    for which in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(row["prompt"] + row[which], return_dict=False)
        ids = pair.prompt_ids + getattr(pair, f"{which}_ids")
        assert ids == whole[: len(ids)]
        end = tokenizer.convert_tokens_to_ids(ENDS.get(name, tokenizer.eos_token))
        assert ids[-1] == end
        assert end not in whole[len(ids) :]


@pytest.mark.parametrize("row", PLAIN)
def test_plain_pairs_are_what_the_tokenizer_makes_of_both_together(family, row):
    _, tokenizer = family
    pair = tokenize_pair(to_preference(row, "row 0"), tokenizer)
    for which in ("chosen", "rejected"):
        whole = tokenizer(row["prompt"] + row[which] + tokenizer.eos_token)["input_ids"]
        assert pair.prompt_ids + getattr(pair, f"{which}_ids") == whole
    alone = tokenizer(row["prompt"])["input_ids"]
    assert pair.prompt_ids == alone[: len(pair.prompt_ids)]
    assert pair.merged == (len(pair.prompt_ids) < len(alone))


def test_they_are_trls(family):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'tvkd_fast[trl]'")
    from datasets import Dataset

    _, tokenizer = family
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    for rows in (ROWS, PLAIN):
        held = SimpleNamespace(_tokenizer=tokenizer)
        theirs = trl.DPOTrainer._prepare_dataset(held, Dataset.from_list(rows), tokenizer, args, "train")
        for row, their in zip(rows, theirs, strict=True):
            pair = tokenize_pair(to_preference(row, "row 0"), tokenizer)
            assert pair.prompt_ids == their["prompt_ids"]
            for which in ("chosen_ids", "rejected_ids"):
                own = getattr(pair, which)
                # TRL keeps what a template writes behind the end.
                assert own == their[which][: len(own)]
                assert not str(tokenizer.decode(their[which][len(own) :], skip_special_tokens=True)).strip()


def test_text_that_a_template_wrote_is_the_templates_own(family):
    _, tokenizer = family
    row = ROWS[0]
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    wholes = [tokenizer.apply_chat_template(row["prompt"] + row[w], tokenize=False) for w in ("chosen", "rejected")]
    texts = Preference(prompt, *(whole[len(prompt) :] for whole in wholes), "row 0")
    strings, messages = tokenize_pair(texts, tokenizer), tokenize_pair(to_preference(row, "row 0"), tokenizer)
    begins = [] if prompt.startswith(tokenizer.bos_token) else [tokenizer.bos_token_id]
    assert strings.prompt_ids == begins + messages.prompt_ids
    assert (strings.chosen_ids, strings.rejected_ids) == (messages.chosen_ids, messages.rejected_ids)
    assert strings.written_before
    spaced = tokenize_pair(replace(texts, prompt=f"\n{tokenizer.bos_token}{prompt}"), tokenizer)
    assert spaced.prompt_ids.count(tokenizer.bos_token_id) == 1 + prompt.count(tokenizer.bos_token)
    assert not messages.written_before


WORDS = st.one_of(
    st.sampled_from(["Blue.", " our", "Name a col", "\n\n", " ", "</s>", "<s>", "日本", "e\u0301", "\u200b"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
TEXT = st.lists(WORDS, max_size=4).map("".join)
TURNS = st.lists(TEXT, min_size=1, max_size=3).map(lambda t: [(user, assistant)[i % 2](x) for i, x in enumerate(t)])
CONTENT = st.one_of(TEXT, st.none(), st.just("Blue " * 200))
ROW = st.one_of(
    st.fixed_dictionaries({"prompt": CONTENT, "chosen": CONTENT, "rejected": CONTENT}),
    st.fixed_dictionaries(
        {
            "prompt": TURNS,
            "chosen": st.lists(CONTENT.map(assistant), max_size=2),
            "rejected": TEXT.map(assistant).map(lambda m: [m]),
        }
    ),
)


@draws(2000, fresh=True)
@given(row=ROW, name=st.sampled_from(sorted(FAMILIES)))
def test_any_row_is_in_transformers_ids_or_refused_in_a_line(row, name, families):
    tokenizer, refusal = families(name), ""
    try:
        text = to_preference(row, "row 0")
        pair = tokenize_pair(text, tokenizer)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith("row 0: ")
        assert "\n" not in refusal
        return
    for which in ("chosen", "rejected"):
        ids, answer = pair.prompt_ids + getattr(pair, f"{which}_ids"), getattr(text, which)
        if isinstance(answer, str):
            whole = tokenizer(text.prompt + answer + tokenizer.eos_token)["input_ids"]
            # White space before a beginning of its own is not in its way.
            whole = whole[1:] if text.prompt.lstrip().startswith(tokenizer.bos_token) else whole
        else:
            whole = tokenizer.apply_chat_template(text.prompt + answer, return_dict=False)
        assert ids == whole[: len(ids)]
        behind = [tokenizer.decode([token]) for token in whole[len(ids) :] if token not in tokenizer.all_special_ids]
        assert not "".join(behind).strip()
