"""Batches: every caption once, keyed randomness, and the loss of the stock forward whatever the layout."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from training_parts import captions_of, make_captioner

from recap_hf.modeling.generation_recap import RecapEncoderOutput
from recap_hf.training.collator import (
    Batch,
    CaptionCollator,
    PromptedCaptions,
    PromptOptions,
    with_targets,
)
from recap_hf.training.data import Clip
from recap_hf.training.loss import CaptionLoss, branched_mask, fuse_activations
from recap_hf.training.neighbours import Neighbours
from recap_hf.training.plans import Row, plan_epoch, plan_validation, split_rows
from recap_hf.training.task import Key


class Features:
    """Random stored features; clips of different lengths."""

    def read(self, key: str, name: str) -> np.ndarray:
        assert name == "states"
        rng = np.random.default_rng(int(key))
        return rng.normal(size=(1, 4 + 2 * (int(key) % 2), 16)).astype(np.float16)


@pytest.fixture(scope="module")
def parts():
    model, processor = make_captioner()
    clips = [Clip(f"clip {number}", captions_of(number), key=str(number)) for number in range(6)]
    clips = with_targets(clips, processor, 60)
    store_captions = [text for number in range(6) for text in captions_of(number, 2)]
    rows = np.array([[(2 * clip + 5 * place + 2) % 12 for place in range(8)] for clip in range(6)], dtype=np.int32)
    return model.eval(), processor, clips, Neighbours(rows, store_captions)


def make(parts, **options) -> PromptedCaptions:
    _, processor, clips, neighbours = parts
    return PromptedCaptions(
        clips, Features(), processor, [neighbours], PromptOptions(**{"k": 4, "seed": 7, **options})
    )


def batch_of(examples: PromptedCaptions, rows: list[Row], epoch: int = 0, prompt_weight: float = 0.0) -> Batch:
    collate = CaptionCollator(examples.processor.tokenizer.pad_token_id, prompt_weight)
    return collate([examples[Key(row, epoch)] for row in rows]).to("cpu", torch.float32)


def stock_loss(parts, pairs: list[tuple[int, int]]) -> tuple[float, int]:
    """Sum of the token losses by the model's own forward, one example at a time, and the number of tokens."""
    model, processor, clips, neighbours = parts
    total, tokens = 0.0, 0
    for clip, caption in pairs:
        retrieved = [neighbours.captions[row] for row in neighbours.rows[clip][:4]]
        inputs = processor.build_training_inputs([retrieved], [clips[clip].captions[caption]])
        states = torch.from_numpy(Features().read(clips[clip].key, "states")).float()
        encoding = RecapEncoderOutput(last_hidden_state=states, attention_mask=torch.ones(states.shape[:2]))
        count = int((inputs["labels"] != -100).sum())
        total += model(encoder_outputs=encoding, **inputs).loss.item() * count
        tokens += count
    return total, tokens


@pytest.mark.parametrize("together", [False, True])
def test_loss_equals_the_stock_forward(parts, together: bool):
    model = parts[0]
    pairs = [(clip, caption) for clip in (0, 1, 4) for caption in range(5)]
    rows = [Row(clip, tuple(range(5))) for clip in (0, 1, 4)] if together else [Row(c, (i,)) for c, i in pairs]
    batch = batch_of(make(parts), rows)
    with torch.no_grad():
        losses = CaptionLoss(model.decoder)(batch)
    expected, tokens = stock_loss(parts, pairs)
    assert len(losses) == tokens
    assert float(losses.sum()) == pytest.approx(expected, rel=1e-5)
    assert batch.weights.tolist() == [1.0] * tokens
    targets = [token for clip, caption in pairs for token in parts[2][clip].targets[caption]]
    assert batch.targets.tolist() == targets


def test_gradients_of_both_layouts_are_equal(parts):
    model = parts[0]
    model.freeze_base()
    layouts = ([Row(2, (0, 1, 2, 3, 4))], [Row(2, (caption,)) for caption in range(5)])
    gradients = []
    for rows in layouts:
        model.zero_grad()
        CaptionLoss(model.decoder)(batch_of(make(parts), rows)).sum().backward()
        gradients.append([p.grad.clone() for p in model.cross_attention_parameters()])
    for shared, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-6)


def test_fused_activations_are_the_same_function(parts):
    from copy import deepcopy

    decoder = deepcopy(parts[0].decoder)
    x = torch.linspace(-6, 6, 301)
    stock = decoder.transformer.h[0].mlp.act(x)
    fuse_activations(decoder)
    fused = decoder.transformer.h[0].mlp.act
    assert isinstance(fused, torch.nn.GELU)
    torch.testing.assert_close(fused(x), stock, rtol=1e-6, atol=1e-6)
    # Another activation is left alone.
    decoder.config.activation_function = "relu"
    decoder.transformer.h[0].mlp.act = torch.nn.ReLU()
    fuse_activations(decoder)
    assert isinstance(decoder.transformer.h[0].mlp.act, torch.nn.ReLU)


def test_prompts_are_targets_of_their_weight(parts):
    """All tokens of a prompt but the first; an example that only fills a pass has no weight at all."""
    examples = make(parts)
    rows = [Row(0, (0, 1)), Row(3, (2,))]
    plain, weighted = batch_of(examples, rows), batch_of(examples, rows, prompt_weight=0.25)
    prompts = [int((plain.segments[row] == 0).sum()) for row in range(2)]
    assert sorted(weighted.weights.tolist()) == [0.25] * (sum(prompts) - 2) + [1.0] * len(plain.targets)
    of_prompts = weighted.weights == 0.25
    rows_of, columns = weighted.target_rows[of_prompts], weighted.target_columns[of_prompts]
    assert torch.equal(weighted.input_ids[rows_of, columns + 1], weighted.targets[of_prompts])
    collate = CaptionCollator(examples.processor.tokenizer.pad_token_id, 0.25)
    assert not collate([examples[Key(rows[0], 0, weight=0.0)]]).weights.any()


def test_branched_mask_by_hand():
    mask = branched_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_an_epoch_has_every_caption_once(parts, share_prompts: bool):
    clips = parts[2]
    options = {"share_prompts": share_prompts}
    lengths = [9, 3, 5, 1, 7, 2]
    batches = plan_epoch(clips, lengths, 8, 1, 0, **options)
    seen = Counter((row.clip, caption) for batch in batches for row in batch for caption in row.captions)
    assert seen == Counter({(clip, caption): 1 for clip in range(6) for caption in range(5)})
    # 30 captions in steps of 8: three full steps and one of six, in whatever order.
    assert sorted(sum(len(row.captions) for row in batch) for batch in batches) == [6, 8, 8, 8]
    assert plan_epoch(clips, lengths, 8, 1, 0, **options) == batches
    assert plan_epoch(clips, lengths, 8, 1, 1, **options) != batches
    assert plan_epoch(clips, lengths, 8, 2, 0, **options) != batches


def test_parts_of_a_batch_are_the_batch():
    rows = [Row(0, (0, 1, 2)), Row(1, (0,)), Row(2, (1, 2)), Row(3, (0, 1))]
    for parts in (1, 2, 3, 8):
        divided = split_rows(rows, parts)
        assert len(divided) == parts
        assert [row for part in divided for row in part] == rows
    assert [sum(len(row.captions) for row in part) for part in split_rows(rows, 2)] == [4, 4]


def test_validation_plan_is_complete_and_fixed(parts):
    batches = plan_validation(parts[2], [3] * 6, 8)
    assert sum(len(row.captions) for batch in batches for row in batch) == 30
    assert plan_validation(parts[2], [3] * 6, 8) == batches


def test_draws_are_keyed_by_seed_epoch_and_example(parts):
    drawn = make(parts, draw_from=8)
    row = Row(1, (2,))
    assert drawn.retrieved(row, 3) == make(parts, draw_from=8).retrieved(row, 3)
    assert len({tuple(drawn.retrieved(row, epoch)) for epoch in range(20)}) > 5
    pool = [parts[3].captions[number] for number in parts[3].rows[1]]
    for epoch in range(20):
        chosen = drawn.retrieved(row, epoch)
        assert len(set(chosen)) == 4
        # Most similar first, unless shuffled.
        assert [pool.index(text) for text in chosen] == sorted(pool.index(text) for text in chosen)
    shuffled = make(parts, shuffle=True)
    assert {frozenset(shuffled.retrieved(row, epoch)) for epoch in range(9)} == {frozenset(pool[:4])}
    assert len({tuple(shuffled.retrieved(row, epoch)) for epoch in range(9)}) > 3


def test_the_number_of_captions_is_drawn_too(parts):
    """Each number from 1 to k is as frequent as the others; the nearest captions are taken."""
    varied = make(parts, vary_k=True)
    pool = [parts[3].captions[number] for number in parts[3].rows[1]]
    drawn = [varied.retrieved(Row(1, (2,)), epoch) for epoch in range(400)]
    assert all(chosen == pool[: len(chosen)] for chosen in drawn)
    shares = np.bincount([len(chosen) for chosen in drawn], minlength=6)[:6] / len(drawn)
    assert shares == pytest.approx([0, 0.25, 0.25, 0.25, 0.25, 0], abs=0.08)


def test_audio_dropout_hides_its_share(parts):
    hiding = make(parts, audio_dropout=0.3)
    flags = [
        hiding.audio_is_hidden(Row(clip, (caption,)), epoch)
        for clip in range(6)
        for caption in range(5)
        for epoch in range(40)
    ]
    assert sum(flags) / len(flags) == pytest.approx(0.3, abs=0.05)
    epoch = next(epoch for epoch in range(40) if hiding.audio_is_hidden(Row(0, (0,)), epoch))
    assert not batch_of(hiding, [Row(0, (0,))], epoch).hidden.any()


def test_epochs_take_turns_with_the_datastores(parts):
    _, processor, clips, first = parts
    second = Neighbours(first.rows, [f"other {text}" for text in first.captions])
    both = PromptedCaptions(clips, Features(), processor, [first, second], PromptOptions(k=2))
    assert not both.retrieved(Row(0, (0,)), 0)[0].startswith("other")
    assert both.retrieved(Row(0, (0,)), 1)[0].startswith("other")
    assert not both.retrieved(Row(0, (0,)), 2)[0].startswith("other")


def test_no_retrieval_uses_the_prompt_without_captions(parts):
    _, processor, clips, _ = parts
    batch = batch_of(PromptedCaptions(clips, Features(), processor, [], PromptOptions(k=0)), [Row(0, (0,))])
    prompt = batch.input_ids[0][batch.segments[0] == 0]
    assert processor.tokenizer.decode(prompt) == processor.prompt_without_captions


def test_prompt_lengths_measure_the_captions(parts):
    _, processor, clips, table = parts
    # Many characters in a token, and many tokens of one character: tokens count.
    texts = ["dog " * number if number % 2 else "☃" * number for number in range(12)]
    made = PromptedCaptions(clips, Features(), processor, [Neighbours(table.rows, texts)], PromptOptions(k=4))
    tokens = [len(processor.tokenizer(text)["input_ids"]) for text in texts]
    assert made.prompt_lengths() == [sum(tokens[row] for row in table.of(clip)[:4]) for clip in range(6)]
    assert len(set(made.prompt_lengths())) > 1
