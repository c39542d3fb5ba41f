"""Tables of what was measured, for a terminal."""

from __future__ import annotations

from typing import Any


def format_benchmark(report: dict[str, Any]) -> list[str]:
    """Lines of the table of `recap bench`."""
    machine, floor = report["machine"], report["floor"]
    main = report["ratio_of"]
    same = {True: "identical captions", False: "OTHER CAPTIONS THAN THE REFERENCE", None: "not measured"}
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}",
        f"reference: {report['reference']['clips_per_s']:.3f} clips/s, {report['reference']['ms_per_clip']:.0f} ms a "
        f"clip; prompts of {floor['prompt_tokens']} tokens; {report['rounds']} rounds",
        f"{main['dtype']} at batch {main['batch']}: {report['ratio']:.2f} times the reference; float32: "
        f"{same[report['identical_captions']]}",
        "",
        f"{'dtype':<10}{'batch':>6}{'clips/s':>10}{'ms/clip':>10}{'ratio':>8}{'cpu':>8}{'same':>8}{'x real':>9}"
        f"{'GB':>7}{'of floor':>10}",
    ]
    for row in report["settings"]:
        lines.append(
            f"{row['dtype']:<10}{row['batch']:>6}{row['recap']:>10.3f}{row['ms_per_clip']:>10.1f}{row['ratio']:>8.2f}"
            f"{row['cpu_ratio']:>8.2f}"
            f"{row['identical']:>8.0%}{1 / row['real_time_factor']:>9.1f}{row['peak_memory_gb']:>7.2f}"
            f"{row['share_of_floor']:>10.0%}"
        )
    rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in floor["matmul_gflops"].items())
    lines += ["", f"floor: {floor['bandwidth_gb_s']:.1f} GB/s; matrix products in GFLOP/s: {rates}", ""]
    return lines + format_rows(report["stages"], "milliseconds a clip")


def format_rows(rows: list[dict[str, Any]], title: str = "") -> list[str]:
    """Rows of equal keys as a table; a column for each key."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    heads = [name.removesuffix("_ms") for name in names]
    widths = [max(len(text) for text in column) + 2 for column in zip(heads, *cells, strict=True)]
    table = ["".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in [heads, *cells]]
    return [title, *table] if title else table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return "" if value is None else str(value)
