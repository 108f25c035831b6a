"""`demo` and `eval`: what they print is what the evaluation functions give."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from langchain_rerank import create_qdrant_retriever, init_reranker
from langchain_rerank.cli import app
from langchain_rerank.data import load_stackfaq
from langchain_rerank.evaluation import compare, rerank, retrieve, rows, spread_sample, typical_gain, verdict

QUERIES = 3


def cli(*arguments, columns=80):
    """Run a command that succeeds, and give back what it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    assert (result.exit_code, result.exception) == (0, None), result.output
    return result.stdout


def cells(printed):
    """The table of a comparison: first column to the other two."""
    found = re.findall(r"^ *(\S.*?) {2,}(\S.*?) {2,}(\S.*?) *$", printed, re.MULTILINE)
    return {what: (before, after) for what, before, after in found}


@pytest.fixture(scope="module")
def expected():
    """The demo's question by question, computed without the command line."""
    collection, reranker = load_stackfaq(), init_reranker("embedded")
    asked = spread_sample(list(collection.queries), QUERIES)
    with create_qdrant_retriever(collection.documents, k=50) as retriever:
        before = {query_id: retrieve(retriever, collection.queries[query_id]) for query_id in asked}
    after = {query_id: rerank(reranker, collection.queries[query_id], before[query_id]) for query_id in asked}
    return collection, before, after, compare(collection.qrels, before, after)


@pytest.fixture(scope="module")
def shown():
    """What the demo prints."""
    return cli("demo", "--queries", QUERIES)


@pytest.fixture
def planets(tmp_path):
    """A collection of four documents and three queries, the last without judgements."""
    documents = {
        "mars": "Mars is called the red planet.",
        "jupiter": "Jupiter is the largest planet, larger than any other planet.",
        "stew": "A tin of red beans, one onion, which is chopped, and one tomato: one calls it a red stew.",
        "bread": "Bread is baked from flour.",
    }
    queries = {"q1": "Which one is called the red planet?", "q2": "How is bread baked?", "q3": "Who?"}
    write = {
        "corpus.jsonl": [json.dumps({"_id": name, "title": "", "text": text}) for name, text in documents.items()],
        "queries.jsonl": [json.dumps({"_id": name, "text": text}) for name, text in queries.items()],
        "qrels.tsv": ["query-id\tcorpus-id\tscore", "q1\tmars\t1", "q2\tbread\t1"],
    }
    for name, lines in write.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_demo_prints_the_numbers_that_evaluation_gives(shown, expected):
    *_, comparison = expected
    printed = cells(shown)

    numbers = {what: (before, after) for what, before, after in rows(comparison)}
    for metric in ("nDCG@10", "MRR@10", "R@5", "R@10", "R@50"):
        assert printed[metric] == numbers[metric]
    assert re.fullmatch(r"\d+ \+ \d+", " ".join(printed["ms per query"]))
    assert verdict(comparison) in " ".join(shown.split())


def test_the_demo_says_what_it_asked_of_whom(shown):
    assert shown.startswith(
        "StackFAQ, 719 answers of a help site; 3 of 125 questions.\n"
        "Before: the best 50 of BM25 in Qdrant. After: the same 50, ordered by embedded.\n"
    )


def test_context_tokens_are_those_of_the_embedded_models_tokenizer(shown, expected):
    _, before, after, _ = expected
    tokenizer = init_reranker("embedded").backend
    tokenizer.warmup()

    def tokens(rankings, best):
        texts = [document.page_content for ranking in rankings.values() for document in ranking.documents[:best]]
        return sum(len(tokenizer._offsets(text)) for text in texts) / QUERIES

    assert cells(shown)["context tokens"] == (f"{tokens(before, 10):.0f} (best 10)", f"{tokens(after, 5):.0f} (best 5)")


def test_the_demo_shows_the_question_with_the_median_gain(shown, expected):
    collection, *_, comparison = expected
    typical = typical_gain(comparison.gains)
    before, after = (stage.scores["nDCG@10"][typical] for stage in (comparison.before, comparison.after))

    assert f"\n{collection.queries[typical]}\n" in shown
    gained = sum(gain > 0 for gain in comparison.gains.values())
    assert (
        f"Of the {gained} questions that gained, this one has the median gain: its nDCG@10 goes from "
        f"{before:.2f} to {after:.2f}." in " ".join(shown.split())
    )


def test_the_demo_marks_the_right_answers_before_and_after(expected):
    collection, before, after, _ = expected
    query_id = list(before)[1]

    wide = cli("demo", "--queries", QUERIES, "--question", "2", columns=400)

    assert f"\n{collection.queries[query_id]}\n" in wide
    assert "Question 2 of 3: its nDCG@10" in wide
    lines = [line for line in wide.splitlines() if re.match(r"[1-5] ", line)]
    for ranked, start in ((before[query_id], 2), (after[query_id], 2 + (len(lines[0]) - 2) // 2)):
        marks = ["\u2713" in line[start : start + 3] for line in lines]
        assert any(marks)
        assert marks == [document.id in collection.qrels[query_id] for document in ranked.documents[:5]]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_demo_fits_the_terminal(planets, columns, shown):
    printed = shown if columns == 80 else cli("demo", "--queries", "1", columns=columns)

    assert max(map(len, printed.splitlines())) <= columns
    assert "\u2026" not in printed  # rich's mark of a cut cell


def test_another_backend_is_one_option_away(shown, tmp_path):
    (tmp_path / "rerank.yaml").write_text("backend: embedded\nretrieval_weight: 1.0\n")

    printed = cells(cli("demo", "--queries", QUERIES, "--config", tmp_path / "rerank.yaml"))

    for metric in ("nDCG@10", "MRR@10", "R@5", "R@10"):
        assert printed[metric][0] == printed[metric][1] == cells(shown)[metric][0]  # the first stage's order, kept


def test_a_question_that_was_not_asked_is_wrong_usage():
    result = CliRunner().invoke(app, ["demo", "--queries", "2", "--question", "3"])

    assert result.exit_code == 2
    assert "3 is more than the 2 questions asked" in result.stderr


def test_a_missing_extra_is_named_before_anybody_waits():
    code = """
import sys
sys.modules[sys.argv.pop(1)] = None
from langchain_rerank.cli import main
main()
"""
    for module, extra in (("ir_measures", "eval"), ("langchain_qdrant", "qdrant")):
        command = [sys.executable, "-c", code, module, "demo"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        line = f"langchain-rerank: {module} not found. Install with: pip install 'langchain-rerank[{extra}]'\n"
        assert (result.returncode, result.stdout, result.stderr) == (1, "", line)


def test_eval_measures_a_collection_in_beir_layout(planets):
    printed = cli("eval", planets, "--json", planets / "out.json")

    assert f"{planets}, 4 documents; 2 of 3 questions." in " ".join(printed.split())
    assert cells(printed)["MRR@10"] == ("0.750", "1.000")
    written = json.loads((planets / "out.json").read_text())
    assert (written["backend"], written["queries"]) == ("embedded", 2)
    assert written["before"]["MRR@10"] == 0.75
    assert written["scores"]["after"]["MRR@10"] == {"q1": 1.0, "q2": 1.0}


def test_eval_asks_as_many_queries_as_it_is_told(planets):
    cli("eval", planets, "--queries", "1", "--json", planets / "out.json")

    assert json.loads((planets / "out.json").read_text())["queries"] == 1


@pytest.mark.parametrize(("name", "start"), [("gain.png", b"\x89PNG"), ("gain.SVG", b"<?xml"), ("gain.pdf", b"%PDF")])
def test_eval_draws_what_it_measured(planets, name, start):
    cli("eval", planets, "--plot", planets / name)

    assert (planets / name).read_bytes().startswith(start)


def test_eval_says_what_is_wrong_with_a_folder(planets):
    def complaint(*arguments):
        result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
        return result.stderr

    assert "has no corpus.jsonl or corpus.jsonl.gz" in complaint(planets / "nowhere")
    assert "Cannot draw gain.txt: the name of a picture ends in .png" in complaint(planets, "--plot", "gain.txt")
    assert "Cannot write" in complaint(planets, "--plot", planets / "nowhere" / "gain.png")
    assert "Cannot write" in complaint(planets, "--json", planets / "nowhere" / "out.json")
    (planets / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nother\tmars\t1\n")
    assert "The qrels judge none of the queries" in complaint(planets)


@pytest.mark.slow
def test_reranking_helps_on_all_125_questions():
    printed = " ".join(cli("demo", "--all").split())

    [(mean, low, high)] = re.findall(r"nDCG@10 (\S+), 95 % interval (\S+) to (\S+) \(.* over 125 queries", printed)
    assert float(mean) > 0.05
    assert 0 < float(low) < float(mean) < float(high)
