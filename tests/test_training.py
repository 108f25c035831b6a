"""Training: from pairs to groups, to a model that both ways of loading take, with mistakes on the way."""

import dataclasses
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from itertools import chain, product, repeat
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
import transformers
import yaml
from huggingface_hub import utils as hub
from langchain_core.language_models import SimpleChatModel
from onnx import numpy_helper
from pydantic import PrivateAttr
from rich.console import Console
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)
from typer.testing import CliRunner

from langchain_rerank import init_reranker
from langchain_rerank._cli.training import logged, print_report
from langchain_rerank._training.asking import Asker, make_llm
from langchain_rerank._training.base import place_base
from langchain_rerank._training.embedding import Encoder
from langchain_rerank._training.fit import (
    GroupLoss,
    _arguments,
    _last_checkpoint,
    check_base,
    keep_layers,
    load_base,
)
from langchain_rerank._training.mining import Candidates, Group, GroupMaker, read_lines
from langchain_rerank._training.prepare import Prepared, check_folder, prepare
from langchain_rerank._training.report import read_report, write_report
from langchain_rerank._training.sets import TrainingSet, read_set
from langchain_rerank.backends._torch import no_bars
from langchain_rerank.backends.cross_encoder import CrossEncoderBackend
from langchain_rerank.backends.embedded import EmbeddedBackend
from langchain_rerank.cli import app
from langchain_rerank.data import EMBEDDED_MODEL, Collection
from langchain_rerank.errors import BackendError, ConfigurationError, MissingDependencyError, ModelLoadError
from langchain_rerank.training import Ranking, Recipe, SetOptions, export_reranker, read_recipe, train_reranker

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "training" / "embedded.yaml"
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "brown")
THINGS = ("planet", "moon", "star", "ring", "comet")
FACTS = [
    (f"Which {thing} is {colour}?", f"The {colour} {thing} turns around the sun in {10 * len(colour) + i} days.")
    for i, (thing, colour) in enumerate(product(THINGS, COLOURS))
]
SETTINGS = {"held_out": 8, "group_size": 4, "batch_size": 4, "evaluations": 2, "learning_rate": 1e-3}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file of 40 questions, each with its answer."""
    rows = ({"query": query, "positive": answer} for query, answer in FACTS)
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", *rows)


@pytest.fixture(scope="session")
def articles(tmp_path_factory):
    """A file of 20 documents with titles and nothing asked of them."""
    rows = (
        {"title": f"Orbit_of {fact}", "text": f"This is about it and number {i}. {fact} {fact} It was seen {i} times."}
        for i, (_, fact) in enumerate(FACTS[:20])
    )
    return write(tmp_path_factory.mktemp("data") / "articles.jsonl", *rows)


@pytest.fixture(scope="session")
def tiny_embedding(tiny_bert, tmp_path_factory):
    """A sentence-transformers model."""
    folder = tmp_path_factory.mktemp("embedding")
    encoder = Transformer(tiny_bert)
    SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())], device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def plain_bert(tiny_bert, tmp_path_factory):
    """The encoder of the tiny cross-encoder, without its head."""
    folder = tmp_path_factory.mktemp("plain")
    BertModel.from_pretrained(tiny_bert).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def trained(tiny_bert, pairs, tmp_path_factory):
    """The report of a training on the 40 questions."""
    return train(tiny_bert, pairs, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def learn(tiny_bert, pairs):
    """Trains into a folder as `trained` was."""
    return lambda folder, base=tiny_bert, **options: train(base, pairs, folder, **options)


def train(base, data, folder, **options):
    recipe = {"base": base, "sets": [{"path": data}], **SETTINGS, **options}
    return train_reranker(recipe, folder, progress=False)


def groups_of(folder):
    return read_lines(folder / "groups.jsonl", Group)


def held_out_of(folder):
    return [json.loads(line) for line in (folder / "held_out.jsonl").read_text("utf-8").splitlines()]


# Data ---------------------------------------------------------------------------------------------------------------


def test_pairs_become_a_collection_in_which_each_text_stands_once(tmp_path):
    path = write(
        tmp_path / "pairs.jsonl",
        {"query": "red?", "positive": "Mars", "negatives": ["Venus", "Jupiter"]},
        {"query": "red?", "positive": "Betelgeuse", "grade": 2},
        {"query": "hot?", "positive": "Venus", "negatives": None},
        {"query": "red?", "positive": "Mars", "grade": 0},
        {"query": "hot?", "positive": "Mercury", "grade": None},
    )

    read = read_set(SetOptions(path=path), seed=0).collection

    corpus, queries = read.corpus, read.queries
    assert sorted(corpus.values()) == ["Betelgeuse", "Jupiter", "Mars", "Mercury", "Venus"]
    assert {queries[key]: {corpus[each]: grade for each, grade in read.qrels[key].items()} for key in queries} == {
        "red?": {"Mars": 1, "Venus": 0, "Jupiter": 0, "Betelgeuse": 2},
        "hot?": {"Venus": 1, "Mercury": 1},
    }


def test_a_byte_order_mark_is_no_text(tmp_path):
    marked = tmp_path / "pairs.jsonl"
    marked.write_text('{"query": "Which?", "positive": "This."}\n', encoding="utf-8-sig")

    assert read_set(SetOptions(path=marked), seed=0).collection.queries == {"0": "Which?"}


def test_a_beir_folder_is_read_with_its_licence_and_without_empty_texts(tmp_path):
    write(tmp_path / "corpus.jsonl", {"_id": "a", "text": "Mars"}, {"_id": "b", "text": " "}, {"_id": "c", "text": "d"})
    write(tmp_path / "queries.jsonl", {"_id": "1", "text": "red?"}, {"_id": "2", "text": ""}, {"_id": "3", "text": "?"})
    (tmp_path / "qrels.tsv").write_text("1\ta\t1\n1\tb\t1\n2\ta\t1\n3\tb\t1\n")
    (tmp_path / "SOURCE.md").write_text("# a\n\n- licence: CC BY 4.0 (readme.txt)\n")

    read = read_set(SetOptions(path=tmp_path, name="planets"), seed=0)

    assert (read.name, read.licence, read.synthetic) == ("planets", "CC BY 4.0 (readme.txt)", None)
    assert read.collection == Collection({"a": "Mars", "c": "d"}, {"1": "red?"}, {"1": {"a": 1}})


def test_the_seed_draws_queries_and_documents_and_keeps_their_answers(pairs):
    options = SetOptions(path=pairs, queries=10, documents=15)
    one, again, other = (read_set(options, seed).collection for seed in (1, 1, 2))

    assert one == again
    assert one.queries != other.queries
    assert (len(one.queries), len(one.corpus)) == (10, 15)
    assert all(key in one.corpus for grades in one.qrels.values() for key in grades)


@pytest.fixture
def beir(tmp_path):
    """Writes two planets and two queries in BEIR layout, with judgements such as `train="1 a 1"`."""

    def folder(**splits):
        write(tmp_path / "corpus.jsonl", {"_id": "a", "text": "Mars"}, {"_id": "b", "text": "Venus"})
        write(tmp_path / "queries.jsonl", {"_id": "1", "text": "red?"}, {"_id": "2", "text": "hot?"})
        for name, line in splits.items():
            file = tmp_path / ("qrels.tsv" if name == "qrels" else f"qrels/{name}.tsv")
            file.parent.mkdir(exist_ok=True)
            file.write_text("\t".join(line.split()) + "\n")
        return tmp_path

    return folder


@pytest.mark.parametrize("others", [{"dev": "2 b 1", "test": "2 b 1"}, {"qrels": "2 b 1"}])
def test_the_train_split_of_a_beir_folder_is_learned_from(others, beir):
    folder = beir(train="1 a 1", **others)

    assert read_set(SetOptions(path=folder), seed=0).collection.qrels == {"1": {"a": 1}}


def test_a_test_split_is_learned_from_only_where_the_set_names_it(beir):
    folder = beir(dev="1 a 1", test="2 b 1")

    with pytest.raises(ConfigurationError, match=r"has no qrels/train\.tsv .* is qrels/dev\.tsv, qrels/test\.tsv"):
        read_set(SetOptions(path=folder), seed=0)
    with pytest.raises(ConfigurationError, match=r"has no qrels/tets\.tsv to learn from; there is qrels/dev\.tsv"):
        read_set(SetOptions(path=folder, split="tets"), seed=0)
    assert read_set(SetOptions(path=folder, split="test"), seed=0).collection.qrels == {"2": {"b": 1}}


def test_a_split_of_what_has_none_is_refused(beir, pairs):
    with pytest.raises(ConfigurationError, match=r"has no qrels/train\.tsv; a collection in BEIR layout has"):
        read_set(SetOptions(path=beir()), seed=0)
    with pytest.raises(ConfigurationError, match=r"pairs\.jsonl has no corpus\.jsonl"):
        read_set(SetOptions(path=pairs, split="train"), seed=0)


def test_queries_that_say_the_same_are_one_query(tmp_path):
    corpus, queries = {"a": "Mars", "b": "Venus", "c": "Io"}, {"1": "Red  planet?", "2": "hot?", "3": "red planet?"}
    write(tmp_path / "corpus.jsonl", *({"_id": key, "text": text} for key, text in corpus.items()))
    write(tmp_path / "queries.jsonl", *({"_id": key, "text": text} for key, text in queries.items()))
    (tmp_path / "qrels.tsv").write_text("1\ta\t1\n1\tb\t0\n1\tc\t2\n3\tb\t2\n3\tc\t1\n2\tb\t1\n")

    read = read_set(SetOptions(path=tmp_path), seed=0).collection

    assert read.queries == {"1": "Red  planet?", "2": "hot?"}
    assert read.qrels == {"1": {"a": 1, "b": 2, "c": 2}, "2": {"b": 1}}


@pytest.mark.parametrize("kind", ["title", "first_sentence", "llm"])
def test_half_a_character_in_the_data_is_replaced(kind, tmp_path):
    half = "\ud83d"
    text = f"Io {half} is a moon of Jupiter. " * 9
    write(tmp_path / "pairs.jsonl", {"query": f"red{half}?", "positive": f"Mars{half}", "negatives": [f"Io{half}"]})
    write(tmp_path / "corpus.jsonl", {"_id": f"a{half}", "title": f"Io{half}", "text": text})
    write(tmp_path / "queries.jsonl", {"_id": "1", "text": f"moon{half}?"})
    (tmp_path / "qrels.tsv").write_text("1\ta\ufffd\t1\n", encoding="utf-8")

    read = [
        read_set(SetOptions(path=tmp_path / "pairs.jsonl"), seed=0),
        read_set(SetOptions(path=tmp_path), seed=0),
        read_set(SetOptions(path=tmp_path, synthetic=kind), seed=0, ask=lambda texts: [text[:2] for text in texts]),
    ]

    assert [next(iter(each.collection.queries.values()))[:2] for each in read] == ["re", "mo", "Io"]
    for each in read:
        assert half not in str(each.collection)
        assert "\ufffd" in str(each.collection)
        assert str(each.collection).encode()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", r"line 3: expected JSON, found '\{"),
        ("7", r"line 3: expected \{\"query\""),
        ('{"query": "red?"}', "line 3: expected"),
        ('{"query": "red?", "positive": ""}', "texts that are not empty"),
        ('{"query": null, "positive": "Mars"}', "line 3: expected"),
        ('{"query": "red?", "positive": "Mars", "negatives": "Venus"}', "line 3: expected"),
        ('{"query": "red?", "positive": "Mars", "grade": 0.5}', "a whole number"),
        ('{"query": "red?", "positive": "Mars", "grade": true}', "a whole number"),
    ],
)
def test_a_bad_line_of_pairs_is_named(line, problem, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"query": "red?", "positive": "Mars"}\n\n' + line + "\n")

    with pytest.raises(ConfigurationError, match=problem):
        read_set(SetOptions(path=tmp_path / "pairs.jsonl"), seed=0)


def test_a_set_that_is_not_there_or_teaches_nothing_is_refused(tmp_path):
    write(tmp_path / "pairs.jsonl", {"query": "red?", "positive": "Venus", "grade": 0})
    write(tmp_path / "texts.jsonl", {"text": "Mars"}, {"title": "Venus"})

    with pytest.raises(ConfigurationError, match=r"Cannot read .*none\.jsonl: No such file"):
        read_set(SetOptions(path=tmp_path / "none.jsonl"), seed=0)
    with pytest.raises(ConfigurationError, match=r"pairs\.jsonl has no query with a right answer"):
        read_set(SetOptions(path=tmp_path / "pairs.jsonl"), seed=0)
    with pytest.raises(ConfigurationError, match=r'texts\.jsonl, line 2: expected \{"text": \.\.\.\}'):
        read_set(SetOptions(path=tmp_path / "texts.jsonl", synthetic="title"), seed=0)


@pytest.mark.parametrize(
    ("document", "synthetic", "problem"),
    [
        ({"text": "Mars is red. " * 20}, "title", 'none of the 2 documents has a "title" and 100 characters of text'),
        ({"title": "Mars", "text": "It is red."}, "title", 'has a "title" and 100 characters of text beside it'),
        ({"text": "It is red."}, "first_sentence", "a first sentence of 20 to 400 characters and 100 more behind it"),
        ({"text": "It is red."}, "llm", "100 characters to ask the llm about, and got a question from it"),
    ],
)
def test_documents_that_give_no_query_say_what_they_lack(document, synthetic, problem, tmp_path):
    path = write(tmp_path / "texts.jsonl", {"_id": 1, **document}, {"_id": 2, **document})

    with pytest.raises(ConfigurationError, match=rf"texts\.jsonl: .*{problem}.* synthetic: {synthetic} needs"):
        read_set(SetOptions(path=path, synthetic=synthetic), seed=0, ask=lambda texts: [""] * len(texts))


def test_documents_that_nothing_is_asked_of_are_told_of_synthetic_queries(tmp_path):
    path = write(tmp_path / "corpus.jsonl", {"_id": "a", "text": "Mars is red."})

    for place in (path, tmp_path):
        with pytest.raises(ConfigurationError, match=r"documents without queries.*synthetic: title.*--synthetic"):
            read_set(SetOptions(path=place), seed=0)


@pytest.mark.parametrize("ids", [("x", "x"), (7, "7")])
def test_documents_with_one_id_are_refused(ids, tmp_path):
    path = write(tmp_path / "texts.jsonl", *({"_id": key, "title": "M", "text": "M is much. " * 20} for key in ids))

    with pytest.raises(ConfigurationError, match=rf"texts\.jsonl, line 2: the id '{ids[0]}' was there before"):
        read_set(SetOptions(path=path, synthetic="title"), seed=0)


def test_a_document_without_an_id_gets_one_that_no_other_has(tmp_path):
    ids = ({"_id": "2"}, {}, {"_id": None}, {"_id": None}, {"_id": "3"}, {"_id": "line 3"})
    rows = [{**key, "title": f"Moon {i}", "text": f"{i} says much. " * 20} for i, key in enumerate(ids)]

    read = read_set(SetOptions(path=write(tmp_path / "texts.jsonl", *rows), synthetic="title"), seed=0).collection

    assert {read.queries[key]: read.corpus[key][0] for key in read.queries} == {f"Moon {i}": str(i) for i in range(6)}
    assert list(read.qrels.items()) == [(key, {key: 1}) for key in read.queries]


def test_a_title_asks_for_its_text(articles):
    read = read_set(SetOptions(path=articles, synthetic="title"), seed=0)

    fact = FACTS[0][1]
    assert (read.name, read.synthetic) == ("articles (title)", "title")
    assert read.collection.queries["1"] == f"Orbit of {fact}"
    assert read.collection.corpus["1"].startswith("This is about it")
    assert read.collection.qrels["1"] == {"1": 1}


def test_passages_that_share_a_title_all_answer_it(tmp_path):
    rows = [
        {"_id": key, "title": title, "text": f"{key} says much. " * 10} for key, title in zip("abc", "MMV", strict=True)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))), encoding="utf-8")

    read = read_set(SetOptions(path=tmp_path / "texts.jsonl", synthetic="title"), seed=0).collection

    assert read.queries == {"a": "M", "c": "V"}
    assert read.qrels == {"a": {"a": 1, "b": 1}, "c": {"c": 1}}


def test_a_first_sentence_asks_for_the_rest(articles):
    read = read_set(SetOptions(path=articles, synthetic="first_sentence"), seed=0).collection

    assert read.queries["3"] == "This is about it and number 2."
    assert read.corpus["3"].startswith(FACTS[2][1])


def test_a_short_text_is_searched_in_and_not_asked_for(tmp_path, articles):
    path = tmp_path / "texts.jsonl"
    path.write_text(articles.read_text("utf-8") + '{"title": "Short", "text": "Too short."}\n', encoding="utf-8")

    read = read_set(SetOptions(path=path, synthetic="title"), seed=0).collection

    assert "21" in read.corpus
    assert "21" not in read.queries


# Queries of an LLM ----------------------------------------------------------------------------------------------------


class Questioner(SimpleChatModel):
    """Asks about the last two words of a passage, after a few of its own; breaks down after so many answers."""

    answers: int = 1000
    _asked: list = PrivateAttr(default_factory=list)

    @property
    def _llm_type(self):
        return "questioner"

    def _call(self, messages, stop=None, run_manager=None, **kwargs):
        if len(self._asked) >= self.answers:
            raise RuntimeError("no money left")
        self._asked.append(messages[0].content)
        return f'Here it is:\n\n"What about {" ".join(messages[0].content.split()[-2:])}\ud83d"'


def test_an_llm_is_asked_one_question_for_each_passage_drawn(tiny_bert, articles, tmp_path):
    llm = Questioner()
    sets = [{"path": articles, "synthetic": "llm", "queries": 12}]

    report = train_reranker({"base": tiny_bert, "sets": sets, **SETTINGS}, tmp_path, llm=llm, progress=False)

    assert len(llm._asked) == 12
    assert all(prompt.startswith("Write one question that the passage below answers") for prompt in llm._asked)
    queries = {group.query for group in groups_of(tmp_path)}
    assert queries < {f"What about {i} times.\ufffd" for i in range(20)}
    assert all(group.synthetic for group in groups_of(tmp_path))
    assert (
        "| articles (llm) | 12 | synthetic (written by an LLM) | not stated |" in (tmp_path / "README.md").read_text()
    )
    assert report.trained is None


def test_what_an_llm_said_is_not_asked_for_again(tiny_bert, articles, tmp_path):
    recipe = {"base": tiny_bert, "sets": [{"path": articles, "synthetic": "llm"}], **SETTINGS}
    with pytest.raises(BackendError, match=r"The LLM failed: no money left\. What it said so far is kept in .*jsonl"):
        train_reranker(recipe, tmp_path, llm=Questioner(answers=8), progress=False)

    rich = Questioner()
    train_reranker(recipe, tmp_path, llm=rich, progress=False)

    assert len(rich._asked) == 20 - 8


def test_a_question_that_was_half_written_is_asked_for_again(tmp_path):
    passages, kept = ["the first passage", "the second passage"], tmp_path / "questions.jsonl"
    said = Asker(Questioner, kept)(passages)
    kept.write_bytes(kept.read_bytes()[:-9])
    again = Questioner()

    assert Asker(lambda: again, kept)(passages) == said
    assert len(again._asked) == 1
    assert Asker(None, kept)(passages) == said


def test_an_llm_is_made_from_its_name_as_langchain_does():
    with pytest.raises(ConfigurationError, match=r"llm='nobody:a': .*nobody"):
        make_llm("nobody:a")
    with pytest.raises(MissingDependencyError, match=r"llm='groq:a': .*langchain-groq"):
        make_llm("groq:a")


def test_queries_of_an_llm_need_one(articles):
    with pytest.raises(ConfigurationError, match="with synthetic: llm, and there is no llm"):
        read_set(SetOptions(path=articles, synthetic="llm"), seed=0)


# Groups ---------------------------------------------------------------------------------------------------------------


def made(recipe, corpus, grades, **stages):
    """The group of one query, for which the stages found what they did: document id to score."""
    training_set = TrainingSet("s", Collection(corpus, {"q": "red?"}, {"q": grades}), None, "")
    settled = Recipe(base="b", sets=({"path": "p"},), **recipe)
    return GroupMaker(settled, {})(training_set, "q", Candidates("red?", stages))


CORPUS = {str(i): f"Number {i} is about {word} alone." for i, word in enumerate(COLOURS)}


def numbers(group):
    """The keys of a group's passages in `CORPUS`."""
    return [text.split()[1] for text in group.docs]


def test_a_group_holds_answers_judged_negatives_and_hard_ones():
    group = made({"group_size": 5}, CORPUS, {"0": 2, "5": 0, "1": 1}, bm25={"2": 3.0, "0": 2.0, "1": 1.5, "3": 1.0})

    assert numbers(group)[:3] == ["0", "1", "5"]
    assert set(numbers(group)[3:]) == {"2", "3"}
    assert group.relevance == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert group.targets == [5.0, 2.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("size", "lower"), [(8, {"1", "2"}), (4, {"1"}), (4, {"2"}), (3, set())])
def test_lower_grades_are_learned_in_a_quarter_of_the_group(size, lower):
    grades, found = {"0": 2, "1": 1, "2": 1, "3": 0}, {"4": 4.0, "5": 3.0, "6": 2.0, "7": 1.0}
    groups = [made({"group_size": size, "seed": seed}, CORPUS, grades, bm25=found) for seed in range(8)]

    assert lower in [set(numbers(group)) & {"1", "2"} for group in groups]
    for group in groups:
        relevance = dict(zip(numbers(group), group.relevance, strict=True))
        assert numbers(group)[0] == "0"
        assert len(relevance) == size
        assert relevance == {key: grades.get(key, 0) / 2 for key in relevance}
        assert group.targets == [5 * each for each in group.relevance]


def test_given_negatives_fill_a_group_where_nothing_else_was_found():
    given = {key: 0 for key in CORPUS if key != "0"}

    assert sorted(numbers(made({}, CORPUS, {"0": 1, **given}, bm25={"0": 1.0}))) == sorted(CORPUS)
    assert numbers(made({"group_size": 2}, CORPUS, {"0": 1, "5": 0}, bm25={"0": 1.0})) == ["0", "5"]
    assert numbers(made({"teacher": {"bm25": 1}}, CORPUS, {"0": 1, "5": 0}, bm25={})) == ["0", "5"]


def test_given_negatives_are_drawn_and_leave_room_for_hard_ones():
    grades, found = {"0": 1, "1": 0, "2": 0, "3": 0}, {"4": 4.0, "5": 3.0, "6": 2.0, "7": 1.0}

    def given(size):
        groups = [made({"group_size": size, "seed": seed}, CORPUS, grades, bm25=found) for seed in range(20)]
        assert {len(group.docs) for group in groups} == {size}
        return {tuple(key for key in numbers(group) if key in "123") for group in groups}

    assert given(2) == {("1",), ("2",), ("3",)}
    assert given(4) == {("1",), ("2",), ("3",)}
    assert given(5) == {("1", "2"), ("1", "3"), ("2", "3")}
    assert given(8) == {("1", "2", "3")}


def test_where_one_passage_answers_the_seed_alone_decides_the_group():
    grades, found = {"0": 1, "5": 0}, {key: float(key) for key in CORPUS if key != "5"}

    assert numbers(made({"group_size": 5}, CORPUS, grades, bm25=found)) == ["0", "5", "4", "1", "6"]


def test_what_repeats_the_answer_is_no_negative():
    corpus = {**CORPUS, "copy": CORPUS["0"].upper()}

    group = made({}, corpus, {"0": 1}, bm25={"copy": 3.0, "2": 2.0})
    another = made({}, corpus, {"0": 1, "1": 2}, bm25={"copy": 3.0, "2": 2.0})

    assert numbers(group) == ["0", "2"]
    assert numbers(another) == ["1", "0", "2"]


@pytest.mark.parametrize(
    ("margin", "answers", "negatives"),
    [
        (None, {"0": 1}, ["1", "2", "3", "4"]),
        (0.0, {"0": 1}, ["2", "3", "4"]),
        (0.05, {"0": 1}, ["3", "4"]),
        (0.05, {"5": 1}, ["0", "4"]),  # not found, so it counts as 0.7, the last find
        (0.05, {"0": 1, "5": 2}, ["3", "4"]),
    ],
)
def test_what_the_embedding_finds_as_near_as_an_answer_is_no_negative(margin, answers, negatives):
    stages = {
        "bm25": {"2": 4.0, "1": 3.0, "4": 2.0, "0": 1.0},
        "dense": {"1": 0.9, "2": 0.79, "3": 0.7} | ({"0": 0.8} if "0" in answers else {}),
    }
    group = made({"relative_margin": margin}, CORPUS, answers, **stages)

    assert sorted(set(numbers(group)) - answers.keys()) == negatives


def test_a_candidate_that_the_teacher_likes_better_is_doubtful_and_not_wrong():
    group = made({"teacher": {"bm25": 1}}, CORPUS, {"0": 1, "4": 0}, bm25={"2": 9.0, "0": 5.0, "4": 8.0, "3": 1.0})
    relevance = dict(zip(group.docs, group.relevance, strict=True))

    assert relevance == {CORPUS["0"]: 1.0, CORPUS["2"]: -1.0, CORPUS["3"]: 0.0, CORPUS["4"]: 0.0}


def test_a_teachers_scores_are_standardised_and_the_label_comes_on_top():
    recipe = {"teacher": {"bm25": 2}, "label_bonus": 3}
    group = made(recipe, CORPUS, {"0": 1}, bm25={"0": 1.0, "1": 4.0, "2": 4.0, "3": 7.0})
    targets = dict(zip(group.docs, group.targets, strict=True))

    deviation = np.std([1, 4, 4, 7])
    assert targets[CORPUS["0"]] == pytest.approx(2 * -3 / deviation + 3, abs=1e-4)
    assert targets[CORPUS["3"]] == pytest.approx(2 * 3 / deviation, abs=1e-4)


def test_a_query_for_which_nothing_but_answers_was_found_makes_no_group():
    assert made({}, CORPUS, {"0": 1, "1": 1}, bm25={"0": 2.0, "1": 1.0}) is None


def test_sets_without_any_negative_are_refused(tiny_bert, tmp_path):
    path = write(tmp_path / "few.jsonl", {"query": "red?", "positive": "Mars is red."})

    with pytest.raises(ConfigurationError, match="No query of few has a negative beside its answers"):
        train(tiny_bert, path, tmp_path / "out")


def test_a_set_smaller_than_a_group_is_learned_from(tiny_bert, tmp_path):
    rows = ({"query": query, "positive": answer} for query, answer in FACTS[:3])

    report = train(tiny_bert, write(tmp_path / "few.jsonl", *rows), tmp_path / "out", group_size=8)

    assert (report.groups, report.trained) == (3, None)
    assert {len(group.docs) for group in groups_of(tmp_path / "out")} == {3}
    assert "No query was held out" in (tmp_path / "out/README.md").read_text()


def test_all_kinds_of_teachers_are_added_up(tiny_bert, tiny_embedding, pairs, tmp_path):
    teacher = {"bm25": 1, "dense": 1, f"embedded:{EMBEDDED_MODEL}": 1}

    train(tiny_bert, pairs, tmp_path, teacher=teacher, embedding=tiny_embedding, label_bonus=0)

    card = (tmp_path / "README.md").read_text("utf-8")
    assert f'"embedding": "{Path(tiny_embedding).name}"' in card
    assert '"embedded:embedded": 1.0' in card, "a folder's name without its place on this machine"
    for group in groups_of(tmp_path):
        assert len(group.docs) == 4
        assert sum(group.targets) == pytest.approx(0, abs=1e-3)
        assert 0 < max(group.targets) <= 3 * np.sqrt(3)


def test_held_out_queries_are_in_no_group_wherever_they_stand(tiny_bert, pairs, articles, tmp_path):
    again = shutil.copy(pairs, tmp_path / "again.jsonl")
    sets = [{"path": pairs}, {"path": again}, {"path": articles, "synthetic": "title"}]

    report = train(tiny_bert, None, tmp_path / "out", sets=sets)
    groups, held_out = groups_of(tmp_path / "out"), held_out_of(tmp_path / "out")

    assert {question["name"] for question in held_out} == {"pairs", "again"}
    assert report.sets == {"pairs": 4, "again": 4}
    assert {group.synthetic for group in groups if group.name == "articles (title)"} == {True}
    assert not {question["query"] for question in held_out} & {group.query for group in groups}
    assert len({group.query for group in groups if not group.synthetic}) >= 40 - 8


def test_what_answers_a_held_out_query_is_no_answer_in_a_group(tmp_path, caplog):
    caplog.set_level(logging.INFO, "langchain_rerank")
    rows = [{"query": f"{word} {query}", "positive": answer} for query, answer in FACTS for word in ("Say:", "Tell:")]
    shouted = [{"query": f"SHOUT: {query}", "positive": f"  {answer.upper()}"} for query, answer in FACTS]
    sets = [{"path": write(tmp_path / "a.jsonl", *rows)}, {"path": write(tmp_path / "b.jsonl", *shouted)}]

    prepared = prepare(read_recipe({"base": "b", "sets": sets, **SETTINGS}), tmp_path / "out", progress=False)

    held_out = {answer for query, answer in FACTS if any(query in question.query for question in prepared.questions)}
    assert len(prepared.questions) == 8
    assert not {answer.lower() for answer in held_out} & {group.docs[0].strip().lower() for group in prepared.groups}
    assert len(prepared.groups) == 3 * (40 - len(held_out))
    left_out = 120 - len(prepared.questions) - len(prepared.groups)
    assert f"Left out {left_out} queries that ask or answer what a held-out one does" in caplog.text


def test_queries_that_all_share_their_answers_cannot_be_held_out(tmp_path):
    rows = [{"query": f"Which is red {i}?", "positive": "Mars is red.", "negatives": ["Io"]} for i in range(10)]
    recipe = {"base": "b", "sets": [{"path": write(tmp_path / "one.jsonl", *rows)}]}

    with pytest.raises(ConfigurationError, match=r"Every query of one asks or answers what .* held_out=0"):
        prepare(read_recipe(recipe), tmp_path / "out", progress=False)
    assert len(prepare(read_recipe(recipe, held_out=0), tmp_path / "out", progress=False).groups) == 10


# The loss -------------------------------------------------------------------------------------------------------------

QUERIES = ["red planet?", "largest planet?"]
PASSAGES = [["Mars is the red planet.", "Venus", "Saturn has rings of ice and rock."], ["Jupiter", "The moon"]]
RELEVANCE = [[1.0, 0.0, -1.0], [0.5, 0.0]]
TARGETS = [torch.tensor([2.0, 0.5, -1.0]), torch.tensor([1.0, 0.0])]


def loss_of(base, **options):
    recipe = Recipe(base=base, sets=({"path": "p"},), device="cpu", **options)
    model = load_base(base, recipe)
    loss = GroupLoss(model, recipe)([QUERIES, PASSAGES, RELEVANCE], TARGETS)
    loss.backward()
    return model, loss.item(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def test_the_listwise_loss_is_that_of_sentence_transformers(tiny_bert):
    model, loss, _ = loss_of(tiny_bert, pointwise=0)
    theirs = [
        ListNetLoss(model)([[query], [texts]], [targets]).item()
        for query, texts, targets in zip(QUERIES, PASSAGES, TARGETS, strict=True)
    ]

    assert loss == pytest.approx(np.mean(theirs), abs=1e-5)


def test_the_pointwise_loss_is_binary_cross_entropy_where_the_answer_is_known(tiny_bert):
    model, loss, _ = loss_of(tiny_bert, listwise=0, pointwise=1, label_smoothing=0.1)
    known = [(0, 0, 0.9), (0, 1, 0.1), (1, 0, 0.5), (1, 1, 0.1)]
    logits = model.predict([(QUERIES[i], PASSAGES[i][j]) for i, j, _ in known], convert_to_tensor=True)

    targets = torch.tensor([target for *_, target in known])
    assert loss == pytest.approx(functional.binary_cross_entropy_with_logits(logits, targets).item(), abs=1e-5)


@pytest.mark.parametrize("options", [{"batch_pairs": 1}, {"batch_pairs": 2, "recompute": True}])
def test_the_gradient_is_the_same_however_many_pairs_are_in_memory(options, tiny_bert):
    _, loss, gradients = loss_of(tiny_bert)
    _, loss_of_parts, gradients_of_parts = loss_of(tiny_bert, **options)

    assert loss_of_parts == pytest.approx(loss, abs=1e-5)
    assert gradients.keys() == gradients_of_parts.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_of_parts[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("options", "sizes"), [({}, [8, 8, 4]), ({"batch_pairs": 16}, [16, 4])])
def test_few_pairs_at_once_go_through_the_model_on_a_cpu(options, sizes, tiny_bert):
    recipe = Recipe(base=tiny_bert, sets=({"path": "p"},), device="cpu", **options)
    model = load_base(tiny_bert, recipe)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]["input_ids"])))
    texts = [f"fact {i}" for i in range(20)]

    GroupLoss(model, recipe)([["which fact?"], [texts], [[1.0] + [0.0] * 19]], [torch.zeros(20)])

    assert seen == sizes


# The training ---------------------------------------------------------------------------------------------------------


def test_the_report_holds_figures_of_three_stages(trained):
    assert trained.first_stage.mean("nDCG@10") == 1
    assert 0 < trained.base.mean("nDCG@10") < 1
    assert 0 < trained.trained.mean("nDCG@10") < 1
    assert trained.groups == 32
    assert (trained.sets, trained.pairs > 8) == ({"pairs": 8}, True)
    assert 0 < trained.seconds < 60


@pytest.mark.slow
def test_enough_training_learns_the_questions_by_heart(tiny_bert, pairs, tmp_path):
    train(tiny_bert, pairs, tmp_path, epochs=20, learning_rate=3e-3, held_out=0)
    groups = groups_of(tmp_path)

    def right(folder):
        scores = CrossEncoderBackend(model=folder, device="cpu").score_many(
            [(group.query, list(group.docs)) for group in groups]
        )
        return np.mean([np.argmax(each) == 0 for each in scores])

    assert right(tiny_bert) < 0.5
    assert right(str(tmp_path)) > 0.8


def test_the_card_says_all_there_is_to_know(trained):
    card = (trained.folder / "README.md").read_text("utf-8")

    assert "trained from `" in card
    assert "| pairs | 32 | the set's own | not stated |" in card
    assert "for 8 held-out queries, which were not trained on: 8 of pairs." in card
    assert "read at most 256 tokens" in card
    assert re.search(r"in \d+ seconds \(", card)
    for row in trained.rows():
        assert f"| {' | '.join(row)} |" in card
    assert f"nDCG@10 against BM25: {trained.difference(trained.first_stage)}." in card
    assert f"nDCG@10 against the base: {trained.difference(trained.base)}." in card
    assert '"learning_rate": 0.001' in card
    assert f"torch {torch.__version__}" in card


def test_the_card_says_how_much_of_a_set_was_taken(trained, pairs, tmp_path):
    limits = {"name": "b", "queries": 9, "documents": 30, "licence": "CC0"}
    recipe = read_recipe({"base": "b", "sets": [{"path": pairs}, {"path": pairs, **limits}], **SETTINGS})
    prepared = Prepared([], [], [read_set(each, seed=0) for each in recipe.sets])

    write_report(dataclasses.replace(trained, folder=tmp_path), recipe, prepared)
    card = (tmp_path / "README.md").read_text("utf-8")

    assert "| pairs | 0 | the set's own | not stated | all |" in card
    assert "| b | 0 | the set's own | CC0 | 9 queries, 30 documents |" in card


def test_a_report_is_there_only_when_all_is_written(trained, pairs, tmp_path):
    recipe = read_recipe({"base": "b", "sets": [{"path": pairs}]})
    prepared = Prepared([], [], [read_set(recipe.sets[0], seed=0)])
    report = dataclasses.replace(trained, folder=tmp_path)
    (tmp_path / "README.md").mkdir()

    with pytest.raises(IsADirectoryError):
        write_report(report, recipe, prepared)
    assert read_report(tmp_path) is None

    (tmp_path / "README.md").rmdir()
    write_report(report, recipe, prepared)
    assert read_report(tmp_path) == report
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "training.json"}


def test_the_same_recipe_gives_the_same_weights_and_another_seed_gives_others(trained, tiny_bert, pairs, tmp_path):
    train(tiny_bert, pairs, tmp_path / "same")
    train(tiny_bert, pairs, tmp_path / "other", seed=1)

    assert tiny.digest(tmp_path / "same") == tiny.digest(trained.folder)
    assert tiny.digest(tmp_path / "other") != tiny.digest(trained.folder)


def test_a_training_that_is_done_gives_its_report_again(trained, tiny_bert, pairs, caplog):
    before = (trained.folder / "model.safetensors").stat().st_mtime_ns
    caplog.set_level(logging.INFO, "langchain_rerank")

    assert train(tiny_bert, pairs, trained.folder) == trained
    assert (trained.folder / "model.safetensors").stat().st_mtime_ns == before
    assert "was trained by this recipe already" in caplog.text


class Impatient(logging.Handler):
    """Somebody who reads the log and presses Ctrl-C so many times when a line begins so."""

    def __init__(self, line, times):
        super().__init__(logging.INFO)
        self.line, self.times = line, times

    def emit(self, record):
        if record.getMessage().startswith(self.line):
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interrupted(learn, tmp_path, caplog, monkeypatch):
    """Trains until a line of the log and presses Ctrl-C; the folder."""
    logger = logging.getLogger("langchain_rerank")
    monkeypatch.setattr(logger, "level", logging.INFO)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it

    def run(line, times, **options):
        handler = Impatient(line, times)
        logger.addHandler(handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                learn(tmp_path, **options)
        finally:
            logger.removeHandler(handler)
        assert "the training goes on from what is kept" in caplog.text
        return tmp_path

    yield run
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("press", "kept"),
    [
        (("pairs: 40", 1), []),
        (("Step 2", 1), [3]),
        (("Step 6", 1), [4, 7]),
        (("Step 6", 2), [4]),
    ],
)
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(press, kept, interrupted, trained, learn):
    folder = interrupted(*press)
    checkpoints = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoints/checkpoint-*"))

    report = learn(folder)

    assert checkpoints == kept
    found, wanted = load_file(folder / "model.safetensors"), load_file(trained.folder / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    assert report.trained.scores == trained.trained.scores


@pytest.mark.parametrize(
    ("base", "options"), [("plain_bert", {"layers": 1}), ("tiny_bert", {"base_share": 0.25})], ids=str
)
def test_whatever_is_done_to_the_base_a_stopped_training_goes_on(base, options, interrupted, learn, request):
    options = {**options, "base": request.getfixturevalue(base)}
    folder = interrupted("Step 6", 1, **options)
    checkpoint = folder / "checkpoints/checkpoint-7"
    assert checkpoint.exists()

    learn(folder, **options)
    learn(folder / "whole", **options)

    found, wanted = (load_file(each / "model.safetensors") for each in (folder, folder / "whole"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


def test_seconds_are_those_of_all_runs(interrupted, learn):
    folder = interrupted("Step 6", 1)
    file = folder / "checkpoints/checkpoint-7/trainer_state.json"
    state = json.loads(file.read_text())
    assert 0 < state["stateful_callbacks"]["Clock"]["attributes"]["before"] < 60
    state["stateful_callbacks"]["Clock"]["attributes"]["before"] = 1000.0
    file.write_text(json.dumps(state))

    assert 1000 < learn(folder).seconds < 1060


def test_a_half_written_checkpoint_is_not_gone_on_from(tmp_path):
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert _last_checkpoint(tmp_path) is None

    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}/trainer_state.json").touch()
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_folder_of_another_recipe_is_refused(trained, tiny_bert, pairs):
    problem = r"holds a training by another recipe \(seed was 0, and is 7\); choose another folder"
    with pytest.raises(ConfigurationError, match=problem):
        train(tiny_bert, pairs, trained.folder, seed=7)


@pytest.mark.parametrize("name", ["config.json", "README.md", "checkpoints"])
def test_nothing_of_somebody_elses_is_overwritten(name, tiny_bert, pairs, tmp_path):
    (tmp_path / name).mkdir()

    with pytest.raises(ConfigurationError, match=rf"holds {name}, which is of no training and would be overwritten"):
        train(tiny_bert, pairs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_somebodys_recipe_beside_the_model_is_not_overwritten(tiny_bert, pairs, tmp_path):
    recipe = {"base": tiny_bert, "sets": [{"path": str(pairs)}]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))

    with pytest.raises(ConfigurationError, match=r"holds recipe\.json, which is of no training"):
        train_reranker(tmp_path / "recipe.json", tmp_path, progress=False)


def test_somebodys_questions_are_not_written_to(tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"question": "mine?"}\n')

    with pytest.raises(ConfigurationError, match=r"holds questions\.jsonl, which is of no training"):
        Asker(Questioner, tmp_path / "questions.jsonl")(["a passage"])
    assert (tmp_path / "questions.jsonl").read_text() == '{"question": "mine?"}\n'


def test_a_base_is_not_trained_in_place(tiny_bert, pairs, tmp_path):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    weights = (folder / "model.safetensors").read_bytes()

    with pytest.raises(ConfigurationError, match=r"base holds config\.json, which is of no training"):
        train(str(folder), pairs, folder)
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_file_is_no_folder_to_train_into(tiny_bert, pairs):
    with pytest.raises(ConfigurationError, match=r"pairs\.jsonl is a file; the training goes into a folder"):
        train(tiny_bert, pairs, pairs)


def test_data_beside_the_model_are_in_nobodys_way(tiny_bert, pairs, tmp_path):
    shutil.copy(pairs, tmp_path)

    assert train(tiny_bert, tmp_path / "pairs.jsonl", tmp_path).groups == 32


@pytest.fixture
def begun(pairs, tmp_path, monkeypatch):
    """A training of a copy of the pairs, called by relative paths, that has found its negatives: recipe and folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(pairs, "pairs.jsonl")
    Path("base").mkdir()
    recipe = read_recipe({"base": "base", "sets": [{"path": "pairs.jsonl"}], **SETTINGS})
    prepare(recipe, tmp_path / "out", progress=False)
    return recipe, tmp_path / "out"


def test_a_folder_is_refused_where_its_data_changed(begun):
    recipe, folder = begun
    check_folder(recipe, folder)
    with Path("pairs.jsonl").open("a") as file:
        file.write('{"query": "one more?", "positive": "One more."}\n')

    with pytest.raises(ConfigurationError, match=r"the files of the set 'pairs' in \S*pairs\.jsonl changed since"):
        check_folder(recipe, folder)
    (folder / "data.json").unlink()  # as one that was made before there was such a file
    check_folder(recipe, folder)


def test_a_recipe_is_the_same_however_its_paths_are_written(begun, tmp_path, monkeypatch):
    recipe, folder = begun
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    for place in (tmp_path, Path("..")):
        sets = [{"path": place / "pairs.jsonl"}]
        check_folder(read_recipe(recipe, base=str(place / "base"), sets=sets), folder)
    with pytest.raises(ConfigurationError, match=r"\(base was '\S*/base', and is 'base'\)"):
        check_folder(recipe, folder)
    with pytest.raises(ConfigurationError, match=r"\(path of the set 'pairs' was '/\S*', and is '\S*/elsewhere/pairs"):
        check_folder(read_recipe(recipe, base=str(tmp_path / "base")), folder)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"held_out": 9, "seed": 3}, "seed was 0, and is 3"),
        ({"teacher": {"bm25": 1}}, r"teacher was \{\}, and is \{'bm25': 1.0\}"),
        ({"sets": [{"path": "pairs.jsonl", "queries": 9}]}, "queries of the set 'pairs' was None, and is 9"),
        ({"sets": [{"path": "pairs.jsonl", "name": "b"}]}, r"sets was \['pairs'\], and is \['b'\]"),
    ],
)
def test_another_recipe_is_told_by_its_first_difference(options, difference, begun):
    recipe, folder = begun

    with pytest.raises(ConfigurationError, match=rf"another recipe \({difference}\)"):
        check_folder(read_recipe(recipe, **options), folder)


def test_a_teacher_is_the_same_however_its_path_is_written(begun, tmp_path):
    recipe, folder = begun
    written = json.loads((folder / "recipe.json").read_text())
    written["teacher"] = {f"cross-encoder:{os.path.realpath('base')}": 1.0}
    (folder / "recipe.json").write_text(json.dumps(written))

    for path in ("base", "./base", tmp_path / "base"):
        check_folder(read_recipe(recipe, teacher={f"cross-encoder:{path}": 1}), folder)
    with pytest.raises(ConfigurationError, match=r"teacher was \{'cross-encoder:/\S*/base': 1.0\}, and is \{\}"):
        check_folder(recipe, folder)


def test_a_recipe_of_a_later_version_is_refused(begun):
    recipe, folder = begun
    (folder / "recipe.json").write_text('{"base": "b", "sets": [{"path": "a"}], "colour": "red"}')

    with pytest.raises(ConfigurationError, match=r"recipe\.json is no recipe of this version; choose another folder"):
        check_folder(recipe, folder)


def test_a_pipe_is_read_once(pairs, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    contents = chain([pairs.read_bytes()], repeat(b""))  # who reads it twice finds nothing more
    threading.Thread(target=lambda: [*map(pipe.write_bytes, contents)], daemon=True).start()

    assert len(read_set(SetOptions(path=pipe), seed=0).collection.queries) == 40


def test_the_digest_is_of_the_files_that_are_read(beir):
    folder = beir(train="1 a 1", test="2 b 1")

    def digests():
        return [read_set(SetOptions(path=folder, split=split), seed=0).digest for split in (None, "test")]

    before = digests()
    (folder / "qrels/test.tsv").write_text("2\tb\t2\n")
    between = digests()
    write(folder / "queries.jsonl", {"_id": "1", "text": "really red?"}, {"_id": "2", "text": "hot?"})
    after = digests()

    assert [old == new for old, new in zip(before, between, strict=True)] == [True, False]
    assert [old == new for old, new in zip(between, after, strict=True)] == [False, False]


def test_a_recipe_is_the_same_where_an_option_came_into_being_since(trained, tiny_bert, pairs, tmp_path):
    copied = Path(shutil.copytree(trained.folder, tmp_path / "copied"))
    recipe = json.loads((copied / "recipe.json").read_text())
    del recipe["recompute"], recipe["sets"][0]["name"]
    (copied / "recipe.json").write_text(json.dumps(recipe))

    assert train(tiny_bert, pairs, copied).groups == trained.groups


def test_training_stops_when_it_gets_no_better(tiny_bert, pairs, tmp_path):
    train(tiny_bert, pairs, tmp_path, learning_rate=1e-12, epochs=5, evaluations=10, patience=2)

    assert _last_checkpoint(tmp_path / "checkpoints").endswith("checkpoint-12")  # the 3rd of 10 evaluations of 40 steps


def test_the_log_says_how_long_it_will_take(tiny_bert, pairs, tmp_path, caplog):
    caplog.set_level(logging.INFO, "langchain_rerank")
    train(tiny_bert, pairs, tmp_path)

    assert any("Step 5 of 8: loss" in line and "about 0:00:0" in line for line in caplog.messages)


def test_bars_are_shown_on_standard_error_alone(tiny_bert, pairs, tmp_path, capsys):
    recipe = {"base": tiny_bert, "sets": [{"path": pairs}], **SETTINGS}
    train_reranker(recipe, tmp_path, progress=True)
    shown = capsys.readouterr()

    assert shown.out == ""
    assert "Training: 100%" in shown.err
    assert "8/8" in shown.err
    assert "Loading weights" not in shown.err
    assert "model shards" not in shown.err


@pytest.mark.parametrize("downloads", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_bars_of_downloads_stay_as_they_are_where_others_go(enabled, downloads):
    before = hub.are_progress_bars_disabled()
    (hub.enable_progress_bars if enabled else hub.disable_progress_bars)()
    try:
        with no_bars(downloads=downloads):
            assert hub.are_progress_bars_disabled() != (enabled and downloads)
            assert not transformers.utils.logging.is_progress_bar_enabled()
        assert hub.are_progress_bars_disabled() != enabled
    finally:
        (hub.disable_progress_bars if before else hub.enable_progress_bars)()


# Bases ----------------------------------------------------------------------------------------------------------------


def test_layers_are_left_out_at_equal_distances(tiny_bert):
    config = BertConfig.from_pretrained(tiny_bert, num_hidden_layers=6)
    model = BertForSequenceClassification(config)
    before = list(model.bert.encoder.layer)

    keep_layers(model, 3)

    assert list(model.bert.encoder.layer) == [before[1], before[3], before[5]]
    assert model.config.num_hidden_layers == 3
    with pytest.raises(ConfigurationError, match="layers=4: BertForSequenceClassification has 3"):
        keep_layers(model, 4)
    model.bert.encoder.layer = None
    with pytest.raises(ConfigurationError, match=r"layers=1: .* has no list of encoder layers to shorten"):
        keep_layers(model, 1)


SMALL = {
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(("count", "kept"), [(3, [0, 3, 5]), (1, [0]), (6, [0, 1, 2, 3, 4, 5])])
def test_a_first_layer_unlike_the_others_stays_the_first(count, kept, tmp_path):
    torch.manual_seed(0)
    model = ModernBertForSequenceClassification(ModernBertConfig(**SMALL, initializer_range=0.5)).eval()
    before = list(model.model.layers)
    ids = torch.arange(1, 41).view(2, 20)

    keep_layers(model, count)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)

    assert list(model.model.layers) == [before[i] for i in kept]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)


def test_layers_of_which_fewer_make_no_model_are_refused(tiny_bert):
    model = BertForSequenceClassification(BertConfig.from_pretrained(tiny_bert, num_hidden_layers=4))
    model.bert.encoder.layer[-1].further = torch.nn.Linear(1, 1)

    with pytest.raises(ConfigurationError, match=r"layers=2: .* has layers of several kinds, and cannot"):
        keep_layers(model, 2)


DROPOUTS = {
    "DistilBERT": DistilBertConfig(
        vocab_size=512, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=1, pad_token_id=0
    ),
    "ALBERT": AlbertConfig(**SMALL, embedding_size=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
    "ModernBERT": ModernBertConfig(**SMALL, attention_dropout=0.1, mlp_dropout=0.1),
}


@pytest.mark.parametrize("kind", DROPOUTS)
def test_a_base_of_any_kind_is_trained_without_dropout(kind, tiny_bert, tmp_path):
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_config(DROPOUTS[kind]).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "base")
    recipe = Recipe(base=str(tmp_path / "base"), sets=({"path": "p"},), device="cpu")

    model = load_base(recipe.base, recipe).train()
    ids = torch.arange(1, 41).view(2, 20)

    assert torch.equal(model.model(ids).logits, model.model(ids).logits)
    model.model.save_pretrained(tmp_path / "saved")
    as_before, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "saved"))
    assert saved == as_before


def test_a_model_with_fewer_layers_is_saved_and_loads(tiny_bert, pairs, tmp_path):
    train(tiny_bert, pairs, tmp_path, layers=1)

    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 1
    assert not any("layer.1." in name for name in load_file(tmp_path / "model.safetensors"))
    CrossEncoderBackend(model=str(tmp_path), device="cpu").warmup()


def test_a_share_of_the_base_stays_in_each_weight(trained, learn, tiny_bert, tmp_path):
    learn(tmp_path, base_share=0.25)
    base, alone, mixed = (load_file(Path(each) / "model.safetensors") for each in (tiny_bert, trained.folder, tmp_path))

    assert any(not torch.equal(base[name], alone[name]) for name in base)
    for name in base:
        torch.testing.assert_close(mixed[name], 0.25 * base[name] + 0.75 * alone[name])


def test_what_has_other_weights_than_the_base_is_not_mixed_with_it(tiny_bert, plain_bert, pairs, tmp_path):
    with pytest.raises(ConfigurationError, match="other layers="):
        train(tiny_bert, pairs, tmp_path, base_share=0.5, layers=1)
    with pytest.raises(ConfigurationError, match="has no head that ranks yet"):
        train(plain_bert, pairs, tmp_path, base_share=0.5)

    assert not (tmp_path / "groups.jsonl").exists()


def test_a_plain_encoder_gets_a_head_that_the_seed_makes(plain_bert, pairs, tmp_path, capfd):
    report = train(plain_bert, pairs, tmp_path, layers=1)

    assert report.base is None
    assert load_file(tmp_path / "model.safetensors")["classifier.weight"].shape == (1, 32)
    assert "| nDCG@10 |" in (tmp_path / "README.md").read_text()
    shown = capfd.readouterr().err
    assert "MISSING" not in shown
    assert "Converting" not in shown


def test_the_packaged_model_can_be_trained_further(tmp_path):
    folder = place_base("embedded", tmp_path)
    weights = load_file(Path(folder) / "model.safetensors")
    stored = {
        each.name: numpy_helper.to_array(each) for each in onnx.load(EMBEDDED_MODEL / "model.onnx").graph.initializer
    }
    texts = ["Mars is called the red planet.", "Jupiter is the largest planet.", "bread"]

    for name, tensor in weights.items():
        packaged = stored[name] if name in stored else stored[f"{name}.T"].T
        assert (tensor.numpy() == packaged).all()
    assert AutoConfig.from_pretrained(folder).dtype == torch.float32  # by which others load it
    torch_backend = CrossEncoderBackend(model=folder, device="cpu", dtype="float32", max_length=256)
    assert torch_backend.logits("red planet", texts) == pytest.approx(
        EmbeddedBackend().logits("red planet", texts), abs=1e-3
    )


def test_an_exported_model_without_config_or_in_int8_cannot_be_trained(trained, tmp_path):
    AutoTokenizer.from_pretrained(trained.folder).save_pretrained(tmp_path)
    wide = BertConfig.from_pretrained(trained.folder, hidden_size=96, intermediate_size=96, num_hidden_layers=1)
    BertForSequenceClassification(wide).save_pretrained(tmp_path)
    export_reranker(tmp_path, tmp_path / "int8", dtype="int8")
    (Path(shutil.copytree(tmp_path / "int8", tmp_path / "bare")) / "config.json").unlink()

    with pytest.raises(ModelLoadError, match=r"lacks the weights .*export it in float32 or float16"):
        place_base(str(tmp_path / "int8"), tmp_path / "a")
    with pytest.raises(ModelLoadError, match=r"bare' has no config\.json to train its model.onnx with"):
        place_base(str(tmp_path / "bare"), tmp_path / "b")


def test_a_base_that_cannot_rank_is_refused_before_anything_is_done(tiny_bert, tiny_t5, tiny_gemma, pairs, tmp_path):
    two = tmp_path / "two"
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(two)
    AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=2, ignore_mismatched_sizes=True
    ).save_pretrained(two)

    for base, problem in [
        (str(two), "two' has 2 labels; a reranker has one"),
        (tiny_t5, "is a T5ForConditionalGeneration, a model that writes text, such as monoT5's"),
        (tiny_gemma, "is a GemmaForCausalLM, a model that writes text"),
        (str(tmp_path / "nowhere"), "nowhere' cannot be loaded"),
        ("embeded", r"'embeded' cannot be loaded: .* Did you mean 'embedded'\?"),
    ]:
        with pytest.raises(ModelLoadError, match=problem):
            train(base, pairs, tmp_path / "out")
    assert not (tmp_path / "out/groups.jsonl").exists()


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_xlmr"])
def test_more_tokens_than_the_base_has_positions_for_are_refused(base, request):
    folder = request.getfixturevalue(base)

    recipe = Recipe(base="the name given", sets=["a"], max_length=512)
    check_base(folder, recipe)
    with pytest.raises(ModelLoadError, match="max_length=513, but 'the name given' has positions for 512 tokens"):
        check_base(folder, recipe.model_copy(update={"max_length": 513}))


# Use ------------------------------------------------------------------------------------------------------------------

TEXTS = [" ".join(answer for _, answer in FACTS), *(answer for _, answer in FACTS[:5])]


def test_the_folder_loads_and_scores_the_same_after_the_export(learn, tmp_path):
    folder = learn(tmp_path / "trained", max_length=48).folder
    export_reranker(str(folder), str(tmp_path), dtype="float32")
    query = FACTS[0][0]

    with_torch = init_reranker(f"cross-encoder:{folder}", device="cpu", dtype="float32").backend
    without = init_reranker(f"embedded:{tmp_path}").backend

    assert with_torch.score(query, TEXTS) == pytest.approx(without.score(query, TEXTS), abs=1e-4)


def test_the_card_goes_along_with_an_export(trained, tmp_path):
    export_reranker(trained.folder, tmp_path / "small", dtype="int8")
    card = (tmp_path / "small/README.md").read_text("utf-8")

    assert "nDCG@10 against BM25: " in card
    assert "its weights stored in int8" in card
    assert "cross-encoder:" not in card
    assert card.count('init_reranker("embedded:small")') == 2


def test_a_card_in_any_encoding_goes_along(tiny_bert, tmp_path):
    source = Path(shutil.copytree(tiny_bert, tmp_path / "source"))
    (source / "README.md").write_bytes("Für alle".encode("latin-1"))

    export_reranker(source, tmp_path / "exported")

    assert (tmp_path / "exported/README.md").read_bytes().startswith("Für alle\n\n## This".encode("latin-1"))


def test_an_export_writes_over_no_other_model(trained, tiny_bert, pairs, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in trained.folder.iterdir()}

    for target, problem in [
        (trained.folder, "holds model.safetensors, which is of no export and would be overwritten"),
        (tmp_path, "holds README.md, which is of no export and would be overwritten"),
        (pairs, "is a file; the export goes into a folder"),
    ]:
        with pytest.raises(ConfigurationError, match=problem):
            export_reranker(tiny_bert, target)
    assert {path.name: path.stat().st_mtime_ns for path in trained.folder.iterdir()} == before


def test_an_export_takes_the_place_of_an_earlier_one(trained, tmp_path):
    for dtype in ("float16", "int8"):
        export_reranker(trained.folder, tmp_path / "exported", dtype=dtype)

    assert "stored in int8" in (tmp_path / "exported/README.md").read_text("utf-8")


def test_whoever_reads_the_config_reads_the_weights(trained):
    modes = {name: (trained.folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}

    assert modes["model.safetensors"] == modes["config.json"]


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"epoch": 2}, r"Unknown option 'epoch' for a training recipe\. Did you mean 'epochs'\?"),
        ({"sets": [{"paht": "a"}]}, r"Unknown option 'paht' for a set of a training recipe\. Did you mean 'path'\?"),
        ({"sets": []}, "training recipe: sets: Tuple should have at least 1 item"),
        ({"seed": "a"}, "training recipe: seed: Input should be a valid integer"),
        ({"sets": [{"path": "a/x.jsonl"}, {"path": "b/x"}]}, "2 sets are called 'x'; give each its own name="),
        ({"base": None}, "training recipe: base: Input should be a valid string"),
        ({"teacher": {"bm25": -1}}, r"training recipe: teacher\.bm25: Input should be greater than 0"),
        ({"teacher": {"bm25": math.nan}}, r"training recipe: teacher\.bm25: Input should be"),
    ],
)
def test_a_recipe_that_cannot_be_right_says_why(options, problem):
    with pytest.raises(ConfigurationError, match=problem):
        read_recipe({"base": "b", "sets": [{"path": "a"}], **options})


def test_a_recipe_is_short_where_the_defaults_will_do(tmp_path):
    recipe = read_recipe({"sets": [str(tmp_path / "a.jsonl"), tmp_path / "b"]})

    assert recipe.base == "embedded"
    assert [(each.name, each.path) for each in recipe.sets] == [("a", tmp_path / "a.jsonl"), ("b", tmp_path / "b")]


@pytest.mark.parametrize("name", ["pairs.jsonl", "folder"])
def test_data_are_no_recipe(name, tmp_path):
    (tmp_path / "folder").mkdir()

    with pytest.raises(ConfigurationError, match=rf"{name} is data, and no recipe; .* as in sets: \[.*{name}\]"):
        read_recipe(tmp_path / name)


def test_a_list_is_no_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("- base: embedded\n")

    with pytest.raises(ConfigurationError, match=r"recipe\.yaml holds a list; a training recipe is a mapping"):
        read_recipe(tmp_path / "recipe.yaml")


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", "data")
    monkeypatch.setenv("KIND", "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").write_text(
        "base: model\nembedding: model\nteacher: {bm25: 1, 'cross-encoder:${KIND}': 2, bge:BAAI/bge-reranker-base: 3}\n"
        "sets: [{path: '${WHERE}/a'}, {path: a, synthetic: title}]\n"
    )

    recipe = read_recipe(str(tmp_path / "recipe.yaml"), seed=3)

    assert (recipe.base, recipe.embedding, recipe.seed) == (str(tmp_path / "model"), str(tmp_path / "model"), 3)
    assert recipe.teacher == {"bm25": 1, f"cross-encoder:{tmp_path / 'model'}": 2, "bge:BAAI/bge-reranker-base": 3}
    assert [(each.path, each.name) for each in recipe.sets] == [
        (tmp_path / "data/a", "a"),
        (tmp_path / "a", "a (title)"),
    ]
    assert read_recipe(recipe) == recipe


def test_paths_given_beside_a_file_are_relative_to_where_one_is(tmp_path, monkeypatch):
    for folder in ("there/model", "here/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "there/recipe.yaml").write_text("base: model\nembedding: model\nsets: [{path: a}]\n")
    monkeypatch.chdir(tmp_path / "here")
    given = {"base": "model", "teacher": {"cross-encoder:model": 1}, "sets": [{"path": "a"}]}

    recipe = read_recipe("../there/recipe.yaml", **given)

    assert (recipe.base, recipe.teacher) == ("model", {"cross-encoder:model": 1})
    assert recipe.sets[0].path == Path("a")
    assert Path(recipe.embedding) == Path("../there/model")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"teacher": {"bm52": 1}}, r"Unknown teacher 'bm52'\. Did you mean 'bm25'\? There are bm25, dense, bge"),
        ({"teacher": {"dense": 1}}, "The teacher 'dense' is the embedding's ranking, and the recipe has no embedding"),
        ({"relative_margin": 0.1}, "relative_margin compares the embedding's scores, and the recipe has no embedding"),
        ({"device": "quantum"}, "device 'quantum' cannot be used here"),
        ({"device": "cuda:1"}, "device 'cuda:1': .* set CUDA_VISIBLE_DEVICES=1 and device='cuda'"),
    ],
)
def test_what_a_recipe_names_and_is_not_there_is_refused(options, problem, tiny_bert, pairs, tmp_path):
    with pytest.raises(ConfigurationError, match=problem):
        train(tiny_bert, pairs, tmp_path, **options)


@pytest.mark.parametrize(("device", "gpus"), [("meta", 1), ("cpu", 0)])  # meta: neither a CPU nor a GPU
def test_of_several_gpus_a_training_takes_one(device, gpus, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe = Recipe(base=tiny_bert, sets=({"path": "p"},), device=device, batch_size=4)

    arguments = _arguments(recipe, 32, tmp_path, evaluate=True, progress=False)

    assert arguments.n_gpu == gpus
    assert arguments.train_batch_size == 4
    assert arguments.device == torch.device("cpu")


def test_queries_that_come_next_are_embedded_together(tiny_embedding, monkeypatch):
    encoder = Encoder(tiny_embedding, "cpu")
    queries = [query for query, _ in FACTS]
    alone = [encoder.embed_query(query) for query in queries]
    encoder.foresee(queries)
    monkeypatch.setattr(encoder, "_encode", None)

    np.testing.assert_allclose([encoder.embed_query(query) for query in queries], alone, atol=0.02)  # bfloat16


def test_an_embedding_that_is_not_there_is_refused(tiny_bert, pairs, tmp_path):
    with pytest.raises(ModelLoadError, match=r"The embedding '.*nowhere' cannot be loaded"):
        train(tiny_bert, pairs, tmp_path / "out", embedding=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_found_out_before_an_llm_is_asked(tiny_bert, articles, tmp_path):
    llm = Questioner()
    sets, teacher = [{"path": articles, "synthetic": "llm"}], {"cross-encoder:no/no": 1}
    recipe = {"base": tiny_bert, "sets": sets, "teacher": teacher}

    with pytest.raises(ModelLoadError, match="no/no"):
        train_reranker(recipe, tmp_path / "out", llm=llm, progress=False)
    assert llm._asked == []
    assert not (tmp_path / "out").exists()


def test_a_base_without_weights_is_found_out_before_an_llm_is_asked(tiny_bert, articles, tmp_path):
    llm, base = Questioner(), tmp_path / "base"
    base.mkdir()
    shutil.copy(Path(tiny_bert, "config.json"), base)

    with pytest.raises(ModelLoadError, match="base' cannot be loaded"):
        train_reranker(
            {"base": str(base), "sets": [{"path": articles, "synthetic": "llm"}]},
            tmp_path / "out",
            llm=llm,
            progress=False,
        )
    assert llm._asked == []
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_there_are_missed_before_a_teacher_is_loaded_or_an_llm_asked(articles, tmp_path):
    llm = Questioner()
    sets = [{"path": articles, "synthetic": "llm"}, {"path": articles, "synthetic": "llm", "name": "b"}]
    for missing in ({"path": "none.jsonl"}, {"path": "none.jsonl", "synthetic": "llm"}):
        recipe = read_recipe({"sets": [*sets, missing], "teacher": {"cross-encoder:no/no": 1}})

        with pytest.raises(ConfigurationError, match=r"Cannot read none\.jsonl: No such file"):
            prepare(recipe, tmp_path / "out", llm=llm, progress=False)
    assert llm._asked == []
    assert not (tmp_path / "out").exists()


def test_a_mistake_leaves_no_folder_behind_that_refuses_the_mended_recipe(learn, tmp_path):
    with pytest.raises(ConfigurationError, match="layers=9: BertForSequenceClassification has 2"):
        learn(tmp_path / "out", layers=9)

    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_sets(tiny_embedding, pairs, articles, monkeypatch):
    """The sets of the embedded model's recipe with their options, but for what is in them."""
    monkeypatch.setenv("MPNET", tiny_embedding)
    return [
        {**each, "path": articles if "synthetic" in each else pairs, "name": f"set {i}"}
        for i, each in enumerate(yaml.safe_load(RECIPE.read_text("utf-8"))["sets"])
    ]


def test_the_recipe_of_the_embedded_model_runs(tiny_bert, small_sets, tmp_path):
    report = train_reranker(RECIPE, tmp_path, progress=False, base=tiny_bert, sets=small_sets, held_out=20)

    assert report.groups > 20
    assert report.trained.mean("nDCG@10") > 0


# The command line -----------------------------------------------------------------------------------------------------


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_train_and_export_make_a_model_that_rank_takes(tiny_bert, pairs, tmp_path):
    settings = [f"--option={name}={value}" for name, value in SETTINGS.items()]
    done = cli("train", pairs, "--base", tiny_bert, "--teacher", "bm25=0.5", "-O", tmp_path / "out", *settings)
    exported = cli("export", tmp_path / "out", tmp_path / "onnx", "--dtype", "float16")
    ranked = cli("rank", "Which planet is red?", ROOT / "README.md", "-b", f"embedded:{tmp_path / 'onnx'}", "-n", "2")

    assert (done.exit_code, exported.exit_code, ranked.exit_code) == (0, 0, 0), (done.output, exported.output)
    assert "Learned from 32 queries" in done.stdout
    assert "nDCG@10 against BM25: " in done.stdout
    assert f"Use it:         --backend cross-encoder:{tmp_path / 'out'}" in done.stdout
    assert "Step 5 of 8: loss" in done.stderr
    assert "Made the collection" not in done.stderr
    assert f"Use it: --backend embedded:{tmp_path / 'onnx'}" in exported.stdout
    assert len(ranked.stdout.splitlines()) == 2
    assert json.loads((tmp_path / "out/recipe.json").read_text())["teacher"] == {"bm25": 0.5}


def test_on_a_terminal_the_log_says_what_no_bar_does(trained, learn, capsys):
    with logged(bars=True):
        learn(trained.folder)
        logging.getLogger("langchain_rerank._training.fit").info("Step 1 of 8")

    assert capsys.readouterr().err == f"{trained.folder} was trained by this recipe already; this is its report\n"


def test_the_report_says_that_queries_are_few_and_that_a_model_ranks_worse(trained):
    out = Console(file=io.StringIO(), width=120)
    worse = {metric: dict.fromkeys(values, 0.0) for metric, values in trained.trained.scores.items()}
    recipe = Recipe(sets=["pairs.jsonl"], max_length=64)

    print_report(out, dataclasses.replace(trained, trained=Ranking(worse)), recipe)
    shown = " ".join(out.file.getvalue().split())

    assert "8 held-out queries (the recipe asks for 200; a set gives a fifth at most), " in shown
    assert "read up to 64 tokens" in shown
    assert re.search(r"nDCG@10 against BM25: -\d\.\d+, 95 % interval -\S+ to -\S+\. It ranks worse\.", shown)


def test_a_recipe_on_the_command_line_gives_way_to_options(tiny_bert, pairs, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"base: {tiny_bert}\nsets: [{{path: {pairs}}}]\nheld_out: 8\n")

    done = cli("train", "-r", tmp_path / "recipe.yaml", "-O", tmp_path / "out", "-o", "held_out=0", "-o", "epochs=0.5")

    assert done.exit_code == 0, done.output
    assert "Learned from 40 queries" in done.stdout
    assert "held-out" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "Nothing to learn from: give DATA, or a recipe with --recipe"),
        (["a.jsonl", "--teacher", "bm25=x"], "--teacher 'bm25=x': 'x' is no number; write NAME or NAME=WEIGHT"),
        (["a.jsonl", "-o", "epoch=2"], "Unknown option 'epoch' for a training recipe. Did you mean 'epochs'?"),
        (["none.jsonl", "--synthetic", "titel"], "training recipe: sets.0.synthetic: Input should be 'title'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, problem, tmp_path):
    done = cli("train", *arguments, "-O", tmp_path / "out")

    assert done.exit_code == 1
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_the_extra_the_error_says_what_to_type():
    code = (
        "import sys; sys.modules['datasets'] = None; from langchain_rerank.cli import app; "
        "app(['train', 'pairs.jsonl', '-O', 'out'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "datasets not found. Install with: pip install 'langchain-rerank[train]'" in done.stderr
