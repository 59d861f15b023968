"""What an evaluation measures of the models' speed."""

from collections.abc import Collection

from pipelines.config import Config, expect


def check(config: Config, stages: Collection[str]) -> None:
    settings = config.evaluate.efficiency
    if "evaluate" not in stages or not settings.batch_sizes:
        return
    name, remedy = "evaluate.efficiency", "Raise it, or set evaluate.efficiency.batch_sizes=[] to leave this out."
    expect(settings.new_tokens > 1, f"{name}.new_tokens", "2 or more", settings.new_tokens, remedy)
    remedy = "Give one, or set evaluate.efficiency.batch_sizes=[] to leave this out."
    engines = [engine.value for engine in settings.engines]
    found = f"{', '.join(engines)}" if engines else "none"
    once = engines and len(set(engines)) == len(engines)
    expect(bool(once), f"{name}.engines", "transformers, vllm or both, each once", found, "Say [transformers,vllm].")
    expect(bool(settings.prompt_tokens), f"{name}.prompt_tokens", "one length or more", "none", remedy)
