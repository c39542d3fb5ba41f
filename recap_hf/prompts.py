"""The prompts of the paper and of the authors' code."""

from recap_hf.modeling.options_recap import PAPER_PROMPT, PromptTemplate

OFFICIAL_PROMPT = PromptTemplate(
    template="Similar audios sound like\n\n{captions}\n\nThis audio sounds like ",
    separator="\n\n",
    without_captions="This audio sounds like ",
    target_prefix="",
)
"""The authors' code (Sreyan88/RECAP, commit 832ad8a), which goes with pad token `!` and end token `.`."""

PROMPT_PRESETS = {"paper": PAPER_PROMPT, "official": OFFICIAL_PROMPT}
