#!/bin/sh
# 64 users of one engine for ten minutes (or as many seconds as are given): random requests with different adapters, cancelled, preempted, helped by what others
# left. Every answer is compared with what it would be alone, and memory must not grow after the first third.
#
#     scripts/soak.sh [SECONDS]
set -eu
cd "$(dirname "$0")/.."
GGRAFT_SOAK_SECONDS="${1:-600}" cargo test --release --test engine many_users_for_a_while -- --nocapture
