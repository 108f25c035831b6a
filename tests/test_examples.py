import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fakes import BrokenBackend, LengthBackend

from langchain_rerank import Reranker, create_qdrant_retriever, create_rerank_retriever, init_reranker

EXAMPLES = Path(__file__).parents[1] / "examples"

NO_NETWORK = """
import socket

def refuse(*_):
    raise OSError("an example asked the network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.fixture
def run(tmp_path):
    """Runs an example as its reader does, in an empty folder and without a network."""
    modules, folder = tmp_path / "modules", tmp_path / "folder"
    modules.mkdir()
    folder.mkdir()
    (modules / "sitecustomize.py").write_text(NO_NETWORK)

    def run(name, *arguments):
        return subprocess.run(
            [sys.executable, EXAMPLES / name, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(modules), "COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def output(done):
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def stages(lines):
    """What rag.py prints of the two stages: name to (passages, tokens, seconds, the lines below)."""
    titles = [(re.fullmatch(r"(.+): (\d+) passages, about (\d+) tokens, ([\d.]+) seconds", line)) for line in lines]
    found = {}
    for match, line in zip(titles, lines, strict=True):
        if match:
            found[match[1]] = shown = (int(match[2]), int(match[3]), float(match[4]), [])
        elif line and found:
            shown[-1].append(line.strip())
    return found


def test_each_example_is_tested_here():
    programs = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")}

    assert {name for name in programs if not name.startswith("third_party_backend/")} == {  # check.sh tests that
        "agent_tool.py",
        "cache.py",
        "cascade.py",
        "existing_chain.py",
        "hybrid.py",
        "quickstart.py",
        "rag.py",
        "swap.py",
        "web.py",
        "zh/quickstart.py",
    }


def test_quickstart_puts_the_answer_first(run):
    first, second = output(run("quickstart.py"))

    assert re.fullmatch(r"0\.\d{3}  page 4: Mars is called the red planet, .*", first)
    assert first > second
    for line in (first, second):
        assert line[len("0.123") :] in (EXAMPLES / "README.md").read_text("utf-8")


def test_rag_puts_the_answer_first_and_shortens_the_context(run):
    lines = output(run("rag.py"))
    before, after = stages(lines)["Without reranking"], stages(lines)["With reranking"]

    assert lines[0] == "How do I turn on the lights?"
    assert (before[0], after[0]) == (10, 3)
    assert before[1] > 2 * after[1] > 0
    assert not before[3][0].startswith("## Lights")
    assert after[3][0].startswith("## Lights")
    assert lines[-1].startswith("No answer: give a chat model, such as --model ")


def test_rag_reads_a_file_of_yours(run, tmp_path):
    file = tmp_path / "library.txt"
    rules = [
        "The library opens at nine and closes at six. On Saturdays it closes at one.",
        "Books may be kept for four weeks. You can renew them twice, unless somebody waits for them.",
        "A lost book costs what a new copy costs, and five euros for the work.",
        "The reading room has forty seats, and how long you keep one is up to you.",
    ]
    file.write_text("\n\n".join(rule + " Nothing else is said about it." * 9 for rule in rules), encoding="utf-8")

    lines = output(run("rag.py", "--file", file, "--question", "How long may I keep a book?"))

    assert stages(lines)["With reranking"][3][0].startswith("Books may be kept for four weeks")


def test_rag_answers_with_and_without_reranking(run, tmp_path):
    (tmp_path / "modules" / "langchain_perplexity.py").write_text(
        "from langchain_core.language_models import FakeListChatModel\n\n"
        "class ChatPerplexity(FakeListChatModel):\n"
        "    model: str\n"
        "    responses: list[str] = ['Give me less.', 'Press the upper button.']\n"
    )

    done = run("rag.py", "--model", "perplexity:sonar")

    assert done.returncode == 0
    assert re.findall("Answer: .*", done.stdout) == ["Answer: Give me less.", "Answer: Press the upper button."]
    assert "No answer" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "perplexity:sonar"], "pip install langchain-perplexity"),
        (["--embedding", "mistralai:mistral-embed"], "pip install langchain-mistralai"),
        (["--reranker", "embeded"], "Did you mean 'embedded'"),
        (["--file", "nothing.txt"], "No such file"),
    ],
)
def test_rag_says_in_a_line_what_is_missing(run, arguments, message):
    done = run("rag.py", *arguments)
    last = done.stderr.splitlines()[-1]

    assert done.returncode == 1
    assert last.startswith("rag.py: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_a_chain_of_yours_finds_the_answer_after_one_line(run):
    before, after = "\n".join(output(run("existing_chain.py"))).split("After:\n\n")

    assert before.startswith("Before:\n\n## ")
    assert "## Storing it over the winter" not in before
    assert after.startswith("## Storing it over the winter")


def test_swap_takes_the_embedded_model_by_default(run):
    title, first, *_ = output(run("swap.py"))

    assert title.startswith("embedded.yaml: embedded")
    assert first.endswith("Mars is called the red planet, because its dust is full of rust.")


def test_swap_takes_the_backend_of_a_file(run, tmp_path, tiny_bert):
    config = tmp_path / "other.yaml"
    config.write_text(f"backend: cross-encoder\nmodel: {tiny_bert}\ndevice: cpu\ntop_n: 2\n")

    done = run("swap.py", config)
    title, *ranked = done.stdout.splitlines()

    assert done.returncode == 0, done.stderr
    assert title == f"other.yaml: cross-encoder {tiny_bert}"
    assert len(ranked) == 2


def test_an_agents_tool_hands_over_text_and_documents(run):
    lines = output(run("agent_tool.py"))
    titles = [line[len("0.123  ") :] for line in lines[:2]]

    assert titles[0] == "Rain and washing"
    assert lines[0] > lines[1]
    assert [line for line in lines[lines.index("The model reads:") :] if line in titles] == titles
    assert "The agent answers" not in lines[-1]


def test_an_agent_searches_with_the_tool(run, tmp_path):
    (tmp_path / "modules" / "langchain_perplexity.py").write_text(SEARCHING_MODEL)

    answer = output(run("agent_tool.py", "perplexity:sonar"))[-1]

    assert answer == "The agent answers: search_handbook says: Rain and washing"


SEARCHING_MODEL = """
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult

class ChatPerplexity(BaseChatModel):
    model: str
    _llm_type = "scripted"

    def bind_tools(self, tools, **options):
        return self.bind(tool=tools[0].name)

    def _generate(self, messages, stop=None, run_manager=None, *, tool=None, **options):
        last = messages[-1]
        if isinstance(last, ToolMessage):
            message = AIMessage(f"{last.name} says: {last.content.splitlines()[0]}")
        else:
            message = AIMessage("", tool_calls=[{"id": "7", "name": tool, "args": {"query": last.text}}])
        return ChatResult(generations=[ChatGeneration(message=message)])
"""
"""A chat model that asks its first tool the user's question, and repeats the first line of what that says."""


def test_hybrid_finds_with_both_and_reranking_puts_the_answer_first(run):
    _, *blocks = "\n".join(output(run("hybrid.py"))).split("\n\n")
    found = {name: [line[len("  1. ") :] for line in lines] for name, *lines in map(str.splitlines, blocks)}

    assert found["Embedding"][0] != found["BM25"][0]
    assert set(found["Both, fused by rank"]) <= {*found["Embedding"], *found["BM25"]}
    assert all(re.search(r", (dense|sparse) \d+\.\d\d$", title) for title in found["Both, fused by score"])
    assert found["Both, fused by rank"][0] != "Rain and washing"
    assert found["Fused and reranked"][0] == "Rain and washing"


def test_a_cascade_keeps_what_both_stages_say(run):
    _, *lines = output(run("cascade.py"))
    shown = [re.fullmatch(r"recalled as number +(\d+), small (\S+), large (\S+): (.+)", line) for line in lines]
    first, second = ([float(match[group]) for match in shown] for group in (2, 3))

    assert shown[0][4] == "Range"
    assert int(shown[0][1]) > 1
    assert first[0] < max(first)
    assert second == sorted(second, reverse=True)
    assert len(shown) == 3


def test_a_cascade_ends_with_the_model_of_your_choice(run):
    assert "Unknown backend 'bgee'. Did you mean 'bge'?" in run("cascade.py", "bgee").stderr


def cached(lines):
    """What cache.py prints: name to (known, new)."""
    found = [re.fullmatch(r"(.+?) +(\d+) known, +(\d+) new, best: .+", line) for line in lines]
    return {match[1]: (int(match[2]), int(match[3])) for match in found}


def test_the_cache_scores_a_text_once(run):
    assert cached(output(run("cache.py"))) == {
        "first": (0, 20),
        "again": (20, 0),
        "more documents": (20, 6),
        "another question": (0, 26),
        "another max_length": (0, 26),
    }


def test_the_next_process_finds_the_scores_of_the_one_before(run):
    before, after = (cached(output(run("cache.py", "scores"))) for _ in range(2))

    assert before["first"] == (0, 20)
    assert {new for _, new in after.values()} == {0}


def test_the_web_page_answers_two_questions_at_once(run):
    lines = output(run("web.py"))

    assert lines[0::3] == ["How do I turn on the lights?", "I lost my key. What now?"]
    assert [line[len("0.123  ") :] for line in lines[1::3]] == ["Lights", "Lost keys"]


@pytest.fixture
def app():
    """What web.py serves, with a retriever of the test's own."""
    app = runpy.run_path(str(EXAMPLES / "web.py"))["app"]
    recall = create_qdrant_retriever(["Mars is called the red planet."])
    app.state.retriever = create_rerank_retriever(recall, LengthBackend())
    yield app
    recall.close()


async def get(app, **parameters):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        return await client.get("/search", params=parameters)


async def test_the_web_page_answers_in_json(app):
    answer = await get(app, q="the red planet")

    assert answer.status_code == 200
    assert answer.json() == [{"score": pytest.approx(30 / 31), "text": "Mars is called the red planet."}]


async def test_the_web_page_wants_a_question(app):
    assert (await get(app, q=" ")).status_code == 400


async def test_the_web_page_says_when_the_model_is_broken(app):
    app.state.retriever.base_compressor = Reranker(backend=BrokenBackend())

    answer = await get(app, q="the red planet")

    assert answer.status_code == 503
    assert answer.json() == {"error": "No answer at the moment (BackendError)"}


def test_the_chinese_quickstart_says_that_its_scores_are_a_toys(run):
    first, *lines = output(run("zh/quickstart.py"))
    recalled, ranked = (lines[lines.index(title) + 1 :][:5] for title in lines if title.endswith("："))

    assert first.startswith("用的是演示打分器")
    assert all("冬" in line or "电池" in line for line in recalled)
    assert ranked == sorted(ranked, key=lambda line: float(line.split()[0]), reverse=True)
    assert re.fullmatch(r"  0\.\d{3}   1  冬天不骑车的话，.*", ranked[0])


def test_the_chinese_quickstart_takes_bge_from_a_folder(run, tiny_xlmr):
    done = run("zh/quickstart.py", f"bge:{tiny_xlmr}")

    assert done.returncode == 0, done.stderr
    assert "演示打分器" not in done.stdout
    assert len(re.findall(r"^  0\.\d{3}  ", done.stdout, re.MULTILINE)) == 5


def test_the_pipeline_of_the_configurations_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with create_rerank_retriever(EXAMPLES / "config" / "pipeline.yaml") as retriever:
        retriever.base_retriever.add_documents(["Mars is called the red planet."])
        assert retriever.invoke("Which planet is red?")[0].metadata["relevance_score"] > 0

    assert (tmp_path / "qdrant").is_dir()


RERANKERS = sorted(set(EXAMPLES.glob("config/*.yaml")) - {EXAMPLES / "config" / "pipeline.yaml"})


@pytest.mark.parametrize("config", RERANKERS, ids=lambda path: path.name)
def test_each_configuration_builds(config, monkeypatch):
    monkeypatch.setenv("COHERE_API_KEY", "no-key")
    for name in re.findall(r"\$\{(\w+)\}", config.read_text("utf-8")):
        monkeypatch.setenv(name, "http://localhost:8000")

    assert isinstance(init_reranker(config), Reranker)
