"""What an objective and the training step say to each other."""

from typing import Any

from jax import Array

from jaxllm.models import Model

__all__ = ["Objective"]


class Objective:
    """Base of every objective: a frozen, hashable dataclass of options, no arrays.

    A step may be cut into parts whose gradients are summed. So that the sum is the
    gradient of the whole batch, whatever the parts hold, the step first asks for the
    `weights` of the whole batch and then for the loss of every part, divided by them:
    losses and metrics of the parts add up to those of the batch.
    """

    def bind(self, lm: Any) -> tuple["Objective", Any]:
        """Prepares for a model, on the host: loads a teacher, checks tokenizers.

        Args:
          lm: The `LanguageModel` that is trained.

        Returns:
          The objective to use, and parameters that it reads and nobody trains.
        """
        return self, {}

    def weights(self, batch: Any) -> dict[str, Array]:
        """Returns float32 scalars, the weight of every term of a batch.

        They depend on the batch alone, and those of parts add up to those of a whole.
        """
        raise NotImplementedError

    def loss(
        self,
        model: Model,
        params: Any,
        batch: Any,
        weights: dict[str, Array],
        key: Array,
        frozen: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss of a part of a batch.

        Args:
          model: What is trained.
          params: Its parameters.
          batch: The part; a `Batch` unless the objective says otherwise.
          weights: Those of the whole batch; none is zero.
          key: Of this part of this step.
          frozen: What `bind` returned.

        Returns:
          float32 scalars: the loss, and metrics by name; both add up over the parts.
        """
        raise NotImplementedError
