#!/bin/sh
# Install Chromium for the tests of the report's page, if this is Debian and we are root. Without Chromium, these tests skip.
set -eu
if command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no Chromium, and not root on Debian: install chromium for the tests of the report's page"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
    echo "Chromium could not be installed: the tests of the report's page skip"
