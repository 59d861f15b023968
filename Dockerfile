# GPUs: NVIDIA's image of the generation that this NeMo belongs to (containers/README.md). Not yet built or run.
#
#   docker build -t stillhouse .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" stillhouse stage=verify parallel=tp2
FROM nvcr.io/nvidia/nemo:25.11

# Over the image's NeMo 2.6.0, with nothing else changed: torch, Transformer Engine, Apex and Megatron-Core are built for
# this image and for each other.
RUN pip install --no-cache-dir --no-deps nemo_toolkit==2.7.3

WORKDIR /opt/stillhouse
COPY setup.py pyproject.toml README.md ./
COPY pipelines pipelines
COPY conf conf
COPY launchers launchers
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -c "import hydra, jinja2, matplotlib, rich, safetensors, tokenizers, transformers, yaml"

RUN useradd --create-home --uid 10001 stillhouse && mkdir -p /workspace/runs && chown -R stillhouse /workspace
USER stillhouse
WORKDIR /workspace
ENV HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
ENTRYPOINT ["python", "-m", "pipelines"]
CMD ["--help"]
