# The runtime stage of jetson/Dockerfile: checks the base image, and adds what it lacks. Lines that begin with
# "remoe-edge: " are what `remoe-edge image build` shows as the reason.
set -eu

fail() {
    echo "remoe-edge: $1" >&2
    exit 1
}

[ "$(uname -m)" = aarch64 ] || fail "RUNTIME_IMAGE is for $(uname -m), but a Jetson is aarch64; name an arm64 image"

# Before anything is fetched for it.
if [ "$CUDA" = 1 ]; then
    major=${CUDA_VERSION_WANTED%%.*}
    found=$(find "${ROOT:-/}" -xdev -name "libcudart.so.$major*" -print -quit 2>/dev/null)
    [ -n "$found" ] || fail "RUNTIME_IMAGE has no CUDA $major (no libcudart.so.$major); name one with it, or build without: --no-cuda"
    found=$(find "${ROOT:-/}" -xdev -name "libcublas.so.$major*" -print -quit 2>/dev/null)
    [ -n "$found" ] || fail "RUNTIME_IMAGE has no cuBLAS $major; name a -runtime image of CUDA $CUDA_VERSION_WANTED"
fi

command -v apt-get >/dev/null || fail "RUNTIME_IMAGE has no apt-get; name one of Ubuntu or Debian"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends "python$PYTHON" python3 libstdc++6 libgomp1 ||
    fail "RUNTIME_IMAGE offers no Python $PYTHON; pass --python with the one it has"
rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log

# By number, for systems that check that an image's user is not root.
groupadd --system --gid 10001 remoe
useradd --system --uid 10001 --gid 10001 --home-dir /var/cache/remoe-edge --no-create-home --shell /usr/sbin/nologin remoe
mkdir -p /var/cache/remoe-edge /models
chown remoe:remoe /var/cache/remoe-edge
