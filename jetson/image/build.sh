# The build stage of jetson/Dockerfile: leaves the bundle, unpacked, in the folder $1. Its working folder /context holds
# wheels, the pinned source and the hashes of both; from the network come only the distribution's compilers, and for
# JetPack 6 NVIDIA's cross packages.
set -eu
context=/context
target=$1

if [ -e "$context/bundle.tar.gz" ]; then
    tar -xzf "$context/bundle.tar.gz" -C "$target"
    exit
fi

export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends g++-aarch64-linux-gnu cmake ninja-build ccache python3 python3-pip
if [ "$CUDA" = 1 ] && [ -e "$context/cuda-packages.sh" ]; then
    sh "$context/cuda-packages.sh"
    toolkit=/usr/local/cuda
fi

# Compiling needs no more of remoe-edge's packages than these, and they are the same for every machine.
export REMOE_EDGE_CACHE=$context/cache PYTHONPATH=/build/site
python3 -m pip install -q --no-index --no-deps --target /build/site $(cat "$context/build-wheels.txt")
cd /build
python3 -m remoe_edge build --target jetson --jetpack "$JETPACK" --python "$(cat "$context/python.txt")" \
    $([ "$CUDA" = 1 ] || echo --no-cuda) ${JOBS:+--jobs "$JOBS"} ${toolkit:+--cuda-toolkit "$toolkit"} -o /build/bundle.tar.gz
tar -xzf /build/bundle.tar.gz -C "$target"
