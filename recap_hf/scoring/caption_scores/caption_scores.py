"""The caption scores as an `evaluate` module: `evaluate.load(recap_hf.scoring.evaluate_module())`."""

import datasets
import evaluate

from recap_hf.scoring import score_captions

_INPUTS = """
Args:
    predictions: one caption per clip.
    references: for each clip its reference captions (a list, of any length), or one caption.
    Any other keyword argument of `recap_hf.scoring.score_captions`.
Returns:
    The corpus scores by name (None for a metric that was skipped), and `skipped`, `num_clips`, `clip_list`,
    `implementation` and `statistics`.
"""


class CaptionScores(evaluate.Metric):
    """Corpus scores of audio captions."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        shapes = (datasets.Sequence(text), text)
        return evaluate.MetricInfo(
            description="BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE, SPIDEr and FENSE of audio captions.",
            citation="",
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": text, "references": shape}) for shape in shapes],
        )

    def _compute(self, predictions, references, **options):
        result = score_captions(predictions, references, **options).to_dict()
        kept = ("skipped", "num_clips", "clip_list", "implementation", "statistics")
        return {**result["corpus"], **{key: result[key] for key in kept}}
