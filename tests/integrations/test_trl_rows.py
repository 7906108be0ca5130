"""The rows that TRL makes for TVKDTrainer, and where their responses end: Ψ from the teacher, from the folder that
`tvkd score` wrote, and in float64 by transformers alone."""

import json

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'tvkd_fast[trl]'")

from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.data import BadPair, build_dataset
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.data.response_end import ResponseEnds
from tvkd_fast.integrations.rows import ROW, WithReturns
from tvkd_fast.integrations.teacher import ShapingSettings, TeacherReturns
from tvkd_fast.integrations.trl import RETURNS, TVKDConfig, TVKDTrainer
from tvkd_fast.models import load_model

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}END{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
WORDS = ["red", "green", "blue", "sun", "ab"]
SETTINGS = ShapingSettings(gamma=0.9, kappa=1.0, value_scale=1.0, value_from="logits", terminal="last_content")


def conversations(count=5):
    def turns(role, text):
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": turns("user", f"{i}: say {WORDS[i]}."),
            "chosen": turns("assistant", WORDS[i]),
            "rejected": turns("assistant", f"{WORDS[i - 2]} " * (1 + i) + "no"),
        }
        for i in range(count)
    ]


@pytest.fixture
def make(tmp_path):
    """A trainer that is not run, over rows, and the columns that it found."""

    def trainer(policy, rows, teacher, **changes):
        options = {"max_length": 60, "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
        options |= {"per_device_train_batch_size": 2, "gamma": 0.9, "value_scale": 1.0, "max_steps": 1}
        return TVKDTrainer(
            model=AutoModelForCausalLM.from_pretrained(policy),
            args=TVKDConfig(output_dir=str(tmp_path / "run"), **options | changes),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            processing_class=AutoTokenizer.from_pretrained(policy),
            teacher_model=teacher,
        )

    return trainer


@pytest.fixture
def scored(tmp_path):
    def scores(policy, teacher, rows, max_length=60):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(train=str(tmp_path / "rows.jsonl"), max_length=max_length)
        folder = str(tmp_path / "scores")
        score(ScoreConfig(output_dir=folder, policy=policy, teacher=teacher, data=data), show_progress=False)
        return folder

    return scores


def by_hand(model, prompt, response, *, ended):
    """Ψ at γ=0.9 of whole token ids, up to the state that predicts the last of them."""
    with torch.no_grad():
        values = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :].logsumexp(-1)
    values = values[:-1] if ended else values
    return float((0.9 * values[1:] - values[:-1]).sum())


@pytest.mark.parametrize(
    ("end", "eos"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("<|eot_id|>", "<|endoftext|>"),
        ("<|eot_id|>\n<|endoftext|>", "<|endoftext|>"),
        ("<|im_end|>\n[end]\n", "<|im_end|>"),
    ],
)
def test_the_three_ways_are_one_number(make, scored, model_folder, make_tokenizer, end, eos):
    tokenizer = make_tokenizer(TURNS.replace("END", end), eos=eos)
    policy, teacher = model_folder(seed=0, tokenizer=tokenizer), model_folder(seed=1, tokenizer=tokenizer)
    rows, stop, max_length = conversations(), tokenizer(end, add_special_tokens=False)["input_ids"][0], 44
    module = make(policy, rows, teacher, max_length=max_length)
    folder = make(policy, rows, scored(policy, teacher, rows, max_length), max_length=max_length)
    batches = make(policy, rows, teacher, max_length=max_length, precompute_teacher=False)
    loader = [batches.data_collator(batches.train_dataset.select([2 * i, 2 * i + 1]).to_list()) for i in range(2)]
    online = torch.cat([torch.stack(batches._asked(batch)) for batch in loader], 1)
    exact = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    cut = 0
    for name, found in zip(RETURNS, online.tolist(), strict=True):
        want = []
        for row in module.train_dataset:
            ids = row[f"{name.removeprefix('psi_')}_ids"]
            ids = ids[: ids.index(stop) + 1]
            left = max_length - len(row["prompt_ids"])
            cut += len(ids) > left
            want.append(by_hand(exact, row["prompt_ids"], ids[:left], ended=len(ids) <= left))
        assert module.train_dataset[name] == pytest.approx(want, abs=2e-5)
        assert folder.train_dataset[name] == pytest.approx(module.train_dataset[name], abs=2e-6)
        assert found == pytest.approx(module.train_dataset[name][:4], abs=2e-6)
    assert 0 < cut < 2 * len(rows)


def test_text_that_a_template_wrote_begins_and_ends_once(make, scored, model_folder, make_tokenizer):
    tokenizer = make_tokenizer(prefix="<s>")
    policy, teacher = model_folder(seed=0, tokenizer=tokenizer), model_folder(seed=1, tokenizer=tokenizer)
    rows = [
        {"prompt": f"<s>{i}<|im_end|>\n", "chosen": f"{WORDS[i]}<|im_end|>\n", "rejected": f"{WORDS[i - 1]}"}
        for i in range(3)
    ]
    with pytest.warns(UserWarning, match=r"the text of rows.jsonl row 0, and of 3 rows in all, holds special tokens"):
        folder = scored(policy, teacher, rows)
    ours, theirs = make(policy, rows, teacher), make(policy, rows, folder)
    first = ours.train_dataset[0]
    assert tokenizer.decode(first["prompt_ids"] + first["chosen_ids"]) == "<s>0<|im_end|>\nred<|im_end|>"
    for name in RETURNS:
        assert theirs.train_dataset[name] == pytest.approx(ours.train_dataset[name], abs=2e-6)


def test_rows_are_dated_as_scores_are(make, scored, model_folder, make_tokenizer):
    tokenizer = make_tokenizer("{{ strftime_now('%d %B %Y') }} " + TURNS.replace("END", "<|im_end|>"))
    policy, teacher = model_folder(seed=0, tokenizer=tokenizer), model_folder(seed=1, tokenizer=tokenizer)
    rows = conversations(2)
    ours = make(policy, rows, scored(policy, teacher, rows, 80), max_length=80)
    assert tokenizer.decode(ours.train_dataset[0]["prompt_ids"]).startswith("26 July 2024 <|im_start|>")


def test_rows_padded_on_the_left_and_rows_with_holes(tiny_model, in_float64):
    """Test rows as another collator may lay them. GPT-2's positions are learnt: a shift of them would show."""
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = in_float64(tiny_model(config=config)).eval()
    rows = [([5, 6, 7], [8, 9, 2]), ([5], [9, 2]), ([5, 6, 7, 9, 3], [4, 4, 4])]
    want = [by_hand(model, prompt, ids, ended=ids[-1] == 2) for prompt, ids in rows]
    length, ended = 10, torch.tensor([ids[-1] == 2 for _, ids in rows])
    teacher = TeacherReturns(model, None, SETTINGS)
    for left in (False, True):
        laid = torch.full((3, 3, length), 0)
        for i, (prompt, ids) in enumerate(rows):
            size = len(prompt) + len(ids)
            place = slice(length - size, length) if left else slice(0, size)
            laid[0, i, place] = torch.tensor(prompt + ids)
            laid[1, i, place] = torch.tensor([0] * len(prompt) + [1] * len(ids))
            laid[2, i, place] = 1
        ids, response, mask = laid
        assert teacher.of(ids, response.bool(), ended, mask).tolist() == pytest.approx(want, abs=1e-6)
    mask[2, -5] = 0
    with torch.no_grad():
        logits = model(ids[2:, -8:], attention_mask=mask[2:, -8:]).logits[0, 4:]  # type: ignore[call-overload]
    values = logits.logsumexp(-1)
    found = teacher.of(ids, response.bool(), ended, mask)
    assert float(found[2]) == pytest.approx(float((0.9 * values[1:] - values[:-1]).sum()), abs=1e-6)
    assert found[:2].tolist() == pytest.approx(want[:2], abs=1e-6)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_a_cut_left_of_a_response(chatml, mode):
    """A newline stands behind the ends, id 2, and counts for the cut alone."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    newline = chatml("\n")["input_ids"]
    example = {"prompt_ids": [9, 9], "chosen_ids": [10, 11, 12, 2, *newline], "rejected_ids": [10, 2, *newline]}
    collate = DataCollatorForPreference(pad_token_id=0, max_length=5, truncation_mode=mode)
    batch = WithReturns(collate, ResponseEnds(chatml), mode)([example])
    chosen = batch["input_ids"][0][batch["response_mask"][0]].tolist()
    assert chosen == ([10, 11, 12] if mode == "keep_start" else [10, 11, 12, 2])
    assert batch["response_ended"].tolist() == [mode == "keep_end", True]
    assert batch["input_ids"][1][batch["response_mask"][1]].tolist() == [10, 2]


def test_rows_that_a_model_has_no_positions_for_are_named(make, model_folder, templateless):
    rows = [{"prompt": f"{i}: say" + " it" * 9 * i, "chosen": " yes", "rejected": " no"} for i in range(3)]
    long, short = (model_folder(tokenizer=templateless, max_position_embeddings=n) for n in (64, 32))
    for whose, policy, teacher in (("policy", short, long), ("teacher", long, short)):
        with pytest.raises(ValueError, match=rf"row 1 has 39 tokens, and the {whose} was made for 32 .*max_length=32"):
            make(policy, rows, teacher)
        make(policy, rows[:1], teacher)
        stream = make(policy, IterableDataset.from_generator(lambda: iter(rows)), teacher)
        with pytest.raises(ValueError, match=f"row 1 has 39 tokens, and the {whose} was made for 32"):
            list(stream.train_dataset)


def test_a_stream_of_rows_is_read_as_a_table_is(make, model_folder, chatml):
    policy, teacher = model_folder(seed=0), model_folder(seed=1)
    rows = [{"prompt": f"{i} ", "chosen": f"{WORDS[i]}<|im_end|>\n", "rejected": "no"} for i in range(3)]
    table = make(policy, rows, teacher)
    stream = make(policy, IterableDataset.from_generator(lambda: iter(rows)), teacher)
    for ours, theirs in zip(stream.train_dataset, table.train_dataset, strict=True):
        assert ours["chosen_ids"] == theirs["chosen_ids"]
        assert ours["chosen_ids"].count(chatml.eos_token_id) == 1


def test_a_prompt_that_is_all_merged_is_refused(make, model_folder):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(BadPair, match=r"row 0: prompt without tokens \(the tokenizer merges all of it with a response"):
        make(model_folder(seed=0), rows, model_folder(seed=1))


def test_a_batch_of_rows_without_a_prompt_is_refused_by_name(chatml):
    rows = [{"prompt_ids": [], "chosen_ids": [9, 2], "rejected_ids": [8, 2]}]
    for name, named in (("a row", {}), ("row 7", {ROW: "row 7"})):
        collate = WithReturns(lambda examples: {}, ResponseEnds(chatml), "keep_start")
        with pytest.raises(ValueError, match=f"{name} has no prompt of its own"):
            collate([row | named for row in rows])


CARRIED = (
    "{% if tools %}{{ tools | tojson }}<|eot_id|>{% endif %}{% for d in documents or [] %}{{ d | tojson }}{% endfor %}"
    "{{ 'in ' + style if style is defined else '' }}"
)


def carrying():
    """Rows of which each has something that the others lack, which a table fills with nulls."""
    rows = conversations(3)
    tool = {"name": "f", "parameters": {"x": {"type": "int"}}}
    own = [
        {"tools": [tool, {"name": "g", "parameters": {"y": {"enum": ["a"]}}}]},
        {"chat_template_kwargs": {"style": "prose"}, "system": "Be brief."},
        {"chat_template_kwargs": {"tone": "dry"}, "documents": [{"text": "ab"}, {"title": "b"}]},
    ]
    none = {"tools": None, "chat_template_kwargs": None, "documents": None, "system": ""}
    return [{**row, **none, **more} for row, more in zip(rows, own, strict=True)]


@pytest.mark.parametrize(
    ("end", "tool_end", "as_text"),
    [("<|im_end|>\n", "<|eot_id|>", True), ("<|eot_id|><|im_end|>\n", "<|eot_id|>", False), ("\n", "\n", False)],
)
def test_rows_with_tools_and_system_turns_are_those_of_scores(
    make, scored, tmp_path, model_folder, make_tokenizer, end, tool_end, as_text
):
    templates = {"default": CARRIED + TURNS.replace("END", end), "tool_use": CARRIED + TURNS.replace("END", tool_end)}
    tokenizer = make_tokenizer(templates, eos="<|endoftext|>")
    options = {"max_position_embeddings": 512, "tokenizer": tokenizer}
    policy, teacher = model_folder(seed=0, **options), model_folder(seed=1, **options)
    rows = carrying()
    if as_text:
        rows = [{**row, "tools": row["tools"] and json.dumps(row["tools"])} for row in rows]
    folder = make(policy, rows, scored(policy, teacher, rows, 300), max_length=300)
    module = make(policy, rows, load_model(teacher), max_length=300)
    stream = make(policy, Dataset.from_list(rows).to_iterable_dataset(), teacher, max_length=300)
    dataset = build_dataset(tmp_path / "rows.jsonl", AutoTokenizer.from_pretrained(policy), max_length=300)
    for pair, ours, theirs, streamed in zip(
        dataset, folder.train_dataset, module.train_dataset, stream.train_dataset, strict=True
    ):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert ours[name] == theirs[name] == streamed[name] == getattr(pair, name)
        assert "null" not in tokenizer.decode(pair.prompt_ids)
    stops = [end.strip(), tool_end.strip()]
    for pair, stop in zip(dataset, [stops[1], stops[0], stops[0]], strict=True):
        assert tokenizer.decode(pair.chosen_ids).endswith(stop or "<|endoftext|>")
    batch = module.data_collator([{k: v for k, v in row.items() if "psi" not in k} for row in module.train_dataset])
    for name, online in zip(RETURNS, module._asked(batch), strict=True):
        assert folder.train_dataset[name] == pytest.approx(module.train_dataset[name], abs=2e-6)
        assert online.tolist() == pytest.approx(module.train_dataset[name], abs=2e-6)


def test_columns_that_scores_refuse_are_refused(make, model_folder):
    rows = [{**row, "tools": [{"name": "f"}]} for row in ({"prompt": "a ", "chosen": "b", "rejected": "c"},)]
    with pytest.raises(BadPair, match=r"row 0: plain text has no place .*\(tools\)"):
        make(model_folder(seed=0), rows, model_folder(seed=1))


def test_a_row_keeps_its_name_where_others_are_left_out(make, model_folder):
    rows = [{"prompt": "long " * 20, "chosen": "b", "rejected": "c"}, {"prompt": "a ", "chosen": "b", "rejected": "c"}]
    (left,) = make(model_folder(seed=0), rows, model_folder(seed=1)).train_dataset
    assert left[ROW] == "row 1"


def test_rows_are_read_once_and_kept(make, model_folder):
    """datasets names its cache by the reader, whatever that has seen before."""
    policy, rows = model_folder(seed=0), Dataset.from_list(conversations(2))
    first = make(policy, rows, model_folder(seed=1)).train_dataset
    assert make(policy, rows, model_folder(seed=1)).train_dataset._fingerprint == first._fingerprint
