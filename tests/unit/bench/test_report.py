import html.parser
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from typer.testing import CliRunner

from owl_deploy.bench import decision, plots, read_result, show, write_result
from owl_deploy.bench.report import render, write_report
from owl_deploy.bench.result import Result
from owl_deploy.cli import app
from owl_deploy.errors import BadInput
from owl_deploy.finetune.picture import learning_curve_svg
from owl_deploy.inference import ENGINES
from owl_deploy.models.manifest import Finetuning
from tests.unit.bench.made import ROWS, result, with_code

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


class Outline(html.parser.HTMLParser):
    """Collects what a page is made of; an unclosed element is an error."""

    VOID = ("meta", "br", "use", "path", "image")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return render([result()])


def test_the_page_needs_nothing_else(page: str) -> None:
    outline = Outline(page)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in outline.seen}
    assert not re.search(r"(?:src|@import|url\((?!#))", page)
    links = re.findall(r'href="([^"]*)"', page)
    assert all(link.startswith("#") for link in links)


def test_every_picture_has_its_words_and_every_number_a_table(page: str) -> None:
    outline = Outline(page)
    pictures = [attributes for tag, attributes in outline.seen if tag == "svg"]
    assert len(pictures) == 2 * 2 + 1 + 2 + 1  # two metrics, trade-off, two checkpoints, costs
    assert all(len(str(attributes["aria-label"])) > 20 for attributes in pictures)
    for comparison in result().comparisons:
        assert f"<td>{comparison.ratio:.3f}</td>" in page
    assert "28.10" in page
    assert "Some CPU &lt;9000&gt;" in page
    assert "int4), the best dense" in page
    assert "Its perplexity is" in page


def test_wide_ranges_of_perplexity_have_plain_numbers() -> None:
    made = result()
    subjects = tuple(
        s.model_copy(update={"perplexity": 900.0}) if s.role == "candidate" else s
        for s in made.subjects
    )
    picture = plots.trade_off(decision.judge(made.model_copy(update={"subjects": subjects})))
    assert "$" not in picture
    assert {"20", "50", "100"} <= set(re.findall(r">([\d.]+)</text>", picture))


def test_the_decision_comes_first(page: str) -> None:
    start = page.split("<details>")[0]
    assert "Deploy dense-int8 (onnxruntime, int8)" in start  # and not the fastest, which is ruined
    assert start.count("<figure>") == 1


def test_ink_follows_the_page(page: str) -> None:
    assert "#101113" not in page
    assert "fill: var(--ink)" in page
    assert "prefers-color-scheme: dark" in page


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_points_stand_out_in_light_and_dark(page: str) -> None:
    for block in re.findall(r":root \{([^}]*)\}", page)[:2]:
        colors = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        assert contrast(colors["ink"], colors["page"]) > 7
        assert contrast(colors["ink"], colors["card"]) > 7
        assert contrast(colors["accent"], colors["page"]) > 4.5
        for engine in ENGINES.values():
            assert contrast(colors[engine.variable], colors["card"]) >= 3


def test_the_picture_shows_what_is_judged_by() -> None:
    judged = decision.judge(with_code(40))
    picture = plots.trade_off(judged)
    assert "pass@1, % of 40 (more is better)" in picture
    page = render([with_code(40)])
    assert "pass@1 with its standard error against tokens/s" in page
    assert "<td>70.0 ± 7.3 %</td>" in page
    assert "pass@1" not in render([with_code(40)], quality_metric="perplexity")


def test_one_sparsity_makes_no_picture_by_sparsity(page: str) -> None:
    made = result()
    same = tuple(
        s.model_copy(update={"zeros": 0.5 + 0.001 * s.zeros}) if s.zeros else s
        for s in made.subjects
    )
    assert "by the share of zeros" in page
    assert "by the share of zeros" not in render([made.model_copy(update={"subjects": same})])


def test_failures_are_in_the_page_and_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    made = result(failure="The engine 'x' was ended by SIGABRT.")
    assert "was ended by SIGABRT" in render([made])
    show.show(made)
    printed = capsys.readouterr().out
    assert "was ended by SIGABRT" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_an_engine_of_another_version_is_shown_too() -> None:
    made = result()
    subjects = tuple(
        s.model_copy(update={"engine": "newer"}) if s.engine == "owl" else s for s in made.subjects
    )
    page = render([made.model_copy(update={"subjects": subjects})])
    assert '<td>owl-70-owl-int8</td><td class="text">newer</td>' in page


def test_the_verb(tmp_path: Path) -> None:
    write_result(result(4), tmp_path / "one")
    write_result(result(5), tmp_path / "two")
    out = tmp_path / "report.html"
    line = ["report", str(tmp_path / "one"), str(tmp_path / "two" / "result.json"), "-o", str(out)]
    answer = CliRunner().invoke(app, line)
    assert answer.exit_code == 0, answer.output
    assert out.read_text().count("<h2>Measured ") == 2
    assert CliRunner().invoke(app, line).exit_code == 0  # a page of owl's is replaced
    with pytest.raises(BadInput, match="does not exist"):
        write_report([result(4)], tmp_path / "nowhere" / "r.html")
    out.write_text("<p>mine")
    with pytest.raises(BadInput, match=r"no page of owl's.*--force"):
        write_report([result(4)], out)
    assert CliRunner().invoke(app, [*line, "--force"]).exit_code == 0
    assert "<h2>Measured " in out.read_text()
    for name in ("one", "two"):
        measured = tmp_path / name / "result.json"
        before = measured.read_bytes()
        answer = CliRunner().invoke(app, [*line[:-1], str(measured), "--force"])
        assert "is what the page is made of" in str(answer.exception)
        assert measured.read_bytes() == before


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
def test_a_browser_shows_it_without_overflow(
    page: str, tmp_path: Path, width: int, dark: bool
) -> None:
    probe = """<script>
      window.onerror = (message) => { document.title = "error " + message; };
      addEventListener("load", () => {
        const root = document.documentElement;
        const wide = [...document.querySelectorAll("body *")].filter((e) =>
          !e.closest(".scroll") && !e.closest("svg") &&
          e.getBoundingClientRect().right > root.clientWidth + 1);
        const flat = [...document.querySelectorAll("figure svg")].filter((e) =>
          e.getBoundingClientRect().height < 40);
        document.title = `wide ${wide.length} flat ${flat.length} of ` +
          document.querySelectorAll("figure svg").length;
      });
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", probe))
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},2400",
    ]
    command += ["--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--force-dark-mode"] if dark else []
    picture = tmp_path / "page.png"
    seen = subprocess.run(
        [*command, "--dump-dom", f"--screenshot={picture}", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", seen.stdout)
    assert title is not None
    assert title[1] == "wide 0 flat 0 of 8"


def test_names_that_are_no_text_for_a_picture(tmp_path: Path) -> None:
    """A formula that is none, half a letter, and a letter that the font lacks."""
    folder = tmp_path / "bench"
    write_result(result(), folder)
    text = (folder / "result.json").read_text()
    for name, odd in (
        ("owl-70-owl-int8", "$x_{$"),
        ("owl-50-deepsparse", "a\\ud800"),
        ("dense-int4", "\\u732b"),
    ):
        text = text.replace(name, odd)
    (folder / "result.json").write_text(text)
    run = [
        sys.executable,
        "-m",
        "owl_deploy",
        "report",
        str(folder),
        "-o",
        str(tmp_path / "r.html"),
    ]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "r.html").read_text()
    assert "$x_{$" in page
    assert "a?" in page
    assert "\u732b" in page


def test_matplotlib_says_nothing_of_its_caches(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    write_result(result(), folder)
    run = [
        sys.executable,
        "-m",
        "owl_deploy",
        "report",
        str(folder),
        "-o",
        str(tmp_path / "r.html"),
    ]
    nowhere = {"HOME": "/proc/nowhere", "MPLCONFIGDIR": "/proc/nowhere"}
    done = subprocess.run(
        run, capture_output=True, text=True, check=False, env={**os.environ, **nowhere}
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "{}", "It is a checkpoint: owl prune"),
        ("adapter_config.json", "{}", "It is an adapter: owl eval"),
        ("model.onnx", "", "It is a deployment: owl generate"),
        ("owl.json", '{"kind": "checkpoint"}', "It is a checkpoint"),
        ("notes.txt", "", "Give what owl bench -o wrote"),
    ],
)
def test_another_folder_is_named_for_what_it_is(
    tmp_path: Path, file: str, content: str, words: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(BadInput, match=words):
        read_result(tmp_path)


def test_spread_is_the_same_on_the_page_and_in_the_terminal(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = result()
    row = made.statistics["decode@512"]["dense-fp32"]
    rows = {"decode@512": {"dense-fp32": row | {"spread": 0.42}}}
    made = made.model_copy(update={"statistics": made.statistics | rows})
    assert "<td>42.0%</td>" in render([made])
    show.show(made)
    printed = capsys.readouterr().out
    assert "42%" in next(line for line in printed.splitlines() if line.startswith("dense-fp32"))
    assert page.count("Spread: ") == 1
    assert '<th scope="col">p99, ms</th>' in page


@pytest.mark.parametrize(("pairs", "words"), [(4, "range of 4 rounds"), (8, "90 % interval")])
def test_intervals_are_called_what_they_are(
    capsys: pytest.CaptureFixture[str], pairs: int, words: str
) -> None:
    page = render([result(pairs)])
    assert f'<th scope="col">{words}</th>' in page
    assert f"its {words} is the sign test's" in page
    assert f"times as fast, {words}" in page
    show.show(result(pairs))
    assert f"speed-ups with their {words};" in " ".join(capsys.readouterr().out.split())


def test_a_plain_read_is_no_limit(page: str) -> None:
    assert "a yardstick and no limit" in page


def test_outlier_ratios_are_named_where_there_are_any(page: str) -> None:
    assert "outlier ratio, %" in page
    made = result()
    subjects = tuple(
        s.model_copy(
            update={"blocks": [b.model_copy(update={"outlier_ratio": None}) for b in s.blocks]}
        )
        for s in made.subjects
    )
    without = render([made.model_copy(update={"subjects": subjects})])
    assert "sparsity of each block." in without
    assert "outlier ratio" not in without


def test_every_table_has_a_name_of_its_own(page: str) -> None:
    seen = Outline(page).seen
    names = [how["aria-label"] for tag, how in seen if tag == "div" and "aria-label" in how]
    assert len(names) == len(set(names)) == 2 * 2 + 1 + 2 + 1  # as the pictures
    assert "table: Memory and size" in names


def test_a_page_without_results_is_headed_by_what_it_shows() -> None:
    assert "<h1>What to deploy on this machine</h1>" in render([result()])
    assert "<h1>What training came to</h1>" in render([], [("a run", "<svg></svg>")])
    assert "<h1>What was to be measured</h1>" in render([])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are made, to be looked at."""
    figures: list[Figure] = []

    def make(self: Figure, *arguments: Any, **options: Any) -> Any:
        figures.append(self)
        return plain(self, *arguments, **options)

    plain = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", make)
    return figures


def boxes(figure: Figure, artists: Sequence[Artist]) -> list[Any]:
    """Where these are, in pixels, once all is in its place."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [one.get_window_extent(canvas.get_renderer()) for one in artists]


# As `entries` calls deployments of which two folders have one name.
PATHS = "/home/somebody/models/tried in november/run-{}-of-the-search/deployment in owl, {}"


@pytest.mark.parametrize(
    "name",
    [
        lambda place: PATHS.format("abcdefg"[place], place + 1),
        lambda place: f"{'abcdefg'[place]}{'-of-the-search' * 6}/deployment in owl, {place + 1}",
        lambda place: f"SmolLM2-135M-Instruct-{'very-' * 12}pruned-{place}",
    ],
)
def test_labels_begin_within_their_picture(drawn: list[Figure], name: Callable[[int], str]) -> None:
    made = result(4).model_dump_json()
    for place, row in enumerate(ROWS):
        made = made.replace(f'"{row[0]}"', f'"{name(place)}"')
    long = Result.model_validate_json(made)
    pictures = plots.speedups(long, "decode@512") + plots.costs(long)
    assert "/home/somebody" not in pictures
    for figure in drawn:
        (axes,) = figure.axes
        labels = axes.get_yticklabels()
        found = boxes(figure, [*labels, axes.xaxis.label])
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in found)
        assert axes.bbox.width > 0.2 * figure.bbox.width
        assert len({label.get_text() for label in labels}) == len(labels)
        rows = sorted(found[:-1], key=lambda box: box.y0)
        assert all(one.y1 <= other.y0 for one, other in itertools.pairwise(rows))


@pytest.mark.parametrize("teacher", [None, "dense"])
def test_a_learning_curve_is_not_covered(drawn: list[Figure], teacher: str | None) -> None:
    done = Finetuning.model_validate(
        {
            "checkpoint": {"path": "model", "weights_sha256": ""},
            "settings": {"method": "masked"},
            "teacher": teacher,
            "steps": 2,
            "seconds": 1.0,
            "tokens": 64,
            "held_out_loss": {"before": 3.0, "after": 2.0, "teacher": teacher and 1.0},
            "curve": [
                {"step": 0, "loss": None, "eval_loss": 3.0},
                {"step": 1, "loss": 2.5, "eval_loss": None},
                {"step": 2, "loss": 2.4, "eval_loss": 2.0},
            ],
        }
    )
    picture = learning_curve_svg(done)
    assert ("training loss, with the teacher's share" in picture) == bool(teacher)
    (figure,) = drawn
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    (box,) = boxes(figure, [legend])
    assert not box.overlaps(axes.bbox)
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1
