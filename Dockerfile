# Two images: `docker build --target cpu .` and `docker build --target cuda .`; docs/installing.md has the lines to run them.
# What is in them is pinned by requirements.lock; CUDA itself comes with torch's wheels, the driver from the host.

FROM python:3.12.11-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS tools
RUN pip install uv==0.13.8
ENV UV_NO_CACHE=1 UV_LINK_MODE=copy VIRTUAL_ENV=/opt/rescompress
WORKDIR /build
COPY requirements.lock ./
RUN uv venv /opt/rescompress

FROM tools AS wheel
RUN uv pip install setuptools==84.2.1
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY rescompress rescompress
COPY compress compress
COPY export export
COPY edge_targets edge_targets
COPY examples examples
RUN uv build --wheel --no-build-isolation --python /opt/rescompress/bin/python --out-dir /dist

FROM tools AS cuda-packages
RUN uv pip install --requirements requirements.lock
COPY --from=wheel /dist /dist
RUN uv pip install --no-deps /dist/*.whl && uv pip check

FROM tools AS cpu-packages
RUN grep -vE '^(nvidia|cuda|triton)' requirements.lock > cpu.lock \
 && uv pip install --torch-backend cpu --requirements cpu.lock
COPY --from=wheel /dist /dist
RUN uv pip install --no-deps /dist/*.whl && uv pip check

# OpenMP for the runtimes, and ssh for `deploy`; Debian keeps no older version of a package, so none is named.
FROM base AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 openssh-client \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home rescompress \
 && mkdir /work \
 && chown rescompress /work
ENV PATH=/opt/rescompress/bin:$PATH
WORKDIR /work
USER 10001
ENTRYPOINT ["rescompress"]
CMD ["--help"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-packages /opt/rescompress /opt/rescompress

FROM runtime AS cpu
COPY --from=cpu-packages /opt/rescompress /opt/rescompress
