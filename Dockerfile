# The image of the agent: `docker build -t vmbackup .`, or the same with podman or buildah.
#
# Debian's Python and libvirt client, our locked Python packages, and qemu-img. It uses plain Dockerfile syntax only.
# With mirrors of your own, set a base image that is configured for your Debian mirror (--build-arg BASE=…), and the
# settings of apt and pip as build arguments (--build-arg PIP_INDEX_URL, …; without a value, the environment's value is
# used). They apply to the build only; nothing of them stays in the image.
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
# Every download has a hash in a lock, build tools included. Only libvirt-python is compiled; the rest are wheels.
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
# The label below and the package must have the same version.
ARG VERSION=0.1.0
RUN says=$(PYTHONDONTWRITEBYTECODE=1 /opt/vmbackup/bin/vmbackup --version) \
 && { [ "$says" = "vmbackup $VERSION" ] || { echo "the package is $says, VERSION is $VERSION" >&2; exit 1; }; }

FROM ${BASE}
ARG APT_CONFIG
COPY --from=build /opt/vmbackup /opt/vmbackup
# With byte code an agent starts in a third of the time, and a suspended guest may be waiting for its restart. It is marked
# as always valid, so that builds are reproducible. Modules of the Kubernetes client that no agent loads have none (40 MB).
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
# libvirt's configuration. manifests/ drops the capabilities that it does not need.
ENTRYPOINT ["vmbackup"]
CMD ["agent"]
