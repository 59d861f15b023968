"""When to validate: at every interval, always after the last step, and not twice where a run continues."""

from typing import Any

from nemo.lightning.pytorch.trainer import NoValOnRestartTrainingLoop


class TrainingLoop(NoValOnRestartTrainingLoop):
    """Lightning's loop over steps. NeMo's base does not begin a resumed run with the validation behind its checkpoint.

    The last step gets a validation whatever the interval: the figures of the last one are those of the final weights.
    """

    def validates(self) -> bool:
        """Whether a validation follows the step that has just been taken."""
        return self.global_step % self.trainer.val_check_interval == 0 or self.global_step >= self.max_steps

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        return not self.skip_val_on_restart and self.validates()
