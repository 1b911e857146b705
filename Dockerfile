# The image of the agent: `docker build -t vmbackup .`, or the same with podman or buildah.
#
# Debian's Python and libvirt client, our locked Python packages, and qemu-img. It takes plain Dockerfile syntax only.
# A site with mirrors of its own gives a base image that knows its Debian mirror (--build-arg BASE=…), and what apt and
# pip are to know as build arguments (--build-arg PIP_INDEX_URL, …; without a value, that of the environment is taken).
# They count while it is built; nothing of them stays in the image.
ARG BASE=debian:13-slim

FROM ${BASE} AS build
ARG APT_CONFIG
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        gcc libc6-dev libvirt-dev pkg-config python3-dev python3-pip python3-venv
WORKDIR /build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ARG PIP_CACHE_DIR
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Whatever is downloaded has a hash in a lock, also what builds: libvirt-python alone is compiled, all else are wheels.
COPY requirements/build.lock requirements/run.lock requirements/
RUN python3 -m venv tools \
 && tools/bin/pip install --quiet --require-hashes --no-deps --only-binary :all: -r requirements/build.lock \
 && tools/bin/pip wheel --quiet --require-hashes --no-deps --no-build-isolation \
        --only-binary :all: --no-binary libvirt-python --wheel-dir wheels -r requirements/run.lock
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
RUN tools/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels . \
 && python3 -m venv --without-pip /opt/vmbackup \
 && tools/bin/pip --python /opt/vmbackup/bin/python install --quiet --no-index --no-deps --no-compile wheels/*.whl \
 && rm /opt/vmbackup/bin/[Aa]ctivate*
# The label below and the package must agree.
ARG VERSION=0.1.0
RUN says=$(PYTHONDONTWRITEBYTECODE=1 /opt/vmbackup/bin/vmbackup --version) \
 && { [ "$says" = "vmbackup $VERSION" ] || { echo "the package is $says, VERSION is $VERSION" >&2; exit 1; }; }

FROM ${BASE}
ARG APT_CONFIG
COPY --from=build /opt/vmbackup /opt/vmbackup
# Byte code lets an agent start in a third of the time, and its restart is what a suspended guest waits for. It is marked
# as always valid, so that two builds are alike; of the Kubernetes client what no agent loads has none (40 MB).
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends libvirt0 python3 qemu-utils \
 && python3 -m compileall -q -f --invalidation-mode unchecked-hash \
        -x '/kubernetes/(aio|client/(api|models))/' /usr/lib/python3* /opt/vmbackup \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/cache/ldconfig /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/log/* /tmp/*
ENV PATH=/opt/vmbackup/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG BASE
LABEL org.opencontainers.image.title="vmbackup" \
      org.opencontainers.image.description="Live backup of libvirt/QEMU virtual machines, declared as Kubernetes resources" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="vmbackup" \
      org.opencontainers.image.url="https://vmbackup.dev" \
      org.opencontainers.image.source="https://vmbackup.dev" \
      org.opencontainers.image.documentation="https://vmbackup.dev" \
      org.opencontainers.image.base.name="${BASE}"
# It runs as root: disk images belong to root or to QEMU's user, and only root may lock them, write to them and read
# libvirt's configuration. manifests/ takes from it what root need not have.
ENTRYPOINT ["vmbackup"]
CMD ["agent"]
