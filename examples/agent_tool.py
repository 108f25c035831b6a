"""A reranked retriever as an agent's tool: first the tool by itself, then, if you name a chat model, in an agent.

python examples/agent_tool.py
python examples/agent_tool.py openai:gpt-5.5          (pip install langchain langchain-openai)
"""

import sys
from pathlib import Path

from langchain_core.tools import create_retriever_tool

from langchain_rerank import create_qdrant_retriever, create_rerank_retriever

HANDBOOK = Path(__file__).parent / "data" / "handbook.md"
QUESTION = "May I clean the bike with a pressure washer?"

sections = HANDBOOK.read_text("utf-8").split("\n\n## ")
retriever = create_rerank_retriever(create_qdrant_retriever(sections), "embedded", top_n=2)

tool = create_retriever_tool(
    retriever,
    name="search_handbook",
    description="Searches the owner's handbook of the bicycle. Ask a whole question.",
    response_format="content_and_artifact",  # the model reads the text, the program gets the documents too
)

# What an agent sends when its model wants to search, and what it gets back.
call = {"type": "tool_call", "id": "1", "name": tool.name, "args": {"query": QUESTION}}
message = tool.invoke(call)

for document in message.artifact:
    title, _, _ = document.page_content.partition("\n")
    print(f"{document.metadata['relevance_score']:.3f}  {title}")
print(f"\nThe model reads:\n\n{message.content}")

if len(sys.argv) > 1:
    from langchain.agents import create_agent

    agent = create_agent(sys.argv[1], [tool], system_prompt="Answer from the handbook, and from nothing else.")
    answer = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})
    print(f"\nThe agent answers: {answer['messages'][-1].text}")
