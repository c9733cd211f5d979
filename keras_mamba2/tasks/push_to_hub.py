from collections.abc import Callable
from typing import ClassVar

from keras_mamba2 import hub


class PushToHub:
    """A task that can be pushed to the Hugging Face hub."""

    pipeline_tag: ClassVar[str]  # the hub's name of the task
    save_to_preset: Callable[..., None]

    def push_to_hub(
        self,
        repository: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a keras_mamba2 preset",
    ) -> str:
        """Saves the model as a preset in a repository of the Hugging Face hub, as one commit.

        A repository without a model card gets a short one, which says how to load the model.

        Args:
            repository: `user/name`, made if there is none. `from_preset("hf://user/name")` then
                loads it.
            private: bool, whether a new repository is private; `None` for the user's default.
            token: the user's token; `None` for that of `hf auth login` or HF_TOKEN.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: for a wrong name, and a user who is unknown or may not write there.
        """

        def card(name: str) -> str:
            return hub.card(name, self.pipeline_tag, type(self).__name__)

        return hub.push(repository, self.save_to_preset, card, private, token, commit_message)
