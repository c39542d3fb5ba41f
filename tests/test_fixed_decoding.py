"""Decode steps in tensors that stay where they are: transformers' captions, also when the steps are recordings."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from test_search import ENDS, stock_generate
from torch.fx.experimental.proxy_tensor import make_fx

from recap_hf.inference import prepare_for_gpu
from recap_hf.modeling.fixed_decoding_recap import FixedDecoding, record_cuda_graph


def record_on_any_device(step):
    """What a CUDA graph is: the operations of one run on the tensors of that run, without the code that chose them."""
    nothing = torch.zeros(1)
    recorded = make_fx(lambda _: step())(nothing)
    return lambda: recorded(nothing)


@pytest.mark.parametrize("record", [None, record_on_any_device], ids=["run", "recorded"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 4, "early_stopping": False, "length_penalty": 1.0, "num_return_sequences": 2},
        {"num_beams": 2, "min_new_tokens": 35, "max_new_tokens": 35},
        {"num_beams": 3, "max_new_tokens": 1},
    ],
    ids=["greedy", "beams", "penalty", "more tokens than one size", "one token"],
)
def test_equals_the_search_of_transformers(tiny_model, encoded, settings, record):
    settings = {"max_new_tokens": 19, "eos_token_id": ENDS, **settings}
    expected = stock_generate(tiny_model, *encoded, **settings)
    tiny_model.fixed_decoding = FixedDecoding(record)
    found = tiny_model.generate(encoder_outputs=encoded[0], **encoded[1], **settings)
    assert torch.equal(found, expected)
    # Once more, in the room that the last batch has used, clips in another order.
    turned = [{name: value.flip(0) for name, value in part.items() if name != "retrieved"} for part in encoded]
    again = tiny_model.generate(encoder_outputs=type(encoded[0])(**turned[0]), **turned[1], **settings)
    assert torch.equal(again, stock_generate(tiny_model, *turned, **settings))
    assert len(tiny_model.fixed_decoding._kept) == 1


def test_scores_and_other_shapes(tiny_model, encoded):
    encoding, prompts = encoded
    prompts.pop("retrieved")
    expected = [
        tiny_model.generate_with_scores(
            type(encoding)(**{name: value[:clips] for name, value in encoding.items()}),
            {name: value[:clips] for name, value in prompts.items()},
            num_beams=2,
            max_new_tokens=7,
        )
        for clips in (1, 3, 7, 1)
    ]
    tiny_model.fixed_decoding = FixedDecoding()
    for clips, (sequences, scores) in zip((1, 3, 7, 1), expected, strict=True):
        found = tiny_model.generate_with_scores(
            type(encoding)(**{name: value[:clips] for name, value in encoding.items()}),
            {name: value[:clips] for name, value in prompts.items()},
            num_beams=2,
            max_new_tokens=7,
        )
        assert torch.equal(found[0], sequences)
        assert found[1] == pytest.approx(scores, rel=1e-5)
        # Room is kept for the last shapes alone.
        assert len(tiny_model.fixed_decoding._kept) <= 2


def test_what_is_not_a_plain_search_is_done_as_before(tiny_model, encoded):
    expected = tiny_model.generate(
        encoder_outputs=encoded[0], **encoded[1], num_beams=2, no_repeat_ngram_size=2, max_new_tokens=6
    )
    tiny_model.fixed_decoding = FixedDecoding()
    found = tiny_model.generate(
        encoder_outputs=encoded[0], **encoded[1], num_beams=2, no_repeat_ngram_size=2, max_new_tokens=6
    )
    assert torch.equal(found, expected) and not tiny_model.fixed_decoding._kept


def test_a_copy_of_the_model_records_for_itself(tiny_model, encoded):
    tiny_model.fixed_decoding = FixedDecoding()
    tiny_model.generate(encoder_outputs=encoded[0], **encoded[1], num_beams=2, max_new_tokens=3)
    other = copy.deepcopy(tiny_model)
    assert tiny_model.fixed_decoding._kept and not other.fixed_decoding._kept


def test_a_cuda_graph_is_recorded_after_runs_on_a_stream_of_its_own(monkeypatch):
    """The order of calls that torch's documentation asks for; the calls themselves need a GPU."""
    calls = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def within(what):
        calls.append(f"enter {type(what).__name__}")
        yield
        calls.append("leave")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", within)
    output = torch.zeros(2)
    replay = record_cuda_graph(lambda: (calls.append("step"), output)[1])
    assert calls == [
        "side waits for main", "enter Stream", "step", "step", "step", "leave", "main waits for side",
        "enter Graph", "step", "leave",
    ]  # fmt: skip
    calls.clear()
    assert replay() is output and replay() is output
    assert calls == ["replay", "replay"]


def test_graphs_are_for_gpus(tiny_model):
    with pytest.raises(ValueError, match="on a CUDA device, this one is on cpu"):
        prepare_for_gpu(tiny_model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_recorded_steps_on_a_gpu_caption_as_transformers_do(tiny_model, encoded):
    expected = stock_generate(tiny_model, *encoded, num_beams=3, max_new_tokens=35, min_new_tokens=35)
    model = prepare_for_gpu(tiny_model.cuda())
    encoding = type(encoded[0])(**{name: value.cuda() for name, value in encoded[0].items()})
    for _ in range(2):
        found = model.generate(
            encoder_outputs=encoding, **encoded[1], num_beams=3, max_new_tokens=35, min_new_tokens=35
        )
        assert torch.equal(found.cpu(), expected)
