"""中文快速上手：BM25 召回 50 条，精排取 5 条。

python examples/zh/quickstart.py                                   不下载任何东西，用演示打分器
python examples/zh/quickstart.py bge:/models/bge-reranker-v2-m3    换成本地目录里的 BGE
"""

# ruff: noqa: D415, RUF001, RUF002, RUF003  # 中文标点
import sys
from collections.abc import Sequence
from pathlib import Path

from langchain_rerank import Backend, create_qdrant_retriever, create_rerank_retriever, init_reranker

HANDBOOK = Path(__file__).parent / "handbook.txt"
QUESTION = "冬天长时间不骑，电池怎么保存？"


class DemoBackend(Backend):
    """演示打分器：问题里的字，有多少出现在这段话里。它不懂语义，只为让本程序离线跑通。"""

    def _score(self, query: str, texts: Sequence[str]) -> list[float]:
        asked = set(filter(str.isalnum, query))
        return [len(asked & set(text)) / max(1, len(asked)) for text in texts]


passages = HANDBOOK.read_text("utf-8").splitlines()  # 68 条，一行一条
recall = create_qdrant_retriever(passages, k=50)  # 内存里的 Qdrant，BM25 按相邻两字匹配，最多召回 50 条

if len(sys.argv) > 1:
    reranker = init_reranker(sys.argv[1], top_n=5)
else:
    print("用的是演示打分器，结果不代表 BGE 的效果。\n")
    reranker = init_reranker(DemoBackend(), top_n=5)
retriever = create_rerank_retriever(recall, reranker)

print(f"{QUESTION}\n\n召回 {len(recall.invoke(QUESTION))} 条，前 5 条：")
for document in recall.invoke(QUESTION, k=5):
    print(f"  {document.page_content}")

print("\n精排后的 5 条（分数，召回时的名次）：")
for document in retriever.invoke(QUESTION):
    score, rank = document.metadata["relevance_score"], document.metadata["retrieval_rank"]
    print(f"  {score:.3f}  {rank:2}  {document.page_content}")
