"""The Hub's identifiers of licences, from their usual names.

The identifiers are those of the Hub's documentation (huggingface.co/docs/hub/repositories-licenses).
"""

import re

KNOWN_LICENCES = frozenset(  # one per word reads better than a column of eighty strings
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
    """.split()  # noqa: SIM905
)

_ALIASES = {"cc-0": "cc0-1.0", "apache": "apache-2.0"}


def licence_identifier(name: str | None) -> str | None:
    """The Hub's identifier of a licence, or None if the Hub has none.

    Args:
        name: an identifier, a usual spelling ("CC BY-NC 4.0", "Apache 2.0", "CC0") or a Creative Commons URL.
    """
    if not name or not name.strip():
        return None
    text = name.strip().lower()
    if text in KNOWN_LICENCES:
        return None if text in ("unknown", "other") else text
    url = re.search(r"creativecommons\.org/(?:licenses/([a-z-]+)/([0-9.]+)|publicdomain/zero)", text)
    if url:
        text = f"cc-{url.group(1)}-{url.group(2)}" if url.group(1) else "cc0-1.0"
    text = text.replace("-", " ")
    slug = re.sub(r"[\s_]+", "-", re.sub(r"\b(license|licence|international|unported|version)\b", " ", text).strip())
    slug = re.sub(r"-v(?=\d)", "-", slug)
    slug = "cc0-1.0" if slug.startswith("cc0") else _ALIASES.get(slug, slug)
    return slug if slug in KNOWN_LICENCES - {"unknown", "other"} else None


def forbids_commercial_use(name: str | None) -> bool:
    """Whether a licence's own name says that commercial use is not allowed."""
    text = (name or "").lower()
    return bool(re.search(r"\bnc\b|non.?commercial|academic (use|purposes)|research (use )?only", text))
