"""What MkDocs takes from the repository: the command line's reference, and the raw results."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.main import get_command

from owl_deploy.cli import app

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the raw results beside the page that speaks of them."""
    for path in sorted(RESULTS.rglob("*.*")):
        place = f"results/{path.relative_to(RESULTS)}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Set the command line's own words where [[cli]] stands; raw results lie beside a page here."""
    markdown = markdown.replace("../benchmarks/results/", "results/")  # from any depth
    if "[[cli]]" not in markdown:
        return markdown
    command = get_command(app)
    context = command.make_context("owl", [], resilient_parsing=True)
    made = get_docs_for_click(obj=command, ctx=context, name="owl")
    return markdown.replace("[[cli]]", made[made.index("\n## ") :])  # after what `owl --help` lists
