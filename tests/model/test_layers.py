"""Which layers a machine with Transformer Engine takes."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from pipelines.config import UserError
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


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU machine with Transformer Engine and Apex, as far as adam.py can tell; Megatron is as before afterwards."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    for module, names in (
        (optimizer, ("Adam", "USING_PYTORCH_OPTIMIZER")),
        (distrib_optimizer, ("Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")),
        (clip_grads, ("l2_norm_impl", "multi_tensor_scale_impl", "multi_tensor_applier")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, None)
    for package in adam.FUSED.values():
        made = type("FusedAdam", (), {"__module__": package})
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(FusedAdam=made))
    monkeypatch.setattr(cpu_runtime, "_installed", False)
    yield monkeypatch


def test_the_first_optimizer_that_is_there_is_taken(machine: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert adam.install() == "transformer_engine.pytorch.optimizers.FusedAdam"
    assert distrib_optimizer.USING_TE_OPTIMIZER and not distrib_optimizer.USING_APEX_OPTIMIZER
    assert adam.install("apex") == "apex.optimizers.FusedAdam"
    assert distrib_optimizer.USING_APEX_OPTIMIZER and not distrib_optimizer.USING_TE_OPTIMIZER
    machine.setitem(sys.modules, adam.FUSED["transformer_engine"], None)
    assert adam.install() == "apex.optimizers.FusedAdam"
    assert optimizer.Adam is distrib_optimizer.Adam is sys.modules["apex.optimizers"].FusedAdam
    with pytest.raises(UserError, match="optimizer=transformer_engine: expected transformer_engine.*FusedAdam, found"):
        adam.install("transformer_engine")
    assert adam.install("torch") == "torch AdamW, fused" and optimizer.Adam is adam.Adam
    machine.setitem(sys.modules, adam.FUSED["apex"], None)
    assert adam.install() == "torch AdamW, fused"


def test_on_the_cpu_the_optimizer_is_plain_torch_whatever_is_installed(machine: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    machine.setattr(cpu_runtime, "_installed", True)
    assert adam.install() == "torch AdamW"
    assert optimizer.Adam is distrib_optimizer.Adam is adam.Adam
    assert clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm
