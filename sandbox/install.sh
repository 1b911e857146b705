#!/bin/bash
# Installs the missing packages for the demo, the tests and the benchmarks; if nothing is missing, takes well under a second.
#
# For Debian 12 or later on x86-64, as root or with sudo. On other systems it lists what to install by hand.
# `install.sh node` also installs what `make e2e` needs, `install.sh engines` what `make engines` needs.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    ca-certificates curl e2fsprogs jq openssl procps util-linux xfsprogs # small tools
    libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 qemu-utils
    etcd-server
    prometheus                                        # and promtool, for the alerts and the dashboard
    busybox-static cpio gcc libc6-dev                 # the test guest's initramfs
    python3 python3-dev python3-venv libvirt-dev pkg-config # libvirt-python has no wheels
    buildah debootstrap                               # the image
    systemd systemd-container                         # the unit of the agent, on a systemd of its own
)
if [[ ${1-} == node ]]; then
    packages+=(containernetworking-plugins iproute2)
    command -v containerd >/dev/null || packages+=(containerd) # Docker brings one of its own
    command -v runc >/dev/null || packages+=(runc)
fi

if [[ ${1-} == engines ]]; then
    packages+=(podman runc)
    command -v dockerd >/dev/null || packages+=(docker.io) # where systemd runs, Debian's package starts its service
fi

say() { printf '%s\n' "$*" >&2; }

missing_packages() {
    local installed
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null || true)
    for package in "${packages[@]}"; do
        grep -qx "installed $package" <<<"$installed" || printf '%s\n' "$package"
    done
}

install_packages() {
    if ! command -v apt-get >/dev/null; then
        for program in libvirtd virsh qemu-system-x86_64 qemu-img etcd promtool mkfs.ext4 mkfs.xfs busybox cpio gcc openssl pkg-config; do
            PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null && continue
            say "This is not Debian, and $program is missing. Install the equivalents of these Debian packages by hand:"
            say "  ${packages[*]}"
            exit 1
        done
        return
    fi
    mapfile -t missing < <(missing_packages)
    [[ ${#missing[@]} == 0 ]] && return
    local as_root=()
    if [[ $EUID != 0 ]]; then
        as_root=(sudo)
        if ! command -v sudo >/dev/null; then
            say "These Debian packages are missing, and only root can install them:"
            say "  apt-get install --no-install-recommends ${missing[*]}"
            exit 1
        fi
    fi
    say "Installing Debian packages: ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >&2
}

install_python_packages() {
    local wanted
    wanted=$(sha256sum requirements/{build,dev}.lock pyproject.toml)
    [[ -x .venv/bin/python && $(cat .venv/installed 2>/dev/null) == "$wanted" ]] && return
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        say "Python 3.11 or later is needed; python3 is $(python3 --version)."
        exit 1
    fi
    say "Installing the Python packages of requirements/dev.lock into .venv"
    [[ -x .venv/bin/pip ]] || python3 -m venv .venv
    # The locks are complete, so pip must resolve nothing: it would install the newest coverage for `coverage[toml]`.
    local pip=(.venv/bin/pip install --quiet --no-deps)
    "${pip[@]}" --require-hashes -r requirements/build.lock
    "${pip[@]}" --require-hashes --no-build-isolation -r requirements/dev.lock
    "${pip[@]}" --no-build-isolation -e .
    .venv/bin/pip check >&2
    printf '%s\n' "$wanted" >.venv/installed
}

install_packages
install_python_packages
.venv/bin/python -m sandbox.prepare "$@"
