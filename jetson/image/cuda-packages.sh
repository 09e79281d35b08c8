# CUDA 12.6 for JetPack 6: PyPI has no nvcc of it, NVIDIA's package archive has, with libraries to link to for Tegra.
# Not tried: the archive could not be reached where this was written.
set -eu
archive=${CUDA_ARCHIVE:-https://developer.download.nvidia.com/compute/cuda/repos}
apt-get install -q -y --no-install-recommends ca-certificates curl
for repository in ubuntu2204/x86_64 ubuntu2204/cross-linux-aarch64; do
    curl -fsSLo /tmp/keyring.deb "$archive/$repository/cuda-keyring_1.1-1_all.deb"
    dpkg -i /tmp/keyring.deb
done
rm /tmp/keyring.deb
echo "deb [signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg] $archive/ubuntu2204/cross-linux-aarch64/ /" \
    >/etc/apt/sources.list.d/cuda-cross.list
echo "deb [signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg] $archive/ubuntu2204/x86_64/ /" \
    >/etc/apt/sources.list.d/cuda.list
rm -f /etc/apt/sources.list.d/cuda-ubuntu2204-*.list
apt-get update -q
apt-get install -q -y --no-install-recommends cuda-nvcc-12-6 cuda-cross-aarch64-12-6
