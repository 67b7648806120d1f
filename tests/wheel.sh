#!/usr/bin/env bash
# Builds a wheel, installs it into a fresh environment and runs the demo with it, away from the checkout.
# The environment borrows the libraries (not the project) of the one that `make` made, so that nothing is downloaded twice.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

.venv/bin/python -m build --wheel --outdir "$place/dist" . >"$place/build.log" 2>&1 || { cat "$place/build.log"; exit 1; }
.venv/bin/python -m venv "$place/env"
.venv/bin/pip --python "$place/env/bin/python" install --quiet --no-deps "$place"/dist/*.whl
libraries=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$place/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# A path line in a .pth file adds a folder but does not run the .pth files in it: the editable install stays out.
echo "$libraries" >"$own/libraries.pth"

mkdir "$place/away" && cd "$place/away"
found=$("$place/env/bin/python" -c 'import rlhf; print(rlhf.__file__)')
case "$found" in "$own"/*) ;; *) echo "the checkout was imported, not the wheel: $found"; exit 1 ;; esac
"$place/env/bin/rlhf" presets | grep -q demo
"$place/env/bin/rlhf" run demo --size smoke
"$place/env/bin/rlhf" run demo --size smoke | grep 'up to date'
[ -d .rlhf/store ] && [ ! -e "$root/away" ]
echo "the wheel works outside the checkout"
