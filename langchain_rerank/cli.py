"""The command line: `langchain-rerank demo | eval | rank | train | export | backends`."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_rerank._cli.terminal import print_json, reported, standard_output

# What is heavy is imported by the command that needs it: --help answers at once.
if TYPE_CHECKING:
    from langchain_rerank.reranker import Reranker

DEMO_QUESTIONS = 40
"""How many questions the demo asks if it is not told."""

app = typer.Typer(
    name="langchain-rerank",
    help="Put the passages that answer a question first.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help and plain usage errors: short, and the same in a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend", "-b", metavar="NAME[:MODEL]", help="The reranker; `langchain-rerank backends` lists them."
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="A YAML file that describes the reranker.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="An option of the reranker, such as device=cpu. Repeatable."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def main() -> None:
    """Run the command line; the entry point."""
    app(prog_name="langchain-rerank")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"langchain-rerank {version('langchain-rerank')}")
        raise typer.Exit


@app.callback()
def _everywhere(
    *,
    version: Annotated[  # noqa: ARG001 - its callback acts
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    # What the output's encoding cannot show is escaped, not a crash.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@app.command()
def demo(
    *,
    queries: Annotated[
        int, typer.Option("--queries", metavar="N", min=1, help="Ask N questions, evenly spread over all 125.")
    ] = DEMO_QUESTIONS,
    everything: Annotated[bool, typer.Option("--all", help="Ask all 125.")] = False,
    question: Annotated[
        int | None,
        typer.Option("--question", "-q", metavar="N", min=1, help="Show the answers to the N-th question asked."),
    ] = None,
    backend: BackendOption = None,
    config: ConfigOption = None,
    option: Options = None,
    debug: Debug = False,
) -> None:
    """See what reranking changes, on real questions.

    StackFAQ holds 719 answers of a help site. BM25 in an embedded Qdrant recalls 50 of them for each question, then
    the reranker orders these. Everything is in the package: nothing is downloaded unless you choose another backend.
    """
    with reported(debug=debug):
        from langchain_rerank._cli import experiment
        from langchain_rerank.data import load_stackfaq

        experiment.require_extras()
        reranker, collection = _reranker(backend, config, option), load_stackfaq()
        chosen = experiment.choose(collection, None if everything else queries)
        if question is not None and question > len(chosen):
            raise typer.BadParameter(
                f"{question} is more than the {len(chosen)} questions asked", param_hint="--question"
            )
        result, out = experiment.run(collection, chosen, reranker), standard_output()
        experiment.print_setting(out, f"StackFAQ, {len(collection.corpus)} answers of a help site", result, reranker)
        experiment.print_example(out, result, question)
        experiment.print_comparison(out, result.comparison)


@app.command("eval")
def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A folder in BEIR layout: corpus.jsonl[.gz], queries.jsonl, qrels.tsv."),
    ],
    *,
    queries: Annotated[
        int | None, typer.Option("--queries", metavar="N", min=1, help="Ask only N, evenly spread over all.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers, each query's too.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw them, as .png, .svg or .pdf; needs Matplotlib.")
    ] = None,
    backend: BackendOption = None,
    config: ConfigOption = None,
    option: Options = None,
    debug: Debug = False,
) -> None:
    """Measure a reranker on a collection of yours.

    BM25 in an embedded Qdrant recalls 50 documents for each query, then the reranker orders them.
    """
    with reported(debug=debug):
        from langchain_rerank._cli import experiment
        from langchain_rerank.data import read_beir

        experiment.require_extras()
        if plot is not None:
            experiment.check_plot(plot)
        reranker, collection = _reranker(backend, config, option), read_beir(folder)
        result = experiment.run(collection, experiment.choose(collection, queries), reranker)
        out = standard_output()
        experiment.print_setting(out, f"{folder}, {len(collection.corpus)} documents", result, reranker)
        experiment.print_comparison(out, result.comparison)
        if json_file is not None:
            experiment.write_json(json_file, reranker, result.comparison)
        if plot is not None:
            experiment.write_plot(plot, result.comparison)


@app.command()
def rank(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What you want to know.")],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="One text a line, or one JSON object a line with text (or page_content) and, if you like, id and "
            "metadata. - is standard input.",
        ),
    ] = Path("-"),
    *,
    top_n: Annotated[int | None, typer.Option("--top-n", "-n", metavar="N", min=0, help="Keep the best N.")] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", "-t", metavar="SCORE", min=0, max=1, help="Keep scores from here on.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON object a line.")] = False,
    backend: BackendOption = None,
    config: ConfigOption = None,
    option: Options = None,
    debug: Debug = False,
) -> None:
    """Rank texts by how well they answer QUERY.

    On a terminal you see a table; in a pipe, lines of rank, score and text with tabs between them.
    """
    with reported(debug=debug):
        from langchain_rerank._cli.texts import print_ranked, read_documents, record
        from langchain_rerank.reranker import KEEP

        if as_json and as_jsonl:
            raise typer.BadParameter("Give --json or --jsonl, not both")
        results = _reranker(backend, config, option).rerank(
            query,
            read_documents(file),
            top_n=KEEP if top_n is None else top_n,
            score_threshold=KEEP if threshold is None else threshold,
        )
        records = [record(place, result) for place, result in enumerate(results, 1)]
        if as_json:
            print_json(records, indent=2)
        elif as_jsonl:
            for line in records:
                print_json(line)
        else:
            print_ranked(standard_output(), results)


@app.command()
def train(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DATA]...",
            help="What to learn from: folders in BEIR layout, or files of JSON lines with query and positive and, "
            "if you like, negatives and grade.",
        ),
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-O", metavar="FOLDER", help="Where the model goes.")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", metavar="FILE", help="A YAML file that says all of it.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="Where to start: a folder, a name on the hub, or embedded, the default."
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            metavar="NAME[=WEIGHT]",
            help="Whose scores to learn beside the labels: bm25, dense, or a reranker such as "
            "bge:BAAI/bge-reranker-v2-m3. Repeatable.",
        ),
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            "--synthetic",
            metavar="title|first_sentence|llm",
            help="DATA is documents alone: their titles or first sentences become the queries, or the chat model of "
            "--option llm=PROVIDER:MODEL is asked for some.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", metavar="KEY=VALUE", help="An option of the recipe, such as epochs=2. Repeatable."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a small reranker on your own pairs of query and passage.

    Hard negatives are found with BM25, some queries are held out, and the model is measured on them before and after. A
    training that was stopped, with Ctrl-C for one, goes on when the same command is given again.
    """
    with reported(debug=debug):
        from langchain_rerank._cli.training import logged, print_report, settle
        from langchain_rerank.training import train_reranker

        given = {**dict(_option(each) for each in option or []), **({"base": base} if base else {})}
        settled = settle(recipe, data or [], teacher or [], synthetic, given)
        progress = sys.stderr.isatty()
        with logged(bars=progress):
            report = train_reranker(settled, output, progress=progress)
        print_report(standard_output(), report, settled)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder of a trained cross-encoder.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write to.")],
    *,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="float32|float16|int8", help="How weights are stored; they compute in float32."
        ),
    ] = "float16",
    debug: Debug = False,
) -> None:
    """Write a cross-encoder as ONNX, which the embedded backend runs without torch."""
    with reported(debug=debug):
        from langchain_rerank._cli.training import print_export
        from langchain_rerank.training import export_reranker

        export_reranker(source, target, dtype=dtype)  # type: ignore[arg-type]  # it says which there are
        print_export(standard_output(), target)


@app.command()
def backends(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    debug: Debug = False,
) -> None:
    """List the rerankers and what they need.

    You see which are installed, on which device they would run, and what to type for the others. No model is loaded.
    """
    with reported(debug=debug):
        from langchain_rerank._cli.states import print_states, states

        listed = states()
        if as_json:
            print_json([asdict(state) for state in listed], indent=2)
        else:
            print_states(standard_output(), listed)


def _reranker(backend: str | None, config: Path | None, options: Sequence[str] | None) -> Reranker:
    from langchain_rerank.factory import init_reranker

    if backend is not None and config is not None:
        raise typer.BadParameter("Give --backend or --config, not both")
    return init_reranker(config or backend, **dict(_option(option) for option in options or []))


def _option(text: str) -> tuple[str, Any]:
    """KEY=VALUE; lists, mappings and null are YAML, and of any other text pydantic makes what the option wants."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--option")
    if not value.startswith(("[", "{")) and value != "null":
        return key, value
    import yaml

    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise typer.BadParameter(f"{value!r} is not a YAML list or mapping", param_hint="--option") from None
