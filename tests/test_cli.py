"""The command line as people use it: in a terminal, in a pipe, with mistakes."""

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from langchain_rerank import RerankError, __version__
from langchain_rerank.cli import app

MARS, JUPITER = "Mars is called the red planet.", "Jupiter is the largest planet."
QUERY = "Which one is called the red planet?"

START = "import sys; sys.modules['torch'] = None; from langchain_rerank.cli import main; main()"
PROGRAM = [sys.executable, "-c", START]  # as if torch were not installed: nothing here has to wait for its import

PLUGIN = """
from langchain_rerank import Backend

class Longest(Backend):
    def _score(self, query, texts):
        return [len(text) / 1000 for text in texts]

class Crashing(Backend):
    def _score(self, query, texts):
        return [1 / 0 for text in texts]

class Lacking(Backend):
    requires = ("no_such_library",)
    extra = "unknown"

    def _score(self, query, texts):
        return [0.5 for text in texts]
"""

ENTRY_POINTS = """
[langchain_rerank.backends]
longest = plugin_of_a_stranger:Longest
crashing = plugin_of_a_stranger:Crashing
lacking = plugin_of_a_stranger:Lacking
broken = no_such_module:Backend
"""


def cli(*arguments, stdin=None):
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def environment(**variables):
    """That of a process which writes UTF-8, 80 columns wide."""
    # Unbuffered, Python itself takes no notice of a pipe that closes during a long write.
    return {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "", **variables}


def program(*arguments, variables=None, **streams):
    """Run a command in a process of its own, in a pipe unless `streams` says otherwise."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables or {}), text=True, timeout=120, check=False, **streams)


@pytest.fixture
def stranger(tmp_path):
    """The environment of a process in which somebody else's backends are installed."""
    about = tmp_path / "strangers_rerankers-2.5.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers-rerankers\nVersion: 2.5\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "plugin_of_a_stranger.py").write_text(PLUGIN)
    return {"PYTHONPATH": str(tmp_path)}


# rank ---------------------------------------------------------------------------------------------------------------


def test_rank_puts_the_answer_first():
    result = cli("rank", QUERY, stdin=f"{JUPITER}\n\n{MARS}\n")

    ranked = [line.split("\t") for line in result.stdout.splitlines()]
    assert [(place, text) for place, _, text in ranked] == [("1", MARS), ("2", JUPITER)]
    assert 1 >= float(ranked[0][1]) > float(ranked[1][1]) >= 0
    assert (result.exit_code, result.stderr) == (0, "")


def test_rank_reads_a_file_of_lines(tmp_path):
    (tmp_path / "facts.txt").write_text(f"\ufeff{JUPITER}\r\n{MARS}\r\n", encoding="utf-8")

    assert [line.split("\t")[2] for line in cli("rank", QUERY, tmp_path / "facts.txt").stdout.splitlines()] == [
        MARS,
        JUPITER,
    ]


def test_rank_keeps_what_json_lines_say_of_a_text():
    lines = [
        {"page_content": JUPITER, "id": 5, "metadata": {"source": {"page": 3}}},
        {"text": MARS, "id": "mars"},
        {"text": "火星は赤い惑星です。"},
    ]

    result = cli("rank", QUERY, "--jsonl", stdin="\n".join(map(json.dumps, lines)))

    ranked = {record["index"]: record for record in map(json.loads, result.stdout.splitlines())}
    assert {index: record["id"] for index, record in ranked.items()} == {0: "5", 1: "mars", 2: None}
    assert ranked[0]["text"] == JUPITER
    assert ranked[0]["metadata"]["source"] == {"page": 3}
    assert ranked[0]["metadata"]["relevance_score"] == ranked[0]["score"]
    assert "火星は赤い惑星です。" in result.stdout
    assert ranked[1]["rank"] == 1


def test_rank_prints_one_array_with_json():
    records = json.loads(cli("rank", QUERY, "-", "--json", stdin=f"{JUPITER}\n{MARS}").stdout)

    assert [(record["rank"], record["index"], record["text"]) for record in records] == [(1, 1, MARS), (2, 0, JUPITER)]


def test_rank_can_read_what_rank_has_written():
    once = cli("rank", QUERY, "--jsonl", stdin=f"{JUPITER}\n{MARS}").stdout

    [best] = map(json.loads, cli("rank", QUERY, "--jsonl", "--top-n", "1", stdin=once).stdout.splitlines())

    assert best["text"] == MARS
    assert len(best["metadata"]["stage_scores"]) == 2


def test_rank_keeps_the_best_n_and_good_scores():
    lines = f"{JUPITER}\n{MARS}\nBread is baked from flour.\n"

    assert len(cli("rank", QUERY, "--top-n", "2", stdin=lines).stdout.splitlines()) == 2
    assert cli("rank", QUERY, "--top-n", "0", stdin=lines).stdout == ""
    assert [line.split("\t")[2] for line in cli("rank", QUERY, "-t", "0.5", stdin=lines).stdout.splitlines()] == [MARS]


@pytest.mark.parametrize(("format_", "nothing"), [("--jsonl", ""), ("--json", "[]\n")])
def test_rank_of_nothing_is_nothing(format_, nothing):
    result = cli("rank", QUERY, format_, stdin="\n \n")

    assert (result.stdout, result.stderr, result.exit_code) == (nothing, "", 0)


def test_rank_takes_the_reranker_from_a_config_file(tmp_path):
    (tmp_path / "rerank.yaml").write_text("backend: embedded\ntop_n: 1\n")

    result = cli("rank", QUERY, "--config", tmp_path / "rerank.yaml", stdin=f"{JUPITER}\n{MARS}")

    assert [line.split("\t")[2] for line in result.stdout.splitlines()] == [MARS]


def test_options_reach_the_backend_and_the_reranker():
    options = ["-o", "return_logits=true", "--option", "batch_size=1", "-o", "top_n=1", "-o", "batch_tokens=null"]
    lines = '{"text": "Mars is called the red planet.", "metadata": {"title": "Mars"}}'

    [record] = json.loads(
        cli("rank", QUERY, "--json", *options, "-o", "metadata_fields=[title]", stdin=f"{lines}\n{lines}").stdout
    )

    assert record["metadata"]["relevance_logit"] > 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--backend", "embeded"], "Unknown backend 'embeded'. Did you mean 'embedded'?"),
        (["--option", "no_such_option=1"], "Unknown option 'no_such_option' for backend 'embedded'."),
        (["--option", "batch_size=0"], "backend 'embedded': batch_size"),
        (["--config", "no_such.yaml"], "Cannot read no_such.yaml: No such file"),
        (["no_such_file.txt"], "Cannot read no_such_file.txt: No such file"),
        (["."], "Cannot read .: Is a directory"),
    ],
)
def test_our_errors_are_one_line_and_status_1(arguments, what):
    result = cli("rank", QUERY, *arguments, stdin=MARS)

    assert what.removeprefix("backend 'embedded': ") in result.stderr
    assert result.stderr.startswith("langchain-rerank: ")
    assert len(result.stderr.splitlines()) == 1
    assert (result.exit_code, result.stdout) == (1, "")


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ('{"text": "a"}\n\n{"text": \n', "standard input, line 3 is not JSON"),
        ('{"text": "a"}\n{"title": "a"}', 'standard input, line 2 must be an object like {"text": "..."'),
        ('{"text": "a"}\n[1]', "standard input, line 2 must be an object"),
        ('{"text": 1}', "standard input, line 1 must be an object"),
        ('{"text": "a", "metadata": "b"}', "standard input, line 1 must be an object"),
        (b"caf\xe9", "standard input is not UTF-8 text"),
    ],
)
def test_lines_that_cannot_be_read_are_named(lines, what):
    result = cli("rank", QUERY, stdin=lines)

    assert what in result.stderr
    assert (result.exit_code, result.stdout) == (1, "")


def test_lines_that_only_look_like_json_are_text():
    result = cli("rank", QUERY, stdin='{"title": "red planet"}\n[1, 2]\n{not json\n')

    assert {line.split("\t")[2] for line in result.stdout.splitlines()} == {
        '{"title": "red planet"}',
        "[1, 2]",
        "{not json",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["rank"],
        ["rank", QUERY, "--json", "--jsonl"],
        ["rank", QUERY, "--backend", "embedded", "--config", "rerank.yaml"],
        ["rank", QUERY, "--option", "batch_size"],
        ["rank", QUERY, "--option", "=1"],
        ["rank", QUERY, "--option", "metadata_fields=[title"],
        ["rank", QUERY, "--top-n", "-1"],
        ["rank", QUERY, "--threshold", "1.5"],
        ["rank", QUERY, "--no-such-option"],
        ["eval"],
        ["demo", "--question", "0"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_status_2(arguments):
    result = cli(*arguments, stdin=MARS)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert "Error" in result.stderr


def test_debug_raises_the_error_itself():
    result = cli("rank", QUERY, "--debug", "--backend", "embeded", stdin=MARS)

    assert isinstance(result.exception, RerankError)


# Streams ------------------------------------------------------------------------------------------------------------


def in_a_terminal(*arguments, columns=80):
    """What a command shows on a terminal, with its escape sequences."""
    ours, theirs = pty.openpty()
    env = environment(COLUMNS=str(columns), TERM="xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        env.pop(name, None)
    with subprocess.Popen(
        [*PROGRAM, *arguments], stdout=theirs, stdin=theirs, stderr=subprocess.DEVNULL, env=env
    ) as it:
        os.close(theirs)
        shown = b"".join(iter(lambda: read(ours), b""))
    os.close(ours)
    assert it.returncode == 0
    return shown.decode().replace("\r\n", "\n")


def read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError as error:  # on Linux the end of a terminal is an error
        if error.errno != errno.EIO:
            raise
        return b""


def plain(shown):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_rank_shows_a_table_in_a_terminal(tmp_path):
    long = "The red planet " + "is a long way from here " * 10
    (tmp_path / "facts.txt").write_text(f"{MARS}\n{long}\n[red]{JUPITER}[/red]\n\x1b[2Jclears the screen\n")

    shown = plain(in_a_terminal("rank", QUERY, str(tmp_path / "facts.txt"), columns=60))

    assert "\t" not in shown
    assert re.search(rf"1 +0\.\d{{4}} +{MARS}", shown)
    assert f"[red]{JUPITER}[/red]" in shown
    assert "\ufffd[2Jclears the screen" in shown
    assert max(map(len, shown.splitlines())) <= 60


def test_there_are_colours_in_a_terminal_and_none_in_a_pipe():
    assert "\x1b[32m" in in_a_terminal("backends")
    assert "\x1b" not in program("backends").stdout


def test_text_that_the_outputs_encoding_lacks_is_escaped(tmp_path):
    (tmp_path / "facts.txt").write_text("火星 🪐 is the red planet", encoding="utf-8")

    lines = program("rank", QUERY, tmp_path / "facts.txt", variables={"PYTHONIOENCODING": "latin-1"})
    records = program("rank", QUERY, tmp_path / "facts.txt", "--json", variables={"PYTHONIOENCODING": "latin-1"})

    assert lines.stdout.endswith("\\u706b\\u661f \\U0001fa90 is the red planet\n")
    assert json.loads(records.stdout)[0]["text"] == "火星 🪐 is the red planet"
    assert lines.returncode == records.returncode == 0


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    (tmp_path / "many.txt").write_text(f"{MARS}\n" * 3000)  # scored once; more than a pipe holds
    for format_ in ([], ["--json"]):  # many short writes, and one long one
        command = [*PROGRAM, "rank", QUERY, str(tmp_path / "many.txt"), *format_]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as writer:
            writer.stdout.readline()
            writer.stdout.close()
            complaint = writer.stderr.read()

        assert (writer.returncode, complaint) == (141, "")


def test_a_table_that_nobody_reads_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = program("backends", stdout=write_end)
    os.close(write_end)

    assert (result.returncode, result.stderr) == (141, "")


def test_ctrl_c_ends_quietly_with_status_130(tmp_path):
    os.mkfifo(tmp_path / "never.txt")
    # A shell that starts the tests in the background has its children ignore SIGINT; this child must not.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", heard, *PROGRAM, "rank", QUERY, str(tmp_path / "never.txt")]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader,
        (tmp_path / "never.txt").open("w"),  # opens once the program reads
    ):
        reader.send_signal(signal.SIGINT)
        said = reader.communicate(timeout=60)

    assert (reader.returncode, *said) == (130, "", "")


def test_an_error_in_a_process_is_one_line_and_debug_shows_where():
    quiet = program("rank", QUERY, "--backend", "embeded", stdin=subprocess.DEVNULL)
    loud = program("rank", QUERY, "--backend", "embeded", "--debug", stdin=subprocess.DEVNULL)

    assert (quiet.returncode, loud.returncode) == (1, 1)
    assert quiet.stderr.startswith("langchain-rerank: Unknown backend 'embeded'.")
    assert len(quiet.stderr.splitlines()) == 1
    assert "Traceback" in loud.stderr


def test_an_unexpected_error_is_one_line_too(stranger):
    result = program("rank", QUERY, "--backend", "crashing", input=MARS, variables=stranger)

    assert result.stderr == (
        "langchain-rerank: ZeroDivisionError: division by zero (unexpected; --debug shows where)\n"
    )
    assert (result.returncode, result.stdout) == (1, "")


# backends and help --------------------------------------------------------------------------------------------------


def test_backends_lists_ours_and_where_they_run():
    listed = {state["name"]: state for state in json.loads(cli("backends", "--json").stdout)}

    assert [name for name, state in listed.items() if state["kind"] == "backend"] == [
        "bge",
        "cohere",
        "cross-encoder",
        "embedded",
        "monot5",
        "remote",
    ]
    assert listed["embedded"] | {"status": "ready", "runs_on": "cpu, float32, onnxruntime"} == listed["embedded"]
    assert re.fullmatch(r"(cpu|cuda|mps), (float32|bfloat16)", listed["monot5"]["runs_on"])
    assert re.fullmatch(r"(cpu, \w+, openvino|(cuda|mps), \w+, torch)", listed["cross-encoder"]["runs_on"])
    assert "OpenVINO is installed" in listed["cross-encoder"]["why"] or "cpu" not in listed["cross-encoder"]["runs_on"]
    assert listed["cohere"] | {"status": "ready", "runs_on": ""} == listed["cohere"]
    assert [name for name, state in listed.items() if state["kind"] == "extra"] == [
        "qdrant",
        "eval",
        "train",
        "openvino",
        "plot",
    ]


def test_backends_says_what_to_type_for_what_is_missing_and_loads_nothing():
    code = """
import sys
for name in ("torch", "transformers", "cohere", "httpx", "Stemmer", "ir_measures"):
    sys.modules[name] = None
from langchain_rerank.cli import main
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code, "backends"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    listed = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()}
    for name in ("bge", "cohere", "cross-encoder", "monot5", "remote"):
        assert listed[name] == f"missing pip install 'langchain-rerank[{name}]'"
    for name in ("qdrant", "eval"):
        assert listed[name] == f"(extra) missing pip install 'langchain-rerank[{name}]'"
    assert listed["embedded"] == "ready cpu, float32, onnxruntime"
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_backends_of_strangers_are_listed_with_where_they_come_from(stranger):
    result = program("backends", "--json", variables=stranger)
    listed = {state["name"]: (state["status"], state["note"]) for state in json.loads(result.stdout)}

    assert listed["longest"] == ("ready", "from strangers-rerankers 2.5")
    assert listed["lacking"] == ("missing", "needs no_such_library; from strangers-rerankers 2.5")
    assert listed["broken"] == (
        "broken",
        "ModuleNotFoundError: No module named 'no_such_module' (from strangers-rerankers 2.5)",
    )
    assert listed["embedded"] == ("ready", "")


def test_a_strangers_backend_ranks(stranger):
    result = program("rank", QUERY, "--backend", "longest", input=f"{MARS}\n{MARS} And more.\n", variables=stranger)

    assert [line.split("\t")[1] for line in result.stdout.splitlines()] == ["0.0400", "0.0300"]


def test_the_version_is_that_of_the_package():
    assert cli("--version").stdout == f"langchain-rerank {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["demo", "-h"], ["eval", "--help"], ["rank", "-h"], ["backends", "-h"]]
)
def test_help_is_light_and_fits_80_columns(arguments):
    code = "import sys, langchain_rerank.cli as cli\ntry: cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    heavy = {"torch", "onnxruntime", "qdrant_client", "langchain_core", "langchain_classic", "ir_measures", "numpy"}
    assert not heavy & set(result.stderr.split())
    assert result.stdout.startswith("Usage: langchain-rerank")
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_no_arguments_show_the_help():
    assert "demo" in cli().output
    assert "demo" in cli("--help").stdout
