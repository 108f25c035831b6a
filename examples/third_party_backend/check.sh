#!/usr/bin/env bash
# Installs this package beside langchain-rerank, as its user would, tests what is installed, and removes it.
# bash check.sh BIN: the bin folder of an environment with langchain-rerank, pytest and pytest-asyncio.
set -euo pipefail
bin=$(cd "${1:?give the bin folder of an environment, such as .venv-test/bin}" && pwd)

copy=$(mktemp -d)
trap '"$bin/python" -m pip uninstall --quiet --yes langchain-rerank-overlap; rm -rf "$copy"' EXIT
cp -R "$(dirname "${BASH_SOURCE[0]}")/." "$copy"
cd "$copy"

"$bin/python" -m pip install --quiet --no-deps "$copy"
"$bin/python" -m pytest "$copy"
"$bin/langchain-rerank" backends | grep overlap
printf '%s\n' 'Jupiter is large.' 'Mars is the red planet.' |
  "$bin/langchain-rerank" rank 'the red planet' --backend overlap --top-n 1 |
  grep 'Mars is the red planet.'
