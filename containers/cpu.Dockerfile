# Two CPU processes, with the versions that `make` installs: quickstart, tests, planning. Not yet built or run.
#
#   docker build -t stillhouse:cpu -f containers/cpu.Dockerfile --build-arg COMMIT=$(git rev-parse HEAD) .
#
# PIP_EXTRA_INDEX_URL can name an index that has torch's CPU build; without one pip brings CUDA's libraries along.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
ARG BASE
ARG COMMIT=unknown
ARG VERSION=0.1.0
ARG SMOKE=cpu
ARG PIP_EXTRA_INDEX_URL=

LABEL org.opencontainers.image.title="Stillhouse on CPUs" \
      org.opencontainers.image.description="Prune and distil Llama-class language models under tensor parallelism" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.base.name="${BASE}"

WORKDIR /opt/stillhouse
COPY setup.py pyproject.toml README.md ./
COPY containers containers
COPY pipelines pipelines
COPY conf conf
COPY launchers launchers
RUN PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL}" \
      pip install --no-cache-dir --constraint containers/constraints.txt --editable . \
    && useradd --create-home --uid 10001 stillhouse \
    && mkdir -p /workspace/runs \
    && chown -R stillhouse /workspace

USER stillhouse
WORKDIR /workspace
ENV HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    STILLHOUSE_COMMIT=${COMMIT} \
    STILLHOUSE_IMAGE=${BASE}
RUN if [ "${SMOKE}" = cpu ]; then \
      python -m pipelines stage=verify parallel=tp2 parallel.device=cpu run.directory=/tmp/smoke \
      && rm -rf /tmp/smoke; \
    fi
ENTRYPOINT ["python", "-m", "pipelines"]
CMD ["--help"]
