import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvkd_fast.data import BadPair, MicroBatching, build_dataset, collate_packed, first_fit, pairs_of_step
from tvkd_fast.data.tokenization import TokenizedPair
from tvkd_fast.models import load_tokenizer

ids = st.lists(st.integers(1, 99), min_size=1, max_size=7)
pairs = st.builds(TokenizedPair, ids, ids, ids, st.booleans(), st.booleans(), st.just("row"))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 120))
def test_bins_hold_everything_once_and_are_never_half_empty_twice(lengths, budget):
    bins = first_fit(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in b) for b in bins]
    assert all(0 < total <= budget for total in sums)
    # What opened a bin fitted into none before it.
    for k, later in enumerate(bins):
        assert all(total + lengths[later[0]] > budget for total in sums[:k])


@given(st.lists(pairs, max_size=5), st.sampled_from(["shared", "unshared", "chosen only"]))
def test_each_state_predicts_its_token(dataset, how):
    options = {"shared": how == "shared", "chosen_only": how == "chosen only"}
    batch = collate_packed(dataset, range(len(dataset)), **options)
    row = batch.input_ids[0]
    responses = [(p.prompt_ids, p.chosen_ids, p.chosen_ended) for p in dataset]
    if how != "chosen only":
        responses += [(p.prompt_ids, p.rejected_ids, p.rejected_ended) for p in dataset]
    assert batch.cu_seqlens.tolist()[1:] == torch.tensor([len(r) for _, r, _ in responses]).cumsum(0).tolist()
    for i, (prompt, response, ended) in enumerate(responses):
        states = batch.states[batch.cu_states[i] : batch.cu_states[i + 1]]
        assert row[states[1:]].tolist() == response
        assert row[states[0]] == prompt[-1]
        assert torch.equal(batch.predicting[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]], states[:-1])
        assert batch.labels[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].tolist() == response
        assert batch.ended[i] == ended
    prompts = 2 if how == "unshared" else 1
    assert batch.num_tokens == sum(prompts * len(p.prompt_ids) for p in dataset) + batch.labels.numel()
    assert batch.num_pairs == len(dataset)


@given(st.lists(pairs, min_size=1, max_size=5), st.booleans())
def test_the_layout_says_where_everything_lies(dataset, shared):
    batch = collate_packed(dataset, range(len(dataset)), shared=shared)
    row = batch.input_ids[0].tolist()
    found = [(row[a:b], row[b:c], row[c:d]) for a, b, c, d in batch.layout]
    if shared:
        assert found == [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in dataset]
    else:
        assert found == [(p.prompt_ids, r, []) for p in dataset for r in (p.chosen_ids, p.rejected_ids)]
    edges = [edge for part in batch.layout for edge in part]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (0, len(row))


@given(st.lists(pairs, min_size=1, max_size=12), st.integers(28, 60), st.sampled_from(["shared", "unshared", "padded"]))
def test_micro_batches_hold_every_pair_once_within_the_budget(dataset, tokens, packing):
    batching = MicroBatching(packing, tokens=tokens, pairs=3)
    batches = list(batching.batches(dataset, range(len(dataset))))
    assert sorted(int(i) for b in batches for i in b.pairs) == list(range(len(dataset)))
    assert all(b.num_tokens <= batching.capacity(b) for b in batches)
    if packing != "padded":
        assert all(b.input_ids.shape == (1, b.num_tokens) and b.num_tokens <= tokens for b in batches)
    for batch in batches:
        assert batch.cu_seqlens.diff()[: batch.num_pairs].tolist() == [len(dataset[i].chosen_ids) for i in batch.pairs]


def test_a_pair_longer_than_a_row_is_named(templateless, write_jsonl):
    rows = [{"prompt": "a?", "chosen": "b", "rejected": "c"}, {"prompt": "a" * 30, "chosen": "b", "rejected": "c"}]
    path = write_jsonl(rows)
    batching = MicroBatching(tokens=20)
    with pytest.raises(BadPair, match=r"row 1: the pair is longer than a packed row .*35 tokens, 20 in a row") as found:
        build_dataset(path, templateless, batching=batching)
    assert "--tokens_per_micro_batch" in str(found.value)
    dataset = build_dataset(path, templateless, batching=batching, overlong="drop")
    assert (len(dataset), dataset.report.dropped_overlong) == (1, 1)
    whole = build_dataset(path, templateless)
    with pytest.raises(BadPair, match="longer than a packed row"):
        list(batching.batches(whole, [0, 1]))
    assert len(list(MicroBatching("padded").batches(whole, [0, 1]))) == 1


def packaged_tokenizer():
    try:
        return load_tokenizer("smollm2-135m")
    except ValueError as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize(("pairs_per_step", "tokens", "goal"), [(32, 2048, 0.85), (64, 1024, 0.95)])
def test_rows_are_full_on_real_dialogues(pairs_per_step, tokens, goal, data_file):
    tokenizer = packaged_tokenizer()
    batching = MicroBatching(tokens=tokens)
    dataset = build_dataset(
        data_file("hh_harmless_train.jsonl.gz"),
        tokenizer,
        max_length=512,
        bad_pairs="drop",
        overlong="drop",
        batching=batching,
    )
    filled = capacity = 0
    for step in range(len(dataset) // pairs_per_step):
        indices = pairs_of_step(0, step, num_pairs=len(dataset), pairs_per_step=pairs_per_step)
        for batch in batching.batches(dataset, indices):
            filled += batch.num_tokens
            capacity += batching.capacity(batch)
    assert filled / capacity >= goal


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20),
    st.integers(1, 5),
    st.sampled_from(["shared", "unshared", "padded"]),
)
def test_processes_share_a_step_without_missing_or_repeating_a_pair(sizes, processes, packing):
    pairs = [TokenizedPair([5] * p, [6] * c, [7] * r, True, True, f"{i}") for i, (p, c, r) in enumerate(sizes)]
    batching = MicroBatching(packing, tokens=40, pairs=2)
    shares = [batching.share(pairs, range(len(pairs)), rank=rank, size=processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    found = [int(i) for share in shares for batch in share for i in batch.pairs]
    assert sorted(found) == list(range(len(pairs)))
    if packing != "padded":
        assert all(batch.num_tokens <= 40 for share in shares for batch in share)
