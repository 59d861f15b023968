"""Which layers a machine with Transformer Engine takes."""

from types import SimpleNamespace

import pytest

from pipelines.model import adam, cpu_runtime, layers

ENGINE = SimpleNamespace(name="Transformer Engine's layers")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has Transformer Engine, as far as layers.py can tell."""
    monkeypatch.setattr(layers.gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(layers.gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", lambda: ENGINE)
    monkeypatch.setattr(layers, "torch_layer_spec", lambda config: config)
    return monkeypatch


def test_on_the_cpu_the_layers_are_plain_torch_whatever_is_installed(engine: pytest.MonkeyPatch) -> None:
    engine.setattr(cpu_runtime, "_installed", True)
    assert layers.layer_spec("config") == "config"  # type: ignore[arg-type]
    assert not layers.uses_transformer_engine()
    engine.setattr(cpu_runtime, "_installed", False)
    assert layers.layer_spec("config") is ENGINE  # type: ignore[arg-type]
    assert layers.uses_transformer_engine()


def test_on_the_cpu_the_optimizer_is_plain_torch_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    class FusedAdam:
        __module__ = "transformer_engine"

    for module, name, value in (
        (optimizer, "Adam", FusedAdam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "Adam", FusedAdam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
        (clip_grads, "l2_norm_impl", None),
        (clip_grads, "multi_tensor_scale_impl", None),
        (clip_grads, "multi_tensor_applier", None),
        (cpu_runtime, "_installed", False),
    ):
        monkeypatch.setattr(module, name, value, raising=False)
    assert adam.install() == "transformer_engine.FusedAdam"
    monkeypatch.setattr(cpu_runtime, "_installed", True)
    assert adam.install() == "torch AdamW"
    assert optimizer.Adam is distrib_optimizer.Adam is adam.Adam
    assert clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm
