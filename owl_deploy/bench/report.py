"""`owl report`: results as one page that needs nothing else: phone, print, light and dark."""

import contextlib
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from owl_deploy import __version__
from owl_deploy.bench import decision, plots
from owl_deploy.bench.result import Result, Subject, metrics_of
from owl_deploy.bench.scenario import Metric
from owl_deploy.bench.table import headline
from owl_deploy.engines.registry import ENGINES
from owl_deploy.errors import BadInput

_STYLE = """
:root { color-scheme: light dark; --ink: #17191c; --faint: #8a8f96; --page: #ffffff;
  --card: #f4f5f7; --accent: #0b5cad; LIGHT_INKS }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #878d96; --page: #14161a;
  --card: #1e2126; --accent: #7db7f5; DARK_INKS } }
@media print { :root { --ink: #000; --faint: #777; --page: #fff; --card: #fff; }
  figure, table { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 56rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin-bottom: 0.3rem; }
.headline li { margin: 0.3rem 0; }
.decision { font-size: 1.15rem; }
.note { border-left: 3px solid var(--accent); padding-left: .7rem; }
figure { margin: 1rem 0; padding: 0.6rem; background: var(--card); border-radius: 0.4rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 44rem; margin: auto; }
figcaption { font-size: 0.9rem; }
.paper { background: #fff; color: #17191c; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; width: 100%; }
th, td { padding: 0.25rem 0.5rem; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: normal; }
"""


def _style() -> str:
    """The style sheet, with the ink of every engine that there is now."""
    style = _STYLE
    for place, shade in (("LIGHT_INKS", "light"), ("DARK_INKS", "dark")):
        inks = (f"--{engine.name}: {getattr(engine.ink, shade)};" for engine in ENGINES.values())
        style = style.replace(place, " ".join(inks))
    return style


def write_report(
    results: Sequence[Result],
    path: Path,
    curves: Sequence[tuple[str, str]] = (),
    max_loss: float | None = None,
) -> None:
    """Write the page for `results` to the file `path`; raises `BadInput` if that cannot be.

    `curves`: learning curves of fine-tunings, each a caption and an SVG. `max_loss`: the share of
    quality that may go in the choice of what to deploy (decision.py).
    """
    page = render(results, curves, max_loss)
    if not path.absolute().parent.is_dir():
        raise BadInput(f"The folder {path.absolute().parent} does not exist.", "Create it first.")
    temporary = path.with_name(f".{path.name}.owl-tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # paths need be no text
        temporary.replace(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}).") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def render(
    results: Sequence[Result],
    curves: Sequence[tuple[str, str]] = (),
    max_loss: float | None = None,
) -> str:
    """The page, as HTML; `curves` and `max_loss` as in `write_report`."""
    parts = [part for result in results for part in _result(result, len(results) > 1, max_loss)]
    if curves:
        parts.append("<h2>Fine-tuning</h2>")
        for caption, svg in curves:
            figure = _figure(svg[svg.index("<svg") :], caption)
            parts.append(figure.replace("<figure>", '<figure class="paper">'))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>owl report</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>What to deploy on this machine</h1>\n{body}\n</main>\n"
        f"<footer><p>owl-deploy {__version__}</p></footer>\n</body>\n</html>\n"
    )


def _result(result: Result, several: bool, max_loss: float | None) -> Iterator[str]:
    if several:
        yield f"<h2>Measured {_text(result.created)}</h2>"
    yield f'<p class="decision">{_text(decision.sentence(result, max_loss))}</p>'
    yield from _picture(result)
    compared = headline(result)
    yield "<details><summary>Every candidate against the best dense</summary>"
    yield _list(compared or ["No dense baseline was measured: there is nothing to compare."])
    yield "</details>"
    for warning in (*result.failures, *result.notes):
        yield f'<p class="note">{_text(warning)}</p>'
    for metric in metrics_of(result.scenarios):
        yield from _metric(result, metric)
    yield from _quality(result)
    yield from _blocks(result)
    yield "<h2>Memory and size</h2>"
    if any(subject.samples for subject in result.subjects):
        yield _figure(plots.costs(result), "Peak resident memory and file size, MB.")
    yield _costs(result)
    yield from _method(result)


def _list(lines: Sequence[str]) -> str:
    return '<ul class="headline">' + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _metric(result: Result, metric: Metric) -> Iterator[str]:
    yield f"<h2>{_text(metric.title[0].upper() + metric.title[1:])}</h2>"
    rows = [c for c in result.comparisons if c.scenario == metric.key]
    if rows:
        words = "; ".join(f"{c.candidate} over {c.baseline} {c.text}" for c in rows)
        caption = f"How many times as fast as dense ({metric.key})."
        yield _figure(plots.speedups(result, metric.key), caption, words)
    zeros = {s.name: s.zeros for s in result.subjects}
    known = [c for c in rows if "same engine" in c.against and zeros[c.candidate] is not None]
    if len(known) > 1:
        caption = "Speed-up over dense in the same engine, by the share of zeros."
        yield _figure(plots.by_sparsity(result, metric.key), caption)
    yield _speed_table(result, metric)
    if rows:
        yield _table(
            ("deployment", "against", "as", "times as fast", "90 % interval", "in words"),
            [
                (
                    c.candidate,
                    c.baseline,
                    ", ".join(c.against),
                    f"{c.ratio:.3f}",
                    f"{c.low:.3f} to {c.high:.3f}",
                    c.text,
                )
                for c in rows
            ],
        )


def _speed_table(result: Result, metric: Metric) -> str:
    rows = result.statistics.get(metric.key, {})
    return _table(
        (
            "deployment",
            "engine",
            "type",
            "ms",
            "p90",
            "p99",
            "spread",
            "tokens/s",
            "of a plain read",
        ),
        [
            (
                subject.name,
                subject.engine,
                subject.precision,
                f"{row['median_ms']:.2f}",
                f"{row['p90_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
                f"{row['spread']:.1%}",
                f"{row['tokens_per_s']:.1f}",
                f"{row['roofline']:.0%}" if "roofline" in row else "",
            )
            for subject, row in ((s, rows[s.name]) for s in result.subjects if s.name in rows)
        ],
    )


def _picture(result: Result) -> Iterator[str]:
    """What a user decides by."""
    metric = metrics_of(result.scenarios)[0]
    if plots.with_quality(result, metric.key):
        caption = (
            f"Perplexity against tokens/s ({metric.key}). Filled: pruned; hollow: dense; the "
            "larger the mark, the larger the files. The line joins what nothing beats in both."
        )
        yield _figure(plots.trade_off(result, metric.key), caption)


def _quality(result: Result) -> Iterator[str]:
    metric = metrics_of(result.scenarios)[0]
    subjects = plots.with_quality(result, metric.key)
    if not subjects:
        return
    yield "<h2>Quality beside speed</h2>"
    points = [
        (result.statistics[metric.key][s.name]["tokens_per_s"], float(s.perplexity or 0))
        for s in subjects
    ]
    front = set(plots.pareto(points))
    yield _table(
        ("deployment", "zeros", "perplexity", "tokens/s", "nothing beats it in both"),
        [
            (
                subject.name,
                "" if subject.zeros is None else f"{subject.zeros:.1%}",
                f"{loss:.2f}",
                f"{speed:.1f}",
                "yes" if index in front else "no",
            )
            for index, (subject, (speed, loss)) in enumerate(zip(subjects, points, strict=True))
        ],
    )


def _blocks(result: Result) -> Iterator[str]:
    seen: list[tuple[float, ...]] = []
    for subject in result.subjects:
        shape = tuple(block.sparsity for block in subject.blocks)
        if not shape or shape in seen:  # one checkpoint, exported for several engines
            continue
        if not seen:
            yield "<h2>Sparsity by block</h2>"
        seen.append(shape)
        caption = f"{subject.name}: sparsity of each block, and its outlier ratio."
        yield _figure(plots.blocks(subject), caption)
        yield _table(
            ("block", "sparsity", "outlier ratio, %"),
            [
                (
                    block.name,
                    f"{block.sparsity:.4f}",
                    "" if block.outlier_ratio is None else f"{block.outlier_ratio:.3f}",
                )
                for block in subject.blocks
            ],
        )


def _costs(result: Result) -> str:
    def row(subject: Subject) -> tuple[str, ...]:
        return (
            subject.name,
            subject.engine,
            f"{subject.size_bytes / 1e6:.1f}",
            f"{subject.peak_bytes / 1e6:.0f}",
            f"{subject.load_s:.2f}",
            str(subject.about.get("runtime", "")),
            str(subject.about.get("through", "")),
        )

    heading = ("deployment", "engine", "file MB", "peak MB", "load s", "version", "driven by")
    return _table(heading, [row(subject) for subject in result.subjects if subject.samples])


def _method(result: Result) -> Iterator[str]:
    here = result.machine
    yield "<h2>How it was measured</h2>"
    yield (
        f"<p>{result.pairs} rounds. In a round every deployment runs once, in a fresh process; the "
        "next round goes the other way round (A B B A), so that a machine that warms up does so to "
        "all alike. Warm-up is thrown away. A process counts by its median latency; a speed-up is "
        "the median over rounds of the ratio of two processes, and its interval (90 %) is "
        "bootstrapped over rounds. Caches hold real keys and values up to the context. All engines "
        f"had {result.threads} threads.</p>"
    )
    yield (
        f"<p>Machine: {_text(here.cpu)}, {here.physical_cores} cores, "
        f"{here.memory_bytes / 2**30:.0f} GiB, {_text(here.system)}; "
        f"{_text(', '.join(here.isa))}; governor {_text(here.governor or 'not visible')}. "
        f"Before the run other processes kept {here.busy_cores:.1f} cores busy. A plain read of "
        f"memory reached {result.read_gb_per_s:.1f} GB/s: a decoder that reads all of its file for "
        "each token can come to 100 % of that, and one that skips zeros to more.</p>"
    )
    yield f"<p>Measured {_text(result.created)} with owl-deploy {_text(result.owl_version)}.</p>"


def _figure(svg: str, caption: str, words: str = "") -> str:
    """A picture with its caption; `words` are for those who cannot see it."""
    label = html.escape(f"{caption} {words}".strip(), quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(kind: str, column: int, value: str) -> str:
        text = heading[column] in ("against", "as", "in words", "driven by", "version", "engine")
        mark = ' class="text"' if text else ""
        return f"<{kind}{mark}>{_text(value)}</{kind}>"

    def line(kind: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(cell(kind, i, v) for i, v in enumerate(values)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    head = line("th", heading).replace("<th", '<th scope="col"')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {_text(heading[0])}">'
        f"<table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _text(value: str) -> str:
    return html.escape(value)
