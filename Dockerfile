# GPUs: NVIDIA's image of the generation that this NeMo belongs to (containers/README.md). Not yet built or run.
#
#   docker build -t stillhouse --build-arg COMMIT=$(git rev-parse HEAD) .
#
# BASE=nvcr.io/nvidia/nemo@sha256:... pins it by digest. SMOKE=none leaves the proof at the end of the build out.
ARG BASE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE}
ARG BASE
ARG COMMIT=unknown
ARG VERSION=0.1.0
ARG SMOKE=cpu

LABEL org.opencontainers.image.title="Stillhouse" \
      org.opencontainers.image.description="Prune and distil Llama-class language models under tensor parallelism" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.base.name="${BASE}"

WORKDIR /opt/stillhouse
COPY setup.py pyproject.toml README.md ./
COPY containers containers

# NeMo over the image's 2.6.0, and of what else setup.py names only what the image has in no version at all. Nothing that
# is there is changed: torch, Transformer Engine, Apex and Megatron-Core are built for this image and for each other. The
# image's own constraints on pip would refuse another NeMo.
RUN PIP_CONSTRAINT= pip install --no-cache-dir --no-deps nemo_toolkit==2.7.3 \
    && python containers/lacking.py > /tmp/lacking.txt \
    && PIP_CONSTRAINT= pip install --no-cache-dir --no-deps -r /tmp/lacking.txt \
    && rm /tmp/lacking.txt

COPY pipelines pipelines
COPY conf conf
COPY launchers launchers
RUN PIP_CONSTRAINT= pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && useradd --create-home --uid 10001 stillhouse \
    && mkdir -p /workspace/runs \
    && chown -R stillhouse /workspace

USER stillhouse
WORKDIR /workspace
ENV HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    STILLHOUSE_COMMIT=${COMMIT} \
    STILLHOUSE_IMAGE=${BASE}
# The proof against float64, over two CPU processes: a build has no GPU. On one that has: stage=verify parallel=tp2.
RUN if [ "${SMOKE}" = cpu ]; then \
      CUDA_VISIBLE_DEVICES= python -m pipelines stage=verify parallel=tp2 parallel.device=cpu run.directory=/tmp/smoke \
      && rm -rf /tmp/smoke; \
    fi
ENTRYPOINT ["python", "-m", "pipelines"]
CMD ["--help"]
