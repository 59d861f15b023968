"""NeMo and Lightning. Before any module here imports NeMo, its packages learn to wait for what is asked of them."""

from pipelines.trainer import nemo_packages

nemo_packages.install()
