#!/usr/bin/env bash
# Puts the C++ headers of ONNX Runtime 1.21, which Ubuntu lacks and Debian 13 has, where the build of
# the operators looks for them. They are enough: the library that is built asks for the API of that
# version, and runs in every later one.
set -euo pipefail
commit=e0b66cad282043d4377cea5269083f17771b6dfc # v1.21.0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet --depth 1 --branch v1.21.0 --filter=blob:none --sparse \
  https://github.com/microsoft/onnxruntime "$folder"
found=$(git -C "$folder" rev-parse HEAD)
if [ "$found" != "$commit" ]; then
  echo "ONNX Runtime's tag v1.21.0 is commit $found, where $commit was expected." >&2
  exit 1
fi
git -C "$folder" sparse-checkout set include/onnxruntime/core/session
sudo mkdir -p /usr/include/onnxruntime
sudo cp "$folder"/include/onnxruntime/core/session/*.h /usr/include/onnxruntime/
