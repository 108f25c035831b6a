import gzip
import json
import runpy
from pathlib import Path

import pytest

from langchain_rerank.data import STACKFAQ, Collection, load_stackfaq, read_beir
from langchain_rerank.errors import ConfigurationError

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "build_demo_data.py"))
"""What makes the demo collection from the whole data set."""

CORPUS = '{"_id": "d1", "title": "Mars", "text": "is red."}\n{"_id": "d2", "title": "", "text": "Über Brot"}\n'
QUERIES = '{"_id": "q1", "text": "red planet"}\n{"_id": "q2", "text": "not judged"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n"


def beir(folder, *, corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    for name, content in (("corpus.jsonl", corpus), ("queries.jsonl", queries), ("qrels.tsv", qrels)):
        (folder / name).write_text(content, encoding="utf-8")
    return folder


# The demo collection -------------------------------------------------------------------------------------------------


def test_the_demo_has_all_answers_and_one_paraphrase_of_each_question():
    collection = load_stackfaq()
    questions = [query.split("-")[0] for query in collection.queries]

    assert len(collection.corpus) == 719
    assert questions == [f"q{number}" for number in range(125)]
    assert collection.qrels.keys() == collection.queries.keys()


def test_every_judged_answer_is_there():
    collection = load_stackfaq()
    judged = [answer for grades in collection.qrels.values() for answer in grades]

    assert sorted(judged) == sorted(collection.corpus)
    assert all(grade == 1 for grades in collection.qrels.values() for grade in grades.values())


def test_no_text_is_empty():
    collection = load_stackfaq()

    assert all(text.strip() for text in [*collection.corpus.values(), *collection.queries.values()])


def test_the_data_card_gives_the_counts_licence_and_citation():
    card = (STACKFAQ / "DATA_CARD.md").read_text(encoding="utf-8")

    for fact in ("719", "125", "CC BY-SA", "MIT", "Stack Exchange", "Karan"):
        assert fact in card


def test_the_answers_become_documents_with_their_ids():
    collection = load_stackfaq()
    first = collection.documents[0]

    assert len(collection.documents) == 719
    assert (first.id, first.page_content) == ("d0-0", "Use ~~tildes around the words~~.")


# How it was made -----------------------------------------------------------------------------------------------------


def test_the_same_source_gives_the_same_collection(tmp_path):
    SCRIPT["build"](STACKFAQ, tmp_path)

    assert read_beir(tmp_path) == load_stackfaq()


def test_the_bytes_depend_on_the_content_alone(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for target in (first, second):
        SCRIPT["build"](STACKFAQ, target)

    for name in ("corpus.jsonl.gz", "queries.jsonl", "qrels.tsv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "corpus.jsonl.gz").read_bytes()[3:8] == bytes(5)  # no flags, so no file name, and no time
    assert (STACKFAQ / "corpus.jsonl.gz").read_bytes()[3:8] == bytes(5)


def test_one_paraphrase_is_drawn_for_each_question_among_those_with_judgements(tmp_path):
    queries = [f"q{faq}-{number}" for faq in range(12) for number in range(9)]
    judged = [query for query in queries if not query.endswith("-3")]
    source = beir(
        tmp_path,
        queries="".join(json.dumps({"_id": query, "text": query}) + "\n" for query in queries),
        qrels="".join(f"{query}\td1\t1\n" for query in judged),
    )
    SCRIPT["build"](source, tmp_path / "target")
    drawn = list(read_beir(tmp_path / "target").queries)

    assert [query.split("-")[0] for query in drawn] == [f"q{faq}" for faq in range(12)]
    assert set(drawn) <= set(judged)
    assert len({query.split("-")[1] for query in drawn}) > 2


# Reading -------------------------------------------------------------------------------------------------------------


def test_a_collection_is_read_title_first(tmp_path):
    assert read_beir(beir(tmp_path)) == Collection(
        corpus={"d1": "Mars is red.", "d2": "Über Brot"},
        queries={"q1": "red planet", "q2": "not judged"},
        qrels={"q1": {"d1": 2, "d2": 0}},
    )


def test_a_byte_order_mark_is_no_text(tmp_path):
    expected = read_beir(beir(tmp_path))
    for path in tmp_path.rglob("*.*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    assert read_beir(tmp_path) == expected


def test_a_gzipped_corpus_and_the_places_of_the_beir_archives_are_read_too(tmp_path):
    expected = read_beir(beir(tmp_path))
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels.tsv").rename(tmp_path / "qrels" / "test.tsv")

    assert read_beir(tmp_path) == expected


def test_a_split_is_read_by_its_name(tmp_path):
    (beir(tmp_path) / "qrels").mkdir()
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\n")

    assert read_beir(tmp_path, "dev").qrels == {"q2": {"d2": 1}}
    assert read_beir(tmp_path).qrels == {"q1": {"d1": 2, "d2": 0}}
    with pytest.raises(ConfigurationError, match=r"has no qrels/train\.tsv; a collection in BEIR layout has"):
        read_beir(tmp_path, "train")


def test_half_a_character_becomes_a_replacement_character(tmp_path):
    corpus = '{"_id": "d1", "title": "Mars \\ud83d", "text": "is red."}\n'

    assert read_beir(beir(tmp_path, corpus=corpus)).corpus == {"d1": "Mars \ufffd is red."}


def test_empty_lines_windows_line_ends_and_a_missing_header_do_no_harm(tmp_path):
    expected = read_beir(beir(tmp_path))
    (tmp_path / "corpus.jsonl").write_bytes(CORPUS.replace("\n", "\r\n\r\n").encode())
    (tmp_path / "qrels.tsv").write_bytes(QRELS.partition("\n")[2].replace("\n", "\r\n").encode())

    assert read_beir(tmp_path) == expected


def test_numbers_as_ids_match_the_judgements(tmp_path):
    corpus, queries = '{"_id": 7, "text": "Mars"}\n', '{"_id": 1, "text": "red"}\n'

    assert read_beir(beir(tmp_path, corpus=corpus, queries=queries, qrels="1\t7\t1\n")) == Collection(
        corpus={"7": "Mars"}, queries={"1": "red"}, qrels={"1": {"7": 1}}
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("corpus.jsonl", "no corpus.jsonl or corpus.jsonl.gz"),
        ("queries.jsonl", "no queries.jsonl or queries.jsonl.gz"),
        ("qrels.tsv", "no qrels.tsv or qrels/test.tsv"),
    ],
)
def test_a_missing_file_is_named(name, wanted, tmp_path):
    (beir(tmp_path) / name).unlink()

    with pytest.raises(ConfigurationError, match=wanted):
        read_beir(tmp_path)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"corpus": CORPUS + "{\n"}, r'corpus\.jsonl, line 3: expected \{"_id".*found \'\{\''),
        ({"corpus": '{"_id": "d1"}'}, r"corpus\.jsonl, line 1: expected"),
        ({"queries": '["q1", "red"]'}, r"queries\.jsonl, line 1: expected"),
        ({"corpus": CORPUS * 2}, r"corpus\.jsonl, line 3: the id 'd1' was there before"),
        ({"qrels": QRELS + "q1 d1 1\n"}, r"qrels\.tsv, line 4: expected query id, document id and a whole number"),
        ({"qrels": QRELS + "q1\td1\thigh\n"}, r"qrels\.tsv, line 4: .*found 'q1\\td1\\thigh'"),
    ],
)
def test_a_line_that_is_wrong_is_named(files, complaint, tmp_path):
    with pytest.raises(ConfigurationError, match=complaint):
        read_beir(beir(tmp_path, **files))
