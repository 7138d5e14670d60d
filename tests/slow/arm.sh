#!/bin/sh
# `make arm`: the kernels' tests on Arm, under emulation; further arguments go to pytest.
# A cross-compiled library, and Debian's Python for arm64 in a folder of its own; the system gets nothing of it.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
work=$root/build/arm
python=3.13 # Debian 13's
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake dpkg-deb; do
    command -v $tool >/dev/null || {
        echo "$tool is missing: apt install g++-aarch64-linux-gnu qemu-user cmake" >&2
        exit 2
    }
done

if [ ! -f "$work/.ready" ]; then
    echo "Fetching an arm64 Python ..."
    rm -rf "$work"
    mkdir -p "$work/apt/lists/partial" "$work/archives/partial" "$work/debs" "$work/site"
    : >"$work/status"
    cat >"$work/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State "$work/apt";
Dir::State::status "$work/status";
Dir::Cache "$work";
CONF
    export APT_CONFIG="$work/apt.conf"
    apt-get -qq update
    (cd "$work/debs" && apt-get -qq download python$python-minimal libpython$python-minimal \
        libpython$python-stdlib libc6 libexpat1 libffi8 libgcc-s1 libstdc++6 zlib1g)
    unset APT_CONFIG
    for package in "$work"/debs/*.deb; do dpkg-deb -x "$package" "$work/system"; done
    ln -s usr/lib "$work/system/lib"
    grep -E '^(numpy|pytest|pytest-timeout|hypothesis)==' "$root/requirements/dev.lock" >"$work/packages"
    "$root/.venv/bin/python" -m pip install -q --target "$work/site" --only-binary :all: \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
        --platform manylinux2014_aarch64 --python-version $python -r "$work/packages"
    cp -r "$root"/.venv/lib/python3*/site-packages/owl_deploy-*.dist-info "$work/site" # for its version
    touch "$work/.ready"
fi

echo "Building the library for arm64 ..."
cmake -S "$root" -B "$work/library" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DOWL_ORT_INCLUDE=/usr/include -DOWL_WERROR=ON >/dev/null
cmake --build "$work/library" --parallel >/dev/null

# Only this folder's conftest.py: the others want torch. Only kernels: the operators want onnxruntime.
cd "$root"
OWL_RUNTIME_LIBRARY=$work/library/libowl_runtime.so PYTHONPATH=$root:$work/site PYTHONDONTWRITEBYTECODE=1 \
    qemu-aarch64 -L "$work/system" "$work/system/usr/bin/python$python" -m pytest -p no:cacheprovider \
    --confcutdir tests/unit/runtime \
    tests/unit/runtime/test_kernels.py tests/unit/runtime/test_attention.py tests/unit/runtime/test_pack.py "$@"
