#!/usr/bin/env bash
# Debian packages that some rows of `npm run bench` and `npm run peers` compare with or call from; run as root.
set -euo pipefail
apt-get update -qq
apt-get install -y --no-install-recommends nginx-light nghttp2-client wrk curl chromium
