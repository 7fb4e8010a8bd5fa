#!/usr/bin/env bash
# Fetches Debian's Prometheus for the tests of docker/monitoring: the plain programs, no service.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v prometheus >/dev/null && command -v promtool >/dev/null && exit 0
[ -x .unirl/prometheus/usr/bin/prometheus ] && exit 0
command -v apt-get >/dev/null || { echo "launch/prometheus.sh: expected apt-get; got none; put prometheus and promtool on PATH" >&2; exit 1; }
scratch=$(mktemp -d .unirl-prometheus.XXXX); trap 'rm -rf "$scratch"' EXIT
(cd "$scratch" && { apt-get -q download prometheus || { apt-get -q update && apt-get -q download prometheus; }; } >&2)
dpkg -x "$scratch"/prometheus_*.deb "$scratch/root"
mkdir -p .unirl && mv "$scratch/root" .unirl/prometheus
