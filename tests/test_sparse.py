import math
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import bm25s
import pytest
from langchain_qdrant import QdrantVectorStore, RetrievalMode
from qdrant_client import QdrantClient, models

from langchain_rerank.errors import ConfigurationError
from langchain_rerank.sparse import BM25SparseEmbeddings, token_id


def weights(text, **settings):
    """The vector of a document in a collection whose documents have four tokens on average."""
    [vector] = BM25SparseEmbeddings(average_length=4, **settings).embed_documents([text])
    return dict(zip(vector.indices, vector.values, strict=True))


def counts(*tokens):
    return {token_id(token): float(tokens.count(token)) for token in tokens}


def query(text):
    vector = BM25SparseEmbeddings().embed_query(text)
    return dict(zip(vector.indices, vector.values, strict=True))


def test_a_document_holds_the_term_frequency_part_of_bm25():
    found = weights("mars mars planet", k1=1.2, b=0.75)

    norm = 1.2 * (1 - 0.75 + 0.75 * 3 / 4)
    assert found == {
        token_id("mar"): pytest.approx(2 * 2.2 / (2 + norm)),
        token_id("planet"): pytest.approx(1 * 2.2 / (1 + norm)),
    }


def test_the_usual_settings_are_those_of_anserini():
    assert weights("mars") == weights("mars", k1=0.9, b=0.4)


def test_a_query_counts_its_tokens():
    assert query("mars mars planet") == counts("mar", "mar", "planet")


def test_stop_words_do_not_count():
    assert query("The planet that was IN the sky") == counts("planet", "sky")
    assert weights("mars and the planet") == weights("mars planet")


def test_words_of_one_stem_are_one_token():
    assert query("planet Planets PLANET'S planet’s") == counts(*["planet"] * 4)


def test_one_character_is_a_word():
    assert query("vitamin D 5") == counts("vitamin", "d", "5")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("红色的星球", ["红色", "色的", "的星", "星球"]),
        ("赤いタワー", ["赤い", "いタ", "タワ", "ワー"]),
        ("서울특별시", ["서울", "울특", "특별", "별시"]),
        ("𠮷野家", ["𠮷野", "野家"]),
        ("水", ["水"]),
        ("星球，水。星球", ["星球", "水", "星球"]),
        ("2020年NASA发射", ["2020", "nasa", "年", "发射"]),
    ],
)
def test_chinese_japanese_and_korean_become_bigrams(text, tokens):
    assert query(text) == counts(*tokens)


def test_width_and_case_make_no_difference():
    assert query("ＮＡＳＡ １２ ｶﾀｶﾅ ﬁne STRASSE straße") == query("nasa 12 カタカナ fine strasse strasse")


def test_a_lone_surrogate_separates_words():
    assert query("red\ud800planet") == counts("red", "planet")


@pytest.mark.parametrize("text", ["", " \n", "the of and", "?!。"])
def test_a_text_without_tokens_has_an_empty_vector(text):
    assert weights(text) == {}
    assert query(text) == {}


def test_the_number_of_a_token_never_changes():
    assert token_id("planet") == 4105659236
    assert token_id("星球") == 2237725487


def test_two_tokens_with_one_number_count_as_one_token():
    assert token_id("abmu") == token_id("jkax")

    assert query("abmu jkax") == {token_id("abmu"): 2.0}
    assert weights("abmu jkax") == weights("abmu abmu")


def test_fit_measures_tokens_without_stop_words():
    fitted = BM25SparseEmbeddings(k1=1.5).fit(text for text in ["the red planet", "星球", ""])

    assert fitted == BM25SparseEmbeddings(k1=1.5, average_length=1.0)
    assert BM25SparseEmbeddings().fit(["red planet", "the giant red planet in view"]).average_length == 3.0


@pytest.mark.parametrize("texts", [[], [""], ["the"]])
def test_fit_on_nothing_gives_settings_that_work(texts):
    [vector] = BM25SparseEmbeddings().fit(texts).embed_documents(["planet"])

    assert all(map(math.isfinite, vector.values))


def test_documents_need_an_average_length():
    with pytest.raises(ConfigurationError, match=r"average length is not known. Take fit\(texts\)"):
        BM25SparseEmbeddings().embed_documents(["planet"])


@pytest.mark.parametrize("wrong", [{"k1": -1}, {"b": 1.1}, {"b": -0.1}, {"average_length": 0}, {"k1": math.nan}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="cannot be"):
        BM25SparseEmbeddings(**wrong)


def test_it_travels():
    embeddings = BM25SparseEmbeddings(b=0.5, average_length=7)

    assert pickle.loads(pickle.dumps(embeddings)) == embeddings


def test_threads_do_not_disturb_each_other():
    embeddings = BM25SparseEmbeddings(average_length=100)
    words = [f"{stem}{ending}" for stem in ("rot", "orbit", "reflect") for ending in ("s", "ing", "ed", "ation")]
    texts = [" ".join(random.Random(seed).choices(words, k=200)) for seed in range(50)]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: embeddings.embed_documents([text]), texts))

    assert together == [embeddings.embed_documents([text]) for text in texts]


def test_qdrant_makes_of_it_the_scores_of_bm25s():
    words = ["red", "giant", "planet", "moon", "orbit", "ring", "storm", "ice", "rock", "core"]
    texts = [" ".join(random.Random(seed).choices(words, k=5 + seed)) for seed in range(30)]
    asked = "red moon red storm"
    reference = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    reference.index([text.split() for text in texts], show_progress=False)

    scores = in_qdrant(texts, asked)

    expected = reference.get_scores(asked.split()) * (0.9 + 1)  # bm25s leaves the constant out
    assert scores == {
        text: pytest.approx(score, rel=1e-5) for text, score in zip(texts, expected, strict=True) if score
    }


def in_qdrant(texts, asked):
    client = QdrantClient(":memory:")
    idf = models.SparseVectorParams(modifier=models.Modifier.IDF)
    client.create_collection("c", vectors_config={}, sparse_vectors_config={"langchain-sparse": idf})
    bm25 = BM25SparseEmbeddings().fit(texts)
    store = QdrantVectorStore(client, "c", sparse_embedding=bm25, retrieval_mode=RetrievalMode.SPARSE)
    store.add_texts(texts)
    found = store.similarity_search_with_score(asked, k=len(texts))
    client.close()
    return {document.page_content: score for document, score in found}


def test_without_its_libraries_the_pip_line_is_shown():
    code = "import sys; sys.modules['Stemmer'] = None; import langchain_rerank; import langchain_rerank.sparse"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert "Stemmer not found. Install with: pip install 'langchain-rerank[qdrant]'" in process.stderr
