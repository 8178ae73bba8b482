#!/usr/bin/env bash
# What action.yml runs: one scenario, its page and reports in a directory, the summary for the job.
#
# SCENARIO      a preset, or a TOML file of the workspace
# FAIL_IF       gates, one a line
# BASELINE      an earlier result (JSON), with TOLERANCE (10%)
# OPTIONS       more options for `cargo xtask demo`, split at spaces and lines
# OUT           the directory for the reports, and for logs if something went wrong
set -euo pipefail

workspace=${GITHUB_WORKSPACE:-$PWD}
out=$(realpath -m "${OUT:-stall-report}")
mkdir -p "$out"

arguments=(--html "$out/stall.html" --json "$out/stall.json" --markdown "$out/stall.md"
  --junit "$out/stall.xml" --hlog "$out/stall.hlog")
scenario=${SCENARIO:-quick}
if [[ -f $workspace/$scenario ]]; then
  scenario=$workspace/$scenario
fi
arguments+=(--scenario "$scenario")
while IFS= read -r gate; do
  if [[ -n ${gate//[[:space:]]/} ]]; then
    arguments+=(--fail-if "$gate")
  fi
done <<<"${FAIL_IF:-}"
if [[ -n ${BASELINE:-} ]]; then
  baseline=$BASELINE
  [[ -f $workspace/$baseline ]] && baseline=$workspace/$baseline
  arguments+=(--baseline "$baseline" --tolerance "${TOLERANCE:-10%}")
fi
# Lines are as good as spaces; `read` ends with 1 at the end of its input.
read -r -d '' -a more <<<"${OPTIONS:-}" || true

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
code=0
cargo xtask demo "${arguments[@]}" "${more[@]}" || code=$?
if [[ -f $out/stall.md ]]; then
  cat "$out/stall.md" >>"${GITHUB_STEP_SUMMARY:-/dev/stdout}"
fi
if ((code != 0 && code != 3)); then
  # What went wrong is in the logs of the set-up and of the emulated machine.
  mkdir -p "$out/logs"
  cp "${XDG_CACHE_HOME:-$HOME/.cache}"/nowait/*.log "${CARGO_TARGET_DIR:-target}"/demo/*.log "$out/logs/" \
    2>/dev/null || true
fi
exit "$code"
