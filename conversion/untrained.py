"""A captioner of a CLAP and a GPT-2 that nobody trained together: `recap assemble`."""

import json
from pathlib import Path
from typing import Any

from recap_hf import RecapForConditionalGeneration, RecapProcessor, open_datastore
from recap_hf.files import write_text
from recap_hf.hub.facts import FACTS_FILE
from recap_hf.hub.prepare import prepare_folder
from recap_hf.modeling.configuration_recap import UNTRAINED
from recap_hf.training.tasks.bases import load_clap, load_gpt2

from .output import check_replaceable, finished_folder

SUMMARY = (
    "An untrained assembly of a CLAP and a GPT-2. The language model continues a prompt of retrieved captions; CLAP "
    "chooses, of its candidates and of the retrieved captions, the nearest to the recording. Nothing was trained to "
    "describe audio."
)


def assemble(
    clap: str, decoder: str, datastore: str | Path, output: str | Path, k: int = 4, overwrite: bool = False
) -> dict[str, Any]:
    """Makes the folder of an untrained captioner: model, processor, datastore, card.

    Args:
        clap: Hub id or folder of a CLAP with its tokenizer, or of a RECAP checkpoint; `embedded` for the default's.
        decoder: the same for a GPT-2.
        datastore: see [`open_datastore`]: captions in a file are embedded, a datastore must come from this CLAP.
        output: folder to make.
        k: retrieved captions in a prompt.
        overwrite: replace an existing folder.

    Returns:
        What was made, as plain data.

    Raises:
        OSError, ValueError: if a part cannot be loaded or does not fit; nothing is written.
    """
    # Before the captions are embedded, not after it.
    check_replaceable(output, overwrite, [FACTS_FILE])
    encoder, clap_tokenizer, extractor = load_clap(clap, with_texts=True)
    gpt2, tokenizer = load_gpt2(decoder)
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(encoder, gpt2, conditioning=UNTRAINED)
    settings = {"feature_extractor": extractor, "num_retrieved_captions": k}
    processor = RecapProcessor.from_config(model.config, tokenizer, clap_tokenizer, **settings)
    processor.datastore = open_datastore(datastore, model, processor)
    processor.check_model(model)
    model.generation_config.num_beams, model.generation_config.rerank = 4, "clap"
    model.generation_config.copy_margin = 0.0
    with finished_folder(output, overwrite, [FACTS_FILE]) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        facts = {
            "summary": SUMMARY,
            "limits": ["It is untrained: a caption is as good as its datastore and its CLAP."],
        }
        write_text(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")
        prepare_folder(folder, Path(output).resolve().name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"output": str(output), "trained": False, "parameters": parameters, "captions": len(processor.datastore)}
