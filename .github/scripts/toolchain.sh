#!/usr/bin/env bash
# The Rust toolchain with what `cargo xtask test` calls. $1: the channel, $2: further components.
set -euo pipefail

channel=${1:-stable}
rustup toolchain install "$channel" --profile minimal --component "rustfmt,clippy${2:+,$2}"
rustup default "$channel"
cargo --version
