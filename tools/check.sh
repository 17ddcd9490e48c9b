#!/usr/bin/env bash
# Everything a change must pass, as CI runs it: lint, format, types, tests. `tools/check.sh fast` leaves the tests out.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
pyright --pythonpath "$(command -v python)"
[ "${1:-}" = fast ] || pytest -q -n 2 --dist loadfile
