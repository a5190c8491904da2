#!/usr/bin/env bash
# An arm64 Debian under qemu-user with an sshd on the loopback: the device emulated-arm64.
# Exit code 77: it cannot be had here. Everything it makes is in ~/.cache/edgeft/arm64, and what was
# made is not made again; the sshd and the mounts are gone after a reboot, so call it again then.
set -euo pipefail
cd "$(dirname "$0")/.."

PLACE=$HOME/.cache/edgeft/arm64
ROOT=$PLACE/root
WHEELS=$PLACE/wheels
PORT=2264
PYTHON=${PYTHON:-.venv/bin/python}
PACKAGES="debootstrap qemu-user-static binfmt-support g++-aarch64-linux-gnu openssh-client openssh-server"
BINFMT=/proc/sys/fs/binfmt_misc

cannot() { echo "emulated-arm64 cannot be had here: $1" >&2; exit 77; }
pinned() { sed -n "s/^$1==//p" constraints.txt; }

[ "$(uname -sm)" = "Linux x86_64" ] || cannot "it takes Linux on x86-64"
[ "$(id -u)" = 0 ] || cannot "debootstrap and binfmt_misc take root"

if ! dpkg -s $PACKAGES >/dev/null 2>&1; then
	command -v apt-get >/dev/null || cannot "it takes Debian's $PACKAGES"
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $PACKAGES >/dev/null
fi

mountpoint -q $BINFMT || mount -t binfmt_misc binfmt_misc $BINFMT || cannot "no binfmt_misc in this kernel"
[ -e $BINFMT/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64
grep -q '^flags:.*F' $BINFMT/qemu-aarch64 || cannot "qemu-aarch64 is registered without the flag F"

mkdir -p "$WHEELS"
if [ ! -d "$ROOT" ]; then
	rm -rf "$ROOT.partial"
	debootstrap --arch=arm64 --variant=minbase \
		--include=python3-minimal,python3-venv,ca-certificates,libgomp1,libstdc++6 \
		bookworm "$ROOT.partial" >"$PLACE/debootstrap.log" || { tail -5 "$PLACE/debootstrap.log"; exit 1; }
	mv "$ROOT.partial" "$ROOT"
fi
mountpoint -q "$ROOT/proc" || mount -t proc proc "$ROOT/proc"

# llama.cpp for the Raspberry Pi 5's CPU. LLAVA: images, which nothing here reads.
LLAMA=$(pinned llama_cpp_python)
if ! ls "$WHEELS/llama_cpp_python-$LLAMA-"*aarch64.whl >/dev/null 2>&1; then
	MADE=$(mktemp -d)
	CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
		-DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+fp16+dotprod -DLLAVA_BUILD=OFF" \
		$PYTHON -m pip wheel --quiet --no-deps --no-cache-dir --no-binary llama-cpp-python \
		--wheel-dir "$MADE" "llama-cpp-python==$LLAMA"
	$PYTHON -m pip install --quiet wheel
	$PYTHON -m wheel tags --remove --platform-tag linux_aarch64 "$MADE"/*.whl >/dev/null
	mv "$MADE"/*.whl "$WHEELS" && rmdir "$MADE"
fi

# Everything else has aarch64 wheels.
MARK=$WHEELS/$(sha256sum constraints.txt | cut -c1-16).complete
[ -f "$MARK" ] || $PYTHON -m pip download --quiet --dest "$WHEELS" --constraint constraints.txt --find-links "$WHEELS" \
	--only-binary :all: --python-version 3.11 --platform linux_aarch64 \
	--platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 \
	--platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 \
	numpy psutil pydantic pyyaml rich tokenizers typer llama-cpp-python onnxruntime-genai
touch "$MARK"

for key in key host_key; do
	[ -f "$PLACE/$key" ] || ssh-keygen -q -t ed25519 -N '' -C edgeft -f "$PLACE/$key"
done
echo "[127.0.0.1]:$PORT $(cat "$PLACE/host_key.pub")" >"$PLACE/known_hosts"
cat >"$PLACE/sshd_config" <<-END
	ListenAddress 127.0.0.1
	Port $PORT
	HostKey $PLACE/host_key
	PidFile $PLACE/sshd.pid
	AuthorizedKeysFile $PLACE/key.pub
	PermitRootLogin prohibit-password
	PasswordAuthentication no
	StrictModes no
	UsePAM no
	ChrootDirectory $ROOT
	SetEnv QEMU_CPU=cortex-a76
END
mkdir -p /run/sshd
(exec 3<>/dev/tcp/127.0.0.1/$PORT) 2>/dev/null || /usr/sbin/sshd -f "$PLACE/sshd_config"

$PYTHON -m edgeft devices setup emulated-arm64 --wheelhouse "$WHEELS" --no-index
