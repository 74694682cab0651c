#!/usr/bin/env bash
# Gets prometheus and promtool for the tests that need them (tests/prometheus_tools.py finds them). Takes what is on PATH,
# else Debian's package, unpacked into the user's cache: no root needed. Ends with 1 where neither can be had; the tests
# then skip, and say so.
set -euo pipefail
cache="${KEEL_PROMETHEUS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/keel/prometheus}"

if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    echo "prometheus is on PATH: $(command -v prometheus)"
    exit 0
fi
if [ -x "$cache/usr/bin/prometheus" ] && [ -x "$cache/usr/bin/promtool" ]; then
    echo "prometheus is there: $cache/usr/bin/prometheus"
    exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "no prometheus on PATH and no apt-get to get it with: tests that need it will be skipped" >&2
    exit 1
fi
mkdir -p "$cache"
partial="$(mktemp -d "$cache/.partial.XXXXXX")"
trap 'rm -rf "$partial"' EXIT
if ! (cd "$partial" && apt-get download -q prometheus); then
    echo "apt-get cannot download prometheus (package lists missing? apt-get update): its tests will be skipped" >&2
    exit 1
fi
dpkg-deb -x "$partial"/prometheus_*.deb "$partial/root"
rm -rf "$cache/usr"
mv "$partial/root/usr" "$cache/usr"
"$cache/usr/bin/prometheus" --version 2>&1 | head -1
