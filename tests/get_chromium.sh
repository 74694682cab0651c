#!/usr/bin/env bash
# Gets chromium for the tests that need a browser (tests/browser.py finds it). Takes what is on PATH, else Debian's
# package with the libraries that this machine lacks, unpacked into the user's cache: no root needed. Ends with 1 where
# it cannot be had; the tests then skip, and say so.
set -euo pipefail
cache="${KEEL_CHROMIUM_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/keel/chromium}"

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then
        echo "chromium is on PATH: $(command -v "$name")"
        exit 0
    fi
done
if [ -x "$cache/chromium" ]; then
    echo "chromium is there: $cache/chromium"
    exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "no chromium on PATH and no apt-get to get it with: tests that need it will be skipped" >&2
    exit 1
fi
# What apt would install, without installing it; fonts are for reading, and tests do not read.
if ! wanted="$(apt-get install --simulate --no-install-recommends chromium 2>/dev/null | awk '$1 == "Inst" {print $2}')" \
    || [ -z "$wanted" ]; then
    echo "apt-get knows no chromium (package lists missing? apt-get update): its tests will be skipped" >&2
    exit 1
fi
mkdir -p "$cache"
partial="$(mktemp -d "$cache/.partial.XXXXXX")"
trap 'rm -rf "$partial"' EXIT
# shellcheck disable=SC2086
if ! (cd "$partial" && apt-get download -q $wanted); then
    echo "apt-get cannot download chromium: its tests will be skipped" >&2
    exit 1
fi
for package in "$partial"/*.deb; do
    dpkg-deb -x "$package" "$partial/root"
done
rm -rf "$cache/root"
mv "$partial/root" "$cache/root"
libraries="$cache/root/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -dumpmachine 2>/dev/null || echo "$(uname -m)-linux-gnu")"
printf '#!/bin/sh\nLD_LIBRARY_PATH="%s:%s/root/lib:$LD_LIBRARY_PATH" exec "%s/root/usr/lib/chromium/chromium" "$@"\n' \
    "$libraries" "$cache" "$cache" > "$cache/chromium"
chmod +x "$cache/chromium"
"$cache/chromium" --version
