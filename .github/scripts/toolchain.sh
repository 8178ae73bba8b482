#!/usr/bin/env bash
# The Rust toolchain with what `cargo xtask test` calls. $1: the channel, which RUSTUP_TOOLCHAIN names in the
# steps that use it; $2: further components. Updates the channel that is installed, so it is for throw-away
# runners and refuses elsewhere.
set -euo pipefail

: "${GITHUB_ACTIONS:?only on a CI runner: it updates the Rust toolchain}"
channel=${1:-stable}
rustup toolchain install "$channel" --no-self-update --profile minimal \
    --component "rustfmt,clippy${2:+,$2}"
