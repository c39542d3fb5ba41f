"""transformers' own `Seq2SeqTrainer` trains the model unchanged."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_CAPTIONS, synthetic_clip

from recap_hf import RecapForConditionalGeneration


def test_seq2seq_trainer(tiny_model, tiny_processor, tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    tiny_model.freeze_base()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    clips = [synthetic_clip(1.0 + 0.3 * index, index) for index in range(4)]

    def collate(rows):
        audio = tiny_processor(audio=[clips[row["clip"]] for row in rows], sampling_rate=48_000, return_tensors="pt")
        with torch.no_grad():
            embeds = tiny_model.encode_audio(**audio).audio_embeds
        captions = [TINY_CAPTIONS[row["clip"]] for row in rows]
        retrieved = tiny_processor.retrieve(embeds, k=2, exclude_texts=[[caption] for caption in captions])
        return {**audio, **tiny_processor.build_training_inputs(retrieved, captions)}

    rows = [{"clip": index} for index in range(4)]
    trainer = Seq2SeqTrainer(
        model=tiny_model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=2,
            max_steps=25,
            learning_rate=2e-2,
            logging_steps=1,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        processing_class=tiny_processor,
    )
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * untrained
    changed = {name for name, value in tiny_model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".crossattention." in name for name in changed)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = RecapForConditionalGeneration.from_pretrained(tmp_path / "saved")
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_audio_and_text_together_are_refused(tiny_processor):
    with pytest.raises(ValueError, match="both were given"):
        tiny_processor(audio=[synthetic_clip(1.0, 1)], text="a dog", sampling_rate=48_000)
    with pytest.raises(ValueError, match="neither was given"):
        tiny_processor()


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_a_trainer_finds_no_tokens_to_align(tiny_model, tiny_processor, name: str):
    """It compares the tokenizer's with the text configuration's and the generation configuration's."""
    configs = (tiny_model.config.get_text_config(), tiny_model.generation_config)
    assert [getattr(config, name) for config in configs] == [getattr(tiny_processor.tokenizer, name)] * 2
