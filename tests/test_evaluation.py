"""Metrics with values known by hand, the interval against cases that can be computed, and the tables."""

import json
import math
import statistics

import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from langchain_rerank import Backend, Reranker, RerankError
from langchain_rerank.evaluation import (
    METRICS,
    Interval,
    Ranked,
    bootstrap,
    compare,
    rerank,
    retrieve,
    score_run,
    spread_sample,
    to_json,
    to_markdown,
    to_plot,
    to_table,
    typical_gain,
)


class Longest(Backend):
    """Prefers long texts."""

    def _score(self, query, texts):
        return [len(text) / 100 for text in texts]


class Fixed(BaseRetriever):
    """Always finds the same."""

    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


def ranking(*ids, seconds=0.0):
    return Ranked([Document(id=name, page_content=f"the text of {name}") for name in ids], seconds)


def test_ndcg_of_a_ranking_known_by_hand():
    # Relevant are the second and the fourth of the ranking; the ideal one has them first and second.
    gained, ideal = 1 / math.log2(3) + 1 / math.log2(5), 1 + 1 / math.log2(3)

    scores = score_run({"q": {"a": 1, "b": 1}}, {"q": ["x", "a", "y", "b"]}, ["nDCG@10"])

    assert scores == {"nDCG@10": {"q": pytest.approx(gained / ideal)}}


def test_mrr_and_recall_of_a_ranking_known_by_hand():
    qrels = {"q": {"a": 1, "b": 1, "c": 1, "never found": 1}}
    run = {"q": ["x", "y", "a", "z", "b", "c"]}

    scores = score_run(qrels, run, ["MRR@10", "R@5", "R@10"])

    assert scores == {"MRR@10": {"q": pytest.approx(1 / 3)}, "R@5": {"q": 0.5}, "R@10": {"q": 0.75}}


def test_mrr_looks_at_ten_documents_only():
    run = {"q": [f"x{place}" for place in range(10)] + ["a"]}

    assert score_run({"q": {"a": 1}}, run, ["MRR@10"]) == {"MRR@10": {"q": 0.0}}


def test_the_order_counts_whatever_the_ids_are():
    # trec_eval breaks ties by id: the score of a document must fall with its place, whatever the ids are.
    for ids in (["a", "b", "c"], ["c", "b", "a"]):
        assert score_run({"q": {ids[0]: 1}}, {"q": ids}, ["MRR@10"]) == {"MRR@10": {"q": 1.0}}
        assert score_run({"q": {ids[2]: 1}}, {"q": ids}, ["MRR@10"]) == {"MRR@10": {"q": pytest.approx(1 / 3)}}


def test_grades_count_in_ndcg_and_zero_is_not_relevant():
    qrels = {"q": {"good": 2, "fair": 1, "bad": 0}}

    scores = score_run(qrels, {"q": ["bad", "fair", "good"]}, ["nDCG@10", "R@5", "MRR@10"])

    gained, ideal = 1 / math.log2(3) + 2 / math.log2(4), 2 + 1 / math.log2(3)
    assert scores["nDCG@10"]["q"] == pytest.approx(gained / ideal)
    assert (scores["R@5"]["q"], scores["MRR@10"]["q"]) == (1.0, 0.5)


def test_a_query_that_found_nothing_scores_zero():
    scores = score_run({"q": {"a": 1}, "p": {"b": 1}}, {"q": ["a"], "p": []})

    assert {metric: values["p"] for metric, values in scores.items()} == {
        "nDCG@10": 0.0,
        "MRR@10": 0.0,
        "R@5": 0.0,
        "R@10": 0.0,
    }
    assert all(values["q"] == 1.0 for values in scores.values())


def test_queries_that_were_not_asked_do_not_count():
    assert score_run({"q": {"a": 1}, "not asked": {"b": 1}}, {"q": ["a"]}, ["R@5"]) == {"R@5": {"q": 1.0}}


def test_a_query_without_judgements_is_an_error():
    with pytest.raises(RerankError, match="The qrels say nothing of 1 queries, such as 'p'"):
        score_run({"q": {"a": 1}}, {"q": ["a"], "p": ["a"]})


@pytest.mark.parametrize("metric", ["nDCG", "ndcg@10", "R@all", "BLEU@4"])
def test_an_unknown_metric_is_an_error(metric):
    with pytest.raises(RerankError, match=f"Unknown metric '{metric}'; metrics look like nDCG@10"):
        score_run({"q": {"a": 1}}, {"q": ["a"]}, [metric])


def test_the_interval_of_equal_differences_is_a_point():
    assert bootstrap([0.25] * 10) == Interval(0.25, 0.25, 0.25)


def test_the_interval_of_coin_flips_is_that_of_the_binomial():
    # The resampled mean of 50 ones and 50 zeros is Binomial(100, 1/2) / 100, whose 2.5 % and 97.5 % quantiles are
    # 40 and 60: P(X <= 39) = 0.0176, P(X <= 40) = 0.0284.
    assert bootstrap([0.0, 1.0] * 50) == Interval(0.5, 0.4, 0.6)


def test_the_interval_is_near_that_of_the_normal_distribution():
    differences = [math.sin(number) for number in range(400)]
    error = statistics.pstdev(differences) / math.sqrt(len(differences))

    interval = bootstrap(differences)

    assert interval.mean == pytest.approx(statistics.fmean(differences))
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=error / 10)
    assert interval.high == pytest.approx(interval.mean + 1.96 * error, abs=error / 10)


def test_the_same_differences_give_the_same_interval():
    differences = [math.sin(number) for number in range(30)]

    assert bootstrap(differences) == bootstrap(differences)
    assert bootstrap(differences) != bootstrap(differences, seed=1)


def test_before_and_after_are_compared_query_by_query():
    qrels = {"q": {"a": 1}, "p": {"b": 1}}
    before, after = {"q": ranking("x", "a"), "p": ranking("b", "x")}, {"q": ranking("a", "x"), "p": ranking("x", "b")}

    comparison = compare(qrels, before, after)

    second = 1 / math.log2(3)
    assert comparison.before.mean("nDCG@10") == pytest.approx((second + 1) / 2)
    assert comparison.gains == {"q": pytest.approx(1 - second), "p": pytest.approx(second - 1)}
    assert comparison.difference.mean == pytest.approx(0)
    assert comparison.difference.low < 0 < comparison.difference.high


def test_times_are_medians():
    before = {name: ranking("a", seconds=seconds) for name, seconds in [("p", 0.001), ("q", 0.003), ("r", 0.9)]}
    after = {name: ranking("a", seconds=0.02) for name in before}

    comparison = compare({name: {"a": 1} for name in before}, before, after)

    assert comparison.before.milliseconds == pytest.approx(3)
    assert comparison.after.milliseconds == pytest.approx(20)


def test_only_the_first_stage_has_recall_at_its_depth():
    comparison = compare({"q": {"a": 1}}, {"q": ranking(*"abc")}, {"q": ranking(*"cba")})

    assert "R@50" in comparison.before.scores
    assert "R@50" not in comparison.after.scores


def test_context_tokens_are_of_the_best_ten_before_and_the_best_five_after():
    before = {"q": ranking(*(f"d{number}" for number in range(50)))}
    after = {"q": ranking(*(f"d{number}" for number in reversed(range(50))))}

    comparison = compare({"q": {"d0": 1}}, before, after, count_tokens=lambda text: len(text.split()))

    assert comparison.before.context_tokens == 10 * 4
    assert comparison.after.context_tokens == 5 * 4
    assert compare({"q": {"d0": 1}}, before, after).after.context_tokens is None


def test_different_queries_cannot_be_compared():
    with pytest.raises(RerankError, match="before has 1 queries, after 0"):
        compare({"q": {"a": 1}}, {"q": ranking("a")}, {})
    with pytest.raises(RerankError, match="before has 0 queries, after 0"):
        compare({"q": {"a": 1}}, {}, {})


def test_a_document_without_id_cannot_be_judged():
    nameless = {"q": Ranked([Document(page_content="who am I")], 0.0)}

    with pytest.raises(RerankError, match="A document without id cannot be judged: 'who am I'"):
        compare({"q": {"a": 1}}, nameless, nameless)


def test_both_stages_are_timed_and_the_reranker_keeps_all():
    documents = [Document(id="short", page_content="a"), Document(id="long", page_content="a b c")]
    reranker = Reranker(backend=Longest(), top_n=1, score_threshold=0.9)

    found = retrieve(Fixed(documents=documents), "q")
    ranked = rerank(reranker, "q", found)

    assert [document.id for document in found.documents] == ["short", "long"]
    assert [document.id for document in ranked.documents] == ["long", "short"]
    assert found.seconds > 0
    assert ranked.seconds > 0


def test_a_sample_is_spread_over_all_and_always_the_same():
    assert spread_sample([*"abcdefghij"], 5) == [*"acegi"]
    assert spread_sample([*"abcdefg"], 3) == [*"ace"]
    assert spread_sample([*"abc"], 10) == [*"abc"]
    assert spread_sample([], 10) == []


def test_the_typical_gain_is_the_median_of_those_that_gained():
    assert typical_gain({"a": 0.5, "b": -0.4, "c": 0.1, "d": 0.3, "e": 0.0}) == "d"
    assert typical_gain({"a": 0.4, "b": 0.2, "c": 0.1, "d": 0.3}) == "b"
    assert typical_gain({"a": 0.0, "b": -0.1}) is None


@pytest.fixture
def small():
    """One question whose answer comes second before and first after."""
    return compare(
        {"q": {"a": 1}},
        {"q": ranking("x", "a", seconds=0.002)},
        {"q": ranking("a", "x", seconds=0.3)},
        count_tokens=lambda text: len(text.split()),
    )


def test_the_markdown_table_says_everything(small):
    expected = """\
| | before | after |
|---|---:|---:|
| nDCG@10 | 0.631 | 1.000 |
| MRR@10 | 0.500 | 1.000 |
| R@5 | 1.000 | 1.000 |
| R@10 | 1.000 | 1.000 |
| R@50 | 1.000 | same |
| ms per query | 2 | + 300 |
| context tokens | 8 (best 10) | 8 (best 5) |

nDCG@10 +0.369, 95 % interval +0.369 to +0.369 (paired bootstrap over 1 queries, 10,000 resamples)."""

    assert to_markdown(small) == expected


def test_the_terminal_table_has_the_same_cells(small):
    table = to_table(small)
    cells = list(zip(*(column.cells for column in table.columns), strict=True))

    markdown = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in to_markdown(small).splitlines()]
    assert cells == markdown[2:9]


def test_the_plot_shows_the_means_and_each_querys_gain():
    first, second = ranking("a", "x"), ranking("x", "a")
    judged = {query: {"a": 1} for query in ("better", "worse", "same", "too")}
    before = {"better": second, "worse": first, "same": second, "too": second}
    after = {"better": first, "worse": second, "same": second, "too": first}
    means, gains = to_plot(compare(judged, before, after)).axes
    low, middle = 0.6309, 0.3691

    heights = [[bar.get_height() for bar in bars] for bars in means.containers]
    assert heights[0] == pytest.approx([(1 + 3 * low) / 4, 2.5 / 4, 1, 1], abs=1e-4)
    assert heights[1] == pytest.approx([(2 + 2 * low) / 4, 3 / 4, 1, 1], abs=1e-4)
    assert [label.get_text() for label in means.get_xticklabels()] == list(METRICS)
    assert [bar.get_height() for bar in gains.containers[0]] == pytest.approx([middle, middle, 0, -middle], abs=1e-4)
    assert gains.get_xlabel() == "2 queries better, 1 as before, 1 worse"


def test_the_json_holds_each_querys_scores(small):
    numbers = json.loads(json.dumps(to_json(small)))

    assert numbers["queries"] == 1
    assert numbers["before"]["nDCG@10"] == pytest.approx(0.6309, abs=1e-4)
    assert numbers["after"]["milliseconds"] == pytest.approx(300)
    assert numbers["difference"] == {"metric": "nDCG@10", "mean": pytest.approx(0.369, abs=1e-3)} | {
        "low": pytest.approx(0.369, abs=1e-3),
        "high": pytest.approx(0.369, abs=1e-3),
    }
    assert numbers["scores"]["after"]["MRR@10"] == {"q": 1.0}
