"""Fast captions: a search that computes a prompt once for its beams, and weights laid out for CPUs.

[`Captioner`] uses the search where it gives the same as `generate`. To use it alone:
`model.generate(..., custom_generate=SharedPromptSearch())`.
"""

from recap_hf.fast_generation.cpu_weights import cpu_capabilities, prepare_for_cpu
from recap_hf.fast_generation.search import SharedPromptSearch, fast_generate

__all__ = ["SharedPromptSearch", "cpu_capabilities", "fast_generate", "prepare_for_cpu"]
